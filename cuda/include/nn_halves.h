/* nn_halves.h: the two 16-bit halves of a float32, as the CPU library (C) and the CUDA library share them, so that both give the same
 * bits. Integer arithmetic on bit patterns; knows nothing of contexts, buffers or threads.
 *
 *   high = (bits + 0x8000) >> 16    the nearest bfloat16, ties away from zero
 *   low  = bits & 0xFFFF            what is lost in it
 *   bits = (high - (low >> 15)) << 16 | low
 *
 * That `low` tells whether `high` was rounded up is due to the ties: rounded to even, a tie could have gone either way, and the way
 * back would be lost. A carry out of the fraction goes into the exponent, and out of the largest floats into infinity, as rounding
 * wants; the way back takes it off again. Every pattern comes back, but for NaN: a NaN's carry could reach the sign and make it a zero,
 * so all of them become one, 0x7FC00000.
 */
#ifndef NN_HALVES_H
#define NN_HALVES_H

#include <stdint.h>

/* As in nn_random.h. */
#if defined(__CUDACC__)
#define NN_SHARED static __host__ __device__ inline
#else
#define NN_SHARED static inline __attribute__((unused))
#endif

typedef struct nn_halves {
  uint16_t high, low;
} nn_halves;

NN_SHARED nn_halves nn_halves_of(uint32_t bits) {
  nn_halves halves;
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) bits = 0x7FC00000u;
  halves.high = (uint16_t)((bits + 0x8000u) >> 16);
  halves.low = (uint16_t)bits;
  return halves;
}

NN_SHARED uint32_t nn_halves_joined(uint16_t high, uint16_t low) {
  return (((uint32_t)high - (uint32_t)(low >> 15)) << 16) | low;
}

#endif
