/* product_mma.cu: the bf16 core for sm_80 and newer: mma.sync m16n8k16 fed by ldmatrix from a ring of three stages that cp.async
 * fills. 128 x 128 x 64 tiles, 8 warps as 2 x 4, each 64 x 32 of the tile. Rows may be gathered, so the loads are made by threads.
 *
 * A stage holds A and B as rows of 128 bytes whose 16-byte chunks are swizzled (chunk ^= row & 7): K-major as 128 rows of 64
 * depths, M- or N-major as 2 blocks of 64 depths by 64 elements. ldmatrix reads both without bank conflicts, the second transposed.
 */
#include "mma.cuh"
#include "product.cuh"

const int BM = 128, BN = 128, BK = 64, STAGES = 3, OPERAND_BYTES = 128 * 128;
const int SHARED_BYTES = STAGES * 2 * OPERAND_BYTES;

/* ---- kernel -------------------------------------------------------------------------------------------------- */

/* Where thread `tid` finds its four 16-byte chunks of one operand's stage. */
template <bool MN>
struct Loader {
  const bf16 *base;
  int64_t ld, limit, extent; /* limit: end of the rows (K-major) or of the columns (MN-major) */
  const int32_t *rows;
  int64_t row0[4]; /* K-major: the element offset of each row, -1 where there is none */
  int chunk, row;

  /* first: of the rows (K-major) or columns (MN-major). `up`: what to add to rows of the tile's second half (SWIGLU). */
  __device__ void start(const bf16 *matrix, int64_t stride, const int32_t *gather, int64_t first, int64_t end, bool pairs, int64_t up) {
    base = matrix, ld = stride, rows = gather, limit = end, extent = first;
    chunk = threadIdx.x & 7, row = threadIdx.x >> 3;
    if (!MN) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int local = row + 32 * i;
        int64_t r = first + (pairs ? local % 64 : local);
        bool inside = r < end;
        if (pairs && local >= 64) r += up;
        row0[i] = inside ? (gather ? (int64_t)gather[r] : r) * stride : -1;
      }
    }
  }
  __device__ void load(uint32_t shared, int64_t k0, int64_t k_end) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (MN) {
        int local = row + 32 * (i & 1), block = i >> 1;
        int64_t depth = k0 + local, column = extent + block * 64 + chunk * 8;
        bool inside = depth < k_end && column < limit;
        int64_t stored = inside ? (rows ? (int64_t)rows[depth] : depth) : 0;
        cp_async16(shared + block * 8192 + local * 128 + ((chunk ^ (local & 7)) << 4), base + (inside ? stored * ld + column : 0), inside);
      } else {
        int local = row + 32 * i;
        int64_t depth = k0 + chunk * 8;
        bool inside = row0[i] >= 0 && depth < k_end;
        cp_async16(shared + local * 128 + ((chunk ^ (local & 7)) << 4), base + (inside ? row0[i] + depth : 0), inside);
      }
    }
  }
};

