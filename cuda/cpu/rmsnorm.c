/* rmsnorm.c: the root-mean-square norm of nn.h, with and without the residual addition, for the CPU.
 *
 * A row is done by one thread. The weight's gradient is summed over blocks of rows (how many is decided by T alone), each into its
 * own row of the workspace, and the blocks are added in rising order: the threads cannot change a bit.
 */
#include "vector_kernels.h"

#define BLOCKS 64        /* at most this many partial sums */
#define ROWS_A_BLOCK 16  /* at least so many rows in each */

static nn_status forward(nn_context *context, float *sum, float *y, float *reciprocal, const float *x, const float *delta,
                         const float *weight, int64_t T, int64_t H, float epsilon) {
#pragma omp parallel for num_threads(nn_team(context, T * H, NN_GRAIN)) schedule(static)
  for (int64_t t = 0; t < T; t++)
    reciprocal[t] = NN_DISPATCH(context, nn_rmsnorm_row)(delta == NULL ? NULL : sum + t * H, y + t * H, x + t * H,
                                                         delta == NULL ? NULL : delta + t * H, weight, H, epsilon);
  return NN_OK;
}

static nn_status backward(nn_context *context, float *dx, float *dweight, const float *dy, const float *dsum, const float *x,
                          const float *reciprocal, const float *weight, int64_t T, int64_t H) {
  const int64_t rows = nn_max64(ROWS_A_BLOCK, nn_ceil_div(T, BLOCKS)), blocks = nn_ceil_div(T, rows);
  nn_carve carve = nn_carve_begin(context);
  float *partial = nn_carve_take(&carve, blocks * H * (int64_t)sizeof(float));
  NN_CARVE_CHECK(context, carve);
  if (T == 0 || H == 0) return NN_OK;
#pragma omp parallel for num_threads(nn_team(context, T * H, NN_GRAIN)) schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    float *mine = partial + block * H;
    memset(mine, 0, (size_t)H * sizeof(float));
    for (int64_t t = block * rows; t < nn_min64(T, (block + 1) * rows); t++)
      NN_DISPATCH(context, nn_rmsnorm_backward_row)(dx + t * H, mine, dy + t * H, dsum == NULL ? NULL : dsum + t * H, x + t * H,
                                                    weight, reciprocal[t], H);
  }
  for (int64_t block = 1; block < blocks; block++) NN_DISPATCH(context, nn_add_range)(partial, partial, partial + block * H, H);
  NN_DISPATCH(context, nn_add_range)(dweight, dweight, partial, H);
  return NN_OK;
}

nn_status nn_rmsnorm_forward(nn_context *context, void *y, float *reciprocal, const void *x, const void *weight, int64_t T,
                             int64_t H, float epsilon, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && H >= 0);
  NN_REQUIRE_F32(context, dtype);
  return forward(context, NULL, y, reciprocal, x, NULL, weight, T, H, epsilon);
}

nn_status nn_rmsnorm_backward(nn_context *context, void *dx, float *dweight, const void *dy, const void *x,
                              const float *reciprocal, const void *weight, int64_t T, int64_t H, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && H >= 0);
  NN_REQUIRE_F32(context, dtype);
  return backward(context, dx, dweight, dy, NULL, x, reciprocal, weight, T, H);
}

nn_status nn_rmsnorm_residual_forward(nn_context *context, void *sum, void *y, float *reciprocal, const void *x, const void *delta,
                                      const void *weight, int64_t T, int64_t H, float epsilon, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && H >= 0);
  NN_REQUIRE_F32(context, dtype);
  return forward(context, sum, y, reciprocal, x, delta, weight, T, H, epsilon);
}

nn_status nn_rmsnorm_residual_backward(nn_context *context, void *dx, float *dweight, const void *dy, const void *dsum,
                                       const void *sum, const float *reciprocal, const void *weight, int64_t T, int64_t H,
                                       nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && H >= 0);
  NN_REQUIRE_F32(context, dtype);
  return backward(context, dx, dweight, dy, dsum, sum, reciprocal, weight, T, H);
}
