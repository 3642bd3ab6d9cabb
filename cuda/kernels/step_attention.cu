/* step_attention.cu: the attention half of a layer for one new token of each sequence, in three kernels of a chain: norm, qkv product, RoPE
 * and the append to the cache; attention over the cache in splits (attention_decode.cu); the merge of the splits, output product and
 * residual. What these cannot take goes through the entries that they are made of.
 */
#include "attention.cuh"
#include "attention_decode.cuh"
#include "attention_tiles.cuh"
#include "step.cuh"

struct StepAttention {
  bf16 *out;
  const bf16 *x;
  bf16 *keys, *values, *q; /* q [B, Q*D], after RoPE */
  const int32_t *start;
  const float *cosine, *sine;
  const bf16 *norm, *qkv_weight, *output_weight;
  const float *partial; /* of the splits; NULL: they are merged in `merged` */
  const bf16 *merged;   /* [B, Q*D] */
  int B, H, Q, G, D, splits;
  int64_t C, positions;
  float epsilon;
};

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* A block has 8 columns of one head: 4 of its first half and their partners of the second, which RoPE turns together. */
template <int MT>
__global__ void __launch_bounds__(COLUMN_THREADS, 2) step_qkv_kernel(const StepAttention s) {
  extern __shared__ __align__(16) unsigned char memory[];
  float(*sums)[MT * 16][8] = (float(*)[MT * 16][8])memory;
  bf16 *rows = (bf16 *)(memory + sizeof(float) * COLUMN_WARPS * MT * 16 * 8);
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, half = s.D / 2;
  const int head = blockIdx.x / (s.D / 8), column = blockIdx.x % (s.D / 8) * 4;
  const DepthShare share(s.H);
  uint4 weights[ROW_CHUNKS], norm[ROW_CHUNKS];
  load_columns(weights, s.qkv_weight + ((int64_t)head * s.D + column + (g & 3) + (g >> 2) * half) * s.H + t * 8, share);
  load_row(norm, s.norm, s.H);
  const int row = threadIdx.x >> 2, pair = threadIdx.x & 3;
  const int64_t position = row < s.B ? __ldcg(s.start + row) : -1;
  float cosine = 1.0f, sine = 0.0f;
  if (head < s.Q + s.G) {
    const bool inside = position >= 0 && position < s.positions;
    cosine = inside ? __ldcg(s.cosine + position * half + column + pair) : NAN;
    sine = inside ? __ldcg(s.sine + position * half + column + pair) : NAN;
  }
  wait_for_previous();
  let_next_start();
  norm_rows<COLUMN_WARPS>(rows, s.x, [&](int c) { return norm[c]; }, s.B, s.H, s.epsilon);
  __syncthreads();
  multiply_rows<MT>(sums, rows, row_pitch(s.H), s.B, weights, share);
  __syncthreads();
  if (row >= s.B) return;
  const float a = rounded<bf16>(add_shares<MT>(sums, row, pair)), b = rounded<bf16>(add_shares<MT>(sums, row, pair + 4));
  bf16 *to;
  if (head < s.Q) {
    to = s.q + ((int64_t)row * s.Q + head) * s.D;
  } else {
    if (position < 0 || position >= s.C) return;
    const bool is_key = head < s.Q + s.G;
    to = (is_key ? s.keys : s.values) + (((int64_t)row * s.C + position) * s.G + head - s.Q - (is_key ? 0 : s.G)) * s.D;
  }
  const bool turns = head < s.Q + s.G;
  to[column + pair] = from_float<bf16>(turns ? a * cosine - b * sine : a);
  to[column + pair + half] = from_float<bf16>(turns ? b * cosine + a * sine : b);
}

/* Four neighbouring elements of a head from its splits [splits, D + 2], in their order, eight read at a time. */
__device__ __forceinline__ float4 merge_splits(const float *rows, int splits, int D, int d) {
  float top = -INFINITY, sum = 0.0f;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int base = 0; base < splits; base += 8) {
    float2 low[8], high[8], state[8];
    float now = top;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float *row = rows + (int64_t)(base + j) * (D + 2);
      const bool inside = base + j < splits;
      state[j] = inside ? __ldcg((const float2 *)(row + D)) : make_float2(-INFINITY, 0.0f);
      low[j] = inside ? __ldcg((const float2 *)(row + d)) : make_float2(0.0f, 0.0f);
      high[j] = inside ? __ldcg((const float2 *)(row + d + 2)) : make_float2(0.0f, 0.0f);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) now = fmaxf(now, state[j].x);
    if (now == -INFINITY) continue;
    const float scale = exp2_fast(top - now);
    sum *= scale, total.x *= scale, total.y *= scale, total.z *= scale, total.w *= scale;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float weight = exp2_fast(state[j].x - now);
      sum += state[j].y * weight;
      total.x += low[j].x * weight, total.y += low[j].y * weight, total.z += high[j].x * weight, total.w += high[j].y * weight;
    }
    top = now;
  }
  return make_float4(total.x / sum, total.y / sum, total.z / sum, total.w / sum);
}

