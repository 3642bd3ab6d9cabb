/* moe.cu: the mixture of experts: sorting slots by expert, the grouped products as Products (gather in the loads, SwiGLU in the
 * epilogues), and the sum of a token's slots in the order of its choices. Offsets are read on the device only.
 */
#include "chain.cuh"
#include "product.cuh"
#include "sort.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ int expert_of(const int32_t *index, int64_t slot, int64_t slots, int experts) {
  if (slot >= slots) return -1;
  int e = index[slot];
  return e < 0 || e >= experts ? 0 : e;
}

/* histogram [blocks, E]: slots of each expert in each block of 1024 slots. */
__global__ void __launch_bounds__(1024) permute_count_kernel(int32_t *histogram, const int32_t *index, int64_t slots, int experts) {
  extern __shared__ uint16_t counts[];
  __shared__ int total[SORT_BINS];
  let_next_start();
  block_rank(expert_of(index, (int64_t)blockIdx.x * SORT_BLOCK + threadIdx.x, slots, experts), experts, counts, total);
  for (int b = threadIdx.x; b < experts; b += SORT_BLOCK) histogram[(int64_t)blockIdx.x * experts + b] = total[b];
}

/* At most this many blocks of slots: each block of the place kernel adds up all of the histogram, which is less than a kernel for it. */
const int MOST_ADDED_BLOCKS = 256;

/* place [blocks, E]: the histogram, or, where offsets are `known`, the places of each block's first slot of each expert. Ranks its slots while
 * the kernel before it still runs. */
__global__ void __launch_bounds__(1024)
    permute_place_kernel(int32_t *offsets, int32_t *load, int32_t *slot_token, float *slot_weight, int32_t *slot_of, const int32_t *place,
                         const int32_t *index, const float *weight, int64_t slots, int experts, int K, bool known) {
  extern __shared__ uint16_t counts[];
  __shared__ int total[SORT_BINS], first[SORT_BINS], start[SORT_BINS]; /* of this block's slots: each expert's place; of all: its offset */
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t slot = (int64_t)blockIdx.x * SORT_BLOCK + threadIdx.x;
  const float w = slot < slots ? weight[slot] : 0.0f;
  const int e = expert_of(index, slot, slots, experts), rank = block_rank(e, experts, counts, total);
  wait_for_previous();
  if (known) {
    for (int b = threadIdx.x; b < experts; b += SORT_BLOCK) {
      first[b] = __ldcg(place + (int64_t)blockIdx.x * experts + b), start[b] = __ldcg(offsets + b);
      if (blockIdx.x == 0) load[b] = __ldcg(offsets + b + 1) - start[b];
    }
    __syncthreads();
  } else {
    for (int b = warp; b < experts; b += 32) {
      int before = 0, all = 0;
      for (int i = lane; i < gridDim.x; i += 32) {
        const int count = __ldcg(place + i * experts + b);
        all += count, before += i < blockIdx.x ? count : 0;
      }
      before = __reduce_add_sync(0xffffffffu, before), all = __reduce_add_sync(0xffffffffu, all);
      if (lane == 0) first[b] = before, total[b] = all;
    }
    __syncthreads();
    if (warp == 0) {
      int running = 0;
      for (int b = lane; b < (experts + 31) / 32 * 32; b += 32) {
        const int count = b < experts ? total[b] : 0, inclusive = running + warp_scan(count);
        if (b < experts) {
          start[b] = inclusive - count;
          if (blockIdx.x == 0) offsets[b] = inclusive - count, load[b] = count;
        }
        running = __shfl_sync(0xffffffffu, inclusive, 31);
      }
      if (blockIdx.x == 0 && lane == 0) offsets[experts] = running;
    }
    __syncthreads();
  }
  if (e >= 0) {
    const int at = first[e] + rank + (known ? 0 : start[e]);
    slot_token[at] = (int32_t)(slot / K);
    slot_weight[at] = w;
    slot_of[slot] = at;
  }
}

const int FEW_SLOTS = 256;