template <bool AMN, bool BMN>
__global__ void __launch_bounds__(256, 2) mma_kernel(const Product p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t shared = shared_address(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wm = warp & 1, wn = warp >> 1;
  Tile tile;
  const bool pairs = p.epilogue == SWIGLU;
  if (!(pairs ? find_tile<BM, BN / 2>(p, blockIdx.x, tile) : find_tile<BM, BN>(p, blockIdx.x, tile))) return;
  if (p.grouping == GROUP_DEPTH && tile.k0 == tile.k_end && p.beta == 1.0f) return;
  const bf16 *a = (const bf16 *)p.a, *b = (const bf16 *)p.b;
  if (p.grouping == WHOLE) a += tile.group * p.a_stride;
  if (p.grouping == WHOLE || p.grouping == GROUP_ROWS) b += tile.group * p.b_stride;
  Loader<AMN> loader_a;
  Loader<BMN> loader_b;
  loader_a.start(a, p.lda, p.a_rows, tile.m0, tile.m_end, false, 0);
  loader_b.start(b, p.ldb, p.b_rows, tile.n0, p.n, pairs, p.n);

  const int steps = (int)((tile.k_end - tile.k0 + BK - 1) / BK);
  auto fetch = [&](int step) {
    if (step < steps) {
      uint32_t stage = shared + step % STAGES * 2 * OPERAND_BYTES;
      loader_a.load(stage, tile.k0 + (int64_t)step * BK, tile.k_end);
      loader_b.load(stage + OPERAND_BYTES, tile.k0 + (int64_t)step * BK, tile.k_end);
    }
    cp_async_commit();
  };
  float sum[4][4][4] = {};
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch(i);
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    fetch(step + STAGES - 1);
    uint32_t stage_a = shared + step % STAGES * 2 * OPERAND_BYTES, stage_b = stage_a + OPERAND_BYTES;
#pragma unroll
    for (int d = 0; d < BK / 16; d++) {
      uint32_t fa[4][4], fb[4][2];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int m = wm * 64 + i * 16;
        if (AMN)
          ldmatrix4_transposed(fa[i], swizzled(stage_a + (m >> 6) * 8192, d * 16 + (lane & 7) + (lane >> 4) * 8, (m & 63) / 8 + (lane >> 3 & 1)));
        else
          ldmatrix4(fa[i], swizzled(stage_a, m + (lane & 15), d * 2 + (lane >> 4)));
      }
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int n = j * 64 + wn * 16;
        uint32_t pair[4];
        if (BMN)
          ldmatrix4_transposed(pair, swizzled(stage_b + (n >> 6) * 8192, d * 16 + (lane & 15), (n & 63) / 8 + (lane >> 4)));
        else
          ldmatrix4(pair, swizzled(stage_b, n + (lane & 7) + (lane >> 4) * 8, d * 2 + (lane >> 3 & 1)));
        fb[2 * j][0] = pair[0], fb[2 * j][1] = pair[1], fb[2 * j + 1][0] = pair[2], fb[2 * j + 1][1] = pair[3];
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma16816(sum[i][j], fa[i], fb[j]);
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int64_t row = tile.m0 + wm * 64 + i * 16 + half * 8 + (lane >> 2);
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float x = sum[i][j][half * 2], y = sum[i][j][half * 2 + 1];
        int64_t column = tile.n0 + (j >> 1) * 64 + wn * 16 + (j & 1) * 8 + (lane & 3) * 2;
        if (p.epilogue == SWIGLU) {
          if (j < 2) epilogue_swiglu<bf16>(p, tile, row, column, make_float2(x, y), make_float2(sum[i][j + 2][half * 2], sum[i][j + 2][half * 2 + 1]));
        } else if (p.epilogue == SWIGLU_BACKWARD) {
          dot += epilogue_swiglu_backward<bf16>(p, tile, row, column, x, y);
        } else if (p.out_dtype == NN_BF16) {
          epilogue_store<bf16>(p, tile, row, column, x, y);
        } else {
          epilogue_store<float>(p, tile, row, column, x, y);
        }
      }
      if (p.epilogue == SWIGLU_BACKWARD) {
        dot += __shfl_xor_sync(0xffffffffu, dot, 1);
        dot += __shfl_xor_sync(0xffffffffu, dot, 2);
        if ((lane & 3) == 0 && row < tile.m_end) p.row_dots[row * p.dot_parts + tile.n0 / BN * 4 + wn] = dot;
      }
    }
  }
}

/* ---- launcher ------------------------------------------------------------------------------------------------ */

template <bool AMN, bool BMN>
static nn_status launch(nn_context *context, const Product &p) {
  NN_CUDA(context, cudaFuncSetAttribute(mma_kernel<AMN, BMN>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
  int64_t tiles = p.epilogue == SWIGLU ? most_tiles<BM, BN / 2>(p) : most_tiles<BM, BN>(p);
  mma_kernel<AMN, BMN><<<(unsigned)tiles, 256, SHARED_BYTES, context->stream>>>(p);
  return NN_OK;
}

/* NN_ERROR_UNSUPPORTED where rows are to be scaled and there is no room to pack them: product.cu then takes the plain core. */
nn_status nn_product_mma(nn_context *context, Product &p) {
  if (p.a_scale && !nn_pack_rows(context, p, false)) return NN_ERROR_UNSUPPORTED;
  p.dot_parts = (int)ceil_div(p.n, BN) * 4;
  if (p.a_mn) return p.b_mn ? launch<true, true>(context, p) : launch<true, false>(context, p);
  return p.b_mn ? launch<false, true>(context, p) : launch<false, false>(context, p);
}
