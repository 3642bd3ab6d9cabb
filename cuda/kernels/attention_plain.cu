/* attention_plain.cu: attention for float32 and for head sizes without a tensor-core kernel: one warp a query (or, for dK and dV, a
 * key), 32 keys (queries) at a time, one a lane. Head sizes up to 256.
 */
#include "attention.cuh"

const int MOST_PARTS = 8; /* head size / 32 */

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* dot of a row in shared memory with a row in global memory. */
template <typename T>
__device__ __forceinline__ float dot_row(const float *shared, const T *row, int D) {
  float sum = 0.0f;
  for (int d = 0; d < D; d++) sum += shared[d] * to_float(row[d]);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(128) attention_forward_kernel(T *out, float *log_sum_exp, const Attention a) {
  __shared__ float shared[4][256];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, D = a.D;
  int64_t query = (int64_t)blockIdx.x * 4 + warp, total = (int64_t)a.B * a.S * a.Q;
  if (query >= total) return;
  int h = (int)(query % a.Q), i = (int)(query / a.Q % a.S), b = (int)(query / a.Q / a.S);
  const T *q = (const T *)a.q + ((int64_t)b * a.S + i) * a.q_row + (int64_t)h * D;
  int64_t head = (int64_t)b * a.kv_batch + (int64_t)(h / (a.Q / a.G)) * D, count = (a.start ? a.start[b] : 0) + (int64_t)i + 1;
  if (count > a.capacity) count = a.capacity;
  for (int d = lane; d < D; d += 32) shared[warp][d] = to_float(q[d]) * a.scale;
  __syncwarp();
  float maximum = -INFINITY, sum = 0.0f, o[MOST_PARTS] = {};
  for (int64_t j0 = 0; j0 < count; j0 += 32) {
    int64_t j = j0 + lane;
    float s = j < count ? dot_row(shared[warp], (const T *)a.k + head + j * a.kv_row, D) : -INFINITY;
    float top = fmaxf(maximum, warp_max(s)), p = j < count ? expf(s - top) : 0.0f, old = expf(maximum - top);
    maximum = top;
    sum = sum * old + warp_sum(p);
#pragma unroll
    for (int r = 0; r < MOST_PARTS; r++) o[r] *= old;
    int there = (int)min((int64_t)32, count - j0);
    for (int jj = 0; jj < there; jj++) {
      float weight = __shfl_sync(0xffffffffu, p, jj);
      const T *v = (const T *)a.v + head + (j0 + jj) * a.kv_row;
#pragma unroll
      for (int r = 0; r < MOST_PARTS; r++)
        if (r * 32 + lane < D) o[r] += weight * to_float(v[r * 32 + lane]);
    }
  }
  T *to = out + (((int64_t)b * a.S + i) * a.Q + h) * D;
#pragma unroll
  for (int r = 0; r < MOST_PARTS; r++)
    if (r * 32 + lane < D) to[r * 32 + lane] = from_float<T>(o[r] / sum);
  if (log_sum_exp && lane == 0) log_sum_exp[((int64_t)b * a.Q + h) * a.S + i] = maximum + logf(sum);
}

/* dq of one query a warp. */
template <typename T>
__global__ void __launch_bounds__(128) attention_dq_kernel(T *dqkv, const T *dout, const float *log_sum_exp, const float *delta, const Attention a) {
  __shared__ float shared[4][2][256];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, D = a.D;
  int64_t query = (int64_t)blockIdx.x * 4 + warp, total = (int64_t)a.B * a.S * a.Q;
  if (query >= total) return;
  int h = (int)(query % a.Q), i = (int)(query / a.Q % a.S), b = (int)(query / a.Q / a.S);
  int64_t at = ((int64_t)b * a.S + i) * a.q_row + (int64_t)h * D, stat = ((int64_t)b * a.Q + h) * a.S + i;
  int64_t head = (int64_t)b * a.kv_batch + (int64_t)(h / (a.Q / a.G)) * D, count = (int64_t)i + 1;
  for (int d = lane; d < D; d += 32) {
    shared[warp][0][d] = to_float(((const T *)a.q)[at + d]) * a.scale;
    shared[warp][1][d] = to_float(dout[(((int64_t)b * a.S + i) * a.Q + h) * D + d]);
  }
  __syncwarp();
  float lse = log_sum_exp[stat], shift = delta[stat], dq[MOST_PARTS] = {};
  for (int64_t j0 = 0; j0 < count; j0 += 32) {
    int64_t j = j0 + lane;
    float ds = 0.0f;
    if (j < count) {
      float p = expf(dot_row(shared[warp][0], (const T *)a.k + head + j * a.kv_row, D) - lse);
      ds = p * (dot_row(shared[warp][1], (const T *)a.v + head + j * a.kv_row, D) - shift) * a.scale;
    }
    int there = (int)min((int64_t)32, count - j0);
    for (int jj = 0; jj < there; jj++) {
      float weight = __shfl_sync(0xffffffffu, ds, jj);
      const T *k = (const T *)a.k + head + (j0 + jj) * a.kv_row;
#pragma unroll
      for (int r = 0; r < MOST_PARTS; r++)
        if (r * 32 + lane < D) dq[r] += weight * to_float(k[r * 32 + lane]);
    }
  }
#pragma unroll
  for (int r = 0; r < MOST_PARTS; r++)
    if (r * 32 + lane < D) dqkv[at + r * 32 + lane] = from_float<T>(dq[r]);
}

/* dk and dv of one key a warp: heads of its group in order, queries in order. */
template <typename T>
__global__ void __launch_bounds__(128) attention_dkv_kernel(T *dqkv, const T *dout, const float *log_sum_exp, const float *delta, const Attention a) {
  __shared__ float shared[4][2][256];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, D = a.D, heads = a.Q / a.G;
  int64_t key = (int64_t)blockIdx.x * 4 + warp, total = (int64_t)a.B * a.S * a.G;
  if (key >= total) return;
  int g = (int)(key % a.G), j = (int)(key / a.G % a.S), b = (int)(key / a.G / a.S);
  int64_t row = ((int64_t)b * a.S + j) * a.q_row;
  int64_t at_k = row + (int64_t)(a.Q + g) * D, at_v = row + (int64_t)(a.Q + a.G + g) * D;
  const T *qkv = (const T *)a.q;
  for (int d = lane; d < D; d += 32) {
    shared[warp][0][d] = to_float(qkv[at_k + d]) * a.scale;
    shared[warp][1][d] = to_float(qkv[at_v + d]);
  }
  __syncwarp();
  float dk[MOST_PARTS] = {}, dv[MOST_PARTS] = {};
  for (int h = g * heads; h < (g + 1) * heads; h++)
    for (int i0 = j; i0 < a.S; i0 += 32) {
      int i = i0 + lane;
      float p = 0.0f, ds = 0.0f;
      if (i < a.S) {
        int64_t stat = ((int64_t)b * a.Q + h) * a.S + i;
        p = expf(dot_row(shared[warp][0], qkv + ((int64_t)b * a.S + i) * a.q_row + (int64_t)h * D, D) - log_sum_exp[stat]);
        ds = p * (dot_row(shared[warp][1], dout + (((int64_t)b * a.S + i) * a.Q + h) * D, D) - delta[stat]) * a.scale;
      }
      int there = min(32, a.S - i0);
      for (int ii = 0; ii < there; ii++) {
        float weight = __shfl_sync(0xffffffffu, p, ii), slope = __shfl_sync(0xffffffffu, ds, ii);
        const T *q = qkv + ((int64_t)b * a.S + i0 + ii) * a.q_row + (int64_t)h * D;
        const T *d_out = dout + (((int64_t)b * a.S + i0 + ii) * a.Q + h) * D;
#pragma unroll
        for (int r = 0; r < MOST_PARTS; r++)
          if (r * 32 + lane < D) dv[r] += weight * to_float(d_out[r * 32 + lane]), dk[r] += slope * to_float(q[r * 32 + lane]);
      }
    }
#pragma unroll
  for (int r = 0; r < MOST_PARTS; r++)
    if (r * 32 + lane < D) dqkv[at_k + r * 32 + lane] = from_float<T>(dk[r]), dqkv[at_v + r * 32 + lane] = from_float<T>(dv[r]);
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

nn_status nn_attention_forward_plain(nn_context *context, void *out, float *log_sum_exp, const Attention &a, nn_dtype dtype) {
  if (a.D > 32 * MOST_PARTS) return nn_fail(context, NN_ERROR_UNSUPPORTED, "attention: a head size of %d; up to %d", a.D, 32 * MOST_PARTS);
  unsigned blocks = (unsigned)ceil_div((int64_t)a.B * a.S * a.Q, 4);
  NN_FOR_DTYPE(dtype, T, attention_forward_kernel<T><<<blocks, 128, 0, context->stream>>>((T *)out, log_sum_exp, a););
  return NN_OK;
}

nn_status nn_attention_backward_plain(nn_context *context, void *dqkv, const void *dout, const float *log_sum_exp, const float *delta,
                                      const Attention &a, nn_dtype dtype) {
  if (a.D > 32 * MOST_PARTS) return nn_fail(context, NN_ERROR_UNSUPPORTED, "attention: a head size of %d; up to %d", a.D, 32 * MOST_PARTS);
  unsigned queries = (unsigned)ceil_div((int64_t)a.B * a.S * a.Q, 4), keys = (unsigned)ceil_div((int64_t)a.B * a.S * a.G, 4);
  NN_FOR_DTYPE(dtype, T, {
    attention_dq_kernel<T><<<queries, 128, 0, context->stream>>>((T *)dqkv, (const T *)dout, log_sum_exp, delta, a);
    attention_dkv_kernel<T><<<keys, 128, 0, context->stream>>>((T *)dqkv, (const T *)dout, log_sum_exp, delta, a);
  });
  return NN_OK;
}
