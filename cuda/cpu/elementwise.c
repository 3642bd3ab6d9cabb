/* elementwise.c: silu, add, mul, scale, cast, the halves of float32, SwiGLU and the digests of nn.h, for the CPU.
 *
 * Checks, cuts the work into chunks for the threads, and calls the loops of elementwise.simd.c. Every element is a pure function of
 * its inputs, so threads cannot change a bit; a digest is a sum of integers.
 */
#include "vector_kernels.h"

/* Runs `statement` for each chunk of n elements: `at` is its first element, `count` its length. */
#define FOR_CHUNKS(context, n, statement)                                                                               \
  do {                                                                                                                  \
    const int64_t chunks_ = nn_ceil_div((n), NN_CHUNK);                                                                 \
    _Pragma("omp parallel for num_threads(nn_team(context, n, NN_GRAIN)) schedule(static)")                             \
    for (int64_t chunk_ = 0; chunk_ < chunks_; chunk_++) {                                                              \
      const int64_t at = chunk_ * NN_CHUNK, count = nn_min64(NN_CHUNK, (n) - at);                                       \
      statement;                                                                                                        \
    }                                                                                                                   \
  } while (0)

nn_status nn_silu_forward(nn_context *context, void *y, const void *x, int64_t n, nn_dtype dtype) {
  NN_REQUIRE(context, n >= 0);
  NN_REQUIRE_F32(context, dtype);
  FOR_CHUNKS(context, n, NN_DISPATCH(context, nn_silu_range)((float *)y + at, (const float *)x + at, count));
  return NN_OK;
}

nn_status nn_silu_backward(nn_context *context, void *dx, const void *dy, const void *x, int64_t n, nn_dtype dtype) {
  NN_REQUIRE(context, n >= 0);
  NN_REQUIRE_F32(context, dtype);
  FOR_CHUNKS(context, n,
             NN_DISPATCH(context, nn_silu_backward_range)((float *)dx + at, (const float *)dy + at, (const float *)x + at, count));
  return NN_OK;
}

nn_status nn_add(nn_context *context, void *y, const void *a, const void *b, int64_t n, nn_dtype dtype) {
  NN_REQUIRE(context, n >= 0);
  NN_REQUIRE_F32(context, dtype);
  FOR_CHUNKS(context, n, NN_DISPATCH(context, nn_add_range)((float *)y + at, (const float *)a + at, (const float *)b + at, count));
  return NN_OK;
}

nn_status nn_mul(nn_context *context, void *y, const void *a, const void *b, int64_t n, nn_dtype dtype) {
  NN_REQUIRE(context, n >= 0);
  NN_REQUIRE_F32(context, dtype);
  FOR_CHUNKS(context, n, NN_DISPATCH(context, nn_mul_range)((float *)y + at, (const float *)a + at, (const float *)b + at, count));
  return NN_OK;
}

nn_status nn_scale(nn_context *context, void *y, const void *x, int64_t n, float factor, nn_dtype dtype) {
  NN_REQUIRE(context, n >= 0);
  NN_REQUIRE_F32(context, dtype);
  FOR_CHUNKS(context, n, NN_DISPATCH(context, nn_scale_range)((float *)y + at, (const float *)x + at, count, factor));
  return NN_OK;
}

nn_status nn_cast(nn_context *context, void *y, const void *x, int64_t n, nn_dtype out_dtype, nn_dtype dtype) {
  NN_REQUIRE(context, n >= 0);
  NN_REQUIRE(context, (dtype == NN_F32 || dtype == NN_BF16) && (out_dtype == NN_F32 || out_dtype == NN_BF16));
  if (dtype == out_dtype) {
    int64_t size = dtype == NN_F32 ? 4 : 2;
    FOR_CHUNKS(context, n, memcpy((char *)y + at * size, (const char *)x + at * size, (size_t)(count * size)));
  } else if (dtype == NN_F32) {
    FOR_CHUNKS(context, n, NN_DISPATCH(context, nn_to_bf16_range)((uint16_t *)y + at, (const float *)x + at, count));
  } else {
    FOR_CHUNKS(context, n, NN_DISPATCH(context, nn_from_bf16_range)((float *)y + at, (const uint16_t *)x + at, count));
  }
  return NN_OK;
}

