/* wgmma_epilogues.cuh: how a warp of product_wgmma.cu turns its accumulators into results: 16 rows of a tile, accumulators as wgmma leaves
 * them (hopper.cuh). A piece of 16 rows by 128 bytes is put together in a box of shared memory, which the copy engine takes away while the
 * warp goes on with the next; bf16 pieces that are not whole, where a group's rows or the columns end, the warp takes away itself. Float32 is
 * added to what is there in the L2 cache: each element by one warp once a call, so that its sum has one order. h of SWIGLU is not for the
 * multipliers to compute: they hand gate and up to the finishers, and go on with the next tile.
 */
#pragma once

#include "hopper.cuh"
#include "product.cuh"

const int BM = 128, A_BYTES = BM * 64 * 2; /* rows of a tile; bytes of a stage's A: 64 depths */
const int BOX_BYTES = 16 * 128, MULTIPLIER_WARPS = 8, FINISHER_WARPS = 3;

/* Boxes of a multiplier's warp: two by turns; for SWIGLU all 128 columns of gate, then of up, until the finishers have taken them. */
__host__ __device__ constexpr int boxes_of(int epilogue) { return epilogue == SWIGLU ? 4 : 2; }

#if NN_HOPPER

/* ---- boxes: 16 rows of 128 bytes, swizzled as the operands (hopper.cuh) -------------------------------------- */

/* A box of a warp's staging memory, free to be written: the box before may still be read by the copy engine. */
__device__ __forceinline__ uint32_t next_box(uint32_t staging, int box) {
  if ((threadIdx.x & 31) == 0) store_wait_read<1>();
  __syncwarp();
  return staging + (box & 1) * BOX_BYTES;
}

/* Sends a box that the whole warp has written. ADD: float32, added to what is there. */
template <bool ADD>
__device__ __forceinline__ void send_box(const CUtensorMap *map, uint32_t box, int column, int64_t row, int group) {
  fence_async_shared();
  __syncwarp();
  if ((threadIdx.x & 31) == 0) {
    if (ADD)
      tensor_add(map, box, column, (int)row, group);
    else
      tensor_store(map, box, column, (int)row, group);
    store_commit();
  }
}

/* 16 rows by 64 columns of bf16 pairs into a box. value(j, half): columns 8*j + 2*(lane%4) and the next of row lane/4 + 8*half. */
template <typename Value>
__device__ __forceinline__ void fill_box(uint32_t box, Value value) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = (lane >> 2) + half * 8;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(box + row * 128 + ((j ^ (row & 7)) << 4) + (lane & 3) * 4), "r"(value(j, half)) : "memory");
    }
}

/* alpha * x as the copy engine would leave it if it added it to 0: it flushes subnormals, and -0 becomes 0. */
__device__ __forceinline__ float as_added(float alpha, float x) {
  float sum;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(alpha), "f"(x), "f"(0.0f));
  return sum;
}

/* 16 rows by 32 columns of float32 (d: 4 blocks of 8 columns) into a box. Odd rows go two blocks apart: no two lanes in one bank. */
__device__ __forceinline__ void fill_box(uint32_t box, const float *d, float alpha) {
  const int lane = threadIdx.x & 31, odd = (lane >> 2) & 1;
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = (lane >> 2) + half * 8;
      const float *low = d + j * 4 + half * 2, *high = low + 8;
#pragma unroll
      for (int turn = 0; turn < 2; turn++) {
        const int block = j + ((odd ^ turn) << 1);
        const float x = as_added(alpha, odd ^ turn ? high[0] : low[0]), y = as_added(alpha, odd ^ turn ? high[1] : low[1]);
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(box + row * 128 + (((block * 2 + ((lane & 3) >> 1)) ^ (row & 7)) << 4) + (lane & 1) * 8),
                     "f"(x), "f"(y)
                     : "memory");
      }
    }
}

/* A 16-byte piece of shared memory. */
__device__ __forceinline__ void load_four(uint32_t (&x)[4], uint32_t shared) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared) : "memory");
}
__device__ __forceinline__ void store_four(uint32_t shared, const uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

/* Of 16 rows from row0, those that the tile has. */
__device__ __forceinline__ int rows_inside(const Tile &tile, int64_t row0) { return (int)max((int64_t)0, min((int64_t)16, tile.m_end - row0)); }

/* The first `rows` rows and `columns` columns of a bf16 box to memory, in 16-byte pieces; columns are a multiple of 8. */
__device__ __forceinline__ void copy_box(bf16 *out, int64_t ld, uint32_t box, int rows, int columns) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = i * 4 + (lane >> 3);
    uint32_t x[4];
    load_four(x, box + row * 128 + (((lane & 7) ^ (row & 7)) << 4));
    if (row < rows && (lane & 7) * 8 < columns) *reinterpret_cast<uint4 *>(out + row * ld + (lane & 7) * 8) = make_uint4(x[0], x[1], x[2], x[3]);
  }
}

