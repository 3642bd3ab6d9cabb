/* vector_math.h: the widest float32 vector of the instruction set that a file is compiled for, with the few operations the
 * kernels need and the exponential. Included by files compiled once for each instruction set (*_avx512.c, *_avx2.c,
 * *_plain.c); knows nothing of contexts, threads or kernels.
 *
 * nn_vf holds NN_LANES floats: 16 (AVX-512), 8 (AVX2 with FMA) or 4 (GCC vector extension: SSE2, NEON, anything). The
 * arithmetic operators work on it. nn_v_fma is fused on the first two and a multiplication and an addition on the third.
 * Everything is static, so that the three compilations do not meet at link time.
 */
#ifndef NN_VECTOR_MATH_H
#define NN_VECTOR_MATH_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define NN_INLINE static inline __attribute__((always_inline, unused))

#if defined(__AVX512F__)

#define NN_LANES 16
typedef __m512 nn_vf;

NN_INLINE nn_vf nn_v_set(float a) { return _mm512_set1_ps(a); }
NN_INLINE nn_vf nn_v_load(const float *p) { return _mm512_loadu_ps(p); }
NN_INLINE void nn_v_store(float *p, nn_vf v) { _mm512_storeu_ps(p, v); }
NN_INLINE __mmask16 nn_v_mask(int64_t count) { return (__mmask16)((1u << count) - 1u); }
NN_INLINE nn_vf nn_v_load_part(const float *p, int64_t count) { return _mm512_maskz_loadu_ps(nn_v_mask(count), p); }
NN_INLINE void nn_v_store_part(float *p, nn_vf v, int64_t count) { _mm512_mask_storeu_ps(p, nn_v_mask(count), v); }
NN_INLINE nn_vf nn_v_keep(nn_vf a, int64_t count, nn_vf fill) { return _mm512_mask_mov_ps(fill, nn_v_mask(count), a); }
NN_INLINE nn_vf nn_v_fma(nn_vf a, nn_vf b, nn_vf c) { return _mm512_fmadd_ps(a, b, c); }
NN_INLINE nn_vf nn_v_max(nn_vf a, nn_vf b) { return _mm512_max_ps(a, b); }
NN_INLINE nn_vf nn_v_min(nn_vf a, nn_vf b) { return _mm512_min_ps(a, b); }
NN_INLINE nn_vf nn_v_sqrt(nn_vf a) { return _mm512_sqrt_ps(a); }
/* a where x >= bound or x is NaN, else 0. */
NN_INLINE nn_vf nn_v_zero_below(nn_vf a, nn_vf x, nn_vf bound) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), a);
}
/* a * 2^n; n holds small integers. */
NN_INLINE nn_vf nn_v_scale_by_power(nn_vf a, nn_vf n) { return _mm512_scalef_ps(a, n); }
NN_INLINE __m256 nn_v_high_half(nn_vf a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }

#elif defined(__AVX2__) && defined(__FMA__)

#define NN_LANES 8
typedef __m256 nn_vf;