/* All of nn_moe_permute for at most FEW_SLOTS slots: thread i counts the slots before slot i, and those before expert i. One block. */
__global__ void __launch_bounds__(FEW_SLOTS)
    permute_few_kernel(int32_t *offsets, int32_t *load, int32_t *slot_token, float *slot_weight, int32_t *slot_of, const int32_t *index,
                       const float *weight, int slots, int experts, int K) {
  __shared__ int4 keys[FEW_SLOTS / 4];
  int i = threadIdx.x, mine = expert_of(index, i, slots, experts);
  float w = i < slots ? weight[i] : 0.0f;
  ((int *)keys)[i] = i < slots ? mine : 0x7fffffff; /* behind all */
  __syncthreads();
  int place = 0, start = 0, count = 0;
  for (int j = 0; j < slots; j += 4) {
    int4 four = keys[j / 4];
    const int key[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int l = 0; l < 4; l++) {
      place += key[l] < mine || (key[l] == mine && j + l < i);
      start += key[l] < i, count += key[l] == i;
    }
  }
  if (i < slots) slot_token[place] = i / K, slot_weight[place] = w, slot_of[i] = place;
  if (i < experts) offsets[i] = start, load[i] = count;
  if (i == 0) offsets[experts] = slots;
}

/* out [T, H]: N columns a thread, choices in their order. */
template <typename T, int N>
__global__ void combine_kernel(T *out, const T *base, const T *y, const float *weight, const int32_t *slot_of, int64_t tokens, int H, int K) {
  int packs = H / N;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < tokens * packs; i += (int64_t)gridDim.x * blockDim.x) {
    int64_t t = i / packs, column = (i - t * packs) * N;
    float sum[N] = {};
    for (int k = 0; k < K; k++) {
      Pack<T, N> piece = load_pack<T, N>(y + (int64_t)slot_of[t * K + k] * H + column);
      float w = weight ? weight[t * K + k] : 1.0f;
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += w * to_float(piece.v[j]);
    }
    Pack<T, N> result;
    if (base) {
      Pack<T, N> b = load_pack<T, N>(base + t * H + column);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] = to_float(b.v[j]) + sum[j];
    }
#pragma unroll
    for (int j = 0; j < N; j++) result.v[j] = from_float<T>(sum[j]);
    store_pack<T, N>(out + t * H + column, result);
  }
}

