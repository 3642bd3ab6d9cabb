/* product_small.cu: products of few rows (decoding): bf16, K-major, whole or by row groups. Here reading B is all the work, so it is
 * read once, 16 bytes a lane with several loads under way, from memory into the registers of mma.sync: the rows of A are its m, 8
 * columns its n. A fragment's places in depth are permuted, alike for A and B, so that a lane's 16 bytes are two fragments. A block's
 * warps share the depth of the block's columns; their sums are added in order of the warps.
 */
#include "mma.cuh"
#include "product.cuh"

const int MOST_ROWS = 16, MOST_GROUPED = 64; /* beyond, the other cores are faster */
const int WARPS = 8, DEPTH = 32 /* of one step of a warp: two mma */;

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

/* TILES * 8 columns a block (SWIGLU: half of them gate, half up), ROWS (8 or 16) rows at a time, STEPS steps of loads under way. */
template <typename Out, int TILES, int ROWS, int STEPS, bool Swiglu>
__global__ void __launch_bounds__(WARPS * 32, ROWS == 8 && TILES < 4 ? 3 : 2) small_kernel(const Product p) {
  const int HALVES = ROWS / 8, COLUMNS = Swiglu ? TILES * 4 : TILES * 8;
  __shared__ float sums[WARPS][ROWS][TILES * 8];
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
    for (int i = threadIdx.x; i < ROWS * COLUMNS / 2; i += WARPS * 32) {
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

/* ---- launchers ----------------------------------------------------------------------------------------------- */

template <typename Out, int TILES, int STEPS, bool Swiglu>
static nn_status launch(nn_context *context, const Product &p, bool few) {
  int64_t groups = p.grouping == GROUP_ROWS ? (p.m < p.groups ? p.m : p.groups) : 1;
  dim3 grid((unsigned)ceil_div(p.n, Swiglu ? TILES * 4 : TILES * 8), (unsigned)groups);
  if (few)
    small_kernel<Out, TILES, 8, STEPS, Swiglu><<<grid, WARPS * 32, 0, context->stream>>>(p);
  else
    small_kernel<Out, TILES, 16, STEPS, Swiglu><<<grid, WARPS * 32, 0, context->stream>>>(p);
  return NN_OK;
}

/* NN_ERROR_UNSUPPORTED, with nothing queued, where another core should do it. The operands are as loads_whole_chunks wants. */
nn_status nn_product_small(nn_context *context, const Product &p) {
  bool grouped = p.grouping == GROUP_ROWS;
  if (p.a_mn || p.b_mn || p.b_rows || p.k >= (1 << 30) || p.k == 0 || context->capability < 80) return NN_ERROR_UNSUPPORTED;
  if (grouped ? p.m > MOST_GROUPED || p.groups > 65535 : p.grouping != WHOLE || p.groups != 1 || p.m > MOST_ROWS) return NN_ERROR_UNSUPPORTED;
  bool few = grouped || p.m <= 8; /* of so few slots a group seldom has more than 8 */
  if (p.epilogue == SWIGLU && grouped) return launch<bf16, 2, 3, true>(context, p, few);
  if (p.epilogue != STORE) return NN_ERROR_UNSUPPORTED;
  if (grouped) return p.out_dtype == NN_BF16 ? launch<bf16, 1, 6, false>(context, p, few) : NN_ERROR_UNSUPPORTED;
  bool wide = p.n >= 16384;
  NN_FOR_DTYPE(p.out_dtype, Out, return wide ? launch<Out, 2, 3, false>(context, p, few) : launch<Out, 1, 6, false>(context, p, few););
}
