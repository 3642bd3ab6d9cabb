/* step_moe_batch.cu: the experts' half of a layer for up to 64 tokens, in four kernels of a chain: norm and router; gate and up with SwiGLU;
 * down, the depth in slices; the sum of slices and choices and the residual. As in step_moe.cu weights flow through queues in shared memory,
 * here 16 rows of them a stage, because every row of weights meets many rows of activations, which lie in shared memory too.
 */
#include "step_moe.cuh"

const int BATCH_TOKENS = 64, MT = BATCH_TOKENS / 16, TILES = 2, SLICE = 768 /* depths of down at once */;
const int BATCH_STAGES = 3;
const int BATCH_STAGE_BYTES = TILES * STAGE_BYTES, QUEUE_BYTES = STEP_WARPS * BATCH_STAGES * BATCH_STAGE_BYTES;

/* ---- kernels ------------------------------------------------------------------------------------------------- */

/* One token a block: normed, index, weight. */
__global__ void __launch_bounds__(STEP_THREADS) step_route_kernel(const StepMoe s) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ float logits[1][MOST_EXPERTS], weight[MOST_EXPERTS];
  __shared__ int index[MOST_EXPERTS];
  bf16 *row = (bf16 *)memory;
  const int token = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint4 norm[ROW_CHUNKS], router[ROW_CHUNKS];
  load_row(norm, s.norm, s.H);
  load_row(router, s.router + (int64_t)min(warp, s.E - 1) * s.H, s.H);
  wait_for_previous();
  let_next_start();
  norm_rows<STEP_WARPS>(row, s.x + (int64_t)token * s.H, [&](int c) { return norm[c]; }, 1, s.H, s.epsilon);
  __syncthreads();
  router_logits(logits, row, 1, s.H, s.E, [&](int e, int c) {
    return e == warp ? router[c] : load_weights(s.router + (int64_t)e * s.H + (c * 32 + lane) * 8);
  });
  for (int i = threadIdx.x * 8; i < s.H; i += STEP_THREADS * 8) *(uint4 *)(s.normed + (int64_t)token * s.H + i) = *(const uint4 *)(row + i);
  __syncthreads();
  if (warp > 0) return;
  choose_experts(index, weight, logits[0], s.E, s.K);
  __syncwarp();
  if (lane < s.K) s.index[token * s.K + lane] = index[lane], s.weight[token * s.K + lane] = weight[lane];
}

/* Queue of a warp: unit after unit (first, first + stride, ...), 16 rows of weights each: from .. +3 rows, `second` elements on 4 more, and all
 * that again `tile` elements on. locate(unit): this lane's place in the first 4 rows. */
template <typename Locate>
struct Stream {
  Locate locate;
  const bf16 *from;
  int64_t second, tile;
  uint32_t queue, put;
  int unit, units, stride, step, steps, stage_ahead, stage;

  __device__ __forceinline__ Stream(Locate how, uint32_t at, int first, int count, int apart, int depth_steps, int64_t to_second, int64_t to_tile)
      : locate(how), from(NULL), second(to_second), tile(to_tile), queue(at), put(queue_put(at)), unit(first), units(count), stride(apart), step(0),
        steps(depth_steps), stage_ahead(0), stage(0) {
#pragma unroll
    for (int i = 0; i < BATCH_STAGES - 1; i++) fetch();
  }
  __device__ __forceinline__ void fetch() {
    if (unit < units) {
      if (step == 0) from = locate(unit);
      const uint32_t to = put + stage_ahead * BATCH_STAGE_BYTES;
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        queue16(to + j * STAGE_BYTES, from + j * tile, true);
        queue16(to + j * STAGE_BYTES + 512, from + j * tile + second, true);
      }
      from += 64;
      if (++step == steps) step = 0, unit += stride;
    }
    cp_async_commit();
    if (++stage_ahead == BATCH_STAGES) stage_ahead = 0;
  }
  /* c += `count` rows (low, high: addresses of this lane's rows of each 16) times one unit's 16 columns. */
  __device__ __forceinline__ void multiply_unit(float (&c)[TILES][MT][4], const uint32_t (&low)[MT], const uint32_t (&high)[MT], int count) {
    const int g = (threadIdx.x & 31) >> 2;
    for (int k = 0; k < steps; k++) {
      cp_async_wait<BATCH_STAGES - 2>();
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint4 b[TILES];
#pragma unroll
        for (int j = 0; j < TILES; j++) b[j] = queue_get(queue + stage * BATCH_STAGE_BYTES + j * STAGE_BYTES, half);
        const uint32_t depth = k * 128 + half * 64;
#pragma unroll
        for (int m = 0; m < MT; m++)
          if (m * 16 < count) {
            const uint4 top = load_shared16(low[m] + depth, m * 16 + g < count), bottom = load_shared16(high[m] + depth, m * 16 + 8 + g < count);
#pragma unroll
            for (int j = 0; j < TILES; j++) multiply(c[j][m], top, bottom, b[j]);
          }
      }
      fetch();
      if (++stage == BATCH_STAGES) stage = 0;
    }
  }
};

