/* decode.cu: the next token from logits: argmax, and sampling from all, the top k or the top p. One block a sequence; no sort: the place
 * of a rank or of a cumulative probability is found digit by digit in the logits' bits, by histograms of masses in fixed point,
 * whose integer sums have no order. Compiled without contraction (build: -fmad=false), because nn_random.h wants it.
 */
#include "../include/nn_random.h"
#include "common.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

const int THREADS = 1024, BINS = 2048;
const double FIXED_POINT = 1099511627776.0; /* 2^40: the mass of the most probable token */

/* Logits as unsigned numbers in the same order; NaN counts as -infinity, -0 as 0. */
__device__ __forceinline__ uint32_t key_of(float x) {
  if (x != x) x = -INFINITY;
  uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

struct Best {
  uint32_t key;
  int index;
};
__device__ __forceinline__ Best better(Best a, Best b) { return a.key > b.key || (a.key == b.key && a.index < b.index) ? a : b; }

/* Largest key of the row and its first index, known to all threads. */
template <typename T>
__device__ Best block_argmax(const T *row, int V) {
  __shared__ Best shared[THREADS / 32];
  Best best = {0, 0x7fffffff};
  const int N = 16 / sizeof(T);
  const bool packs = V % N == 0 && ((uintptr_t)row & 15) == 0;
  if (packs) {
#pragma unroll 4
    for (int i = threadIdx.x * N; i < V; i += THREADS * N) {
      Pack<T, N> pack = load_pack<T, N>(row + i);
#pragma unroll
      for (int j = 0; j < N; j++) best = better(best, {key_of(to_float(pack.v[j])), i + j});
    }
  } else {
    for (int i = threadIdx.x; i < V; i += THREADS) best = better(best, {key_of(to_float(row[i])), i});
  }
#pragma unroll
  for (int s = 16; s > 0; s >>= 1) {
    Best other = {__shfl_xor_sync(0xffffffffu, best.key, s), __shfl_xor_sync(0xffffffffu, best.index, s)};
    best = better(best, other);
  }
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = best;
  __syncthreads();
  best = shared[0];
  for (int i = 1; i < THREADS / 32; i++) best = better(best, shared[i]);
  __syncthreads();
  return best;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) argmax_kernel(int32_t *token, const T *logits, int V) {
  Best best = block_argmax(logits + (int64_t)blockIdx.x * V, V);
  if (threadIdx.x == 0) token[blockIdx.x] = best.index;
}

/* Mass of a key: exp((x - largest) / temperature) in fixed point. */
struct Weigher {
  float largest;
  double temperature;
  __device__ unsigned long long operator()(uint32_t key) const {
    float x = value_of(key);
    if (x == largest) return (unsigned long long)FIXED_POINT;
    return (unsigned long long)(exp(((double)x - (double)largest) / temperature) * FIXED_POINT);
  }
};

/* Exclusive sum of x over the threads before this one. */
__device__ unsigned long long block_scan(unsigned long long x) {
  __shared__ unsigned long long warps[THREADS / 32];
  int lane = threadIdx.x & 31;
  unsigned long long inclusive = x;
#pragma unroll
  for (int s = 1; s < 32; s <<= 1) {
    unsigned long long other = __shfl_up_sync(0xffffffffu, inclusive, s);
    if (lane >= s) inclusive += other;
  }
  if (lane == 31) warps[threadIdx.x >> 5] = inclusive;
  __syncthreads();
  unsigned long long before = 0;
  for (int i = 0; i < (int)(threadIdx.x >> 5); i++) before += warps[i];
  __syncthreads();
  return before + inclusive - x;
}

struct Place {
  uint32_t key;                          /* of the element found */
  unsigned long long before, rank, each; /* measure above all elements with this key; which of them it is; measure of each */
};

struct Tables {
  unsigned long long bins[BINS];
  unsigned long long before;
  uint32_t digit;
};

/* In falling order of key, the first element at which the running measure (mass, or count) exceeds `target`. */
template <typename T>
__device__ Place find_place(const T *row, int V, const Weigher &mass, bool by_mass, unsigned long long target, Tables &tables) {
  Place place = {0, 0, 0, 0};
  int above = 32;
  for (int level = 0; level < 3; level++) {
    const int bits = level == 2 ? 10 : 11, shift = above - bits;
    for (int i = threadIdx.x; i < BINS; i += THREADS) tables.bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < V; i += THREADS) {
      uint32_t key = key_of(to_float(row[i]));
      if (above < 32 && key >> above != place.key >> above) continue;
      atomicAdd(&tables.bins[BINS - 1 - (key >> shift & ((1u << bits) - 1))], by_mass ? mass(key) : 1ull);
    }
    __syncthreads();
    /* bins lie in falling order; each thread has two */
    unsigned long long a = tables.bins[2 * threadIdx.x], b = tables.bins[2 * threadIdx.x + 1], before = place.before + block_scan(a + b);
    if (before <= target && target < before + a) tables.digit = BINS - 1 - 2 * threadIdx.x, tables.before = before;
    if (before + a <= target && target < before + a + b) tables.digit = BINS - 2 - 2 * threadIdx.x, tables.before = before + a;
    __syncthreads();
    place.key |= tables.digit << shift;
    place.before = tables.before;
    above = shift;
    __syncthreads();
  }
  place.each = by_mass ? mass(place.key) : 1ull;
  place.rank = (target - place.before) / place.each;
  return place;
}

