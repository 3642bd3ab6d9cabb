/* attention_mma.cu: flash attention on mma.sync, bf16, head sizes 16, 32, 64 and 128, any sm_80 or newer chip. No atomics: dQ has its
 * own kernel, and the block that owns a tile of keys walks over all its queries (and heads) itself.
 * Dao, arXiv 2307.08691.
 *
 * Each warp owns 16 rows of its product; P and dS stay in registers.
 */
#include "attention_tiles.cuh"

/* ---- forward ------------------------------------------------------------------------------------------------- */

const int QUERIES = 128, KEYS = 64; /* of one block and of one turn of its loop */

template <int D>
__global__ void __launch_bounds__(256) flash_forward_kernel(bf16 *out, float *log_sum_exp, const Attention a) {
  extern __shared__ __align__(16) unsigned char memory[];
  bf16 *sq = (bf16 *)memory, *sk = sq + QUERIES * (D + 8), *sv = sk + 2 * KEYS * (D + 8);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.y, b = blockIdx.z;
  const int i0 = (gridDim.x - 1 - blockIdx.x) * QUERIES; /* the longest rows first */
  const int64_t start = a.start ? a.start[b] : 0, head = (int64_t)b * a.kv_batch + (int64_t)(h / (a.Q / a.G)) * D;
  const bf16 *q = (const bf16 *)a.q + ((int64_t)b * a.S + i0) * a.q_row + (int64_t)h * D;
  const bf16 *k = (const bf16 *)a.k + head, *v = (const bf16 *)a.v + head;
  const int64_t count = min(start + min(i0 + QUERIES, a.S), a.capacity);
  const int tiles = (int)((count + KEYS - 1) / KEYS);
  auto fetch = [&](int t) {
    if (t < tiles) {
      int64_t j0 = (int64_t)t * KEYS;
      load_tile<D, KEYS, 256>(sk + (t & 1) * KEYS * (D + 8), k + j0 * a.kv_row, a.kv_row, count - j0);
      load_tile<D, KEYS, 256>(sv + (t & 1) * KEYS * (D + 8), v + j0 * a.kv_row, a.kv_row, count - j0);
    }
    cp_async_commit();
  };
  load_tile<D, QUERIES, 256>(sq, q, a.q_row, a.S - i0);
  fetch(0);
  cp_async_wait<0>();
  __syncthreads();
  uint32_t fq[D / 16][4];
#pragma unroll
  for (int d = 0; d < D / 16; d++) load_a<D>(fq[d], sq, warp * 16, d * 16);

  const float factor = a.scale * LOG2_E;
  float o[D / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  const int64_t row0 = start + i0 + warp * 16 + (lane >> 2); /* the last key that this lane's first row sees */
  for (int t = 0; t < tiles; t++) {
    fetch(t + 1);
    const bf16 *tk = sk + (t & 1) * KEYS * (D + 8), *tv = sv + (t & 1) * KEYS * (D + 8);
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++)
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        uint32_t f[4];
        load_b<D>(f, tk, n * 16, d * 16);
        mma_pair(s[2 * n], s[2 * n + 1], fq[d], f);
      }
    const int64_t j0 = (int64_t)t * KEYS;
    if (j0 + KEYS - 1 > start + i0 + warp * 16) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (j0 + n * 8 + (lane & 3) * 2 + (e & 1) > row0 + (e >> 1) * 8) s[n][e] = -INFINITY;
    }
    float top[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) top[e >> 1] = fmaxf(top[e >> 1], s[n][e]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
      float old = exp2_fast((maximum[r] - top[r]) * factor);
      maximum[r] = top[r];
      sum[r] *= old;
#pragma unroll
      for (int d = 0; d < D / 8; d++) o[d][2 * r] *= old, o[d][2 * r + 1] *= old;
      top[r] *= factor;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[n][e] = exp2_fast(fmaf(s[n][e], factor, -top[e >> 1]));
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
    cp_async_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    int i = i0 + warp * 16 + (lane >> 2) + r * 8;
    if (i >= a.S) continue;
    float inverse = 1.0f / sum[r];
    bf16 *to = out + (((int64_t)b * a.S + i) * a.Q + h) * D + (lane & 3) * 2;
#pragma unroll
    for (int d = 0; d < D / 8; d++)
      *reinterpret_cast<uint32_t *>(to + d * 8) = pack_bf16(o[d][2 * r] * inverse, o[d][2 * r + 1] * inverse);
    if (log_sum_exp && (lane & 3) == 0) log_sum_exp[((int64_t)b * a.Q + h) * a.S + i] = maximum[r] * a.scale + logf(sum[r]);
  }
}