/* h[slot] = silu(gate) * up; a warp takes 8 columns of h of one expert at a time: 4 gates, 4 ups, and the same again. */
__global__ void __launch_bounds__(STEP_THREADS, 1) step_up_batch_kernel(const StepMoe s) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Groups<BATCH_TOKENS> groups;
  bf16 *rows = (bf16 *)(memory + QUEUE_BYTES);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, pitch = row_pitch(s.H);
  wait_for_previous();
  let_next_start();
  for (int i = threadIdx.x; i < s.T * (s.H / 8); i += STEP_THREADS) {
    const int token = i / (s.H / 8), at = (i - token * (s.H / 8)) * 8;
    cp_async16(shared_address(rows + token * pitch + at), s.normed + (int64_t)token * s.H + at, true);
  }
  cp_async_commit();
  group_slots(groups, s.T * s.K, s.E, [&](int slot) { return __ldcg(s.index + slot); });
  __syncthreads();
  const unsigned used = used_experts(groups, s.E);
  const int columns = s.F / 8, units = __popc(used) * columns, first = blockIdx.x * STEP_WARPS + warp, stride = gridDim.x * STEP_WARPS;
  auto locate = [&](int unit) {
    const int nth = unit / columns, column = (unit - nth * columns) * 8;
    return s.gate_up + ((int64_t)nth_expert(used, nth) * 2 * s.F + column + (lane >> 3)) * s.H + (lane & 7) * 8;
  };
  Stream<decltype(locate)> stream(locate, shared_address(memory) + warp * BATCH_STAGES * BATCH_STAGE_BYTES, first, units, stride, s.H / 64,
                                  (int64_t)s.F * s.H, 4 * (int64_t)s.H);
  cp_async_wait<BATCH_STAGES - 1>(); /* the rows */
  __syncthreads();
  for (int unit = first; unit < units; unit += stride) {
    const int nth = unit / columns, column = (unit - nth * columns) * 8, e = nth_expert(used, nth), count = groups.count[e];
    uint32_t low[MT], high[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) {
      low[m] = shared_address(rows + (m * 16 + g < count ? groups.slots[e][m * 16 + g] / s.K : 0) * pitch + t * 8);
      high[m] = shared_address(rows + (m * 16 + 8 + g < count ? groups.slots[e][m * 16 + 8 + g] / s.K : 0) * pitch + t * 8);
    }
    float c[TILES][MT][4] = {};
    stream.multiply_unit(c, low, high, count);
#pragma unroll
    for (int m = 0; m < MT; m++)
      if (m * 16 < count) {
        const int row = m * 16 + (t >= 2 ? 8 : 0) + g;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
          const uint32_t two = finish_swiglu(c[j][m]);
          if (row < count) *(uint32_t *)(s.h + (int64_t)groups.slots[e][row] * s.F + column + j * 4 + (t & 1) * 2) = two;
        }
      }
  }
  cp_async_wait<0>();
}

/* partial[slice][slot] = h[slot] down^T over the depths of the slice. A block takes an expert and a slice at a time. */
__global__ void __launch_bounds__(STEP_THREADS, 1) step_down_batch_kernel(const StepMoe s) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Groups<BATCH_TOKENS> groups;
  bf16 *rows = (bf16 *)(memory + QUEUE_BYTES);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, pitch = row_pitch(SLICE), slots = s.T * s.K;
  /* The indices are older than the kernel before, which let this one start only after it had waited for them itself. */
  group_slots(groups, slots, s.E, [&](int slot) { return __ldcg(s.index + slot); });
  __syncthreads();
  const unsigned used = used_experts(groups, s.E);
  const int slices = (s.F + SLICE - 1) / SLICE, items = __popc(used) * slices;
  bool waited = false;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int e = nth_expert(used, item / slices), slice = item % slices, count = groups.count[e], depth = min(SLICE, s.F - slice * SLICE);
    const bf16 *down = s.down + ((int64_t)e * s.H + (lane >> 3)) * s.F + slice * SLICE + (lane & 7) * 8;
    auto locate = [&](int unit) { return down + (int64_t)unit * 16 * s.F; };
    Stream<decltype(locate)> stream(locate, shared_address(memory) + warp * BATCH_STAGES * BATCH_STAGE_BYTES, warp, s.H / 16, STEP_WARPS, depth / 64,
                                    4 * (int64_t)s.F, 8 * (int64_t)s.F);
    if (!waited) wait_for_previous(), let_next_start(), waited = true;
    for (int i = threadIdx.x; i < count * (depth / 8); i += STEP_THREADS) {
      const int row = i / (depth / 8), at = (i - row * (depth / 8)) * 8;
      *(uint4 *)(rows + row * pitch + at) = load_shared_result(s.h + (int64_t)groups.slots[e][row] * s.F + slice * SLICE + at);
    }
    __syncthreads();
    uint32_t low[MT], high[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) low[m] = shared_address(rows) + ((m * 16 + g) * pitch + t * 8) * 2, high[m] = low[m] + 16 * pitch;
    for (int unit = warp; unit < s.H / 16; unit += STEP_WARPS) {
      float c[TILES][MT][4] = {};
      stream.multiply_unit(c, low, high, count);
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = m * 16 + half * 8 + g;
          if (row < count) {
            float *to = s.partial + ((int64_t)slice * slots + groups.slots[e][row]) * s.H + unit * 16 + t * 2;
#pragma unroll
            for (int j = 0; j < TILES; j++) *(float2 *)(to + j * 8) = make_float2(c[j][m][half * 2], c[j][m][half * 2 + 1]);
          }
        }
    }
    cp_async_wait<0>();
    __syncthreads(); /* the rows may be overwritten */
  }
  if (!waited) wait_for_previous();
}