/* Index of the rank-th element (from 0, by rising index) that has this key. */
template <typename T>
__device__ int index_of(const T *row, int V, uint32_t key, unsigned long long rank) {
  __shared__ int found;
  int share = (V + THREADS - 1) / THREADS, first = min(V, (int)threadIdx.x * share), last = min(V, first + share), count = 0;
  for (int i = first; i < last; i++) count += key_of(to_float(row[i])) == key;
  unsigned long long before = block_scan((unsigned long long)count);
  if (before <= rank && rank < before + count)
    for (int i = first; i < last; i++)
      if (key_of(to_float(row[i])) == key && before++ == rank) found = i;
  __syncthreads();
  return found;
}

enum Cut { ALL, TOP_K, TOP_P };

template <typename T>
__global__ void __launch_bounds__(THREADS)
    sample_kernel(int32_t *token, const T *logits, const int32_t *counter, int V, Cut cut, int64_t top_k, float top_p, float temperature, uint64_t seed) {
  __shared__ Tables tables;
  const T *row = logits + (int64_t)blockIdx.x * V;
  Weigher mass;
  mass.largest = value_of(block_argmax(row, V).key);
  mass.temperature = (double)temperature;
  unsigned long long total;
  if (cut == TOP_K) {
    Place end = find_place(row, V, mass, false, (unsigned long long)(top_k - 1), tables);
    /* the mass of what lies above the key of rank k, and of the ties that are in */
    unsigned long long mine = 0;
    for (int i = threadIdx.x; i < V; i += THREADS) {
      uint32_t key = key_of(to_float(row[i]));
      if (key > end.key) mine += mass(key);
    }
    unsigned long long before = block_scan(mine);
    if (threadIdx.x == THREADS - 1) tables.before = before + mine;
    __syncthreads();
    total = tables.before + (end.rank + 1) * mass(end.key);
    __syncthreads();
  } else {
    unsigned long long mine = 0;
    for (int i = threadIdx.x; i < V; i += THREADS) mine += mass(key_of(to_float(row[i])));
    unsigned long long before = block_scan(mine);
    if (threadIdx.x == THREADS - 1) tables.before = before + mine;
    __syncthreads();
    total = tables.before;
    __syncthreads();
    if (cut == TOP_P) {
      double reach = ceil((double)top_p * (double)total);
      unsigned long long target = reach < 1.0 ? 0 : (unsigned long long)reach - 1;
      Place end = find_place(row, V, mass, true, target < total ? target : total - 1, tables);
      total = end.before + (end.rank + 1) * end.each;
    }
  }
  double u = nn_random_uniform(seed, blockIdx.x, (uint64_t)(uint32_t)counter[blockIdx.x]);
  unsigned long long target = (unsigned long long)(u * (double)total);
  Place place = find_place(row, V, mass, true, target < total ? target : total - 1, tables);
  int index = index_of(row, V, place.key, place.rank);
  if (threadIdx.x == 0) token[blockIdx.x] = index;
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

static nn_status run_sample(nn_context *context, int32_t *token, const void *logits, const int32_t *counter, int64_t B, int64_t V, Cut cut,
                            int64_t top_k, float top_p, float temperature, uint64_t seed, nn_dtype dtype) {
  if (B > 0)
    NN_FOR_DTYPE(dtype, T, sample_kernel<T><<<(unsigned)B, THREADS, 0, context->stream>>>(token, (const T *)logits, counter, (int)V, cut,
                                                                                         top_k, top_p, temperature, seed););
  return nn_cuda_status(context, cudaGetLastError(), "nn_sample");
}

extern "C" {

nn_status nn_argmax(nn_context *context, int32_t *token, const void *logits, int64_t B, int64_t V, nn_dtype dtype) {
  NN_ENTER(context, B >= 0 && B < (1ll << 31) && V >= 1 && V < (1ll << 31) && valid(dtype));
  if (B > 0) NN_FOR_DTYPE(dtype, T, argmax_kernel<T><<<(unsigned)B, THREADS, 0, context->stream>>>(token, (const T *)logits, (int)V););
  NN_LEAVE(context);
}

nn_status nn_sample(nn_context *context, int32_t *token, const void *logits, const int32_t *counter, int64_t B, int64_t V,
                    float temperature, uint64_t seed, nn_dtype dtype) {
  NN_ENTER(context, B >= 0 && B < (1ll << 31) && V >= 1 && V < (1 << 22) && temperature > 0.0f && valid(dtype));
  return run_sample(context, token, logits, counter, B, V, ALL, 0, 0.0f, temperature, seed, dtype);
}

nn_status nn_topk_sample(nn_context *context, int32_t *token, const void *logits, const int32_t *counter, int64_t B, int64_t V,
                         int64_t top_k, float temperature, uint64_t seed, nn_dtype dtype) {
  NN_ENTER(context, B >= 0 && B < (1ll << 31) && V >= 1 && V < (1 << 22) && top_k >= 1 && top_k <= V && temperature > 0.0f && valid(dtype));
  return run_sample(context, token, logits, counter, B, V, TOP_K, top_k, 0.0f, temperature, seed, dtype);
}

nn_status nn_topp_sample(nn_context *context, int32_t *token, const void *logits, const int32_t *counter, int64_t B, int64_t V, float top_p,
                         float temperature, uint64_t seed, nn_dtype dtype) {
  NN_ENTER(context, B >= 0 && B < (1ll << 31) && V >= 1 && V < (1 << 22) && top_p > 0.0f && top_p <= 1.0f && temperature > 0.0f && valid(dtype));
  return run_sample(context, token, logits, counter, B, V, TOP_P, 0, top_p, temperature, seed, dtype);
}

} /* extern "C" */
