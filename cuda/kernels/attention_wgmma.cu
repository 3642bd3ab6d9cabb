/* attention_wgmma.cu: flash attention for Hopper, bf16, head size 64: wgmma fed by the copy engine. No atomics: dQ has its own kernel, and
 * the block that owns a tile of keys walks over all its queries (and heads) itself. Each kernel has one warpgroup that loads (one
 * thread of it) and others that multiply, 64 rows each. Shah et al., arXiv 2407.08608; Dao, arXiv 2307.08691.
 *
 *   loader        wait empty[s] -> copy a tile into stage s -> full[s]
 *   multipliers   wait full[s] -> wgmma ... (when they are done) -> empty[s], by each warp
 *
 * Accumulators become A operands in registers: of 16 columns, lane l has the pairs of columns 2*(l%4) and + 8, rows l/4 and + 8.
 */
#include "attention_tiles.cuh"
#include "hopper.cuh"
#include "hopper_rows.cuh"

const int D = 64, ROWS = 64; /* head size; rows of one warpgroup */

#if NN_HOPPER

/* Columns 16*t .. +15 of an accumulator, as an A operand. */
template <int N>
__device__ __forceinline__ void pack_columns(uint32_t (&a)[N / 8][4], const float (&d)[N]) {
#pragma unroll
  for (int t = 0; t < N / 8; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) a[t][e] = pack_bf16(d[8 * t + 2 * e], d[8 * t + 2 * e + 1]);
}

/* d = a b^T: 64 rows of a by 128 rows of b, both K-major in shared memory, 64 depths. */
__device__ __forceinline__ void product_128(float (&d)[64], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < D / 16; k++) wgmma<0, 0>(d, operand(a + k * 32), operand(b + k * 32), k > 0);
}

/* A ring of stages as one side of it sees it. */
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  template <int STAGES>
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

__device__ __forceinline__ uint32_t align_1024(const unsigned char *memory) { return (shared_address(memory) + 1023) & ~1023u; }

#endif

/* ---- forward ------------------------------------------------------------------------------------------------- */

const int FORWARD_GROUPS = 3, FORWARD_KEYS = 128, FORWARD_STAGES = 3, FORWARD_ROWS = FORWARD_GROUPS * ROWS, TILE = FORWARD_KEYS * D * 2;
const int FORWARD_BYTES = 1024 + FORWARD_ROWS * D * 2 + 2 * FORWARD_STAGES * TILE;

