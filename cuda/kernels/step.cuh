/* step.cuh: what the kernels of one decoding step share (step_attention.cu, step_moe.cu): few rows, normalised into shared memory, times
 * weights that a lane holds or a warp queues. bf16 only. A lane's 16 bytes of a row of B and of a row of A are two fragments of mma.sync whose
 * places in depth are permuted alike, as in product_small.cu.
 */
#pragma once

#include "chain.cuh"
#include "mma.cuh"

const int ROW_CHUNKS = 4; /* 16-byte pieces of a row in a lane's registers: rows of up to 1024 elements, one row a warp */

/* Whether a block may have so many bytes of shared memory, beside a few that the compiler lays out. */
static inline bool shared_memory_fits(nn_context *context, int64_t bytes) {
  int most = 0;
  return cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, context->device) == cudaSuccess && bytes + 4096 <= most;
}

/* Elements from one row in shared memory to the next: 8 lanes that read 4 neighbouring pieces of 2 neighbouring rows meet no bank twice
 * (row lengths are multiples of 64). */
__host__ __device__ __forceinline__ int row_pitch(int columns) { return columns + 32; }

__device__ __forceinline__ uint4 load_weights(const bf16 *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

/* A row of weights across a warp: piece c of lane l is elements (32 c + l) * 8. */
__device__ __forceinline__ void load_row(uint4 (&row)[ROW_CHUNKS], const bf16 *from, int columns) {
#pragma unroll
  for (int c = 0; c < ROW_CHUNKS; c++) {
    int i = (c * 32 + (threadIdx.x & 31)) * 8;
    row[c] = i < columns ? load_weights(from + i) : make_uint4(0, 0, 0, 0);
  }
}

/* The same row, parked in 2 KB of shared memory instead: each lane gets back (parked) what it has copied itself. */
__device__ __forceinline__ void park_row(uint32_t shared, const bf16 *from, int columns) {
#pragma unroll
  for (int c = 0; c < ROW_CHUNKS; c++) {
    int i = (c * 32 + (threadIdx.x & 31)) * 8;
    cp_async16(shared + (c * 32 + (threadIdx.x & 31)) * 16, from + (i < columns ? i : 0), i < columns);
  }
}
__device__ __forceinline__ uint4 load_shared16(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared) : "memory");
  return v;
}
/* Zeros where not `inside`. */
__device__ __forceinline__ uint4 load_shared16(uint32_t shared, bool inside) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "r"(shared), "r"((int)inside)
      : "memory");
  return v;
}
__device__ __forceinline__ uint4 parked(uint32_t shared, int c) { return load_shared16(shared + (c * 32 + (threadIdx.x & 31)) * 16); }

/* rows [count, pitch] in shared memory = rmsnorm of x [count, H], rounded; a warp a row. weight(c): this lane's piece c of the norm's
 * weights. The caller synchronises. */
template <int WARPS, typename Weight>
__device__ __forceinline__ void norm_rows(bf16 *rows, const bf16 *x, Weight weight, int count, int H, float epsilon) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int row = threadIdx.x >> 5; row < count; row += WARPS) {
    uint4 v[ROW_CHUNKS];
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < ROW_CHUNKS; c++) {
      int i = (c * 32 + lane) * 8;
      v[c] = i < H ? load_shared_result(x + (int64_t)row * H + i) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int c = 0; c < ROW_CHUNKS; c++) {
      const uint32_t pairs[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float2 two = unpack_bf16(pairs[j]);
        squares += two.x * two.x;
        squares += two.y * two.y;
      }
    }
    const float r = 1.0f / sqrtf(warp_sum(squares) / (float)H + epsilon);
