/* rope.simd.c: the rotation of one head; see vector_kernels.h. Called by rope.c. build: -ffp-contract=off */
#include "simd.h"
#include "vector_kernels.h"

void NN_SIMD(nn_rope_head)(float *y, const float *x, const float *cosine, const float *sine, int64_t D, float sign) {
  int64_t half = D / 2;
  nn_vec direction = nn_v_set(sign);
  for (int64_t i = 0; i < half; i += NN_LANES) {
    int64_t left = half - i;
    nn_vec a = nn_v_get(x + i, left), b = nn_v_get(x + half + i, left);
    nn_vec c = nn_v_get(cosine + i, left), s = nn_v_get(sine + i, left) * direction;
    nn_v_put(y + i, a * c - b * s, left);
    nn_v_put(y + half + i, b * c + a * s, left);
  }
}
