/* softmax.simd.c: the inner loops over one row of a softmax or of the loss; see vector_kernels.h. Called by softmax.c and loss.c.
 * Sums run over NN_LANES lanes, then over the lanes in halves. build: -ffp-contract=off */
#include <math.h>

#include "simd.h"
#include "vector_kernels.h"
#include "vector_math.h"

/* The largest of n elements; -infinity when there is none. NaN does not count. */
NN_INLINE float largest_of(const float *x, int64_t n) {
  nn_vf best = nn_v_set(-INFINITY);
  int64_t i = 0;
  for (; i + NN_LANES <= n; i += NN_LANES) best = nn_v_max(nn_v_load(x + i), best);
  if (i < n) best = nn_v_max(nn_v_keep(nn_v_load_part(x + i, n - i), n - i, best), best);
  return nn_v_largest(best);
}

/* exp(x - largest) of a vector; lanes past `count` are 0. */
NN_INLINE nn_vf exp_below(const float *x, nn_vf largest, int64_t count) {
  nn_vf e = nn_v_exp(nn_v_get(x, count) - largest);
  return count >= NN_LANES ? e : nn_v_keep(e, count, nn_v_set(0.0f));
}

void NN_SIMD(nn_exp_row)(float *y, const float *x, int64_t n, float largest, float factor) {
  nn_vf top = nn_v_set(largest), scale = nn_v_set(factor);
  for (int64_t i = 0; i < n; i += NN_LANES) nn_v_put(y + i, nn_v_exp(nn_v_get(x + i, n - i) - top) * scale, n - i);
}

float NN_SIMD(nn_exp_sum_row)(float *largest, const float *x, int64_t n) {
  *largest = largest_of(x, n);
  nn_vf top = nn_v_set(*largest), sum = nn_v_set(0.0f);
  for (int64_t i = 0; i < n; i += NN_LANES) sum = sum + exp_below(x + i, top, n - i);
  return nn_v_sum(sum);
}

void NN_SIMD(nn_softmax_row)(float *y, const float *x, int64_t n) {
  nn_vf top = nn_v_set(largest_of(x, n)), sum = nn_v_set(0.0f);
  for (int64_t i = 0; i < n; i += NN_LANES) {
    nn_vf e = exp_below(x + i, top, n - i);
    sum = sum + e;
    nn_v_put(y + i, e, n - i);
  }
  nn_vf total = nn_v_set(nn_v_sum(sum));
  for (int64_t i = 0; i < n; i += NN_LANES) nn_v_put(y + i, nn_v_get(y + i, n - i) / total, n - i);
}

void NN_SIMD(nn_softmax_backward_row)(float *dx, const float *dy, const float *y, int64_t n) {
  nn_vf sum = nn_v_set(0.0f);
  for (int64_t i = 0; i < n; i += NN_LANES) sum = nn_v_fma(nn_v_get(dy + i, n - i), nn_v_get(y + i, n - i), sum);
  nn_vf dot = nn_v_set(nn_v_sum(sum));
  for (int64_t i = 0; i < n; i += NN_LANES)
    nn_v_put(dx + i, nn_v_get(y + i, n - i) * (nn_v_get(dy + i, n - i) - dot), n - i);
}