/* ---- backward: dQ -------------------------------------------------------------------------------------------- */

const int TURN = 32; /* keys (dQ) or queries (dK, dV) of one turn */

template <int D>
__global__ void __launch_bounds__(256) flash_dq_kernel(bf16 *dqkv, const bf16 *dout, const float *log_sum_exp, const float *delta, const Attention a) {
  extern __shared__ __align__(16) unsigned char memory[];
  bf16 *sq = (bf16 *)memory, *sd = sq + QUERIES * (D + 8), *sk = sd + QUERIES * (D + 8), *sv = sk + 2 * TURN * (D + 8);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.y, b = blockIdx.z;
  const int i0 = (gridDim.x - 1 - blockIdx.x) * QUERIES;
  const int64_t head = (int64_t)b * a.kv_batch + (int64_t)(h / (a.Q / a.G)) * D;
  const bf16 *k = (const bf16 *)a.k + head, *v = (const bf16 *)a.v + head;
  const int count = min(i0 + QUERIES, a.S), turns = (count + TURN - 1) / TURN;
  auto fetch = [&](int t) {
    if (t < turns) {
      int64_t j0 = (int64_t)t * TURN;
      load_tile<D, TURN, 256>(sk + (t & 1) * TURN * (D + 8), k + j0 * a.kv_row, a.kv_row, count - j0);
      load_tile<D, TURN, 256>(sv + (t & 1) * TURN * (D + 8), v + j0 * a.kv_row, a.kv_row, count - j0);
    }
    cp_async_commit();
  };
  load_tile<D, QUERIES, 256>(sq, (const bf16 *)a.q + ((int64_t)b * a.S + i0) * a.q_row + (int64_t)h * D, a.q_row, a.S - i0);
  load_tile<D, QUERIES, 256>(sd, dout + (((int64_t)b * a.S + i0) * a.Q + h) * D, (int64_t)a.Q * D, a.S - i0);
  fetch(0);
  cp_async_wait<0>();
  __syncthreads();
  constexpr bool KEEP = D <= 64; /* the fragments of Q and dO stay in registers */
  uint32_t fq[KEEP ? D / 16 : 1][4], fd[KEEP ? D / 16 : 1][4];
  if (KEEP) {
#pragma unroll
    for (int d = 0; d < D / 16; d++) load_a<D>(fq[KEEP ? d : 0], sq, warp * 16, d * 16), load_a<D>(fd[KEEP ? d : 0], sd, warp * 16, d * 16);
  }
  const float factor = a.scale * LOG2_E;
  float lse[2], shift[2], dq[D / 8][4] = {};
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int i = i0 + warp * 16 + (lane >> 2) + r * 8;
    int64_t stat = ((int64_t)b * a.Q + h) * a.S + i;
    lse[r] = i < a.S ? log_sum_exp[stat] * LOG2_E : INFINITY;
    shift[r] = i < a.S ? delta[stat] : 0.0f;
  }
  const int row0 = i0 + warp * 16 + (lane >> 2);
  for (int t = 0; t < turns; t++) {
    fetch(t + 1);
    const bf16 *tk = sk + (t & 1) * TURN * (D + 8), *tv = sv + (t & 1) * TURN * (D + 8);
    const int j0 = t * TURN;
    if (j0 <= i0 + warp * 16 + 15) { /* some row of the warp sees some key */
      float s[TURN / 8][4] = {}, dp[TURN / 8][4] = {};
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        if (!KEEP) load_a<D>(fq[0], sq, warp * 16, d * 16), load_a<D>(fd[0], sd, warp * 16, d * 16);
#pragma unroll
        for (int n = 0; n < TURN / 16; n++) {
          uint32_t f[4];
          load_b<D>(f, tk, n * 16, d * 16);
          mma_pair(s[2 * n], s[2 * n + 1], fq[KEEP ? d : 0], f);
          load_b<D>(f, tv, n * 16, d * 16);
          mma_pair(dp[2 * n], dp[2 * n + 1], fd[KEEP ? d : 0], f);
        }
      }
      const bool edge = j0 + TURN - 1 > i0 + warp * 16;
#pragma unroll
      for (int n = 0; n < TURN / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float p = exp2_fast(fmaf(s[n][e], factor, -lse[e >> 1]));
          if (edge && j0 + n * 8 + (lane & 3) * 2 + (e & 1) > row0 + (e >> 1) * 8) p = 0.0f;
          s[n][e] = p * (dp[n][e] - shift[e >> 1]);
        }
#pragma unroll
      for (int n = 0; n < TURN / 16; n++) {
        uint32_t f[4], ds[4];
        accumulator_as_a(ds, s, n);
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
          load_b_transposed<D>(f, tk, n * 16, d * 16);
          mma_pair(dq[2 * d], dq[2 * d + 1], ds, f);
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int i = i0 + warp * 16 + (lane >> 2) + r * 8;
    if (i >= a.S) continue;
    bf16 *to = dqkv + ((int64_t)b * a.S + i) * a.q_row + (int64_t)h * D + (lane & 3) * 2;
#pragma unroll
    for (int d = 0; d < D / 8; d++) *reinterpret_cast<uint32_t *>(to + d * 8) = pack_bf16(dq[d][2 * r] * a.scale, dq[d][2 * r + 1] * a.scale);
  }
}

