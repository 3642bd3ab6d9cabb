/* linear_cross_entropy.h: what linear_cross_entropy.c calls of its vector code. */
#ifndef NN_LINEAR_CROSS_ENTROPY_H
#define NN_LINEAR_CROSS_ENTROPY_H

#include "internal.h"

#define NN_IGNORED_TARGET (-100)

/* The loss of one row of V logits; with `gradient` the logits become scale * (softmax - onehot). An ignored target gives 0 and a
 * gradient of 0, one outside 0..V-1 NaN. */
NN_DECLARE_SIMD(float, nn_loss_row, (float *logits, int64_t V, int32_t target, float scale, int gradient));

#endif
