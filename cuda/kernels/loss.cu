/* loss.cu: cross-entropy, alone and fused with the LM head in chunks, the aux loss, the embedding and its gradient. A row of logits
 * is one block's work; everything in float32.
 * Liger, arXiv 2410.10989; Fedus et al., arXiv 2101.03961.
 */
#include "product.cuh"
#include "sort.cuh"

/* ---- kernels: cross-entropy ---------------------------------------------------------------------------------- */

const int ROW_THREADS = 512;
const int IGNORED = -100;

struct RowSum {
  float maximum, sum; /* sum of exp(x - maximum) */
};
template <typename T>
__device__ __forceinline__ RowSum merge(RowSum a, RowSum b) {
  RowSum r;
  r.maximum = fmaxf(a.maximum, b.maximum);
  float fa = a.maximum == -INFINITY ? 0.0f : exponential<T>(a.maximum - r.maximum), fb = b.maximum == -INFINITY ? 0.0f : exponential<T>(b.maximum - r.maximum);
  r.sum = a.sum * fa + b.sum * fb;
  return r;
}

/* Maximum and sum of exponentials of one row, known to all threads. N elements an access. */
template <typename T, int N>
__device__ __forceinline__ RowSum row_sum(const T *row, int64_t V) {
  __shared__ RowSum shared[ROW_THREADS / 32];
  RowSum mine = {-INFINITY, 0.0f};
  for (int64_t i = (int64_t)threadIdx.x * N; i < V; i += ROW_THREADS * N) {
    Pack<T, N> pack = load_pack<T, N>(row + i);
    float top = to_float(pack.v[0]);
#pragma unroll
    for (int j = 1; j < N; j++) top = fmaxf(top, to_float(pack.v[j]));
    if (top > mine.maximum) mine.sum *= mine.maximum == -INFINITY ? 0.0f : exponential<T>(mine.maximum - top), mine.maximum = top;
#pragma unroll
    for (int j = 0; j < N; j++) mine.sum += exponential<T>(to_float(pack.v[j]) - mine.maximum);
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    RowSum other = {__shfl_xor_sync(0xffffffffu, mine.maximum, s), __shfl_xor_sync(0xffffffffu, mine.sum, s)};
    mine = merge<T>(mine, other);
  }
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = mine;
  __syncthreads();
  RowSum total = shared[0];
  for (int i = 1; i < ROW_THREADS / 32; i++) total = merge<T>(total, shared[i]);
  return total;
}

/* Loss and, with dlogits, the gradient of one row a block. logits may be dlogits. */
template <typename T, int N>
__global__ void __launch_bounds__(ROW_THREADS) cross_entropy_kernel(float *loss, T *dlogits, const T *logits, const int32_t *target, int64_t V, float scale) {
  const T *row = logits + blockIdx.x * V;
  int wanted = target[blockIdx.x];
  bool ignored = wanted == IGNORED, valid_target = wanted >= 0 && wanted < V;
  RowSum total = {0.0f, 1.0f};
  if (!ignored) total = row_sum<T, N>(row, V);
  if (loss && threadIdx.x == 0)
    loss[blockIdx.x] = ignored ? 0.0f : valid_target ? logf(total.sum) + total.maximum - to_float(row[wanted]) : NAN;
  if (dlogits == NULL) return;
  __syncthreads(); /* the target's logit is read before it is overwritten */
  T *out = dlogits + blockIdx.x * V;
  float factor = scale / total.sum;
  for (int64_t i = (int64_t)threadIdx.x * N; i < V; i += ROW_THREADS * N) {
    Pack<T, N> pack;
    if (ignored) {
#pragma unroll
      for (int j = 0; j < N; j++) pack.v[j] = from_float<T>(0.0f);
    } else {
      pack = load_pack<T, N>(row + i);
#pragma unroll
      for (int j = 0; j < N; j++) {
        float d = exponential<T>(to_float(pack.v[j]) - total.maximum) * factor;
        if (i + j == wanted) d -= scale;
        pack.v[j] = from_float<T>(valid_target ? d : NAN);
      }
    }
    store_pack<T, N>(out + i, pack);
  }
}

/* ---- kernels: aux loss --------------------------------------------------------------------------------------- */

const int AUX_THREADS = 256, AUX_BLOCKS = 128;

