/* rope.c: rotary position embedding of nn.h, for the CPU: the table, and the rotation of heads. Su et al., arXiv 2104.09864, in
 * the half-split convention of Hugging Face. A row whose position is outside the table becomes NaN in what is rotated.
 */
#include <math.h>

#include "vector_kernels.h"

nn_status nn_rope_freqs(nn_context *context, float *cosine, float *sine, int64_t positions, int64_t D, double base,
                        double ntk_alpha) {
  NN_REQUIRE(context, positions >= 0 && D >= 0 && D % 2 == 0 && base > 0 && ntk_alpha > 0);
  NN_REQUIRE(context, D > 2 || ntk_alpha == 1); /* the exponent D / (D - 2) */
  const int64_t half = D / 2;
  const double stretched = ntk_alpha == 1 ? base : base * pow(ntk_alpha, (double)D / (double)(D - 2));
#pragma omp parallel for num_threads(nn_team(context, positions * half, 512)) schedule(static)
  for (int64_t i = 0; i < half; i++) {
    const double frequency = pow(stretched, -2.0 * (double)i / (double)D);
    for (int64_t p = 0; p < positions; p++) {
      cosine[p * half + i] = (float)cos((double)p * frequency);
      sine[p * half + i] = (float)sin((double)p * frequency);
    }
  }
  return NN_OK;
}

/* Rotates the first `heads` heads of each row; rows are `width` elements. */
static nn_status rotate(nn_context *context, float *y, const float *x, const int32_t *position, const float *cosine,
                        const float *sine, int64_t T, int64_t heads, int64_t width, int64_t D, int64_t positions,
                        int32_t direction) {
#pragma omp parallel for num_threads(nn_team(context, T * heads * D, NN_GRAIN)) schedule(static)
  for (int64_t t = 0; t < T; t++) {
    const int64_t at = (int64_t)position[t] * (D / 2);
    for (int64_t head = 0; head < heads; head++) {
      float *to = y + t * width + head * D;
      if (position[t] < 0 || position[t] >= positions) {
        for (int64_t d = 0; d < D; d++) to[d] = NAN;
        continue;
      }
      NN_DISPATCH(context, nn_rope_head)(to, x + t * width + head * D, cosine + at, sine + at, D, (float)direction);
    }
  }
  return NN_OK;
}

nn_status nn_rope_forward(nn_context *context, void *y, const void *x, const int32_t *position, const float *cosine,
                          const float *sine, int64_t T, int64_t heads, int64_t D, int64_t positions, int32_t direction,
                          nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && heads >= 0 && D >= 0 && D % 2 == 0 && positions >= 0);
  NN_REQUIRE(context, direction == 1 || direction == -1);
  NN_REQUIRE_F32(context, dtype);
  return rotate(context, y, x, position, cosine, sine, T, heads, heads * D, D, positions, direction);
}

nn_status nn_rope_qk(nn_context *context, void *qkv, const int32_t *position, const float *cosine, const float *sine, int64_t T,
                     int64_t Q, int64_t G, int64_t D, int64_t positions, int32_t direction, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && Q >= 0 && G >= 0 && D >= 0 && D % 2 == 0 && positions >= 0);
  NN_REQUIRE(context, direction == 1 || direction == -1);
  NN_REQUIRE_F32(context, dtype);
  return rotate(context, qkv, qkv, position, cosine, sine, T, Q + G, (Q + 2 * G) * D, D, positions, direction);
}
