/* attention.c: the attention kernels of nn.h, for the CPU: in tiles, over a cache, and the plain way in two steps.
 *
 * Owns the checks and who does which tile; the tiles are attention.simd.c. Forward: a task is a query tile of the heads that share
 * a key/value head. Backward: where there are enough (sequence, key/value head) pairs for the threads, a task is one of them and
 * makes dq, dk and dv in one pass; else key tiles make dk and dv, then query tiles make dq. Either way an element is summed in the
 * same order (over rising tiles), so that the number of threads changes no bit.
 */
#include "vector_kernels.h"

#define WIDEST 16 /* floats of the widest vector */

static int64_t padded_to(int64_t n, int64_t unit) { return nn_ceil_div(n, unit) * unit; }

int64_t nn_attention_forward_queries(int64_t heads) { return nn_max64(1, 2 * NN_ATTENTION_QUERY_ROWS / heads); }
int64_t nn_attention_backward_queries(int64_t heads) { return nn_max64(1, NN_ATTENTION_QUERY_ROWS / heads); }

int64_t nn_attention_forward_scratch(int64_t heads, int64_t D) {
  const int64_t rows = padded_to(nn_attention_forward_queries(heads) * heads, 8), width = padded_to(D, WIDEST);
  const int64_t keys = NN_ATTENTION_FORWARD_KEYS;
  return rows * (2 * width + 2) + keys * (D + width) + 8 * keys;
}

int64_t nn_attention_backward_scratch(int64_t heads, int64_t D) {
  const int64_t rows = padded_to(nn_attention_backward_queries(heads) * heads, 8), width = padded_to(D, WIDEST);
  const int64_t keys = NN_ATTENTION_BACKWARD_KEYS;
  return keys * (3 * width + 2 * D) + rows * (2 * width + 2 * keys + 2) + 8 * width;
}

#define REQUIRE_SHAPE(context)                                                                                          \
  do {                                                                                                                  \
    NN_REQUIRE(context, B >= 0 && S >= 0 && Q >= 0 && G >= 0 && D >= 0);                                                \
    NN_REQUIRE(context, Q == 0 || (G > 0 && Q % G == 0));                                                               \
    NN_REQUIRE_F32(context, dtype);                                                                                     \
  } while (0)

#define REQUIRE_SCRATCH(context, floats)                                                                                \
  do {                                                                                                                  \
    if ((floats) * (int64_t)sizeof(float) > NN_THREAD_SCRATCH_BYTES)                                                    \
      return nn_fail(context, NN_ERROR_UNSUPPORTED, "%s: %lld heads of %lld to a key/value head are too many", __func__, \
                     (long long)(Q / G), (long long)D);                                                                 \
  } while (0)

static float scale_of(int64_t D) { return D > 0 ? 1.0f / __builtin_sqrtf((float)D) : 0.0f; }

/* The group of key/value head g of sequence b, over the rows of qkv. */
static nn_attention_group group_of(const float *qkv, int64_t b, int64_t g, int64_t S, int64_t Q, int64_t G, int64_t D) {
  const int64_t width = (Q + 2 * G) * D, heads = Q / G;
  const float *first = qkv + b * S * width;
  nn_attention_group group = {
      .q = first + g * heads * D,
      .k = first + (Q + g) * D,
      .v = first + (Q + G + g) * D,
      .q_stride = width,
      .k_stride = width,
      .v_stride = width,
      .out_stride = Q * D,
      .heads = heads,
      .D = D,
      .queries = S,
      .first_position = 0,
      .scale = scale_of(D),
  };
  return group;
}

