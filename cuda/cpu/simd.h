/* simd.h: the widest float32 vector of the instruction set that a file is compiled for, with the few operations the kernels need
 * and the elementary functions. Included by *.simd.c, which are compiled once for each instruction set (see internal.h), and by
 * nothing else; knows no kernel.
 *
 * nn_vec holds NN_LANES floats: 16 (AVX-512), 8 (AVX2 with FMA) or 4 (the vector extension of gcc and clang: SSE2, NEON, anything).
 * The arithmetic operators work on it, also with a scalar. nn_v_fma is fused wherever the machine can do that, which plain x86-64
 * can not. Files that must not fuse more than they name have "build: -ffp-contract=off" in their head. A function of vectors gives
 * an element the same bits in every lane and in every tail, and AVX-512 and AVX2 give the same bits.
 */
#ifndef NN_SIMD_H
#define NN_SIMD_H

#include <math.h>

#include "internal.h"

#if defined(NN_BUILD_AVX512)
#include <immintrin.h>
#define NN_SIMD(name) name##_avx512
#define NN_LANES 16
#elif defined(NN_BUILD_AVX2)
#include <immintrin.h>
#define NN_SIMD(name) name##_avx2
#define NN_LANES 8
#else
#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#define NN_SIMD(name) name##_plain
#define NN_LANES 4
#endif

/* NN_LANES floats, and as many integers (what a comparison yields: 0 or -1). */
typedef float nn_vec __attribute__((vector_size(4 * NN_LANES)));
typedef int32_t nn_ivec __attribute__((vector_size(4 * NN_LANES)));

#define NN_INLINE static inline __attribute__((always_inline, unused))

NN_INLINE nn_vec nn_v_set(float x) { return x - (nn_vec){0}; } /* x - 0 is x, even for -0 */

NN_INLINE nn_vec nn_v_load(const float *p) {
  nn_vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

NN_INLINE void nn_v_store(float *p, nn_vec v) { memcpy(p, &v, sizeof v); }

/* What each instruction set has its own words for:
 *   nn_v_load_part, nn_v_store_part   the first `count` (0 .. NN_LANES) of p, when loading the rest 0; no byte past them is touched
 *   nn_v_keep                         the first `count` (0 .. NN_LANES) lanes of a and the others of `fill`
 *   nn_v_max, nn_v_min                b where either is NaN
 *   nn_v_zero_below                   a where x >= bound or x is NaN, else 0
 *   nn_v_scale_by_power               a * 2^n for integers n in -128 .. 129; for others some number */
#if defined(NN_BUILD_AVX512)

NN_INLINE __mmask16 nn_v_mask(int64_t count) { return (__mmask16)((1u << count) - 1u); }
NN_INLINE nn_vec nn_v_load_part(const float *p, int64_t count) { return (nn_vec)_mm512_maskz_loadu_ps(nn_v_mask(count), p); }
NN_INLINE void nn_v_store_part(float *p, nn_vec v, int64_t count) { _mm512_mask_storeu_ps(p, nn_v_mask(count), (__m512)v); }
NN_INLINE nn_vec nn_v_keep(nn_vec a, int64_t count, nn_vec fill) {
  return (nn_vec)_mm512_mask_mov_ps((__m512)fill, nn_v_mask(count), (__m512)a);
}
NN_INLINE nn_vec nn_v_fma(nn_vec a, nn_vec b, nn_vec c) { return (nn_vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
NN_INLINE nn_vec nn_v_max(nn_vec a, nn_vec b) { return (nn_vec)_mm512_max_ps((__m512)a, (__m512)b); }
NN_INLINE nn_vec nn_v_min(nn_vec a, nn_vec b) { return (nn_vec)_mm512_min_ps((__m512)a, (__m512)b); }
NN_INLINE nn_vec nn_v_sqrt(nn_vec a) { return (nn_vec)_mm512_sqrt_ps((__m512)a); }
NN_INLINE nn_vec nn_v_zero_below(nn_vec a, nn_vec x, nn_vec bound) {
  return (nn_vec)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)bound, _CMP_NLT_UQ), (__m512)a);
}
NN_INLINE nn_vec nn_v_scale_by_power(nn_vec a, nn_vec n) { return (nn_vec)_mm512_scalef_ps((__m512)a, (__m512)n); }

#elif defined(NN_BUILD_AVX2)