NN_INLINE nn_vf nn_v_set(float a) { return _mm256_set1_ps(a); }
NN_INLINE nn_vf nn_v_load(const float *p) { return _mm256_loadu_ps(p); }
NN_INLINE void nn_v_store(float *p, nn_vf v) { _mm256_storeu_ps(p, v); }
NN_INLINE __m256i nn_v_mask(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
NN_INLINE nn_vf nn_v_load_part(const float *p, int64_t count) { return _mm256_maskload_ps(p, nn_v_mask(count)); }
NN_INLINE void nn_v_store_part(float *p, nn_vf v, int64_t count) { _mm256_maskstore_ps(p, nn_v_mask(count), v); }
NN_INLINE nn_vf nn_v_keep(nn_vf a, int64_t count, nn_vf fill) {
  return _mm256_blendv_ps(fill, a, _mm256_castsi256_ps(nn_v_mask(count)));
}
NN_INLINE nn_vf nn_v_fma(nn_vf a, nn_vf b, nn_vf c) { return _mm256_fmadd_ps(a, b, c); }
NN_INLINE nn_vf nn_v_max(nn_vf a, nn_vf b) { return _mm256_max_ps(a, b); }
NN_INLINE nn_vf nn_v_min(nn_vf a, nn_vf b) { return _mm256_min_ps(a, b); }
NN_INLINE nn_vf nn_v_sqrt(nn_vf a) { return _mm256_sqrt_ps(a); }
NN_INLINE nn_vf nn_v_zero_below(nn_vf a, nn_vf x, nn_vf bound) {
  return _mm256_and_ps(a, _mm256_cmp_ps(x, bound, _CMP_NLT_UQ));
}
/* In two exact halves, because 2^128 is not a float. */
NN_INLINE nn_vf nn_v_scale_by_power(nn_vf a, nn_vf n) {
  __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
}

#else

#define NN_LANES 4
typedef float nn_vf __attribute__((vector_size(16)));
typedef int32_t nn_vi __attribute__((vector_size(16)));

NN_INLINE nn_vf nn_v_set(float a) { return (nn_vf){a, a, a, a}; }
NN_INLINE nn_vf nn_v_load(const float *p) {
  nn_vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
NN_INLINE void nn_v_store(float *p, nn_vf v) { memcpy(p, &v, sizeof v); }
NN_INLINE nn_vf nn_v_load_part(const float *p, int64_t count) {
  nn_vf v = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t i = 0; i < count && i < NN_LANES; i++) v[i] = p[i];
  return v;
}
NN_INLINE void nn_v_store_part(float *p, nn_vf v, int64_t count) {
  for (int64_t i = 0; i < count && i < NN_LANES; i++) p[i] = v[i];
}
NN_INLINE nn_vf nn_v_fma(nn_vf a, nn_vf b, nn_vf c) { return a * b + c; }
NN_INLINE nn_vf nn_v_select(nn_vi mask, nn_vf a, nn_vf b) {
  return (nn_vf)(((nn_vi)a & mask) | ((nn_vi)b & ~mask));
}
NN_INLINE nn_vf nn_v_keep(nn_vf a, int64_t count, nn_vf fill) {
  const int32_t n = (int32_t)count;
  return nn_v_select((nn_vi){0, 1, 2, 3} < (nn_vi){n, n, n, n}, a, fill);
}
NN_INLINE nn_vf nn_v_max(nn_vf a, nn_vf b) { return nn_v_select(a > b, a, b); }
NN_INLINE nn_vf nn_v_min(nn_vf a, nn_vf b) { return nn_v_select(a < b, a, b); }
#if defined(__SSE2__)
NN_INLINE nn_vf nn_v_sqrt(nn_vf a) { return _mm_sqrt_ps(a); }
#else
NN_INLINE nn_vf nn_v_sqrt(nn_vf a) {
  for (int i = 0; i < NN_LANES; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
#endif
NN_INLINE nn_vf nn_v_zero_below(nn_vf a, nn_vf x, nn_vf bound) { return (nn_vf)((nn_vi)a & ~(x < bound)); }
/* The integer is read off the low bits of n + 1.5 * 2^23. A NaN gives any integer, and a NaN times anything is one. */
NN_INLINE nn_vf nn_v_scale_by_power(nn_vf a, nn_vf n) {
  nn_vi whole = (nn_vi)(n + nn_v_set(12582912.0f)) - (nn_vi)nn_v_set(12582912.0f);
  nn_vi half = whole >> 1;
  return a * (nn_vf)((half + 127) << 23) * (nn_vf)((whole - half + 127) << 23);
}

#endif

/* nn_v_keep is the first `count` (0 .. NN_LANES) lanes of a and the others of `fill`. The operand order matters in nn_v_max and
 * nn_v_min: the second is the result when either is NaN, everywhere. */

/* Loads and stores that stop at the end of an array: `left` elements are there, NN_LANES or more in all rounds but the last. */
NN_INLINE nn_vf nn_v_get(const float *p, int64_t left) { return left >= NN_LANES ? nn_v_load(p) : nn_v_load_part(p, left); }
NN_INLINE void nn_v_put(float *p, nn_vf v, int64_t left) {
  if (left >= NN_LANES) nn_v_store(p, v);
  else nn_v_store_part(p, v, left);
}

/* float32 to bfloat16, to nearest, ties to even; a NaN stays one. */
NN_INLINE uint16_t nn_bf16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

NN_INLINE float nn_f32_of(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* Sum of the lanes, in halves: (i + i+8), (i + i+4), (i + i+2), (i + i+1). */
NN_INLINE float nn_v_sum(nn_vf v) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#if defined(__AVX512F__)
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), nn_v_high_half(v));
#else
  __m256 a = v;
#endif
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

/* Largest lane; no lane may be NaN. */
NN_INLINE float nn_v_largest(nn_vf v) {
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#if defined(__AVX512F__)
  __m256 a = _mm256_max_ps(_mm512_castps512_ps256(v), nn_v_high_half(v));
#else
  __m256 a = v;
#endif
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
#else
  float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
#endif
}

/* exp(x) within 1.01 ulp (0.98 without fused multiply-add; over all floats). x = n ln 2 + r, |r| <= ln(2)/2, exp(r) by a
 * polynomial of degree 6 (S. L. Moshier, Cephes expf). NaN gives NaN, overflow infinity. Results below the smallest normal number
 * become 0, which keeps denormals, an order of magnitude slower, out of the products that follow. */
NN_INLINE nn_vf nn_v_exp(nn_vf x) {
  const nn_vf rounder = nn_v_set(12582912.0f); /* 1.5 * 2^23: adding and subtracting it rounds to an integer */
  nn_vf bounded = nn_v_min(nn_v_set(89.0f), x);
  nn_vf n = nn_v_fma(bounded, nn_v_set(1.44269504088896341f), rounder) - rounder;
  nn_vf r = nn_v_fma(n, nn_v_set(-0.693359375f), bounded);
  r = nn_v_fma(n, nn_v_set(2.12194440e-4f), r);
  nn_vf p = nn_v_set(1.9875691500e-4f);
  p = nn_v_fma(p, r, nn_v_set(1.3981999507e-3f));
  p = nn_v_fma(p, r, nn_v_set(8.3334519073e-3f));
  p = nn_v_fma(p, r, nn_v_set(4.1665795894e-2f));
  p = nn_v_fma(p, r, nn_v_set(1.6666665459e-1f));
  p = nn_v_fma(p, r, nn_v_set(5.0000001201e-1f));
  p = nn_v_fma(p, r * r, r) + nn_v_set(1.0f);
  return nn_v_zero_below(nn_v_scale_by_power(p, n), x, nn_v_set(-87.33654f));
}

/* 1 / (1 + exp(-x)): 0 and 1 in the limits, NaN for NaN. */
NN_INLINE nn_vf nn_v_sigmoid(nn_vf x) {
  const nn_vf one = nn_v_set(1.0f);
  return one / (one + nn_v_exp(nn_v_set(0.0f) - x));
}

/* x * sigmoid(x). */
NN_INLINE nn_vf nn_v_silu(nn_vf x) { return x * nn_v_sigmoid(x); }

/* The derivative of silu: s * (1 + x * (1 - s)), s = sigmoid(x). */
NN_INLINE nn_vf nn_v_silu_slope(nn_vf x) {
  const nn_vf one = nn_v_set(1.0f);
  nn_vf s = nn_v_sigmoid(x);
  return s * nn_v_fma(x, one - s, one);
}

#endif
