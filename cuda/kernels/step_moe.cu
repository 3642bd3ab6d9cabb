/* step_moe.cu: the experts' half of a layer for few tokens, in two kernels of a chain: norm, router, gate and up with SwiGLU; down, the
 * weighted sum and the residual. Each block of both routes all tokens for itself, which is faster than a kernel that tells the others.
 * Weights flow through a queue of each warp in shared memory (step.cuh), deep enough for the memory's latency at full bandwidth: 160 KB a
 * block, which sm_90 has. The second kernel's block takes the place of one of the first that has ended and fills its queue before it waits
 * for the others. What these cannot take goes through the entries that they are made of.
 */
#include "step_moe.cuh"

const int MOST_TOKENS = 16, MOST_SLOTS = 64;
const int STAGES = 10;

/* Who goes where, in shared memory. */
struct Routes {
  float logits[MOST_TOKENS][MOST_EXPERTS], weight[MOST_SLOTS];
  int16_t index[MOST_SLOTS];
  Groups<MOST_TOKENS> groups;
};

/* ---- kernels: routing ---------------------------------------------------------------------------------------- */

/* What routing needs of weights comes into the warp's queue, which is not in use yet: the norm's, and the router's of expert `warp`. */
__device__ __forceinline__ void park_router(uint32_t queue, const StepMoe &s) {
  park_row(queue, s.norm, s.H);
  park_row(queue + 2048, s.router + (int64_t)min((int)(threadIdx.x >> 5), s.E - 1) * s.H, s.H);
  cp_async_commit();
}

/* Fills routes, and rows [T, pitch] with the norm of x. After park_router. Returns the experts that have slots, a bit each. The same in
 * every block. */
__device__ __forceinline__ unsigned route(Routes &routes, bf16 *rows, const StepMoe &s, uint32_t queue) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  cp_async_wait<0>();
  norm_rows<STEP_WARPS>(rows, s.x, [&](int c) { return parked(queue, c); }, s.T, s.H, s.epsilon);
  __syncthreads();
  router_logits(routes.logits, rows, s.T, s.H, s.E, [&](int e, int c) {
    return e == warp ? parked(queue + 2048, c) : load_weights(s.router + (int64_t)e * s.H + (c * 32 + lane) * 8);
  });
  __syncthreads();
  for (int token = warp; token < s.T; token += STEP_WARPS)
    choose_experts(routes.index + token * s.K, routes.weight + token * s.K, routes.logits[token], s.E, s.K);
  __syncthreads();
  group_slots(routes.groups, s.T * s.K, s.E, [&](int slot) { return (int)routes.index[slot]; });
  __syncthreads();
  return used_experts(routes.groups, s.E);
}

/* ---- kernels: products --------------------------------------------------------------------------------------- */

