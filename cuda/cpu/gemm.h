/* gemm.h: the blocked matrix product that every product of the CPU library runs through.
 *
 * Owns the description of a product: where its operands lie, how they are gathered, and what becomes of the result. gemm.simd.c
 * computes it; gemm.c, moe.c and linear_cross_entropy.c describe theirs.
 *
 * Every element is one chain of multiply-adds over rising k, from 0 (or from `initial`): its bits depend on the row of A, the
 * column of B and k alone, never on tiles, m, n or the number of threads. AVX-512 and AVX2 give the same bits (both fuse);
 * the plain path of x86-64 rounds each product and differs in the last places.
 */
#ifndef NN_GEMM_H
#define NN_GEMM_H

#include "internal.h"

/* A row-major matrix, seen as A [m, k] or B [k, n]. */
typedef struct nn_operand {
  const float *data;
  int64_t stride;      /* floats from one row in memory to the next */
  const int32_t *rows; /* row i in memory is row rows[i] of data; NULL: row i */
  int transposed;      /* rows in memory are columns of the operand */
  const float *scale;  /* a transposed A only: row i in memory counts scale[i] times; NULL: once */
  int64_t interleave;  /* B only, 0 for none: F, when memory has 2F columns [gate | up]. A panel of 2 * NN_LANES columns then holds
                          NN_LANES gates and the ups that belong to them, so that the epilogue has both. */
} nn_operand;

/* A tile has this many rows at most. */
#define NN_TILE_ROWS 14

/* A finished tile of a product: `rows` rows of `stride` floats, each with one panel: vectors 0 and 1 of NN_LANES floats each. */
typedef struct nn_tile {
  const float *values;
  int64_t stride;
  int64_t row, rows;   /* rows row .. row+rows-1 of the product */
  int64_t panel;       /* columns panel * 2 * NN_LANES .. (interleaved: gates and ups panel * NN_LANES ..) */
  float *row_state;    /* NN_LANES floats for each of these rows, 0 before the task's first panel */
} nn_tile;

typedef struct nn_product nn_product;
struct nn_product {
  nn_operand a, b;
  int64_t m, n, k;
  /* Without `finish`: C = alpha * sum + beta * C (beta 0 does not read C). */
  float *c;
  int64_t c_stride;
  float alpha, beta;
  /* The sum starts from here instead of from 0 (NULL). It may be C itself. */
  const float *initial;
  int64_t initial_stride;
  /* Takes each tile instead; the panels of a row come in rising order within a task, a task being all columns of one column
   * block (NN_COLUMN_BLOCK columns, half as many gates) for some rows. finish_rows, if any, ends the task. */
  void (*finish)(const nn_product *product, const nn_tile *tile);
  void (*finish_rows)(const nn_product *product, int64_t row, int64_t rows, int64_t column_block, const float *row_state);
  /* The addresses, at most `most`, that `finish` will touch for this tile; NULL: C's. */
  int64_t (*fetch)(const nn_product *product, int64_t row, int64_t rows, int64_t panel, const void **lines, int64_t most);
  const void *argument;
};

#define NN_COLUMN_BLOCK 512
#define NN_MAX_PRODUCTS 4096

/* Several products run as one: their tiles are spread over the threads together. */
typedef struct nn_product_list {
  int64_t count;
  int uniform; /* all of one size; otherwise count <= NN_MAX_PRODUCTS */
  void (*describe)(const void *argument, int64_t index, nn_product *product); /* `product` comes zeroed, alpha 1 */
  const void *argument;
} nn_product_list;

NN_DECLARE_SIMD(void, nn_run_products, (nn_context *context, const nn_product_list *list));

/* Runs one product. */
void nn_run_product(nn_context *context, const nn_product *product);

#endif