/* Products of the next tile's scores and of this tile's values run while the softmax between them is computed. */
__global__ void __launch_bounds__(128 * (FORWARD_GROUPS + 1), 1)
    flash_forward_wgmma(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                        const __grid_constant__ CUtensorMap map_v, bf16 *out, float *log_sum_exp, const Attention a) {
#if NN_HOPPER
  extern __shared__ unsigned char memory[];
  __shared__ __align__(8) uint64_t barriers[1 + 4 * FORWARD_STAGES];
  const uint32_t sq = align_1024(memory), sk = sq + FORWARD_ROWS * D * 2, sv = sk + FORWARD_STAGES * TILE;
  const uint32_t full_q = shared_address(barriers), full_k = full_q + 8, full_v = full_k + 8 * FORWARD_STAGES;
  const uint32_t empty_k = full_v + 8 * FORWARD_STAGES, empty_v = empty_k + 8 * FORWARD_STAGES;
  if (threadIdx.x == 0) {
    barrier_init(full_q, 1);
    for (int s = 0; s < FORWARD_STAGES; s++) {
      barrier_init(full_k + 8 * s, 1), barrier_init(full_v + 8 * s, 1);
      barrier_init(empty_k + 8 * s, 4 * FORWARD_GROUPS), barrier_init(empty_v + 8 * s, 4 * FORWARD_GROUPS);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int h = blockIdx.x % a.Q, b = blockIdx.x / a.Q, i0 = (gridDim.y - 1 - blockIdx.y) * FORWARD_ROWS; /* the longest rows first */
  const int64_t start = a.start ? a.start[b] : 0;
  const int count = (int)min(start + min(i0 + FORWARD_ROWS, a.S), a.capacity), tiles = (count + FORWARD_KEYS - 1) / FORWARD_KEYS;
  const int group = threadIdx.x >> 7;
  if (group == FORWARD_GROUPS) {
    registers_down<32>();
    if (threadIdx.x != 128 * FORWARD_GROUPS) return;
    barrier_expect(full_q, FORWARD_ROWS * D * 2);
    tensor_copy(sq, &map_q, full_q, h * D, i0, b);
    const int column = h / (a.Q / a.G) * D;
    Ring ring;
    for (int t = 0; t < tiles; t++) {
      barrier_wait(empty_k + 8 * ring.stage, ring.phase ^ 1);
      barrier_expect(full_k + 8 * ring.stage, TILE);
      tensor_copy(sk + ring.stage * TILE, &map_k, full_k + 8 * ring.stage, column, t * FORWARD_KEYS, b);
      barrier_wait(empty_v + 8 * ring.stage, ring.phase ^ 1);
      barrier_expect(full_v + 8 * ring.stage, TILE);
      tensor_copy(sv + ring.stage * TILE, &map_v, full_v + 8 * ring.stage, column, t * FORWARD_KEYS, b);
      ring.next<FORWARD_STAGES>();
    }
    return;
  }
  registers_up<160>();
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, r0 = i0 + group * ROWS;
  const int last = (int)min(start + min(r0 + ROWS, a.S), a.capacity);
  const int own = r0 < a.S ? (last + FORWARD_KEYS - 1) / FORWARD_KEYS : 0; /* tiles that some row of this group sees */
  const int64_t seen = start + r0 + warp * 16 + (lane >> 2);               /* the last key that this lane's first row sees */
  const float factor = a.scale * LOG2_E;
  const uint32_t q = sq + group * ROWS * D * 2;
  float s[64], o[32], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, old[2];
  uint32_t p[8][4];
  Ring keys, values;
#pragma unroll
  for (int i = 0; i < 32; i++) o[i] = 0.0f;

  /* s of tile t becomes exp(s - maximum so far); old: what is left of everything before. */
  auto soften = [&](int t) {
    const int64_t j0 = (int64_t)t * FORWARD_KEYS;
    if (j0 + FORWARD_KEYS - 1 > start + r0 + warp * 16) {
      const int limit = (int)(seen - j0) - (lane & 3) * 2; /* columns up to it are seen, of the first row */
#pragma unroll
      for (int j = 0; j < 16; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (j * 8 + (e & 1) > limit + (e >> 1) * 8) s[4 * j + e] = -INFINITY;
    }
    float top[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int i = 0; i < 64; i++) top[(i >> 1) & 1] = fmaxf(top[(i >> 1) & 1], s[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
      old[r] = exp2_fast((maximum[r] - top[r]) * factor);
      maximum[r] = top[r];
      sum[r] *= old[r];
      top[r] *= factor;
    }
#pragma unroll
    for (int i = 0; i < 64; i++) {
      s[i] = exp2_fast(fmaf(s[i], factor, -top[(i >> 1) & 1]));
      sum[(i >> 1) & 1] += s[i];
    }
  };
  /* Values behind the last key are not read as numbers: memory of a cache that nobody has written. */
  auto clear_behind = [&](int t) {
    const int there = count - t * FORWARD_KEYS;
    if (a.start == NULL || there >= FORWARD_KEYS) return;
    const uint32_t tile = sv + values.stage * TILE;
    for (int i = there * 8 + (threadIdx.x & 127); i < FORWARD_KEYS * 8; i += 128)
      clear_16(tile + i * 16);
    fence_async_shared();
    group_barrier(group + 1);
  };
  auto wait_values = [&](int t) {
    barrier_wait(full_v + 8 * values.stage, values.phase);
    clear_behind(t);
  };
  auto add_values = [&]() {
#pragma unroll
    for (int k = 0; k < FORWARD_KEYS / 16; k++) wgmma_rows<1>(o, p[k], operand(sv + values.stage * TILE + k * 2048), 1);
  };
  auto release = [&](uint32_t empty, Ring &ring) {
    if (lane == 0) barrier_arrive(empty + 8 * ring.stage);
    ring.next<FORWARD_STAGES>();
  };

  barrier_wait(full_q, 0);
  if (own > 0) {
    barrier_wait(full_k + 8 * keys.stage, keys.phase);
    settle(s);
    wgmma_fence();
    product_128(s, q, sk + keys.stage * TILE);
    wgmma_commit();
    wgmma_wait<0>();
    settle(s);
    release(empty_k, keys);
    soften(0);
    pack_columns(p, s);
    for (int t = 1; t < own; t++) {
      wait_values(t - 1);
      barrier_wait(full_k + 8 * keys.stage, keys.phase);
      settle(s), settle(p), settle(o);
      wgmma_fence();
      product_128(s, q, sk + keys.stage * TILE);
      wgmma_commit();
      add_values();
      wgmma_commit();
      wgmma_wait<1>();
      settle(s);
      release(empty_k, keys);
      soften(t);
      wgmma_wait<0>();
      settle(o), settle(p);
      release(empty_v, values);
#pragma unroll
      for (int i = 0; i < 32; i++) o[i] *= old[(i >> 1) & 1];
      pack_columns(p, s);
    }
    wait_values(own - 1);
    settle(p), settle(o);
    wgmma_fence();
    add_values();
    wgmma_commit();
    wgmma_wait<0>();
    settle(o);
    release(empty_v, values);
  }
  for (int t = own; t < tiles; t++) { /* what the other groups need; every lane has seen a phase before the warp lets it end */
    barrier_wait(full_k + 8 * keys.stage, keys.phase);
    barrier_wait(full_v + 8 * values.stage, values.phase);
    __syncwarp();
    release(empty_k, keys);
    release(empty_v, values);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    const int i = r0 + warp * 16 + (lane >> 2) + r * 8;
    if (i >= a.S) continue;
    const float inverse = 1.0f / sum[r];
    bf16 *to = out + (((int64_t)b * a.S + i) * a.Q + h) * D + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < 8; j++) *reinterpret_cast<uint32_t *>(to + j * 8) = pack_bf16(o[4 * j + 2 * r] * inverse, o[4 * j + 2 * r + 1] * inverse);
    if (log_sum_exp && (lane & 3) == 0) log_sum_exp[((int64_t)b * a.Q + h) * a.S + i] = maximum[r] * a.scale + logf(sum[r]);
  }
#endif
}

/* ---- backward: dQ -------------------------------------------------------------------------------------------- */

const int DQ_GROUPS = 2, DQ_ROWS = DQ_GROUPS * ROWS, DQ_KEYS = 128, DQ_STAGES = 3, DQ_STAGE = 2 * DQ_KEYS * D * 2;
const int DQ_BYTES = 1024 + 2 * DQ_ROWS * D * 2 + DQ_STAGES * DQ_STAGE;

__global__ void __launch_bounds__(128 * (DQ_GROUPS + 1), 1)
    flash_dq_wgmma(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_dout, const __grid_constant__ CUtensorMap map_k,
                   const __grid_constant__ CUtensorMap map_v, bf16 *dqkv, const float *log_sum_exp, const float *delta, const Attention a) {
#if NN_HOPPER
  extern __shared__ unsigned char memory[];
  __shared__ __align__(8) uint64_t barriers[1 + 2 * DQ_STAGES];
  const uint32_t sq = align_1024(memory), sd = sq + DQ_ROWS * D * 2, stages = sd + DQ_ROWS * D * 2;
  const uint32_t full_q = shared_address(barriers), full = full_q + 8, empty = full + 8 * DQ_STAGES;
  if (threadIdx.x == 0) {
    barrier_init(full_q, 1);
    for (int s = 0; s < DQ_STAGES; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 4 * DQ_GROUPS);
    fence_barrier_init();
  }
  __syncthreads();
  const int h = blockIdx.x % a.Q, b = blockIdx.x / a.Q, i0 = (gridDim.y - 1 - blockIdx.y) * DQ_ROWS;
  const int turns = (min(i0 + DQ_ROWS, a.S) + DQ_KEYS - 1) / DQ_KEYS, group = threadIdx.x >> 7;
  if (group == DQ_GROUPS) {
    registers_down<24>();
    if (threadIdx.x != 128 * DQ_GROUPS) return;
    barrier_expect(full_q, 2 * DQ_ROWS * D * 2);
    tensor_copy(sq, &map_q, full_q, h * D, i0, b);
    tensor_copy(sd, &map_dout, full_q, h * D, i0, b);
    const int column = h / (a.Q / a.G) * D;
    Ring ring;
    for (int t = 0; t < turns; t++) {
      barrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
      barrier_expect(full + 8 * ring.stage, DQ_STAGE);
      tensor_copy(stages + ring.stage * DQ_STAGE, &map_k, full + 8 * ring.stage, column, t * DQ_KEYS, b);
      tensor_copy(stages + ring.stage * DQ_STAGE + DQ_STAGE / 2, &map_v, full + 8 * ring.stage, column, t * DQ_KEYS, b);
      ring.next<DQ_STAGES>();
    }
    return;
  }
  registers_up<240>();
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, r0 = i0 + group * ROWS, row0 = r0 + warp * 16 + (lane >> 2);
  const int own = r0 < a.S ? (min(r0 + ROWS, a.S) + DQ_KEYS - 1) / DQ_KEYS : 0;
  const float factor = a.scale * LOG2_E;
  const uint32_t q = sq + group * ROWS * D * 2, d = sd + group * ROWS * D * 2;
  float lse[2], shift[2], s[64], dp[64], dq[32];
  uint32_t ds[8][4];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int i = row0 + r * 8;
    const int64_t stat = ((int64_t)b * a.Q + h) * a.S + i;
    lse[r] = i < a.S ? log_sum_exp[stat] * LOG2_E : INFINITY;
    shift[r] = i < a.S ? delta[stat] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 32; i++) dq[i] = 0.0f;
  Ring ring;
  int before = -1;
  barrier_wait(full_q, 0);
  for (int t = 0; t < own; t++) {
    const uint32_t k = stages + ring.stage * DQ_STAGE, v = k + DQ_STAGE / 2;
    barrier_wait(full + 8 * ring.stage, ring.phase);
    settle(s), settle(dp);
    wgmma_fence();
    product_128(s, q, k);
    wgmma_commit();
    product_128(dp, d, v);
    wgmma_commit();
    wgmma_wait<1>(); /* dQ of the turn before is done too */
    settle(s), settle(dq), settle(ds);
    if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
    const int j0 = t * DQ_KEYS;
#pragma unroll
    for (int i = 0; i < 64; i++) s[i] = exp2_fast(fmaf(s[i], factor, -lse[(i >> 1) & 1]));
    if (j0 + DQ_KEYS - 1 > r0 + warp * 16) {
      const int limit = row0 - j0 - (lane & 3) * 2;
#pragma unroll
      for (int j = 0; j < 16; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (j * 8 + (e & 1) > limit + (e >> 1) * 8) s[4 * j + e] = 0.0f;
    }
    wgmma_wait<0>();
    settle(dp);
#pragma unroll
    for (int i = 0; i < 64; i++) s[i] *= dp[i] - shift[(i >> 1) & 1];
    pack_columns(ds, s);
    settle(ds), settle(dq);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DQ_KEYS / 16; i++) wgmma_rows<1>(dq, ds[i], operand(k + i * 2048), 1);
    wgmma_commit();
    before = ring.stage;
    ring.next<DQ_STAGES>();
  }
  wgmma_wait<0>();
  settle(dq);
  if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
  for (int t = own; t < turns; t++) {
    barrier_wait(full + 8 * ring.stage, ring.phase);
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * ring.stage);
    ring.next<DQ_STAGES>();
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (row0 + r * 8 >= a.S) continue;
    bf16 *to = dqkv + ((int64_t)b * a.S + row0 + r * 8) * a.q_row + (int64_t)h * D + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < 8; j++) *reinterpret_cast<uint32_t *>(to + j * 8) = pack_bf16(dq[4 * j + 2 * r] * a.scale, dq[4 * j + 2 * r + 1] * a.scale);
  }
#endif
}

