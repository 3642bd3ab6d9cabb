/* simd.h: one vector type for every instruction set, for the files named *.simd.c (see internal.h).
 *
 * Owns the vector width, loads and stores with tails, and the elementary functions. Written in the vector extensions that gcc
 * and clang share, so that one source serves AVX-512, AVX2, SSE2 and NEON. A function of vectors gives an element the same
 * bits in every lane and in every tail, which is why kernels use these and not loops that a compiler may vectorise in part.
 */
#ifndef NN_SIMD_H
#define NN_SIMD_H

#include <math.h>

#include "internal.h"

#if defined(NN_BUILD_AVX512)
#include <immintrin.h>
#define NN_SIMD(name) name##_avx512
#define NN_VL 16
#elif defined(NN_BUILD_AVX2)
#include <immintrin.h>
#define NN_SIMD(name) name##_avx2
#define NN_VL 8
#else
#define NN_SIMD(name) name##_plain
#define NN_VL 4
#endif

/* NN_VL floats, and as many integers (what a comparison yields: 0 or -1). */
typedef float nn_vec __attribute__((vector_size(4 * NN_VL)));
typedef int32_t nn_ivec __attribute__((vector_size(4 * NN_VL)));

#define NN_INLINE static inline __attribute__((always_inline, unused))

NN_INLINE nn_vec nn_set(float x) { return x - (nn_vec){0}; } /* x - 0 is x, even for -0 */

NN_INLINE nn_vec nn_load(const float *p) {
  nn_vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

NN_INLINE void nn_store(float *p, nn_vec v) { memcpy(p, &v, sizeof v); }

/* The first n (0 .. NN_VL) of p, the rest 0; no byte past them is touched. */
NN_INLINE nn_vec nn_load_tail(const float *p, int64_t n) {
#if defined(NN_BUILD_AVX512)
  return (nn_vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  nn_vec v = {0};
  for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
#endif
}

NN_INLINE void nn_store_tail(float *p, nn_vec v, int64_t n) {
#if defined(NN_BUILD_AVX512)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  for (int64_t i = 0; i < n; i++) p[i] = v[i];
#endif
}

/* mask ? a : b, element by element. */
NN_INLINE nn_vec nn_select(nn_ivec mask, nn_vec a, nn_vec b) {
  return (nn_vec)((mask & (nn_ivec)a) | (~mask & (nn_ivec)b));
}

/* The larger; b where either is NaN. */
NN_INLINE nn_vec nn_max(nn_vec a, nn_vec b) { return nn_select((nn_ivec)(a > b), a, b); }

/* The sum of all elements, in halves: (v[i] + v[i + VL/2]), and so on. */
NN_INLINE float nn_sum_of(nn_vec v) {
  float lane[NN_VL];
  nn_store(lane, v);
  for (int width = NN_VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}

/* exp(x) within 1 ulp or so (about 1e-7 relative) for -87.33 <= x <= 88.37; 0 below, exp(88.37) above; NaN stays NaN. Range
 * reduction by ln 2 in two parts and a polynomial of degree 6 (Cephes expf). */
NN_INLINE nn_vec nn_exp(nn_vec x) {
  const float low = -87.33654f, high = 88.37626f, magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  nn_ivec tiny = (nn_ivec)(x < low);
  x = nn_select((nn_ivec)(x > high), nn_set(high), nn_select(tiny, nn_set(low), x));
  nn_vec shifted = x * 1.44269504088896341f + magic;
  nn_vec n = shifted - magic;
  nn_vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  nn_vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  nn_ivec exponent = ((nn_ivec)shifted - (nn_ivec)nn_set(magic) + 127) << 23;
  return nn_select(tiny, nn_set(0.0f), p * (nn_vec)exponent);
}

/* 1 / x within an ulp, by an estimate and a step of Newton's where the machine has a good one; for 1 <= x <= 2^126. */
NN_INLINE nn_vec nn_reciprocal(nn_vec x) {
#if defined(NN_BUILD_AVX512)
  nn_vec r = (nn_vec)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

/* 1 / (1 + exp(-x)) */
NN_INLINE nn_vec nn_sigmoid(nn_vec x) { return nn_reciprocal(1.0f + nn_exp(-x)); }

#endif
