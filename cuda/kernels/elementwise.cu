/* elementwise.cu: kernels with one output element per input element, sums in float64 and digests. All are bound by memory:
 * 16 bytes an access, a grid-stride loop, scalar accesses where a slice is not aligned. Compiled without contraction
 * (build: -fmad=false), because nn_random.h wants it.
 */
#include "../include/nn_halves.h"
#include "../include/nn_random.h"
#include "common.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

struct SiluForward {
  __device__ float operator()(float x, float, float) const { return x * sigmoid<float>(x); }
};
struct SiluBackward { /* a = dy, b = x */
  __device__ float operator()(float dy, float x, float) const { return dy * silu_derivative(x, sigmoid<float>(x)); }
};
struct Add {
  __device__ float operator()(float a, float b, float) const { return a + b; }
};
struct Mul {
  __device__ float operator()(float a, float b, float) const { return a * b; }
};
struct Scale {
  __device__ float operator()(float a, float, float factor) const { return a * factor; }
};

/* y[i] = operation(a[i], b[i], scalar), N elements an access; the last n % N one by one. Y, A element types. */
template <typename Operation, typename Y, typename A, int N, bool Binary>
__global__ void elementwise_kernel(Y *y, const A *a, const A *b, int64_t n, float scalar) {
  Operation operation;
  int64_t packs = n / N, stride = (int64_t)gridDim.x * blockDim.x, first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < packs; i += stride) {
    Pack<A, N> pa = load_pack<A, N>(a + i * N), pb = Binary ? load_pack<A, N>(b + i * N) : pa;
    Pack<Y, N> py;
#pragma unroll
    for (int j = 0; j < N; j++) py.v[j] = from_float<Y>(operation(to_float(pa.v[j]), to_float(pb.v[j]), scalar));
    store_pack<Y, N>(y + i * N, py);
  }
  for (int64_t i = packs * N + first; i < n; i += stride)
    y[i] = from_float<Y>(operation(to_float(a[i]), Binary ? to_float(b[i]) : 0.0f, scalar));
}

struct Cast {
  __device__ float operator()(float a, float, float) const { return a; }
};

/* x float32 [n] -> its halves, N elements an access; the last n % N one by one. */
template <int N>
__global__ void split_kernel(uint16_t *high, uint16_t *low, const uint32_t *x, int64_t n) {
  int64_t packs = n / N, stride = (int64_t)gridDim.x * blockDim.x, first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < packs; i += stride) {
    Pack<uint32_t, N> bits = load_pack<uint32_t, N>(x + i * N);
    Pack<uint16_t, N> h, l;
#pragma unroll
    for (int j = 0; j < N; j++) {
      nn_halves halves = nn_halves_of(bits.v[j]);
      h.v[j] = halves.high, l.v[j] = halves.low;
    }
    store_pack<uint16_t, N>(high + i * N, h);
    store_pack<uint16_t, N>(low + i * N, l);
  }
  for (int64_t i = packs * N + first; i < n; i += stride) {
    nn_halves halves = nn_halves_of(x[i]);
    high[i] = halves.high, low[i] = halves.low;
  }
}

/* The inverse. */
template <int N>
__global__ void join_kernel(uint32_t *x, const uint16_t *high, const uint16_t *low, int64_t n) {
  int64_t packs = n / N, stride = (int64_t)gridDim.x * blockDim.x, first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < packs; i += stride) {
    Pack<uint16_t, N> h = load_pack<uint16_t, N>(high + i * N), l = load_pack<uint16_t, N>(low + i * N);
    Pack<uint32_t, N> bits;
#pragma unroll
    for (int j = 0; j < N; j++) bits.v[j] = nn_halves_joined(h.v[j], l.v[j]);
    store_pack<uint32_t, N>(x + i * N, bits);
  }
  for (int64_t i = packs * N + first; i < n; i += stride) x[i] = nn_halves_joined(high[i], low[i]);
}

/* gate_up [rows, 2F] -> h [rows, F], N columns a thread. */
template <typename T, int N>
__global__ void swiglu_forward_kernel(T *h, const T *gate_up, int64_t rows, int64_t F) {
  int64_t packs = F / N, total = rows * packs;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (int64_t)gridDim.x * blockDim.x) {
    int64_t row = i / packs, column = (i - row * packs) * N;
    Pack<T, N> gate = load_pack<T, N>(gate_up + row * 2 * F + column), up = load_pack<T, N>(gate_up + row * 2 * F + F + column), out;
#pragma unroll
    for (int j = 0; j < N; j++) out.v[j] = from_float<T>(swiglu<T>(to_float(gate.v[j]), to_float(up.v[j])));
    store_pack<T, N>(h + row * F + column, out);
  }
}

