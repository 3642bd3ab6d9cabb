/* softmax.cu: softmax over rows and the router (softmax, top-k, renormalised weights), with their backwards. A softmax row gets a
 * warp to sixteen, a token of the router a few lanes. Everything in float32.
 */
#include "common.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* x, y [rows, columns]; blockDim.x threads a row, gridDim.x rows. */
template <typename T>
__global__ void softmax_forward_kernel(T *y, const T *x, int64_t columns) {
  __shared__ float shared[32];
  x += blockIdx.x * columns;
  y += blockIdx.x * columns;
  float maximum = -INFINITY, sum = 0.0f;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) maximum = fmaxf(maximum, to_float(x[i]));
  maximum = block_max(maximum, shared);
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) sum += exponential<T>(to_float(x[i]) - maximum);
  sum = block_sum(sum, shared);
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) y[i] = from_float<T>(exponential<T>(to_float(x[i]) - maximum) / sum);
}

template <typename T>
__global__ void softmax_backward_kernel(T *dx, const T *dy, const T *y, int64_t columns) {
  __shared__ float shared[32];
  int64_t base = blockIdx.x * columns;
  float dot = 0.0f;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) dot += to_float(y[base + i]) * to_float(dy[base + i]);
  dot = block_sum(dot, shared);
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x)
    dx[base + i] = from_float<T>(to_float(y[base + i]) * (to_float(dy[base + i]) - dot));
}

/* Whether logit a of expert i comes before logit b of expert j: the larger, then the lower index. The probabilities are in the same
 * order but for those that rounding made equal; logits have one order on every device. */
__device__ __forceinline__ bool comes_before(float a, int i, float b, int j) { return a != b ? a > b : i < j; }

const int MOST_EXPERTS = 256;

/* A token's E experts lie in LANES lanes of a warp, expert LANES * j + lane in register j. */

/* Sum over a token's experts of x * y. Up to 32 experts are added in the order of a warp that has one a lane, whatever LANES is. */
template <int LANES, int PER>
__device__ __forceinline__ float token_dot(const float (&x)[PER], const float (&y)[PER]) {
  float part[PER];
#pragma unroll
  for (int j = 0; j < PER; j++) part[j] = LANES == 32 && j > 0 ? fmaf(x[j], y[j], part[j - 1]) : __fmul_rn(x[j], y[j]);
  float sum = part[PER - 1];
  if (LANES < 32) {
#pragma unroll
    for (int step = PER / 2; step > 0; step >>= 1)
#pragma unroll
      for (int j = 0; j < step; j++) part[j] += part[j + step];
    sum = part[0];
  }
#pragma unroll
  for (int i = LANES / 2; i > 0; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  return sum;
}

/* logits [T, E] -> probability [T, E], weight and index [T, K]; E <= LANES * PER. */
template <int LANES, int PER>
__global__ void __launch_bounds__(128)
    router_forward_kernel(float *probability, float *weight, int32_t *index, const float *logits, int64_t T, int E, int K) {
  const int64_t t = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
  const int lane = threadIdx.x & (LANES - 1);
  const bool real = t < T; /* tokens beyond the last take part in the shuffles */
  float p[PER], rank[PER], maximum = -INFINITY; /* rank: the logit, infinity for NaN */
#pragma unroll
  for (int j = 0; j < PER; j++) p[j] = real && LANES * j + lane < E ? logits[t * E + LANES * j + lane] : -INFINITY;
#pragma unroll
  for (int j = 0; j < PER; j++) {
    rank[j] = p[j] == p[j] ? p[j] : INFINITY;
    maximum = fmaxf(maximum, p[j]);
  }
#pragma unroll
  for (int i = LANES / 2; i > 0; i >>= 1) maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, i));
  unsigned taken = 0; /* bit j: register j is chosen or beyond E */
  float one[PER];
#pragma unroll
  for (int j = 0; j < PER; j++) {
    one[j] = 1.0f;
    const bool inside = LANES * j + lane < E;
    if (!inside) taken |= 1u << j;
    p[j] = inside ? expf(p[j] - maximum) : 0.0f;
  }
  const float sum = token_dot<LANES, PER>(p, one);
#pragma unroll
  for (int j = 0; j < PER; j++) {
    p[j] = p[j] / sum;
    if (real && LANES * j + lane < E) probability[t * E + LANES * j + lane] = p[j];
  }
  float chosen_sum = 0.0f, chosen[PER] = {}; /* choice LANES * j + lane in register j */
  int chosen_index[PER] = {};
  for (int k = 0; k < K; k++) {
    float best = -INFINITY, value = 0.0f;
    int best_index = 0x7fffffff;
#pragma unroll
    for (int j = 0; j < PER; j++)
      if (!(taken >> j & 1) && comes_before(rank[j], LANES * j + lane, best, best_index)) best = rank[j], best_index = LANES * j + lane;
#pragma unroll
    for (int i = LANES / 2; i > 0; i >>= 1) {
      float other = __shfl_xor_sync(0xffffffffu, best, i);
      int other_index = __shfl_xor_sync(0xffffffffu, best_index, i);
      if (comes_before(other, other_index, best, best_index)) best = other, best_index = other_index;
    }
    if (best_index % LANES == lane) taken |= 1u << (best_index / LANES);
#pragma unroll
    for (int j = 0; j < PER; j++)
      if (best_index / LANES == j) value = p[j];
    value = __shfl_sync(0xffffffffu, value, best_index % LANES, LANES);
    chosen_sum += value;
#pragma unroll
    for (int j = 0; j < PER; j++)
      if (k == LANES * j + lane) chosen[j] = value, chosen_index[j] = best_index;
  }