/* out = x + sum over the choices, in their order, of weight * (sum of the slices, in their order); 4 columns a thread. */
__global__ void __launch_bounds__(256) step_combine_kernel(const StepMoe s, int slices) {
  wait_for_previous();
  let_next_start();
  const int i = blockIdx.x * 256 + threadIdx.x, token = i / (s.H / 4), column = (i - token * (s.H / 4)) * 4, slots = s.T * s.K;
  if (token >= s.T) return;
  const uint2 x = __ldcg((const uint2 *)(s.x + (int64_t)token * s.H + column));
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 2
  for (int k = 0; k < s.K; k++) {
    const float *from = s.partial + (int64_t)(token * s.K + k) * s.H + column;
    const float weight = __ldcg(s.weight + token * s.K + k);
    float4 y = __ldcg((const float4 *)from);
#pragma unroll 8
    for (int slice = 1; slice < slices; slice++) {
      const float4 more = __ldcg((const float4 *)(from + (int64_t)slice * slots * s.H));
      y.x += more.x, y.y += more.y, y.z += more.z, y.w += more.w;
    }
    sum.x += weight * rounded<bf16>(y.x), sum.y += weight * rounded<bf16>(y.y);
    sum.z += weight * rounded<bf16>(y.z), sum.w += weight * rounded<bf16>(y.w);
  }
  const float2 low = unpack_bf16(x.x), high = unpack_bf16(x.y);
  *(uint2 *)(s.out + (int64_t)token * s.H + column) = make_uint2(pack_bf16(low.x + sum.x, low.y + sum.y), pack_bf16(high.x + sum.z, high.y + sum.w));
}

/* ---- launcher ------------------------------------------------------------------------------------------------ */

/* Shared memory of a product's kernel. */
static int batch_bytes(int64_t T, int64_t width) { return (int)(QUEUE_BYTES + T * row_pitch((int)width) * 2); }

bool nn_moe_batch_fits(nn_context *context, int64_t T, int64_t H, int64_t K) {
  return T <= BATCH_TOKENS && T * K <= 256 && shared_memory_fits(context, batch_bytes(T, H > SLICE ? H : SLICE));
}

nn_status nn_decode_moe_batch(nn_context *context, StepMoe s, Scratch &scratch) {
  const char *where = "nn_decode_moe";
  const int64_t slots = (int64_t)s.T * s.K, slices = ceil_div(s.F, SLICE);
  s.normed = scratch.take<bf16>((int64_t)s.T * s.H);
  s.index = scratch.take<int32_t>(slots), s.weight = scratch.take<float>(slots), s.partial = scratch.take<float>(slices * slots * s.H);
  if (!scratch.fits())
    return nn_fail(context, NN_ERROR_WORKSPACE, "%s: needs %lld bytes of workspace, has %lld", where, (long long)scratch.need, (long long)scratch.have);
  const int up_bytes = batch_bytes(s.T, s.H), down_bytes = batch_bytes(s.T, SLICE);
  const int64_t items = s.E * slices, most = context->multiprocessors;
  NN_CUDA(context, cudaFuncSetAttribute(step_up_batch_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, up_bytes));
  NN_CUDA(context, cudaFuncSetAttribute(step_down_batch_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, down_bytes));
  NN_TRY(launch_chained(context, where, step_route_kernel, dim3((unsigned)s.T), STEP_THREADS, row_pitch(s.H) * 2, s));
  NN_TRY(launch_chained(context, where, step_up_batch_kernel, dim3((unsigned)most), STEP_THREADS, up_bytes, s));
  NN_TRY(launch_chained(context, where, step_down_batch_kernel, dim3((unsigned)(items < most ? items : most)), STEP_THREADS, down_bytes, s));
  return launch_chained(context, where, step_combine_kernel, dim3((unsigned)ceil_div((int64_t)s.T * (s.H / 4), 256)), 256, 0, s, (int)slices);
}
