/* optimizer.c: gradient norm, clip, sum and AdamW of nn.h, for the CPU. build: -ffp-contract=off
 *
 * The order of every sum and operation is stated in nn.h; threads own chunks of 4096 elements, and no partial sum belongs to a
 * thread. Learning rate and step come from device memory, as on the GPU.
 */
#include <math.h>

#include "../include/nn_random.h"
#include "vector_kernels.h"

#define SUM_CHUNK 4096
#define SUM_LANES 64

/* The same order as nn_chunk_sum, for sums that are float64 already. */
static double chunk_sum_f64(const double *x, int64_t n) {
  double lane[SUM_LANES] = {0};
  for (int64_t i = 0; i < n; i++) lane[i % SUM_LANES] += x[i];
  for (int half = SUM_LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lane[l] += lane[l + half];
  return lane[0];
}

/* The sum of x or of its squares. The tree has three levels of 4096, so that two small arrays hold all its inner sums: `low` those
 * of one group of 4096 chunks, `high` those of the groups. */
static nn_status ordered_sum(nn_context *context, double *out, const float *x, int64_t n, int squared) {
  double low[SUM_CHUNK], high[SUM_CHUNK];
  const int64_t group = (int64_t)SUM_CHUNK * SUM_CHUNK;
  const int64_t groups = nn_ceil_div(n, group);
  if (groups > SUM_CHUNK) return nn_fail(context, NN_ERROR_UNSUPPORTED, "a sum over more than 2^36 elements");
  *out = 0.0;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t elements = nn_min64(group, n - g * group), chunks = nn_ceil_div(elements, SUM_CHUNK);
#pragma omp parallel for num_threads(nn_team(context, elements, NN_GRAIN)) schedule(static)
    for (int64_t c = 0; c < chunks; c++) {
      const float *from = x + g * group + c * SUM_CHUNK;
      const int64_t count = nn_min64(SUM_CHUNK, elements - c * SUM_CHUNK);
      low[c] = squared ? NN_DISPATCH(context, nn_chunk_sum_of_squares)(from, count) : NN_DISPATCH(context, nn_chunk_sum)(from, count);
    }
    high[g] = chunks == 1 ? low[0] : chunk_sum_f64(low, chunks);
  }
  if (groups > 0) *out = groups == 1 ? high[0] : chunk_sum_f64(high, groups);
  return NN_OK;
}

nn_status nn_sum(nn_context *context, double *out, const float *x, int64_t n) {
  NN_REQUIRE(context, n >= 0);
  return ordered_sum(context, out, x, n, 0);
}

nn_status nn_grad_norm(nn_context *context, double *sum_of_squares, const float *gradient, int64_t n) {
  NN_REQUIRE(context, n >= 0);
  return ordered_sum(context, sum_of_squares, gradient, n, 1);
}

nn_status nn_grad_clip(nn_context *context, double *control, const double *sum_of_squares, double clip) {
  NN_REQUIRE(context, clip > 0);
  const double norm = sqrt(sum_of_squares[0]), scale = clip / (norm + 1e-6);
  control[0] = norm;
  control[1] = scale < 1.0 ? scale : 1.0;
  control[2] = isfinite(norm) ? 0.0 : 1.0;
  return NN_OK;
}

nn_status nn_zero_grad(nn_context *context, float *gradient, int64_t n) {
  NN_REQUIRE(context, n >= 0);
  const int64_t chunk = (int64_t)1 << 20, chunks = nn_ceil_div(n, chunk);
#pragma omp parallel for num_threads(nn_team(context, n, 4 * NN_GRAIN)) schedule(static)
  for (int64_t c = 0; c < chunks; c++) memset(gradient + c * chunk, 0, (size_t)nn_min64(chunk, n - c * chunk) * sizeof(float));
  return NN_OK;
}

nn_status nn_adamw_step(nn_context *context, void *parameter, uint16_t *residue, void *m, void *v, const float *gradient,
                        const double *control, const double *schedule, int64_t n, double beta1, double beta2, double epsilon,
                        double decay, nn_dtype state_dtype, nn_dtype dtype) {
  NN_REQUIRE(context, n >= 0);
  NN_REQUIRE(context, beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1 && epsilon > 0);
  NN_REQUIRE(context, state_dtype == NN_F32 || state_dtype == NN_BF16);
  NN_REQUIRE(context, dtype == NN_F32 || dtype == NN_BF16);
  NN_REQUIRE(context, n == 0 || (residue != NULL) == (dtype == NN_BF16));
  if (control[2] != 0.0) return NN_OK;
  const double rate = schedule[0];
  const int64_t step = (int64_t)schedule[1];
  const nn_adamw_scalars s = {
      .clip = (float)control[1],
      .beta1 = (float)beta1,
      .one_minus_beta1 = (float)(1.0 - beta1),
      .beta2 = (float)beta2,
      .one_minus_beta2 = (float)(1.0 - beta2),
      .rate = (float)rate,
      .rate_decay = (float)(rate * decay),
      .inverse1 = (float)(1.0 / (1.0 - nn_ieee_power(beta1, step))),
      .inverse2 = (float)(1.0 / (1.0 - nn_ieee_power(beta2, step))),
      .epsilon = (float)epsilon,
  };
  const int64_t chunks = nn_ceil_div(n, NN_CHUNK);
#pragma omp parallel for num_threads(nn_team(context, n, NN_GRAIN)) schedule(static)
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t at = c * NN_CHUNK, count = nn_min64(NN_CHUNK, n - at);
    float joined[NN_CHUNK], *p = dtype == NN_F32 ? (float *)parameter + at : joined;
    uint16_t *high = (uint16_t *)parameter + at, *low = residue + at; /* of dtype bf16 */
    if (dtype == NN_BF16) NN_DISPATCH(context, nn_join_range)(p, high, low, count);
    if (state_dtype == NN_F32)
      NN_DISPATCH(context, nn_adamw_range)(p, (float *)m + at, (float *)v + at, gradient + at, count, &s);
    else
      NN_DISPATCH(context, nn_adamw_bf16_range)(p, (uint16_t *)m + at, (uint16_t *)v + at, gradient + at, count, &s);
    if (dtype == NN_BF16) NN_DISPATCH(context, nn_split_range)(high, low, p, count);
  }
  return NN_OK;
}
