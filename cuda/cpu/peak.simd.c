/* peak.simd.c: multiply-adds in registers alone: what the machine could do if memory cost nothing. */
#include "peak.h"
#include "simd.h"

float NN_SIMD(nn_fma_loop)(int64_t rounds) {
  nn_vec sum[NN_PEAK_CHAINS], factor = nn_v_set(0.999999f);
#pragma GCC unroll 16
  for (int i = 0; i < NN_PEAK_CHAINS; i++) sum[i] = nn_v_set((float)i);
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 16
    for (int i = 0; i < NN_PEAK_CHAINS; i++) {
      sum[i] = nn_v_fma(sum[i], factor, factor);
      __asm__ volatile("" : "+" NN_VECTOR_REGISTER(sum[i])); /* keeps each chain, and in a register */
    }
  }
  nn_vec all = sum[0];
#pragma GCC unroll 16
  for (int i = 1; i < NN_PEAK_CHAINS; i++) all += sum[i];
  return nn_v_sum(all);
}

int64_t NN_SIMD(nn_fma_flops)(void) { return 2 * NN_LANES * NN_PEAK_CHAINS; }
