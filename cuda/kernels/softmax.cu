/* softmax.cu: softmax over rows and the router (softmax, top-k, renormalised weights), with their backwards. One warp a row; rows
 * longer than 1024 columns get a block. Everything in float32.
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

const int ROUTER_PER_LANE = 8; /* E <= 256 */

/* logits [T, E] -> probability [T, E], weight and index [T, K]; one warp a token, expert 32*j + lane in register j. */
__global__ void router_forward_kernel(float *probability, float *weight, int32_t *index, const float *logits, int64_t T, int E, int K) {
  int64_t t = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int lane = threadIdx.x & 31;
  if (t >= T) return;
  float p[ROUTER_PER_LANE], rank[ROUTER_PER_LANE], maximum = -INFINITY, sum = 0.0f; /* rank: the logit, infinity for NaN */
#pragma unroll
  for (int j = 0; j < ROUTER_PER_LANE; j++) {
    p[j] = 32 * j + lane < E ? logits[t * E + 32 * j + lane] : -INFINITY;
    rank[j] = p[j] == p[j] ? p[j] : INFINITY;
    maximum = fmaxf(maximum, p[j]);
  }
  maximum = warp_max(maximum);
  unsigned taken = 0; /* bit j: register j is chosen or beyond E */
#pragma unroll
  for (int j = 0; j < ROUTER_PER_LANE; j++) {
    bool inside = 32 * j + lane < E;
    if (!inside) taken |= 1u << j;
    p[j] = inside ? expf(p[j] - maximum) : 0.0f;
    sum += p[j];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int j = 0; j < ROUTER_PER_LANE; j++) {
    p[j] = p[j] / sum;
    if (32 * j + lane < E) probability[t * E + 32 * j + lane] = p[j];
  }
  float chosen_sum = 0.0f, mine = 0.0f;
  for (int k = 0; k < K; k++) {
    float best = -INFINITY, value = 0.0f;
    int best_index = 0x7fffffff;
#pragma unroll
    for (int j = 0; j < ROUTER_PER_LANE; j++)
      if (!(taken >> j & 1) && comes_before(rank[j], 32 * j + lane, best, best_index)) best = rank[j], best_index = 32 * j + lane;
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) {
      float other = __shfl_xor_sync(0xffffffffu, best, i);
      int other_index = __shfl_xor_sync(0xffffffffu, best_index, i);
      if (comes_before(other, other_index, best, best_index)) best = other, best_index = other_index;
    }
    if ((best_index & 31) == lane) taken |= 1u << (best_index >> 5);
#pragma unroll
    for (int j = 0; j < ROUTER_PER_LANE; j++)
      if (best_index >> 5 == j) value = p[j];
    value = __shfl_sync(0xffffffffu, value, best_index & 31);
    chosen_sum += value;
    if (lane == (k & 31)) mine = value;
    if (lane == 0) index[t * K + k] = best_index;
    if ((k & 31) == 31 || k == K - 1) { /* up to 32 choices wait in the lanes */
      int first = k & ~31;
      if (first + lane <= k) weight[t * K + first + lane] = mine;
    }
  }
  __syncwarp();
  for (int k = lane; k < K; k += 32) weight[t * K + k] = weight[t * K + k] / chosen_sum;
}

/* dlogits [T, E]; one warp a token. */
__global__ void router_backward_kernel(float *dlogits, const float *dweight, const float *probability, const float *weight,
                                       const int32_t *index, const int32_t *load, int64_t T, int E, int K, float aux_scale) {
  int64_t t = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  int lane = threadIdx.x & 31;
  if (t >= T) return;
  float dot = 0.0f, chosen = 0.0f;
  for (int k = 0; k < K; k++) {
    dot += dweight[t * K + k] * weight[t * K + k];
    chosen += probability[t * E + index[t * K + k]];
  }
  float d[ROUTER_PER_LANE], p[ROUTER_PER_LANE], inner = 0.0f;
  float aux = K > 0 ? aux_scale * (float)E / ((float)T * ((float)T * (float)K)) : 0.0f;
#pragma unroll
  for (int j = 0; j < ROUTER_PER_LANE; j++) {
    int e = 32 * j + lane;
    p[j] = e < E ? probability[t * E + e] : 0.0f;
    d[j] = e < E ? aux * (float)load[e] : 0.0f;
  }
  for (int k = 0; k < K; k++) {
    int e = index[t * K + k];
    float add = (dweight[t * K + k] - dot) / chosen;
#pragma unroll
    for (int j = 0; j < ROUTER_PER_LANE; j++)
      if (e == 32 * j + lane) d[j] += add;
  }
#pragma unroll
  for (int j = 0; j < ROUTER_PER_LANE; j++) inner += p[j] * d[j];
  inner = warp_sum(inner);
#pragma unroll
  for (int j = 0; j < ROUTER_PER_LANE; j++)
    if (32 * j + lane < E) dlogits[t * E + 32 * j + lane] = p[j] * (d[j] - inner);
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

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
  if (E > 32 * ROUTER_PER_LANE)
    return nn_fail(context, NN_ERROR_UNSUPPORTED, "nn_softmax_topk_forward: %lld experts; the CUDA router takes up to %d", (long long)E,
                   32 * ROUTER_PER_LANE);
  if (T > 0 && E > 0)
    router_forward_kernel<<<(unsigned)ceil_div(T, 8), 256, 0, context->stream>>>(probability, weight, index, logits, T, (int)E, (int)K);
  NN_LEAVE(context);
}

nn_status nn_softmax_topk_backward(nn_context *context, float *dlogits, const float *dweight, const float *probability,
                                   const float *weight, const int32_t *index, const int32_t *load, int64_t T, int64_t E, int64_t K,
                                   float aux_scale) {
  NN_ENTER(context, T >= 0 && E >= 0 && K >= 0 && K <= E);
  if (E > 32 * ROUTER_PER_LANE)
    return nn_fail(context, NN_ERROR_UNSUPPORTED, "nn_softmax_topk_backward: %lld experts; the CUDA router takes up to %d", (long long)E,
                   32 * ROUTER_PER_LANE);
  if (T > 0 && E > 0)
    router_backward_kernel<<<(unsigned)ceil_div(T, 8), 256, 0, context->stream>>>(dlogits, dweight, probability, weight, index, load, T,
                                                                                 (int)E, (int)K, aux_scale);
  NN_LEAVE(context);
}

} /* extern "C" */
