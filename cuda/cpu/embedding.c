/* embedding.c: the token table's lookup and its gradient (nn.h), for the CPU.
 *
 * The gradient sorts the tokens by value (a counting sort, stable, so that a row's tokens stay in rising t), then each row of the
 * table has one owner, which sums its tokens in registers and adds them once. Tokens outside the table have no row to add to.
 */
#include <math.h>

#include "vector_kernels.h"

#define COLUMNS 64 /* columns of the table that are summed at a time */

nn_status nn_embedding_forward(nn_context *context, void *y, const int32_t *token, const void *table, int64_t T, int64_t H,
                               int64_t V, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && H >= 0 && V >= 0);
  NN_REQUIRE_F32(context, dtype);
#pragma omp parallel for num_threads(nn_team(context, T * H, NN_GRAIN)) schedule(static)
  for (int64_t t = 0; t < T; t++) {
    float *to = (float *)y + t * H;
    if (token[t] >= 0 && token[t] < V)
      memcpy(to, (const float *)table + (int64_t)token[t] * H, (size_t)H * sizeof(float));
    else
      for (int64_t i = 0; i < H; i++) to[i] = NAN;
  }
  return NN_OK;
}

/* dtable += the sum of dy over the tokens t in `order`. */
static void add_row(float *dtable, const float *dy, const int32_t *order, int64_t count, int64_t H) {
  for (int64_t first = 0; first < H; first += COLUMNS) {
    const int64_t width = nn_min64(COLUMNS, H - first);
    float sum[COLUMNS] = {0};
    for (int64_t i = 0; i < count; i++) {
      const float *from = dy + order[i] * H + first;
      if (width == COLUMNS)
        for (int64_t c = 0; c < COLUMNS; c++) sum[c] += from[c];
      else
        for (int64_t c = 0; c < width; c++) sum[c] += from[c];
    }
    for (int64_t c = 0; c < width; c++) dtable[first + c] += sum[c];
  }
}

nn_status nn_scatter_add(nn_context *context, float *dtable, const void *dy, const int32_t *token, int64_t T, int64_t H, int64_t V,
                         nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && T < INT32_MAX && H >= 0 && V >= 0);
  NN_REQUIRE_F32(context, dtype);
  nn_carve carve = nn_carve_begin(context);
  int32_t *end = nn_carve_take(&carve, (V + 1) * (int64_t)sizeof(int32_t));
  int32_t *order = nn_carve_take(&carve, T * (int64_t)sizeof(int32_t));
  NN_CARVE_CHECK(context, carve);
  if (T == 0 || H == 0 || V == 0) return NN_OK;
  memset(end, 0, (size_t)(V + 1) * sizeof(int32_t));
  for (int64_t t = 0; t < T; t++)
    if (token[t] >= 0 && token[t] < V) end[token[t] + 1]++;
  for (int64_t v = 0; v < V; v++) end[v + 1] += end[v];
  /* end[v] is where v's next token goes; when all are placed it is where v's tokens end. */
  for (int64_t t = 0; t < T; t++)
    if (token[t] >= 0 && token[t] < V) order[end[token[t]]++] = (int32_t)t;
#pragma omp parallel for num_threads(nn_team(context, T * H, NN_GRAIN)) schedule(dynamic, 64)
  for (int64_t v = 0; v < V; v++) {
    const int32_t begin = v == 0 ? 0 : end[v - 1];
    if (end[v] > begin) add_row(dtable + v * H, dy, order + begin, end[v] - begin, H);
  }
  return NN_OK;
}
