/* optimizer.cu: gradient clip and AdamW, bound by memory. Compiled without contraction (build: -fmad=false), and written with the
 * operations of nn.h in the order of nn.h, because CPU and GPU must give the same bits.
 * Loshchilov and Hutter, arXiv 1711.05101.
 */
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

/* parameter, gradient [n] float32, m and v [n] in State, compute [n] in Compute: N elements a thread, all loads before all stores. */
template <typename State, typename Compute, int N, bool Keep>
__global__ void adamw_kernel(float *parameter, Compute *compute, State *m, State *v, const float *gradient, const double *control,
                             const double *schedule, int64_t n, double beta1, double beta2, double epsilon, double decay) {
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
    Pack<float, N> p = load_pack<float, N>(parameter + i), g = load_pack<float, N>(gradient + i);
    Pack<State, N> pm = load_pack<State, N>(m + i), pv = load_pack<State, N>(v + i);
    Pack<Compute, N> copy;
#pragma unroll
    for (int j = 0; j < N; j++) {
      float gj = __fmul_rn(g.v[j], s.scale);
      float mj = __fadd_rn(__fmul_rn(to_float(pm.v[j]), b1), __fmul_rn(gj, c1));
      float vj = __fadd_rn(__fmul_rn(to_float(pv.v[j]), b2), __fmul_rn(__fmul_rn(gj, gj), c2));
      float step = __fdiv_rn(__fmul_rn(__fmul_rn(mj, s.inverse1), s.rate), __fadd_rn(__fsqrt_rn(__fmul_rn(vj, s.inverse2)), eps));
      float pj = __fsub_rn(__fsub_rn(p.v[j], __fmul_rn(s.rate_decay, p.v[j])), step);
      p.v[j] = pj;
      pm.v[j] = from_float<State>(mj);
      pv.v[j] = from_float<State>(vj);
      copy.v[j] = from_float<Compute>(pj);
    }
    store_pack<float, N>(parameter + i, p);
    store_pack<State, N>(m + i, pm);
    store_pack<State, N>(v + i, pv);
    if (Keep) store_pack<Compute, N>(compute + i, copy);
  }
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

template <typename State, typename Compute, int N, bool Keep>
static void launch(nn_context *context, float *parameter, void *compute, void *m, void *v, const float *gradient, const double *control,
                   const double *schedule, int64_t n, double beta1, double beta2, double epsilon, double decay) {
  if (n == 0) return;
  int64_t blocks = ceil_div(n, 256 * N), most = (int64_t)context->multiprocessors * 64;
  adamw_kernel<State, Compute, N, Keep><<<(unsigned)(blocks < most ? blocks : most), 256, 0, context->stream>>>(
      parameter, (Compute *)compute, (State *)m, (State *)v, gradient, control, schedule, n, beta1, beta2, epsilon, decay);
}

template <typename State, typename Compute, bool Keep>
static void run_adamw(nn_context *context, float *parameter, void *compute, void *m, void *v, const float *gradient, const double *control,
                      const double *schedule, int64_t n, double beta1, double beta2, double epsilon, double decay) {
  bool packs = aligned16(parameter) && aligned16(compute) && aligned16(m) && aligned16(v) && aligned16(gradient);
  int64_t whole = packs ? n / 4 * 4 : 0;
  launch<State, Compute, 4, Keep>(context, parameter, compute, m, v, gradient, control, schedule, whole, beta1, beta2, epsilon, decay);
  launch<State, Compute, 1, Keep>(context, parameter + whole, (Compute *)compute + (Keep ? whole : 0), (State *)m + whole,
                                  (State *)v + whole, gradient + whole, control, schedule, n - whole, beta1, beta2, epsilon, decay);
}

extern "C" {

nn_status nn_grad_clip(nn_context *context, double *control, const double *sum_of_squares, double clip) {
  NN_ENTER(context, clip > 0.0);
  grad_clip_kernel<<<1, 1, 0, context->stream>>>(control, sum_of_squares, clip);
  NN_LEAVE(context);
}

nn_status nn_adamw_step(nn_context *context, float *parameter, void *compute, void *m, void *v, const float *gradient,
                        const double *control, const double *schedule, int64_t n, double beta1, double beta2, double epsilon,
                        double decay, nn_dtype state_dtype, nn_dtype dtype) {
  NN_ENTER(context, n >= 0 && valid(state_dtype) && valid(dtype));
  if (n > 0)
    NN_FOR_DTYPE(state_dtype, State, NN_FOR_DTYPE(dtype, Compute, {
      if (compute)
        run_adamw<State, Compute, true>(context, parameter, compute, m, v, gradient, control, schedule, n, beta1, beta2, epsilon, decay);
      else
        run_adamw<State, Compute, false>(context, parameter, compute, m, v, gradient, control, schedule, n, beta1, beta2, epsilon, decay);
    }););
  NN_LEAVE(context);
}

} /* extern "C" */
