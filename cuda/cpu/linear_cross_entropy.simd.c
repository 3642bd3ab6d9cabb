/* linear_cross_entropy.simd.c: one row of the loss: log-sum-exp, and the logits' gradient in their place. */
#include "linear_cross_entropy.h"
#include "simd.h"

float NN_SIMD(nn_loss_row)(float *logits, int64_t V, int32_t target, float scale, int gradient) {
  if (target == NN_IGNORED_TARGET) {
    if (gradient) memset(logits, 0, (size_t)V * sizeof *logits);
    return 0.0f;
  }
  int64_t whole = V - V % NN_VL, rest = V - whole;
  nn_vec largest = nn_set(-INFINITY);
  for (int64_t j = 0; j < whole; j += NN_VL) largest = nn_max(nn_load(logits + j), largest);
  for (int64_t j = whole; j < V; j++) largest = nn_max(nn_set(logits[j]), largest);
  float lanes[NN_VL], top = -INFINITY;
  nn_store(lanes, largest);
  for (int i = 0; i < NN_VL; i++) top = lanes[i] > top ? lanes[i] : top;

  float at_target = target >= 0 && target < V ? logits[target] : NAN;
  nn_vec sum = {0};
  for (int64_t j = 0; j < whole; j += NN_VL) {
    nn_vec e = nn_exp(nn_load(logits + j) - top);
    if (gradient) nn_store(logits + j, e);
    sum += e;
  }
  float total = nn_sum_of(sum);
  if (rest > 0) {
    float tail[NN_VL];
    nn_store(tail, nn_exp(nn_load_tail(logits + whole, rest) - top));
    for (int64_t j = 0; j < rest; j++) total += tail[j];
    if (gradient) memcpy(logits + whole, tail, (size_t)rest * sizeof *tail);
  }
  float loss = (float)(log((double)total) + (double)top - (double)at_target);
  if (!gradient) return loss;
  float factor = target >= 0 && target < V ? scale / total : NAN;
  for (int64_t j = 0; j < whole; j += NN_VL) nn_store(logits + j, nn_load(logits + j) * factor);
  for (int64_t j = whole; j < V; j++) logits[j] *= factor;
  if (target >= 0 && target < V) logits[target] -= scale;
  return loss;
}
