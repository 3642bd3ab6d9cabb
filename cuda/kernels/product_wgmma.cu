/* product_wgmma.cu: the bf16 core for Hopper: wgmma fed by the copy engine. Many gathered rows are packed in the workspace first
 * (feeding them by cp.async costs a fifth of the speed); few are gathered by cp.async. Persistent blocks of three warpgroups: one
 * loads, two multiply, each 64 rows of a tile of 128 rows by BN columns. While the multipliers finish a tile, the loader is already
 * stages ahead in the next.
 *
 *   loader    wait empty[s] -> copy A and B of 64 depths into stage s -> full[s]
 *   multiplier    wait full[s] -> 4 x wgmma -> (one step later, when they are done) empty[s]
 *
 * Gathered rows are copied by the loader's 128 threads; each waits for its own copies a few steps later, makes them visible to the
 * tensor cores and then arrives at full[s]. fast.cu (pranjalssh) and CUTLASS's warp-specialised kernels are the models.
 */
#include <cuda.h>

#include "hopper.cuh"
#include "product.cuh"

const int BM = 128, BK = 64, A_BYTES = BM * BK * 2, THREADS = 384;
const int PITCH = 144; /* bytes of a row of 64 bf16 in a warp's staging memory, padded against bank conflicts */
const int STAGING_BYTES = 8 * 16 * PITCH;
const int64_t PACK_ROWS = 2048; /* from so many gathered rows on they are packed before the product */

enum Gather { GATHER_NONE, GATHER_A, GATHER_B };

constexpr int shared_bytes(int bn, int stages) { return 1024 + stages * (A_BYTES + bn * BK * 2) + STAGING_BYTES; }

/* ---- kernel: the loader -------------------------------------------------------------------------------------- */

#if NN_HOPPER

/* Copies one operand of a stage through the copy engine, by one thread. */
template <bool MN, int WIDTH>
__device__ __forceinline__ void copy_operand(uint32_t shared, const CUtensorMap *map, uint32_t barrier, int first, int second, int k, int group) {
  if (MN) {
#pragma unroll
    for (int block = 0; block < WIDTH / 64; block++) tensor_copy(shared + block * 8192, map, barrier, first + block * 64, k, group);
  } else {
    tensor_copy(shared, map, barrier, k, first, group);
    if (second >= 0) tensor_copy(shared + WIDTH / 2 * 128, map, barrier, k, second, group);
  }
}

/* One thread's share of a gathered operand: a 16-byte chunk of each of several rows. */
template <bool MN, int WIDTH>
struct Gatherer {
  const bf16 *matrix;
  const int32_t *rows;
  int64_t stride;
  int stored[MN ? 4 : WIDTH / 16]; /* rows of this step (MN-major) or of the tile (K-major); -1: zeros */
  int first, limit, row;
  uint32_t offset;

  __device__ __forceinline__ void start(const void *from, const int32_t *gather, int64_t ld) {
    matrix = (const bf16 *)from + (threadIdx.x & 7) * 8, rows = gather, stride = ld;
    row = threadIdx.x >> 3;
    offset = row * 128 + (((threadIdx.x & 7) ^ (row & 7)) << 4);
  }
  /* K-major: [first, limit) are rows; MN-major: columns. */
  __device__ __forceinline__ void tile(int64_t from, int64_t to, int64_t k0, int64_t k_end) {
    first = (int)from, limit = (int)to;
    if (MN) {
      look_up(k0, k_end);
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH / 16; i++) stored[i] = from + row + 16 * i < to ? rows[from + row + 16 * i] : -1;
    }
  }
  __device__ __forceinline__ void look_up(int64_t k, int64_t k_end) {
#pragma unroll
    for (int i = 0; i < (MN ? 4 : 1); i++) stored[i] = k + row + 16 * i < k_end ? rows[k + row + 16 * i] : -1;
  }
  __device__ __forceinline__ void copy(uint32_t shared, int64_t k, int64_t k_end) {
    if (MN) {
      const int column = (threadIdx.x & 7) * 8;
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int block = 0; block < WIDTH / 64; block++) {
          bool inside = stored[i] >= 0 && first + block * 64 + column < limit;
          cp_async16(shared + offset + block * 8192 + i * 2048, matrix + (inside ? stored[i] * stride + first + block * 64 : 0), inside);
        }
      look_up(k + BK, k_end);
    } else {
      bool there = k + (threadIdx.x & 7) * 8 < k_end;
#pragma unroll
      for (int i = 0; i < WIDTH / 16; i++) {
        bool inside = stored[i] >= 0 && there;
        cp_async16(shared + offset + i * 2048, matrix + (inside ? stored[i] * stride + k : 0), inside);
      }
    }
  }
};

