/* hopper_rows.cuh: more of hopper.cuh: wgmma with A in registers, small accesses by shared address.
 */
#pragma once

#include "hopper.cuh"

#if NN_HOPPER

/* ---- wgmma with A in registers -------------------------------------------------------------------------------- */

/* d += a b for 64 rows, 64 columns and 16 depths. TB: 1 where b is N-major. */
template <int TB>
__device__ __forceinline__ void wgmma_rows(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NN_PLACES_0 "}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
      : NN_ACCUMULATORS(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TB));
}

/* Keeps the compiler from moving what makes these registers past the wgmma that reads or writes them. */
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void settle(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+r"(a[i][e])::"memory");
}

__device__ __forceinline__ void clear_16(uint32_t shared) { asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(shared), "r"(0) : "memory"); }
__device__ __forceinline__ void load_two(float (&x)[2], uint32_t shared) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(shared));
}
/* A barrier of the 128 threads of one warpgroup; `number` is not 0, which is __syncthreads'. */
__device__ __forceinline__ void group_barrier(int number) { asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory"); }

#endif