/* Takes a box away that the whole warp has written: bf16, 16 rows from row0, 64 columns from `column`, of which `rows` and `columns` are inside. */
__device__ __forceinline__ void take_away(const CUtensorMap *map, bf16 *out, int64_t ld, uint32_t box, int64_t row0, int rows, int column, int columns,
                                          int group) {
  if (rows == 16 && columns >= 64) {
    send_box<false>(map, box, column, row0, group);
  } else {
    __syncwarp();
    copy_box(out + row0 * ld + column, ld, box, rows, columns);
    if ((threadIdx.x & 31) == 0) store_commit(); /* a group of nothing: next_box counts two boxes back */
  }
}

/* ---- epilogues ----------------------------------------------------------------------------------------------- */

/* Writes `rows` rows of C from row0 of the tile. boxes: the warp's two, free or on their way. */
template <int BN>
__device__ __forceinline__ void finish(const Product &p, const Tile &tile, const float (&d)[BN / 2], uint32_t boxes, int64_t row0, int rows,
                                       const CUtensorMap *map_c) {
  const int group = p.grouping == GROUP_ROWS ? 0 : tile.group;
  if (p.out_dtype == NN_BF16) {
#pragma unroll
    for (int part = 0; part < BN / 64; part++) {
      const int column = tile.n0 + part * 64;
      const uint32_t box = next_box(boxes, part);
      fill_box(box, [&](int j, int half) {
        const int at = part * 32 + j * 4 + half * 2;
        return pack_bf16(p.alpha * d[at], p.alpha * d[at + 1]);
      });
      take_away(map_c, (bf16 *)p.c + group * p.c_stride, p.ldc, box, row0, rows, column, (int)p.n - column, group);
    }
    if (BN % 128 != 0 && (threadIdx.x & 31) == 0) store_commit(); /* in place of a box, so that the next tile begins with the first one */
  } else { /* never GROUP_ROWS: what lies outside C, the copy engine leaves out */
#pragma unroll
    for (int part = 0; part < BN / 32; part++) {
      const uint32_t box = next_box(boxes, part);
      fill_box(box, d + part * 16, p.alpha);
      if (p.beta != 0.0f)
        send_box<true>(map_c, box, tile.n0 + part * 32, row0, group);
      else
        send_box<false>(map_c, box, tile.n0 + part * 32, row0, group);
    }
  }
}

/* SWIGLU, by a multiplier's warp: gate and up of 16 rows by 128 columns into its four boxes, and to C if there is one. `taken`: the barrier behind the
 * finishers' reads of the tile before, of parity `phase`; arrives at `handed`. */
__device__ __forceinline__ void hand_over(const Product &p, const Tile &tile, const float (&d)[128], uint32_t boxes, int64_t row0, int rows,
                                          const CUtensorMap *map_c, uint32_t handed, uint32_t taken, uint32_t phase) {
  barrier_wait(taken, phase);
  if ((threadIdx.x & 31) == 0) store_wait_read<0>();
  __syncwarp();
#pragma unroll
  for (int piece = 0; piece < 4; piece++)
    fill_box(boxes + piece * BOX_BYTES, [&](int j, int half) { return pack_bf16(d[piece * 32 + j * 4 + half * 2], d[piece * 32 + j * 4 + half * 2 + 1]); });
  barrier_arrive(handed);
  if (!p.c) return;
  if (rows == 16 && tile.n0 + 128 <= p.n) {
    fence_async_shared();
    __syncwarp();
    if ((threadIdx.x & 31) == 0) {
#pragma unroll
      for (int piece = 0; piece < 4; piece++)
        tensor_store(map_c, boxes + piece * BOX_BYTES, tile.n0 + (piece & 1) * 64 + (piece >> 1) * (int)p.n, (int)row0, 0);
      store_commit();
    }
  } else {
    __syncwarp();
    for (int piece = 0; piece < 4; piece++) {
      const int column = tile.n0 + (piece & 1) * 64;
      copy_box((bf16 *)p.c + row0 * 2 * p.n + (piece >> 1) * p.n + column, 2 * p.n, boxes + piece * BOX_BYTES, rows, (int)p.n - column);
    }
  }
}

