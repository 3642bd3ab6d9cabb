/* attention.simd.c: attention over tiles that stay in the second-level cache; see vector_kernels.h. Called by attention.c.
 * build: -ffp-contract=off
 *
 * The heads of a group share their keys and values, so they form one tall tile: row m is query m / heads with head m % heads.
 *
 *             keys (a tile at a time)             forward, for each panel of 8 rows and each tile of keys:
 *            +-----------+                          s = q k^T;  p = exp(s - running maximum);  o = o * correction + p v
 *   rows     | panel  8  |                        backward, for each tile of keys and each tile of rows:
 *   (query,  +-----------+                          p = exp(q k^T - lse);  ds = p * (do v^T - delta)
 *   head)    | panel  8  |                          dq += ds k (per panel);  dv += p^T do;  dk += ds^T q
 *            +-----------+
 *
 * Every product goes through one register-tiled loop, multiply_panel: 8 rows by two vectors. Copies of k and v are packed: k
 * transposed for q k^T (v for do v^T), rows padded with zeros to whole vectors. The scale is folded into the copy of q.
 * A panel of 8 rows sees no more keys than its last query does, so the causal half that is masked is not computed. The corner that
 * only some of its rows see is left out of a panel's product and added row by row (multiply_row): a weight of 0 would not do, because
 * 0 times what a later token left there may be NaN.
 */
#include "simd.h"
#include "vector_kernels.h"

#define PANEL 8
#define STEP (2 * NN_LANES) /* columns that multiply_panel takes at a time */

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* c[r, j] (+)= sum over i < k of a[r * a_row + i * a_step] * b[i * b_row + j], for r < 8 and j < columns, a multiple of NN_LANES. */
NN_INLINE void multiply_panel(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_step, const float *b,
                              int64_t b_row, int64_t columns, int64_t k, int add) {
  int64_t j = 0;
  for (; j + STEP <= columns; j += STEP) {
    nn_vec sum[PANEL][2];
    for (int r = 0; r < PANEL; r++) {
      sum[r][0] = add ? nn_v_load(c + r * c_row + j) : nn_v_set(0.0f);
      sum[r][1] = add ? nn_v_load(c + r * c_row + j + NN_LANES) : nn_v_set(0.0f);
    }
    const float *left = a, *right = b + j;
    for (int64_t i = 0; i < k; i++, left += a_step, right += b_row) {
      nn_vec b0 = nn_v_load(right), b1 = nn_v_load(right + NN_LANES);
#pragma GCC unroll 8
      for (int r = 0; r < PANEL; r++) {
        nn_vec x = nn_v_set(left[r * a_row]);
        sum[r][0] = nn_v_fma(x, b0, sum[r][0]);
        sum[r][1] = nn_v_fma(x, b1, sum[r][1]);
      }
    }
    for (int r = 0; r < PANEL; r++) {
      nn_v_store(c + r * c_row + j, sum[r][0]);
      nn_v_store(c + r * c_row + j + NN_LANES, sum[r][1]);
    }
  }
  for (; j < columns; j += NN_LANES) {
    nn_vec sum[PANEL];
    for (int r = 0; r < PANEL; r++) sum[r] = add ? nn_v_load(c + r * c_row + j) : nn_v_set(0.0f);
    const float *left = a, *right = b + j;
    for (int64_t i = 0; i < k; i++, left += a_step, right += b_row) {
      nn_vec b0 = nn_v_load(right);
#pragma GCC unroll 8
      for (int r = 0; r < PANEL; r++) sum[r] = nn_v_fma(nn_v_set(left[r * a_row]), b0, sum[r]);
    }
    for (int r = 0; r < PANEL; r++) nn_v_store(c + r * c_row + j, sum[r]);
  }
}