/* ---- backward: dK, dV ---------------------------------------------------------------------------------------- */

const int DKV_GROUPS = 2, DKV_KEYS = DKV_GROUPS * ROWS, TURN = 64, DKV_STAGES = 4, STATS = 2 * TURN * 4; /* TURN: queries */
const int DKV_STAGE = 2 * TURN * D * 2, DKV_BYTES = 1024 + 2 * DKV_KEYS * D * 2 + DKV_STAGES * (DKV_STAGE + STATS);

/* partial [splits, B, S, G, 2, D] float32: dK and dV of one tile of keys from the heads of one split of the group's heads. The rows' sums come
 * with their queries, in boxes of TURN: behind the last query they read as 0, as its dO does, so that dS is 0 there by itself. */
__global__ void __launch_bounds__(128 * (DKV_GROUPS + 1), 1)
    flash_dkv_wgmma(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_dout, const __grid_constant__ CUtensorMap map_k,
                    const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_sums, const __grid_constant__ CUtensorMap map_delta,
                    float *partial, const Attention a, int heads_of_split, int splits) {
#if NN_HOPPER
  extern __shared__ unsigned char memory[];
  __shared__ __align__(8) uint64_t barriers[1 + 2 * DKV_STAGES];
  const uint32_t sk = align_1024(memory), sv = sk + DKV_KEYS * D * 2, stages = sv + DKV_KEYS * D * 2, stats = stages + DKV_STAGES * DKV_STAGE;
  const uint32_t full_kv = shared_address(barriers), full = full_kv + 8, empty = full + 8 * DKV_STAGES;
  if (threadIdx.x == 0) {
    barrier_init(full_kv, 1);
    for (int s = 0; s < DKV_STAGES; s++) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, 4 * DKV_GROUPS);
    fence_barrier_init();
  }
  __syncthreads();
  const int split = blockIdx.x % splits, g = blockIdx.x / splits % a.G, b = blockIdx.x / splits / a.G, heads = a.Q / a.G;
  const int j0 = blockIdx.y * DKV_KEYS; /* the first keys have the most queries, and come first */
  const int first_head = g * heads + split * heads_of_split, last_head = min(first_head + heads_of_split, (g + 1) * heads);
  const int first_turn = j0 / TURN, last_turn = (a.S + TURN - 1) / TURN, group = threadIdx.x >> 7;
  if (group == DKV_GROUPS) {
    registers_down<24>();
    if (threadIdx.x != 128 * DKV_GROUPS) return;
    barrier_expect(full_kv, 2 * DKV_KEYS * D * 2);
    tensor_copy(sk, &map_k, full_kv, g * D, j0, b);
    tensor_copy(sv, &map_v, full_kv, g * D, j0, b);
    Ring ring;
    for (int h = first_head; h < last_head; h++)
      for (int turn = first_turn; turn < last_turn; turn++) {
        const int i0 = turn * TURN;
        const uint32_t at = stages + ring.stage * DKV_STAGE, stat = stats + ring.stage * STATS;
        barrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
        barrier_expect(full + 8 * ring.stage, DKV_STAGE + STATS);
        tensor_copy(at, &map_q, full + 8 * ring.stage, h * D, i0, b);
        tensor_copy(at + DKV_STAGE / 2, &map_dout, full + 8 * ring.stage, h * D, i0, b);
        tensor_copy(stat, &map_sums, full + 8 * ring.stage, i0, b * a.Q + h, 0);
        tensor_copy(stat + STATS / 2, &map_delta, full + 8 * ring.stage, i0, b * a.Q + h, 0);
        ring.next<DKV_STAGES>();
      }
    return;
  }
  registers_up<240>();
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, k0 = j0 + group * ROWS, row0 = k0 + warp * 16 + (lane >> 2);
  const float factor = a.scale * LOG2_E;
  uint32_t fk[4][4], fv[4][4], p[4][4], ds[4][4];
  float s[32], dp[32], dk[32], dv[32];
