/* product_plain.cu: the core for every type, size and alignment: float32 multiply-adds on tiles in shared memory. It is the float32
 * path (no tf32: the golden files want true float32) and the fallback of the tensor-core ones.
 */
#include "product.cuh"

/* ---- kernel -------------------------------------------------------------------------------------------------- */

const int DEPTH = 16;

/* 256 threads as 16 x 16, each TM x TN of the tile (16*TM rows by 16*TN columns). A thread's columns are half from the tile's first
 * half, half from its second, which for SWIGLU are gate and up. */
template <typename T, int TM, int TN>
__global__ void __launch_bounds__(256) plain_kernel(const Product p) {
  const int BM = 16 * TM, BN = 16 * TN, HALF = TN > 1 ? TN / 2 : 1;
  const int LA = BM * DEPTH / 256, LB = BN * DEPTH / 256;
  __shared__ __align__(16) float sa[DEPTH][BM + 4], sb[DEPTH][BN + 4];
  const int tid = threadIdx.x, tx = tid & 15, ty = tid >> 4;
  Tile tile;
  bool pairs = p.epilogue == SWIGLU;
  bool found = pairs ? find_tile<BM, BN / 2 ? BN / 2 : 1>(p, blockIdx.x, tile) : find_tile<BM, BN>(p, blockIdx.x, tile);
  if (!found) return;
  if (p.grouping == GROUP_DEPTH && tile.k0 == tile.k_end && p.beta == 1.0f) return;
  const T *a = (const T *)p.a, *b = (const T *)p.b;
  if (p.grouping == WHOLE) a += tile.group * p.a_stride;
  if (p.grouping == WHOLE || p.grouping == GROUP_ROWS) b += tile.group * p.b_stride;

  float ra[LA], rb[LB];
  auto load = [&](int64_t k0) {
#pragma unroll
    for (int i = 0; i < LA; i++) {
      int e = tid + i * 256, mm = p.a_mn ? e % BM : e / DEPTH, kk = p.a_mn ? e / BM : e % DEPTH;
      int64_t row = tile.m0 + mm, depth = k0 + kk;
      float value = 0.0f;
      if (row < tile.m_end && depth < tile.k_end) {
        int64_t stored = p.a_mn ? depth : row, other = p.a_mn ? row : depth;
        const float scale = p.a_scale ? p.a_scale[stored] : 1.0f;
        if (p.a_rows) stored = p.a_rows[stored];
        value = to_float(a[stored * p.lda + other]);
        if (p.a_scale) value = rounded<T>(scale * value);
      }
      ra[i] = value;
    }
#pragma unroll
    for (int i = 0; i < LB; i++) {
      int e = tid + i * 256, nn = p.b_mn ? e % BN : e / DEPTH, kk = p.b_mn ? e / BN : e % DEPTH;
      int64_t column = tile.n0 + nn, depth = k0 + kk;
      bool inside = column < p.n;
      if (pairs) {
        column = tile.n0 + nn % (BN / 2 ? BN / 2 : 1);
        inside = column < p.n;
        if (nn >= BN / 2) column += p.n;
      }
      float value = 0.0f;
      if (inside && depth < tile.k_end) {
        int64_t stored = p.b_mn ? depth : column, other = p.b_mn ? column : depth;
        if (p.b_rows) stored = p.b_rows[stored];
        value = to_float(b[stored * p.ldb + other]);
      }
      rb[i] = value;
    }
  };

  float sum[TM][TN];
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) sum[i][j] = 0.0f;
  if (tile.k0 < tile.k_end) load(tile.k0);
  for (int64_t k0 = tile.k0; k0 < tile.k_end; k0 += DEPTH) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LA; i++) {
      int e = tid + i * 256;
      sa[p.a_mn ? e / BM : e % DEPTH][p.a_mn ? e % BM : e / DEPTH] = ra[i];
    }