/* The two shapes of it, so that the strides that are known are constants. */
static void multiply_rows(float *c, int64_t c_row, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t columns,
                          int64_t k, int add) {
  multiply_panel(c, c_row, a, a_row, 1, b, b_row, columns, k, add);
}
static void multiply_transposed(float *c, int64_t c_row, const float *a, int64_t a_step, const float *b, int64_t b_row,
                                int64_t columns, int64_t k) {
  multiply_panel(c, c_row, a, 1, a_step, b, b_row, columns, k, 1);
}

/* c[j] += sum over i < k of a[i * a_step] * b[i * width + j], for j < width, a multiple of NN_LANES: a row's last terms. */
static void multiply_row(float *c, const float *a, int64_t a_step, const float *b, int64_t width, int64_t k) {
  for (int64_t j = 0; j < width && k > 0; j += NN_LANES) {
    nn_vec sum = nn_v_load(c + j);
    for (int64_t i = 0; i < k; i++) sum = nn_v_fma(nn_v_set(a[i * a_step]), nn_v_load(b + i * width + j), sum);
    nn_v_store(c + j, sum);
  }
}

/* y[d, j] = x[j, d] for j < count, zeros for count <= j < y_row. */
static void pack_transposed(float *y, int64_t y_row, const float *x, int64_t x_row, int64_t count, int64_t D) {
  int64_t j = 0;
#if defined(__SSE2__)
  for (; j + 4 <= count; j += 4) {
    const float *r0 = x + j * x_row, *r1 = r0 + x_row, *r2 = r1 + x_row, *r3 = r2 + x_row;
    int64_t d = 0;
    for (; d + 4 <= D; d += 4) {
      __m128 a = _mm_loadu_ps(r0 + d), b = _mm_loadu_ps(r1 + d), c = _mm_loadu_ps(r2 + d), e = _mm_loadu_ps(r3 + d);
      _MM_TRANSPOSE4_PS(a, b, c, e);
      _mm_storeu_ps(y + d * y_row + j, a);
      _mm_storeu_ps(y + (d + 1) * y_row + j, b);
      _mm_storeu_ps(y + (d + 2) * y_row + j, c);
      _mm_storeu_ps(y + (d + 3) * y_row + j, e);
    }
    for (; d < D; d++)
      for (int r = 0; r < 4; r++) y[d * y_row + j + r] = x[(j + r) * x_row + d];
  }
#endif
  for (; j < count; j++)
    for (int64_t d = 0; d < D; d++) y[d * y_row + j] = x[j * x_row + d];
  for (int64_t d = 0; d < D && count < y_row; d++)
    memset(y + d * y_row + count, 0, (size_t)(y_row - count) * sizeof(float));
}

/* y[j, d] = x[j, d] * factor, zeros for d >= D and for rows past count. */
static void pack_row(float *y, int64_t width, const float *x, int64_t D, float factor) {
  for (int64_t d = 0; d < D; d++) y[d] = x[d] * factor;
  for (int64_t d = D; d < width; d++) y[d] = 0.0f;
}

/* Turns one row of scores into exp(score - top), zeros from `visible` to `columns`; returns their sum. */
NN_INLINE float exponentials(float *s, int64_t visible, int64_t columns, float top) {
  nn_vec sum = nn_v_set(0.0f), bound = nn_v_set(top);
  int64_t j = 0;
  for (; j + NN_LANES <= visible; j += NN_LANES) {
    nn_vec e = nn_v_exp(nn_v_load(s + j) - bound);
    sum = sum + e;
    nn_v_store(s + j, e);
  }
  if (j < visible) { /* scores are padded to whole vectors */
    nn_vec e = nn_v_keep(nn_v_exp(nn_v_load(s + j) - bound), visible - j, nn_v_set(0.0f));
    sum = sum + e;
    nn_v_store(s + j, e);
    j += NN_LANES;
  }
  for (; j < columns; j += NN_LANES) nn_v_store(s + j, nn_v_set(0.0f));
  return nn_v_sum(sum);
}

