/* optimizer.simd.c: the sums in fixed order and AdamW's update; see vector_kernels.h. Called by optimizer.c and elementwise.c.
 * Only the IEEE operations that nn.h states, in its order: the bits must equal the GPU's. build: -ffp-contract=off */
#include "simd.h"
#include "vector_kernels.h"

#define SUM_LANES 64

/* Eight float64 lanes; narrower instruction sets take them in parts. */
typedef double lanes8 __attribute__((vector_size(64)));
typedef float floats8 __attribute__((vector_size(32)));

NN_INLINE lanes8 eight(const float *x, int squared) {
  floats8 narrow;
  memcpy(&narrow, x, sizeof narrow);
  lanes8 wide = __builtin_convertvector(narrow, lanes8);
  return squared ? wide * wide : wide;
}

NN_INLINE double chunk_sum(const float *x, int64_t n, int squared) {
  lanes8 sum[SUM_LANES / 8] = {0};
  int64_t i = 0;
  for (; i + SUM_LANES <= n; i += SUM_LANES) {
#pragma GCC unroll 8
    for (int l = 0; l < SUM_LANES / 8; l++) sum[l] += eight(x + i + 8 * l, squared);
  }
  double lane[SUM_LANES];
  memcpy(lane, sum, sizeof lane);
  for (int l = 0; i + l < n; l++) lane[l] += squared ? (double)x[i + l] * (double)x[i + l] : (double)x[i + l];
  for (int half = SUM_LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lane[l] += lane[l + half];
  return lane[0];
}

double NN_SIMD(nn_chunk_sum)(const float *x, int64_t n) { return chunk_sum(x, n, 0); }
double NN_SIMD(nn_chunk_sum_of_squares)(const float *x, int64_t n) { return chunk_sum(x, n, 1); }

/* One vector of parameters; m and v are updated in place. */
NN_INLINE nn_vec adamw(nn_vec p, nn_vec *m, nn_vec *v, nn_vec g, const nn_adamw_scalars *s) {
  g = g * nn_v_set(s->clip);
  *m = *m * nn_v_set(s->beta1) + g * nn_v_set(s->one_minus_beta1);
  *v = *v * nn_v_set(s->beta2) + (g * g) * nn_v_set(s->one_minus_beta2);
  nn_vec step = (*m * nn_v_set(s->inverse1)) * nn_v_set(s->rate);
  return p - nn_v_set(s->rate_decay) * p - step / (nn_v_sqrt(*v * nn_v_set(s->inverse2)) + nn_v_set(s->epsilon));
}

void NN_SIMD(nn_adamw_range)(float *parameter, float *m, float *v, const float *gradient, int64_t n,
                             const nn_adamw_scalars *scalars) {
  for (int64_t i = 0; i < n; i += NN_LANES) {
    nn_vec a = nn_v_get(m + i, n - i), b = nn_v_get(v + i, n - i);
    nn_vec p = adamw(nn_v_get(parameter + i, n - i), &a, &b, nn_v_get(gradient + i, n - i), scalars);
    nn_v_put(parameter + i, p, n - i);
    nn_v_put(m + i, a, n - i);
    nn_v_put(v + i, b, n - i);
  }
}

void NN_SIMD(nn_adamw_bf16_range)(float *parameter, uint16_t *m, uint16_t *v, const float *gradient, int64_t n,
                                  const nn_adamw_scalars *scalars) {
  for (int64_t i = 0; i < n; i += NN_LANES) {
    int64_t count = n - i < NN_LANES ? n - i : NN_LANES;
    float lane_m[NN_LANES] = {0}, lane_v[NN_LANES] = {0};
    for (int64_t l = 0; l < count; l++) lane_m[l] = nn_f32_of(m[i + l]);
    for (int64_t l = 0; l < count; l++) lane_v[l] = nn_f32_of(v[i + l]);
    nn_vec a = nn_v_load(lane_m), b = nn_v_load(lane_v);
    nn_vec p = adamw(nn_v_get(parameter + i, n - i), &a, &b, nn_v_get(gradient + i, n - i), scalars);
    nn_v_put(parameter + i, p, n - i);
    nn_v_store(lane_m, a);
    nn_v_store(lane_v, b);
    for (int64_t l = 0; l < count; l++) m[i + l] = nn_bf16_of(lane_m[l]);
    for (int64_t l = 0; l < count; l++) v[i + l] = nn_bf16_of(lane_v[l]);
  }
}
