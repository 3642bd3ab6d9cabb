/* product_wgmma.cu: the bf16 core for Hopper: wgmma fed by the copy engine, gathered rows packed before (product_pack.cu; feeding them
 * by cp.async costs a fifth of the speed). Persistent blocks of three warpgroups: one loads, two multiply, each 64 rows of a tile of 128
 * rows by BN columns. While the multipliers finish a tile, the loader is already stages ahead in the next.
 *
 *   loader        wait empty[s] -> copy A and B of 64 depths into stage s -> full[s]
 *   multipliers   wait full[s] -> 4 x wgmma -> (one step later, when they are done) empty[s]
 *
 * How results leave: wgmma_epilogues.cuh.
 *
 * SWIGLU: h takes as long to compute as a third of a tile's products. The loader's other three warps, the finishers, compute it while the multipliers
 * are in the next tile. Multiplier's warp w: wait taken[w] -> gate and up -> handed[w]; finishers: wait handed[w] -> h -> taken[w].
 * SWIGLU_BACKWARD: gate and up follow a tile's operands through the same stages; dSwiGLU is done there in place, and a stage is free when the copy
 * engine has read its results.
 * fast.cu (pranjalssh) and CUTLASS's warp-specialised kernels are the models.
 */
#include <cuda.h>

#include "wgmma_epilogues.cuh"

const int BK = 64, THREADS = 384;

/* Which operand of GROUP_DEPTH was packed with zeros behind each group. */
enum Padded { PADDED_NONE, PADDED_A, PADDED_B };

constexpr int shared_bytes(int bn, int stages, int epilogue) {
  return 1024 + stages * (A_BYTES + bn * BK * 2) + (MULTIPLIER_WARPS * boxes_of(epilogue) + (epilogue == SWIGLU ? 2 * FINISHER_WARPS : 0)) * BOX_BYTES;
}

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

/* ---- kernel: the order of the tiles --------------------------------------------------------------------------- */

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

