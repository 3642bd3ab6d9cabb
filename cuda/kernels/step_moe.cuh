/* step_moe.cuh: routing for the experts' kernels of a decoding step (step_moe.cu, step_moe_batch.cu). A slot is token * K + choice; slots are
 * never sorted: a list of each expert's slots, in shared memory, is all that a product of few rows needs.
 */
#pragma once

#include "step.cuh"

const int STEP_WARPS = 16, STEP_THREADS = 512, MOST_EXPERTS = 32;
const int STAGE_BYTES = 1024; /* 8 rows of 64 depths */

struct StepMoe {
  bf16 *out, *h; /* h [T*K, F] */
  const bf16 *x, *norm, *router, *gate_up, *down;
  int T, H, F, E, K;
  float epsilon;
  /* of a batch only: [T, H], [T, K], [T, K], [slices, T*K, H] */
  bf16 *normed;
  int32_t *index;
  float *weight, *partial;
};

/* Slots of each expert, by token. */
template <int TOKENS>
struct Groups {
  uint8_t slots[MOST_EXPERTS][TOKENS];
  int count[MOST_EXPERTS];
};

/* Whether logit a of expert i comes before logit b of expert j (softmax.cu). */
__device__ __forceinline__ bool goes_before(float a, int i, float b, int j) { return a != b ? a > b : i < j; }

/* Softmax of E logits, the K largest and their weights, by a warp; lane = expert. All in shared memory. An expert's place is the number of
 * experts before it, which takes no turns. */
template <typename Index>
__device__ __forceinline__ void choose_experts(Index *index, float *weight, const float *logits, int E, int K) {
  const int lane = threadIdx.x & 31;
  const float logit = lane < E ? logits[lane] : -INFINITY, rank = logit == logit ? logit : INFINITY;
  int place = 0;
  for (int e = 0; e < E; e++) {
    const float other = logits[e];
    place += goes_before(other == other ? other : INFINITY, e, rank, lane);
  }
  const float maximum = warp_max(logit), power = lane < E ? expf(logit - maximum) : 0.0f, probability = power / warp_sum(power);
  const bool chosen = lane < E && place < K;
  if (chosen) index[place] = (Index)lane, weight[place] = probability;
  __syncwarp();
  float sum = 0.0f;
  for (int k = 0; k < K; k++) sum += weight[k];
  __syncwarp(); /* all have read them */
  if (chosen) weight[place] = probability / sum;
}

/* logits[token][e] = rows[token] . router[e] for this warp's experts; router_row(e, c): piece c of e's row across the warp. */
template <typename RouterRow>
__device__ __forceinline__ void router_logits(float (*logits)[MOST_EXPERTS], const bf16 *rows, int tokens, int H, int E, RouterRow router_row) {
  const int lane = threadIdx.x & 31;
  for (int e = threadIdx.x >> 5; e < E; e += STEP_WARPS) {
#pragma unroll 1
    for (int token = 0; token < tokens; token++) {
      float sum = 0.0f;
#pragma unroll
      for (int c = 0; c < ROW_CHUNKS; c++) {
        const int i = (c * 32 + lane) * 8;
        if (i < H) {
          const uint4 x = *(const uint4 *)(rows + token * row_pitch(H) + i), w = router_row(e, c);
          const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const float2 a = unpack_bf16(xs[j]), b = unpack_bf16(ws[j]);
            sum += a.x * b.x;
            sum += a.y * b.y;
          }
        }
      }
      sum = warp_sum(sum);
      if (lane == 0) logits[token][e] = sum;
    }
  }
}

/* Fills groups from index_of(slot); warps take experts in turn. The caller synchronises. */
template <int TOKENS, typename IndexOf>
__device__ __forceinline__ void group_slots(Groups<TOKENS> &groups, int slots, int E, IndexOf index_of) {
  const int lane = threadIdx.x & 31;
  for (int e = threadIdx.x >> 5; e < E; e += STEP_WARPS) {
    int count = 0;
    for (int base = 0; base < slots; base += 32) {
      const bool mine = base + lane < slots && index_of(base + lane) == e;
      const unsigned peers = __ballot_sync(0xffffffffu, mine);
      if (mine) groups.slots[e][count + __popc(peers & ((1u << lane) - 1))] = (uint8_t)(base + lane);
      count += __popc(peers);
    }
    if (lane == 0) groups.count[e] = count;
  }
}

/* The experts that have slots, a bit each. */
template <int TOKENS>
__device__ __forceinline__ unsigned used_experts(const Groups<TOKENS> &groups, int E) {
  const int lane = threadIdx.x & 31;
  return __ballot_sync(0xffffffffu, lane < E && groups.count[lane] > 0);
}
/* The nth expert (from 0) among `used`. */
__device__ __forceinline__ int nth_expert(unsigned used, int nth) {
#pragma unroll 1
  for (; nth > 0; nth--) used &= used - 1;
  return __ffs(used) - 1;
}

/* Of one tile of a product whose columns 0-3 are gates and 4-7 ups, by lanes as mma.sync leaves them: lanes t < 2 have gates, t >= 2 ups, of
 * rows g (c[0], c[1]) and g + 8 (c[2], c[3]). The former finish row g, the latter g + 8: two neighbouring columns of h, packed. */
__device__ __forceinline__ uint32_t finish_swiglu(const float (&c)[4]) {
  const bool upper = (threadIdx.x & 2) != 0;
  const float x = __shfl_xor_sync(0xffffffffu, upper ? c[0] : c[2], 2), y = __shfl_xor_sync(0xffffffffu, upper ? c[1] : c[3], 2);
  const float gate_x = upper ? x : c[0], gate_y = upper ? y : c[1], up_x = upper ? c[2] : x, up_y = upper ? c[3] : y;
  return pack_bf16(swiglu<bf16>(rounded<bf16>(gate_x), rounded<bf16>(up_x)), swiglu<bf16>(rounded<bf16>(gate_y), rounded<bf16>(up_y)));
}

/* Queues the kernels for 17 to 64 tokens (step_moe_batch.cu); `scratch` has room for them. */
nn_status nn_decode_moe_batch(nn_context *context, StepMoe s, Scratch &scratch);
/* Whether they can take it. */
bool nn_moe_batch_fits(nn_context *context, int64_t T, int64_t H, int64_t K);
