/* softmax.simd.c: the inner loops over one row of a softmax or of the loss; see vector_kernels.h. Called by softmax.c, loss.c and
 * linear_cross_entropy.c. Sums run over NN_LANES lanes, then over the lanes in halves. build: -ffp-contract=off */
#include "simd.h"
#include "vector_kernels.h"

/* exp(x - largest) of a vector; lanes past `count` are 0. */
NN_INLINE nn_vec exp_below(const float *x, nn_vec largest, int64_t count) {
  nn_vec e = nn_v_exp(nn_v_get(x, count) - largest);
  return count >= NN_LANES ? e : nn_v_keep(e, count, nn_v_set(0.0f));
}

void NN_SIMD(nn_exp_row)(float *y, const float *x, int64_t n, float largest, float factor) {
  nn_vec top = nn_v_set(largest), scale = nn_v_set(factor);
  for (int64_t i = 0; i < n; i += NN_LANES) nn_v_put(y + i, nn_v_exp(nn_v_get(x + i, n - i) - top) * scale, n - i);
}

float NN_SIMD(nn_exp_sum_row)(float *largest, const float *x, int64_t n) {
  *largest = nn_v_largest_of(x, n, -INFINITY);
  nn_vec top = nn_v_set(*largest), sum = nn_v_set(0.0f);
  for (int64_t i = 0; i < n; i += NN_LANES) sum = sum + exp_below(x + i, top, n - i);
  return nn_v_sum(sum);
}

void NN_SIMD(nn_softmax_row)(float *y, const float *x, int64_t n) {
  nn_vec top = nn_v_set(nn_v_largest_of(x, n, -INFINITY)), sum = nn_v_set(0.0f);
  for (int64_t i = 0; i < n; i += NN_LANES) {
    nn_vec e = exp_below(x + i, top, n - i);
    sum = sum + e;
    nn_v_put(y + i, e, n - i);
  }
  nn_vec total = nn_v_set(nn_v_sum(sum));
  for (int64_t i = 0; i < n; i += NN_LANES) nn_v_put(y + i, nn_v_get(y + i, n - i) / total, n - i);
}

void NN_SIMD(nn_softmax_backward_row)(float *dx, const float *dy, const float *y, int64_t n) {
  nn_vec sum = nn_v_set(0.0f);
  for (int64_t i = 0; i < n; i += NN_LANES) sum = nn_v_fma(nn_v_get(dy + i, n - i), nn_v_get(y + i, n - i), sum);
  nn_vec dot = nn_v_set(nn_v_sum(sum));
  for (int64_t i = 0; i < n; i += NN_LANES)
    nn_v_put(dx + i, nn_v_get(y + i, n - i) * (nn_v_get(dy + i, n - i) - dot), n - i);
}

float NN_SIMD(nn_loss_row)(float *logits, int64_t V, int32_t target, float scale, int gradient) {
  if (target == NN_IGNORED_TARGET) {
    if (gradient) memset(logits, 0, (size_t)V * sizeof *logits);
    return 0.0f;
  }
  const int known = target >= 0 && target < V;
  const float top = nn_v_largest_of(logits, V, -INFINITY), at_target = known ? logits[target] : NAN;
  nn_vec bound = nn_v_set(top), sum = nn_v_set(0.0f);
  for (int64_t i = 0; i < V; i += NN_LANES) {
    nn_vec e = exp_below(logits + i, bound, V - i);
    sum = sum + e;
    if (gradient) nn_v_put(logits + i, e, V - i);
  }
  const float total = nn_v_sum(sum);
  if (gradient) {
    const nn_vec factor = nn_v_set(known ? scale / total : NAN);
    for (int64_t i = 0; i < V; i += NN_LANES) nn_v_put(logits + i, nn_v_get(logits + i, V - i) * factor, V - i);
    if (known) logits[target] -= scale;
  }
  return (float)(log((double)total) + ((double)top - (double)at_target));
}
