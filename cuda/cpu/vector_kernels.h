/* vector_kernels.h: the inner loops that are compiled for each instruction set (*.simd.c), as the entries of nn.h call them.
 *
 * Each works on a range that one thread owns and knows nothing of contexts, checks or threads. All are float32. Shape letters as
 * in nn.h. What an output may alias is said in nn.h.
 */
#ifndef NN_VECTOR_KERNELS_H
#define NN_VECTOR_KERNELS_H

#include "internal.h"

#define NN_CHUNK 16384 /* elements that a thread takes at a time */
#define NN_GRAIN 16384 /* elements of light work worth waking a thread for */

/* ---- elementwise.simd.c ------------------------------------------------------------------------------------- */

NN_DECLARE_SIMD(void, nn_silu_range, (float *y, const float *x, int64_t n));
NN_DECLARE_SIMD(void, nn_silu_backward_range, (float *dx, const float *dy, const float *x, int64_t n));
NN_DECLARE_SIMD(void, nn_add_range, (float *y, const float *a, const float *b, int64_t n));
NN_DECLARE_SIMD(void, nn_mul_range, (float *y, const float *a, const float *b, int64_t n));
NN_DECLARE_SIMD(void, nn_scale_range, (float *y, const float *x, int64_t n, float factor));
NN_DECLARE_SIMD(void, nn_to_bf16_range, (uint16_t *y, const float *x, int64_t n));
NN_DECLARE_SIMD(void, nn_from_bf16_range, (float *y, const uint16_t *x, int64_t n));
NN_DECLARE_SIMD(void, nn_split_range, (uint16_t *high, uint16_t *low, const float *x, int64_t n));
NN_DECLARE_SIMD(void, nn_join_range, (float *x, const uint16_t *high, const uint16_t *low, int64_t n));
/* h [n] and gate, up [n] of one row. */
NN_DECLARE_SIMD(void, nn_swiglu_row, (float *h, const float *gate, const float *up, int64_t n));
NN_DECLARE_SIMD(void, nn_swiglu_backward_row,
                (float *dgate, float *dup, const float *dh, const float *gate, const float *up, int64_t n));
/* Adds the digest terms of words[0 .. n-1], which have the indices first, first + 1, ..., to digest[2]. */
NN_DECLARE_SIMD(void, nn_digest_range, (uint64_t *digest, const uint32_t *words, int64_t first, int64_t n));

/* ---- softmax.simd.c ----------------------------------------------------------------------------------------- */

NN_DECLARE_SIMD(void, nn_softmax_row, (float *y, const float *x, int64_t n));
NN_DECLARE_SIMD(void, nn_softmax_backward_row, (float *dx, const float *dy, const float *y, int64_t n));
/* Returns the sum of exp(x - largest) and stores the largest element (NaN does not count as one). */
NN_DECLARE_SIMD(float, nn_exp_sum_row, (float *largest, const float *x, int64_t n));
/* y = factor * exp(x - largest); y may be x. */
NN_DECLARE_SIMD(void, nn_exp_row, (float *y, const float *x, int64_t n, float largest, float factor));

#define NN_IGNORED_TARGET (-100)
/* The loss of one row of V logits; with `gradient` the logits become scale * (softmax - onehot). An ignored target gives 0 and a
 * gradient of 0, one outside 0..V-1 NaN. */
NN_DECLARE_SIMD(float, nn_loss_row, (float *logits, int64_t V, int32_t target, float scale, int gradient));

/* ---- rmsnorm.simd.c, rope.simd.c ---------------------------------------------------------------------------- */

/* One row: x += delta first, into sum, when delta is not NULL (else sum is not used). Returns the reciprocal. */
NN_DECLARE_SIMD(float, nn_rmsnorm_row,
                (float *sum, float *y, const float *x, const float *delta, const float *weight, int64_t H, float epsilon));
/* One row, with dsum (or NULL) added to dx; dweight [H] += dy * x * reciprocal. */
NN_DECLARE_SIMD(void, nn_rmsnorm_backward_row,
                (float *dx, float *dweight, const float *dy, const float *dsum, const float *x, const float *weight,
                 float reciprocal, int64_t H));