template <typename T, int N>
__global__ void swiglu_backward_kernel(T *dgate_up, const T *dh, const T *gate_up, int64_t rows, int64_t F) {
  int64_t packs = F / N, total = rows * packs;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (int64_t)gridDim.x * blockDim.x) {
    int64_t row = i / packs, column = (i - row * packs) * N, at = row * 2 * F + column;
    Pack<T, N> gate = load_pack<T, N>(gate_up + at), up = load_pack<T, N>(gate_up + at + F), d = load_pack<T, N>(dh + row * F + column);
    Pack<T, N> dgate, dup;
#pragma unroll
    for (int j = 0; j < N; j++) {
      float g = to_float(gate.v[j]), u = to_float(up.v[j]), dy = to_float(d.v[j]), s = sigmoid<T>(g);
      dgate.v[j] = from_float<T>(dy * u * silu_derivative(g, s));
      dup.v[j] = from_float<T>(dy * (g * s));
    }
    store_pack<T, N>(dgate_up + at, dgate);
    store_pack<T, N>(dgate_up + at + F, dup);
  }
}

/* One chunk of 4096 elements for each 64 lanes: the order that nn.h gives for nn_grad_norm. X is float (squared if Square) at the
 * first level and double above it. */
template <typename X, bool Square>
__global__ void chunk_sum_kernel(double *out, const X *x, int64_t n) {
  __shared__ double lanes[4][64];
  int lane = threadIdx.x & 63, part = threadIdx.x >> 6;
  int64_t chunk = (int64_t)blockIdx.x * 4 + part, base = chunk * 4096;
  double sum = 0.0;
  if (base + 4096 <= n) {
#pragma unroll 16
    for (int i = 0; i < 64; i++) {
      double value = (double)x[base + i * 64 + lane];
      sum += Square ? value * value : value;
    }
  } else {
    for (int64_t i = base + lane; i < n; i += 64) {
      double value = (double)x[i];
      sum += Square ? value * value : value;
    }
  }
  lanes[part][lane] = sum;
  for (int half = 32; half > 0; half >>= 1) {
    __syncthreads();
    if (lane < half) lanes[part][lane] += lanes[part][lane + half];
  }
  if (lane == 0 && base < n) out[chunk] = lanes[part][0];
}

/* Where a digest's words come from. */
struct Words {
  const uint32_t *x;
  __device__ uint32_t operator[](int64_t i) const { return x[i]; }
};
struct JoinedHalves {
  const uint16_t *high, *low;
  __device__ uint32_t operator[](int64_t i) const { return nn_halves_joined(high[i], low[i]); }
};

template <typename Source>
__global__ void digest_kernel(unsigned long long *digest, const Source x, int64_t words) {
  __shared__ unsigned long long part[2][8];
  unsigned long long a = 0, b = 0;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (int64_t)gridDim.x * blockDim.x) {
    uint32_t word = x[i];
    a += nn_digest_term(word, (uint64_t)i, NN_DIGEST_STRIDE_0);
    b += nn_digest_term(word, (uint64_t)i, NN_DIGEST_STRIDE_1);
  }
  for (int i = 16; i > 0; i >>= 1) {
    a += __shfl_xor_sync(0xffffffffu, a, i);
    b += __shfl_xor_sync(0xffffffffu, b, i);
  }
  if ((threadIdx.x & 31) == 0) part[0][threadIdx.x >> 5] = a, part[1][threadIdx.x >> 5] = b;
  __syncthreads();
  if (threadIdx.x < 2) {
    unsigned long long sum = 0;
    for (int i = 0; i < 8; i++) sum += part[threadIdx.x][i];
    atomicAdd(digest + threadIdx.x, sum); /* integers: any order gives the same sum */
  }
}

