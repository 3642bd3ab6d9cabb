/* loss.c: cross-entropy and the aux loss of nn.h, for the CPU. The fused LM head is linear_cross_entropy.c.
 *
 * A row of logits is done by one thread; the aux loss sums the tokens of an expert in float64 in rising order.
 */
#include <math.h>

#include "vector_kernels.h"

nn_status nn_cross_entropy_forward(nn_context *context, float *loss, const void *logits, const int32_t *target, int64_t T,
                                   int64_t V, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && V >= 0);
  NN_REQUIRE_F32(context, dtype);
#pragma omp parallel for num_threads(nn_team(context, T * V, NN_GRAIN / 4)) schedule(static)
  for (int64_t t = 0; t < T; t++) {
    const float *row = (const float *)logits + t * V;
    if (target[t] == NN_IGNORED_TARGET) {
      loss[t] = 0.0f;
    } else if (target[t] < 0 || target[t] >= V) {
      loss[t] = NAN;
    } else {
      float largest, sum = NN_DISPATCH(context, nn_exp_sum_row)(&largest, row, V);
      loss[t] = (float)(log((double)sum) + ((double)largest - (double)row[target[t]]));
    }
  }
  return NN_OK;
}

nn_status nn_cross_entropy_backward(nn_context *context, void *dlogits, const void *logits, const int32_t *target, int64_t T,
                                    int64_t V, float scale, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && V >= 0);
  NN_REQUIRE_F32(context, dtype);
#pragma omp parallel for num_threads(nn_team(context, T * V, NN_GRAIN / 4)) schedule(static)
  for (int64_t t = 0; t < T; t++) {
    const float *row = (const float *)logits + t * V;
    float *to = (float *)dlogits + t * V;
    if (target[t] == NN_IGNORED_TARGET) {
      memset(to, 0, (size_t)V * sizeof(float));
    } else if (target[t] < 0 || target[t] >= V) {
      for (int64_t i = 0; i < V; i++) to[i] = NAN;
    } else {
      float largest, sum = NN_DISPATCH(context, nn_exp_sum_row)(&largest, row, V);
      NN_DISPATCH(context, nn_exp_row)(to, row, V, largest, scale / sum);
      to[target[t]] -= scale;
    }
  }
  return NN_OK;
}

nn_status nn_aux_loss(nn_context *context, float *aux, const float *probability, const int32_t *load, int64_t T, int64_t E,
                      int64_t K) {
  NN_REQUIRE(context, T >= 0 && E >= 0 && K >= 0);
  double total = 0.0;
  for (int64_t first = 0; first < E && T > 0 && K > 0; first += 16) {
    const int64_t count = nn_min64(16, E - first);
    double sum[16] = {0};
    for (int64_t t = 0; t < T; t++)
      for (int64_t i = 0; i < count; i++) sum[i] += (double)probability[t * E + first + i];
    for (int64_t i = 0; i < count; i++)
      total += (double)load[first + i] / ((double)T * (double)K) * (sum[i] / (double)T);
  }
  *aux = (float)((double)E * total);
  return NN_OK;
}
