/* chain.cuh: kernels that follow each other closely (programmatic dependent launch): a kernel's blocks may start while the kernel before
 * still runs, fetch what nobody writes (weights), and wait for it only then. On chips before sm_90 a chain is plain launches.
 * What a kernel of the chain reads of another's results it reads past the first cache (load_shared_result): lines of it may be older
 * than the wait.
 * "CUDA C++ Programming Guide", Programmatic Dependent Launch and Synchronization.
 */
#pragma once

#include "common.cuh"

/* Everything that was queued before this kernel is done and can be seen. Every block of a chained kernel calls it. */
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* The next kernel of the chain may start once every block has come here. Called after wait_for_previous (or by a kernel that is not
 * chained itself), so that what the one before wrote is there for the next one from its beginning. */
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint4 load_shared_result(const void *p) { return __ldcg((const uint4 *)p); }

/* Launches a kernel that calls wait_for_previous; `chained`: it may start before what was queued last is done. */
template <typename... Parameters, typename... Arguments>
static inline nn_status launch_kernel(nn_context *context, const char *where, bool chained, void (*kernel)(Parameters...), dim3 grid, int threads,
                                      int bytes, Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3((unsigned)threads), config.dynamicSmemBytes = (size_t)bytes, config.stream = context->stream;
  config.attrs = &attribute, config.numAttrs = chained && context->capability >= 90 ? 1 : 0;
  return nn_cuda_status(context, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), where);
}
template <typename... Parameters, typename... Arguments>
static inline nn_status launch_chained(nn_context *context, const char *where, void (*kernel)(Parameters...), dim3 grid, int threads, int bytes,
                                       Arguments... arguments) {
  return launch_kernel(context, where, true, kernel, grid, threads, bytes, arguments...);
}
