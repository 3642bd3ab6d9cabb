/* rmsnorm.cu: root-mean-square norm, alone and fused with the residual addition, and the backwards. One warp a row: each row is
 * small enough that its second reading comes from the cache.
 * Zhang and Sennrich, arXiv 1910.07467.
 */
#include "common.cuh"

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

__global__ void add_partials_kernel(float *out, const float *partial, int chunks, int H) {
  int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= H) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int c = 0; c < chunks; c++) sum += partial[(int64_t)c * H + column];
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

static int64_t dweight_chunks(nn_context *context, int64_t rows) {
  int64_t chunks = ceil_div(rows, 64);
  return chunks < 128 ? chunks : 128;
}

template <typename T, bool Residual>
static nn_status run_backward(nn_context *context, void *dx, float *dweight, const void *dy, const void *dsum, const void *x,
                              const float *reciprocal, const void *weight, int64_t rows, int64_t H, const char *where) {
  int64_t chunks = dweight_chunks(context, rows), chunk_rows = ceil_div(rows, chunks);
  Scratch scratch(context);
  float *partial = scratch.take<float>(chunks * H);
  if (!scratch.fits())
    return nn_fail(context, NN_ERROR_WORKSPACE, "%s: needs %lld bytes of workspace, has %lld", where, (long long)scratch.need,
                   (long long)scratch.have);
  /* dx may be dy or dsum, so dweight comes first. */
  rmsnorm_dweight_kernel<T><<<dim3((unsigned)ceil_div(H, 32), (unsigned)chunks), dim3(32, 8), 0, context->stream>>>(
      partial, (const T *)dy, (const T *)x, reciprocal, rows, chunk_rows, (int)H);
  add_partials_kernel<<<(unsigned)ceil_div(H, 64), 64, 0, context->stream>>>(dweight, partial, (int)chunks, (int)H);
  unsigned blocks = (unsigned)ceil_div(rows, 4);
  const int N = 16 / sizeof(T);
  if (packs16(H, sizeof(T), dx, dy, dsum, x, weight))
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
