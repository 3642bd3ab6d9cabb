/* moe.h: what moe.c and its vector code (moe.simd.c) share: the epilogues' arguments. */
#ifndef NN_MOE_H
#define NN_MOE_H

#include "gemm.h"

/* Where the up product of one expert puts its rows; row 0 is the expert's first slot. */
typedef struct nn_swiglu_output {
  float *h;       /* [rows, F] */
  float *gate_up; /* [rows, 2F] or NULL */
  int64_t F;
} nn_swiglu_output;

/* What the backward of the down product reads and writes; row 0 is the expert's first slot. */
typedef struct nn_down_backward {
  float *dgate_up;      /* [rows, 2F], may be gate_up */
  float *h;             /* [rows, F] or NULL */
  float *dot;           /* [column blocks, all slots], at this expert's first slot: dh . h over one column block */
  int64_t slots;        /* all slots */
  const float *gate_up; /* [rows, 2F] */
  const float *slot_weight;
  int64_t F;
} nn_down_backward;

/* nn_product.fetch, finish and finish_rows of the two. */
NN_DECLARE_SIMD(int64_t, nn_fetch_swiglu,
                (const nn_product *product, int64_t row, int64_t rows, int64_t panel, const void **lines, int64_t most));
NN_DECLARE_SIMD(int64_t, nn_fetch_down_backward,
                (const nn_product *product, int64_t row, int64_t rows, int64_t panel, const void **lines, int64_t most));
NN_DECLARE_SIMD(void, nn_finish_swiglu, (const nn_product *product, const nn_tile *tile));
NN_DECLARE_SIMD(void, nn_finish_down_backward, (const nn_product *product, const nn_tile *tile));
NN_DECLARE_SIMD(void, nn_finish_down_backward_rows,
                (const nn_product *product, int64_t row, int64_t rows, int64_t column_block, const float *row_state));

/* out = base + sum over k of weight[k] * y[slot_of[k]], for one token; base and weight may be NULL. */
NN_DECLARE_SIMD(void, nn_combine_row,
                (float *out, const float *base, const float *y, const float *weight, const int32_t *slot_of, int64_t H,
                 int64_t K));

#endif
