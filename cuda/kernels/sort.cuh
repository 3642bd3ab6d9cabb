/* sort.cuh: one pass of a stable counting sort on the device, for at most 256 bins: what moe.cu sorts slots by expert with and
 * loss.cu's embedding gradient sorts tokens by id with. Every rank is counted, none is taken with an atomic, so the order is fixed.
 */
#pragma once

#include "common.cuh"

const int SORT_BLOCK = 1024; /* keys of one block, one a thread */
const int SORT_BINS = 256;

/* Sum of x over this lane and those below it. */
__device__ __forceinline__ int warp_scan(int x) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int s = 1; s < 32; s <<= 1) {
    int other = __shfl_up_sync(0xffffffffu, x, s);
    if (lane >= s) x += other;
  }
  return x;
}

/* Rank of this thread's bin among the block's equal bins before it, and (for thread b < bins) the block's count of bin b in
 * `total[b]`. All 1024 threads call it; bin < 0 takes no part. `counts` is shared memory of 32 * bins. */
__device__ __forceinline__ int block_rank(int bin, int bins, uint16_t *counts, int *total) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int i = threadIdx.x; i < 32 * bins; i += SORT_BLOCK) counts[i] = 0;
  __syncthreads();
  unsigned peers = __match_any_sync(0xffffffffu, bin);
  int rank = __popc(peers & ((1u << lane) - 1));
  if (bin >= 0 && rank == 0) counts[warp * bins + bin] = (uint16_t)__popc(peers);
  __syncthreads();
  for (int b = warp; b < bins; b += 32) { /* lane: the warp that counted */
    int count = counts[lane * bins + b], inclusive = warp_scan(count);
    counts[lane * bins + b] = (uint16_t)(inclusive - count);
    if (lane == 31) total[b] = inclusive;
  }
  __syncthreads();
  return bin >= 0 ? rank + counts[warp * bins + bin] : 0;
}

/* histogram [blocks, bins] -> the place of each block's first key of each bin; starts [bins + 1] (NULL: not wanted). One block. */
static __global__ void __launch_bounds__(1024) sort_scan_kernel(int32_t *histogram, int32_t *starts, int blocks, int bins) {
  __shared__ int sums[SORT_BINS];
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int b = warp; b < bins; b += 32) {
    int running = 0;
    for (int base = 0; base < blocks; base += 32) {
      int i = base + lane, count = i < blocks ? histogram[(int64_t)i * bins + b] : 0, inclusive = warp_scan(count);
      if (i < blocks) histogram[(int64_t)i * bins + b] = running + inclusive - count;
      running += __shfl_sync(0xffffffffu, inclusive, 31);
    }
    if (lane == 0) sums[b] = running;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int running = 0;
    for (int b = 0; b < bins; b++) {
      int count = sums[b];
      sums[b] = running;
      if (starts) starts[b] = running;
      running += count;
    }
    if (starts) starts[bins] = running;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < (int64_t)blocks * bins; i += blockDim.x) histogram[i] += sums[i % bins];
}
