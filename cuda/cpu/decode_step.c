/* decode_step.c: the two halves of a layer for one new token of each sequence, of nn.h's section "decode": the entries that they are
 * made of, one after the other. The CUDA library has kernels of their own for them.
 */
#include "internal.h"

/* What both halves keep of the workspace while the entries below them take the rest. */
typedef struct taken {
  nn_context *context;
  int64_t bytes;
} taken;

static taken take(nn_context *context, const nn_carve *carve) {
  context->workspace += carve->used, context->workspace_bytes -= carve->used;
  return (taken){context, carve->used};
}
static nn_status give_back(taken t, nn_status status) {
  t.context->workspace -= t.bytes, t.context->workspace_bytes += t.bytes;
  return status;
}

#define NN_STEP(call)                                 \
  do {                                                \
    status = (call);                                  \
    if (status != NN_OK) return give_back(t, status); \
  } while (0)

static int64_t rounded(int64_t floats) { return (floats * (int64_t)sizeof(float) + 255) & ~(int64_t)255; }

/* Beside it the entries below need what they ask for themselves. T tokens, one a sequence. */
int64_t nn_decode_step_workspace_bytes(const nn_sizes *sizes) {
  nn_sizes few = *sizes, *z = &few;
  few.T = nn_min64(few.T, NN_DECODE_TOKENS);
  int64_t P = (z->Q + 2 * z->G) * z->D, N = z->T * z->K;
  int64_t attention = rounded(z->T * z->H) + rounded(z->T * P) + rounded(z->T * z->Q * z->D) + rounded(z->T);
  int64_t moe = rounded(z->T * z->H) + rounded(N * z->F) + rounded(N * z->H) + rounded(z->T) + 2 * rounded(z->T * z->E) + 5 * rounded(N) +
                2 * rounded(z->E + 1);
  return nn_max64(attention, moe);
}

nn_status nn_decode_attention(nn_context *context, void *out, void *key_cache, void *value_cache, const void *x, const int32_t *start,
                              const float *cosine, const float *sine, const void *norm, const void *qkv_weight, const void *output_weight,
                              int64_t B, int64_t C, int64_t H, int64_t Q, int64_t G, int64_t D, int64_t positions, float epsilon,
                              nn_dtype dtype) {
  NN_REQUIRE(context, B >= 0 && B <= NN_DECODE_TOKENS && C >= 0 && H >= 0 && Q >= 1 && G >= 1 && Q % G == 0 && D >= 2 && D % 2 == 0 &&
                          positions >= 0);
  NN_REQUIRE_F32(context, dtype);
  int64_t P = (Q + 2 * G) * D;
  nn_carve carve = nn_carve_begin(context);
  float *normed = nn_carve_take(&carve, rounded(B * H)), *qkv = nn_carve_take(&carve, rounded(B * P));
  float *attention = nn_carve_take(&carve, rounded(B * Q * D)), *reciprocal = nn_carve_take(&carve, rounded(B));
  NN_CARVE_CHECK(context, carve);
  taken t = take(context, &carve);
  nn_status status;
  NN_STEP(nn_rmsnorm_forward(context, normed, reciprocal, x, norm, B, H, epsilon, dtype));
  NN_STEP(nn_gemm(context, qkv, normed, qkv_weight, B, P, H, 0, 1, dtype, dtype));
  NN_STEP(nn_rope_qk(context, qkv, start, cosine, sine, B, Q, G, D, positions, 1, dtype));
  NN_STEP(nn_cache_append(context, key_cache, value_cache, qkv, start, B, 1, C, Q, G, D, dtype));
  NN_STEP(nn_attention_cached(context, attention, qkv, key_cache, value_cache, start, B, 1, C, Q, G, D, dtype));
  NN_STEP(nn_gemm(context, normed, attention, output_weight, B, H, Q * D, 0, 1, dtype, dtype));
  return give_back(t, nn_add(context, out, x, normed, B * H, dtype));
}

nn_status nn_decode_moe(nn_context *context, void *out, const void *x, const void *norm, const void *router, const void *gate_up_weight,
                        const void *down_weight, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, float epsilon, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && T <= NN_DECODE_TOKENS && H >= 0 && F >= 0 && E >= 1 && K >= 0 && K <= E && T * K <= INT32_MAX && out != x);
  NN_REQUIRE_F32(context, dtype);
  int64_t N = T * K;
  nn_carve carve = nn_carve_begin(context);
  float *normed = nn_carve_take(&carve, rounded(T * H)), *h = nn_carve_take(&carve, rounded(N * F)), *slots = nn_carve_take(&carve, rounded(N * H));
  float *reciprocal = nn_carve_take(&carve, rounded(T));
  float *logits = nn_carve_take(&carve, rounded(T * E)), *probability = nn_carve_take(&carve, rounded(T * E));
  float *weight = nn_carve_take(&carve, rounded(N)), *slot_weight = nn_carve_take(&carve, rounded(N));
  int32_t *index = nn_carve_take(&carve, rounded(N)), *slot_token = nn_carve_take(&carve, rounded(N)), *slot_of = nn_carve_take(&carve, rounded(N));
  int32_t *offsets = nn_carve_take(&carve, rounded(E + 1)), *load = nn_carve_take(&carve, rounded(E));
  NN_CARVE_CHECK(context, carve);
  taken t = take(context, &carve);
  nn_status status;
  NN_STEP(nn_rmsnorm_forward(context, normed, reciprocal, x, norm, T, H, epsilon, dtype));
  NN_STEP(nn_gemm(context, logits, normed, router, T, E, H, 0, 1, NN_F32, dtype));
  NN_STEP(nn_softmax_topk_forward(context, probability, weight, index, logits, T, E, K));
  NN_STEP(nn_moe_permute(context, offsets, load, slot_token, slot_weight, slot_of, index, weight, T, E, K));
  NN_STEP(nn_moe_up_forward(context, h, NULL, normed, slot_token, offsets, gate_up_weight, T, H, F, E, K, dtype));
  NN_STEP(nn_moe_down_forward(context, slots, h, offsets, down_weight, T, H, F, E, K, dtype));
  return give_back(t, nn_moe_combine(context, out, x, slots, weight, slot_of, T, H, K, dtype));
}
