/* attention.cuh: where attention's queries, keys and values lie, the same for training (one qkv tensor) and decoding (a cache), and the
 * launchers of the two ways to compute it. attention.cu fills it in; attention_plain.cu takes any type and head size,
 * attention_mma.cu bf16 with tensor cores.
 */
#pragma once

#include "common.cuh"

/* Query (b, i, h) is q + (b*S + i) * q_row + h*D; key (b, j, g) is k + b*kv_batch + j*kv_row + g*D, value alike. Query i of sequence b
 * sees keys 0 .. start[b] + i (start NULL: 0). */
struct Attention {
  const void *q, *k, *v;
  int64_t q_row, kv_row, kv_batch;
  const int32_t *start;
  int64_t capacity; /* keys that there is room for: queries never see one beyond */
  int B, S, Q, G, D;
  float scale;
};

static inline Attention attention_of(const void *qkv, int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  int64_t size = dtype == NN_BF16 ? 2 : 4, row = (Q + 2 * G) * D;
  Attention a = {};
  a.q = qkv, a.k = (const char *)qkv + Q * D * size, a.v = (const char *)qkv + (Q + G) * D * size;
  a.q_row = a.kv_row = row, a.kv_batch = S * row, a.capacity = S;
  a.B = (int)B, a.S = (int)S, a.Q = (int)Q, a.G = (int)G, a.D = (int)D;
  a.scale = 1.0f / sqrtf((float)D);
  return a;
}

/* out [B, S, Q*D], log_sum_exp [B, Q, S] or NULL. */
nn_status nn_attention_forward_plain(nn_context *context, void *out, float *log_sum_exp, const Attention &a, nn_dtype dtype);
nn_status nn_attention_forward_mma(nn_context *context, void *out, float *log_sum_exp, const Attention &a);
/* dqkv [B, S, (Q+2G)*D]; delta [B, Q, S] = sum of dout * out. */
nn_status nn_attention_backward_plain(nn_context *context, void *dqkv, const void *dout, const float *log_sum_exp, const float *delta,
                                      const Attention &a, nn_dtype dtype);
nn_status nn_attention_backward_mma(nn_context *context, void *dqkv, const void *dout, const float *log_sum_exp, const float *delta,
                                    const Attention &a);
/* Workspace of nn_attention_backward_mma, in bytes. */
int64_t nn_attention_backward_scratch(nn_context *context, const Attention &a);

/* Whether the tensor-core kernels can take it: 16-byte rows and a head size they are built for. */
static inline bool attention_fits_mma(const Attention &a, nn_dtype dtype) {
  return dtype == NN_BF16 && (a.D == 16 || a.D == 32 || a.D == 64 || a.D == 128) && a.q_row % 8 == 0 && a.kv_row % 8 == 0 &&
         aligned16(a.q) && aligned16(a.k) && aligned16(a.v);
}