/* Rotates one head of D elements; sign is 1 or -1. */
NN_DECLARE_SIMD(void, nn_rope_head, (float *y, const float *x, const float *cosine, const float *sine, int64_t D, float sign));

/* ---- optimizer.simd.c --------------------------------------------------------------------------------------- */

/* The sum of up to 4096 elements (or of their squares) in the order of nn_grad_norm, for float32 and for the sums themselves. */
NN_DECLARE_SIMD(double, nn_chunk_sum, (const float *x, int64_t n));
NN_DECLARE_SIMD(double, nn_chunk_sum_of_squares, (const float *x, int64_t n));

/* The scalars of nn_adamw_step, rounded to float32. */
typedef struct nn_adamw_scalars {
  float clip, beta1, one_minus_beta1, beta2, one_minus_beta2, rate, rate_decay, inverse1, inverse2, epsilon;
} nn_adamw_scalars;

NN_DECLARE_SIMD(void, nn_adamw_range,
                (float *parameter, float *m, float *v, const float *gradient, int64_t n, const nn_adamw_scalars *scalars));
NN_DECLARE_SIMD(void, nn_adamw_bf16_range,
                (float *parameter, uint16_t *m, uint16_t *v, const float *gradient, int64_t n,
                 const nn_adamw_scalars *scalars));

/* ---- attention.simd.c --------------------------------------------------------------------------------------- */

/* The attention of the `heads` query heads that share one key/value head of one sequence. Row i of q is a query with its heads side
 * by side, `q_stride` floats after row i-1; it is at position first_position + i and sees keys 0 .. first_position + i. */
typedef struct nn_attention_group {
  const float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride, out_stride; /* out_stride also of dout */
  float *out;           /* forward */
  float *log_sum_exp;   /* forward, may be NULL: heads rows of log_sum_exp_stride */
  int64_t log_sum_exp_stride;
  int64_t heads, D, queries, first_position;
  float scale;
  /* backward: dq has q's stride, dk and dv that of k and v */
  const float *dout, *forward_out, *saved_log_sum_exp;
  float *dq, *dk, *dv;
} nn_attention_group;

#define NN_ATTENTION_QUERY_ROWS 128 /* rows (query, head) of a query tile of the backward; twice as many in the forward */
#define NN_ATTENTION_FORWARD_KEYS 128
#define NN_ATTENTION_BACKWARD_KEYS 64

/* Floats of scratch that one call needs. */
int64_t nn_attention_forward_scratch(int64_t heads, int64_t D);
int64_t nn_attention_backward_scratch(int64_t heads, int64_t D);
/* Queries of one tile; a range of queries given to one call is one tile or less. */
int64_t nn_attention_forward_queries(int64_t heads);
int64_t nn_attention_backward_queries(int64_t heads);

NN_DECLARE_SIMD(void, nn_attention_forward_tile,
                (const nn_attention_group *group, int64_t first_query, int64_t query_count, float *scratch));
/* Key tiles key_tile_begin .. key_tile_end-1 against query tiles query_tile_begin .. query_tile_end-1, in rising order, the
 * keys outside. dk and dv are written when want_keys, dq when want_queries: each is complete only when the other range is. */
NN_DECLARE_SIMD(void, nn_attention_backward_tiles,
                (const nn_attention_group *group, int64_t key_tile_begin, int64_t key_tile_end, int64_t query_tile_begin,
                 int64_t query_tile_end, int want_keys, int want_queries, float *scratch));
/* One row of the plain way: score[j] = scale * q . k[j] for j < n. */
NN_DECLARE_SIMD(void, nn_attention_score_row,
                (float *score, const float *q, const float *k, int64_t k_stride, int64_t n, int64_t D, float scale));
/* out[d] = sum over j < n, rising, of probability[j] * v[j][d]. */
NN_DECLARE_SIMD(void, nn_attention_output_row,
                (float *out, const float *probability, const float *v, int64_t v_stride, int64_t n, int64_t D));

#endif