template <int BN, int STAGES, bool AMN, bool BMN, int EPILOGUE>
__global__ void __launch_bounds__(THREADS, 1)
    wgmma_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                 const __grid_constant__ CUtensorMap map_gate_up, const __grid_constant__ CUtensorMap map_c,
                 const __grid_constant__ CUtensorMap map_h, Padded padded, const __grid_constant__ Product p) {
#if NN_HOPPER
  constexpr int B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES, COLUMNS = EPILOGUE == SWIGLU ? BN / 2 : BN;
  extern __shared__ unsigned char memory[];
  __shared__ __align__(8) uint64_t barriers[2 * STAGES + (EPILOGUE == SWIGLU ? 2 * MULTIPLIER_WARPS : 0)];
  const uint32_t shared = (shared_address(memory) + 1023) & ~1023u, full = shared_address(barriers), empty = full + 8 * STAGES;
  const uint32_t boxes = shared + STAGES * STAGE_BYTES, handed = empty + 8 * STAGES, taken = handed + 8 * MULTIPLIER_WARPS;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, MULTIPLIER_WARPS);
    }
    if (EPILOGUE == SWIGLU)
      for (int w = 0; w < MULTIPLIER_WARPS; w++) barrier_init(handed + 8 * w, 32), barrier_init(taken + 8 * w, 2 * 32);
    fence_barrier_init();
  }
  __syncthreads();
  const int group = threadIdx.x >> 7;
  Tile tile;
  Walk<BM, COLUMNS> walk;
  if (group == 0) {
    registers_down<EPILOGUE == SWIGLU ? 88 : 40>(); /* the finishers compute */
    if (EPILOGUE == SWIGLU && threadIdx.x >= 32) {
      const int finisher = (threadIdx.x >> 5) - 1;
      int turn = 0;
      uint32_t phase = 0;
      for (int64_t index = blockIdx.x; walk.find(p, index, tile); index += gridDim.x, phase ^= 1)
        finish_swiglu(p, tile, finisher, boxes + (MULTIPLIER_WARPS * boxes_of(SWIGLU) + finisher * 2) * BOX_BYTES, turn, boxes, handed, taken, phase, &map_h);
      if ((threadIdx.x & 31) == 0) store_wait_read<0>(); /* the block's memory must stay until then */
      return;
    }
    if (threadIdx.x != 0) return;
    int stage = 0;
    uint32_t phase = 1;
    for (int64_t index = blockIdx.x; walk.find(p, index, tile); index += gridDim.x) {
      const int group_a = p.grouping == WHOLE ? tile.group : 0, group_b = p.grouping == WHOLE || p.grouping == GROUP_ROWS ? tile.group : 0;
      const int shift = padded != PADDED_NONE ? packed_start(p.offsets, tile.group) - (int)tile.k0 : 0;
      const int shift_a = padded == PADDED_A ? shift : 0, shift_b = padded == PADDED_B ? shift : 0;
      const int pieces = EPILOGUE == SWIGLU_BACKWARD ? min(BN / 64, ((int)p.n - tile.n0) / 64) : 0;
      for (int64_t k = tile.k0; k < tile.k_end; k += BK) {
        const uint32_t stage_a = shared + stage * STAGE_BYTES, stage_b = stage_a + A_BYTES;
        barrier_wait(empty + 8 * stage, phase);
        barrier_expect(full + 8 * stage, STAGE_BYTES);
        copy_operand<AMN, BM>(stage_a, &map_a, full + 8 * stage, (int)tile.m0, -1, (int)k + shift_a, group_a);
        copy_operand<BMN, BN>(stage_b, &map_b, full + 8 * stage, tile.n0, EPILOGUE == SWIGLU ? (int)p.n + tile.n0 : -1, (int)k + shift_b, group_b);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      /* Gate and up follow the operands through the same stages, 64 columns each. */
      for (int piece = 0; piece < pieces; piece++) {
        const uint32_t at = shared + stage * STAGE_BYTES;
        barrier_wait(empty + 8 * stage, phase);
        barrier_expect(full + 8 * stage, 2 * A_BYTES);
        tensor_copy(at, &map_gate_up, full + 8 * stage, tile.n0 + piece * 64, (int)tile.m0, 0);
        tensor_copy(at + A_BYTES, &map_gate_up, full + 8 * stage, (int)p.n + tile.n0 + piece * 64, (int)tile.m0, 0);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
  } else {
    registers_up<EPILOGUE == SWIGLU ? 208 : 232>();
    const int half = group - 1, warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31;
    const uint32_t own_boxes = boxes + (half * 4 + warp) * boxes_of(EPILOGUE) * BOX_BYTES;
    int stage = 0, late = -1; /* late: a stage whose stores may still read it */
    uint32_t phase = 0, phase_taken = 1;
    float d[BN / 2];
    /* A stage is free when its results have been read, by the copy engine or by every lane. */
    auto release_stored = [&](int which, bool newest) {
      __syncwarp();
      if (lane != 0) return;
      if (newest)
        store_wait_read<0>();
      else
        store_wait_read<1>();
      barrier_arrive(empty + 8 * which);
    };
    int64_t index = blockIdx.x;
    Tile next;
    for (bool more = walk.find(p, index, tile); more; tile = next) {
      int before = -1;
      const int64_t row0 = tile.m0 + half * 64 + warp * 16;
      const int rows = rows_inside(tile, row0);
      float weight[2] = {0.0f, 0.0f};
      if (EPILOGUE == SWIGLU_BACKWARD) {
#pragma unroll
        for (int i = 0; i < 2; i++)
          if ((lane >> 2) + i * 8 < rows) weight[i] = p.slot_weight[row0 + (lane >> 2) + i * 8];
      }
      if (tile.m0 + half * 64 >= tile.m_end) { /* where a group's rows end: nothing to multiply */
        for (int64_t k = tile.k0; k < tile.k_end; k += BK) {
          barrier_wait(full + 8 * stage, phase);
          if (lane == 0) barrier_arrive(empty + 8 * stage);
          if (EPILOGUE == SWIGLU_BACKWARD && late >= 0) release_stored(late, true), late = -1;
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      } else {
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
          if (EPILOGUE == SWIGLU_BACKWARD && late >= 0) release_stored(late, true), late = -1;
          before = stage;
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
      more = walk.find(p, index += gridDim.x, next); /* while the last products run */
      wgmma_wait<0>();
      if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
      if (AMN && before < 0) { /* only GROUP_DEPTH has tiles without a step */
        if (p.beta == 1.0f) continue;
#pragma unroll
        for (int i = 0; i < BN / 2; i++) d[i] = 0.0f;
      }
      if constexpr (EPILOGUE == STORE) {
        finish<BN>(p, tile, d, own_boxes, row0, rows, &map_c);
      } else if constexpr (EPILOGUE == SWIGLU) {
        hand_over(p, tile, d, own_boxes, row0, rows, &map_c, handed + 8 * (half * 4 + warp), taken + 8 * (half * 4 + warp), phase_taken);
        phase_taken ^= 1;
      } else {
        float dots[2] = {0.0f, 0.0f};
        const int pieces = min(BN / 64, ((int)p.n - tile.n0) / 64);
#pragma unroll
        for (int piece = 0; piece < BN / 64; piece++) {
          if (piece < pieces) {
            const uint32_t offset = stage * STAGE_BYTES + (half * 64 + warp * 16) * 128;
            const int column = tile.n0 + piece * 64;
            barrier_wait(full + 8 * stage, phase);
            swiglu_backward_piece(shared + offset, d + piece * 32, weight, dots, p.h != NULL);
            fence_async_shared();
            __syncwarp();
            if (rows == 16) {
              if (lane == 0) {
                tensor_store(&map_c, shared + offset, column, (int)row0, 0);
                tensor_store(&map_c, shared + offset + A_BYTES, (int)p.n + column, (int)row0, 0);
                if (p.h) tensor_store(&map_h, shared + offset + 2 * A_BYTES, column, (int)row0, 0);
              }
            } else {
              bf16 *out = (bf16 *)p.c + row0 * 2 * p.n + column;
              copy_box(out, 2 * p.n, shared + offset, rows, 64);
              copy_box(out + p.n, 2 * p.n, shared + offset + A_BYTES, rows, 64);
              if (p.h) copy_box((bf16 *)p.h + row0 * p.n + column, p.n, shared + offset + 2 * A_BYTES, rows, 64);
            }
            if (lane == 0) store_commit();
            if (late >= 0) release_stored(late, false);
            late = stage;
            if (++stage == STAGES) stage = 0, phase ^= 1;
          }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          dots[i] += __shfl_xor_sync(0xffffffffu, dots[i], 1);
          dots[i] += __shfl_xor_sync(0xffffffffu, dots[i], 2);
          if ((lane & 3) == 0 && (lane >> 2) + i * 8 < rows) p.row_dots[(row0 + (lane >> 2) + i * 8) * p.dot_parts + tile.n0 / BN] = dots[i];
        }
      }
    }
    if (EPILOGUE == SWIGLU_BACKWARD && late >= 0) release_stored(late, true);
    if (lane == 0) store_wait_read<0>(); /* the block's memory must stay until then */
  }
#endif
}

/* ---- launcher ------------------------------------------------------------------------------------------------ */

static bool encode_map(CUtensorMap *map, const void *matrix, int bytes, int64_t columns, int64_t rows, int64_t groups, int64_t row_stride,
                       int64_t group_stride, int box_columns, int box_rows) {
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
  cuuint64_t strides[2] = {(cuuint64_t)row_stride * bytes, (cuuint64_t)group_stride * bytes};
  cuuint32_t box[3] = {(cuuint32_t)box_columns, (cuuint32_t)box_rows, 1}, steps[3] = {1, 1, 1};
  return encode(map, bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)matrix, sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, box_columns * bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool nn_tensor_map(CUtensorMap *map, const void *matrix, int64_t columns, int64_t rows, int64_t groups, int64_t row_stride,
                   int64_t group_stride, int box_rows) {
  return encode_map(map, matrix, 2, columns, rows, groups, row_stride, group_stride, 64, box_rows);
}
bool nn_tensor_map_f32(CUtensorMap *map, const void *matrix, int64_t columns, int64_t rows, int64_t groups, int64_t row_stride,
                       int64_t group_stride, int box_rows) {
  return encode_map(map, matrix, 4, columns, rows, groups, row_stride, group_stride, 32, box_rows);
}
bool nn_tensor_map_rows(CUtensorMap *map, const float *matrix, int64_t columns, int64_t rows, int box_columns) {
  return encode_map(map, matrix, 4, columns, rows, 1, columns, 0, box_columns, 1);
}

/* The results in boxes of 16 rows. */
template <int EPILOGUE>
static bool map_results(const Product &p, CUtensorMap *map_c, CUtensorMap *map_h) {
  if (EPILOGUE != STORE)
    return (!p.c || nn_tensor_map(map_c, p.c, 2 * p.n, p.m, 1, 2 * p.n, 0, 16)) && (!p.h || nn_tensor_map(map_h, p.h, p.n, p.m, 1, p.n, 0, 16));
  const int64_t groups = p.grouping == GROUP_ROWS ? 1 : p.groups;
  if (p.out_dtype == NN_BF16) return nn_tensor_map(map_c, p.c, p.n, p.m, groups, p.ldc, p.c_stride, 16);
  return p.grouping != GROUP_ROWS && (p.beta == 0.0f || p.beta == 1.0f) && nn_tensor_map_f32(map_c, p.c, p.n, p.m, groups, p.ldc, p.c_stride, 16);
}

template <int BN, int STAGES, bool AMN, bool BMN, int EPILOGUE>
static nn_status launch(nn_context *context, Product &p, Padded padded = PADDED_NONE) {
  CUtensorMap map_a = {}, map_b = {}, map_gate_up = {}, map_c = {}, map_h = {};
  if (EPILOGUE == SWIGLU_BACKWARD) {
    p.dot_parts = (int)ceil_div(p.n, BN);
    if (!nn_tensor_map(&map_gate_up, p.gate_up, 2 * p.n, p.m, 1, 2 * p.n, 0, BM)) return NN_ERROR_UNSUPPORTED;
  }
  if (!map_results<EPILOGUE>(p, &map_c, &map_h)) return NN_ERROR_UNSUPPORTED;
  const bool batch = p.grouping == WHOLE && p.groups > 1, weights = batch || p.grouping == GROUP_ROWS;
  if (!nn_tensor_map(&map_a, p.a, AMN ? p.m : p.k, padded == PADDED_A ? p.padded_rows : AMN ? p.k : p.m, batch ? p.groups : 1, p.lda, p.a_stride, AMN ? 64 : BM))
    return NN_ERROR_UNSUPPORTED;
  const int64_t n = EPILOGUE == SWIGLU ? 2 * p.n : p.n;
  if (!nn_tensor_map(&map_b, p.b, BMN ? n : p.k, padded == PADDED_B ? p.padded_rows : BMN ? p.k : n, weights ? p.groups : 1, p.ldb, p.b_stride,
                     BMN ? 64 : EPILOGUE == SWIGLU ? BN / 2 : BN))
    return NN_ERROR_UNSUPPORTED;
  const int bytes = shared_bytes(BN, STAGES, EPILOGUE);
  auto kernel = wgmma_kernel<BN, STAGES, AMN, BMN, EPILOGUE>;
  NN_CUDA(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  int64_t tiles = most_tiles<BM, EPILOGUE == SWIGLU ? BN / 2 : BN>(p), most = context->multiprocessors;
  kernel<<<(unsigned)(tiles < most ? tiles : most), THREADS, bytes, context->stream>>>(map_a, map_b, map_gate_up, map_c, map_h, padded, p);
  return NN_OK;
}

/* Whether tiles of 192 columns keep the chip busy for a shorter time than tiles of 256: where those leave much of the last round idle. */
static bool narrow_tiles(nn_context *context, const Product &p) {
  if (p.grouping != WHOLE && p.grouping != SPLIT_DEPTH) return false;
  const int64_t most = context->multiprocessors;
  const int64_t narrow = ceil_div(most_tiles<BM, 192>(p), most) * 192, wide = ceil_div(most_tiles<BM, 256>(p), most) * 256;
  return narrow * 10 <= wide * 9;
}

/* NN_ERROR_UNSUPPORTED where this core cannot, or has no room to pack gathered rows: product.cu then takes the mma.sync one. */
nn_status nn_product_wgmma(nn_context *context, Product &p) {
  if (p.k < BK || p.n < 64 || p.n % 8 || p.ldc % 8 || p.c_stride % 8 || !aligned16(p.c)) return NN_ERROR_UNSUPPORTED;
  if (p.beta != 0.0f && p.out_dtype == NN_BF16) return NN_ERROR_UNSUPPORTED;
  const bool gathers = p.a_rows || p.b_rows;
  if (p.epilogue == SWIGLU) {
    if (p.a_mn || p.b_mn || !p.a_rows || !aligned16(p.h) || !nn_pack_rows(context, p, false)) return NN_ERROR_UNSUPPORTED;
    return launch<256, 3, false, false, SWIGLU>(context, p);
  }
  if (p.epilogue == SWIGLU_BACKWARD) {
    if (p.a_mn || !p.b_mn || !p.a_rows || p.n % 64 || !aligned16(p.h) || !aligned16(p.gate_up) || !nn_pack_rows(context, p, false)) return NN_ERROR_UNSUPPORTED;
    return launch<256, 4, false, true, SWIGLU_BACKWARD>(context, p);
  }
  if (p.grouping == GROUP_DEPTH) { /* the packed operand's zeros mask the depths of the next group */
    const Padded padded = p.a_rows ? PADDED_A : PADDED_B;
    if (!p.a_mn || !p.b_mn || !gathers || (p.a_rows && p.b_rows) || !nn_pack_rows(context, p, true)) return NN_ERROR_UNSUPPORTED;
    return launch<256, 4, true, true, STORE>(context, p, padded);
  }
  if (gathers || (p.a_mn && !p.b_mn)) return NN_ERROR_UNSUPPORTED;
  if (p.a_mn) return launch<256, 4, true, true, STORE>(context, p);
  if (narrow_tiles(context, p)) return p.b_mn ? launch<192, 4, false, true, STORE>(context, p) : launch<192, 4, false, false, STORE>(context, p);
  return p.b_mn ? launch<256, 4, false, true, STORE>(context, p) : launch<256, 4, false, false, STORE>(context, p);
}
