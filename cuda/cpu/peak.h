/* peak.h: what peak.c calls of its vector code. */
#ifndef NN_PEAK_H
#define NN_PEAK_H

#include "internal.h"

/* Independent chains: more than latency times units of any CPU here, fewer than its registers. */
#define NN_PEAK_CHAINS 12

#if defined(__x86_64__)
#define NN_VECTOR_REGISTER "x"
#else
#define NN_VECTOR_REGISTER "w"
#endif

/* `rounds` rounds of multiply-adds; the result only keeps them from being removed. */
NN_DECLARE_SIMD(float, nn_fma_loop, (int64_t rounds));
/* Floating-point operations of one round. */
NN_DECLARE_SIMD(int64_t, nn_fma_flops, (void));

#endif
