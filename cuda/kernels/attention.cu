/* attention.cu: the attention entries of nn.h: the plain scores and output, and the choice of kernels for the fused ones; appending
 * to a cache; the row sums that the backward needs.
 */
#include "attention_decode.cuh"

nn_status nn_attention_forward_wgmma(nn_context *context, void *out, float *log_sum_exp, const Attention &a, nn_dtype dtype);
nn_status nn_attention_backward_wgmma(nn_context *context, void *dqkv, const void *dout, const float *log_sum_exp, const float *delta,
                                      const Attention &a, nn_dtype dtype);
#define ATTENTION_SIZES_FIT \
  (B >= 0 && B < 65536 && S >= 0 && S < (1ll << 31) && Q >= 1 && Q < 65536 && G >= 1 && Q % G == 0 && D >= 1 && D < 65536 && valid(dtype))

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* score [B, Q, S, S]; a block has one query row and walks over its keys. */
template <typename T>
__global__ void attention_scores_kernel(float *score, const Attention a) {
  int64_t row = blockIdx.x;
  int i = (int)(row % a.S), h = (int)(row / a.S % a.Q), b = (int)(row / a.S / a.Q);
  const T *q = (const T *)a.q + ((int64_t)b * a.S + i) * a.q_row + (int64_t)h * a.D;
  const T *k = (const T *)a.k + (int64_t)b * a.kv_batch + (int64_t)(h / (a.Q / a.G)) * a.D;
  for (int j = threadIdx.x; j < a.S; j += blockDim.x) {
    float sum = 0.0f;
    if (j <= i)
      for (int d = 0; d < a.D; d++) sum += to_float(q[d]) * to_float(k[(int64_t)j * a.kv_row + d]);
    score[row * a.S + j] = j <= i ? sum * a.scale : -INFINITY;
  }
}

/* out [B, S, Q*D]; a block has one query row, a thread an element of the head. */
template <typename T>
__global__ void attention_output_kernel(T *out, const float *probability, const Attention a) {
  int64_t row = blockIdx.x;
  int i = (int)(row % a.S), h = (int)(row / a.S % a.Q), b = (int)(row / a.S / a.Q);
  const T *v = (const T *)a.v + (int64_t)b * a.kv_batch + (int64_t)(h / (a.Q / a.G)) * a.D;
  for (int d = threadIdx.x; d < a.D; d += blockDim.x) {
    float sum = 0.0f;
    for (int j = 0; j < a.S; j++) sum += probability[row * a.S + j] * to_float(v[(int64_t)j * a.kv_row + d]);
    out[(((int64_t)b * a.S + i) * a.Q + h) * a.D + d] = from_float<T>(sum);
  }
}

/* delta [B, Q, S] = sum over the head of dout * out; one warp each. */
template <typename T>
__global__ void attention_delta_kernel(float *delta, const T *dout, const T *out, int64_t rows, int S, int Q, int D) {
  int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5; /* (b*S + i)*Q + h */
  int lane = threadIdx.x & 31;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int d = lane; d < D; d += 32) sum += to_float(dout[row * D + d]) * to_float(out[row * D + d]);
  sum = warp_sum(sum);
  int64_t token = row / Q, b = token / S;
  if (lane == 0) delta[(b * Q + row % Q) * S + token % S] = sum;
}

/* The same in bf16 for heads of 64, 16 bytes and 8 threads a row. */
__global__ void __launch_bounds__(256) attention_delta_64_kernel(float *delta, const bf16 *dout, const bf16 *out, int64_t rows, int S, int Q) {
  const int64_t row = (int64_t)blockIdx.x * 32 + (threadIdx.x >> 3);
  if (row >= rows) return;
  const uint4 d = reinterpret_cast<const uint4 *>(dout)[row * 8 + (threadIdx.x & 7)], o = reinterpret_cast<const uint4 *>(out)[row * 8 + (threadIdx.x & 7)];
  const uint32_t ds[4] = {d.x, d.y, d.z, d.w}, os[4] = {o.x, o.y, o.z, o.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 x = unpack_bf16(ds[i]), y = unpack_bf16(os[i]);
    sum += x.x * y.x + x.y * y.y;
  }
  const unsigned lanes = 0xffu << (threadIdx.x & 24);
#pragma unroll
  for (int offset = 4; offset > 0; offset >>= 1) sum += __shfl_xor_sync(lanes, sum, offset);
  const int64_t token = row / Q, b = token / S;
  if ((threadIdx.x & 7) == 0) delta[(b * Q + row % Q) * S + token % S] = sum;
}