/* out = x + attention Wo^T; a block has 8 columns. */
template <int MT>
__global__ void __launch_bounds__(COLUMN_THREADS, 2) step_output_kernel(const StepAttention s) {
  extern __shared__ __align__(16) unsigned char memory[];
  float(*sums)[MT * 16][8] = (float(*)[MT * 16][8])memory;
  bf16 *rows = (bf16 *)(memory + sizeof(float) * COLUMN_WARPS * MT * 16 * 8);
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, width = s.Q * s.D, column = blockIdx.x * 8;
  const DepthShare share(width);
  uint4 weights[ROW_CHUNKS];
  load_columns(weights, s.output_weight + (int64_t)(column + g) * width + t * 8, share);
  wait_for_previous();
  let_next_start();
  const int row = threadIdx.x >> 2, pair = threadIdx.x & 3;
  const uint32_t before = row < s.B ? __ldcg((const uint32_t *)(s.x + (int64_t)row * s.H + column + pair * 2)) : 0;
  if (s.partial) {
    for (int i = threadIdx.x; i < s.B * (width / 4); i += COLUMN_THREADS) {
      const int b = i / (width / 4), at = (i - b * (width / 4)) * 4, head = at / s.D;
      const float4 o = merge_splits(s.partial + ((int64_t)b * s.Q + head) * s.splits * (s.D + 2), s.splits, s.D, at - head * s.D);
      *(uint2 *)(rows + b * row_pitch(width) + at) = make_uint2(pack_bf16(o.x, o.y), pack_bf16(o.z, o.w));
    }
  } else {
    for (int i = threadIdx.x; i < s.B * (width / 8); i += COLUMN_THREADS) {
      const int b = i / (width / 8), at = (i - b * (width / 8)) * 8;
      *(uint4 *)(rows + b * row_pitch(width) + at) = load_shared_result(s.merged + (int64_t)b * width + at);
    }
  }
  __syncthreads();
  multiply_rows<MT>(sums, rows, row_pitch(width), s.B, weights, share);
  __syncthreads();
  if (row >= s.B) return;
  const float2 old = unpack_bf16(before);
  const float x = old.x + rounded<bf16>(add_shares<MT>(sums, row, pair * 2)), y = old.y + rounded<bf16>(add_shares<MT>(sums, row, pair * 2 + 1));
  *(uint32_t *)(s.out + (int64_t)row * s.H + column + pair * 2) = pack_bf16(x, y);
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

const int MOST_SPLITS_MERGED_LATE = 16; /* of all sequences together; more are merged by a kernel of their own */

/* Shared memory of a kernel whose rows are so wide. */
static int rows_bytes(int64_t tokens, int64_t width) {
  const int64_t tiles = tokens <= 16 ? 1 : 4;
  return (int)(sizeof(float) * COLUMN_WARPS * tiles * 16 * 8 + (tokens + 7) / 8 * 8 * row_pitch((int)width) * 2);
}

/* Whether the chain can take it. */
static bool is_step(nn_context *context, const Attention &a, const void *out, const void *x, const void *norm, const void *qkv_weight,
                    const void *output_weight, int64_t B, int64_t H, int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  return context->capability >= 80 && B <= NN_DECODE_TOKENS && H <= 1024 && H % 64 == 0 && Q * D <= 1024 && Q * D % 64 == 0 && Q / G <= 16 &&
         attention_fits_mma(a, dtype) && aligned16(out) && aligned16(x) && aligned16(norm) && aligned16(qkv_weight) && aligned16(output_weight) &&
         shared_memory_fits(context, rows_bytes(B, H > Q * D ? H : Q * D));
}

template <int MT>
static nn_status run_step(nn_context *context, StepAttention s, Attention a) {
  const char *where = "nn_decode_attention";
  Scratch scratch(context);
  const int width = s.Q * s.D;
  s.q = scratch.take<bf16>((int64_t)s.B * width);
  bf16 *merged = scratch.take<bf16>((int64_t)s.B * width);
  s.splits = nn_decode_splits(context, a);
  float *partial = scratch.take<float>((int64_t)s.B * s.Q * s.splits * (s.D + 2));
  if (!scratch.fits())
    return nn_fail(context, NN_ERROR_WORKSPACE, "%s: needs %lld bytes of workspace, has %lld", where, (long long)scratch.need, (long long)scratch.have);
  const bool late = s.B * s.splits <= MOST_SPLITS_MERGED_LATE;
  s.partial = late ? partial : NULL, s.merged = merged;
  a.q = s.q, a.q_row = width;
  const int qkv_bytes = rows_bytes(s.B, s.H), output_bytes = rows_bytes(s.B, width);
  NN_CUDA(context, cudaFuncSetAttribute(step_qkv_kernel<MT>, cudaFuncAttributeMaxDynamicSharedMemorySize, qkv_bytes));
  NN_CUDA(context, cudaFuncSetAttribute(step_output_kernel<MT>, cudaFuncAttributeMaxDynamicSharedMemorySize, output_bytes));
  NN_TRY(launch_chained(context, where, step_qkv_kernel<MT>, dim3((unsigned)((s.Q + 2 * s.G) * (s.D / 8))), COLUMN_THREADS, qkv_bytes, s));
  NN_TRY(nn_attention_decode_chained(context, late ? NULL : merged, partial, a, s.splits));
  return launch_chained(context, where, step_output_kernel<MT>, dim3((unsigned)(s.H / 8)), COLUMN_THREADS, output_bytes, s);
}

extern "C" nn_status nn_decode_attention(nn_context *context, void *out, void *key_cache, void *value_cache, const void *x, const int32_t *start,
                                         const float *cosine, const float *sine, const void *norm, const void *qkv_weight, const void *output_weight,
                                         int64_t B, int64_t C, int64_t H, int64_t Q, int64_t G, int64_t D, int64_t positions, float epsilon,
                                         nn_dtype dtype) {
  NN_ENTER(context, B >= 0 && B <= NN_DECODE_TOKENS && C >= 0 && H >= 0 && H < (1 << 30) && Q >= 1 && Q < 65536 && G >= 1 && Q % G == 0 &&
                        D >= 2 && D % 2 == 0 && D < 65536 && positions >= 0 && valid(dtype));
  if (B == 0 || H == 0) return NN_OK;
  Attention a = attention_of(NULL, B, 1, Q, G, D, dtype);
  a.q = x, a.k = key_cache, a.v = value_cache, a.kv_row = G * D, a.kv_batch = C * G * D, a.start = start, a.capacity = C;
  if (is_step(context, a, out, x, norm, qkv_weight, output_weight, B, H, Q, G, D, dtype)) {
    StepAttention s = {};
    s.out = (bf16 *)out, s.x = (const bf16 *)x, s.keys = (bf16 *)key_cache, s.values = (bf16 *)value_cache, s.start = start;
    s.cosine = cosine, s.sine = sine;
    s.norm = (const bf16 *)norm, s.qkv_weight = (const bf16 *)qkv_weight, s.output_weight = (const bf16 *)output_weight;
    s.B = (int)B, s.H = (int)H, s.Q = (int)Q, s.G = (int)G, s.D = (int)D, s.C = C, s.positions = positions, s.epsilon = epsilon;
    return B <= 16 ? run_step<1>(context, s, a) : run_step<4>(context, s, a);
  }
  const int64_t size = dtype == NN_BF16 ? 2 : 4, P = (Q + 2 * G) * D;
  Scratch scratch(context);
  char *normed = scratch.take<char>(B * H * size), *qkv = scratch.take<char>(B * P * size), *attention = scratch.take<char>(B * Q * D * size);
  float *reciprocal = scratch.take<float>(B);
  NN_SCRATCH(context, scratch);
  ScratchTaken taken(context, scratch);
  NN_TRY(nn_rmsnorm_forward(context, normed, reciprocal, x, norm, B, H, epsilon, dtype));
  NN_TRY(nn_gemm(context, qkv, normed, qkv_weight, B, P, H, 0, 1, dtype, dtype));
  NN_TRY(nn_rope_qk(context, qkv, start, cosine, sine, B, Q, G, D, positions, 1, dtype));
  NN_TRY(nn_cache_append(context, key_cache, value_cache, qkv, start, B, 1, C, Q, G, D, dtype));
  NN_TRY(nn_attention_cached(context, attention, qkv, key_cache, value_cache, start, B, 1, C, Q, G, D, dtype));
  NN_TRY(nn_gemm(context, normed, attention, output_weight, B, H, Q * D, 0, 1, dtype, dtype));
  return nn_add(context, out, x, normed, B * H, dtype);
}
