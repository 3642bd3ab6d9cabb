/* graph.cu: recording a context's stream into CUDA graphs, timing it with events, and the step of a decoding loop. A graph's handle is
 * its cudaGraphExec_t, a timer's its cudaEvent_t.
 */
#include "common.cuh"

/* ---- kernels ------------------------------------------------------------------------------------------------- */

__global__ void advance_kernel(int32_t *history, int32_t *start, int32_t *counter, int32_t *step, const int32_t *token, int64_t B, int64_t R) {
  const int32_t row = *step;
  if (row < 0 || row >= R) return;
  for (int64_t b = threadIdx.x; b < B; b += blockDim.x) {
    history[row * B + b] = token[b];
    start[b]++;
    counter[b]++;
  }
  __syncthreads(); /* every thread has read the step */
  if (threadIdx.x == 0) *step = (int32_t)((row + 1) % R);
}

/* ---- launchers ----------------------------------------------------------------------------------------------- */

extern "C" {

nn_status nn_graph_begin(nn_context *context) {
  NN_ENTER(context, true);
  /* By this thread only: the threads of other GPUs may allocate meanwhile. */
  NN_CUDA(context, cudaStreamBeginCapture(context->stream, cudaStreamCaptureModeThreadLocal));
  return NN_OK;
}

nn_status nn_graph_end(nn_context *context, uint64_t *out) {
  NN_ENTER(context, out != NULL);
  *out = 0;
  cudaGraph_t graph = NULL;
  NN_CUDA(context, cudaStreamEndCapture(context->stream, &graph));
  cudaGraphExec_t executable = NULL;
  cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  NN_CUDA(context, error);
  *out = (uint64_t)(uintptr_t)executable;
  return NN_OK;
}

nn_status nn_graph_launch(nn_context *context, uint64_t graph) {
  NN_ENTER(context, graph != 0);
  NN_CUDA(context, cudaGraphLaunch((cudaGraphExec_t)(uintptr_t)graph, context->stream));
  return NN_OK;
}

nn_status nn_graph_destroy(nn_context *context, uint64_t graph) {
  NN_ENTER(context, graph != 0);
  NN_CUDA(context, cudaStreamSynchronize(context->stream)); /* it may still run */
  NN_CUDA(context, cudaGraphExecDestroy((cudaGraphExec_t)(uintptr_t)graph));
  return NN_OK;
}

nn_status nn_timer_start(nn_context *context, uint64_t *timer) {
  NN_ENTER(context, timer != NULL);
  *timer = 0;
  cudaEvent_t event;
  NN_CUDA(context, cudaEventCreate(&event));
  cudaError_t error = cudaEventRecord(event, context->stream);
  if (error != cudaSuccess) {
    cudaEventDestroy(event);
    return nn_cuda_status(context, error, __func__);
  }
  *timer = (uint64_t)(uintptr_t)event;
  return NN_OK;
}

nn_status nn_timer_stop(nn_context *context, double *milliseconds, uint64_t timer) {
  NN_ENTER(context, milliseconds != NULL && timer != 0);
  cudaEvent_t from = (cudaEvent_t)(uintptr_t)timer, to = NULL;
  float elapsed = 0.0f;
  cudaError_t error = cudaEventCreate(&to);
  if (error == cudaSuccess) error = cudaEventRecord(to, context->stream);
  if (error == cudaSuccess) error = cudaEventSynchronize(to);
  if (error == cudaSuccess) error = cudaEventElapsedTime(&elapsed, from, to);
  if (to != NULL) cudaEventDestroy(to);
  cudaEventDestroy(from);
  *milliseconds = elapsed;
  return nn_cuda_status(context, error, __func__);
}

nn_status nn_advance(nn_context *context, int32_t *history, int32_t *start, int32_t *counter, int32_t *step, const int32_t *token, int64_t B,
                     int64_t R) {
  NN_ENTER(context, B >= 0 && R >= 0);
  if (R > 0) advance_kernel<<<1, 256, 0, context->stream>>>(history, start, counter, step, token, B, R);
  NN_LEAVE(context);
}

} /* extern "C" */