/* ---- kernel: epilogues --------------------------------------------------------------------------------------- */

/* 16 rows by 64 columns of bf16 pairs leave a warp's registers: through its staging memory, so that rows go out in 16-byte pieces.
 * value(j, half): the packed pair of columns 8*j + 2*(lane%4) of row lane/4 + 8*half. */
template <typename Value>
__device__ __forceinline__ void store_rows(unsigned char *staging, bf16 *out, int64_t ld, int rows, int columns, Value value) {
  const int lane = threadIdx.x & 31;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      *reinterpret_cast<uint32_t *>(staging + ((lane >> 2) + half * 8) * PITCH + j * 16 + (lane & 3) * 4) = value(j, half);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = i * 4 + (lane >> 3), column = (lane & 7) * 8;
    if (row < rows && column < columns)
      *reinterpret_cast<uint4 *>(out + row * ld + column) = *reinterpret_cast<const uint4 *>(staging + row * PITCH + column * 2);
  }
}

/* Writes a warp's 16 rows (from row0 of C) of the tile. */
template <int BN, int EPILOGUE>
__device__ __forceinline__ void finish(const Product &p, const Tile &tile, float (&d)[BN / 2], unsigned char *staging, int64_t row0) {
  const int lane = threadIdx.x & 31;
  const int rows = (int)max((int64_t)0, min((int64_t)16, tile.m_end - row0));
  if (EPILOGUE == STORE) {
    if (p.out_dtype == NN_BF16) {
      bf16 *out = (bf16 *)p.c + tile.group * p.c_stride + row0 * p.ldc + tile.n0;
#pragma unroll
      for (int part = 0; part < BN / 64; part++)
        store_rows(staging, out + part * 64, p.ldc, rows, (int)p.n - tile.n0 - part * 64, [&](int j, int half) {
          const int at = part * 32 + j * 4 + half * 2;
          return pack_bf16(p.alpha * d[at], p.alpha * d[at + 1]);
        });
    } else {
      float *out = (float *)p.c + tile.group * p.c_stride + (row0 + (lane >> 2)) * p.ldc + tile.n0 + (lane & 3) * 2;
      const int left = (int)p.n - tile.n0 - (lane & 3) * 2; /* n is even here */
#pragma unroll
      for (int part = 0; part < BN / 64; part++) {
        float2 old[16];
        if (p.beta != 0.0f) {
#pragma unroll
          for (int j = 0; j < 16; j++) {
            const int column = part * 64 + (j >> 1) * 8, half = j & 1;
            if ((lane >> 2) + half * 8 < rows && column < left) old[j] = *reinterpret_cast<const float2 *>(out + half * 8 * p.ldc + column);
          }
        }
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const int column = part * 64 + (j >> 1) * 8, half = j & 1;
          float2 value = make_float2(p.alpha * d[part * 32 + (j >> 1) * 4 + half * 2], p.alpha * d[part * 32 + (j >> 1) * 4 + half * 2 + 1]);
          if (p.beta != 0.0f) value.x += p.beta * old[j].x, value.y += p.beta * old[j].y;
          if ((lane >> 2) + half * 8 < rows && column < left) *reinterpret_cast<float2 *>(out + half * 8 * p.ldc + column) = value;
        }
      }
    }
  } else {
    const int left = (int)p.n - tile.n0;
#pragma unroll
    for (int part = 0; part < BN / 128; part++) {
      const int gate = part * 32, up = BN / 4 + part * 32, columns = left - part * 64;
      if (p.c) {
        bf16 *out = (bf16 *)p.c + row0 * 2 * p.n + tile.n0 + part * 64;
        store_rows(staging, out, 2 * p.n, rows, columns,
                   [&](int j, int half) { return pack_bf16(d[gate + j * 4 + half * 2], d[gate + j * 4 + half * 2 + 1]); });
        store_rows(staging, out + p.n, 2 * p.n, rows, columns,
                   [&](int j, int half) { return pack_bf16(d[up + j * 4 + half * 2], d[up + j * 4 + half * 2 + 1]); });
      }
      store_rows(staging, (bf16 *)p.h_out + row0 * p.n + tile.n0 + part * 64, p.n, rows, columns, [&](int j, int half) {
        const int g = gate + j * 4 + half * 2, u = up + j * 4 + half * 2;
        return pack_bf16(swiglu<bf16>(rounded<bf16>(d[g]), rounded<bf16>(d[u])), swiglu<bf16>(rounded<bf16>(d[g + 1]), rounded<bf16>(d[u + 1])));
      });
    }
  }
}

