/* linear_cross_entropy.c: the LM head and the loss in one (nn_linear_cross_entropy of nn.h).
 *
 * Owns the chunks. CHUNK_TOKENS tokens at a time: logits to the workspace, their gradient in the same place, then the chunk's
 * dx and its share of dweight. The weight gradient goes on from chunk to chunk in a private [V, H] buffer, so that the whole
 * call's sum over tokens is one chain, and is added to dweight once, with the last chunk.
 */
#include "gemm.h"
#include "vector_kernels.h"

#define CHUNK_TOKENS 1024

static int64_t logits_bytes(int64_t T, int64_t V) { return nn_min64(T, CHUNK_TOKENS) * V * (int64_t)sizeof(float); }
static int64_t sum_bytes(int64_t T, int64_t H, int64_t V) { return T > CHUNK_TOKENS ? V * H * (int64_t)sizeof(float) : 0; }

int64_t nn_linear_cross_entropy_workspace_bytes(const nn_sizes *z) {
  return logits_bytes(z->T, z->V) + sum_bytes(z->T, z->H, z->V) + 512;
}

nn_status nn_linear_cross_entropy(nn_context *context, float *loss, void *dx, float *dweight, const void *x,
                                  const int32_t *target, const void *weight, int64_t T, int64_t H, int64_t V, float scale,
                                  nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && H >= 0 && V >= 1);
  NN_REQUIRE(context, dx != NULL || dweight == NULL);
  NN_REQUIRE_F32(context, dtype);
  nn_carve carve = nn_carve_begin(context);
  float *logits = nn_carve_take(&carve, logits_bytes(T, V));
  float *sum = dweight != NULL ? nn_carve_take(&carve, sum_bytes(T, H, V)) : NULL;
  NN_CARVE_CHECK(context, carve);
  for (int64_t first = 0; first < T; first += CHUNK_TOKENS) {
    int64_t tokens = nn_min64(CHUNK_TOKENS, T - first);
    const float *rows = (const float *)x + first * H;
    nn_operand logit_rows = {.data = logits, .stride = V};
    nn_product forward = {.a = {.data = rows, .stride = H}, .b = {.data = weight, .stride = H, .transposed = 1}, .m = tokens,
                          .n = V, .k = H, .c = logits, .c_stride = V, .alpha = 1.0f};
    nn_run_product(context, &forward);
#pragma omp parallel for num_threads(nn_team(context, tokens * V, NN_GRAIN / 4)) schedule(static)
    for (int64_t t = 0; t < tokens; t++)
      loss[first + t] = NN_DISPATCH(context, nn_loss_row)(logits + t * V, V, target[first + t], scale, dx != NULL);
    if (dx != NULL) {
      nn_product backward = {.a = logit_rows, .b = {.data = weight, .stride = H}, .m = tokens, .n = H, .k = V,
                             .c = (float *)dx + first * H, .c_stride = H, .alpha = 1.0f};
      nn_run_product(context, &backward);
    }
    if (dweight != NULL) {
      int last = first + tokens == T;
      logit_rows.transposed = 1;
      nn_product gradient = {.a = logit_rows, .b = {.data = rows, .stride = H}, .m = V, .n = H, .k = tokens,
                             .c = last ? dweight : sum, .c_stride = H, .alpha = 1.0f, .beta = last ? 1.0f : 0.0f,
                             .initial = first > 0 ? sum : NULL, .initial_stride = H};
      nn_run_product(context, &gradient);
    }
  }
  return NN_OK;
}