/* h of 16 rows by 64 columns, from boxes of gate and up into one of its own. */
__device__ __forceinline__ void swiglu_box(uint32_t h, uint32_t gate, uint32_t up) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = i * 4 + (lane >> 3), at = row * 128 + (((lane & 7) ^ (row & 7)) << 4);
    uint32_t g[4], u[4];
    load_four(g, gate + at), load_four(u, up + at);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float2 x = unpack_bf16(g[e]), y = unpack_bf16(u[e]);
      g[e] = pack_bf16(swiglu<bf16>(x.x, y.x), swiglu<bf16>(x.y, y.y));
    }
    store_four(h + at, g);
  }
}

/* SWIGLU, by one of the finishers: h of its share of the tile's pieces, 16 rows by 64 columns. boxes: its own two, of which `turn` says the next; tiles:
 * the multipliers' boxes; handed, taken: the first of MULTIPLIER_WARPS barriers each, one of a multiplier's warp. */
__device__ __forceinline__ void finish_swiglu(const Product &p, const Tile &tile, int finisher, uint32_t boxes, int &turn, uint32_t tiles, uint32_t handed,
                                              uint32_t taken, uint32_t phase, const CUtensorMap *map_h) {
  for (int piece = finisher; piece < 2 * MULTIPLIER_WARPS; piece += FINISHER_WARPS) {
    const int warp = piece >> 1, column = tile.n0 + (piece & 1) * 64;
    const int64_t row0 = tile.m0 + warp * 16;
    const uint32_t gate = tiles + (warp * boxes_of(SWIGLU) + (piece & 1)) * BOX_BYTES, h = next_box(boxes, turn++);
    barrier_wait(handed + 8 * warp, phase);
    swiglu_box(h, gate, gate + 2 * BOX_BYTES);
    barrier_arrive(taken + 8 * warp);
    take_away(map_h, (bf16 *)p.h, p.n, h, row0, rows_inside(tile, row0), column, (int)p.n - column, 0);
  }
}

/* dSwiGLU of 16 rows by 64 columns, in place in a stage that holds gate and up [128 x 64, swizzled] behind each other: dh in d, then
 * dgate, dup and, if it is to be stored, h behind each other. `base`: the warp's rows of gate. Adds dh . h of rows lane/4 and lane/4 + 8 to dots. */
__device__ __forceinline__ void swiglu_backward_piece(uint32_t base, const float *d, const float (&weight)[2], float (&dots)[2], bool stores_h) {
  const int lane = threadIdx.x & 31, row = (lane & 7) + (lane & 8);
#pragma unroll
  for (int i = 0; i < 4; i++) { /* matrices: columns 16i .. +8 of rows 0..7 and 8..15, then the next 8 columns */
    const uint32_t at = base + row * 128 + (((2 * i + (lane >> 4)) ^ (lane & 7)) << 4);
    uint32_t gate[4], up[4], h[4];
    ldmatrix4(gate, at);
    ldmatrix4(up, at + A_BYTES);
#pragma unroll
    for (int m = 0; m < 4; m++) {
      const int half = m & 1;
      const float2 dh = make_float2(d[(2 * i + (m >> 1)) * 4 + half * 2], d[(2 * i + (m >> 1)) * 4 + half * 2 + 1]);
      const float2 g = unpack_bf16(gate[m]), u = unpack_bf16(up[m]);
      const float sx = sigmoid<bf16>(g.x), sy = sigmoid<bf16>(g.y), wx = weight[half] * dh.x, wy = weight[half] * dh.y;
      const float ax = __fmul_rn(g.x, sx), ay = __fmul_rn(g.y, sy); /* silu, whose derivative is s + silu * (1 - s) */
      h[m] = pack_bf16(__fmul_rn(ax, u.x), __fmul_rn(ay, u.y));
      const float2 hv = unpack_bf16(h[m]);
      dots[half] += dh.x * hv.x + dh.y * hv.y;
      gate[m] = pack_bf16(wx * u.x * (sx + ax * (1.0f - sx)), wy * u.y * (sy + ay * (1.0f - sy)));
      up[m] = pack_bf16(wx * ax, wy * ay);
    }
    store_matrices(at, gate[0], gate[1], gate[2], gate[3]);
    store_matrices(at + A_BYTES, up[0], up[1], up[2], up[3]);
    if (stores_h) store_matrices(at + 2 * A_BYTES, h[0], h[1], h[2], h[3]);
  }
}

#endif
