/* moe.simd.c: the vector code of the mixture of experts: SwiGLU forward and backward on the tiles of the grouped products while
 * they are in the first cache, and the weighted sum of a token's slots. Shapes as in nn.h: H hidden, F ffn, K experts per token.
 * SwiGLU has the bits of nn_swiglu_forward and nn_swiglu_backward. build: -ffp-contract=off */
#include "moe.h"
#include "simd.h"

int64_t NN_SIMD(nn_fetch_swiglu)(const nn_product *product, int64_t row, int64_t rows, int64_t panel, const void **lines,
                                 int64_t most) {
  const nn_swiglu_output *to = product->argument;
  int64_t F = to->F, column = panel * NN_LANES, count = 0;
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
  int64_t column = tile->panel * NN_LANES, left = to->F - column;
  for (int64_t i = 0; i < tile->rows; i++) {
    nn_vec gate = nn_v_load(tile->values + i * tile->stride), up = nn_v_load(tile->values + i * tile->stride + NN_LANES);
    int64_t row = tile->row + i;
    nn_v_put(to->h + row * to->F + column, nn_v_swiglu(gate, up), left);
    if (to->gate_up == NULL) continue;
    nn_v_put(to->gate_up + row * 2 * to->F + column, gate, left);
    nn_v_put(to->gate_up + row * 2 * to->F + to->F + column, up, left);
  }
}

int64_t NN_SIMD(nn_fetch_down_backward)(const nn_product *product, int64_t row, int64_t rows, int64_t panel,
                                        const void **lines, int64_t most) {
  const nn_down_backward *x = product->argument;
  int64_t F = x->F, count = 0;
  for (int64_t i = row; i < row + rows && count + 12 <= most; i++)
    for (int64_t column = 2 * panel * NN_LANES; column < nn_min64(F, (2 * panel + 2) * NN_LANES); column += NN_LANES) {
      lines[count++] = x->gate_up + i * 2 * F + column;
      lines[count++] = x->gate_up + i * 2 * F + F + column;
      if (x->h != NULL) lines[count++] = x->h + i * F + column;
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
    int64_t column = (2 * tile->panel + v) * NN_LANES, left = F - column;
    if (left <= 0) break;
    /* All rows are read before any is written: rows often lie a multiple of 4096 bytes apart, and a load that agrees in its low
     * 12 bits with a store before it has to wait for that store. */
    nn_vec gates[NN_TILE_ROWS], ups[NN_TILE_ROWS];
    for (int64_t i = 0; i < tile->rows; i++) {
      const float *gate_up = x->gate_up + (tile->row + i) * 2 * F + column;
      gates[i] = nn_v_get(gate_up, left);
      ups[i] = nn_v_get(gate_up + F, left);
    }
    for (int64_t i = 0; i < tile->rows; i++) {
      int64_t row = tile->row + i;
      float weight = x->slot_weight[row], *state = tile->row_state + i * NN_LANES;
      nn_vec dh = nn_v_load(tile->values + i * tile->stride + v * NN_LANES), weighted = weight * dh;
      nn_vec gate = gates[i], up = ups[i], sigmoid = nn_v_sigmoid(gate), silu = nn_v_silu(gate, sigmoid);
      nn_vec h = silu * up;
      nn_v_store(state, nn_v_fma(dh, h, nn_v_load(state)));
      nn_v_put(x->dgate_up + row * 2 * F + column, weighted * up * nn_v_silu_slope(gate, sigmoid), left);
      nn_v_put(x->dgate_up + row * 2 * F + F + column, weighted * silu, left);
      if (x->h != NULL) nn_v_put(x->h + row * F + column, h, left);
    }
  }
}

void NN_SIMD(nn_finish_down_backward_rows)(const nn_product *product, int64_t row, int64_t rows, int64_t column_block,
                                           const float *row_state) {
  const nn_down_backward *x = product->argument;
  for (int64_t i = 0; i < rows; i++) x->dot[column_block * x->slots + row + i] = nn_v_sum(nn_v_load(row_state + i * NN_LANES));
}

void NN_SIMD(nn_combine_row)(float *out, const float *base, const float *y, const float *weight, const int32_t *slot_of,
                             int64_t H, int64_t K) {
  for (int64_t j = 0; j < H; j += NN_LANES) {
    int64_t left = H - j;
    nn_vec sum = base != NULL ? nn_v_get(base + j, left) : (nn_vec){0};
    for (int64_t k = 0; k < K; k++) {
      nn_vec value = nn_v_get(y + slot_of[k] * H + j, left);
      sum = weight != NULL ? nn_v_fma(nn_v_set(weight[k]), value, sum) : sum + value;
    }
    nn_v_put(out + j, sum, left);
  }
}