#pragma unroll
  for (int i = 0; i < 32; i++) dk[i] = dv[i] = 0.0f;
  settle(dk), settle(dv); /* or they share registers until the loop parts them */
  barrier_wait(full_kv, 0);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    ldmatrix4(fk[k], swizzled(sk, group * ROWS + warp * 16 + (lane & 15), k * 2 + (lane >> 4)));
    ldmatrix4(fv[k], swizzled(sv, group * ROWS + warp * 16 + (lane & 15), k * 2 + (lane >> 4)));
  }
  /* ptxas 13.0 gives p and ds the registers of fk and fv, which are read again a turn later, unless each turn makes fk and fv anew. */
  const uint32_t zero = (uint32_t)(a.S >> 31);
  Ring ring;
  int before = -1, turn = first_turn;
  /* The second group's first turn of a head sees nothing and adds zeros: a branch around it would serialize the products. */
  for (int left = (last_head - first_head) * (last_turn - first_turn); left > 0; left--) {
    const int i0 = turn * TURN;
    if (++turn == last_turn) turn = first_turn;
    const uint32_t q = stages + ring.stage * DKV_STAGE, d = q + DKV_STAGE / 2, stat = stats + ring.stage * STATS + (lane & 3) * 8;
    barrier_wait(full + 8 * ring.stage, ring.phase);
    settle(s), settle(dp), settle(fk), settle(fv);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_rows<0>(s, fk[k], operand(q + k * 32), k > 0);
    wgmma_commit();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_rows<0>(dp, fv[k], operand(d + k * 32), k > 0);
    wgmma_commit();
    wgmma_wait<1>(); /* dK and dV of the turn before are done too */
    settle(s), settle(dk), settle(dv), settle(p), settle(ds);
    __syncwarp(); /* every lane has read its row sums there */
    if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
    const bool edge = i0 < k0 + warp * 16 + 15 || i0 + TURN > a.S;
    const int low = row0 - i0 - (lane & 3) * 2, high = a.S - i0 - (lane & 3) * 2; /* columns that count, of the first row: low .. high - 1 */
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float l[2];
      load_two(l, stat + j * 32);
      l[0] *= LOG2_E, l[1] *= LOG2_E;
#pragma unroll
      for (int e = 0; e < 4; e++) s[4 * j + e] = exp2_fast(fmaf(s[4 * j + e], factor, -l[e & 1]));
    }
    if (edge) {
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int column = j * 8 + (e & 1);
          if (column < low + (e >> 1) * 8 || column >= high) s[4 * j + e] = 0.0f;
        }
    }
    wgmma_wait<0>();
    settle(dp);
    pack_columns(p, s);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float c[2];
      load_two(c, stat + STATS / 2 + j * 32);