#pragma unroll
    for (int i = 0; i < LB; i++) {
      int e = tid + i * 256;
      sb[p.b_mn ? e / BN : e % DEPTH][p.b_mn ? e % BN : e / DEPTH] = rb[i];
    }
    __syncthreads();
    if (k0 + DEPTH < tile.k_end) load(k0 + DEPTH);
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      float fa[TM], fb[TN];
#pragma unroll
      for (int i = 0; i < TM; i++) fa[i] = sa[d][ty * TM + i];
#pragma unroll
      for (int j = 0; j < TN; j++) fb[j] = sb[d][j < HALF ? tx * HALF + j : BN / 2 + tx * HALF + j - HALF];
#pragma unroll
      for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) sum[i][j] = fmaf(fa[i], fb[j], sum[i][j]);
    }
  }

#pragma unroll
  for (int i = 0; i < TM; i++) {
    int64_t row = tile.m0 + ty * TM + i;
    if (p.epilogue == SWIGLU) {
#pragma unroll
      for (int j = 0; j + 1 < HALF; j += 2)
        epilogue_swiglu<T>(p, tile, row, tile.n0 + tx * HALF + j, make_float2(sum[i][j], sum[i][j + 1]),
                           make_float2(sum[i][HALF + j], sum[i][HALF + j + 1]));
      continue;
    }
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < TN; j++) {
      if (TN > 1 && j % 2) continue;
      int64_t column = tile.n0 + (j < HALF ? tx * HALF + j : BN / 2 + tx * HALF + j - HALF);
      float x = sum[i][j], y = sum[i][TN > 1 ? j + 1 : j];
      if (TN == 1 || HALF % 2) { /* columns of a thread are no pairs */
        if (row < tile.m_end && column < p.n) {
          int64_t at = tile.group * p.c_stride + row * p.ldc + column;
          float value = fmaf(p.alpha, x, 0.0f);
          if (p.out_dtype == NN_BF16) {
            if (p.beta != 0.0f) value += p.beta * to_float(((bf16 *)p.c)[at]);
            ((bf16 *)p.c)[at] = from_float<bf16>(value);
          } else {
            if (p.beta != 0.0f) value += p.beta * ((float *)p.c)[at];
            ((float *)p.c)[at] = value;
          }
        }
      } else if (p.epilogue == SWIGLU_BACKWARD) {
        dot += epilogue_swiglu_backward<T>(p, tile, row, column, x, y);
      } else if (p.out_dtype == NN_BF16) {
        epilogue_store<bf16>(p, tile, row, column, x, y);
      } else {
        epilogue_store<float>(p, tile, row, column, x, y);
      }
    }
    if (p.epilogue == SWIGLU_BACKWARD) {
#pragma unroll
      for (int s = 8; s > 0; s >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, s);
      if (tx == 0 && row < tile.m_end) p.row_dots[row * p.dot_parts + tile.n0 / BN] = dot;
    }
  }
}

/* ---- launcher ------------------------------------------------------------------------------------------------ */

nn_status nn_product_plain(nn_context *context, Product &p) {
  Product whole = p;
  if (p.epilogue == SWIGLU) { /* a tile is half as wide in h's columns */
    int64_t tiles = most_tiles<128, 64>(p);
    NN_FOR_DTYPE(p.dtype, T, plain_kernel<T, 8, 8><<<(unsigned)tiles, 256, 0, context->stream>>>(whole););
  } else if (p.epilogue == STORE && p.n <= 16) {
    NN_FOR_DTYPE(p.dtype, T, plain_kernel<T, 4, 1><<<(unsigned)most_tiles<64, 16>(p), 256, 0, context->stream>>>(whole););
  } else if (p.epilogue == STORE && p.m <= 16 && p.grouping != GROUP_ROWS) {
    NN_FOR_DTYPE(p.dtype, T, plain_kernel<T, 1, 4><<<(unsigned)most_tiles<16, 64>(p), 256, 0, context->stream>>>(whole););
  } else {
    p.dot_parts = whole.dot_parts = (int)ceil_div(p.n, 128);
    NN_FOR_DTYPE(p.dtype, T, plain_kernel<T, 8, 8><<<(unsigned)most_tiles<128, 128>(p), 256, 0, context->stream>>>(whole););
  }
  return NN_OK;
}