void NN_SIMD(nn_attention_forward_tile)(const nn_attention_group *g, int64_t first, int64_t count, float *scratch) {
  const int64_t keys = NN_ATTENTION_FORWARD_KEYS, D = g->D, width = round_up(D, NN_LANES);
  const int64_t rows = count * g->heads, padded = round_up(rows, PANEL);
  float *q = scratch, *o = q + padded * width, *top = o + padded * width, *total = top + padded;
  float *k = total + padded, *v = k + D * keys, *s = v + keys * width;
  for (int64_t m = 0; m < rows; m++)
    pack_row(q + m * width, width, g->q + (first + m / g->heads) * g->q_stride + m % g->heads * D, D, g->scale);
  memset(q + rows * width, 0, (size_t)((padded - rows) * width) * sizeof(float));
  for (int64_t m = 0; m < padded; m++) top[m] = -INFINITY, total[m] = 0.0f;
  memset(o, 0, (size_t)(padded * width) * sizeof(float));

  const int64_t key_count = g->first_position + first + count; /* that the last query sees */
  for (int64_t k0 = 0; k0 < key_count; k0 += keys) {
    const int64_t here = nn_min64(keys, key_count - k0);
    pack_transposed(k, keys, g->k + k0 * g->k_stride, g->k_stride, here, D);
    for (int64_t j = 0; j < here; j++) pack_row(v + j * width, width, g->v + (k0 + j) * g->v_stride, D, 1.0f);
    for (int64_t m0 = 0; m0 < padded; m0 += PANEL) {
      /* Row m sees the keys k0 + j with j < first_position + query(m) + 1 - k0. */
      const int64_t seen = g->first_position + first + 1 - k0, last = nn_min64(m0 + PANEL, rows) - 1;
      const int64_t columns = nn_min64(here, seen + last / g->heads), whole = round_up(columns, NN_LANES);
      if (columns <= 0) continue;
      multiply_rows(s, keys, q + m0 * width, width, k, keys, whole, D, 0);
      const int64_t common = nn_max64(0, nn_min64(columns, seen + m0 / g->heads)); /* that all rows see */
      float lane[16] = {0}; /* the change of each row's maximum, and a multiple of every NN_LANES long */
      for (int64_t r = 0; r < PANEL; r++) {
        int64_t visible = nn_min64(columns, seen + nn_min64(m0 + r, last) / g->heads), m = m0 + r;
        if (visible < 0) visible = 0;
        float before = top[m];
        if (visible > 0) top[m] = nn_v_largest_of(s + r * keys, visible, before);
        lane[r] = before == top[m] ? 0.0f : before - top[m];
      }
      for (int i = 0; i < 16; i += NN_LANES) nn_v_store(lane + i, nn_v_exp(nn_v_load(lane + i)));
      for (int64_t r = 0; r < PANEL; r++) {
        int64_t visible = nn_min64(columns, seen + nn_min64(m0 + r, last) / g->heads), m = m0 + r;
        total[m] = total[m] * lane[r] + exponentials(s + r * keys, visible < 0 ? 0 : visible, whole, top[m]);
        if (lane[r] == 1.0f) continue;
        for (int64_t d = 0; d < width; d += NN_LANES)
          nn_v_store(o + m * width + d, nn_v_load(o + m * width + d) * nn_v_set(lane[r]));
      }
      multiply_rows(o + m0 * width, width, s, keys, v, width, width, common, 1);
      for (int64_t m = m0; m <= last; m++)
        multiply_row(o + m * width, s + (m - m0) * keys + common, 1, v + common * width, width,
                     nn_min64(columns, seen + m / g->heads) - common);
    }
  }
  for (int64_t m = 0; m < rows; m++) {
    int64_t i = first + m / g->heads, head = m % g->heads;
    float *out = g->out + i * g->out_stride + head * D, inverse = 1.0f / total[m];
    for (int64_t d = 0; d < D; d++) out[d] = o[m * width + d] * inverse;
    if (g->log_sum_exp != NULL) g->log_sum_exp[head * g->log_sum_exp_stride + i] = top[m] + (float)log((double)total[m]);
  }
}

