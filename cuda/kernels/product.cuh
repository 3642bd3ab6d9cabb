/* product.cuh: matrix products as a description (Product), which gemm.cu, moe.cu and loss.cu fill in and one of three cores computes:
 * product_plain.cu (any type, size and alignment), product_mma.cu (bf16, mma.sync, sm_80 and newer), product_wgmma.cu (bf16, wgmma
 * and TMA, sm_90a), or, of few rows, columns or depths, product_small.cu (bf16, mma.sync). product.cu checks and chooses. What the cores share on the device (tiles, epilogues) is below.
 *
 * C[i, j] = sum over d of A[i, d] * B[j, d]. A is stored K-major [m, k] or M-major [k, m], B K-major [n, k] or N-major [k, n].
 *
 *   grouping      rows of C          depth                     matrices
 *   WHOLE         0 .. m             0 .. k                    `groups` of them, a_stride, b_stride, c_stride apart
 *   GROUP_ROWS    offsets[g] ..      0 .. k                    B of group g; A and C are one, group g has its rows of it
 *   GROUP_DEPTH   0 .. m             offsets[g] .. [g+1]       C of group g; A and B are one, group g has its rows of them
 *   SPLIT_DEPTH   0 .. m             g*k_chunk .. (g+1)*k_chunk  C of group g: partial sums, added by product.cu in order of g
 */
#pragma once

#include "common.cuh"

enum Grouping { WHOLE, GROUP_ROWS, GROUP_DEPTH, SPLIT_DEPTH };

enum Epilogue {
  STORE,           /* c = alpha * product + beta * c, in out_dtype; beta 0 does not read c, and gives the bits that zeros in c give */
  SWIGLU,          /* B's rows are [gate (n) | up (n)]: h = silu(gate) * up, c (may be NULL) = [gate | up] */
  SWIGLU_BACKWARD, /* the product is dh [rows, n]: c = dgate_up, h, and row_dots (see nn_moe_down_backward) */
};

struct Product {
  const void *a, *b;
  void *c;
  int64_t m, n, k;
  int64_t lda, ldb, ldc; /* elements from one stored row to the next */
  int a_mn, b_mn;        /* 1: stored M-major (A) or N-major (B) */
  const int32_t *a_rows, *b_rows; /* gather: stored row r is read from row a_rows[r]; NULL: r itself */
  int64_t a_row_count;            /* rows that the matrix has from which A's are gathered */
  const float *a_scale;           /* with a_rows: row r counts a_scale[r] times, rounded to dtype; NULL: once */
  int64_t padded_rows;            /* of the operand that nn_pack_rows has padded */
  int grouping, groups;
  const int32_t *offsets;
  int64_t a_stride, b_stride, c_stride, k_chunk;
  float alpha, beta;
  int epilogue;
  nn_dtype dtype, out_dtype;
  int m_fastest; /* order of the tiles */
  /* SWIGLU writes h [rows, n]; SWIGLU_BACKWARD reads gate_up [rows, 2n] and slot_weight [rows] and writes h, if it is not NULL, and
   * row_dots [rows, dot_parts], the parts of dh . h in order of columns. */
  void *h;
  const void *gate_up;
  const float *slot_weight;
  float *row_dots;
  int dot_parts;
};

/* A description with everything at rest: C = A B^T of packed K-major matrices. */
static inline Product make_product(void *c, const void *a, const void *b, int64_t m, int64_t n, int64_t k, nn_dtype out_dtype,
                                   nn_dtype dtype) {
  Product p = {};
  p.a = a, p.b = b, p.c = c, p.m = m, p.n = n, p.k = k;
  p.lda = k, p.ldb = k, p.ldc = n;
  p.groups = 1, p.alpha = 1.0f, p.beta = 0.0f;
  p.dtype = dtype, p.out_dtype = out_dtype;
  return p;
}