nn_status nn_flash_attention_forward(nn_context *context, void *out, float *log_sum_exp, const void *qkv, int64_t B, int64_t S,
                                     int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  REQUIRE_SHAPE(context);
  if (B == 0 || S == 0 || Q == 0) return NN_OK;
  const int64_t heads = Q / G, tile = nn_attention_forward_queries(heads), tiles = nn_ceil_div(S, tile);
  REQUIRE_SCRATCH(context, nn_attention_forward_scratch(heads, D));
  /* The last tiles see the most keys: they are begun first. */
#pragma omp parallel for num_threads(nn_team(context, B * S * S * Q, 2048)) schedule(dynamic)
  for (int64_t task = 0; task < B * G * tiles; task++) {
    const int64_t first = (tiles - 1 - task / (B * G)) * tile, b = task % (B * G) / G, g = task % G;
    nn_attention_group group = group_of(qkv, b, g, S, Q, G, D);
    group.out = (float *)out + b * S * Q * D + g * heads * D;
    group.log_sum_exp = log_sum_exp + (b * Q + g * heads) * S;
    group.log_sum_exp_stride = S;
    NN_DISPATCH(context, nn_attention_forward_tile)(&group, first, nn_min64(tile, S - first), nn_thread_scratch(context));
  }
  return NN_OK;
}

nn_status nn_flash_attention_backward(nn_context *context, void *dqkv, const void *dout, const void *out, const float *log_sum_exp,
                                      const void *qkv, int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  REQUIRE_SHAPE(context);
  if (B == 0 || S == 0) return NN_OK;
  if (Q == 0) { /* keys and values that no query reads */
    memset(dqkv, 0, (size_t)(B * S * 2 * G * D) * sizeof(float));
    return NN_OK;
  }
  const int64_t heads = Q / G, tile = nn_attention_backward_queries(heads), query_tiles = nn_ceil_div(S, tile);
  const int64_t key_tiles = nn_ceil_div(S, NN_ATTENTION_BACKWARD_KEYS), width = (Q + 2 * G) * D, pairs = B * G;
  REQUIRE_SCRATCH(context, nn_attention_backward_scratch(heads, D));
  const int team = nn_team(context, B * S * S * Q, 1024);
  const int whole = pairs % team == 0 || pairs >= 4 * team; /* else the threads would wait for the last */
  const int64_t key_tasks = whole ? pairs : pairs * key_tiles, query_tasks = whole ? 0 : pairs * query_tiles;
#pragma omp parallel for num_threads(team) schedule(dynamic)
  for (int64_t task = 0; task < key_tasks + query_tasks; task++) {
    const int64_t b = task % pairs / G, g = task % G, piece = task / pairs;
    nn_attention_group group = group_of(qkv, b, g, S, Q, G, D);
    float *first = (float *)dqkv + b * S * width;
    group.dq = first + g * heads * D;
    group.dk = first + (Q + g) * D;
    group.dv = first + (Q + G + g) * D;
    group.dout = (const float *)dout + b * S * Q * D + g * heads * D;
    group.forward_out = (const float *)out + b * S * Q * D + g * heads * D;
    group.saved_log_sum_exp = log_sum_exp + (b * Q + g * heads) * S;
    group.log_sum_exp_stride = S;
    if (whole) {
      NN_DISPATCH(context, nn_attention_backward_tiles)(&group, 0, key_tiles, 0, query_tiles, 1, 1, nn_thread_scratch(context));
    } else if (task < key_tasks) {
      NN_DISPATCH(context, nn_attention_backward_tiles)(&group, piece, piece + 1, 0, query_tiles, 1, 0, nn_thread_scratch(context));
    } else {
      const int64_t query_tile = piece - key_tiles;
      NN_DISPATCH(context, nn_attention_backward_tiles)(&group, 0, key_tiles, query_tile, query_tile + 1, 0, 1,
                                                        nn_thread_scratch(context));
    }
  }
  return NN_OK;
}

/* Whether positions start[b] .. start[b] + S - 1 lie in the cache, for every sequence. */
static int fits(const int32_t *start, int64_t B, int64_t S, int64_t C) {
  for (int64_t b = 0; b < B; b++)
    if (start[b] < 0 || start[b] + S > C) return 0;
  return 1;
}