void NN_SIMD(nn_attention_backward_tiles)(const nn_attention_group *g, int64_t key_tile_begin, int64_t key_tile_end,
                                          int64_t query_tile_begin, int64_t query_tile_end, int want_keys, int want_queries,
                                          float *scratch) {
  const int64_t keys = NN_ATTENTION_BACKWARD_KEYS, D = g->D, width = round_up(D, NN_LANES);
  const int64_t tile = nn_attention_backward_queries(g->heads), most = round_up(tile * g->heads, PANEL);
  float *k = scratch, *k_across = k + keys * width, *v_across = k_across + D * keys, *dk = v_across + D * keys;
  float *dv = dk + keys * width, *q = dv + keys * width, *dout = q + most * width, *p = dout + most * width;
  float *ds = p + most * keys, *lse = ds + most * keys, *delta = lse + most, *dq = delta + most;

  for (int64_t key_tile = key_tile_begin; key_tile < key_tile_end; key_tile++) {
    const int64_t k0 = key_tile * keys, here = nn_min64(keys, g->queries - k0);
    for (int64_t j = 0; j < here; j++) pack_row(k + j * width, width, g->k + (k0 + j) * g->k_stride, D, 1.0f);
    pack_transposed(k_across, keys, g->k + k0 * g->k_stride, g->k_stride, here, D);
    pack_transposed(v_across, keys, g->v + k0 * g->v_stride, g->v_stride, here, D);
    memset(dk, 0, (size_t)(2 * keys * width) * sizeof(float)); /* and dv, which follows */

    for (int64_t query_tile = query_tile_begin; query_tile < query_tile_end; query_tile++) {
      const int64_t first = query_tile * tile, count = nn_min64(tile, g->queries - first);
      const int64_t rows = count * g->heads, padded = round_up(rows, PANEL);
      if (first + count <= k0) continue; /* these queries see none of the keys */
      for (int64_t m = 0; m < padded; m++) {
        if (m >= rows) {
          memset(q + m * width, 0, (size_t)width * sizeof(float));
          memset(dout + m * width, 0, (size_t)width * sizeof(float));
          lse[m] = delta[m] = 0.0f;
          continue;
        }
        int64_t i = first + m / g->heads, head = m % g->heads;
        const float *gradient = g->dout + i * g->out_stride + head * D, *value = g->forward_out + i * g->out_stride + head * D;
        pack_row(q + m * width, width, g->q + i * g->q_stride + head * D, D, g->scale);
        pack_row(dout + m * width, width, gradient, D, 1.0f);
        lse[m] = g->saved_log_sum_exp[head * g->log_sum_exp_stride + i];
        nn_vec sum = nn_v_set(0.0f);
        for (int64_t d = 0; d < D; d += NN_LANES) sum = nn_v_fma(nn_v_get(gradient + d, D - d), nn_v_get(value + d, D - d), sum);
        delta[m] = nn_v_sum(sum);
      }

      for (int64_t m0 = 0; m0 < padded; m0 += PANEL) {
        const int64_t seen = first + 1 - k0, last = nn_min64(m0 + PANEL, rows) - 1;
        const int64_t columns = nn_min64(here, seen + last / g->heads);
        const int64_t whole = columns <= 0 ? 0 : round_up(columns, NN_LANES);
        if (columns > 0) {
          multiply_rows(p + m0 * keys, keys, q + m0 * width, width, k_across, keys, whole, D, 0);
          multiply_rows(ds + m0 * keys, keys, dout + m0 * width, width, v_across, keys, whole, D, 0);
        }
        for (int64_t m = m0; m < m0 + PANEL; m++) {
          int64_t visible = m < rows ? nn_min64(columns, seen + m / g->heads) : 0;
          float *pm = p + m * keys, *dsm = ds + m * keys;
          nn_vec bound = nn_v_set(lse[m]), mean = nn_v_set(delta[m]), zero = nn_v_set(0.0f);
          int64_t j = 0;
          for (; j < visible; j += NN_LANES) {
            nn_vec e = nn_v_exp(nn_v_load(pm + j) - bound);
            if (visible - j < NN_LANES) e = nn_v_keep(e, visible - j, zero);
            nn_vec x = e * (nn_v_load(dsm + j) - mean);
            if (visible - j < NN_LANES) x = nn_v_keep(x, visible - j, zero);
            nn_v_store(pm + j, e);
            nn_v_store(dsm + j, x);
          }
          for (; j < keys; j += NN_LANES) {
            nn_v_store(pm + j, zero);
            nn_v_store(dsm + j, zero);
          }
        }
        if (!want_queries) continue;
        const int64_t common = nn_max64(0, nn_min64(columns, seen + m0 / g->heads)); /* that all rows see */
        if (columns > 0) multiply_rows(dq, width, ds + m0 * keys, keys, k, width, width, common, 0);
        for (int64_t m = m0; m <= last; m++)
          multiply_row(dq + (m - m0) * width, ds + m * keys + common, 1, k + common * width, width,
                       nn_min64(columns, seen + m / g->heads) - common);
        for (int64_t m = m0; m < m0 + PANEL && m < rows && columns > 0; m++) {
          float *to = g->dq + (first + m / g->heads) * g->q_stride + m % g->heads * D;
          const float *from = dq + (m - m0) * width;
          if (k0 == 0)
            for (int64_t d = 0; d < D; d++) to[d] = from[d] * g->scale;
          else
            for (int64_t d = 0; d < D; d++) to[d] = to[d] + from[d] * g->scale;
        }
      }
      if (!want_keys) continue;
      for (int64_t j = 0; j < here; j += PANEL) {
        /* Key k0 + j is seen from query k0 + j on, the whole panel of keys from row `all` on. */
        const int64_t all = nn_min64(padded, nn_max64(0, k0 + j + PANEL - 1 - first) * g->heads);
        for (int64_t r = j; r < j + PANEL - 1; r++) {
          const int64_t from = nn_min64(all, nn_max64(0, k0 + r - first) * g->heads);
          multiply_row(dv + r * width, p + from * keys + r, keys, dout + from * width, width, all - from);
          multiply_row(dk + r * width, ds + from * keys + r, keys, q + from * width, width, all - from);
        }
        multiply_transposed(dv + j * width, width, p + all * keys + j, keys, dout + all * width, width, width, padded - all);
        multiply_transposed(dk + j * width, width, ds + all * keys + j, keys, q + all * width, width, width, padded - all);
      }
    }
    for (int64_t j = 0; j < here && want_keys; j++) {
      memcpy(g->dk + (k0 + j) * g->k_stride, dk + j * width, (size_t)D * sizeof(float));
      memcpy(g->dv + (k0 + j) * g->v_stride, dv + j * width, (size_t)D * sizeof(float));
    }
  }
}

void NN_SIMD(nn_attention_score_row)(float *score, const float *q, const float *k, int64_t k_stride, int64_t n, int64_t D,
                                     float scale) {
  for (int64_t j = 0; j < n; j++) {
    nn_vec sum = nn_v_set(0.0f);
    for (int64_t d = 0; d < D; d += NN_LANES) sum = nn_v_fma(nn_v_get(q + d, D - d), nn_v_get(k + j * k_stride + d, D - d), sum);
    score[j] = nn_v_sum(sum) * scale;
  }
}

void NN_SIMD(nn_attention_output_row)(float *out, const float *probability, const float *v, int64_t v_stride, int64_t n,
                                      int64_t D) {
  for (int64_t d = 0; d < D; d += NN_LANES) {
    nn_vec sum = nn_v_set(0.0f);
    for (int64_t j = 0; j < n; j++) sum = nn_v_fma(nn_v_set(probability[j]), nn_v_get(v + j * v_stride + d, D - d), sum);
    nn_v_put(out + d, sum, D - d);
  }
}