nn_status nn_split(nn_context *context, void *high, uint16_t *low, const float *x, int64_t n) {
  NN_REQUIRE(context, n >= 0);
  FOR_CHUNKS(context, n, NN_DISPATCH(context, nn_split_range)((uint16_t *)high + at, low + at, x + at, count));
  return NN_OK;
}

nn_status nn_join(nn_context *context, float *x, const void *high, const uint16_t *low, int64_t n) {
  NN_REQUIRE(context, n >= 0);
  FOR_CHUNKS(context, n, NN_DISPATCH(context, nn_join_range)(x + at, (const uint16_t *)high + at, low + at, count));
  return NN_OK;
}

nn_status nn_swiglu_forward(nn_context *context, void *h, const void *gate_up, int64_t rows, int64_t F, nn_dtype dtype) {
  NN_REQUIRE(context, rows >= 0 && F >= 0);
  NN_REQUIRE_F32(context, dtype);
#pragma omp parallel for num_threads(nn_team(context, rows * F, NN_GRAIN / 4)) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const float *row = (const float *)gate_up + r * 2 * F;
    NN_DISPATCH(context, nn_swiglu_row)((float *)h + r * F, row, row + F, F);
  }
  return NN_OK;
}

nn_status nn_swiglu_backward(nn_context *context, void *dgate_up, const void *dh, const void *gate_up, int64_t rows, int64_t F,
                             nn_dtype dtype) {
  NN_REQUIRE(context, rows >= 0 && F >= 0);
  NN_REQUIRE_F32(context, dtype);
#pragma omp parallel for num_threads(nn_team(context, rows * F, NN_GRAIN / 4)) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const float *row = (const float *)gate_up + r * 2 * F;
    float *to = (float *)dgate_up + r * 2 * F;
    NN_DISPATCH(context, nn_swiglu_backward_row)(to, to + F, (const float *)dh + r * F, row, row + F, F);
  }
  return NN_OK;
}

/* The digest of n words: `x`, or, where that is NULL, the joined halves. */
static nn_status digest_of(nn_context *context, uint64_t *digest, const uint32_t *x, const uint16_t *high, const uint16_t *low, int64_t n) {
  const int64_t chunks = nn_ceil_div(n, NN_CHUNK);
  uint64_t sum0 = 0, sum1 = 0;
#pragma omp parallel for num_threads(nn_team(context, n, NN_GRAIN)) schedule(static) reduction(+ : sum0, sum1)
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    uint64_t part[2] = {0, 0};
    uint32_t joined[NN_CHUNK];
    const int64_t at = chunk * NN_CHUNK, count = nn_min64(NN_CHUNK, n - at);
    if (x == NULL) NN_DISPATCH(context, nn_join_range)((float *)joined, high + at, low + at, count);
    NN_DISPATCH(context, nn_digest_range)(part, x == NULL ? joined : x + at, at, count);
    sum0 += part[0];
    sum1 += part[1];
  }
  digest[0] = sum0;
  digest[1] = sum1;
  return NN_OK;
}

nn_status nn_digest(nn_context *context, uint64_t *digest, const void *x, int64_t words) {
  NN_REQUIRE(context, words >= 0);
  return digest_of(context, digest, (const uint32_t *)x, NULL, NULL, words);
}

nn_status nn_digest_halves(nn_context *context, uint64_t *digest, const void *high, const uint16_t *low, int64_t n) {
  NN_REQUIRE(context, n >= 0);
  return digest_of(context, digest, NULL, (const uint16_t *)high, low, n);
}
