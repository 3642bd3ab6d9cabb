/* moe.simd.c: the vector code of the mixture of experts: SwiGLU forward and backward on the tiles of the grouped products while
 * they are in the first cache, and the weighted sum of a token's slots. Shapes as in nn.h: H hidden, F ffn, K experts per token.
 */
#include "moe.h"
#include "simd.h"

/* One function, so that h has the same bits wherever it is computed. */
NN_INLINE nn_vec swiglu(nn_vec gate, nn_vec up) { return gate * nn_sigmoid(gate) * up; }

int64_t NN_SIMD(nn_fetch_swiglu)(const nn_product *product, int64_t row, int64_t rows, int64_t panel, const void **lines,
                                 int64_t most) {
  const nn_swiglu_output *to = product->argument;
  int64_t F = to->F, column = panel * NN_VL, count = 0;
  for (int64_t i = row; i < row + rows && count + 3 <= most; i++) {
    lines[count++] = to->h + i * F + column;
    if (to->gate_up == NULL) continue;
    lines[count++] = to->gate_up + i * 2 * F + column;
    lines[count++] = to->gate_up + i * 2 * F + F + column;
  }
  return count;
}

void NN_SIMD(nn_finish_swiglu)(const nn_product *product, const nn_tile *tile) {
  const nn_swiglu_output *to = product->argument;
  int64_t column = tile->panel * NN_VL, count = nn_min64(NN_VL, to->F - column);
  for (int64_t i = 0; i < tile->rows; i++) {
    nn_vec gate = nn_load(tile->values + i * tile->stride), up = nn_load(tile->values + i * tile->stride + NN_VL);
    int64_t row = tile->row + i;
    nn_store_tail(to->h + row * to->F + column, swiglu(gate, up), count);
    if (to->gate_up == NULL) continue;
    nn_store_tail(to->gate_up + row * 2 * to->F + column, gate, count);
    nn_store_tail(to->gate_up + row * 2 * to->F + to->F + column, up, count);
  }
}

int64_t NN_SIMD(nn_fetch_down_backward)(const nn_product *product, int64_t row, int64_t rows, int64_t panel,
                                        const void **lines, int64_t most) {
  const nn_down_backward *x = product->argument;
  int64_t F = x->F, count = 0;
  for (int64_t i = row; i < row + rows && count + 12 <= most; i++)
    for (int64_t column = 2 * panel * NN_VL; column < nn_min64(F, (2 * panel + 2) * NN_VL); column += NN_VL) {
      lines[count++] = x->gate_up + i * 2 * F + column;
      lines[count++] = x->gate_up + i * 2 * F + F + column;
      if (x->h != NULL) lines[count++] = x->h + i * F + column;
      if (x->weighted_h != x->h) lines[count++] = x->weighted_h + i * F + column;
      if (x->dgate_up == x->gate_up) continue;
      lines[count++] = x->dgate_up + i * 2 * F + column;
      lines[count++] = x->dgate_up + i * 2 * F + F + column;
    }
  return count;
}

void NN_SIMD(nn_finish_down_backward)(const nn_product *product, const nn_tile *tile) {
  const nn_down_backward *x = product->argument;
  int64_t F = x->F;
  for (int v = 0; v < 2; v++) {
    int64_t column = (2 * tile->panel + v) * NN_VL, count = nn_min64(NN_VL, F - column);
    if (count <= 0) break;
    /* All rows are read before any is written: rows often lie a multiple of 4096 bytes apart, and a load that agrees in its low
     * 12 bits with a store before it has to wait for that store. */
    nn_vec gates[NN_TILE_ROWS], ups[NN_TILE_ROWS], hs[NN_TILE_ROWS];
    for (int64_t i = 0; i < tile->rows; i++) {
      const float *gate_up = x->gate_up + (tile->row + i) * 2 * F + column;
      gates[i] = nn_load_tail(gate_up, count);
      ups[i] = nn_load_tail(gate_up + F, count);
      if (x->h != NULL) hs[i] = nn_load_tail(x->h + (tile->row + i) * F + column, count);
    }
    for (int64_t i = 0; i < tile->rows; i++) {
      int64_t row = tile->row + i;
      float weight = x->slot_weight[row], *state = tile->row_state + i * NN_VL;
      nn_vec dh = nn_load(tile->values + i * tile->stride + v * NN_VL), weighted = weight * dh;
      nn_vec gate = gates[i], up = ups[i], sigmoid = nn_sigmoid(gate), silu = gate * sigmoid;
      nn_vec h = x->h != NULL ? hs[i] : swiglu(gate, up);
      nn_store(state, nn_load(state) + dh * h);
      nn_store_tail(x->dgate_up + row * 2 * F + column, weighted * up * (sigmoid * (1.0f + gate * (1.0f - sigmoid))), count);
      nn_store_tail(x->dgate_up + row * 2 * F + F + column, weighted * silu, count);
      nn_store_tail(x->weighted_h + row * F + column, weight * h, count);
    }
  }
}

void NN_SIMD(nn_finish_down_backward_rows)(const nn_product *product, int64_t row, int64_t rows, int64_t column_block,
                                           const float *row_state) {
  const nn_down_backward *x = product->argument;
  for (int64_t i = 0; i < rows; i++) x->dot[column_block * x->slots + row + i] = nn_sum_of(nn_load(row_state + i * NN_VL));
}

void NN_SIMD(nn_combine_row)(float *out, const float *base, const float *y, const float *weight, const int32_t *slot_of,
                             int64_t H, int64_t K) {
  for (int64_t j = 0; j < H; j += NN_VL) {
    int64_t count = nn_min64(NN_VL, H - j);
    nn_vec sum = base != NULL ? nn_load_tail(base + j, count) : (nn_vec){0};
    for (int64_t k = 0; k < K; k++) {
      nn_vec value = nn_load_tail(y + slot_of[k] * H + j, count);
      sum = weight != NULL ? sum + weight[k] * value : sum + value;
    }
    nn_store_tail(out + j, sum, count);
  }
}