#pragma unroll
      for (int e = 0; e < 4; e++) s[4 * j + e] *= dp[4 * j + e] - c[e & 1];
    }
    pack_columns(ds, s);
#pragma unroll
    for (int i = 0; i < 16; i++) fk[i / 4][i % 4] ^= zero, fv[i / 4][i % 4] ^= zero;
    settle(p), settle(ds), settle(dk), settle(dv), settle(fk), settle(fv);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_rows<1>(dv, p[k], operand(d + k * 2048), 1);
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_rows<1>(dk, ds[k], operand(q + k * 2048), 1);
    wgmma_commit();
    before = ring.stage;
    ring.next<DKV_STAGES>();
  }
  wgmma_wait<0>();
  settle(dk), settle(dv);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int j = row0 + r * 8;
    if (j >= a.S) continue;
    float *to = partial + ((((int64_t)split * a.B + b) * a.S + j) * a.G + g) * 2 * D + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      *reinterpret_cast<float2 *>(to + i * 8) = make_float2(dk[4 * i + 2 * r] * a.scale, dk[4 * i + 2 * r + 1] * a.scale);
      *reinterpret_cast<float2 *>(to + D + i * 8) = make_float2(dv[4 * i + 2 * r], dv[4 * i + 2 * r + 1]);
    }
  }