/* partial[block, e] = sum of probability[t, e] over the block's tokens. E <= 256 experts side by side, as many lanes of tokens as the block has
 * room for; the lanes are added in their order. */
__global__ void __launch_bounds__(AUX_THREADS) aux_partial_kernel(float *partial, const float *probability, int64_t T, int E, int64_t chunk) {
  __shared__ float shared[AUX_THREADS];
  const int lanes = AUX_THREADS / E, lane = threadIdx.x / E, e = threadIdx.x - lane * E;
  const int64_t first = blockIdx.x * chunk, last = min(first + chunk, T);
  float sum = 0.0f;
  if (lane < lanes) {
#pragma unroll 4
    for (int64_t t = first + lane; t < last; t += lanes) sum += probability[t * E + e];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (lane > 0) return;
  for (int i = 1; i < lanes; i++) sum += shared[i * E + e];
  partial[(int64_t)blockIdx.x * E + e] = sum;
}

__global__ void __launch_bounds__(AUX_THREADS) aux_sum_kernel(float *aux, const float *partial, const int32_t *load, int blocks, int64_t T, int E, int K) {
  __shared__ double shared[AUX_THREADS];
  const int lanes = AUX_THREADS / E, lane = threadIdx.x / E, e = threadIdx.x - lane * E;
  double sum = 0.0;
  if (lane < lanes) {
#pragma unroll 8
    for (int b = lane; b < blocks; b += lanes) sum += (double)partial[(int64_t)b * E + e];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (lane == 0) {
    for (int i = 1; i < lanes; i++) sum += shared[i * E + e];
    sum = (double)load[e] / ((double)T * K) * (sum / (double)T);
  } else {
    sum = 0.0;
  }
  __syncthreads();
  shared[threadIdx.x] = sum;
  for (int half = AUX_THREADS / 2; half > 0; half >>= 1) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *aux = (float)(E * shared[0]);
}

/* ---- kernels: embedding -------------------------------------------------------------------------------------- */

template <typename T, int N>
__global__ void embedding_kernel(T *y, const int32_t *token, const T *table, int64_t tokens, int H, int64_t V) {
  int packs = H / N;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < tokens * packs; i += (int64_t)gridDim.x * blockDim.x) {
    int64_t t = i / packs, column = (i - t * packs) * N, id = token[t];
    Pack<T, N> pack;
    if (id >= 0 && id < V) {
      pack = load_pack<T, N>(table + id * H + column);
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) pack.v[j] = from_float<T>(NAN);
    }
    store_pack<T, N>(y + t * H + column, pack);
  }
}

/* Bin of a key in one pass of the sort: `shift` bits down; an id outside 0..V-1 sorts last. */
__device__ __forceinline__ int bin_of(const int32_t *token, const int32_t *order, int64_t i, int64_t n, int64_t V, int shift) {
  if (i >= n) return -1;
  int64_t at = order ? order[i] : i, id = token[at];
  if (id < 0 || id >= V) id = V;
  return (int)(id >> shift) & (SORT_BINS - 1);
}
__global__ void __launch_bounds__(1024) token_count_kernel(int32_t *histogram, const int32_t *token, const int32_t *order, int64_t n, int64_t V, int shift) {
  __shared__ uint16_t counts[32 * SORT_BINS];
  __shared__ int total[SORT_BINS];
  block_rank(bin_of(token, order, (int64_t)blockIdx.x * SORT_BLOCK + threadIdx.x, n, V, shift), SORT_BINS, counts, total);
  for (int b = threadIdx.x; b < SORT_BINS; b += SORT_BLOCK) histogram[(int64_t)blockIdx.x * SORT_BINS + b] = total[b];
}
__global__ void __launch_bounds__(1024)
    token_place_kernel(int32_t *sorted, const int32_t *place, const int32_t *token, const int32_t *order, int64_t n, int64_t V, int shift) {
  __shared__ uint16_t counts[32 * SORT_BINS];
  __shared__ int total[SORT_BINS];
  int64_t i = (int64_t)blockIdx.x * SORT_BLOCK + threadIdx.x;
  int bin = bin_of(token, order, i, n, V, shift), rank = block_rank(bin, SORT_BINS, counts, total);
  if (bin >= 0) sorted[place[(int64_t)blockIdx.x * SORT_BINS + bin] + rank] = order ? order[i] : (int32_t)i;
}