__global__ void random_normal_kernel(float *x, int64_t n, uint64_t seed, uint64_t stream, int64_t offset, float deviation) {
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
    x[i] = (float)((double)deviation * nn_random_normal_at(seed, stream, (uint64_t)(offset + i)));
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

static unsigned grid_for(nn_context *context, int64_t items, int threads) {
  int64_t blocks = ceil_div(items, threads), most = (int64_t)context->multiprocessors * 16;
  return (unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

template <typename Operation, bool Binary, typename Y, typename A>
static void run_elementwise(nn_context *context, void *y, const void *a, const void *b, int64_t n, float scalar) {
  const int N = 16 / (sizeof(A) > sizeof(Y) ? sizeof(A) : sizeof(Y));
  if (aligned16(y) && aligned16(a) && (!Binary || aligned16(b)))
    elementwise_kernel<Operation, Y, A, N, Binary><<<grid_for(context, ceil_div(n, N), 256), 256, 0, context->stream>>>(
        (Y *)y, (const A *)a, (const A *)b, n, scalar);
  else
    elementwise_kernel<Operation, Y, A, 1, Binary><<<grid_for(context, n, 256), 256, 0, context->stream>>>(
        (Y *)y, (const A *)a, (const A *)b, n, scalar);
}

template <typename Source>
static nn_status run_digest(nn_context *context, uint64_t *digest, const Source &source, int64_t words) {
  NN_CUDA(context, cudaMemsetAsync(digest, 0, 16, context->stream));
  if (words > 0)
    digest_kernel<<<grid_for(context, ceil_div(words, 4), 256), 256, 0, context->stream>>>((unsigned long long *)digest, source, words);
  NN_LEAVE(context);
}

extern "C" {

nn_status nn_silu_forward(nn_context *context, void *y, const void *x, int64_t n, nn_dtype dtype) {
  NN_ENTER(context, n >= 0 && valid(dtype));
  if (n > 0) NN_FOR_DTYPE(dtype, T, run_elementwise<SiluForward, false, T, T>(context, y, x, NULL, n, 0.0f););
  NN_LEAVE(context);
}

nn_status nn_silu_backward(nn_context *context, void *dx, const void *dy, const void *x, int64_t n, nn_dtype dtype) {
  NN_ENTER(context, n >= 0 && valid(dtype));
  if (n > 0) NN_FOR_DTYPE(dtype, T, run_elementwise<SiluBackward, true, T, T>(context, dx, dy, x, n, 0.0f););
  NN_LEAVE(context);
}

nn_status nn_add(nn_context *context, void *y, const void *a, const void *b, int64_t n, nn_dtype dtype) {
  NN_ENTER(context, n >= 0 && valid(dtype));
  if (n > 0) NN_FOR_DTYPE(dtype, T, run_elementwise<Add, true, T, T>(context, y, a, b, n, 0.0f););
  NN_LEAVE(context);
}

nn_status nn_mul(nn_context *context, void *y, const void *a, const void *b, int64_t n, nn_dtype dtype) {
  NN_ENTER(context, n >= 0 && valid(dtype));
  if (n > 0) NN_FOR_DTYPE(dtype, T, run_elementwise<Mul, true, T, T>(context, y, a, b, n, 0.0f););
  NN_LEAVE(context);
}

nn_status nn_scale(nn_context *context, void *y, const void *x, int64_t n, float factor, nn_dtype dtype) {
  NN_ENTER(context, n >= 0 && valid(dtype));
  if (n > 0) NN_FOR_DTYPE(dtype, T, run_elementwise<Scale, false, T, T>(context, y, x, NULL, n, factor););
  NN_LEAVE(context);
}

nn_status nn_cast(nn_context *context, void *y, const void *x, int64_t n, nn_dtype out_dtype, nn_dtype dtype) {
  NN_ENTER(context, n >= 0 && valid(dtype) && valid(out_dtype));
  if (n > 0)
    NN_FOR_DTYPE(dtype, T, NN_FOR_DTYPE(out_dtype, Y, run_elementwise<Cast, false, Y, T>(context, y, x, NULL, n, 0.0f);););
  NN_LEAVE(context);
}

nn_status nn_split(nn_context *context, void *high, uint16_t *low, const float *x, int64_t n) {
  NN_ENTER(context, n >= 0);
  if (n > 0) {
    const uint32_t *bits = (const uint32_t *)x;
    if (aligned16(high) && aligned16(low) && aligned16(x))
      split_kernel<4><<<grid_for(context, ceil_div(n, 4), 256), 256, 0, context->stream>>>((uint16_t *)high, low, bits, n);
    else
      split_kernel<1><<<grid_for(context, n, 256), 256, 0, context->stream>>>((uint16_t *)high, low, bits, n);
  }
  NN_LEAVE(context);
}

nn_status nn_join(nn_context *context, float *x, const void *high, const uint16_t *low, int64_t n) {
  NN_ENTER(context, n >= 0);
  if (n > 0) {
    const uint16_t *h = (const uint16_t *)high;
    if (aligned16(x) && aligned16(high) && aligned16(low))
      join_kernel<4><<<grid_for(context, ceil_div(n, 4), 256), 256, 0, context->stream>>>((uint32_t *)x, h, low, n);
    else
      join_kernel<1><<<grid_for(context, n, 256), 256, 0, context->stream>>>((uint32_t *)x, h, low, n);
  }
  NN_LEAVE(context);
}

nn_status nn_swiglu_forward(nn_context *context, void *h, const void *gate_up, int64_t rows, int64_t F, nn_dtype dtype) {
  NN_ENTER(context, rows >= 0 && F >= 0 && valid(dtype));
  if (rows > 0 && F > 0)
    NN_FOR_DTYPE(dtype, T, {
      const int N = 16 / sizeof(T);
      if (F % N == 0 && aligned16(h) && aligned16(gate_up))
        swiglu_forward_kernel<T, N><<<grid_for(context, rows * F / N, 256), 256, 0, context->stream>>>((T *)h, (const T *)gate_up, rows, F);
      else
        swiglu_forward_kernel<T, 1><<<grid_for(context, rows * F, 256), 256, 0, context->stream>>>((T *)h, (const T *)gate_up, rows, F);
    });
  NN_LEAVE(context);
}

nn_status nn_swiglu_backward(nn_context *context, void *dgate_up, const void *dh, const void *gate_up, int64_t rows, int64_t F,
                             nn_dtype dtype) {
  NN_ENTER(context, rows >= 0 && F >= 0 && valid(dtype));
  if (rows > 0 && F > 0)
    NN_FOR_DTYPE(dtype, T, {
      const int N = 16 / sizeof(T);
      if (F % N == 0 && aligned16(dgate_up) && aligned16(dh) && aligned16(gate_up))
        swiglu_backward_kernel<T, N><<<grid_for(context, rows * F / N, 256), 256, 0, context->stream>>>(
            (T *)dgate_up, (const T *)dh, (const T *)gate_up, rows, F);
      else
        swiglu_backward_kernel<T, 1><<<grid_for(context, rows * F, 256), 256, 0, context->stream>>>(
            (T *)dgate_up, (const T *)dh, (const T *)gate_up, rows, F);
    });
  NN_LEAVE(context);
}

/* Chunks of chunks until one number is left; the levels lie one after the other in the workspace. */
static nn_status sum_in_order(nn_context *context, double *out, const float *x, int64_t n, bool square, const char *where) {
  if (n == 0) {
    NN_CUDA(context, cudaMemsetAsync(out, 0, sizeof(double), context->stream));
    return NN_OK;
  }
  Scratch scratch(context);
  int64_t count = ceil_div(n, 4096);
  double *level = count == 1 ? out : scratch.take<double>(count), *next = NULL;
  for (int64_t c = count; c > 1; c = ceil_div(c, 4096)) scratch.take<double>(ceil_div(c, 4096));
  if (!scratch.fits())
    return nn_fail(context, NN_ERROR_WORKSPACE, "%s: needs %lld bytes of workspace, has %lld", where, (long long)scratch.need,
                   (long long)scratch.have);
  unsigned blocks = (unsigned)ceil_div(count, 4);
  if (square)
    chunk_sum_kernel<float, true><<<blocks, 256, 0, context->stream>>>(level, x, n);
  else
    chunk_sum_kernel<float, false><<<blocks, 256, 0, context->stream>>>(level, x, n);
  while (count > 1) {
    int64_t above = ceil_div(count, 4096);
    next = above == 1 ? out : (double *)((char *)level + (count * 8 + 255) / 256 * 256);
    chunk_sum_kernel<double, false><<<(unsigned)ceil_div(above, 4), 256, 0, context->stream>>>(next, level, count);
    level = next;
    count = above;
  }
  return nn_cuda_status(context, cudaGetLastError(), where);
}

nn_status nn_sum(nn_context *context, double *out, const float *x, int64_t n) {
  NN_ENTER(context, n >= 0);
  return sum_in_order(context, out, x, n, false, __func__);
}

nn_status nn_grad_norm(nn_context *context, double *sum_of_squares, const float *gradient, int64_t n) {
  NN_ENTER(context, n >= 0);
  return sum_in_order(context, sum_of_squares, gradient, n, true, __func__);
}

nn_status nn_digest(nn_context *context, uint64_t *digest, const void *x, int64_t words) {
  NN_ENTER(context, words >= 0);
  return run_digest(context, digest, Words{(const uint32_t *)x}, words);
}

nn_status nn_digest_halves(nn_context *context, uint64_t *digest, const void *high, const uint16_t *low, int64_t n) {
  NN_ENTER(context, n >= 0);
  return run_digest(context, digest, JoinedHalves{(const uint16_t *)high, low}, n);
}

nn_status nn_random_normal(nn_context *context, float *x, int64_t n, uint64_t seed, uint64_t stream, int64_t offset,
                           float standard_deviation) {
  NN_ENTER(context, n >= 0 && offset >= 0);
  if (n > 0)
    random_normal_kernel<<<grid_for(context, n, 256), 256, 0, context->stream>>>(x, n, seed, stream, offset, standard_deviation);
  NN_LEAVE(context);
}

nn_status nn_zero_grad(nn_context *context, float *gradient, int64_t n) {
  NN_ENTER(context, n >= 0);
  if (n > 0) NN_CUDA(context, cudaMemsetAsync(gradient, 0, (size_t)n * 4, context->stream));
  NN_LEAVE(context);
}

} /* extern "C" */
