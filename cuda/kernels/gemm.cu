/* gemm.cu: the plain products of nn.h, as Products. */
#include "product.cuh"

static Product plain_product(void *c, const void *a, const void *b, int64_t m, int64_t n, int64_t k, int32_t transpose_a,
                             int32_t transpose_b, nn_dtype out_dtype, nn_dtype dtype) {
  Product p = make_product(c, a, b, m, n, k, out_dtype, dtype);
  p.a_mn = transpose_a != 0, p.b_mn = transpose_b == 0;
  if (p.a_mn) p.lda = m;
  if (p.b_mn) p.ldb = n;
  return p;
}

extern "C" {

nn_status nn_gemm(nn_context *context, void *c, const void *a, const void *b, int64_t m, int64_t n, int64_t k, int32_t transpose_a,
                  int32_t transpose_b, nn_dtype out_dtype, nn_dtype dtype) {
  NN_ENTER(context, m >= 0 && n >= 0 && k >= 0 && valid(out_dtype) && valid(dtype));
  Product p = plain_product(c, a, b, m, n, k, transpose_a, transpose_b, out_dtype, dtype);
  return nn_run_product(context, p, __func__);
}

nn_status nn_gemm_beta(nn_context *context, void *c, const void *a, const void *b, int64_t m, int64_t n, int64_t k, int32_t transpose_a,
                       int32_t transpose_b, float alpha, float beta, nn_dtype out_dtype, nn_dtype dtype) {
  NN_ENTER(context, m >= 0 && n >= 0 && k >= 0 && valid(out_dtype) && valid(dtype));
  Product p = plain_product(c, a, b, m, n, k, transpose_a, transpose_b, out_dtype, dtype);
  p.alpha = alpha, p.beta = beta;
  return nn_run_product(context, p, __func__);
}

nn_status nn_gemm_batched(nn_context *context, void *c, const void *a, const void *b, int64_t batch, int64_t m, int64_t n, int64_t k,
                          int32_t transpose_a, int32_t transpose_b, nn_dtype out_dtype, nn_dtype dtype) {
  NN_ENTER(context, batch >= 0 && batch < (1 << 30) && m >= 0 && n >= 0 && k >= 0 && valid(out_dtype) && valid(dtype));
  Product p = plain_product(c, a, b, m, n, k, transpose_a, transpose_b, out_dtype, dtype);
  p.groups = (int)batch, p.a_stride = m * k, p.b_stride = k * n, p.c_stride = m * n;
  return nn_run_product(context, p, __func__);
}

} /* extern "C" */
