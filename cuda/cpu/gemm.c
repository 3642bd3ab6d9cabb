/* gemm.c: the gemm section of nn.h.
 *
 * Owns the checks of sizes and the description of dense products; gemm.simd.c computes them.
 */
#include "gemm.h"

static void describe_one(const void *argument, int64_t index, nn_product *product) {
  (void)index;
  *product = *(const nn_product *)argument;
}

void nn_run_product(nn_context *context, const nn_product *product) {
  nn_product_list list = {1, 1, describe_one, product};
  NN_DISPATCH(context, nn_run_products)(context, &list);
}

/* A batch of packed products: matrix i of each operand lies i times its size further. */
typedef struct batch {
  nn_product first;
} batch;

static void describe_batch(const void *argument, int64_t index, nn_product *product) {
  *product = ((const batch *)argument)->first;
  product->a.data += index * product->m * product->k;
  product->b.data += index * product->k * product->n;
  product->c += index * product->m * product->n;
}

static nn_product dense(void *c, const void *a, const void *b, int64_t m, int64_t n, int64_t k, int32_t transpose_a,
                        int32_t transpose_b, float alpha, float beta) {
  nn_product product = {
      .a = {.data = a, .stride = transpose_a ? m : k, .transposed = transpose_a != 0},
      .b = {.data = b, .stride = transpose_b ? k : n, .transposed = transpose_b != 0},
      .m = m, .n = n, .k = k, .c = c, .c_stride = n, .alpha = alpha, .beta = beta,
  };
  return product;
}

nn_status nn_gemm_beta(nn_context *context, void *c, const void *a, const void *b, int64_t m, int64_t n, int64_t k,
                       int32_t transpose_a, int32_t transpose_b, float alpha, float beta, nn_dtype out_dtype,
                       nn_dtype dtype) {
  NN_REQUIRE(context, m >= 0 && n >= 0 && k >= 0);
  NN_REQUIRE_F32(context, dtype);
  NN_REQUIRE_F32(context, out_dtype);
  nn_product product = dense(c, a, b, m, n, k, transpose_a, transpose_b, alpha, beta);
  nn_run_product(context, &product);
  return NN_OK;
}

nn_status nn_gemm(nn_context *context, void *c, const void *a, const void *b, int64_t m, int64_t n, int64_t k,
                  int32_t transpose_a, int32_t transpose_b, nn_dtype out_dtype, nn_dtype dtype) {
  return nn_gemm_beta(context, c, a, b, m, n, k, transpose_a, transpose_b, 1.0f, 0.0f, out_dtype, dtype);
}

nn_status nn_gemm_batched(nn_context *context, void *c, const void *a, const void *b, int64_t batch_size, int64_t m,
                          int64_t n, int64_t k, int32_t transpose_a, int32_t transpose_b, nn_dtype out_dtype,
                          nn_dtype dtype) {
  NN_REQUIRE(context, batch_size >= 0 && m >= 0 && n >= 0 && k >= 0);
  NN_REQUIRE_F32(context, dtype);
  NN_REQUIRE_F32(context, out_dtype);
  batch all = {dense(c, a, b, m, n, k, transpose_a, transpose_b, 1.0f, 0.0f)};
  nn_product_list list = {batch_size, 1, describe_batch, &all};
  NN_DISPATCH(context, nn_run_products)(context, &list);
  return NN_OK;
}