/* ---- backward: dK, dV ---------------------------------------------------------------------------------------- */

/* partial [splits, B, S, G, 2, D] float32: dK and dV of one tile of 64 keys from the heads of one split of the group's heads. */
template <int D>
__global__ void __launch_bounds__(128) flash_dkv_kernel(float *partial, const bf16 *dout, const float *log_sum_exp, const float *delta,
                                                        const Attention a, int heads_of_split) {
  extern __shared__ __align__(16) unsigned char memory[];
  bf16 *sk = (bf16 *)memory, *sv = sk + KEYS * (D + 8), *sq = sv + KEYS * (D + 8), *sd = sq + 2 * TURN * (D + 8);
  float *stats = (float *)(sd + 2 * TURN * (D + 8)); /* [2 stages][lse, delta][TURN] */
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, split = blockIdx.y, b = blockIdx.z / a.G, g = blockIdx.z % a.G;
  const int j0 = blockIdx.x * KEYS, heads = a.Q / a.G; /* the first keys have the most queries, and come first */
  const int first_head = g * heads + split * heads_of_split, last_head = min(first_head + heads_of_split, (g + 1) * heads);
  const int first_turn = j0 / TURN, turns = (a.S + TURN - 1) / TURN - first_turn, total = turns * (last_head - first_head);
  const int64_t head = (int64_t)b * a.kv_batch + (int64_t)g * D;
  auto fetch = [&](int t) {
    if (t < total) {
      int h = first_head + t / turns, i0 = (first_turn + t % turns) * TURN, stage = t & 1;
      load_tile<D, TURN, 128>(sq + stage * TURN * (D + 8), (const bf16 *)a.q + ((int64_t)b * a.S + i0) * a.q_row + (int64_t)h * D, a.q_row, a.S - i0);
      load_tile<D, TURN, 128>(sd + stage * TURN * (D + 8), dout + (((int64_t)b * a.S + i0) * a.Q + h) * D, (int64_t)a.Q * D, a.S - i0);
      if (threadIdx.x < 2 * TURN) {
        int i = i0 + (threadIdx.x % TURN);
        const float *from = threadIdx.x < TURN ? log_sum_exp : delta;
        float value = i < a.S ? from[((int64_t)b * a.Q + h) * a.S + i] : threadIdx.x < TURN ? INFINITY : 0.0f;
        stats[stage * 2 * TURN + threadIdx.x] = threadIdx.x < TURN ? value * LOG2_E : value;
      }
    }
    cp_async_commit();
  };
  load_tile<D, KEYS, 128>(sk, (const bf16 *)a.k + head + j0 * a.kv_row, a.kv_row, a.S - j0);
  load_tile<D, KEYS, 128>(sv, (const bf16 *)a.v + head + j0 * a.kv_row, a.kv_row, a.S - j0);
  fetch(0);
  cp_async_wait<0>();
  __syncthreads();
  constexpr bool KEEP = D <= 64;
  uint32_t fk[KEEP ? D / 16 : 1][4], fv[KEEP ? D / 16 : 1][4];
  if (KEEP) {
#pragma unroll
    for (int d = 0; d < D / 16; d++) load_a<D>(fk[KEEP ? d : 0], sk, warp * 16, d * 16), load_a<D>(fv[KEEP ? d : 0], sv, warp * 16, d * 16);
  }
  const float factor = a.scale * LOG2_E;
  const int row0 = j0 + warp * 16 + (lane >> 2);
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  for (int t = 0; t < total; t++) {
    fetch(t + 1);
    const bf16 *tq = sq + (t & 1) * TURN * (D + 8), *td = sd + (t & 1) * TURN * (D + 8);
    const float *lse = stats + (t & 1) * 2 * TURN, *shift = lse + TURN;
    const int i0 = (first_turn + t % turns) * TURN;
    if (i0 + TURN - 1 >= j0 + warp * 16) {
      float s[TURN / 8][4] = {}, dp[TURN / 8][4] = {}; /* of keys by queries */
#pragma unroll
      for (int d = 0; d < D / 16; d++) {
        if (!KEEP) load_a<D>(fk[0], sk, warp * 16, d * 16), load_a<D>(fv[0], sv, warp * 16, d * 16);
#pragma unroll
        for (int n = 0; n < TURN / 16; n++) {
          uint32_t f[4];
          load_b<D>(f, tq, n * 16, d * 16);
          mma_pair(s[2 * n], s[2 * n + 1], fk[KEEP ? d : 0], f);
          load_b<D>(f, td, n * 16, d * 16);
          mma_pair(dp[2 * n], dp[2 * n + 1], fv[KEEP ? d : 0], f);
        }
      }
      const bool edge = i0 < j0 + warp * 16 + 15;
#pragma unroll
      for (int n = 0; n < TURN / 8; n++) {
        const float2 l = *reinterpret_cast<const float2 *>(lse + n * 8 + (lane & 3) * 2), c = *reinterpret_cast<const float2 *>(shift + n * 8 + (lane & 3) * 2);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float p = exp2_fast(fmaf(s[n][e], factor, -(e & 1 ? l.y : l.x)));
          if (edge && i0 + n * 8 + (lane & 3) * 2 + (e & 1) < row0 + (e >> 1) * 8) p = 0.0f;
          s[n][e] = p;
          dp[n][e] = p * (dp[n][e] - (e & 1 ? c.y : c.x));
        }
      }
#pragma unroll
      for (int n = 0; n < TURN / 16; n++) {
        uint32_t f[4], p[4], ds[4];
        accumulator_as_a(p, s, n);
        accumulator_as_a(ds, dp, n);
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
          load_b_transposed<D>(f, td, n * 16, d * 16);
          mma_pair(dv[2 * d], dv[2 * d + 1], p, f);
          load_b_transposed<D>(f, tq, n * 16, d * 16);
          mma_pair(dk[2 * d], dk[2 * d + 1], ds, f);
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int j = row0 + r * 8;
    if (j >= a.S) continue;
    float *to = partial + ((((int64_t)split * a.B + b) * a.S + j) * a.G + g) * 2 * D + (lane & 3) * 2;
#pragma unroll
    for (int d = 0; d < D / 8; d++) {
      *reinterpret_cast<float2 *>(to + d * 8) = make_float2(dk[d][2 * r] * a.scale, dk[d][2 * r + 1] * a.scale);
      *reinterpret_cast<float2 *>(to + D + d * 8) = make_float2(dv[d][2 * r], dv[d][2 * r + 1]);
    }
  }
}

/* The splits' dK and dV, added in order, to their columns of dqkv; one element a thread. */
__global__ void add_dkv_kernel(bf16 *dqkv, const float *partial, int splits, int64_t rows, int Q, int G, int D) {
  int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, width = 2 * G * D;
  if (i >= rows * width) return;
  float sum = 0.0f;
  for (int s = 0; s < splits; s++) sum += partial[s * rows * width + i];
  int64_t row = i / width;
  int rest = (int)(i - row * width), g = rest / (2 * D), which = rest / D % 2, d = rest % D;
  dqkv[row * (Q + 2 * G) * D + (int64_t)(Q + which * G + g) * D + d] = from_float<bf16>(sum);
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

/* Heads of a group that one block of flash_dkv_kernel walks over: as many as leave four blocks for each multiprocessor. */
static int heads_of_split(nn_context *context, const Attention &a) {
  int heads = a.Q / a.G, blocks = a.B * a.G * (int)ceil_div(a.S, KEYS), splits = (int)ceil_div(8 * context->multiprocessors, blocks);
  if (splits > heads) splits = heads;
  if (splits > 6) splits = 6;
  return (int)ceil_div(heads, splits);
}

int64_t nn_attention_backward_scratch(nn_context *context, const Attention &a) {
  return ceil_div(a.Q / a.G, heads_of_split(context, a)) * a.B * a.S * a.G * 2 * a.D * (int64_t)sizeof(float);
}

template <int D>
static nn_status run_forward(nn_context *context, void *out, float *log_sum_exp, const Attention &a) {
  int bytes = (QUERIES + 4 * KEYS) * (D + 8) * 2;
  NN_CUDA(context, cudaFuncSetAttribute(flash_forward_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  dim3 grid((unsigned)ceil_div(a.S, QUERIES), a.Q, a.B);
  flash_forward_kernel<D><<<grid, 256, bytes, context->stream>>>((bf16 *)out, log_sum_exp, a);
  return NN_OK;
}

template <int D>
static nn_status run_backward(nn_context *context, void *dqkv, const void *dout, const float *log_sum_exp, const float *delta,
                              const Attention &a) {
  int heads = heads_of_split(context, a), splits = (int)ceil_div(a.Q / a.G, heads);
  Scratch scratch(context);
  float *partial = scratch.take<float>(nn_attention_backward_scratch(context, a) / 4);
  NN_SCRATCH(context, scratch);
  int dq_bytes = (2 * QUERIES + 4 * TURN) * (D + 8) * 2, dkv_bytes = (2 * KEYS + 4 * TURN) * (D + 8) * 2 + 4 * TURN * 4;
  NN_CUDA(context, cudaFuncSetAttribute(flash_dq_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, dq_bytes));
  NN_CUDA(context, cudaFuncSetAttribute(flash_dkv_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, dkv_bytes));
  flash_dkv_kernel<D><<<dim3((unsigned)ceil_div(a.S, KEYS), splits, a.B * a.G), 128, dkv_bytes, context->stream>>>(
      partial, (const bf16 *)dout, log_sum_exp, delta, a, heads);
  flash_dq_kernel<D><<<dim3((unsigned)ceil_div(a.S, QUERIES), a.Q, a.B), 256, dq_bytes, context->stream>>>(
      (bf16 *)dqkv, (const bf16 *)dout, log_sum_exp, delta, a);
  int64_t rows = (int64_t)a.B * a.S;
  add_dkv_kernel<<<(unsigned)ceil_div(rows * 2 * a.G * D, 256), 256, 0, context->stream>>>((bf16 *)dqkv, partial, splits, rows, a.Q, a.G, D);
  return NN_OK;
}

nn_status nn_attention_forward_mma(nn_context *context, void *out, float *log_sum_exp, const Attention &a) {
  switch (a.D) {
    case 16: return run_forward<16>(context, out, log_sum_exp, a);
    case 32: return run_forward<32>(context, out, log_sum_exp, a);
    case 64: return run_forward<64>(context, out, log_sum_exp, a);
    default: return run_forward<128>(context, out, log_sum_exp, a);
  }
}

nn_status nn_attention_backward_mma(nn_context *context, void *dqkv, const void *dout, const float *log_sum_exp, const float *delta,
                                    const Attention &a) {
  switch (a.D) {
    case 16: return run_backward<16>(context, dqkv, dout, log_sum_exp, delta, a);
    case 32: return run_backward<32>(context, dqkv, dout, log_sum_exp, delta, a);
    case 64: return run_backward<64>(context, dqkv, dout, log_sum_exp, delta, a);
    default: return run_backward<128>(context, dqkv, dout, log_sum_exp, delta, a);
  }
}