NN_INLINE __m256i nn_v_mask(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
NN_INLINE nn_vec nn_v_load_part(const float *p, int64_t count) { return (nn_vec)_mm256_maskload_ps(p, nn_v_mask(count)); }
NN_INLINE void nn_v_store_part(float *p, nn_vec v, int64_t count) { _mm256_maskstore_ps(p, nn_v_mask(count), (__m256)v); }
NN_INLINE nn_vec nn_v_keep(nn_vec a, int64_t count, nn_vec fill) {
  return (nn_vec)_mm256_blendv_ps((__m256)fill, (__m256)a, _mm256_castsi256_ps(nn_v_mask(count)));
}
NN_INLINE nn_vec nn_v_fma(nn_vec a, nn_vec b, nn_vec c) { return (nn_vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
NN_INLINE nn_vec nn_v_max(nn_vec a, nn_vec b) { return (nn_vec)_mm256_max_ps((__m256)a, (__m256)b); }
NN_INLINE nn_vec nn_v_min(nn_vec a, nn_vec b) { return (nn_vec)_mm256_min_ps((__m256)a, (__m256)b); }
NN_INLINE nn_vec nn_v_sqrt(nn_vec a) { return (nn_vec)_mm256_sqrt_ps((__m256)a); }
NN_INLINE nn_vec nn_v_zero_below(nn_vec a, nn_vec x, nn_vec bound) {
  return (nn_vec)_mm256_and_ps((__m256)a, _mm256_cmp_ps((__m256)x, (__m256)bound, _CMP_NLT_UQ));
}
/* In two exact halves, because 2^128 is not a float. */
NN_INLINE nn_vec nn_v_scale_by_power(nn_vec a, nn_vec n) {
  __m256i whole = _mm256_cvtps_epi32((__m256)n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return a * (nn_vec)low * (nn_vec)high;
}

#else

NN_INLINE nn_vec nn_v_load_part(const float *p, int64_t count) {
  nn_vec v = {0};
  for (int64_t i = 0; i < count && i < NN_LANES; i++) v[i] = p[i];
  return v;
}
NN_INLINE void nn_v_store_part(float *p, nn_vec v, int64_t count) {
  for (int64_t i = 0; i < count && i < NN_LANES; i++) p[i] = v[i];
}
NN_INLINE nn_vec nn_v_select(nn_ivec mask, nn_vec a, nn_vec b) { return (nn_vec)(((nn_ivec)a & mask) | ((nn_ivec)b & ~mask)); }
NN_INLINE nn_vec nn_v_keep(nn_vec a, int64_t count, nn_vec fill) {
  return nn_v_select((nn_ivec){0, 1, 2, 3} < (int32_t)count, a, fill);
}
NN_INLINE nn_vec nn_v_max(nn_vec a, nn_vec b) { return nn_v_select(a > b, a, b); }
NN_INLINE nn_vec nn_v_min(nn_vec a, nn_vec b) { return nn_v_select(a < b, a, b); }
#if defined(__aarch64__)
NN_INLINE nn_vec nn_v_fma(nn_vec a, nn_vec b, nn_vec c) {
  return (nn_vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
NN_INLINE nn_vec nn_v_sqrt(nn_vec a) { return (nn_vec)vsqrtq_f32((float32x4_t)a); }
#else
NN_INLINE nn_vec nn_v_fma(nn_vec a, nn_vec b, nn_vec c) { return a * b + c; }
NN_INLINE nn_vec nn_v_sqrt(nn_vec a) {
#if defined(__SSE2__)
  return (nn_vec)_mm_sqrt_ps((__m128)a);
#else
  for (int i = 0; i < NN_LANES; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}
#endif
NN_INLINE nn_vec nn_v_zero_below(nn_vec a, nn_vec x, nn_vec bound) { return (nn_vec)((nn_ivec)a & ~(nn_ivec)(x < bound)); }
/* The integer is read off the low bits of n + 1.5 * 2^23. A NaN gives any integer, and a NaN times anything is one. */
NN_INLINE nn_vec nn_v_scale_by_power(nn_vec a, nn_vec n) {
  nn_ivec whole = (nn_ivec)(n + 12582912.0f) - (nn_ivec)nn_v_set(12582912.0f);
  nn_ivec half = whole >> 1;
  return a * (nn_vec)((half + 127) << 23) * (nn_vec)((whole - half + 127) << 23);
}

#endif

/* Loads and stores that stop at the end of an array: `left` elements are there, NN_LANES or more in all rounds but the last. */
NN_INLINE nn_vec nn_v_get(const float *p, int64_t left) { return left >= NN_LANES ? nn_v_load(p) : nn_v_load_part(p, left); }
NN_INLINE void nn_v_put(float *p, nn_vec v, int64_t left) {
  if (left >= NN_LANES) nn_v_store(p, v);
  else nn_v_store_part(p, v, left);
}

/* ---- over the lanes ------------------------------------------------------------------------------------------------- */

/* Sum of the lanes, in halves: (i + i+8), (i + i+4), (i + i+2), (i + i+1). */
NN_INLINE float nn_v_sum(nn_vec v) {
#if defined(NN_BUILD_AVX512) || defined(NN_BUILD_AVX2)
#if defined(NN_BUILD_AVX512)
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1));
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), high);
#else
  __m256 a = (__m256)v;
#endif
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

/* Largest lane; no lane may be NaN. */
NN_INLINE float nn_v_largest(nn_vec v) {
#if defined(NN_BUILD_AVX512) || defined(NN_BUILD_AVX2)
#if defined(NN_BUILD_AVX512)
  __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1));
  __m256 a = _mm256_max_ps(_mm512_castps512_ps256((__m512)v), high);
#else
  __m256 a = (__m256)v;
#endif
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
#else
  float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
#endif
}

/* The largest of n elements and of `least`, which is not NaN. NaN does not count. */
NN_INLINE float nn_v_largest_of(const float *x, int64_t n, float least) {
  nn_vec best = nn_v_set(least);
  int64_t i = 0;
  for (; i + NN_LANES <= n; i += NN_LANES) best = nn_v_max(nn_v_load(x + i), best);
  if (i < n) best = nn_v_max(nn_v_keep(nn_v_load_part(x + i, n - i), n - i, best), best);
  return nn_v_largest(best);
}

/* ---- elementary functions ------------------------------------------------------------------------------------------- */

/* exp(x) within 1.01 ulp (0.98 without fused multiply-add; over all floats). x = n ln 2 + r, |r| <= ln(2)/2, exp(r) by a
 * polynomial of degree 6 (S. L. Moshier, Cephes expf). NaN gives NaN, overflow infinity. Results below the smallest normal number
 * become 0, which keeps denormals, an order of magnitude slower, out of the products that follow. */
NN_INLINE nn_vec nn_v_exp(nn_vec x) {
  const nn_vec rounder = nn_v_set(12582912.0f); /* 1.5 * 2^23: adding and subtracting it rounds to an integer */
  nn_vec bounded = nn_v_min(nn_v_set(89.0f), x);
  nn_vec n = nn_v_fma(bounded, nn_v_set(1.44269504088896341f), rounder) - rounder;
  nn_vec r = nn_v_fma(n, nn_v_set(-0.693359375f), bounded);
  r = nn_v_fma(n, nn_v_set(2.12194440e-4f), r);
  nn_vec p = nn_v_set(1.9875691500e-4f);
  p = nn_v_fma(p, r, nn_v_set(1.3981999507e-3f));
  p = nn_v_fma(p, r, nn_v_set(8.3334519073e-3f));
  p = nn_v_fma(p, r, nn_v_set(4.1665795894e-2f));
  p = nn_v_fma(p, r, nn_v_set(1.6666665459e-1f));
  p = nn_v_fma(p, r, nn_v_set(5.0000001201e-1f));
  p = nn_v_fma(p, r * r, r) + 1.0f;
  return nn_v_zero_below(nn_v_scale_by_power(p, n), x, nn_v_set(-87.33654f));
}

/* 1 / (1 + exp(-x)): 0 and 1 in the limits, NaN for NaN. The division has a unit of its own beside the multiply-adds of exp: an
 * estimate refined by Newton's steps is not faster. */
NN_INLINE nn_vec nn_v_sigmoid(nn_vec x) { return 1.0f / (1.0f + nn_v_exp(-x)); }

/* x * s, where s = sigmoid(x): 0 where s is, NaN (infinity times 0) for -infinity. */
NN_INLINE nn_vec nn_v_silu(nn_vec x, nn_vec s) { return x * s; }

/* The derivative of silu: s * (1 + x * (1 - s)), where s = sigmoid(x). */
NN_INLINE nn_vec nn_v_silu_slope(nn_vec x, nn_vec s) { return s * nn_v_fma(x, 1.0f - s, nn_v_set(1.0f)); }

/* silu(gate) * up. */
NN_INLINE nn_vec nn_v_swiglu(nn_vec gate, nn_vec up) { return nn_v_silu(gate, nn_v_sigmoid(gate)) * up; }

/* ---- bfloat16 ------------------------------------------------------------------------------------------------------- */

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

#endif
