/* nn_random.h: the generators, hashes and powers that the CPU library (C) and the CUDA library share, so that both give the same
 * bits. Pure functions of their arguments; knows nothing of contexts, buffers or threads.
 *
 * Everything in floating point is float64 and made of IEEE + - * / and sqrt only, in the order written. A file that includes this
 * must be compiled without contraction into fused multiply-adds (-ffp-contract=off; nvcc -fmad=false).
 */
#ifndef NN_RANDOM_H
#define NN_RANDOM_H

#include <stdint.h>

#if defined(__CUDACC__)
#define NN_SHARED static __host__ __device__ inline
#else
#include <math.h>
#include <string.h>
#define NN_SHARED static inline __attribute__((unused))
#endif

/* ---- splitmix64 and the digest ------------------------------------------------------------------------------- */

/* The odd constants of the two sums of nn_digest: the golden ratio's and splitmix's second multiplier. */
#define NN_DIGEST_STRIDE_0 0x9E3779B97F4A7C15ull
#define NN_DIGEST_STRIDE_1 0xD1B54A32D192ED03ull

/* The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014; constants by Stafford, variant 13), a bijection of 64 bits:
 *   z = (z ^ z>>30) * 0xBF58476D1CE4E5B9;  z = (z ^ z>>27) * 0x94D049BB133111EB;  z ^ z>>31. */
NN_SHARED uint64_t nn_mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

/* What word `index` adds to each of the digest's two sums: mix64(word + (index + 1) * stride), modulo 2^64. */
NN_SHARED uint64_t nn_digest_term(uint32_t word, uint64_t index, uint64_t stride) {
  return nn_mix64((uint64_t)word + (index + 1) * stride);
}

/* ---- Philox 4x32-10 ------------------------------------------------------------------------------------------ */

typedef struct nn_random_block {
  uint32_t word[4];
} nn_random_block;

/* Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11). A round is
 *   (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)),
 * M0 = 0xD2511F53, M1 = 0xCD9E8D57; between rounds k0 += 0x9E3779B9, k1 += 0xBB67AE85. */
NN_SHARED nn_random_block nn_philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  nn_random_block block;
  int round;
  for (round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  block.word[0] = c0;
  block.word[1] = c1;
  block.word[2] = c2;
  block.word[3] = c3;
  return block;
}

/* 64 random bits for (seed, stream, index): the key is the seed (low word first), the counter (index / 2, stream), each low word
 * first; an even index takes words 1:0 of the block, an odd one words 3:2. */
NN_SHARED uint64_t nn_random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
  nn_random_block block = nn_philox((uint32_t)(index >> 1), (uint32_t)(index >> 33), (uint32_t)stream, (uint32_t)(stream >> 32),
                                    (uint32_t)seed, (uint32_t)(seed >> 32));
  return index & 1 ? (uint64_t)block.word[3] << 32 | block.word[2] : (uint64_t)block.word[1] << 32 | block.word[0];
}

/* uniform(seed, stream, index) in [0, 1): the high 53 bits times 2^-53. */
NN_SHARED double nn_random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  return (double)(nn_random_bits(seed, stream, index) >> 11) * (1.0 / 9007199254740992.0);
}

/* ---- powers -------------------------------------------------------------------------------------------------- */

/* base^exponent for an integer exponent >= 0, by squaring from the lowest bit on: what AdamW's corrections are made of, because pow
 * is not the same on every machine. */
NN_SHARED double nn_ieee_power(double base, int64_t exponent) {
  double power = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) power = power * base;
    base = base * base;
  }
  return power;
}

/* ---- the normal distribution --------------------------------------------------------------------------------- */

/* Natural logarithm of a positive normal number, within 1 ulp or so: x = 2^k m with m in [sqrt(1/2), sqrt(2)),
 *   log(x) = k ln2 + f - (f^2/2 - s (f^2/2 + R(s^2))),   f = m - 1,  s = f / (2 + f),
 * R the polynomial of FreeBSD's e_log.c (Sun Microsystems, 1993). */
NN_SHARED double nn_ieee_log(double x) {
  uint64_t bits;
  int64_t k;
  double f, s, z, w, r, half;
#if defined(__CUDA_ARCH__)
  bits = (uint64_t)__double_as_longlong(x);
#else
  memcpy(&bits, &x, sizeof bits);
#endif
  k = (int64_t)(bits >> 52) - 1023;
  bits = (bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
  if (bits >= 0x3FF6A09E667F3BCDull) { /* sqrt(2) */
    bits -= 0x0010000000000000ull;
    k += 1;
  }
#if defined(__CUDA_ARCH__)
  f = __longlong_as_double((long long)bits) - 1.0;
#else
  memcpy(&f, &bits, sizeof f);
  f = f - 1.0;
#endif
  s = f / (2.0 + f);
  z = s * s;
  w = z * z;
  r = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01)) +
      z * (6.666666666666735130e-01 +
           w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  half = (0.5 * f) * f;
  return (double)k * 6.93147180369123816490e-01 - ((half - (s * (half + r) + (double)k * 1.90821492927058770002e-10)) - f);
}

/* The quantile function of the standard normal distribution for 0 < p < 1, relative error about 1e-16: algorithm AS 241, PPND16
 * (M. J. Wichura, Applied Statistics 37, 1988). q = p - 1/2; rational in 0.180625 - q^2 for |q| <= 0.425, else in
 * sqrt(-log(min(p, 1-p))). */
NN_SHARED double nn_normal_quantile(double p) {
  double q = p - 0.5, r, x;
  if (q <= 0.425 && q >= -0.425) {
    r = 0.180625 - q * q;
    return q *
           (((((((2.5090809287301226727e3 * r + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r +
                4.5921953931549871457e4) * r + 1.3731693765509461125e4) * r + 1.9715909503065514427e3) * r +
             1.3314166789178437745e2) * r + 3.3871328727963666080e0) /
           (((((((5.2264952788528545610e3 * r + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r +
                2.1213794301586595867e4) * r + 5.3941960214247511077e3) * r + 6.8718700749205790830e2) * r +
             4.2313330701600911252e1) * r + 1.0);
  }
  r = sqrt(-nn_ieee_log(q < 0.0 ? p : 1.0 - p));
  if (r <= 5.0) {
    r = r - 1.6;
    x = (((((((7.7454501427834140764e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r +
             1.27045825245236838258e0) * r + 3.64784832476320460504e0) * r + 5.76949722146069140550e0) * r +
          4.63033784615654529590e0) * r + 1.42343711074968357734e0) /
        (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r +
             1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940e0) * r +
          2.05319162663775882187e0) * r + 1.0);
  } else {
    r = r - 5.0;
    x = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r +
             2.65321895265761230930e-2) * r + 2.96560571828504891230e-1) * r + 1.78482653991729133580e0) * r +
          5.46378491116411436990e0) * r + 6.65790464350110377720e0) /
        (((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r +
             7.86869131145613259100e-4) * r + 1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r +
          5.99832206555887937690e-1) * r + 1.0);
  }
  return q < 0.0 ? -x : x;
}

/* z(seed, stream, index) ~ Normal(0, 1): the quantile of (the high 52 bits + 1/2) * 2^-52, which is exact and never 0 or 1. */
NN_SHARED double nn_random_normal_at(uint64_t seed, uint64_t stream, uint64_t index) {
  double p = ((double)(nn_random_bits(seed, stream, index) >> 12) + 0.5) * (1.0 / 4503599627370496.0);
  return nn_normal_quantile(p);
}

#endif