/* Checks, chooses a core and queues the product. Fills in p.dot_parts. */
nn_status nn_run_product(nn_context *context, Product &p, const char *where);
/* Most parts of a row that any core makes for SWIGLU_BACKWARD. */
static inline int64_t most_dot_parts(int64_t n) { return ceil_div(n, 128) * 4; }
/* Workspace that nn_run_product may use for the partial sums of SPLIT_DEPTH. */
const int64_t SPLIT_WORKSPACE = 64 << 20;

nn_status nn_product_plain(nn_context *context, Product &p);
nn_status nn_product_small(nn_context *context, const Product &p);
nn_status nn_product_mma(nn_context *context, Product &p);
nn_status nn_product_wgmma(nn_context *context, Product &p);

/* Packs the gathered rows of A or B (bf16, whole 16-byte chunks) into the workspace, to the same bits: p then gathers and scales nothing. False where
 * there is no room. padded: the rows of each group of GROUP_DEPTH from packed_start, so that the zeros behind them mask the depths of the next group. */
bool nn_pack_rows(nn_context *context, Product &p, bool padded);
const int64_t PACK_DEPTH = 64;
__device__ __forceinline__ int packed_start(const int32_t *offsets, int group) {
  return (offsets[group] + (int)PACK_DEPTH - 1) / (int)PACK_DEPTH * (int)PACK_DEPTH + (int)PACK_DEPTH * group;
}

/* ---- device side: which piece of which matrix ---------------------------------------------------------------- */

struct Tile {
  int64_t m0, m_end, k0, k_end;
  int n0, group;
};

/* Tile `index` of BM rows by BN columns of C; false when there is none of that number. */
template <int BM, int BN>
__device__ __forceinline__ bool find_tile(const Product &p, int64_t index, Tile &tile) {
  int n_tiles = (int)((p.n + BN - 1) / BN), m_tiles;
  if (p.grouping == GROUP_ROWS) {
    int64_t first = p.offsets[0], last = first;
    int g = 0;
    for (;; g++) {
      if (g == p.groups) return false;
      first = last, last = p.offsets[g + 1];
      m_tiles = (int)((last - first + BM - 1) / BM);
      int64_t tiles = (int64_t)m_tiles * n_tiles;
      if (index < tiles) break;
      index -= tiles;
    }
    tile.group = g, tile.m0 = first, tile.m_end = last, tile.k0 = 0, tile.k_end = p.k;
  } else {
    m_tiles = (int)((p.m + BM - 1) / BM);
    int64_t tiles = (int64_t)m_tiles * n_tiles, g = index / tiles;
    if (g >= p.groups) return false;
    index -= g * tiles;
    tile.group = (int)g, tile.m0 = 0, tile.m_end = p.m, tile.k0 = 0, tile.k_end = p.k;
    if (p.grouping == GROUP_DEPTH) tile.k0 = p.offsets[g], tile.k_end = p.offsets[g + 1];
    if (p.grouping == SPLIT_DEPTH) tile.k0 = g * p.k_chunk, tile.k_end = min(p.k, tile.k0 + p.k_chunk);
  }
  int mi, ni;
  if (p.m_fastest)
    ni = (int)index / m_tiles, mi = (int)index - ni * m_tiles;
  else
    mi = (int)index / n_tiles, ni = (int)index - mi * n_tiles;
  tile.m0 += (int64_t)mi * BM;
  tile.n0 = ni * BN;
  return true;
}

/* Tiles that find_tile can find at most: what a launcher plans for without knowing the offsets. */
template <int BM, int BN>
static inline int64_t most_tiles(const Product &p) {
  int64_t n_tiles = ceil_div(p.n, BN);
  if (p.grouping == GROUP_ROWS) return n_tiles * (ceil_div(p.m, BM) + p.groups);
  return n_tiles * ceil_div(p.m, BM) * p.groups;
}

/* ---- device side: epilogues ---------------------------------------------------------------------------------- */

