/* hopper.cuh: the sm_90a instructions that the Hopper kernels are made of: mbarriers, tensor copies (TMA), wgmma and its descriptors,
 * register hand-over. See the PTX ISA, "Asynchronous warpgroup level matrix instructions" and "Data movement and conversion".
 *
 * Operands lie in shared memory in blocks of 128-byte rows, 1024-byte aligned, swizzled as SWIZZLE_128B (16-byte chunk ^= row & 7):
 * K-major as one block of rows by 64 depths, M- or N-major as blocks of 64 depths (rows) by 64 elements, 8192 bytes apart.
 */
#pragma once

#include <cuda.h>

#include "mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NN_HOPPER 1
#else
#define NN_HOPPER 0
#endif

/* ---- host: tensor maps --------------------------------------------------------------------------------------- */

/* Describes `groups` row-major bf16 matrices [rows, columns] to the copy engine, for boxes of box_rows by 64 columns, swizzled by 128
 * bytes; what lies outside reads as 0. False where the driver or the engine cannot. */
bool nn_tensor_map(CUtensorMap *map, const void *matrix, int64_t columns, int64_t rows, int64_t groups, int64_t row_stride,
                   int64_t group_stride, int box_rows);
/* The same of float32 matrices and boxes of 32 columns, 128 bytes as well. */
bool nn_tensor_map_f32(CUtensorMap *map, const void *matrix, int64_t columns, int64_t rows, int64_t groups, int64_t row_stride,
                       int64_t group_stride, int box_rows);
/* One float32 matrix [rows, columns], for boxes of one row by box_columns, as they are. */
bool nn_tensor_map_rows(CUtensorMap *map, const float *matrix, int64_t columns, int64_t rows, int box_columns);

#if NN_HOPPER

/* ---- barriers ------------------------------------------------------------------------------------------------ */

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
/* Makes this thread's ordinary writes to shared memory visible to wgmma and the copy engine. */
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l%8 of matrix l/8. */
__device__ __forceinline__ void store_matrices(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

/* ---- copies -------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void tensor_copy(uint32_t shared, const CUtensorMap *map, uint32_t barrier, int column, int row, int group) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(group)
      : "memory");
}
/* A box of shared memory to memory; what lies outside is left out. Part of the thread's open group of copies. */
__device__ __forceinline__ void tensor_store(const CUtensorMap *map, uint32_t shared, int column, int row, int group) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(shared), "r"(column), "r"(row),
               "r"(group)
               : "memory");
}
/* The same, but float32 is added to what is there, where the memory is: in a fixed order if no one else writes there. Subnormal sums become 0. */
__device__ __forceinline__ void tensor_add(const CUtensorMap *map, uint32_t shared, int column, int row, int group) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(shared), "r"(column),
               "r"(row), "r"(group)
               : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Until all but the newest N groups of the thread have read their shared memory. */
template <int N>
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }

/* ---- registers ----------------------------------------------------------------------------------------------- */

template <int N>
__device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

/* ---- wgmma --------------------------------------------------------------------------------------------------- */

/* Descriptor of an operand at a shared address. K-major: groups of 8 rows lie 1024 bytes apart. M- or N-major: groups of 8 depths lie
 * 1024 bytes apart, blocks of 64 elements `block_bytes`. */
__device__ __forceinline__ uint64_t operand(uint32_t shared, uint32_t block_bytes = 16) {
  return (uint64_t)((shared & 0x3ffff) >> 4) | (uint64_t)(block_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
/* Of an accumulator's registers, 32 at a time: the places in an instruction's text, and the operands. */
#define NN_PLACES_0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NN_PLACES_32 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NN_PLACES_64 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NN_PLACES_96 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define NN_ACCUMULATORS_8(d, i) \
  "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), "+f"(d[(i) + 5]), "+f"(d[(i) + 6]), "+f"(d[(i) + 7])
#define NN_ACCUMULATORS(d, i) NN_ACCUMULATORS_8(d, i), NN_ACCUMULATORS_8(d, (i) + 8), NN_ACCUMULATORS_8(d, (i) + 16), NN_ACCUMULATORS_8(d, (i) + 24)

/* d (+)= a b for 64 rows by 2 * (registers of d) columns and 16 depths. TA, TB: 1 where the operand is M- or N-major. Of each 8 columns a
 * lane has columns 2*(lane%4) and the next, rows lane/4 (of its warp's 16) in d[4j], d[4j+1] and lane/4 + 8 in d[4j+2], d[4j+3]. */
template <int TA, int TB>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      NN_PLACES_0 ", " NN_PLACES_32 ", " NN_PLACES_64 ", " NN_PLACES_96 "}, "
      "%128, %129, p, 1, 1, %131, %132;\n}\n"
      : NN_ACCUMULATORS(d, 0), NN_ACCUMULATORS(d, 32), NN_ACCUMULATORS(d, 64), NN_ACCUMULATORS(d, 96)
      : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));
}
template <int TA, int TB>
__device__ __forceinline__ void wgmma(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\nwgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      NN_PLACES_0 ", " NN_PLACES_32 ", " NN_PLACES_64 "}, "
      "%96, %97, p, 1, 1, %99, %100;\n}\n"
      : NN_ACCUMULATORS(d, 0), NN_ACCUMULATORS(d, 32), NN_ACCUMULATORS(d, 64)
      : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));
}
template <int TA, int TB>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      NN_PLACES_0 ", " NN_PLACES_32 "}, "
      "%64, %65, p, 1, 1, %67, %68;\n}\n"
      : NN_ACCUMULATORS(d, 0), NN_ACCUMULATORS(d, 32)
      : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));
}

#endif