/* h[slot] = silu(gate) * up. A warp takes 4 columns of h of one expert at a time, over the whole depth: 4 rows of gate and 4 of up. */
__global__ void __launch_bounds__(STEP_THREADS, 2) step_up_kernel(const StepMoe s) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Routes routes;
  bf16 *rows = (bf16 *)(memory + STEP_WARPS * STAGES * STAGE_BYTES);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const uint32_t queue = shared_address(memory) + warp * STAGES * STAGE_BYTES, put = queue_put(queue);
  park_router(queue, s);
  wait_for_previous();
  let_next_start();
  const unsigned used = route(routes, rows, s, queue);

  const int columns = s.F / 4 /* units of an expert */, units = __popc(used) * columns, steps = s.H / 64, warps = gridDim.x * STEP_WARPS;
  const int first = blockIdx.x * STEP_WARPS + warp;
  const int64_t to_up = (int64_t)s.F * s.H;
  int unit_ahead = first, step_ahead = 0, stage_ahead = 0;
  const bf16 *from = NULL;
  auto fetch = [&] {
    if (unit_ahead < units) {
      if (step_ahead == 0) {
        const int nth = unit_ahead / columns, column = (unit_ahead - nth * columns) * 4;
        from = s.gate_up + ((int64_t)nth_expert(used, nth) * 2 * s.F + column + (lane >> 3)) * s.H + (lane & 7) * 8;
      }
      queue16(put + stage_ahead * STAGE_BYTES, from, true);
      queue16(put + stage_ahead * STAGE_BYTES + 512, from + to_up, true);
      from += 64;
      if (++step_ahead == steps) step_ahead = 0, unit_ahead += warps;
    }
    cp_async_commit();
    if (++stage_ahead == STAGES) stage_ahead = 0;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch();
  int stage = 0;
  for (int unit = first; unit < units; unit += warps) {
    const int nth = unit / columns, column = (unit - nth * columns) * 4, e = nth_expert(used, nth), count = routes.groups.count[e];
    const int low_slot = g < count ? routes.groups.slots[e][g] : 0, high_slot = g + 8 < count ? routes.groups.slots[e][g + 8] : 0;
    const uint32_t low = shared_address(rows + low_slot / s.K * row_pitch(s.H) + t * 8);
    const uint32_t high = shared_address(rows + high_slot / s.K * row_pitch(s.H) + t * 8);
    float c[4] = {};
    for (int k = 0; k < steps; k++) {
      cp_async_wait<STAGES - 2>();
      __syncwarp(); /* the other lanes' copies too; and the stage before this one is read by all */
      const uint32_t at = queue + stage * STAGE_BYTES;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t depth = k * 128 + half * 64;
        multiply(c, load_shared16(low + depth, g < count), load_shared16(high + depth, g + 8 < count), queue_get(at, half));
      }
      fetch();
      if (++stage == STAGES) stage = 0;
    }
    const uint32_t two = finish_swiglu(c);
    if (t >= 2 ? g + 8 < count : g < count) *(uint32_t *)(s.h + (int64_t)(t >= 2 ? high_slot : low_slot) * s.F + column + (t & 1) * 2) = two;
  }
  cp_async_wait<0>();
}

/* out = x + sum over the choices, in their order, of weight * (h[slot] down^T). A block has `columns` <= 8 columns of all experts in use, its
 * warps share the depth. FEW: at most 8 tokens; then half the registers leave room for a block of the next kernel. */
