/* attention_decode.cu: attention of one new query for each sequence over a long cache. The cache is split over blocks; a block's warps
 * take tiles of 32 keys with all heads of a group as the rows of one product, so that keys and values are read once. The splits are
 * merged in order by a second kernel.
 * "Flash-Decoding", Dao et al., 2023.
 */
#include "attention_decode.cuh"
#include "attention_tiles.cuh"
#include "chain.cuh"

const int KEYS = 32;                         /* of one warp's tile */
const int MERGE_WARPS = 8, MOST_HEAD = 128; /* of the merge; the largest head size */

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* partial [B, Q, splits, D + 2] float32: the unnormalised output, the maximum (of scaled scores, base 2) and the sum. */
template <int D, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) decode_split_kernel(float *partial, const Attention a) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = blockIdx.x, splits = gridDim.x;
  const int b = blockIdx.y / a.G, g = blockIdx.y % a.G, heads = a.Q / a.G;
  bf16 *sq = (bf16 *)memory, *sk = sq + 16 * (D + 8) + warp * 4 * KEYS * (D + 8), *sv = sk + 2 * KEYS * (D + 8);
  const int64_t count = min((int64_t)(a.start ? __ldcg(a.start + b) : 0) + 1, a.capacity), head = (int64_t)b * a.kv_batch + (int64_t)g * D;
  const int64_t chunk = ((count + splits - 1) / splits + KEYS - 1) / KEYS * KEYS, first = split * chunk, last = min(first + chunk, count);
  const bf16 *k = (const bf16 *)a.k + head, *v = (const bf16 *)a.v + head;
  const int tiles = first < last ? (int)((last - first + KEYS - 1) / KEYS) : 0;
  auto fetch = [&](int t, int stage) {
    if (t < tiles) {
      int64_t j0 = first + (int64_t)t * KEYS;
      load_tile<D, KEYS, 32>(sk + stage * KEYS * (D + 8), k + j0 * a.kv_row, a.kv_row, last - j0, lane);
      load_tile<D, KEYS, 32>(sv + stage * KEYS * (D + 8), v + j0 * a.kv_row, a.kv_row, last - j0, lane);
    }
    cp_async_commit();
  };
  /* All keys but the newest were there before the kernel that made the queries. */
  const bool early = warp < tiles && first + (int64_t)(warp + 1) * KEYS < count;
  if (early) fetch(warp, 0);
  wait_for_previous();
  let_next_start();
  load_tile<D, 16, WARPS * 32>(sq, (const bf16 *)a.q + (int64_t)b * a.q_row + (int64_t)g * heads * D, D, heads);
  cp_async_commit();
  if (!early) fetch(warp, 0);
  cp_async_wait<0>();
  __syncthreads();
  uint32_t fq[D / 16][4];
#pragma unroll
  for (int d = 0; d < D / 16; d++) load_a<D>(fq[d], sq, 0, d * 16);
  const float factor = a.scale * LOG2_E;
  float o[D / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  int stage = 0;
  for (int t = warp; t < tiles; t += WARPS, stage ^= 1) {
    fetch(t + WARPS, stage ^ 1);
    cp_async_wait<1>();
    __syncwarp();
    const bf16 *tk = sk + stage * KEYS * (D + 8), *tv = sv + stage * KEYS * (D + 8);
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++)
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        uint32_t f[4];
        load_b<D>(f, tk, n * 16, d * 16);
        mma_pair(s[2 * n], s[2 * n + 1], fq[d], f);
      }
    const int64_t there = last - (first + (int64_t)t * KEYS);
    float top[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[n][e] = n * 8 + (lane & 3) * 2 + (e & 1) < there ? s[n][e] * factor : -INFINITY;
        top[e >> 1] = fmaxf(top[e >> 1], s[n][e]);
      }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
      float old = exp2_fast(maximum[r] - top[r]);
      maximum[r] = top[r];
      sum[r] *= old;
#pragma unroll
      for (int d = 0; d < D / 8; d++) o[d][2 * r] *= old, o[d][2 * r + 1] *= old;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[n][e] = exp2_fast(s[n][e] - top[e >> 1]);
        sum[e >> 1] += s[n][e];
      }
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
      uint32_t p[4];
      accumulator_as_a(p, s, n);
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        uint32_t f[4];
        load_b_transposed<D>(f, tv, n * 16, d * 16);
        mma_pair(o[2 * d], o[2 * d + 1], p, f);
      }
    }
    __syncwarp();
  }
  cp_async_wait<0>();
  __syncthreads(); /* the tiles' memory now holds each warp's result: [warp][16 heads][D + 2] */
  float *results = (float *)memory, *mine = results + warp * 16 * (D + 2);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    float *row = mine + ((lane >> 2) + r * 8) * (D + 2);
