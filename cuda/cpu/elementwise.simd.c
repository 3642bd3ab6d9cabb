/* elementwise.simd.c: the inner loops of the elementwise kernels and of the digest; see vector_kernels.h. Called by elementwise.c
 * and optimizer.c. build: -ffp-contract=off (every fused multiply-add here is asked for by name). */
#include "../include/nn_halves.h"
#include "../include/nn_random.h"
#include "simd.h"
#include "vector_kernels.h"

void NN_SIMD(nn_silu_range)(float *y, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i += NN_LANES) {
    nn_vec a = nn_v_get(x + i, n - i);
    nn_v_put(y + i, nn_v_silu(a, nn_v_sigmoid(a)), n - i);
  }
}

void NN_SIMD(nn_silu_backward_range)(float *dx, const float *dy, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i += NN_LANES) {
    nn_vec a = nn_v_get(x + i, n - i);
    nn_v_put(dx + i, nn_v_get(dy + i, n - i) * nn_v_silu_slope(a, nn_v_sigmoid(a)), n - i);
  }
}

void NN_SIMD(nn_add_range)(float *y, const float *a, const float *b, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = a[i] + b[i];
}

void NN_SIMD(nn_mul_range)(float *y, const float *a, const float *b, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = a[i] * b[i];
}

void NN_SIMD(nn_scale_range)(float *y, const float *x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor;
}

void NN_SIMD(nn_to_bf16_range)(uint16_t *y, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = nn_bf16_of(x[i]);
}

void NN_SIMD(nn_from_bf16_range)(float *y, const uint16_t *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = nn_f32_of(x[i]);
}

void NN_SIMD(nn_split_range)(uint16_t *high, uint16_t *low, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    nn_halves halves = nn_halves_of(bits);
    high[i] = halves.high;
    low[i] = halves.low;
  }
}

void NN_SIMD(nn_join_range)(float *x, const uint16_t *high, const uint16_t *low, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = nn_halves_joined(high[i], low[i]);
    memcpy(x + i, &bits, sizeof bits);
  }
}

void NN_SIMD(nn_swiglu_row)(float *h, const float *gate, const float *up, int64_t n) {
  for (int64_t i = 0; i < n; i += NN_LANES)
    nn_v_put(h + i, nn_v_swiglu(nn_v_get(gate + i, n - i), nn_v_get(up + i, n - i)), n - i);
}

void NN_SIMD(nn_swiglu_backward_row)(float *dgate, float *dup, const float *dh, const float *gate, const float *up, int64_t n) {
  for (int64_t i = 0; i < n; i += NN_LANES) {
    nn_vec a = nn_v_get(gate + i, n - i), b = nn_v_get(up + i, n - i), d = nn_v_get(dh + i, n - i);
    nn_vec s = nn_v_sigmoid(a);
    nn_v_put(dgate + i, d * b * nn_v_silu_slope(a, s), n - i);
    nn_v_put(dup + i, d * nn_v_silu(a, s), n - i);
  }
}

void NN_SIMD(nn_digest_range)(uint64_t *digest, const uint32_t *words, int64_t first, int64_t n) {
  uint64_t sum0 = 0, sum1 = 0;
  uint64_t key0 = (uint64_t)(first + 1) * NN_DIGEST_STRIDE_0, key1 = (uint64_t)(first + 1) * NN_DIGEST_STRIDE_1;
  for (int64_t begin = 0; begin < n; begin += 256) {
    const int64_t end = nn_min64(n, begin + 256);
    /* Mixing is slow enough that the prefetcher of the CPU falls asleep between two lines. */
    for (int64_t i = begin; i < end; i += 16) __builtin_prefetch(words + i + 1024);
    for (int64_t i = begin; i < end; i++) { /* nn_digest_term, its product (index + 1) * stride kept by addition */
      sum0 += nn_mix64((uint64_t)words[i] + key0);
      sum1 += nn_mix64((uint64_t)words[i] + key1);
      key0 += NN_DIGEST_STRIDE_0;
      key1 += NN_DIGEST_STRIDE_1;
    }
  }
  digest[0] += sum0;
  digest[1] += sum1;
}
