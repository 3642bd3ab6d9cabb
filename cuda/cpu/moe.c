/* moe.c: the moe section of nn.h: sorting slots by expert, the grouped products, and the sum per token.
 *
 * Owns the description of each grouped product (one product for each expert, its rows the expert's slots); gemm.simd.c computes
 * them and moe.simd.c finishes their tiles. Shape letters as in nn.h: N = T*K slots.
 */
#include "moe.h"

int64_t nn_moe_workspace_bytes(const nn_sizes *sizes) {
  return nn_ceil_div(sizes->F, NN_COLUMN_BLOCK) * sizes->T * sizes->K * (int64_t)sizeof(float) + 256;
}

nn_status nn_moe_permute(nn_context *context, int32_t *offsets, int32_t *load, int32_t *slot_token, float *slot_weight,
                         int32_t *slot_of, const int32_t *index, const float *weight, int64_t T, int64_t E, int64_t K) {
  NN_REQUIRE(context, T >= 0 && E >= 1 && K >= 0 && T * K <= INT32_MAX);
  memset(load, 0, (size_t)E * sizeof *load);
  for (int64_t i = 0; i < T * K; i++) load[index[i] >= 0 && index[i] < E ? index[i] : 0]++;
  offsets[0] = 0;
  for (int64_t e = 0; e < E; e++) offsets[e + 1] = offsets[e] + load[e];
  memset(load, 0, (size_t)E * sizeof *load);
  for (int64_t i = 0; i < T * K; i++) {
    int32_t e = index[i] >= 0 && index[i] < E ? index[i] : 0;
    int32_t slot = offsets[e] + load[e]++;
    slot_token[slot] = (int32_t)(i / K);
    slot_weight[slot] = weight[i];
    slot_of[i] = slot;
  }
  return NN_OK;
}

/* A grouped product: what describe_* needs for any expert. The last member belongs to the epilogue. */
typedef struct grouped {
  const float *rows;          /* a slot's row, or the token's row that slot_token picks */
  const float *other;         /* weights of all experts, or the second operand of a weight gradient */
  float *out;
  const int32_t *slot_token, *offsets;
  const float *slot_weight;   /* of a slot's row; NULL: 1 */
  int64_t H, F;
  int accumulate;             /* of a weight gradient: whether `out` is added to */
  union {
    nn_swiglu_output *swiglu;     /* for each expert */
    nn_down_backward *backward;   /* for each expert */
  } epilogue;
  int64_t (*fetch)(const nn_product *product, int64_t row, int64_t rows, int64_t panel, const void **lines, int64_t most);
  void (*finish)(const nn_product *product, const nn_tile *tile);
  void (*finish_rows)(const nn_product *product, int64_t row, int64_t rows, int64_t column_block, const float *row_state);
} grouped;

static int64_t slots_of(const grouped *g, int64_t e) { return g->offsets[e + 1] - g->offsets[e]; }

static void run_grouped(nn_context *context, const grouped *g, int64_t E,
                        void (*describe)(const void *argument, int64_t index, nn_product *product)) {
  nn_product_list list = {E, 0, describe, g};
  NN_DISPATCH(context, nn_run_products)(context, &list);
}

#define NN_REQUIRE_MOE(context, T, H, F, E, K, dtype)                                                                   \
  NN_REQUIRE(context, T >= 0 && H >= 0 && F >= 0 && E >= 1 && K >= 0 && T * K <= INT32_MAX);                            \
  NN_REQUIRE_F32(context, dtype);                                                                                       \
  if (E > NN_MAX_PRODUCTS)                                                                                              \
  return nn_fail(context, NN_ERROR_UNSUPPORTED, "%s: at most %d experts, not %lld", __func__, NN_MAX_PRODUCTS, (long long)(E))

/* ---- forward -------------------------------------------------------------------------------------------------------- */

static void describe_up_forward(const void *argument, int64_t e, nn_product *product) {
  const grouped *g = argument;
  product->a = (nn_operand){.data = g->rows, .stride = g->H, .rows = g->slot_token + g->offsets[e]};
  product->b = (nn_operand){.data = g->other + e * 2 * g->F * g->H, .stride = g->H, .transposed = 1, .interleave = g->F};
  product->m = slots_of(g, e);
  product->n = 2 * g->F;
  product->k = g->H;
  product->fetch = g->fetch;
  product->finish = g->finish;
  product->argument = &g->epilogue.swiglu[e];
}

