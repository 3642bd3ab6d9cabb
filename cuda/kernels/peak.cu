/* peak.cu: the float32 multiply-adds that a GPU was seen to do out of registers: a ceiling for benchmarks. */
#include "common.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

const int CHAINS = 8, ROUNDS = 4096;

/* Eight independent chains a thread hide the latency of a multiply-add. The result is stored so that nothing is left out. */
__global__ void __launch_bounds__(256) multiply_add_kernel(float *out, float factor, float addend) {
  float x[CHAINS];
#pragma unroll
  for (int i = 0; i < CHAINS; i++) x[i] = (float)(threadIdx.x + i);
  for (int round = 0; round < ROUNDS; round++) {
#pragma unroll
    for (int i = 0; i < CHAINS; i++) x[i] = fmaf(x[i], factor, addend);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < CHAINS; i++) sum += x[i];
  if (sum == 1.0f) out[0] = sum; /* with a factor below 1 it never is */
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

extern "C" nn_status nn_peak_flops(nn_context *context, double *flops, double seconds) {
  NN_ENTER(context, flops != NULL && seconds > 0.0 && seconds <= 60.0);
  *flops = 0.0;
  const int blocks = context->multiprocessors * 8;
  const double work = 2.0 * CHAINS * ROUNDS * 256.0 * blocks;
  cudaEvent_t from, to;
  NN_CUDA(context, cudaEventCreate(&from));
  cudaError_t error = cudaEventCreate(&to);
  double spent = 0.0;
  for (int first = 1; error == cudaSuccess && (spent < seconds || *flops == 0.0); first = 0) {
    cudaEventRecord(from, context->stream);
    multiply_add_kernel<<<blocks, 256, 0, context->stream>>>(NULL, 0.5f, 3.0f);
    cudaEventRecord(to, context->stream);
    float milliseconds = 0.0f;
    error = cudaEventSynchronize(to);
    if (error == cudaSuccess) error = cudaEventElapsedTime(&milliseconds, from, to);
    spent += milliseconds / 1e3;
    if (!first && milliseconds > 0.0f && work / (milliseconds / 1e3) > *flops) *flops = work / (milliseconds / 1e3);
  }
  cudaEventDestroy(from);
  cudaEventDestroy(to);
  return nn_cuda_status(context, error, __func__);
}
