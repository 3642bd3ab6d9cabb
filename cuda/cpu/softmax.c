/* softmax.c: softmax and the router (softmax, top-k, renormalise) of nn.h, for the CPU.
 *
 * Checks and shares the rows among the threads; a row is done by one thread with the loops of softmax.simd.c. Knows nothing of
 * experts beyond their scores.
 */
#include <math.h>

#include "vector_kernels.h"

nn_status nn_softmax_forward(nn_context *context, void *y, const void *x, int64_t rows, int64_t columns, nn_dtype dtype) {
  NN_REQUIRE(context, rows >= 0 && columns >= 0);
  NN_REQUIRE_F32(context, dtype);
#pragma omp parallel for num_threads(nn_team(context, rows * columns, NN_GRAIN / 4)) schedule(static)
  for (int64_t r = 0; r < rows; r++)
    NN_DISPATCH(context, nn_softmax_row)((float *)y + r * columns, (const float *)x + r * columns, columns);
  return NN_OK;
}

nn_status nn_softmax_backward(nn_context *context, void *dx, const void *dy, const void *y, int64_t rows, int64_t columns,
                              nn_dtype dtype) {
  NN_REQUIRE(context, rows >= 0 && columns >= 0);
  NN_REQUIRE_F32(context, dtype);
#pragma omp parallel for num_threads(nn_team(context, rows * columns, NN_GRAIN)) schedule(static)
  for (int64_t r = 0; r < rows; r++)
    NN_DISPATCH(context, nn_softmax_backward_row)((float *)dx + r * columns, (const float *)dy + r * columns,
                                                  (const float *)y + r * columns, columns);
  return NN_OK;
}

/* Whether logit a comes before logit b: NaN first, then the larger. The probabilities are in the same order but for those that
 * rounding or underflow made equal; logits have one order on every device. */
static int comes_before(float a, float b) { return isnan(a) || isnan(b) ? isnan(a) && !isnan(b) : a > b; }

/* The K first experts in the order of comes_before, ties to the lower index: K places, each expert inserted once. */
static void choose(int32_t *index, const float *logits, int64_t E, int64_t K) {
  int64_t chosen = 0;
  for (int64_t i = 0; i < E; i++) {
    int64_t place = chosen;
    while (place > 0 && comes_before(logits[i], logits[index[place - 1]])) place--;
    if (place >= K) continue;
    if (chosen < K) chosen++;
    for (int64_t k = chosen - 1; k > place; k--) index[k] = index[k - 1];
    index[place] = (int32_t)i;
  }
}

nn_status nn_softmax_topk_forward(nn_context *context, float *probability, float *weight, int32_t *index, const float *logits,
                                  int64_t T, int64_t E, int64_t K) {
  NN_REQUIRE(context, T >= 0 && E >= 0 && K >= 0 && K <= E);
#pragma omp parallel for num_threads(nn_team(context, T * E, NN_GRAIN / 8)) schedule(static)
  for (int64_t t = 0; t < T; t++) {
    float *p = probability + t * E, *w = weight + t * K;
    NN_DISPATCH(context, nn_softmax_row)(p, logits + t * E, E);
    choose(index + t * K, logits + t * E, E, K);
    float sum = 0.0f;
    for (int64_t k = 0; k < K; k++) sum += p[index[t * K + k]];
    for (int64_t k = 0; k < K; k++) w[k] = p[index[t * K + k]] / sum;
  }
  return NN_OK;
}

nn_status nn_softmax_topk_backward(nn_context *context, float *dlogits, const float *dweight, const float *probability,
                                   const float *weight, const int32_t *index, const int32_t *load, int64_t T, int64_t E,
                                   int64_t K, float aux_scale) {
  NN_REQUIRE(context, T >= 0 && E >= 0 && K >= 0 && K <= E);
#pragma omp parallel for num_threads(nn_team(context, T * E, NN_GRAIN / 4)) schedule(static)
  for (int64_t t = 0; t < T; t++) {
    const float *p = probability + t * E, *dw = dweight + t * K, *w = weight + t * K;
    const int32_t *chosen = index + t * K;
    float *dp = dlogits + t * E;
    /* aux_scale * E * f_i / T with f_i = load[i] / (T*K) */
    const float share = K > 0 ? (float)((double)aux_scale * (double)E / ((double)T * (double)T * (double)K)) : 0.0f;
    for (int64_t i = 0; i < E; i++) dp[i] = share * (float)load[i];
    /* w_k = p_k / sum: dp_k += (dw_k - sum over j of dw_j w_j) / sum */
    float sum = 0.0f, mean = 0.0f;
    for (int64_t k = 0; k < K; k++) {
      if (chosen[k] < 0 || chosen[k] >= E) continue;
      sum += p[chosen[k]];
      mean += dw[k] * w[k];
    }
    for (int64_t k = 0; k < K; k++)
      if (chosen[k] >= 0 && chosen[k] < E) dp[chosen[k]] += (dw[k] - mean) / sum;
    float dot = 0.0f;
    for (int64_t i = 0; i < E; i++) dot += p[i] * dp[i];
    for (int64_t i = 0; i < E; i++) dp[i] = p[i] * (dp[i] - dot);
  }
  return NN_OK;
}