nn_status nn_moe_up_forward(nn_context *context, void *h, void *gate_up, const void *x, const int32_t *slot_token,
                            const int32_t *offsets, const void *gate_up_weight, int64_t T, int64_t H, int64_t F, int64_t E,
                            int64_t K, nn_dtype dtype) {
  NN_REQUIRE_MOE(context, T, H, F, E, K, dtype);
  nn_swiglu_output outputs[NN_MAX_PRODUCTS];
  for (int64_t e = 0; e < E; e++) {
    float *rows = gate_up != NULL ? (float *)gate_up + (int64_t)offsets[e] * 2 * F : NULL;
    outputs[e] = (nn_swiglu_output){(float *)h + (int64_t)offsets[e] * F, rows, F};
  }
  grouped g = {.rows = x, .other = gate_up_weight, .slot_token = slot_token, .offsets = offsets, .H = H, .F = F,
               .epilogue.swiglu = outputs, .fetch = NN_DISPATCH(context, nn_fetch_swiglu),
               .finish = NN_DISPATCH(context, nn_finish_swiglu)};
  run_grouped(context, &g, E, describe_up_forward);
  return NN_OK;
}

static void describe_down_forward(const void *argument, int64_t e, nn_product *product) {
  const grouped *g = argument;
  product->a = (nn_operand){.data = g->rows + g->offsets[e] * g->F, .stride = g->F};
  product->b = (nn_operand){.data = g->other + e * g->H * g->F, .stride = g->F, .transposed = 1};
  product->m = slots_of(g, e);
  product->n = g->H;
  product->k = g->F;
  product->c = g->out + g->offsets[e] * g->H;
  product->c_stride = g->H;
}

nn_status nn_moe_down_forward(nn_context *context, void *y, const void *h, const int32_t *offsets, const void *down_weight,
                              int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, nn_dtype dtype) {
  NN_REQUIRE_MOE(context, T, H, F, E, K, dtype);
  grouped g = {.rows = h, .other = down_weight, .out = y, .offsets = offsets, .H = H, .F = F};
  run_grouped(context, &g, E, describe_down_forward);
  return NN_OK;
}

nn_status nn_moe_combine(nn_context *context, void *out, const void *base, const void *y, const float *weight,
                         const int32_t *slot_of, int64_t T, int64_t H, int64_t K, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && H >= 0 && K >= 0);
  NN_REQUIRE_F32(context, dtype);
#pragma omp parallel for num_threads(nn_team(context, T * H * (K + 1), 1 << 15)) schedule(static)
  for (int64_t t = 0; t < T; t++)
    NN_DISPATCH(context, nn_combine_row)
    ((float *)out + t * H, base != NULL ? (const float *)base + t * H : NULL, y, weight != NULL ? weight + t * K : NULL,
     slot_of + t * K, H, K);
  return NN_OK;
}

/* ---- backward ------------------------------------------------------------------------------------------------------- */

static void describe_down_backward(const void *argument, int64_t e, nn_product *product) {
  const grouped *g = argument;
  product->a = (nn_operand){.data = g->rows, .stride = g->H, .rows = g->slot_token + g->offsets[e]};
  product->b = (nn_operand){.data = g->other + e * g->H * g->F, .stride = g->F};
  product->m = slots_of(g, e);
  product->n = g->F;
  product->k = g->H;
  product->fetch = g->fetch;
  product->finish = g->finish;
  product->finish_rows = g->finish_rows;
  product->argument = &g->epilogue.backward[e];
}

nn_status nn_moe_down_backward(nn_context *context, void *dgate_up, void *h, float *dweight, const void *dout,
                               const void *gate_up, const int32_t *slot_token, const float *slot_weight,
                               const int32_t *slot_of, const int32_t *offsets, const void *down_weight, int64_t T, int64_t H,
                               int64_t F, int64_t E, int64_t K, nn_dtype dtype) {
  NN_REQUIRE_MOE(context, T, H, F, E, K, dtype);
  int64_t N = T * K, blocks = nn_ceil_div(F, NN_COLUMN_BLOCK);
  nn_carve carve = nn_carve_begin(context);
  float *dot = nn_carve_take(&carve, blocks * N * (int64_t)sizeof(float));
  NN_CARVE_CHECK(context, carve);
  nn_down_backward rows[NN_MAX_PRODUCTS];
  for (int64_t e = 0; e < E; e++) {
    int64_t first = offsets[e];
    rows[e] = (nn_down_backward){
        .dgate_up = (float *)dgate_up + first * 2 * F, .h = h != NULL ? (float *)h + first * F : NULL, .dot = dot + first,
        .slots = N, .gate_up = (const float *)gate_up + first * 2 * F, .slot_weight = slot_weight + first, .F = F};
  }
  grouped g = {.rows = dout, .other = down_weight, .slot_token = slot_token, .offsets = offsets, .H = H, .F = F,
               .epilogue.backward = rows, .fetch = NN_DISPATCH(context, nn_fetch_down_backward),
               .finish = NN_DISPATCH(context, nn_finish_down_backward),
               .finish_rows = NN_DISPATCH(context, nn_finish_down_backward_rows)};
  run_grouped(context, &g, E, describe_down_backward);
  for (int64_t i = 0; i < N; i++) {
    float sum = 0;
    for (int64_t block = 0; block < blocks; block++) sum += dot[block * N + slot_of[i]];
    dweight[i] = sum;
  }
  return NN_OK;
}