#pragma unroll
  for (int j = 0; j < PER; j++)
    if (real && LANES * j + lane < K) {
      weight[t * K + LANES * j + lane] = chosen[j] / chosen_sum;
      index[t * K + LANES * j + lane] = chosen_index[j];
    }
}

/* dlogits [T, E]; E <= LANES * PER. */
template <int LANES, int PER>
__global__ void __launch_bounds__(128)
    router_backward_kernel(float *dlogits, const float *dweight, const float *probability, const float *weight, const int32_t *index,
                           const int32_t *load, int64_t T, int E, int K, float aux_scale) {
  const int64_t token = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES, t = token < T ? token : T - 1;
  const int lane = threadIdx.x & (LANES - 1);
  float d[PER], p[PER];
  const float aux = K > 0 ? aux_scale * (float)E / ((float)T * ((float)T * (float)K)) : 0.0f;
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int e = LANES * j + lane;
    p[j] = e < E ? probability[t * E + e] : 0.0f;
    d[j] = e < E ? __fmul_rn(aux, (float)load[e]) : 0.0f;
  }
  float dot = 0.0f, chosen = 0.0f;
#pragma unroll 4
  for (int k = 0; k < K; k++) {
    dot += dweight[t * K + k] * weight[t * K + k];
    chosen += probability[t * E + index[t * K + k]];
  }
#pragma unroll 4
  for (int k = 0; k < K; k++) {
    const int e = index[t * K + k];
    const float add = (dweight[t * K + k] - dot) / chosen;
#pragma unroll
    for (int j = 0; j < PER; j++)
      if (e == LANES * j + lane) d[j] += add;
  }
  const float inner = token_dot<LANES, PER>(p, d);
#pragma unroll
  for (int j = 0; j < PER; j++)
    if (token < T && LANES * j + lane < E) dlogits[t * E + LANES * j + lane] = p[j] * (d[j] - inner);
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

/* Calls `...` with LANES and PER for E experts: few lanes a token, for few steps of each shuffle and many tokens a warp. */
#define NN_FOR_EXPERTS(E, ...)             \
  do {                                     \
    if ((E) <= 16) {                       \
      const int LANES = 4, PER = 4;        \
      __VA_ARGS__                          \
    } else if ((E) <= 32) {                \
      const int LANES = 8, PER = 4;        \
      __VA_ARGS__                          \
    } else {                               \
      const int LANES = 32, PER = 8;       \
      __VA_ARGS__                          \
    }                                      \
  } while (0)

static int threads_for(int64_t columns) { return columns <= 64 ? 32 : columns <= 1024 ? 128 : 512; }

extern "C" {

nn_status nn_softmax_forward(nn_context *context, void *y, const void *x, int64_t rows, int64_t columns, nn_dtype dtype) {
  NN_ENTER(context, rows >= 0 && rows < (1ll << 31) && columns >= 0 && valid(dtype));
  if (rows > 0 && columns > 0)
    NN_FOR_DTYPE(dtype, T, softmax_forward_kernel<T><<<(unsigned)rows, threads_for(columns), 0, context->stream>>>(
                               (T *)y, (const T *)x, columns););
  NN_LEAVE(context);
}

nn_status nn_softmax_backward(nn_context *context, void *dx, const void *dy, const void *y, int64_t rows, int64_t columns,
                              nn_dtype dtype) {
  NN_ENTER(context, rows >= 0 && rows < (1ll << 31) && columns >= 0 && valid(dtype));
  if (rows > 0 && columns > 0)
    NN_FOR_DTYPE(dtype, T, softmax_backward_kernel<T><<<(unsigned)rows, threads_for(columns), 0, context->stream>>>(
                               (T *)dx, (const T *)dy, (const T *)y, columns););
  NN_LEAVE(context);
}

nn_status nn_softmax_topk_forward(nn_context *context, float *probability, float *weight, int32_t *index, const float *logits,
                                  int64_t T, int64_t E, int64_t K) {
  NN_ENTER(context, T >= 0 && E >= 0 && K >= 0 && K <= E);
  if (E > MOST_EXPERTS)
    return nn_fail(context, NN_ERROR_UNSUPPORTED, "nn_softmax_topk_forward: %lld experts; the CUDA router takes up to %d", (long long)E,
                   MOST_EXPERTS);
  if (T > 0 && E > 0)
    NN_FOR_EXPERTS(E, router_forward_kernel<LANES, PER><<<(unsigned)ceil_div(T * LANES, 128), 128, 0, context->stream>>>(
                          probability, weight, index, logits, T, (int)E, (int)K););
  NN_LEAVE(context);
}

nn_status nn_softmax_topk_backward(nn_context *context, float *dlogits, const float *dweight, const float *probability,
                                   const float *weight, const int32_t *index, const int32_t *load, int64_t T, int64_t E, int64_t K,
                                   float aux_scale) {
  NN_ENTER(context, T >= 0 && E >= 0 && K >= 0 && K <= E);
  if (E > MOST_EXPERTS)
    return nn_fail(context, NN_ERROR_UNSUPPORTED, "nn_softmax_topk_backward: %lld experts; the CUDA router takes up to %d", (long long)E,
                   MOST_EXPERTS);
  if (T > 0 && E > 0)
    NN_FOR_EXPERTS(E, router_backward_kernel<LANES, PER><<<(unsigned)ceil_div(T * LANES, 128), 128, 0, context->stream>>>(
                          dlogits, dweight, probability, weight, index, load, T, (int)E, (int)K, aux_scale););
  NN_LEAVE(context);
}

} /* extern "C" */
