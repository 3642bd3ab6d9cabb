/* random.c: nn_random_normal for the CPU. The generator itself is cuda/include/nn_random.h, shared with the GPU.
 * build: -ffp-contract=off (the bits must equal the GPU's) */
#include "../include/nn_random.h"
#include "vector_kernels.h"

nn_status nn_random_normal(nn_context *context, float *x, int64_t n, uint64_t seed, uint64_t stream, int64_t offset,
                           float standard_deviation) {
  NN_REQUIRE(context, n >= 0 && offset >= 0);
#pragma omp parallel for num_threads(nn_team(context, n, 1024)) schedule(static)
  for (int64_t i = 0; i < n; i++)
    x[i] = (float)((double)standard_deviation * nn_random_normal_at(seed, stream, (uint64_t)(offset + i)));
  return NN_OK;
}