#endif
}

/* The splits' dK and dV, added in order, to their columns of dqkv; two elements a thread. */
__global__ void add_dkv_wgmma(bf16 *dqkv, const float *partial, int splits, int64_t rows, int Q, int G) {
  const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 2, width = 2 * G * D;
  if (i >= rows * width) return;
  float2 sum = make_float2(0.0f, 0.0f);
  for (int s = 0; s < splits; s++) {
    const float2 part = *reinterpret_cast<const float2 *>(partial + s * rows * width + i);
    sum.x += part.x, sum.y += part.y;
  }
  const int64_t row = i / width;
  const int rest = (int)(i - row * width), g = rest / (2 * D), which = rest / D % 2, d = rest % D;
  *reinterpret_cast<uint32_t *>(dqkv + row * (Q + 2 * G) * D + (int64_t)(Q + which * G + g) * D + d) = pack_bf16(sum.x, sum.y);
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

static bool fits(nn_context *context, const Attention &a, nn_dtype dtype) {
  return context->capability == 90 && dtype == NN_BF16 && a.D == D && a.q_row % 8 == 0 && a.kv_row % 8 == 0 && a.kv_batch % 8 == 0 && aligned16(a.q) &&
         aligned16(a.k) && aligned16(a.v);
}

static bool map_queries(CUtensorMap *map, const Attention &a, int rows) { return nn_tensor_map(map, a.q, (int64_t)a.Q * D, a.S, a.B, a.q_row, a.S * a.q_row, rows); }
static bool map_keys(CUtensorMap *map, const void *from, const Attention &a, int rows) {
  return nn_tensor_map(map, from, (int64_t)a.G * D, a.capacity, a.B, a.kv_row, a.kv_batch, rows);
}

/* NN_ERROR_UNSUPPORTED where these kernels cannot: attention.cu then takes those of mma.sync. */
nn_status nn_attention_forward_wgmma(nn_context *context, void *out, float *log_sum_exp, const Attention &a, nn_dtype dtype) {
  CUtensorMap q, k, v;
  if (!fits(context, a, dtype) || a.capacity >= (1ll << 31) || !map_queries(&q, a, FORWARD_ROWS) || !map_keys(&k, a.k, a, FORWARD_KEYS) ||
      !map_keys(&v, a.v, a, FORWARD_KEYS))
    return NN_ERROR_UNSUPPORTED;
  NN_CUDA(context, cudaFuncSetAttribute(flash_forward_wgmma, cudaFuncAttributeMaxDynamicSharedMemorySize, FORWARD_BYTES));
  flash_forward_wgmma<<<dim3(a.Q * a.B, (unsigned)ceil_div(a.S, FORWARD_ROWS)), 128 * (FORWARD_GROUPS + 1), FORWARD_BYTES, context->stream>>>(
      q, k, v, (bf16 *)out, log_sum_exp, a);
  return NN_OK;
}

static int heads_of_split(nn_context *context, const Attention &a) {
  const int heads = a.Q / a.G, blocks = a.B * a.G * (int)ceil_div(a.S, DKV_KEYS), splits = (int)ceil_div(6 * context->multiprocessors, blocks);
  return (int)ceil_div(heads, splits > heads ? heads : splits > 6 ? 6 : splits);
}

/* Workspace of nn_attention_backward_wgmma, in bytes. */
int64_t nn_attention_backward_wgmma_scratch(nn_context *context, const Attention &a) {
  return ceil_div(a.Q / a.G, heads_of_split(context, a)) * a.B * a.S * a.G * 2 * a.D * (int64_t)sizeof(float);
}

/* delta [B, Q, S]. */
nn_status nn_attention_backward_wgmma(nn_context *context, void *dqkv, const void *dout, const float *log_sum_exp, const float *delta,
                                      const Attention &a, nn_dtype dtype) {
  CUtensorMap q128, q64, d128, d64, k, v, sums, deltas;
  auto map_dout = [&](CUtensorMap *map, int rows) { return nn_tensor_map(map, dout, (int64_t)a.Q * D, a.S, a.B, (int64_t)a.Q * D, (int64_t)a.S * a.Q * D, rows); };
  if (!fits(context, a, dtype) || a.S % 4 || !aligned16(dout) || !aligned16(log_sum_exp) || !aligned16(delta) || !map_queries(&q128, a, DQ_ROWS) ||
      !nn_tensor_map_rows(&sums, log_sum_exp, a.S, (int64_t)a.B * a.Q, TURN) || !nn_tensor_map_rows(&deltas, delta, a.S, (int64_t)a.B * a.Q, TURN) ||
      !map_queries(&q64, a, TURN) || !map_dout(&d128, DQ_ROWS) || !map_dout(&d64, TURN) || !map_keys(&k, a.k, a, DQ_KEYS) || !map_keys(&v, a.v, a, DQ_KEYS))
    return NN_ERROR_UNSUPPORTED;
  const int heads = heads_of_split(context, a), splits = (int)ceil_div(a.Q / a.G, heads);
  Scratch scratch(context);
  float *partial = scratch.take<float>(nn_attention_backward_wgmma_scratch(context, a) / 4);
  NN_SCRATCH(context, scratch);
  NN_CUDA(context, cudaFuncSetAttribute(flash_dq_wgmma, cudaFuncAttributeMaxDynamicSharedMemorySize, DQ_BYTES));
  NN_CUDA(context, cudaFuncSetAttribute(flash_dkv_wgmma, cudaFuncAttributeMaxDynamicSharedMemorySize, DKV_BYTES));
  flash_dkv_wgmma<<<dim3(splits * a.G * a.B, (unsigned)ceil_div(a.S, DKV_KEYS)), 128 * (DKV_GROUPS + 1), DKV_BYTES, context->stream>>>(
      q64, d64, k, v, sums, deltas, partial, a, heads, splits);
  flash_dq_wgmma<<<dim3(a.Q * a.B, (unsigned)ceil_div(a.S, DQ_ROWS)), 128 * (DQ_GROUPS + 1), DQ_BYTES, context->stream>>>(
      q128, d128, k, v, (bf16 *)dqkv, log_sum_exp, delta, a);
  const int64_t rows = (int64_t)a.B * a.S;
  add_dkv_wgmma<<<(unsigned)ceil_div(rows * a.G * D, 256), 256, 0, context->stream>>>((bf16 *)dqkv, partial, splits, rows, a.Q, a.G);
  return NN_OK;
}