/* One block a sorted place; only the first of a run of equal ids works: it sums the run's rows in order, then adds once. */
template <typename T>
__global__ void scatter_rows_kernel(float *dtable, const T *dy, const int32_t *token, const int32_t *sorted, int64_t n, int H, int64_t V) {
  int64_t first = blockIdx.x, id = token[sorted[first]];
  if (id < 0 || id >= V || (first > 0 && token[sorted[first - 1]] == id)) return;
  int64_t last = first + 1;
  while (last < n && token[sorted[last]] == id) last++;
  for (int column = threadIdx.x; column < H; column += blockDim.x) {
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t i = first; i < last; i++) sum += to_float(dy[(int64_t)sorted[i] * H + column]);
    dtable[id * H + column] += sum;
  }
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

template <typename T>
static void run_cross_entropy(nn_context *context, float *loss, void *dlogits, const void *logits, const int32_t *target, int64_t rows,
                              int64_t V, float scale) {
  const int N = 16 / sizeof(T);
  if (V % N == 0 && aligned16(dlogits) && aligned16(logits))
    cross_entropy_kernel<T, N><<<(unsigned)rows, ROW_THREADS, 0, context->stream>>>(loss, (T *)dlogits, (const T *)logits, target, V, scale);
  else
    cross_entropy_kernel<T, 1><<<(unsigned)rows, ROW_THREADS, 0, context->stream>>>(loss, (T *)dlogits, (const T *)logits, target, V, scale);
}

/* Tokens whose logits exist at once in nn_linear_cross_entropy. */
int64_t nn_loss_chunk(int64_t T, int64_t V) {
  int64_t chunk = (512ll << 20) / 2 / (V > 0 ? V : 1) / 128 * 128;
  if (chunk < 128) chunk = 128;
  if (chunk > 8192) chunk = 8192;
  return T < chunk ? T : chunk;
}

extern "C" {

nn_status nn_cross_entropy_forward(nn_context *context, float *loss, const void *logits, const int32_t *target, int64_t T, int64_t V,
                                   nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && T < (1ll << 31) && V >= 0 && valid(dtype));
  if (T > 0 && V > 0) NN_FOR_DTYPE(dtype, X, run_cross_entropy<X>(context, loss, NULL, logits, target, T, V, 0.0f););
  NN_LEAVE(context);
}

nn_status nn_cross_entropy_backward(nn_context *context, void *dlogits, const void *logits, const int32_t *target, int64_t T, int64_t V,
                                    float scale, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && T < (1ll << 31) && V >= 0 && valid(dtype));
  if (T > 0 && V > 0) NN_FOR_DTYPE(dtype, X, run_cross_entropy<X>(context, NULL, dlogits, logits, target, T, V, scale););
  NN_LEAVE(context);
}

nn_status nn_linear_cross_entropy(nn_context *context, float *loss, void *dx, float *dweight, const void *x, const int32_t *target,
                                  const void *weight, int64_t T, int64_t H, int64_t V, float scale, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && T < (1ll << 31) && H >= 0 && V >= 0 && valid(dtype) && (dx != NULL || dweight == NULL));
  if (T == 0 || V == 0) return NN_OK;
  int64_t size = dtype == NN_BF16 ? 2 : 4, chunk = nn_loss_chunk(T, V);
  bool once = chunk == T; /* one chunk adds its gradient itself; several are summed first */
  Scratch scratch(context);
  char *logits = scratch.take<char>(chunk * V * size);
  float *sum = dweight && !once ? scratch.take<float>(V * H) : NULL;
  NN_SCRATCH(context, scratch);
  ScratchTaken taken(context, scratch); /* the products below take theirs after ours */
  for (int64_t first = 0; first < T; first += chunk) {
    int64_t rows = T - first < chunk ? T - first : chunk;
    const char *x_rows = (const char *)x + first * H * size;
    Product p = make_product(logits, x_rows, weight, rows, V, H, dtype, dtype);
    p.m_fastest = 1;
    NN_TRY(nn_run_product(context, p, __func__));
    NN_FOR_DTYPE(dtype, X, run_cross_entropy<X>(context, loss + first, dx ? logits : NULL, logits, target + first, rows, V, scale););
    if (dx) {
      Product d = make_product((char *)dx + first * H * size, logits, weight, rows, H, V, dtype, dtype);
      d.b_mn = 1, d.ldb = H;
      NN_TRY(nn_run_product(context, d, __func__));
    }
    if (dweight) {
      Product w = make_product(once ? dweight : sum, logits, x_rows, V, H, rows, NN_F32, dtype);
      w.a_mn = w.b_mn = 1, w.lda = V, w.ldb = H, w.beta = once || first > 0 ? 1.0f : 0.0f;
      NN_TRY(nn_run_product(context, w, __func__));
    }
  }
  if (sum) NN_TRY(nn_add(context, dweight, dweight, sum, V * H, NN_F32));
  NN_LEAVE(context);
}