#pragma unroll
    for (int c = 0; c < ROW_CHUNKS; c++) {
      int i = (c * 32 + lane) * 8;
      const uint4 w4 = weight(c);
      uint32_t pairs[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
      const uint32_t factors[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float2 two = unpack_bf16(pairs[j]), w = unpack_bf16(factors[j]);
        pairs[j] = pack_bf16(two.x * r * w.x, two.y * r * w.y);
      }
      if (i < H) *(uint4 *)(rows + row * row_pitch(H) + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

/* Two mma of 16 rows by 8 columns over 32 depths: low, high: 16 bytes of rows g and g + 8, b of column g. */
__device__ __forceinline__ void multiply(float (&c)[4], const uint4 &low, const uint4 &high, const uint4 &b) {
  const uint32_t a0[4] = {low.x, high.x, low.y, high.y}, a1[4] = {low.z, high.z, low.w, high.w}, b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
  mma16816(c, a0, b0);
  mma16816(c, a1, b1);
}

/* ---- a block's product: 8 warps share the depth of 8 columns --------------------------------------------------- */

const int COLUMN_WARPS = 8, COLUMN_THREADS = 256;

/* This warp's depths, in steps of 32. */
struct DepthShare {
  int first, last;
  __device__ __forceinline__ explicit DepthShare(int depth) {
    const int steps = (depth + 31) / 32, each = (steps + COLUMN_WARPS - 1) / COLUMN_WARPS;
    first = (threadIdx.x >> 5) * each, last = min(first + each, steps);
  }
};

/* b: this lane's column (K-major), already at its 16 bytes of step 0. */
__device__ __forceinline__ void load_columns(uint4 (&weights)[ROW_CHUNKS], const bf16 *b, const DepthShare &share) {
#pragma unroll
  for (int u = 0; u < ROW_CHUNKS; u++) weights[u] = share.first + u < share.last ? load_weights(b + (share.first + u) * 32) : make_uint4(0, 0, 0, 0);
}

/* sums [warp][row][column] = the warp's share of rows [count, pitch] times the columns. */
template <int MT>
__device__ __forceinline__ void multiply_rows(float (*sums)[MT * 16][8], const bf16 *rows, int pitch, int count, const uint4 (&weights)[ROW_CHUNKS],
                                              const DepthShare &share) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < MT; m++) {
    if (m * 16 >= count) break;
    const bool has_low = m * 16 + g < count, has_high = m * 16 + 8 + g < count;
    const uint32_t low = shared_address(rows) + ((m * 16 + g) * pitch + t * 8) * 2, high = low + 16 * pitch;
    float c[4] = {};
#pragma unroll
    for (int u = 0; u < ROW_CHUNKS; u++)
      if (share.first + u < share.last) {
        const int d = (share.first + u) * 64;
        multiply(c, load_shared16(low + d, has_low), load_shared16(high + d, has_high), weights[u]);
      }
    *(float2 *)&sums[warp][m * 16 + g][t * 2] = make_float2(c[0], c[1]);
    *(float2 *)&sums[warp][m * 16 + 8 + g][t * 2] = make_float2(c[2], c[3]);
  }
}

/* The warps' shares of one element, in their order. */
template <int MT>
__device__ __forceinline__ float add_shares(float (*sums)[MT * 16][8], int row, int column) {
  float sum = sums[0][row][column];
#pragma unroll
  for (int w = 1; w < COLUMN_WARPS; w++) sum += sums[w][row][column];
  return sum;
}

/* ---- a warp's queue of weights in shared memory ---------------------------------------------------------------- */

/* A warp reads 8 rows of weights (K-major, `stride` apart), 64 depths a stage (1024 bytes), STAGES - 1 of them ahead. Chunk c of row r lies
 * at place c ^ 4 (r & 1), so that neither the copies nor the reads of fragments meet a bank twice. */
__device__ __forceinline__ void queue16(uint32_t shared, const void *global, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(inside ? 16 : 0) : "memory");
}
/* Where this lane copies its chunk (lane & 7) of row lane >> 3 to; row + 4 lies 512 bytes on. */
__device__ __forceinline__ uint32_t queue_put(uint32_t stage) {
  const int lane = threadIdx.x & 31, row = lane >> 3;
  return stage + row * 128 + (((lane & 7) ^ ((row & 1) << 2)) << 4);
}
/* This lane's 16 bytes of row g for depths 32 * half .. +31 of the stage. */
__device__ __forceinline__ uint4 queue_get(uint32_t stage, int half) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  return load_shared16(stage + g * 128 + (((t + half * 4) ^ ((g & 1) << 2)) << 4));
}
