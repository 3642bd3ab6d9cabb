/* product.cu: checks a Product, chooses its core and splits long depths, so that few tiles still fill the chip. Knows no kernel of
 * its own but the sum of the splits.
 */
#include "product.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

const int SPLIT_THREADS = 128, SPLITS_AT_ONCE = 8; /* loads that a thread has under way */

/* c = alpha * (partial[0] + partial[1] + ... in that order) + beta * c, N neighbouring elements a thread. */
template <typename Out, int N>
__global__ void __launch_bounds__(SPLIT_THREADS)
    add_splits_kernel(Out *c, const float *partial, int splits, int64_t count, float alpha, float beta) {
  const int64_t i = ((int64_t)blockIdx.x * SPLIT_THREADS + threadIdx.x) * N;
  if (i >= count) return;
  Pack<float, N> sum = load_pack<float, N>(partial + i);
  Pack<Out, N> old = {};
  if (beta != 0.0f) old = load_pack<Out, N>(c + i);
  for (int first = 1; first < splits; first += SPLITS_AT_ONCE) {
    Pack<float, N> part[SPLITS_AT_ONCE];
#pragma unroll
    for (int s = 0; s < SPLITS_AT_ONCE; s++)
      if (first + s < splits) part[s] = load_pack<float, N>(partial + (first + s) * count + i);
#pragma unroll
    for (int s = 0; s < SPLITS_AT_ONCE; s++)
#pragma unroll
      for (int j = 0; j < N; j++)
        if (first + s < splits) sum.v[j] += part[s].v[j];
  }
#pragma unroll
  for (int j = 0; j < N; j++) {
    sum.v[j] *= alpha;
    if (beta != 0.0f) sum.v[j] += beta * to_float(old.v[j]);
    old.v[j] = from_float<Out>(sum.v[j]);
  }
  store_pack<Out, N>(c + i, old);
}

/* ---- choice -------------------------------------------------------------------------------------------------- */

/* Whether 16-byte loads can serve the operands: what both tensor-core paths ask for. */
static bool loads_whole_chunks(const Product &p) {
  if (p.dtype != NN_BF16 || !aligned16(p.a) || !aligned16(p.b)) return false;
  if (p.lda % 8 || p.ldb % 8) return false;
  if (p.a_mn ? p.m % 8 : p.k % 8) return false;
  if (p.b_mn ? p.n % 8 : p.k % 8) return false;
  return !(p.groups > 1 && (p.a_stride % 8 || p.b_stride % 8));
}

static nn_status run_core(nn_context *context, Product &p) {
  if (!loads_whole_chunks(p)) return nn_product_plain(context, p);
  if (context->capability == 90) {
    Product packed = p; /* its gathered rows may be packed before it is refused */
    nn_status status = nn_product_wgmma(context, packed);
    p.dot_parts = packed.dot_parts;
    if (status != NN_ERROR_UNSUPPORTED) return status;
  }
  nn_status status = nn_product_mma(context, p);
  return status == NN_ERROR_UNSUPPORTED ? nn_product_plain(context, p) : status;
}

nn_status nn_run_product(nn_context *context, Product &p, const char *where) {
  if (p.m == 0 || p.n == 0 || p.groups == 0) return NN_OK;
  if (p.m > (1ll << 31) - 256 || p.n > (1ll << 31) - 256 || p.k > (1ll << 31) - 256)
    return nn_fail(context, NN_ERROR_UNSUPPORTED, "%s: a matrix has more than 2^31 rows or columns", where);
  if (loads_whole_chunks(p)) {
    nn_status status = nn_product_small(context, p);
    if (status != NN_ERROR_UNSUPPORTED) return status == NN_OK ? nn_cuda_status(context, cudaGetLastError(), where) : status;
  }
  int64_t tiles = ceil_div(p.m, 128) * ceil_div(p.n, 128);
  if (p.n <= 16) tiles = ceil_div(p.m, 64);
  if (p.m <= 16) tiles = ceil_div(p.n, 64);
  int64_t most = 2 * context->multiprocessors;
  bool can_split = p.grouping == WHOLE && p.groups == 1 && p.epilogue == STORE && p.ldc == p.n && !p.a_rows && !p.b_rows;
  if (can_split && tiles * 2 <= most && p.k >= 1024) {
    int64_t splits = most / tiles, longest = p.k / 256;
    if (splits > longest) splits = longest;
    while (splits > 1 && splits * p.m * p.n * 4 > SPLIT_WORKSPACE) splits--;
    int64_t chunk = ceil_div(ceil_div(p.k, splits), 64) * 64;
    splits = ceil_div(p.k, chunk);
    Scratch scratch(context);
    float *partial = scratch.take<float>(splits * p.m * p.n);
    if (splits > 1 && scratch.fits()) {
      Product q = p;
      q.grouping = SPLIT_DEPTH, q.groups = (int)splits, q.k_chunk = chunk;
      q.c = partial, q.c_stride = p.m * p.n, q.out_dtype = NN_F32, q.alpha = 1.0f, q.beta = 0.0f, q.a_stride = q.b_stride = 0;
      NN_TRY(run_core(context, q));
      int64_t count = p.m * p.n;
      const bool packs = count % 4 == 0 && aligned16(p.c);
      const unsigned blocks = (unsigned)ceil_div(packs ? count / 4 : count, SPLIT_THREADS);
      NN_FOR_DTYPE(p.out_dtype, Out, {
        if (packs)
          add_splits_kernel<Out, 4><<<blocks, SPLIT_THREADS, 0, context->stream>>>((Out *)p.c, partial, (int)splits, count, p.alpha, p.beta);
        else
          add_splits_kernel<Out, 1><<<blocks, SPLIT_THREADS, 0, context->stream>>>((Out *)p.c, partial, (int)splits, count, p.alpha, p.beta);
      });
      return nn_cuda_status(context, cudaGetLastError(), where);
    }
  }
  NN_TRY(run_core(context, p));
  return nn_cuda_status(context, cudaGetLastError(), where);
}