nn_status nn_aux_loss(nn_context *context, float *aux, const float *probability, const int32_t *load, int64_t T, int64_t E, int64_t K) {
  NN_ENTER(context, T >= 0 && E >= 0 && K >= 0);
  if (T * E * K == 0) {
    NN_CUDA(context, cudaMemsetAsync(aux, 0, 4, context->stream));
    return NN_OK;
  }
  if (E > AUX_THREADS)
    return nn_fail(context, NN_ERROR_UNSUPPORTED, "nn_aux_loss: %lld experts; the CUDA library takes up to %d", (long long)E, AUX_THREADS);
  int64_t chunk = ceil_div(T, AUX_BLOCKS), blocks = ceil_div(T, chunk);
  Scratch scratch(context);
  float *partial = scratch.take<float>(blocks * E);
  NN_SCRATCH(context, scratch);
  aux_partial_kernel<<<(unsigned)blocks, AUX_THREADS, 0, context->stream>>>(partial, probability, T, (int)E, chunk);
  aux_sum_kernel<<<1, AUX_THREADS, 0, context->stream>>>(aux, partial, load, (int)blocks, T, (int)E, (int)K);
  NN_LEAVE(context);
}

nn_status nn_embedding_forward(nn_context *context, void *y, const int32_t *token, const void *table, int64_t T, int64_t H, int64_t V,
                               nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && H >= 0 && V >= 0 && valid(dtype));
  if (T > 0 && H > 0)
    NN_FOR_DTYPE(dtype, X, {
      const int N = 16 / sizeof(X);
      bool packs = H % N == 0 && aligned16(y) && aligned16(table);
      int64_t blocks = ceil_div(T * H / (packs ? N : 1), 128);
      unsigned grid = (unsigned)(blocks < 1 ? 1 : blocks < 65536 ? blocks : 65536);
      if (packs)
        embedding_kernel<X, N><<<grid, 128, 0, context->stream>>>((X *)y, token, (const X *)table, T, (int)H, V);
      else
        embedding_kernel<X, 1><<<grid, 128, 0, context->stream>>>((X *)y, token, (const X *)table, T, (int)H, V);
    });
  NN_LEAVE(context);
}

nn_status nn_scatter_add(nn_context *context, float *dtable, const void *dy, const int32_t *token, int64_t T, int64_t H, int64_t V,
                         nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && T < (1ll << 31) - SORT_BLOCK && H >= 0 && V >= 0 && V < (1ll << 31) - 1 && valid(dtype));
  if (T == 0 || H == 0 || V == 0) return NN_OK;
  int64_t blocks = ceil_div(T, SORT_BLOCK);
  Scratch scratch(context);
  int32_t *histogram = scratch.take<int32_t>(blocks * SORT_BINS), *front = scratch.take<int32_t>(T), *back = scratch.take<int32_t>(T);
  NN_SCRATCH(context, scratch);
  int32_t *order = NULL;
  for (int shift = 0; shift == 0 || V >> shift > 0; shift += 8) {
    token_count_kernel<<<(unsigned)blocks, SORT_BLOCK, 0, context->stream>>>(histogram, token, order, T, V, shift);
    sort_scan_kernel<<<1, 1024, 0, context->stream>>>(histogram, NULL, (int)blocks, SORT_BINS);
    token_place_kernel<<<(unsigned)blocks, SORT_BLOCK, 0, context->stream>>>(front, histogram, token, order, T, V, shift);
    order = front, front = back, back = order;
  }
  unsigned threads = (unsigned)(H < 256 ? ceil_div(H, 32) * 32 : 256);
  NN_FOR_DTYPE(dtype, X, scatter_rows_kernel<X><<<(unsigned)T, threads, 0, context->stream>>>(dtable, (const X *)dy, token, order, T, (int)H, V););
  NN_LEAVE(context);
}

} /* extern "C" */