template <bool FEW>
__global__ void __launch_bounds__(STEP_THREADS, FEW ? 2 : 1) step_down_kernel(const StepMoe s, int columns) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Routes routes;
  unsigned char *after = memory + STEP_WARPS * STAGES * STAGE_BYTES; /* rows while routing, then sums [warp][slot][8] */
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, n0 = blockIdx.x * columns, slots = s.T * s.K;
  const uint32_t queue = shared_address(memory) + warp * STAGES * STAGE_BYTES, put = queue_put(queue);
  park_router(queue, s);
  /* x is older than the kernel before, which let this one start only after it had waited for x itself. */
  const unsigned used = route(routes, (bf16 *)after, s, queue);

  const int here = min(columns, s.H - n0), steps = s.F / 64, each = (steps + STEP_WARPS - 1) / STEP_WARPS;
  const int first = min(warp * each, steps), last = min(first + each, steps), items = first < last ? __popc(used) : 0;
  const bool has_low = (lane >> 3) < here, has_high = (lane >> 3) + 4 < here;
  int item_ahead = 0, step_ahead = first, stage_ahead = 0;
  unsigned left_ahead = used;
  const bf16 *from = NULL;
  auto fetch = [&] {
    if (item_ahead < items) {
      if (step_ahead == first) {
        from = s.down + ((int64_t)(__ffs(left_ahead) - 1) * s.H + n0 + (lane >> 3)) * s.F + first * 64 + (lane & 7) * 8;
        left_ahead &= left_ahead - 1;
      }
      queue16(put + stage_ahead * STAGE_BYTES, has_low ? from : s.down, has_low);
      queue16(put + stage_ahead * STAGE_BYTES + 512, has_high ? from + 4 * (int64_t)s.F : s.down, has_high);
      from += 64;
      if (++step_ahead == last) step_ahead = first, item_ahead++;
    }
    cp_async_commit();
    if (++stage_ahead == STAGES) stage_ahead = 0;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch();
  wait_for_previous();
  let_next_start();

  float(*sums)[8] = (float(*)[8])after + warp * slots, (*all)[8] = (float(*)[8])after;
  const int AHEAD = 3; /* steps whose rows of h are read at once */
  const uint4 zero = make_uint4(0, 0, 0, 0);
  int stage = 0;
  unsigned left = used;
  for (; left != 0; left &= left - 1) {
    const int e = __ffs(left) - 1, count = routes.groups.count[e];
    const int low_slot = g < count ? routes.groups.slots[e][g] : 0, high_slot = g + 8 < count ? routes.groups.slots[e][g + 8] : 0;
    const bf16 *low = s.h + (int64_t)low_slot * s.F + t * 8, *high = s.h + (int64_t)high_slot * s.F + t * 8;
    float c[4] = {};
    for (int k = first; k < last; k += AHEAD) {
      uint4 a[AHEAD][2], b[FEW ? 1 : AHEAD][2];
#pragma unroll
      for (int u = 0; u < AHEAD; u++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          a[u][half] = k + u < last && g < count ? load_shared_result(low + (k + u) * 64 + half * 32) : zero;
          if (!FEW) b[u][half] = k + u < last && g + 8 < count ? load_shared_result(high + (k + u) * 64 + half * 32) : zero;
        }
#pragma unroll
      for (int u = 0; u < AHEAD; u++)
        if (k + u < last) {
          cp_async_wait<STAGES - 2>();
          __syncwarp();
#pragma unroll
          for (int half = 0; half < 2; half++)
            multiply(c, a[u][half], FEW ? zero : b[FEW ? 0 : u][half], queue_get(queue + stage * STAGE_BYTES, half));
          fetch();
          if (++stage == STAGES) stage = 0;
        }
    }
    if (g < count) *(float2 *)&sums[low_slot][t * 2] = make_float2(c[0], c[1]);
    if (!FEW && g + 8 < count) *(float2 *)&sums[high_slot][t * 2] = make_float2(c[2], c[3]);
  }
  cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < slots * 8; i += STEP_THREADS) { /* into the first warp's place: each element by the thread that reads it */
    float sum = all[i >> 3][i & 7];
#pragma unroll
    for (int w = 1; w < STEP_WARPS; w++) sum += all[w * slots + (i >> 3)][i & 7];
    all[i >> 3][i & 7] = routes.weight[i >> 3] * rounded<bf16>(sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < s.T * here; i += STEP_THREADS) {
    const int token = i / here, column = i - token * here;
    float sum = 0.0f;
    for (int k = 0; k < s.K; k++) sum += all[token * s.K + k][column];
    const int64_t at = (int64_t)token * s.H + n0 + column;
    s.out[at] = from_float<bf16>(to_float(__ldcg(s.x + at)) + sum);
  }
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

/* Shared memory of the two kernels. */
static int up_bytes_of(int64_t T, int64_t H) { return (int)(STEP_WARPS * STAGES * STAGE_BYTES + T * row_pitch((int)H) * 2); }
static int down_bytes_of(int64_t T, int64_t H, int64_t K) {
  const int64_t rows = T * row_pitch((int)H) * 2, sums = STEP_WARPS * T * K * 8 * 4;
  return (int)(STEP_WARPS * STAGES * STAGE_BYTES + (rows > sums ? rows : sums));
}

template <bool FEW>
static nn_status run_step(nn_context *context, const StepMoe &s) {
  const char *where = "nn_decode_moe";
  const int up_bytes = up_bytes_of(s.T, s.H), down_bytes = down_bytes_of(s.T, s.H, s.K);
  int columns = (int)ceil_div(s.H, context->multiprocessors);
  if (columns > 8) columns = 8;
  NN_CUDA(context, cudaFuncSetAttribute(step_up_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, up_bytes));
  NN_CUDA(context, cudaFuncSetAttribute(step_down_kernel<FEW>, cudaFuncAttributeMaxDynamicSharedMemorySize, down_bytes));
  NN_TRY(launch_chained(context, where, step_up_kernel, dim3((unsigned)context->multiprocessors), STEP_THREADS, up_bytes, s));
  return launch_chained(context, where, step_down_kernel<FEW>, dim3((unsigned)ceil_div(s.H, columns)), STEP_THREADS, down_bytes, s, columns);
}

extern "C" nn_status nn_decode_moe(nn_context *context, void *out, const void *x, const void *norm, const void *router, const void *gate_up_weight,
                                   const void *down_weight, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, float epsilon, nn_dtype dtype) {
  NN_ENTER(context, T >= 0 && T <= NN_DECODE_TOKENS && H >= 0 && H < (1 << 30) && F >= 0 && F < (1 << 30) && E >= 1 && E < (1 << 20) &&
                        K >= 0 && K <= E && valid(dtype) && out != x);
  if (T == 0 || H == 0) return NN_OK;
  Scratch scratch(context);
  const bool few = T <= MOST_TOKENS && T * K <= MOST_SLOTS;
  if (dtype == NN_BF16 && context->capability >= 80 && K >= 1 && E <= MOST_EXPERTS && H <= 1024 && H % 64 == 0 && F > 0 && F % 64 == 0 &&
      aligned16(out) && aligned16(x) && aligned16(norm) && aligned16(router) && aligned16(gate_up_weight) && aligned16(down_weight) &&
      (few ? shared_memory_fits(context, up_bytes_of(T, H)) && shared_memory_fits(context, down_bytes_of(T, H, K))
           : nn_moe_batch_fits(context, T, H, K))) {
    StepMoe s = {};
    s.h = scratch.take<bf16>(T * K * F);
    s.out = (bf16 *)out, s.x = (const bf16 *)x, s.norm = (const bf16 *)norm, s.router = (const bf16 *)router;
    s.gate_up = (const bf16 *)gate_up_weight, s.down = (const bf16 *)down_weight;
    s.T = (int)T, s.H = (int)H, s.F = (int)F, s.E = (int)E, s.K = (int)K, s.epsilon = epsilon;
    if (!few) return nn_decode_moe_batch(context, s, scratch);
    NN_SCRATCH(context, scratch);
    return T <= 8 ? run_step<true>(context, s) : run_step<false>(context, s);
  }
  const int64_t size = dtype == NN_BF16 ? 2 : 4, N = T * K;
  char *normed = scratch.take<char>(T * H * size), *h = scratch.take<char>(N * F * size), *slots = scratch.take<char>(N * H * size);
  float *reciprocal = scratch.take<float>(T), *logits = scratch.take<float>(T * E), *probability = scratch.take<float>(T * E);
  float *weight = scratch.take<float>(N), *slot_weight = scratch.take<float>(N);
  int32_t *index = scratch.take<int32_t>(N), *slot_token = scratch.take<int32_t>(N), *slot_of = scratch.take<int32_t>(N);
  int32_t *offsets = scratch.take<int32_t>(E + 1), *load = scratch.take<int32_t>(E);
  NN_SCRATCH(context, scratch);
  ScratchTaken taken(context, scratch);
  NN_TRY(nn_rmsnorm_forward(context, normed, reciprocal, x, norm, T, H, epsilon, dtype));
  NN_TRY(nn_gemm(context, logits, normed, router, T, E, H, 0, 1, NN_F32, dtype));
  NN_TRY(nn_softmax_topk_forward(context, probability, weight, index, logits, T, E, K));
  NN_TRY(nn_moe_permute(context, offsets, load, slot_token, slot_weight, slot_of, index, weight, T, E, K));
  NN_TRY(nn_moe_up_forward(context, h, NULL, normed, slot_token, offsets, gate_up_weight, T, H, F, E, K, dtype));
  NN_TRY(nn_moe_down_forward(context, slots, h, offsets, down_weight, T, H, F, E, K, dtype));
  return nn_moe_combine(context, out, x, slots, weight, slot_of, T, H, K, dtype);
}