#pragma unroll
    for (int d = 0; d < D / 8; d++) row[d * 8 + (lane & 3) * 2] = o[d][2 * r], row[d * 8 + (lane & 3) * 2 + 1] = o[d][2 * r + 1];
    if ((lane & 3) == 0) row[D] = maximum[r], row[D + 1] = sum[r];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < heads * (D + 2); e += WARPS * 32) {
    int h = e / (D + 2), d = e % (D + 2);
    float top = -INFINITY, total = 0.0f;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, results[(w * 16 + h) * (D + 2) + D]);
    for (int w = 0; w < WARPS; w++) {
      const float *row = results + (w * 16 + h) * (D + 2);
      if (row[D] != -INFINITY) total += row[d] * exp2_fast(row[D] - top);
    }
    partial[(((int64_t)b * a.Q + g * heads + h) * splits + split) * (D + 2) + d] = d == D ? top : total;
  }
}

/* out [B, Q*D]: the splits of one (sequence, head), a block each: a warp takes every 8th split, in order, then the warps are added in
 * order. An empty split's maximum is -infinity, and the rest of it 0. */
__global__ void __launch_bounds__(MERGE_WARPS * 32) decode_merge_kernel(bf16 *out, const float *partial, int splits, int D) {
  __shared__ float tops[MERGE_WARPS], totals[MERGE_WARPS][MOST_HEAD + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const float *rows = partial + (int64_t)blockIdx.x * splits * (D + 2);
  wait_for_previous();
  let_next_start();
  float top = -INFINITY;
  for (int s = threadIdx.x; s < splits; s += MERGE_WARPS * 32) top = fmaxf(top, __ldcg(rows + (int64_t)s * (D + 2) + D));
  for (int offset = 16; offset > 0; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
  for (int w = 0; w < MERGE_WARPS; w++) top = fmaxf(top, tops[w]);
  float2 total[MOST_HEAD / 64] = {};
  float sum = 0.0f;
#pragma unroll 4
  for (int s = warp; s < splits; s += MERGE_WARPS) {
    const float *row = rows + (int64_t)s * (D + 2);
    const float weight = exp2_fast(__ldcg(row + D) - top);
    sum += __ldcg(row + D + 1) * weight;
#pragma unroll
    for (int i = 0; i < MOST_HEAD / 64; i++) {
      const int d = i * 64 + lane * 2;
      const float2 part = d < D ? __ldcg(reinterpret_cast<const float2 *>(row + d)) : make_float2(0.0f, 0.0f);
      total[i].x += part.x * weight, total[i].y += part.y * weight;
    }
  }
#pragma unroll
  for (int i = 0; i < MOST_HEAD / 64; i++)
    if (i * 64 + lane * 2 < D) totals[warp][i * 64 + lane * 2] = total[i].x, totals[warp][i * 64 + lane * 2 + 1] = total[i].y;
  if (lane == 0) totals[warp][MOST_HEAD] = sum;
  __syncthreads();
  if (threadIdx.x >= D) return;
  float whole = 0.0f, weights = 0.0f;
  for (int w = 0; w < MERGE_WARPS; w++) whole += totals[w][threadIdx.x], weights += totals[w][MOST_HEAD];
  out[(int64_t)blockIdx.x * D + threadIdx.x] = from_float<bf16>(whole / weights);
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

int nn_decode_splits(nn_context *context, const Attention &a) {
  int64_t splits = ceil_div(2 * context->multiprocessors, (int64_t)a.B * a.G), most = ceil_div(a.capacity, 128);
  if (splits > most) splits = most;
  return (int)(splits < 1 ? 1 : splits > 256 ? 256 : splits);
}

template <int D, int WARPS>
static nn_status run_decode(nn_context *context, void *out, float *partial, const Attention &a, int splits, bool chained) {
  const int bytes = (16 + WARPS * 4 * KEYS) * (D + 8) * 2;
  NN_CUDA(context, cudaFuncSetAttribute(decode_split_kernel<D, WARPS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  NN_TRY(launch_kernel(context, "nn_attention_decode", chained, decode_split_kernel<D, WARPS>, dim3(splits, a.B * a.G), WARPS * 32, bytes, partial, a));
  if (out == NULL) return NN_OK;
  return launch_kernel(context, "nn_attention_decode", true, decode_merge_kernel, dim3(a.B * a.Q), MERGE_WARPS * 32, 0, (bf16 *)out, (const float *)partial, splits, D);
}

static nn_status choose_decode(nn_context *context, void *out, float *partial, const Attention &a, int splits, bool chained) {
  switch (a.D) {
    case 16: return run_decode<16, 4>(context, out, partial, a, splits, chained);
    case 32: return run_decode<32, 4>(context, out, partial, a, splits, chained);
    case 64: return run_decode<64, 4>(context, out, partial, a, splits, chained);
    default: return run_decode<128, 2>(context, out, partial, a, splits, chained);
  }
}

nn_status nn_attention_decode_chained(nn_context *context, void *out, float *partial, const Attention &a, int splits) {
  return choose_decode(context, out, partial, a, splits, true);
}

nn_status nn_attention_decode(nn_context *context, void *out, const Attention &a) {
  const int splits = nn_decode_splits(context, a);
  Scratch scratch(context);
  float *partial = scratch.take<float>((int64_t)a.B * a.Q * splits * (a.D + 2));
  NN_SCRATCH(context, scratch);
  return choose_decode(context, out, partial, a, splits, false);
}