/* find_tile for rising numbers: goes on from the group of the tile before. */
template <int BM, int BN>
struct Walk {
  int group = -1, past = 0, tiles = 0, first = 0, last = 0;
  __device__ __forceinline__ bool find(const Product &p, int64_t index, Tile &tile) {
    if (p.grouping != GROUP_ROWS) return find_tile<BM, BN>(p, index, tile);
    const int n_tiles = (int)((p.n + BN - 1) / BN);
    while ((int)index - past >= tiles) {
      if (++group >= p.groups) return false;
      first = p.offsets[group], last = p.offsets[group + 1];
      past += tiles, tiles = (last - first + BM - 1) / BM * n_tiles;
    }
    const int at = (int)index - past, m_tiles = tiles / n_tiles;
    const int slow = at / (p.m_fastest ? m_tiles : n_tiles), fast = at - slow * (p.m_fastest ? m_tiles : n_tiles);
    tile.group = group, tile.k0 = 0, tile.k_end = p.k, tile.m_end = last;
    tile.m0 = first + (int64_t)(p.m_fastest ? fast : slow) * BM, tile.n0 = (p.m_fastest ? slow : fast) * BN;
    return true;
  }
};

#endif /* NN_HOPPER */

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* Where a group's rows begin in a packed operand of GROUP_DEPTH: whole steps, so that zeros mask the depths of the next group. */
__device__ __forceinline__ int packed_start(const int32_t *offsets, int group) { return (offsets[group] + BK - 1) / BK * BK + BK * group; }

/* packed [count, width] = the gathered rows in their order, a warp each; with offsets, group by group from packed_start, zeros between. */
__global__ void __launch_bounds__(256)
    pack_kernel(bf16 *packed, const bf16 *matrix, const int32_t *rows, const int32_t *offsets, int groups, int64_t count, int width, int64_t stride) {
  const int64_t row = (int64_t)blockIdx.x * 8 + (threadIdx.x >> 5);
  if (row >= count) return;
  int64_t from = row;
  if (offsets) {
    int g = 0;
    while (g + 1 < groups && row >= packed_start(offsets, g + 1)) g++;
    from = offsets[g] + row - packed_start(offsets, g);
    if (from >= offsets[g + 1]) from = -1;
  }
  const int64_t source = from >= 0 ? (int64_t)rows[from] * stride : 0;
  for (int column = (threadIdx.x & 31) * 8; column < width; column += 256)
    *reinterpret_cast<uint4 *>(packed + row * width + column) =
        from >= 0 ? *reinterpret_cast<const uint4 *>(matrix + source + column) : make_uint4(0, 0, 0, 0);
}

