/* peak.c: nn_peak_flops of nn.h: the ceiling that benchmarks are held against. */
#include "peak.h"

#include <time.h>

#define WINDOWS 8

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Best of WINDOWS windows, all threads together. Where the vector code lacks fused multiply-adds, a multiply and an add count. */
nn_status nn_peak_flops(nn_context *context, double *flops, double seconds) {
  NN_REQUIRE(context, seconds > 0 && seconds <= 60);
  int64_t rounds = 1000;
  volatile float kept = 0;
  for (;;) { /* as many rounds as fill a window on one thread */
    double start = now();
    kept = NN_DISPATCH(context, nn_fma_loop)(rounds);
    if (now() - start >= seconds / WINDOWS || rounds > INT64_MAX / 4) break;
    rounds *= 2;
  }
  double best = 0;
  for (int window = 0; window < WINDOWS; window++) {
    double start = now();
#pragma omp parallel num_threads(context->threads)
    {
      volatile float own = NN_DISPATCH(context, nn_fma_loop)(rounds);
      (void)own;
    }
    double rate = (double)context->threads * (double)rounds * (double)NN_DISPATCH(context, nn_fma_flops)() / (now() - start);
    if (rate > best) best = rate;
  }
  (void)kept;
  *flops = best;
  return NN_OK;
}
