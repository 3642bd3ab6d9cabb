/* graph.c: graphs and time (nn.h) for the CPU, and the step of a decoding loop. There are no graphs here: a call costs nothing that
 * recording could save. Work is done when its call returns, so the process's clock is the device's.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <time.h>

#include "internal.h"

static uint64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

nn_status nn_graph_begin(nn_context *context) {
  return nn_fail(context, NN_ERROR_UNSUPPORTED, "%s: the CPU library records no graphs", __func__);
}

nn_status nn_graph_end(nn_context *context, uint64_t *graph) {
  *graph = 0;
  return nn_fail(context, NN_ERROR_UNSUPPORTED, "%s: the CPU library records no graphs", __func__);
}

nn_status nn_graph_launch(nn_context *context, uint64_t graph) {
  return nn_fail(context, NN_ERROR_UNSUPPORTED, "%s: the CPU library has no graph %llu", __func__, (unsigned long long)graph);
}

nn_status nn_graph_destroy(nn_context *context, uint64_t graph) {
  return nn_fail(context, NN_ERROR_UNSUPPORTED, "%s: the CPU library has no graph %llu", __func__, (unsigned long long)graph);
}

nn_status nn_timer_start(nn_context *context, uint64_t *timer) {
  (void)context;
  *timer = nanoseconds();
  return NN_OK;
}

nn_status nn_timer_stop(nn_context *context, double *milliseconds, uint64_t timer) {
  const uint64_t now = nanoseconds();
  *milliseconds = 0.0;
  NN_REQUIRE(context, timer <= now);
  *milliseconds = (double)(now - timer) / 1e6;
  return NN_OK;
}

nn_status nn_advance(nn_context *context, int32_t *history, int32_t *start, int32_t *counter, int32_t *step, const int32_t *token,
                     int64_t B, int64_t R) {
  NN_REQUIRE(context, B >= 0 && R >= 0);
  const int32_t row = R > 0 ? *step : -1;
  if (row < 0 || row >= R) return NN_OK;
  for (int64_t b = 0; b < B; b++) {
    history[row * B + b] = token[b];
    start[b]++;
    counter[b]++;
  }
  *step = (int32_t)((row + 1) % R);
  return NN_OK;
}
