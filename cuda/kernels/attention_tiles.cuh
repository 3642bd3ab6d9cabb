/* attention_tiles.cuh: tiles and fragments of the mma.sync attention kernels (attention_mma.cu, attention_decode.cu). A tile lies in
 * shared memory in rows of D + 8 elements, so that eight rows of 16 bytes never share a bank. What comes out of one product is,
 * in registers, the A fragment of the next.
 */
#pragma once

#include "attention.cuh"
#include "mma.cuh"

static const float LOG2_E = 1.44269504088896340736f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* Copies ROWS rows of D elements to a tile, by THREADS threads of which this is number `thread`; rows from `there` on become zeros. */
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(bf16 *tile, const bf16 *from, int64_t stride, int64_t there, int thread = threadIdx.x) {
  const int CHUNKS = D / 8;
#pragma unroll
  for (int i = 0; i < (ROWS * CHUNKS + THREADS - 1) / THREADS; i++) {
    int e = i * THREADS + thread, row = e / CHUNKS, chunk = e % CHUNKS;
    if (ROWS * CHUNKS % THREADS == 0 || e < ROWS * CHUNKS)
      cp_async16(shared_address(tile + row * (D + 8) + chunk * 8), from + (row < there ? row * stride : 0) + chunk * 8, row < there);
  }
}

/* A fragment: rows row0 .. +15, elements column0 .. +15 of a tile. */
template <int D>
__device__ __forceinline__ void load_a(uint32_t (&f)[4], const bf16 *tile, int row0, int column0) {
  int lane = threadIdx.x & 31;
  ldmatrix4(f, shared_address(tile + (row0 + (lane & 15)) * (D + 8) + column0 + (lane >> 4) * 8));
}
/* Two B fragments for n = row0 .. +7 and row0 + 8 .. +15 of a tile stored [n][k]. */
template <int D>
__device__ __forceinline__ void load_b(uint32_t (&f)[4], const bf16 *tile, int row0, int column0) {
  int lane = threadIdx.x & 31;
  ldmatrix4(f, shared_address(tile + (row0 + (lane & 7) + (lane >> 4) * 8) * (D + 8) + column0 + (lane >> 3 & 1) * 8));
}
/* Two B fragments for n = column0 .. +7 and column0 + 8 .. +15 of a tile stored [k][n]. */
template <int D>
__device__ __forceinline__ void load_b_transposed(uint32_t (&f)[4], const bf16 *tile, int row0, int column0) {
  int lane = threadIdx.x & 31;
  ldmatrix4_transposed(f, shared_address(tile + (row0 + (lane & 15)) * (D + 8) + column0 + (lane >> 4) * 8));
}
__device__ __forceinline__ void mma_pair(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
  mma16816(d0, a, b0);
  mma16816(d1, a, b1);
}
/* Columns 16*t .. +15 of an accumulator, as an A fragment. */
template <int N>
__device__ __forceinline__ void accumulator_as_a(uint32_t (&f)[4], const float (&acc)[N][4], int t) {
  f[0] = pack_bf16(acc[2 * t][0], acc[2 * t][1]);
  f[1] = pack_bf16(acc[2 * t][2], acc[2 * t][3]);
  f[2] = pack_bf16(acc[2 * t + 1][0], acc[2 * t + 1][1]);
  f[3] = pack_bf16(acc[2 * t + 1][2], acc[2 * t + 1][3]);
}