/* dweight [slots] (by token and choice) = the parts of its sorted slot's dh . h, in the order of the columns. */
__global__ void sum_dots_kernel(float *dweight, const float *row_dots, const int32_t *slot_of, int64_t slots, int parts) {
  int64_t slot = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (slot >= slots) return;
  const float *dots = row_dots + (int64_t)slot_of[slot] * parts;
  float sum = 0.0f;
  for (int i = 0; i < parts; i++) sum += dots[i];
  dweight[slot] = sum;
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

#define MOE_SIZES_FIT (T >= 0 && H >= 0 && F >= 0 && E >= 1 && E < (1 << 20) && K >= 0 && valid(dtype))

/* A weight gradient without slots: nothing to add, but zeros to store. */
static nn_status without_slots(nn_context *context, float *gradient, int64_t n, int32_t accumulate) {
  return accumulate ? NN_OK : nn_zero_grad(context, gradient, n);
}

extern "C" {

nn_status nn_moe_permute(nn_context *context, int32_t *offsets, int32_t *load, int32_t *slot_token, float *slot_weight, int32_t *slot_of,
                         const int32_t *index, const float *weight, int64_t T, int64_t E, int64_t K) {
  NN_ENTER(context, T >= 0 && E >= 1 && K >= 0 && T * K < (1ll << 31) - SORT_BLOCK);
  if (E > SORT_BINS)
    return nn_fail(context, NN_ERROR_UNSUPPORTED, "nn_moe_permute: %lld experts; the CUDA library sorts up to %d", (long long)E, SORT_BINS);
  int64_t slots = T * K, blocks = ceil_div(slots, SORT_BLOCK);
  if (slots == 0) {
    NN_CUDA(context, cudaMemsetAsync(offsets, 0, (E + 1) * 4, context->stream));
    NN_CUDA(context, cudaMemsetAsync(load, 0, E * 4, context->stream));
    return NN_OK;
  }
  if (slots <= FEW_SLOTS) { /* the block has a thread for each expert: SORT_BINS is no more */
    int threads = (int)ceil_div(slots > E ? slots : E, 32) * 32;
    permute_few_kernel<<<1, threads, 0, context->stream>>>(offsets, load, slot_token, slot_weight, slot_of, index, weight, (int)slots, (int)E,
                                                           (int)K);
    NN_LEAVE(context);
  }
  Scratch scratch(context);
  int32_t *histogram = scratch.take<int32_t>(blocks * E);
  NN_SCRATCH(context, scratch);
  const bool known = blocks > MOST_ADDED_BLOCKS;
  const int shared = 32 * (int)E * (int)sizeof(uint16_t);
  permute_count_kernel<<<(unsigned)blocks, SORT_BLOCK, shared, context->stream>>>(histogram, index, slots, (int)E);
  if (known) sort_scan_kernel<<<1, 1024, 0, context->stream>>>(histogram, offsets, (int)blocks, (int)E);
  NN_TRY(launch_kernel(context, __func__, !known, permute_place_kernel, dim3((unsigned)blocks), SORT_BLOCK, shared, offsets, load, slot_token,
                       slot_weight, slot_of, histogram, index, weight, slots, (int)E, (int)K, known));
  NN_LEAVE(context);
}

nn_status nn_moe_up_forward(nn_context *context, void *h, void *gate_up, const void *x, const int32_t *slot_token, const int32_t *offsets,
                            const void *gate_up_weight, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, nn_dtype dtype) {
  NN_ENTER(context, MOE_SIZES_FIT);
  Product p = make_product(gate_up, x, gate_up_weight, T * K, F, H, dtype, dtype);
  p.grouping = GROUP_ROWS, p.groups = (int)E, p.offsets = offsets;
  p.a_rows = slot_token, p.a_row_count = T, p.b_stride = 2 * F * H;
  p.epilogue = SWIGLU, p.h = h;
  return nn_run_product(context, p, __func__);
}

nn_status nn_moe_down_forward(nn_context *context, void *y, const void *h, const int32_t *offsets, const void *down_weight, int64_t T,
                              int64_t H, int64_t F, int64_t E, int64_t K, nn_dtype dtype) {
  NN_ENTER(context, MOE_SIZES_FIT);
  Product p = make_product(y, h, down_weight, T * K, H, F, dtype, dtype);
  p.grouping = GROUP_ROWS, p.groups = (int)E, p.offsets = offsets, p.b_stride = H * F;
  return nn_run_product(context, p, __func__);
}

nn_status nn_moe_combine(nn_context *context, void *out, const void *base, const void *y, const float *weight, const int32_t *slot_of,
                         int64_t T, int64_t H, int64_t K, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && H >= 0 && K >= 0 && valid(dtype));
  if (T > 0 && H > 0)
    NN_FOR_DTYPE(dtype, X, {
      const int N = 16 / sizeof(X);
      bool packs = H % N == 0 && aligned16(out) && aligned16(base) && aligned16(y);
      int64_t blocks = ceil_div(T * H / (packs ? N : 1), 128);
      unsigned grid = (unsigned)(blocks < 1 ? 1 : blocks < 65536 ? blocks : 65536);
      if (packs)
        combine_kernel<X, N><<<grid, 128, 0, context->stream>>>((X *)out, (const X *)base, (const X *)y, weight, slot_of, T, (int)H, (int)K);
      else
        combine_kernel<X, 1><<<grid, 128, 0, context->stream>>>((X *)out, (const X *)base, (const X *)y, weight, slot_of, T, (int)H, (int)K);
    });
  NN_LEAVE(context);
}

nn_status nn_moe_down_backward(nn_context *context, void *dgate_up, void *h, float *dweight, const void *dout,
                               const void *gate_up, const int32_t *slot_token, const float *slot_weight,
                               const int32_t *slot_of, const int32_t *offsets, const void *down_weight, int64_t T, int64_t H, int64_t F,
                               int64_t E, int64_t K, nn_dtype dtype) {
  NN_ENTER(context, MOE_SIZES_FIT);
  if (T * K == 0) return NN_OK;
  Scratch scratch(context);
  float *row_dots = scratch.take<float>(T * K * most_dot_parts(F));
  NN_SCRATCH(context, scratch);
  Product p = make_product(dgate_up, dout, down_weight, T * K, F, H, dtype, dtype);
  p.grouping = GROUP_ROWS, p.groups = (int)E, p.offsets = offsets;
  p.a_rows = slot_token, p.a_row_count = T, p.b_mn = 1, p.ldb = F, p.b_stride = H * F;
  p.epilogue = SWIGLU_BACKWARD, p.gate_up = gate_up, p.h = h, p.slot_weight = slot_weight;
  p.row_dots = row_dots;
  NN_TRY(nn_run_product(context, p, __func__));
  sum_dots_kernel<<<(unsigned)ceil_div(T * K, 256), 256, 0, context->stream>>>(dweight, row_dots, slot_of, T * K, F > 0 ? p.dot_parts : 0);
  NN_LEAVE(context);
}

nn_status nn_moe_down_weight_gradient(nn_context *context, float *ddown_weight, const void *dout, const void *h,
                                      const int32_t *slot_token, const float *slot_weight, const int32_t *offsets, int64_t T, int64_t H, int64_t F, int64_t E,
                                      int64_t K, int32_t accumulate, nn_dtype dtype) {
  NN_ENTER(context, MOE_SIZES_FIT);
  if (T * K == 0) return without_slots(context, ddown_weight, E * H * F, accumulate);
  Product p = make_product(ddown_weight, dout, h, H, F, T * K, NN_F32, dtype);
  p.a_mn = p.b_mn = 1, p.lda = H, p.ldb = F;
  p.grouping = GROUP_DEPTH, p.groups = (int)E, p.offsets = offsets;
  p.a_rows = slot_token, p.a_row_count = T, p.a_scale = slot_weight, p.c_stride = H * F, p.beta = accumulate ? 1.0f : 0.0f, p.m_fastest = 1;
  return nn_run_product(context, p, __func__);
}

nn_status nn_moe_up_backward(nn_context *context, void *dx_slots, const void *dgate_up, const int32_t *offsets, const void *gate_up_weight,
                             int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, nn_dtype dtype) {
  NN_ENTER(context, MOE_SIZES_FIT);
  Product p = make_product(dx_slots, dgate_up, gate_up_weight, T * K, H, 2 * F, dtype, dtype);
  p.grouping = GROUP_ROWS, p.groups = (int)E, p.offsets = offsets, p.b_mn = 1, p.ldb = H, p.b_stride = 2 * F * H;
  return nn_run_product(context, p, __func__);
}

nn_status nn_moe_up_weight_gradient(nn_context *context, float *dgate_up_weight, const void *dgate_up, const void *x,
                                    const int32_t *slot_token, const int32_t *offsets, int64_t T, int64_t H, int64_t F, int64_t E,
                                    int64_t K, int32_t accumulate, nn_dtype dtype) {
  NN_ENTER(context, MOE_SIZES_FIT);
  if (T * K == 0) return without_slots(context, dgate_up_weight, E * 2 * F * H, accumulate);
  Product p = make_product(dgate_up_weight, dgate_up, x, 2 * F, H, T * K, NN_F32, dtype);
  p.a_mn = p.b_mn = 1, p.lda = 2 * F, p.ldb = H;
  p.grouping = GROUP_DEPTH, p.groups = (int)E, p.offsets = offsets;
  p.b_rows = slot_token, p.c_stride = 2 * F * H, p.beta = accumulate ? 1.0f : 0.0f;
  return nn_run_product(context, p, __func__);
}

} /* extern "C" */