/* One block a new row. */
template <typename T>
__global__ void cache_append_kernel(T *key_cache, T *value_cache, const T *qkv, const int32_t *start, int S, int64_t C, int64_t query_width,
                                    int64_t width) {
  int64_t row = blockIdx.x, b = row / S, position = start[b] + row % S;
  if (position < 0 || position >= C) return;
  const T *from = qkv + row * (query_width + 2 * width) + query_width;
  for (int64_t d = threadIdx.x; d < width; d += blockDim.x) {
    key_cache[(b * C + position) * width + d] = from[d];
    value_cache[(b * C + position) * width + d] = from[width + d];
  }
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

extern "C" {

nn_status nn_attention_scores(nn_context *context, float *score, const void *qkv, int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D,
                              nn_dtype dtype) {
  NN_ENTER(context, ATTENTION_SIZES_FIT && B * Q * S < (1ll << 31));
  if (B * S == 0) return NN_OK;
  Attention a = attention_of(qkv, B, S, Q, G, D, dtype);
  NN_FOR_DTYPE(dtype, T, attention_scores_kernel<T><<<(unsigned)(B * Q * S), 128, 0, context->stream>>>(score, a););
  NN_LEAVE(context);
}

nn_status nn_attention_output(nn_context *context, void *out, const float *probability, const void *qkv, int64_t B, int64_t S, int64_t Q,
                              int64_t G, int64_t D, nn_dtype dtype) {
  NN_ENTER(context, ATTENTION_SIZES_FIT && B * Q * S < (1ll << 31));
  if (B * S == 0) return NN_OK;
  Attention a = attention_of(qkv, B, S, Q, G, D, dtype);
  NN_FOR_DTYPE(dtype, T, attention_output_kernel<T><<<(unsigned)(B * Q * S), 64, 0, context->stream>>>((T *)out, probability, a););
  NN_LEAVE(context);
}

nn_status nn_flash_attention_forward(nn_context *context, void *out, float *log_sum_exp, const void *qkv, int64_t B, int64_t S, int64_t Q,
                                     int64_t G, int64_t D, nn_dtype dtype) {
  NN_ENTER(context, ATTENTION_SIZES_FIT);
  if (B * S == 0) return NN_OK;
  Attention a = attention_of(qkv, B, S, Q, G, D, dtype);
  const nn_status status = aligned16(out) ? nn_attention_forward_wgmma(context, out, log_sum_exp, a, dtype) : NN_ERROR_UNSUPPORTED;
  if (status == NN_OK) NN_LEAVE(context);
  if (status != NN_ERROR_UNSUPPORTED) return status;
  if (attention_fits_mma(a, dtype) && aligned16(out))
    NN_TRY(nn_attention_forward_mma(context, out, log_sum_exp, a));
  else
    NN_TRY(nn_attention_forward_plain(context, out, log_sum_exp, a, dtype));
  NN_LEAVE(context);
}

nn_status nn_flash_attention_backward(nn_context *context, void *dqkv, const void *dout, const void *out, const float *log_sum_exp,
                                      const void *qkv, int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  NN_ENTER(context, ATTENTION_SIZES_FIT);
  if (B * S == 0) return NN_OK;
  Attention a = attention_of(qkv, B, S, Q, G, D, dtype);
  Scratch scratch(context);
  float *delta = scratch.take<float>(B * Q * S);
  NN_SCRATCH(context, scratch);
  ScratchTaken taken(context, scratch);
  unsigned blocks = (unsigned)ceil_div(B * S * Q, 8);
  if (dtype == NN_BF16 && D == 64 && aligned16(dout) && aligned16(out))
    attention_delta_64_kernel<<<(unsigned)ceil_div(B * S * Q, 32), 256, 0, context->stream>>>(delta, (const bf16 *)dout, (const bf16 *)out, B * S * Q,
                                                                                             (int)S, (int)Q);
  else
    NN_FOR_DTYPE(dtype, T, attention_delta_kernel<T><<<blocks, 256, 0, context->stream>>>(delta, (const T *)dout, (const T *)out, B * S * Q,
                                                                                        (int)S, (int)Q, (int)D););
  const nn_status status = aligned16(dqkv) ? nn_attention_backward_wgmma(context, dqkv, dout, log_sum_exp, delta, a, dtype) : NN_ERROR_UNSUPPORTED;
  if (status == NN_OK) NN_LEAVE(context);
  if (status != NN_ERROR_UNSUPPORTED) return status;
  if (attention_fits_mma(a, dtype) && aligned16(dout) && aligned16(dqkv))
    NN_TRY(nn_attention_backward_mma(context, dqkv, dout, log_sum_exp, delta, a));
  else
    NN_TRY(nn_attention_backward_plain(context, dqkv, dout, log_sum_exp, delta, a, dtype));
  NN_LEAVE(context);
}

nn_status nn_cache_append(nn_context *context, void *key_cache, void *value_cache, const void *qkv, const int32_t *start, int64_t B,
                          int64_t S, int64_t C, int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  NN_ENTER(context, ATTENTION_SIZES_FIT && C >= 0 && B * S < (1ll << 31));
  if (B * S == 0) return NN_OK;
  NN_FOR_DTYPE(dtype, T, cache_append_kernel<T><<<(unsigned)(B * S), 64, 0, context->stream>>>((T *)key_cache, (T *)value_cache, (const T *)qkv,
                                                                                            start, (int)S, C, Q * D, G * D););
  NN_LEAVE(context);
}

nn_status nn_attention_cached(nn_context *context, void *out, const void *qkv, const void *key_cache, const void *value_cache,
                              const int32_t *start, int64_t B, int64_t S, int64_t C, int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  NN_ENTER(context, ATTENTION_SIZES_FIT && C >= 0);
  if (B * S == 0) return NN_OK;
  Attention a = attention_of(qkv, B, S, Q, G, D, dtype);
  a.k = key_cache, a.v = value_cache, a.kv_row = G * D, a.kv_batch = C * G * D, a.start = start, a.capacity = C;
  if (!attention_fits_mma(a, dtype) || !aligned16(out))
    NN_TRY(nn_attention_forward_plain(context, out, NULL, a, dtype));
  else if (S == 1 && Q / G <= 16)
    NN_TRY(nn_attention_decode(context, out, a));
  else {
    const nn_status status = S >= 64 ? nn_attention_forward_wgmma(context, out, NULL, a, dtype) : NN_ERROR_UNSUPPORTED;
    if (status == NN_ERROR_UNSUPPORTED)
      NN_TRY(nn_attention_forward_mma(context, out, NULL, a));
    else
      NN_TRY(status);
  }
  NN_LEAVE(context);
}

} /* extern "C" */
