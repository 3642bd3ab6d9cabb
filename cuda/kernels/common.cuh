/* common.cuh: what every kernel file of the CUDA library shares: the context, failures, launches, number types, 16-byte packs and
 * reductions. Knows no formula of nn.h. Included by cuda/kernels/*.cu only.
 */
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>

#include "../include/nn.h"

typedef __nv_bfloat16 bf16;

/* One GPU as its caller sees it: device, stream, lent scratch, and what kernels of this chip may use. */
struct nn_context {
  int device;
  cudaStream_t stream;
  char *workspace;
  int64_t workspace_bytes;
  int multiprocessors;
  int capability; /* 10 * major + minor */
  char error[512];
};

/* ---- failures and launches (context.cu) ---------------------------------------------------------------------- */

nn_status nn_fail(nn_context *context, nn_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));
nn_status nn_cuda_status(nn_context *context, cudaError_t error, const char *where);
/* Makes the context's device the calling thread's. */
nn_status nn_enter(nn_context *context, const char *where);

#define NN_ENTER(context, ok)                                                             \
  do {                                                                                    \
    if ((context) == NULL) return nn_fail(NULL, NN_ERROR_ARGUMENT, "%s: no context", __func__); \
    if (!(ok)) return nn_fail(context, NN_ERROR_ARGUMENT, "%s: a size or scalar is out of range: %s", __func__, #ok); \
    nn_status entered_ = nn_enter(context, __func__);                                     \
    if (entered_ != NN_OK) return entered_;                                               \
  } while (0)

#define NN_LEAVE(context) return nn_cuda_status(context, cudaGetLastError(), __func__)
#define NN_TRY(call)                          \
  do {                                        \
    nn_status tried_ = (call);                \
    if (tried_ != NN_OK) return tried_;       \
  } while (0)
#define NN_CUDA(context, call)                                                        \
  do {                                                                                \
    cudaError_t error_ = (call);                                                      \
    if (error_ != cudaSuccess) return nn_cuda_status(context, error_, __func__);      \
  } while (0)

/* Cuts aligned pieces off the context's workspace; `need` goes on counting when it is too small. */
struct Scratch {
  char *base;
  int64_t have, need;
  explicit Scratch(nn_context *context) : base(context->workspace), have(context->workspace_bytes), need(0) {}
  template <typename T>
  T *take(int64_t count) {
    T *piece = (T *)(base + need);
    need += (count * (int64_t)sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  bool fits() const { return need <= have; }
};
/* While it lives, what is called with the context takes its scratch after `scratch`. */
struct ScratchTaken {
  nn_context *context;
  int64_t bytes;
  ScratchTaken(nn_context *owner, const Scratch &scratch) : context(owner), bytes(scratch.need) {
    context->workspace += bytes, context->workspace_bytes -= bytes;
  }
  ~ScratchTaken() { context->workspace -= bytes, context->workspace_bytes += bytes; }
};
#define NN_SCRATCH(context, scratch)                                                                                    \
  do {                                                                                                                  \
    if (!(scratch).fits())                                                                                              \
      return nn_fail(context, NN_ERROR_WORKSPACE, "%s: needs %lld bytes of workspace, has %lld", __func__,              \
                     (long long)(scratch).need, (long long)(scratch).have);                                             \
  } while (0)

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline bool aligned16(const void *p) { return ((uintptr_t)p & 15) == 0; }
static inline bool valid(nn_dtype dtype) { return dtype == NN_F32 || dtype == NN_BF16; }

/* Calls `...` with T standing for the C type of dtype. */
#define NN_FOR_DTYPE(dtype, T, ...)   \
  do {                                \
    if ((dtype) == NN_BF16) {         \
      typedef bf16 T;                 \
      __VA_ARGS__                     \
    } else {                          \
      typedef float T;                \
      __VA_ARGS__                     \
    }                                 \
  } while (0)

/* ---- number types -------------------------------------------------------------------------------------------- */

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <typename T>
__device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t *>(&pair);
}
__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

/* N neighbouring elements, loaded and stored in one access. */
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T *p) { return *reinterpret_cast<const Pack<T, N> *>(p); }
template <typename T, int N>
__device__ __forceinline__ void store_pack(T *p, const Pack<T, N> &pack) { *reinterpret_cast<Pack<T, N> *>(p) = pack; }

/* exp(x) as exact as the activations' type T deserves: within 2 ulp for float, 2 + |x| for bf16 (and twice as fast). */
template <typename T>
__device__ __forceinline__ float exponential(float x) { return __expf(x); }
template <>
__device__ __forceinline__ float exponential<float>(float x) { return expf(x); }

/* ---- SwiGLU, the same bits wherever it is computed ----------------------------------------------------------- */

/* As exact as the activations' type T deserves: within 2 ulp for float, within 1e-6 for bf16. */
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
}
template <>
__device__ __forceinline__ float sigmoid<float>(float x) { return __fdiv_rn(1.0f, 1.0f + expf(-x)); }
/* h = silu(gate) * up, of values already rounded to the activations' type T. */
template <typename T>
__device__ __forceinline__ float swiglu(float gate, float up) { return __fmul_rn(__fmul_rn(gate, sigmoid<T>(gate)), up); }
/* silu'(x) = s * (1 + x * (1 - s)). */
__device__ __forceinline__ float silu_derivative(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

/* ---- reductions in a fixed order ----------------------------------------------------------------------------- */

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}

/* Sum over the block; every thread gets it. `shared` holds 32 floats and may be used again after the call. */
__device__ __forceinline__ float block_sum(float x, float *shared) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = lane < warps ? shared[lane] : 0.0f;
  return warp_sum(x);
}
__device__ __forceinline__ float block_max(float x, float *shared) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  x = warp_max(x);
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = lane < warps ? shared[lane] : -INFINITY;
  return warp_max(x);
}