nn_status nn_cache_append(nn_context *context, void *key_cache, void *value_cache, const void *qkv, const int32_t *start, int64_t B,
                          int64_t S, int64_t C, int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  REQUIRE_SHAPE(context);
  if (B == 0 || S == 0) return NN_OK;
  NN_REQUIRE(context, fits(start, B, S, C));
  const int64_t row = G * D;
#pragma omp parallel for num_threads(nn_team(context, B * S * row, NN_GRAIN)) schedule(static)
  for (int64_t t = 0; t < B * S; t++) {
    const float *from = (const float *)qkv + t * (Q + 2 * G) * D + Q * D;
    const int64_t to = (t / S * C + start[t / S] + t % S) * row;
    memcpy((float *)key_cache + to, from, (size_t)row * sizeof(float));
    memcpy((float *)value_cache + to, from + row, (size_t)row * sizeof(float));
  }
  return NN_OK;
}

nn_status nn_attention_cached(nn_context *context, void *out, const void *qkv, const void *key_cache, const void *value_cache,
                              const int32_t *start, int64_t B, int64_t S, int64_t C, int64_t Q, int64_t G, int64_t D,
                              nn_dtype dtype) {
  REQUIRE_SHAPE(context);
  if (B == 0 || S == 0 || Q == 0) return NN_OK;
  NN_REQUIRE(context, fits(start, B, S, C));
  const int64_t heads = Q / G, tile = nn_attention_forward_queries(heads), tiles = nn_ceil_div(S, tile);
  REQUIRE_SCRATCH(context, nn_attention_forward_scratch(heads, D));
#pragma omp parallel for num_threads(nn_team(context, B * S * C * Q, 4096)) schedule(dynamic)
  for (int64_t task = 0; task < B * G * tiles; task++) {
    const int64_t first = (tiles - 1 - task / (B * G)) * tile, b = task % (B * G) / G, g = task % G;
    nn_attention_group group = group_of(qkv, b, g, S, Q, G, D);
    group.k = (const float *)key_cache + (b * C * G + g) * D;
    group.v = (const float *)value_cache + (b * C * G + g) * D;
    group.k_stride = group.v_stride = G * D;
    group.first_position = start[b];
    group.out = (float *)out + b * S * Q * D + g * heads * D;
    NN_DISPATCH(context, nn_attention_forward_tile)(&group, first, nn_min64(tile, S - first), nn_thread_scratch(context));
  }
  return NN_OK;
}

nn_status nn_attention_scores(nn_context *context, float *score, const void *qkv, int64_t B, int64_t S, int64_t Q, int64_t G,
                              int64_t D, nn_dtype dtype) {
  REQUIRE_SHAPE(context);
  if (Q == 0) return NN_OK;
  const int64_t width = (Q + 2 * G) * D, heads = Q / G;
#pragma omp parallel for num_threads(nn_team(context, B * Q * S * S, 2048)) schedule(static)
  for (int64_t row = 0; row < B * Q * S; row++) {
    const int64_t i = row % S, head = row / S % Q, b = row / S / Q;
    const float *first = (const float *)qkv + b * S * width;
    NN_DISPATCH(context, nn_attention_score_row)(score + row * S, first + i * width + head * D, first + (Q + head / heads) * D,
                                                 width, i + 1, D, scale_of(D));
    for (int64_t j = i + 1; j < S; j++) score[row * S + j] = -__builtin_inff();
  }
  return NN_OK;
}

nn_status nn_attention_output(nn_context *context, void *out, const float *probability, const void *qkv, int64_t B, int64_t S,
                              int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  REQUIRE_SHAPE(context);
  if (Q == 0) return NN_OK;
  const int64_t width = (Q + 2 * G) * D, heads = Q / G;
#pragma omp parallel for num_threads(nn_team(context, B * Q * S * S, 2048)) schedule(static)
  for (int64_t row = 0; row < B * Q * S; row++) {
    const int64_t i = row % S, head = row / S % Q, b = row / S / Q;
    const float *v = (const float *)qkv + b * S * width + (Q + G + head / heads) * D;
    NN_DISPATCH(context, nn_attention_output_row)((float *)out + ((b * S + i) * Q + head) * D, probability + row * S, v, width,
                                                  i + 1, D);
  }
  return NN_OK;
}
