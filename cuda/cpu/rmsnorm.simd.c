/* rmsnorm.simd.c: the inner loops over one row of the norm; see vector_kernels.h. Called by rmsnorm.c. Sums run over two times
 * NN_LANES lanes, then over the lanes in halves. build: -ffp-contract=off */
#include "simd.h"
#include "vector_kernels.h"

float NN_SIMD(nn_rmsnorm_row)(float *sum, float *y, const float *x, const float *delta, const float *weight, int64_t H,
                              float epsilon) {
  nn_vec even = nn_v_set(0.0f), odd = even;
  if (delta != NULL) {
    for (int64_t i = 0; i < H; i += NN_LANES) nn_v_put(sum + i, nn_v_get(x + i, H - i) + nn_v_get(delta + i, H - i), H - i);
    x = sum;
  }
  for (int64_t i = 0; i < H; i += 2 * NN_LANES) {
    nn_vec a = nn_v_get(x + i, H - i);
    even = nn_v_fma(a, a, even);
    if (i + NN_LANES < H) {
      nn_vec b = nn_v_get(x + i + NN_LANES, H - i - NN_LANES);
      odd = nn_v_fma(b, b, odd);
    }
  }
  float reciprocal = 1.0f / __builtin_sqrtf(nn_v_sum(even + odd) / (float)H + epsilon);
  nn_vec r = nn_v_set(reciprocal);
  for (int64_t i = 0; i < H; i += NN_LANES)
    nn_v_put(y + i, nn_v_get(x + i, H - i) * r * nn_v_get(weight + i, H - i), H - i);
  return reciprocal;
}

/* dx = r w dy - x r^3 mean(w dy x) (+ dsum). */
void NN_SIMD(nn_rmsnorm_backward_row)(float *dx, float *dweight, const float *dy, const float *dsum, const float *x,
                                      const float *weight, float reciprocal, int64_t H) {
  nn_vec even = nn_v_set(0.0f), odd = even;
  for (int64_t i = 0; i < H; i += 2 * NN_LANES) {
    even = nn_v_fma(nn_v_get(dy + i, H - i) * nn_v_get(weight + i, H - i), nn_v_get(x + i, H - i), even);
    int64_t j = i + NN_LANES;
    if (j < H) odd = nn_v_fma(nn_v_get(dy + j, H - j) * nn_v_get(weight + j, H - j), nn_v_get(x + j, H - j), odd);
  }
  float mean = nn_v_sum(even + odd) / (float)H;
  nn_vec r = nn_v_set(reciprocal), back = nn_v_set(-(reciprocal * reciprocal) * mean);
  for (int64_t i = 0; i < H; i += NN_LANES) {
    nn_vec d = nn_v_get(dy + i, H - i), a = nn_v_get(x + i, H - i), w = nn_v_get(weight + i, H - i);
    nn_vec gradient = nn_v_fma(a, back, d * w) * r;
    if (dsum != NULL) gradient = nn_v_get(dsum + i, H - i) + gradient;
    nn_v_put(dweight + i, nn_v_fma(d, a * r, nn_v_get(dweight + i, H - i)), H - i);
    nn_v_put(dx + i, gradient, H - i);
  }
}