template <int BN, int STAGES, bool AMN, bool BMN, int GATHER, int EPILOGUE>
__global__ void __launch_bounds__(THREADS, 1)
    wgmma_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, int packed,
                 const __grid_constant__ Product p) {
#if NN_HOPPER
  constexpr int B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES, COLUMNS = EPILOGUE == SWIGLU ? BN / 2 : BN;
  extern __shared__ unsigned char memory[];
  __shared__ __align__(8) uint64_t barriers[2 * STAGES];
  unsigned char *aligned = (unsigned char *)(((uintptr_t)memory + 1023) & ~(uintptr_t)1023);
  const uint32_t shared = shared_address(aligned), full = shared_address(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, GATHER == GATHER_NONE ? 1 : 129);
      barrier_init(empty + 8 * s, 8);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int group = threadIdx.x >> 7;
  Tile tile;
  Walk<BM, COLUMNS> walk;
  if (group == 0) {
    registers_down<40>();
    if (GATHER == GATHER_NONE && threadIdx.x != 0) return;
    constexpr int LAG = STAGES - 2;
    constexpr uint32_t COPIED = (GATHER == GATHER_A ? 0 : A_BYTES) + (GATHER == GATHER_B ? 0 : B_BYTES);
    Gatherer<GATHER == GATHER_B ? BMN : AMN, GATHER == GATHER_B ? BN : BM> gatherer;
    if (GATHER == GATHER_A) gatherer.start(p.a, p.a_rows, p.lda);
    if (GATHER == GATHER_B) gatherer.start(p.b, p.b_rows, p.ldb);
    int stage = 0, late = 0, steps = 0;
    uint32_t phase = 1;
    for (int64_t index = blockIdx.x; walk.find(p, index, tile); index += gridDim.x) {
      const int group_a = p.grouping == WHOLE ? tile.group : 0, group_b = p.grouping == WHOLE || p.grouping == GROUP_ROWS ? tile.group : 0;
      if (GATHER == GATHER_A) gatherer.tile(tile.m0, tile.m_end, tile.k0, tile.k_end);
      if (GATHER == GATHER_B) gatherer.tile(tile.n0, p.n, tile.k0, tile.k_end);
      const int shift = packed ? packed_start(p.offsets, tile.group) - (int)tile.k0 : 0;
      const int shift_a = packed == GATHER_A ? shift : 0, shift_b = packed == GATHER_B ? shift : 0;
      for (int64_t k = tile.k0; k < tile.k_end; k += BK) {
        const uint32_t stage_a = shared + stage * STAGE_BYTES, stage_b = stage_a + A_BYTES;
        barrier_wait(empty + 8 * stage, phase);
        if (threadIdx.x == 0) {
          barrier_expect(full + 8 * stage, COPIED);
          if (GATHER != GATHER_A) copy_operand<AMN, BM>(stage_a, &map_a, full + 8 * stage, (int)tile.m0, -1, (int)k + shift_a, group_a);
          if (GATHER != GATHER_B)
            copy_operand<BMN, BN>(stage_b, &map_b, full + 8 * stage, tile.n0, EPILOGUE == SWIGLU ? (int)p.n + tile.n0 : -1,
                                  (int)k + shift_b, group_b);
        }
        if (GATHER != GATHER_NONE) {
          gatherer.copy(GATHER == GATHER_A ? stage_a : stage_b, k, tile.k_end);
          cp_async_commit();
          if (steps >= LAG) {
            cp_async_wait<LAG>();
            fence_async_shared();
            barrier_arrive(full + 8 * late);
            late = late + 1 == STAGES ? 0 : late + 1;
          }
          steps++;
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    if (GATHER != GATHER_NONE) {
      cp_async_wait<0>();
      fence_async_shared();
      for (int left = min(steps, LAG); left > 0; left--) {
        barrier_arrive(full + 8 * late);
        late = late + 1 == STAGES ? 0 : late + 1;
      }
    }
  } else {
    registers_up<232>();
    const int half = group - 1, warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
    unsigned char *staging = aligned + STAGES * STAGE_BYTES + (half * 4 + warp) * 16 * PITCH;
    int stage = 0;
    uint32_t phase = 0;
    float d[BN / 2];
    for (int64_t index = blockIdx.x; walk.find(p, index, tile); index += gridDim.x) {
      if (tile.k0 >= tile.k_end && p.grouping == GROUP_DEPTH && p.beta == 1.0f) continue;
      int before = -1;
      for (int64_t k = tile.k0; k < tile.k_end; k += BK) {
        const uint32_t stage_a = shared + stage * STAGE_BYTES + half * 8192, stage_b = shared + stage * STAGE_BYTES + A_BYTES;
        barrier_wait(full + 8 * stage, phase);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < BK / 16; i++)
          wgmma<AMN, BMN>(d, AMN ? operand(stage_a + i * 2048, 8192) : operand(stage_a + i * 32),
                          BMN ? operand(stage_b + i * 2048, 8192) : operand(stage_b + i * 32), i > 0 || k > tile.k0);
        wgmma_commit();
        if (before >= 0) {
          wgmma_wait<1>();
          if (lane == 0) barrier_arrive(empty + 8 * before);
        }
        before = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      wgmma_wait<0>();
      if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
      if (before < 0) {
#pragma unroll
        for (int i = 0; i < BN / 2; i++) d[i] = 0.0f;
      }
      finish<BN, EPILOGUE>(p, tile, d, staging, tile.m0 + half * 64 + warp * 16);
    }
  }
#endif
}

/* ---- launcher ------------------------------------------------------------------------------------------------ */

bool nn_tensor_map(CUtensorMap *map, const void *matrix, int64_t columns, int64_t rows, int64_t groups, int64_t row_stride,
                   int64_t group_stride, int box_rows) {
  typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                             const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                             CUtensorMapFloatOOBfill);
  static Encode encode = NULL;
  if (encode == NULL) {
    void *entry = NULL;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      return false;
    encode = (Encode)entry;
  }
  if (groups <= 1) groups = 1, group_stride = rows * row_stride;
  cuuint64_t sizes[3] = {(cuuint64_t)columns, (cuuint64_t)rows, (cuuint64_t)groups};
  cuuint64_t strides[2] = {(cuuint64_t)row_stride * 2, (cuuint64_t)group_stride * 2};
  cuuint32_t box[3] = {64, (cuuint32_t)box_rows, 1}, steps[3] = {1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)matrix, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int BN, int STAGES, bool AMN, bool BMN, int GATHER, int EPILOGUE>
static nn_status launch(nn_context *context, Product &p, int packed) {
  CUtensorMap map_a = {}, map_b = {};
  const bool batch = p.grouping == WHOLE && p.groups > 1, weights = batch || p.grouping == GROUP_ROWS;
  if (GATHER != GATHER_A && !nn_tensor_map(&map_a, p.a, AMN ? p.m : p.k, packed == GATHER_A ? p.a_row_count : AMN ? p.k : p.m, batch ? p.groups : 1, p.lda, p.a_stride, AMN ? 64 : BM))
    return NN_ERROR_UNSUPPORTED;
  const int64_t n = EPILOGUE == SWIGLU ? 2 * p.n : p.n;
  if (GATHER != GATHER_B && !nn_tensor_map(&map_b, p.b, BMN ? n : p.k, packed == GATHER_B ? p.b_row_count : BMN ? p.k : n, weights ? p.groups : 1, p.ldb, p.b_stride,
                                           BMN ? 64 : EPILOGUE == SWIGLU ? BN / 2 : BN))
    return NN_ERROR_UNSUPPORTED;
  const int bytes = shared_bytes(BN, STAGES);
  auto kernel = wgmma_kernel<BN, STAGES, AMN, BMN, GATHER, EPILOGUE>;
  NN_CUDA(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  int64_t tiles = most_tiles<BM, EPILOGUE == SWIGLU ? BN / 2 : BN>(p), most = context->multiprocessors;
  kernel<<<(unsigned)(tiles < most ? tiles : most), THREADS, bytes, context->stream>>>(map_a, map_b, packed, p);
  return NN_OK;
}

/* Packs the gathered rows into the workspace where they are many and it has room: to the same bits. p then gathers nothing; `packed` says which operand of GROUP_DEPTH is padded. */
static void pack(nn_context *context, Product &p, int *packed) {
  const bool depth = p.grouping == GROUP_DEPTH;
  const int64_t slots = depth ? p.k : p.m, width = p.b_rows ? p.n : depth ? p.m : p.k;
  if (slots < PACK_ROWS) return;
  const int64_t count = depth ? ceil_div(slots, BK) * BK + (int64_t)BK * p.groups : slots;
  Scratch scratch(context);
  bf16 *rows = scratch.take<bf16>(count * width);
  if (!scratch.fits()) return;
  pack_kernel<<<(unsigned)ceil_div(count, 8), 256, 0, context->stream>>>(rows, (const bf16 *)(p.b_rows ? p.b : p.a), p.b_rows ? p.b_rows : p.a_rows,
                                                                        depth ? p.offsets : NULL, p.groups, count, (int)width, p.b_rows ? p.ldb : p.lda);
  if (depth) *packed = p.b_rows ? GATHER_B : GATHER_A;
  if (p.b_rows)
    p.b = rows, p.ldb = width, p.b_rows = NULL, p.b_row_count = count;
  else
    p.a = rows, p.lda = width, p.a_rows = NULL, p.a_row_count = count;
}

#define LAUNCH(...) launch<256, 4, __VA_ARGS__>(context, p, packed)

/* NN_ERROR_UNSUPPORTED where this core cannot: product.cu then takes the mma.sync one. */
nn_status nn_product_wgmma(nn_context *context, Product &p) {
  if (p.k < BK || p.n < 64 || p.n % 8 || p.ldc % 8 || p.c_stride % 8 || !aligned16(p.c)) return NN_ERROR_UNSUPPORTED;
  if (p.beta != 0.0f && p.out_dtype == NN_BF16) return NN_ERROR_UNSUPPORTED;
  int packed = GATHER_NONE;
  if (p.epilogue == SWIGLU) {
    if (p.a_mn || p.b_mn || !p.a_rows || !aligned16(p.h_out)) return NN_ERROR_UNSUPPORTED;
    pack(context, p, &packed);
    return p.a_rows ? LAUNCH(false, false, GATHER_A, SWIGLU) : LAUNCH(false, false, GATHER_NONE, SWIGLU);
  }
  if (p.epilogue != STORE) return NN_ERROR_UNSUPPORTED;
  if (p.grouping == GROUP_DEPTH) { /* the gathered operand's zeros mask the depths of the next group */
    if (!p.a_mn || !p.b_mn || (p.a_rows == NULL) == (p.b_rows == NULL)) return NN_ERROR_UNSUPPORTED;
    pack(context, p, &packed);
    if (packed == GATHER_NONE) return p.a_rows ? LAUNCH(true, true, GATHER_A, STORE) : LAUNCH(true, true, GATHER_B, STORE);
    return LAUNCH(true, true, GATHER_NONE, STORE);
  }
  if (p.b_rows || (p.a_mn && (!p.b_mn || p.a_rows))) return NN_ERROR_UNSUPPORTED;
  if (p.a_rows) {
    if (p.grouping != GROUP_ROWS || !p.b_mn) return NN_ERROR_UNSUPPORTED;
    pack(context, p, &packed);
    if (p.a_rows) return LAUNCH(false, true, GATHER_A, STORE);
  }
  if (p.a_mn) return LAUNCH(true, true, GATHER_NONE, STORE);
  return p.b_mn ? LAUNCH(false, true, GATHER_NONE, STORE) : LAUNCH(false, false, GATHER_NONE, STORE);
}
