/* product_small.cu: products of which one side is at most 16, so that moving the long operand is all the work: bf16, mma.sync from
 * registers, nothing of the operands in shared memory.
 *
 * Few rows (decoding; whole or by row groups), K-major: B is read once, 16 bytes a lane with several loads under way: the rows of A are
 * mma's m, 8 columns its n. A fragment's places in depth are permuted, alike for A and B, so that a lane's 16 bytes are two fragments. A
 * block's warps share the depth of the block's columns; their sums are added in order of the warps.
 * Few columns (the router's logits): the same with A and B exchanged and C stored transposed.
 * Few depths (the gradient through the router's logits): a warp keeps 64 columns of B and writes C, 16 bytes a lane, because mma's columns
 * are permuted: of 32 columns, a lane's results are 8 neighbours.
 */
#include "mma.cuh"
#include "product.cuh"

const int MOST_ROWS = 16, MOST_GROUPED = 64; /* beyond, the other cores are faster */
const int64_t STREAMED_ROWS = 512; /* of so many rows on few columns fill the chip without splitting the depth */
const int WARPS = 8, DEPTH = 32 /* of one step of a warp: two mma */;
const int THIN_WARPS = 4, THIN_COLUMNS = 64 /* of a warp */, THIN_TILES = 4 /* of 16 rows, a block's */;

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* Read once: past the first cache. */
__device__ __forceinline__ uint4 load_once(const bf16 *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

/* The group of rank `nth` among those with rows; false when there are fewer. Called by whole warps. */
__device__ __forceinline__ bool find_group(const Product &p, int nth, int &group, int64_t &first, int64_t &last) {
  int lane = threadIdx.x & 31;
  for (int base = 0; base < p.groups; base += 32) {
    int e = base + lane, a = 0, b = 0;
    if (e < p.groups) a = p.offsets[e], b = p.offsets[e + 1];
    unsigned filled = __ballot_sync(0xffffffffu, b > a);
    int count = __popc(filled);
    if (nth < count) {
      for (int i = 0; i < nth; i++) filled &= filled - 1;
      int at = __ffs(filled) - 1;
      group = base + at, first = __shfl_sync(0xffffffffu, a, at), last = __shfl_sync(0xffffffffu, b, at);
      return true;
    }
    nth -= count;
  }
  return false;
}

/* TILES * 8 columns a block (SWIGLU: half of them gate, half up), ROWS (8 or 16) rows at a time, STEPS steps of loads under way.
 * Transposed: C's rows are the columns here. */
template <typename Out, int TILES, int ROWS, int STEPS, bool Swiglu, bool Transposed>
__global__ void __launch_bounds__(WARPS * 32, ROWS == 8 && TILES < 4 ? 3 : 2) small_kernel(const Product p) {
  const int HALVES = ROWS / 8, COLUMNS = Swiglu ? TILES * 4 : TILES * 8;
  __shared__ float sums[WARPS][ROWS][TILES * 8 + (Transposed ? 2 : 0)]; /* 2: lanes of 16 rows in different banks */
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  Tile tile = {0, p.m, 0, p.k, (int)blockIdx.x * COLUMNS, 0};
  if (p.grouping == GROUP_ROWS && !find_group(p, blockIdx.y, tile.group, tile.m0, tile.m_end)) return;
  const int steps = (int)((p.k + DEPTH - 1) / DEPTH), each = (steps + WARPS - 1) / WARPS;
  const int first = warp * each, last = min(first + each, steps), k = (int)p.k;
  const bf16 *b[TILES];
#pragma unroll
  for (int n = 0; n < TILES; n++) {
    int64_t column = Swiglu ? tile.n0 + n % (TILES / 2) * 8 + g : tile.n0 + n * 8 + g;
    if (column >= p.n) column = p.n - 1; /* read, but not stored */
    if (Swiglu && n >= TILES / 2) column += p.n;
    b[n] = (const bf16 *)p.b + tile.group * p.b_stride + column * p.ldb + t * 8;
  }
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int64_t m0 = tile.m0; m0 < tile.m_end; m0 += ROWS) {
    const bf16 *a[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      int64_t row = m0 + h * 8 + g;
      bool inside = row < tile.m_end;
      if (inside && p.a_rows) {
        row = p.a_rows[row];
        inside = row >= 0 && row < p.a_row_count;
      }
      a[h] = inside ? (const bf16 *)p.a + row * p.lda + t * 8 : NULL;
    }
    float c[TILES][4] = {};
    for (int s = first; s < last; s += STEPS) {
      uint4 fb[STEPS][TILES], fa[STEPS][HALVES];
#pragma unroll
      for (int u = 0; u < STEPS; u++) {
        int d = (s + u) * DEPTH;
        bool inside = s + u < last && d + t * 8 < k;
#pragma unroll
        for (int n = 0; n < TILES; n++) fb[u][n] = inside ? load_once(b[n] + d) : zero;
      }
#pragma unroll
      for (int u = 0; u < STEPS; u++) {
        int d = (s + u) * DEPTH;
        bool inside = s + u < last && d + t * 8 < k;
#pragma unroll
        for (int h = 0; h < HALVES; h++) fa[u][h] = inside && a[h] ? *(const uint4 *)(a[h] + d) : zero;
      }
#pragma unroll
      for (int u = 0; u < STEPS; u++) {
        const uint4 low = fa[u][0], high = HALVES == 2 ? fa[u][HALVES - 1] : zero;
        const uint32_t a0[4] = {low.x, high.x, low.y, high.y}, a1[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          const uint32_t b0[2] = {fb[u][n].x, fb[u][n].y}, b1[2] = {fb[u][n].z, fb[u][n].w};
          mma16816(c[n], a0, b0);
          mma16816(c[n], a1, b1);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int h = 0; h < HALVES; h++)
        *(float2 *)&sums[warp][h * 8 + g][n * 8 + t * 2] = make_float2(c[n][2 * h], c[n][2 * h + 1]);
    __syncthreads();
    for (int i = threadIdx.x; Transposed && i < ROWS * COLUMNS; i += WARPS * 32) {
      const int row = i % ROWS, column = i / ROWS;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += sums[w][row][column];
      if (m0 + row >= tile.m_end || tile.n0 + column >= p.n) continue;
      Out *at = (Out *)p.c + (int64_t)(tile.n0 + column) * p.ldc + m0 + row;
      sum *= p.alpha;
      if (p.beta != 0.0f) sum += p.beta * to_float(*at);
      *at = from_float<Out>(sum);
    }
    for (int i = threadIdx.x; !Transposed && i < ROWS * COLUMNS / 2; i += WARPS * 32) {
      int row = i / (COLUMNS / 2), column = i % (COLUMNS / 2) * 2;
      float2 sum = make_float2(0.0f, 0.0f), up = sum;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float2 part = *(const float2 *)&sums[w][row][column];
        sum.x += part.x, sum.y += part.y;
        if (Swiglu) {
          part = *(const float2 *)&sums[w][row][COLUMNS + column];
          up.x += part.x, up.y += part.y;
        }
      }
      if (Swiglu)
        epilogue_swiglu<Out>(p, tile, m0 + row, tile.n0 + column, sum, up);
      else
        epilogue_store<Out>(p, tile, m0 + row, tile.n0 + column, sum.x, sum.y);
    }
    __syncthreads();
  }
}

/* 64 columns of each warp's depth-16 B stay in its registers while the block's rows of A pass. */
template <typename Out, bool BMN>
__global__ void __launch_bounds__(THIN_WARPS * 32) thin_kernel(const Product p) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, n = (int)p.n;
  const int n0 = ((int)blockIdx.y * THIN_WARPS + (threadIdx.x >> 5)) * THIN_COLUMNS;
  const int64_t m0 = (int64_t)blockIdx.x * THIN_TILES * 16;
  if (n0 >= n) return;
  const bool deep = p.k > 8; /* 16 depths, else 8 */
  uint32_t fa[THIN_TILES][4], fb[8][2];
#pragma unroll
  for (int i = 0; i < THIN_TILES; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = m0 + i * 16 + half * 8 + g;
      const uint32_t *at = (const uint32_t *)((const bf16 *)p.a + row * p.lda) + t;
      fa[i][half] = row < p.m ? at[0] : 0;
      fa[i][2 + half] = deep && row < p.m ? at[4] : 0;
    }
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int column = n0 + (j >> 2) * 32 + (g >> 1) * 8 + (j & 3) * 2 + (g & 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      fb[j][half] = 0;
      if (column >= n || (half == 1 && !deep)) continue;
      const int d = half * 8 + t * 2;
      if (BMN) {
        const uint16_t *at = (const uint16_t *)p.b + d * p.ldb + column;
        fb[j][half] = at[0] | (uint32_t)at[p.ldb] << 16;
      } else {
        fb[j][half] = *(const uint32_t *)((const bf16 *)p.b + column * p.ldb + d);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < THIN_TILES; i++)
#pragma unroll
    for (int part = 0; part < 2; part++) {
      float c[4][4] = {};
#pragma unroll
      for (int j = 0; j < 4; j++) mma16816(c[j], fa[i], fb[part * 4 + j]);
      const int column = n0 + part * 32 + t * 8;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t row = m0 + i * 16 + half * 8 + g;
        if (row >= p.m || column >= n) continue;
        constexpr int N = 16 / sizeof(Out);
#pragma unroll
        for (int first = 0; first < 8; first += N) {
          Pack<Out, N> out;
#pragma unroll
          for (int e = 0; e < N; e++) out.v[e] = from_float<Out>(p.alpha * c[(first + e) >> 1][half * 2 + (e & 1)]);
          store_pack<Out, N>((Out *)p.c + row * p.ldc + column + first, out);
        }
      }
    }
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

template <typename Out, int TILES, int STEPS, bool Swiglu>
static nn_status launch(nn_context *context, const Product &p, bool few) {
  int64_t groups = p.grouping == GROUP_ROWS ? (p.m < p.groups ? p.m : p.groups) : 1;
  dim3 grid((unsigned)ceil_div(p.n, Swiglu ? TILES * 4 : TILES * 8), (unsigned)groups);
  if (few)
    small_kernel<Out, TILES, 8, STEPS, Swiglu, false><<<grid, WARPS * 32, 0, context->stream>>>(p);
  else
    small_kernel<Out, TILES, 16, STEPS, Swiglu, false><<<grid, WARPS * 32, 0, context->stream>>>(p);
  return NN_OK;
}

/* C [m, few columns] as the transpose of B A^T. */
static nn_status few_columns(nn_context *context, const Product &p) {
  const int TILES = 4;
  Product q = p;
  q.a = p.b, q.lda = p.ldb, q.m = p.n;
  q.b = p.a, q.ldb = p.lda, q.n = p.m;
  NN_FOR_DTYPE(p.out_dtype, Out, small_kernel<Out, TILES, 16, 3, false, true><<<(unsigned)ceil_div(q.n, TILES * 8), WARPS * 32, 0, context->stream>>>(q););
  return NN_OK;
}

static nn_status few_depths(nn_context *context, const Product &p) {
  const dim3 grid((unsigned)ceil_div(p.m, THIN_TILES * 16), (unsigned)ceil_div(p.n, THIN_WARPS * THIN_COLUMNS));
  if (grid.y > 65535) return NN_ERROR_UNSUPPORTED;
  NN_FOR_DTYPE(p.out_dtype, Out, {
    if (p.b_mn)
      thin_kernel<Out, true><<<grid, THIN_WARPS * 32, 0, context->stream>>>(p);
    else
      thin_kernel<Out, false><<<grid, THIN_WARPS * 32, 0, context->stream>>>(p);
  });
  return NN_OK;
}

/* NN_ERROR_UNSUPPORTED, with nothing queued, where another core should do it. The operands are as loads_whole_chunks wants. */
nn_status nn_product_small(nn_context *context, const Product &p) {
  bool grouped = p.grouping == GROUP_ROWS, plain = p.grouping == WHOLE && p.groups == 1 && p.epilogue == STORE && !p.a_mn && !p.a_rows && !p.b_rows;
  if (plain && context->capability >= 80 && p.m > MOST_ROWS) {
    if (p.n <= MOST_ROWS && p.m >= STREAMED_ROWS && !p.b_mn && p.k > 0 && p.k < (1 << 30)) return few_columns(context, p);
    if ((p.k == 8 || p.k == 16) && p.beta == 0.0f && p.n % 8 == 0 && p.ldc % 8 == 0 && aligned16(p.c)) return few_depths(context, p);
  }
  if (p.a_mn || p.b_mn || p.b_rows || p.k >= (1 << 30) || p.k == 0 || context->capability < 80) return NN_ERROR_UNSUPPORTED;
  if (grouped ? p.m > MOST_GROUPED || p.groups > 65535 : p.grouping != WHOLE || p.groups != 1 || p.m > MOST_ROWS) return NN_ERROR_UNSUPPORTED;
  bool few = grouped || p.m <= 8; /* of so few slots a group seldom has more than 8 */
  if (p.epilogue == SWIGLU && grouped) return launch<bf16, 2, 3, true>(context, p, few);
  if (p.epilogue != STORE) return NN_ERROR_UNSUPPORTED;
  if (grouped) return p.out_dtype == NN_BF16 ? launch<bf16, 1, 6, false>(context, p, few) : NN_ERROR_UNSUPPORTED;
  bool wide = p.n >= 16384;
  NN_FOR_DTYPE(p.out_dtype, Out, return wide ? launch<Out, 2, 3, false>(context, p, few) : launch<Out, 1, 6, false>(context, p, few););
}
