/* rmsnorm.cu: root-mean-square norm, alone and fused with the residual addition, and the backwards. One warp a row: each row is
 * small enough that its second reading comes from the cache, or, in the backward of bf16, that a warp holds it in registers.
 * Zhang and Sennrich, arXiv 1910.07467.
 */
#include "chain.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* x, delta, sum, y [T, H]. Residual: sum = x + delta (rounded to T) is written and normalised; else x is. */
template <typename T, int N, bool Residual>
__global__ void rmsnorm_forward_kernel(T *sum, T *y, float *reciprocal, const T *x, const T *delta, const T *weight, int64_t rows, int H,
                                       float epsilon) {
  int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int lane = threadIdx.x & 31;
  if (row >= rows) return;
  x += row * H;
  y += row * H;
  if (Residual) delta += row * H, sum += row * H;
  float squares = 0.0f;
  for (int i = lane * N; i < H; i += 32 * N) {
    Pack<T, N> a = load_pack<T, N>(x + i);
    if (Residual) {
      Pack<T, N> b = load_pack<T, N>(delta + i);
#pragma unroll
      for (int j = 0; j < N; j++) a.v[j] = from_float<T>(to_float(a.v[j]) + to_float(b.v[j]));
      store_pack<T, N>(sum + i, a);
    }
#pragma unroll
    for (int j = 0; j < N; j++) squares += to_float(a.v[j]) * to_float(a.v[j]);
  }
  squares = warp_sum(squares);
  float r = 1.0f / sqrtf(squares / (float)H + epsilon);
  if (lane == 0) reciprocal[row] = r;
  for (int i = lane * N; i < H; i += 32 * N) {
    Pack<T, N> a = Residual ? load_pack<T, N>(sum + i) : load_pack<T, N>(x + i), w = load_pack<T, N>(weight + i);
#pragma unroll
    for (int j = 0; j < N; j++) a.v[j] = from_float<T>(to_float(a.v[j]) * r * to_float(w.v[j]));
    store_pack<T, N>(y + i, a);
  }
}

/* dx = (dsum +) r * (w dy - x r^2 mean(w dy x)). */
template <typename T, int N, bool Residual>
__global__ void rmsnorm_backward_kernel(T *dx, const T *dy, const T *dsum, const T *x, const float *reciprocal, const T *weight,
                                        int64_t rows, int H) {
  int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int lane = threadIdx.x & 31;
  if (row >= rows) return;
  int64_t base = row * H;
  float r = reciprocal[row], dot = 0.0f;
  for (int i = lane * N; i < H; i += 32 * N) {
    Pack<T, N> a = load_pack<T, N>(x + base + i), d = load_pack<T, N>(dy + base + i), w = load_pack<T, N>(weight + i);
#pragma unroll
    for (int j = 0; j < N; j++) dot += to_float(d.v[j]) * to_float(w.v[j]) * to_float(a.v[j]);
  }
  float scale = warp_sum(dot) * r * r / (float)H;
  for (int i = lane * N; i < H; i += 32 * N) {
    Pack<T, N> a = load_pack<T, N>(x + base + i), d = load_pack<T, N>(dy + base + i), w = load_pack<T, N>(weight + i), s = d;
    if (Residual) s = load_pack<T, N>(dsum + base + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
      float value = r * (to_float(d.v[j]) * to_float(w.v[j]) - to_float(a.v[j]) * scale);
      d.v[j] = from_float<T>(Residual ? to_float(s.v[j]) + value : value);
    }
    store_pack<T, N>(dx + base + i, d);
  }
}

/* partial[chunk, h] = sum over the chunk's rows of dy * x * reciprocal. A block has 32 columns by 8 row lanes. */
template <typename T>
__global__ void rmsnorm_dweight_kernel(float *partial, const T *dy, const T *x, const float *reciprocal, int64_t rows, int64_t chunk_rows,
                                       int H) {
  __shared__ float shared[8][33];
  int column = blockIdx.x * 32 + threadIdx.x;
  int64_t first = blockIdx.y * chunk_rows, last = min(first + chunk_rows, rows);
  float sum = 0.0f;
  if (column < H)
    for (int64_t row = first + threadIdx.y; row < last; row += 8)
      sum += to_float(dy[row * H + column]) * to_float(x[row * H + column]) * reciprocal[row];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < H) {
    for (int i = 1; i < 8; i++) sum += shared[i][threadIdx.x];
    partial[(int64_t)blockIdx.y * H + column] = sum;
  }
}