static void describe_down_weight_gradient(const void *argument, int64_t e, nn_product *product) {
  const grouped *g = argument;
  product->a = (nn_operand){.data = g->rows, .stride = g->H, .rows = g->slot_token + g->offsets[e], .scale = g->slot_weight + g->offsets[e],
                            .transposed = 1};
  product->b = (nn_operand){.data = g->other + g->offsets[e] * g->F, .stride = g->F};
  product->k = slots_of(g, e);
  product->m = product->k > 0 || !g->accumulate ? g->H : 0; /* without slots nothing is to be added, but zeros to be stored */
  product->n = g->F;
  product->c = g->out + e * g->H * g->F;
  product->c_stride = g->F;
  product->beta = g->accumulate ? 1.0f : 0.0f;
}

nn_status nn_moe_down_weight_gradient(nn_context *context, float *ddown_weight, const void *dout, const void *h,
                                      const int32_t *slot_token, const float *slot_weight, const int32_t *offsets, int64_t T, int64_t H, int64_t F,
                                      int64_t E, int64_t K, int32_t accumulate, nn_dtype dtype) {
  NN_REQUIRE_MOE(context, T, H, F, E, K, dtype);
  grouped g = {.rows = dout, .other = h, .out = ddown_weight, .slot_token = slot_token, .slot_weight = slot_weight, .offsets = offsets,
               .H = H, .F = F, .accumulate = accumulate != 0};
  run_grouped(context, &g, E, describe_down_weight_gradient);
  return NN_OK;
}

static void describe_up_backward(const void *argument, int64_t e, nn_product *product) {
  const grouped *g = argument;
  product->a = (nn_operand){.data = g->rows + g->offsets[e] * 2 * g->F, .stride = 2 * g->F};
  product->b = (nn_operand){.data = g->other + e * 2 * g->F * g->H, .stride = g->H};
  product->m = slots_of(g, e);
  product->n = g->H;
  product->k = 2 * g->F;
  product->c = g->out + g->offsets[e] * g->H;
  product->c_stride = g->H;
}

nn_status nn_moe_up_backward(nn_context *context, void *dx_slots, const void *dgate_up, const int32_t *offsets,
                             const void *gate_up_weight, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K,
                             nn_dtype dtype) {
  NN_REQUIRE_MOE(context, T, H, F, E, K, dtype);
  grouped g = {.rows = dgate_up, .other = gate_up_weight, .out = dx_slots, .offsets = offsets, .H = H, .F = F};
  run_grouped(context, &g, E, describe_up_backward);
  return NN_OK;
}

static void describe_up_weight_gradient(const void *argument, int64_t e, nn_product *product) {
  const grouped *g = argument;
  product->a = (nn_operand){.data = g->rows + g->offsets[e] * 2 * g->F, .stride = 2 * g->F, .transposed = 1};
  product->b = (nn_operand){.data = g->other, .stride = g->H, .rows = g->slot_token + g->offsets[e]};
  product->k = slots_of(g, e);
  product->m = product->k > 0 || !g->accumulate ? 2 * g->F : 0; /* without slots nothing is to be added, but zeros to be stored */
  product->n = g->H;
  product->c = g->out + e * 2 * g->F * g->H;
  product->c_stride = g->H;
  product->beta = g->accumulate ? 1.0f : 0.0f;
}

nn_status nn_moe_up_weight_gradient(nn_context *context, float *dgate_up_weight, const void *dgate_up, const void *x,
                                    const int32_t *slot_token, const int32_t *offsets, int64_t T, int64_t H, int64_t F,
                                    int64_t E, int64_t K, int32_t accumulate, nn_dtype dtype) {
  NN_REQUIRE_MOE(context, T, H, F, E, K, dtype);
  grouped g = {.rows = dgate_up, .other = x, .out = dgate_up_weight, .slot_token = slot_token, .offsets = offsets, .H = H,
               .F = F, .accumulate = accumulate != 0};
  run_grouped(context, &g, E, describe_up_weight_gradient);
  return NN_OK;
}
