/* optimizer.cu: gradient clip and AdamW, bound by memory. Compiled without contraction (build: -fmad=false), and written with the
 * operations of nn.h in the order of nn.h, because CPU and GPU must give the same bits.
 * Loshchilov and Hutter, arXiv 1711.05101.
 */
#include "../include/nn_halves.h"
#include "../include/nn_random.h"
#include "common.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

__global__ void grad_clip_kernel(double *control, const double *sum_of_squares, double clip) {
  double norm = sqrt(*sum_of_squares), ratio = clip / (norm + 1e-6);
  control[0] = norm;
  control[1] = ratio < 1.0 ? ratio : 1.0;
  control[2] = isfinite(norm) ? 0.0 : 1.0;
}

struct AdamwScalars {
  float scale, rate, rate_decay, inverse1, inverse2;
};

/* One weight: a float32 (the residue is none), or the halves of nn_split. */
__device__ __forceinline__ float load_weight(float parameter, uint16_t) { return parameter; }
__device__ __forceinline__ float load_weight(bf16 parameter, uint16_t residue) {
  return __uint_as_float(nn_halves_joined(__bfloat16_as_ushort(parameter), residue));
}
__device__ __forceinline__ void store_weight(float &parameter, uint16_t &, float value) { parameter = value; }
__device__ __forceinline__ void store_weight(bf16 &parameter, uint16_t &residue, float value) {
  nn_halves halves = nn_halves_of(__float_as_uint(value));
  parameter = __ushort_as_bfloat16(halves.high);
  residue = halves.low;
}

/* parameter [n] in Parameter, beside bf16 with residue [n], gradient [n] float32, m and v [n] in State: N elements a thread, all loads
 * before all stores. N = 4 and not more, so that the threads of a warp read float32 side by side, every 32 bytes whole. Float32 states
 * in five blocks a multiprocessor (48 registers), where the compiler on its own would take what leaves four. */
template <typename Parameter, typename State, int N>
__global__ void __launch_bounds__(256, sizeof(State) == 4 ? 5 : 4)
    adamw_kernel(Parameter *parameter, uint16_t *residue, State *m, State *v, const float *gradient, const double *control,
                 const double *schedule, int64_t n, double beta1, double beta2, double epsilon, double decay) {
  constexpr bool Halves = sizeof(Parameter) == 2;
  __shared__ AdamwScalars shared;
  if (control[2] != 0.0) return;
  if (threadIdx.x == 0) {
    double rate = schedule[0], step = schedule[1];
    shared.scale = (float)control[1];
    shared.rate = (float)rate;
    shared.rate_decay = (float)(rate * decay);
    shared.inverse1 = (float)(1.0 / (1.0 - nn_ieee_power(beta1, (int64_t)step)));
    shared.inverse2 = (float)(1.0 / (1.0 - nn_ieee_power(beta2, (int64_t)step)));
  }
  __syncthreads();
  const AdamwScalars s = shared;
  const float b1 = (float)beta1, b2 = (float)beta2, c1 = (float)(1.0 - beta1), c2 = (float)(1.0 - beta2), eps = (float)epsilon;
  for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * N; i + N <= n; i += (int64_t)gridDim.x * blockDim.x * N) {
    Pack<Parameter, N> p = load_pack<Parameter, N>(parameter + i);
    Pack<uint16_t, N> low = {};
    if (Halves) low = load_pack<uint16_t, N>(residue + i);
    Pack<float, N> g = load_pack<float, N>(gradient + i);
    Pack<State, N> pm = load_pack<State, N>(m + i), pv = load_pack<State, N>(v + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
      float pj = load_weight(p.v[j], low.v[j]), gj = __fmul_rn(g.v[j], s.scale);
      float mj = __fadd_rn(__fmul_rn(to_float(pm.v[j]), b1), __fmul_rn(gj, c1));
      float vj = __fadd_rn(__fmul_rn(to_float(pv.v[j]), b2), __fmul_rn(__fmul_rn(gj, gj), c2));
      float step = __fdiv_rn(__fmul_rn(__fmul_rn(mj, s.inverse1), s.rate), __fadd_rn(__fsqrt_rn(__fmul_rn(vj, s.inverse2)), eps));
      store_weight(p.v[j], low.v[j], __fsub_rn(__fsub_rn(pj, __fmul_rn(s.rate_decay, pj)), step));
      pm.v[j] = from_float<State>(mj);
      pv.v[j] = from_float<State>(vj);
    }
    store_pack<Parameter, N>(parameter + i, p);
    if (Halves) store_pack<uint16_t, N>(residue + i, low);
    store_pack<State, N>(m + i, pm);
    store_pack<State, N>(v + i, pv);
  }
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

template <typename Parameter, typename State, int N>
static void launch(nn_context *context, Parameter *parameter, uint16_t *residue, State *m, State *v, const float *gradient,
                   const double *control, const double *schedule, int64_t n, double beta1, double beta2, double epsilon, double decay) {
  if (n == 0) return;
  /* Float32 states: a block a piece, 4.24 TB/s on an H200, where blocks that go on to another reach 4.04. With bf16 states it is 3.81 and 4.08. */
  const int64_t blocks = ceil_div(n, 256 * N), most = sizeof(State) == 4 ? INT32_MAX : (int64_t)context->multiprocessors * 64;
  adamw_kernel<Parameter, State, N><<<(unsigned)(blocks < most ? blocks : most), 256, 0, context->stream>>>(
      parameter, residue, m, v, gradient, control, schedule, n, beta1, beta2, epsilon, decay);
}

template <typename Parameter, typename State>
static void run_adamw(nn_context *context, Parameter *parameter, uint16_t *residue, State *m, State *v, const float *gradient,
                      const double *control, const double *schedule, int64_t n, double beta1, double beta2, double epsilon, double decay) {
  bool packs = aligned16(parameter) && aligned16(residue) && aligned16(m) && aligned16(v) && aligned16(gradient);
  int64_t whole = packs ? n / 4 * 4 : 0;
  launch<Parameter, State, 4>(context, parameter, residue, m, v, gradient, control, schedule, whole, beta1, beta2, epsilon, decay);
  launch<Parameter, State, 1>(context, parameter + whole, residue == NULL ? NULL : residue + whole, m + whole, v + whole,
                              gradient + whole, control, schedule, n - whole, beta1, beta2, epsilon, decay);
}

extern "C" {

nn_status nn_grad_clip(nn_context *context, double *control, const double *sum_of_squares, double clip) {
  NN_ENTER(context, clip > 0.0);
  grad_clip_kernel<<<1, 1, 0, context->stream>>>(control, sum_of_squares, clip);
  NN_LEAVE(context);
}

nn_status nn_adamw_step(nn_context *context, void *parameter, uint16_t *residue, void *m, void *v, const float *gradient,
                        const double *control, const double *schedule, int64_t n, double beta1, double beta2, double epsilon,
                        double decay, nn_dtype state_dtype, nn_dtype dtype) {
  NN_ENTER(context, n >= 0 && valid(state_dtype) && valid(dtype) && (n == 0 || (residue != NULL) == (dtype == NN_BF16)));
  if (n > 0)
    NN_FOR_DTYPE(dtype, Parameter, NN_FOR_DTYPE(state_dtype, State, {
      run_adamw<Parameter, State>(context, (Parameter *)parameter, residue, (State *)m, (State *)v, gradient, control, schedule, n,
                                  beta1, beta2, epsilon, decay);
    }););
  NN_LEAVE(context);
}

} /* extern "C" */