const int HELD_PIECES = 4 /* of 8 columns a lane: rows of up to 1024 columns */, HELD_WARPS = 8;

/* Keeps the compiler from holding the unpacked floats as well. */
__device__ __forceinline__ void hold(uint4 &v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

/* What a lane holds of a row. */
template <int PIECES>
struct HeldRow {
  uint4 a[PIECES], d[PIECES], s[PIECES]; /* x, dy, dsum */
  float r;
};
template <int PIECES, bool Residual>
__device__ __forceinline__ void fetch_row(HeldRow<PIECES> &held, const bf16 *dy, const bf16 *dsum, const bf16 *x, const float *reciprocal,
                                          int64_t row, int H) {
  const int lane = threadIdx.x & 31;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  held.r = reciprocal[row];
#pragma unroll
  for (int c = 0; c < PIECES; c++) {
    const int64_t at = row * H + (c * 32 + lane) * 8;
    const bool inside = (c * 32 + lane) * 8 < H;
    held.a[c] = inside ? *reinterpret_cast<const uint4 *>(x + at) : zero, held.d[c] = inside ? *reinterpret_cast<const uint4 *>(dy + at) : zero;
    held.s[c] = Residual && inside ? *reinterpret_cast<const uint4 *>(dsum + at) : zero;
  }
}

/* dx as above, and partial[block, h] = sum over the block's rows of dy * x * reciprocal, each row read once. A warp has `warp_rows` rows, one
 * after the other, the next on its way while one is worked on; dx may be dy or dsum, because a row is held before it is written. */
template <int PIECES, bool Residual>
__global__ void __launch_bounds__(HELD_WARPS * 32, PIECES < HELD_PIECES ? 2 : 1)
    rmsnorm_backward_held_kernel(bf16 *dx, float *partial, const bf16 *dy, const bf16 *dsum, const bf16 *x, const float *reciprocal,
                                 const bf16 *weight, int64_t rows, int64_t warp_rows, int H) {
  __shared__ __align__(16) float shared[HELD_WARPS][PIECES * 256];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t first = ((int64_t)blockIdx.x * HELD_WARPS + warp) * warp_rows, last = min(first + warp_rows, rows);
  const uint4 zero = make_uint4(0, 0, 0, 0);
  uint4 w[PIECES];
  float sums[PIECES][8] = {};
  HeldRow<PIECES> next;
  let_next_start();
  if (first < last) fetch_row<PIECES, Residual>(next, dy, dsum, x, reciprocal, first, H);
#pragma unroll
  for (int c = 0; c < PIECES; c++) w[c] = (c * 32 + lane) * 8 < H ? *reinterpret_cast<const uint4 *>(weight + (c * 32 + lane) * 8) : zero;
  for (int64_t row = first; row < last; row++) {
    HeldRow<PIECES> held = next;
    const float r = held.r;
    float dot = 0.0f;
    if (row + 1 < last) fetch_row<PIECES, Residual>(next, dy, dsum, x, reciprocal, row + 1, H);
#pragma unroll
    for (int c = 0; c < PIECES; c++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 xs = unpack_bf16((&held.a[c].x)[j]), ds = unpack_bf16((&held.d[c].x)[j]), ws = unpack_bf16((&w[c].x)[j]);
        const float low = ds.x * xs.x, high = ds.y * xs.y;
        sums[c][2 * j] += low * r, sums[c][2 * j + 1] += high * r;
        dot += low * ws.x;
        dot += high * ws.y;
      }
    const float scale = warp_sum(dot) * r * r / (float)H;
#pragma unroll
    for (int c = 0; c < PIECES; c++) {
      hold(held.a[c]), hold(held.d[c]), hold(w[c]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 xs = unpack_bf16((&held.a[c].x)[j]), ds = unpack_bf16((&held.d[c].x)[j]), ws = unpack_bf16((&w[c].x)[j]);
        const float2 past = unpack_bf16((&held.s[c].x)[j]);
        const float low = r * (ds.x * ws.x - xs.x * scale), high = r * (ds.y * ws.y - xs.y * scale);
        (&held.d[c].x)[j] = Residual ? pack_bf16(past.x + low, past.y + high) : pack_bf16(low, high);
      }
      if ((c * 32 + lane) * 8 < H) *reinterpret_cast<uint4 *>(dx + row * H + (c * 32 + lane) * 8) = held.d[c];
    }
  }
#pragma unroll
  for (int c = 0; c < PIECES; c++)
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      *reinterpret_cast<float4 *>(&shared[warp][(c * 32 + lane) * 8 + j]) = make_float4(sums[c][j], sums[c][j + 1], sums[c][j + 2], sums[c][j + 3]);
  __syncthreads();
  for (int column = threadIdx.x; column < H; column += HELD_WARPS * 32) {
    float sum = shared[0][column];
#pragma unroll
    for (int i = 1; i < HELD_WARPS; i++) sum += shared[i][column];
    partial[(int64_t)blockIdx.x * H + column] = sum;
  }
}

/* out += the chunks' sums: 8 lanes of a column take every eighth chunk each, then they are added in their order. A block has 32 columns. */
__global__ void __launch_bounds__(256) add_partials_kernel(float *out, const float *partial, int chunks, int H) {
  __shared__ float shared[8][32];
  const int column = blockIdx.x * 32 + (threadIdx.x & 31), row = threadIdx.x >> 5;
  float sum = 0.0f;
  wait_for_previous();
  if (column < H) {
#pragma unroll 8
    for (int c = row; c < chunks; c += 8) sum += __ldcg(partial + (int64_t)c * H + column);
  }
  shared[row][threadIdx.x & 31] = sum;
  __syncthreads();
  if (row > 0 || column >= H) return;
  for (int i = 1; i < 8; i++) sum += shared[i][threadIdx.x];
  out[column] += sum;
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

static bool packs16(int64_t H, int size, const void *a, const void *b, const void *c, const void *d, const void *e) {
  return H % (16 / size) == 0 && aligned16(a) && aligned16(b) && aligned16(c) && aligned16(d) && aligned16(e);
}

template <typename T, bool Residual>
static void run_forward(nn_context *context, void *sum, void *y, float *reciprocal, const void *x, const void *delta, const void *weight,
                        int64_t rows, int64_t H, float epsilon) {
  unsigned blocks = (unsigned)ceil_div(rows, 4);
  const int N = 16 / sizeof(T);
  if (packs16(H, sizeof(T), sum, y, x, delta, weight))
    rmsnorm_forward_kernel<T, N, Residual><<<blocks, 128, 0, context->stream>>>((T *)sum, (T *)y, reciprocal, (const T *)x,
                                                                                (const T *)delta, (const T *)weight, rows, (int)H, epsilon);
  else
    rmsnorm_forward_kernel<T, 1, Residual><<<blocks, 128, 0, context->stream>>>((T *)sum, (T *)y, reciprocal, (const T *)x,
                                                                                (const T *)delta, (const T *)weight, rows, (int)H, epsilon);
}

const int64_t MOST_HELD_CHUNKS = 264; /* two blocks for each multiprocessor of an H200; workspace.cu knows it too */

static int64_t dweight_chunks(int64_t rows, int64_t most) {
  int64_t chunks = ceil_div(rows, 64);
  return chunks < most ? chunks : most;
}

/* The one-pass kernel for this row length. Blocks of 64 rows at least, and no more of them than the workspace has room for. */
template <bool Residual>
static nn_status run_held(nn_context *context, bf16 *dx, float *dweight, float *partial, const bf16 *dy, const bf16 *dsum, const bf16 *x,
                          const float *reciprocal, const bf16 *weight, int64_t rows, int64_t H, int64_t chunks, const char *where) {
  const int64_t warp_rows = ceil_div(rows, chunks * HELD_WARPS);
  const unsigned blocks = (unsigned)ceil_div(rows, warp_rows * HELD_WARPS);
  auto kernel = H <= 256 ? rmsnorm_backward_held_kernel<1, Residual>
                : H <= 512 ? rmsnorm_backward_held_kernel<2, Residual>
                : H <= 768 ? rmsnorm_backward_held_kernel<3, Residual> : rmsnorm_backward_held_kernel<HELD_PIECES, Residual>;
  kernel<<<blocks, HELD_WARPS * 32, 0, context->stream>>>(dx, partial, dy, dsum, x, reciprocal, weight, rows, warp_rows, (int)H);
  NN_TRY(launch_chained(context, where, add_partials_kernel, dim3((unsigned)ceil_div(H, 32)), 256, 0, dweight, partial, (int)blocks, (int)H));
  return nn_cuda_status(context, cudaGetLastError(), where);
}

template <typename T, bool Residual>
static nn_status run_backward(nn_context *context, void *dx, float *dweight, const void *dy, const void *dsum, const void *x,
                              const float *reciprocal, const void *weight, int64_t rows, int64_t H, const char *where) {
  const int N = 16 / sizeof(T);
  const bool packs = packs16(H, sizeof(T), dx, dy, dsum, x, weight), holds = packs && sizeof(T) == 2 && H <= HELD_PIECES * 256;
  int64_t chunks = dweight_chunks(rows, holds ? MOST_HELD_CHUNKS : 128), chunk_rows = ceil_div(rows, chunks);
  Scratch scratch(context);
  float *partial = scratch.take<float>(chunks * H);
  if (!scratch.fits())
    return nn_fail(context, NN_ERROR_WORKSPACE, "%s: needs %lld bytes of workspace, has %lld", where, (long long)scratch.need,
                   (long long)scratch.have);
  if (holds)
    return run_held<Residual>(context, (bf16 *)dx, dweight, partial, (const bf16 *)dy, (const bf16 *)dsum, (const bf16 *)x, reciprocal,
                              (const bf16 *)weight, rows, H, chunks, where);
  /* dx may be dy or dsum, so dweight comes first. */
  rmsnorm_dweight_kernel<T><<<dim3((unsigned)ceil_div(H, 32), (unsigned)chunks), dim3(32, 8), 0, context->stream>>>(
      partial, (const T *)dy, (const T *)x, reciprocal, rows, chunk_rows, (int)H);
  add_partials_kernel<<<(unsigned)ceil_div(H, 32), 256, 0, context->stream>>>(dweight, partial, (int)chunks, (int)H);
  unsigned blocks = (unsigned)ceil_div(rows, 4);
  if (packs)
    rmsnorm_backward_kernel<T, N, Residual><<<blocks, 128, 0, context->stream>>>((T *)dx, (const T *)dy, (const T *)dsum, (const T *)x,
                                                                                 reciprocal, (const T *)weight, rows, (int)H);
  else
    rmsnorm_backward_kernel<T, 1, Residual><<<blocks, 128, 0, context->stream>>>((T *)dx, (const T *)dy, (const T *)dsum, (const T *)x,
                                                                                 reciprocal, (const T *)weight, rows, (int)H);
  return nn_cuda_status(context, cudaGetLastError(), where);
}

extern "C" {

nn_status nn_rmsnorm_forward(nn_context *context, void *y, float *reciprocal, const void *x, const void *weight, int64_t T, int64_t H,
                             float epsilon, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && H >= 0 && H < (1 << 30) && valid(dtype));
  if (T > 0 && H > 0)
    NN_FOR_DTYPE(dtype, X, run_forward<X, false>(context, NULL, y, reciprocal, x, NULL, weight, T, H, epsilon););
  NN_LEAVE(context);
}

nn_status nn_rmsnorm_residual_forward(nn_context *context, void *sum, void *y, float *reciprocal, const void *x, const void *delta,
                                      const void *weight, int64_t T, int64_t H, float epsilon, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && H >= 0 && H < (1 << 30) && valid(dtype));
  if (T > 0 && H > 0) NN_FOR_DTYPE(dtype, X, run_forward<X, true>(context, sum, y, reciprocal, x, delta, weight, T, H, epsilon););
  NN_LEAVE(context);
}

nn_status nn_rmsnorm_backward(nn_context *context, void *dx, float *dweight, const void *dy, const void *x, const float *reciprocal,
                              const void *weight, int64_t T, int64_t H, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && H >= 0 && H < (1 << 30) && valid(dtype));
  if (T > 0 && H > 0)
    NN_FOR_DTYPE(dtype, X, return run_backward<X, false>(context, dx, dweight, dy, NULL, x, reciprocal, weight, T, H, __func__););
  return NN_OK;
}

nn_status nn_rmsnorm_residual_backward(nn_context *context, void *dx, float *dweight, const void *dy, const void *dsum, const void *sum,
                                       const float *reciprocal, const void *weight, int64_t T, int64_t H, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && H >= 0 && H < (1 << 30) && valid(dtype));
  if (T > 0 && H > 0)
    NN_FOR_DTYPE(dtype, X, return run_backward<X, true>(context, dx, dweight, dy, dsum, sum, reciprocal, weight, T, H, __func__););
  return NN_OK;
}

} /* extern "C" */