template <typename T>
__device__ __forceinline__ void store_two(T *at, float x, float y, bool second);
template <>
__device__ __forceinline__ void store_two<float>(float *at, float x, float y, bool second) {
  if (second && ((uintptr_t)at & 7) == 0) {
    *reinterpret_cast<float2 *>(at) = make_float2(x, y);
  } else {
    at[0] = x;
    if (second) at[1] = y;
  }
}
template <>
__device__ __forceinline__ void store_two<bf16>(bf16 *at, float x, float y, bool second) {
  if (second && ((uintptr_t)at & 3) == 0) {
    *reinterpret_cast<uint32_t *>(at) = pack_bf16(x, y);
  } else {
    at[0] = __float2bfloat16_rn(x);
    if (second) at[1] = __float2bfloat16_rn(y);
  }
}
template <typename T>
__device__ __forceinline__ float2 load_two(const T *at, bool second) {
  return make_float2(to_float(at[0]), second ? to_float(at[1]) : 0.0f);
}
template <>
__device__ __forceinline__ float2 load_two<bf16>(const bf16 *at, bool second) {
  if (second && ((uintptr_t)at & 3) == 0) return unpack_bf16(*reinterpret_cast<const uint32_t *>(at));
  return make_float2(to_float(at[0]), second ? to_float(at[1]) : 0.0f);
}
template <>
__device__ __forceinline__ float2 load_two<float>(const float *at, bool second) {
  if (second && ((uintptr_t)at & 7) == 0) return *reinterpret_cast<const float2 *>(at);
  return make_float2(at[0], second ? at[1] : 0.0f);
}

/* Two neighbouring columns (column, column + 1) of one row. */
template <typename Out>
__device__ __forceinline__ void epilogue_store(const Product &p, const Tile &tile, int64_t row, int64_t column, float x, float y) {
  if (row >= tile.m_end || column >= p.n) return;
  bool second = column + 1 < p.n;
  Out *at = (Out *)p.c + tile.group * p.c_stride + row * p.ldc + column;
  x = fmaf(p.alpha, x, 0.0f), y = fmaf(p.alpha, y, 0.0f); /* -0 becomes 0 */
  if (p.beta != 0.0f) {
    float2 old = load_two<Out>(at, second);
    x += p.beta * old.x, y += p.beta * old.y;
  }
  store_two<Out>(at, x, y, second);
}

template <typename T>
__device__ __forceinline__ void epilogue_swiglu(const Product &p, const Tile &tile, int64_t row, int64_t column, float2 gate, float2 up) {
  if (row >= tile.m_end || column >= p.n) return;
  bool second = column + 1 < p.n;
  if (p.c) {
    T *at = (T *)p.c + row * 2 * p.n + column;
    store_two<T>(at, gate.x, gate.y, second);
    store_two<T>(at + p.n, up.x, up.y, second);
  }
  store_two<T>((T *)p.h + row * p.n + column, swiglu<T>(rounded<T>(gate.x), rounded<T>(up.x)),
               swiglu<T>(rounded<T>(gate.y), rounded<T>(up.y)), second);
}

/* Returns dh . h of the two columns. */
template <typename T>
__device__ __forceinline__ float epilogue_swiglu_backward(const Product &p, const Tile &tile, int64_t row, int64_t column, float dx,
                                                          float dy) {
  if (row >= tile.m_end || column >= p.n) return 0.0f;
  bool second = column + 1 < p.n;
  int64_t at = row * 2 * p.n + column;
  float w = p.slot_weight[row];
  float2 gate = load_two<T>((const T *)p.gate_up + at, second), up = load_two<T>((const T *)p.gate_up + at + p.n, second);
  float2 h = make_float2(rounded<T>(swiglu<T>(gate.x, up.x)), rounded<T>(swiglu<T>(gate.y, up.y)));
  float sx = sigmoid<T>(gate.x), sy = sigmoid<T>(gate.y), wx = w * dx, wy = w * dy;
  T *out = (T *)p.c + at;
  store_two<T>(out, wx * up.x * silu_derivative(gate.x, sx), wy * up.y * silu_derivative(gate.y, sy), second);
  store_two<T>(out + p.n, wx * gate.x * sx, wy * gate.y * sy, second);
  if (p.h) store_two<T>((T *)p.h + row * p.n + column, h.x, h.y, second);
  return second ? dx * h.x + dy * h.y : dx * h.x;
}
