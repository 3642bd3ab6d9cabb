/* gemm.simd.c: the blocked matrix product, once for each instruction set (see gemm.h for what it promises).
 *
 * Owns tiles, packing and the schedule. Knows operands and epilogues only through gemm.h. The shape of it, after Goto and van
 * de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), and BLIS:
 *
 *   task              rows x NN_COLUMN_BLOCK columns of one product, done by one thread
 *     k block         K_BLOCK deep: B packed to panels of NR columns in the thread's scratch
 *       row block     ROW_BLOCK rows: A packed to panels of MR rows
 *         micro tile  MR x NR sums in registers over the k block
 *
 *   packed A, panel i:  [k][MR]   row panel  i*MR ..      packed B, panel j:  [k][NR]   column panel j*NR ..
 *
 * Between k blocks the sums rest in the scratch and go on from there, so that the block size leaves no mark on the bits.
 *
 * Memory beyond the second cache is hidden by hand: strides and gathers defeat the hardware's prefetching, so each micro tile
 * fetches, one line at each step of k, what its own epilogue will touch and a share of what the thread will pack next.
 * build: -ffp-contract=off */
#include "gemm.h"
#include "simd.h"

#if defined(NN_BUILD_AVX512)
#define MR 14
#define ROW_BLOCK 280
#define TASK_ROWS_DEEP 1120
#elif defined(NN_BUILD_AVX2)
#define MR 6
#define ROW_BLOCK 240
#define TASK_ROWS_DEEP 960
#else
#define MR 4
#define ROW_BLOCK 240
#define TASK_ROWS_DEEP 960
#endif
#define NR (2 * NN_LANES)
_Static_assert(MR <= NN_TILE_ROWS && TASK_ROWS_DEEP % MR == 0 && ROW_BLOCK % MR == 0, "rows come in whole panels");
/* Steps of k for each turn of the micro kernel's loop: its counting takes ports away from the multiply-adds. */
#define UNROLL 2
#define FLOATS_PER_LINE 16
#define MAX_PANELS (NN_COLUMN_BLOCK / NR)
/* A task has ROW_BLOCK rows at most, if its product is done in one k block and the packed B can wait for the next task; if not,
 * TASK_ROWS_DEEP, so that B need not be packed as often. */
/* A product not deeper than this is done in one k block; a deeper one in equal blocks of at most K_BLOCK_DEEP. */
#define K_BLOCK 512
#define K_BLOCK_DEEP 256
/* Floats from one packed panel to the next: one cache line more than it needs, so that panels do not meet in one cache set
 * and the last vector of a panel may be stored whole. */
#define A_PANEL(depth) ((depth)*MR + 16)
#define B_PANEL(depth) ((depth)*NR + 16)

/* Lines of memory that are wanted soon: `rows` rows in memory of an operand, `columns` floats of each. */
typedef struct region {
  const nn_operand *operand;
  int64_t row, end_row, column, end_column; /* in memory */
  int64_t next_column;
} region;

typedef struct scratch {
  const void *fetch[K_BLOCK];
  region wanted[3];
  int64_t wanted_each; /* lines of `wanted` for each micro tile */
  int64_t packed_product, packed_block; /* what `b` holds, when that is a whole product's depth */
  _Alignas(64) float tile[MR * NR];
  _Alignas(64) float row_state[TASK_ROWS_DEEP * NN_LANES];
  _Alignas(64) float partial[TASK_ROWS_DEEP / MR * MAX_PANELS * MR * NR];
  _Alignas(64) float a[ROW_BLOCK / MR * A_PANEL(K_BLOCK)];
  _Alignas(64) float b[MAX_PANELS * B_PANEL(K_BLOCK)];
} scratch;
_Static_assert(sizeof(scratch) <= NN_THREAD_SCRATCH_BYTES, "the scratch of a thread holds the engine's buffers");

/* ---- micro kernels -------------------------------------------------------------------------------------------------- */

/* sum[i][v] += a[i] * b[v], one step of k. */
NN_INLINE void micro_step(const int rows, const int vectors, nn_vec sum[MR][2], const float *a, const float *b) {
  nn_vec column[2];
#pragma GCC unroll 2
  for (int v = 0; v < vectors; v++) column[v] = nn_v_load(b + v * NN_LANES);
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    nn_vec element = nn_v_set(a[i]);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) sum[i][v] = nn_v_fma(element, column[v], sum[i][v]);
  }
}

/* rows (1 .. MR) x vectors (1 .. 2) sums over `depth`, both constants at each call, so that the sums live in registers. On its
 * way it prefetches `fetches` (at most depth) lines. Without `add` the sums are added to 0: -0 is stored as 0, to the bits that adding
 * to zeros in memory gives. */
NN_INLINE void micro(const int rows, const int vectors, int64_t depth, const float *restrict a, const float *restrict b,
                     const void *const *fetch, int64_t fetches, const float *initial, int64_t initial_stride, float *out,
                     int64_t out_stride, int add) {
  nn_vec sum[MR][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
      sum[i][v] = initial != NULL ? nn_v_load(initial + i * initial_stride + v * NN_LANES) : (nn_vec){0};
  int64_t p = 0;
  for (; p < fetches; p++, a += MR, b += NR) {
    __builtin_prefetch(fetch[p]);
    micro_step(rows, vectors, sum, a, b);
  }
  for (; p + UNROLL <= depth; p += UNROLL) {
#pragma GCC unroll 2
    for (int q = 0; q < UNROLL; q++) micro_step(rows, vectors, sum, a + q * MR, b + q * NR);
    a += UNROLL * MR;
    b += UNROLL * NR;
  }
  for (; p < depth; p++, a += MR, b += NR) micro_step(rows, vectors, sum, a, b);
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
      float *to = out + i * out_stride + v * NN_LANES;
      nn_v_store(to, (add ? nn_v_load(to) : (nn_vec){0}) + sum[i][v]);
    }
}

typedef void micro_kernel(int64_t depth, const float *a, const float *b, const void *const *fetch, int64_t fetches,
                          const float *initial, int64_t initial_stride, float *out, int64_t out_stride, int add);

#define MICRO(rows, vectors)                                                                                            \
  static void micro_##rows##_##vectors(int64_t depth, const float *a, const float *b, const void *const *fetch,         \
                                       int64_t fetches, const float *initial, int64_t initial_stride, float *out,       \
                                       int64_t out_stride, int add) {                                                   \
    micro(rows, vectors, depth, a, b, fetch, fetches, initial, initial_stride, out, out_stride, add);                   \
  }
#define MICROS(rows) MICRO(rows, 1) MICRO(rows, 2)
MICROS(1) MICROS(2) MICROS(3) MICROS(4)
#if MR > 4
MICROS(5) MICROS(6)
#endif
#if MR > 6
MICROS(7) MICROS(8) MICROS(9) MICROS(10) MICROS(11) MICROS(12) MICROS(13) MICROS(14)
#endif

#define ENTRY(rows) {micro_##rows##_1, micro_##rows##_2}
static micro_kernel *const micro_kernels[MR][2] = {
    ENTRY(1), ENTRY(2), ENTRY(3), ENTRY(4),
#if MR > 4
    ENTRY(5), ENTRY(6),
#endif
#if MR > 6
    ENTRY(7), ENTRY(8), ENTRY(9), ENTRY(10), ENTRY(11), ENTRY(12), ENTRY(13), ENTRY(14),
#endif
};

/* ---- packing -------------------------------------------------------------------------------------------------------- */

NN_INLINE const float *row_of(const nn_operand *x, int64_t row) {
  return x->data + (x->rows != NULL ? x->rows[row] : row) * x->stride;
}

/* Transposes NN_LANES vectors, vector i being row i: after it, vector i is column i. */
NN_INLINE void transpose(nn_vec r[NN_LANES]) {
#if defined(NN_BUILD_AVX512)
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps((__m512)r[2 * i], (__m512)r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) { /* u[4i+j]: lane l holds column 4l+j of rows 4i .. 4i+3 */
    u[4 * i] = (__m512)_mm512_unpacklo_pd((__m512d)t[4 * i], (__m512d)t[4 * i + 2]);
    u[4 * i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[4 * i], (__m512d)t[4 * i + 2]);
    u[4 * i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)t[4 * i + 1], (__m512d)t[4 * i + 3]);
    u[4 * i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)t[4 * i + 1], (__m512d)t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88), d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j] = (nn_vec)_mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + j] = (nn_vec)_mm512_shuffle_f32x4(b, d, 0x88);
    r[8 + j] = (nn_vec)_mm512_shuffle_f32x4(a, c, 0xdd);
    r[12 + j] = (nn_vec)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
#elif defined(NN_BUILD_AVX2)
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    r[j] = (nn_vec)_mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j] = (nn_vec)_mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
#else
  for (int i = 0; i < NN_LANES; i++)
    for (int j = 0; j < i; j++) {
      float swap = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = swap;
    }
#endif
}

/* packed[p * packed_stride + i] = source[i][p] for p < depth and i < lanes, where lanes <= NN_LANES; a whole vector is stored
 * for each p, in rising p, the elements past `lanes` being of no meaning. Every source pointer must be valid. */
NN_INLINE void pack_across(float *packed, int64_t packed_stride, const float *const *source, const int lanes, int64_t depth) {
  int64_t p = 0;
  for (; p + NN_LANES <= depth; p += NN_LANES) {
    nn_vec r[NN_LANES];
#pragma GCC unroll 16
    for (int i = 0; i < NN_LANES; i++) r[i] = i < lanes ? nn_v_load(source[i] + p) : (nn_vec){0};
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < NN_LANES; i++) nn_v_store(packed + (p + i) * packed_stride, r[i]);
  }
  if (p < depth) {
    nn_vec r[NN_LANES];
    for (int i = 0; i < NN_LANES; i++) r[i] = i < lanes ? nn_v_load_part(source[i] + p, depth - p) : (nn_vec){0};
    transpose(r);
    for (int i = 0; i < depth - p; i++) nn_v_store(packed + (p + i) * packed_stride, r[i]);
  }
}

/* Rows row .. row+rows-1 of A, k from .. from+depth-1, to panels of MR rows. */
static void pack_a(float *packed, const nn_operand *a, int64_t row, int64_t rows, int64_t from, int64_t depth) {
  if (!a->transposed) {
    for (int64_t i = 0; i < rows; i += MR, packed += A_PANEL(depth)) {
      const float *source[NN_LANES > MR ? NN_LANES : MR];
      for (int64_t r = 0; r < MR; r++) source[r] = row_of(a, row + nn_min64(i + r, rows - 1)) + from;
#if MR <= NN_LANES
      pack_across(packed, MR, source, MR, depth);
#else
#error "a panel of A is one vector wide at most"
#endif
    }
    return;
  }
  for (int64_t p = 0; p < depth; p++) {
    const float *source = row_of(a, from + p) + row;
    const float scale = a->scale != NULL ? a->scale[from + p] : 1.0f;
    float *to = packed + p * MR;
    int64_t i = 0;
    for (; i + NN_LANES <= rows; i += MR, to += A_PANEL(depth)) nn_v_store(to, scale * nn_v_load(source + i));
    for (; i < rows; i += MR, to += A_PANEL(depth)) nn_v_store(to, scale * nn_v_load_part(source + i, rows - i));
  }
}

/* The first column in memory of vector v of a panel, and how many of its NN_LANES columns there are. */
NN_INLINE int64_t vector_start(const nn_product *product, int64_t panel, int v, int64_t *count) {
  int64_t half = product->b.interleave;
  int64_t in_half = half > 0 ? panel * NN_LANES : panel * NR + v * NN_LANES;
  *count = nn_max64(0, nn_min64(NN_LANES, (half > 0 ? half : product->n) - in_half));
  return half > 0 ? v * half + in_half : in_half;
}

/* Panels panel .. panel+panels-1 of B, k from .. from+depth-1. Columns that are not there become 0. */
static void pack_b(float *packed, const nn_product *product, int64_t panel, int64_t panels, int64_t from, int64_t depth) {
  const nn_operand *b = &product->b;
  int64_t start[2 * MAX_PANELS], count[2 * MAX_PANELS];
  for (int64_t j = 0; j < 2 * panels; j++) start[j] = vector_start(product, panel + j / 2, (int)(j % 2), &count[j]);
  if (b->transposed) {
    for (int64_t j = 0; j < 2 * panels; j++) {
      float *to = packed + j / 2 * B_PANEL(depth) + j % 2 * NN_LANES;
      const float *source[NN_LANES];
      if (count[j] == 0) continue; /* its sums are never looked at */
      for (int64_t i = 0; i < NN_LANES; i++) source[i] = row_of(b, start[j] + nn_min64(i, count[j] - 1)) + from;
      pack_across(to, NR, source, NN_LANES, depth);
    }
    return;
  }
  int64_t whole = 2 * panels;
  while (whole > 0 && count[whole - 1] < NN_LANES) whole--;
  if (b->interleave > 0 && whole < 2 * panels) whole = 0; /* the gates of the last panel are cut short too */
  for (int64_t p = 0; p < depth; p++) {
    const float *source = row_of(b, from + p);
    float *to = packed + p * NR;
    for (int64_t j = 0; j < 2 * panels; j++) {
      nn_vec values = j < whole ? nn_v_load(source + start[j]) : nn_v_load_part(source + start[j] * (count[j] > 0), count[j]);
      nn_v_store(to + j / 2 * B_PANEL(depth) + j % 2 * NN_LANES, values);
    }
  }
}

/* ---- fetching ahead -------------------------------------------------------------------------------------------------- */

/* The region that packing `first` .. first+count-1 (rows of A or columns of B) over k from .. from+depth-1 will read. */
static region region_of(const nn_operand *x, int is_b, int64_t first, int64_t count, int64_t from, int64_t depth) {
  int across = is_b ? !x->transposed : x->transposed; /* rows in memory go along k */
  region r = {.operand = x};
  r.row = across ? from : first;
  r.end_row = r.row + (across ? depth : count);
  r.column = r.next_column = across ? first : from;
  r.end_column = r.column + (across ? count : depth);
  return r;
}

static int64_t lines_of(const region *r) {
  return (r->end_row - r->row) * nn_ceil_div(r->end_column - r->column, FLOATS_PER_LINE);
}

/* Takes up to `most` lines off the region. */
static int64_t take_lines(region *r, const void **lines, int64_t most) {
  int64_t taken = 0;
  while (taken < most && r->row < r->end_row) {
    const float *row = row_of(r->operand, r->row);
    for (; taken < most && r->next_column < r->end_column; r->next_column += FLOATS_PER_LINE)
      lines[taken++] = row + r->next_column;
    if (r->next_column >= r->end_column) {
      r->row++;
      r->next_column = r->column;
    }
  }
  return taken;
}

static int64_t take_wanted(scratch *s, int64_t taken, int64_t depth) {
  int64_t most = nn_min64(depth, taken + s->wanted_each);
  for (int i = 0; i < 3; i++) taken += take_lines(&s->wanted[i], s->fetch + taken, most - taken);
  return taken;
}

/* ---- a task --------------------------------------------------------------------------------------------------------- */

/* Rows row .. row+rows-1 (at most TASK_ROWS_DEEP) of column block `block`, which is panels panel .. panel+panels-1. */
typedef struct task {
  nn_product product;
  int64_t index; /* the product's in its list: to know its packed B again */
  int64_t row, rows, block, panel, panels;
} task;

static int64_t depth_of_block(const nn_product *product) {
  return product->k <= K_BLOCK ? product->k : nn_ceil_div(product->k, nn_ceil_div(product->k, K_BLOCK_DEEP));
}

/* Asks for what the next packing will read: A from row `row` of the task and, unless B stays, B, both from `from` on; spread over
 * so many micro tiles. */
static void want(scratch *s, const task *t, int64_t row, int64_t from, int b_stays, int64_t micro_tiles) {
  const nn_product *product = &t->product;
  int64_t depth = nn_min64(depth_of_block(product), product->k - from), lines = 0;
  int64_t half = product->b.interleave, first = t->panel * (half > 0 ? NN_LANES : NR);
  int64_t columns = b_stays ? 0 : nn_min64(t->panels * (half > 0 ? NN_LANES : NR), (half > 0 ? half : product->n) - first);
  s->wanted[0] = region_of(&product->a, 0, t->row + row, nn_min64(ROW_BLOCK, t->rows - row), from, depth);
  s->wanted[1] = region_of(&product->b, 1, first, columns, from, depth);
  s->wanted[2] = region_of(&product->b, 1, half + first, half > 0 ? columns : 0, from, depth);
  for (int i = 0; i < 3; i++) lines += lines_of(&s->wanted[i]);
  s->wanted_each = nn_ceil_div(lines, micro_tiles);
}

/* One micro tile of the last k block: to C, or through the thread's tile to where it belongs. */
static void finish_tile(const task *t, scratch *s, const float *a, const float *b, int64_t depth, const float *initial,
                        int64_t initial_stride, int64_t row, int64_t rows, int64_t panel) {
  const nn_product *product = &t->product;
  int64_t columns = product->b.interleave > 0 ? NR : nn_min64(NR, product->n - panel * NR);
  int vectors = columns > NN_LANES ? 2 : 1;
  micro_kernel *kernel = micro_kernels[rows - 1][vectors - 1];
  float *c = product->c + row * product->c_stride + panel * NR;
  int64_t fetches = 0;
  if (product->fetch != NULL)
    fetches = product->fetch(product, row, rows, panel, s->fetch, depth);
  else
    for (int64_t i = 0; i < rows && fetches + 2 <= depth; i++) {
      s->fetch[fetches++] = c + i * product->c_stride;
      s->fetch[fetches++] = c + i * product->c_stride + columns - 1;
    }
  fetches = take_wanted(s, fetches, depth);
  if (product->finish == NULL && columns == vectors * NN_LANES && product->alpha == 1.0f &&
      (product->beta == 0.0f || product->beta == 1.0f)) {
    kernel(depth, a, b, s->fetch, fetches, initial, initial_stride, c, product->c_stride, product->beta != 0.0f);
    return;
  }
  kernel(depth, a, b, s->fetch, fetches, initial, initial_stride, s->tile, NR, 0);
  if (product->finish != NULL) {
    nn_tile tile = {s->tile, NR, row, rows, panel, s->row_state + (row - t->row) * NN_LANES};
    product->finish(product, &tile);
    return;
  }
  for (int64_t i = 0; i < rows; i++, c += product->c_stride)
    for (int64_t j = 0; j < columns; j += NN_LANES) {
      int64_t count = nn_min64(NN_LANES, columns - j);
      nn_vec value = product->alpha * nn_v_load(s->tile + i * NR + j);
      if (product->beta != 0.0f) value = nn_v_fma(nn_v_set(product->beta), nn_v_load_part(c + j, count), value);
      nn_v_store_part(c + j, value, count);
    }
}

/* Where the first sums of a micro tile start from: in product->initial itself, or, where whole vectors of that cannot be read
 * in place, in a copy at `tile`. */
static const float *initial_sums(const nn_product *product, float *tile, int64_t row, int64_t rows, int64_t panel,
                                 int64_t *stride) {
  const float *from = product->initial + row * product->initial_stride + panel * NR;
  int64_t columns = nn_min64(NR, product->n - panel * NR);
  *stride = product->initial_stride;
  if (columns == NR) return from;
  *stride = NR;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j += NN_LANES)
      nn_v_store(tile + i * NR + j, nn_v_load_part(from + i * product->initial_stride + j, nn_min64(NN_LANES, columns - j)));
  return tile;
}

/* Rows row .. row+rows-1 of the task, which are packed at s->a, times the packed B, over one k block. */
static void run_row_block(const task *t, scratch *s, int64_t row, int64_t rows, int64_t from, int64_t depth) {
  const nn_product *product = &t->product;
  int last = from + depth >= product->k;
  for (int64_t i = row; i < row + rows; i += MR) {
    const float *a = s->a + (i - row) / MR * A_PANEL(depth);
    int64_t tile_rows = nn_min64(MR, row + rows - i);
    for (int64_t j = 0; j < t->panels; j++) {
      const float *b = s->b + j * B_PANEL(depth);
      float *partial = s->partial + (i / MR * MAX_PANELS + j) * MR * NR;
      const float *initial = from > 0 ? partial : NULL;
      int64_t initial_stride = NR;
      if (from == 0 && product->initial != NULL)
        initial = initial_sums(product, partial, t->row + i, tile_rows, t->panel + j, &initial_stride);
      if (last)
        finish_tile(t, s, a, b, depth, initial, initial_stride, t->row + i, tile_rows, t->panel + j);
      else
        micro_kernels[tile_rows - 1][1](depth, a, b, s->fetch, take_wanted(s, 0, depth), initial, initial_stride, partial, NR, 0);
    }
  }
}

/* Does a task; `next` is what this thread does after it, if that is known. */
static void run_task(const task *t, const task *next, scratch *s) {
  const nn_product *product = &t->product;
  int64_t block_depth = depth_of_block(product);
  int deep = block_depth < product->k;
  if (product->finish_rows != NULL) memset(s->row_state, 0, (size_t)t->rows * NN_LANES * sizeof(float));
  int64_t from = 0;
  do { /* at least once: a product of depth 0 is all zeros */
    int64_t depth = nn_min64(block_depth, product->k - from);
    if (deep || s->packed_product != t->index || s->packed_block != t->block) {
      pack_b(s->b, product, t->panel, t->panels, from, depth);
      s->packed_product = deep ? -1 : t->index;
      s->packed_block = t->block;
    }
    for (int64_t row = 0; row < t->rows; row += ROW_BLOCK) {
      int64_t rows = nn_min64(ROW_BLOCK, t->rows - row), micro_tiles = nn_ceil_div(rows, MR) * t->panels;
      pack_a(s->a, &product->a, t->row + row, rows, from, depth);
      if (row + rows < t->rows) want(s, t, row + rows, from, 1, micro_tiles);
      else if (from + depth < product->k) want(s, t, 0, from + depth, 0, micro_tiles);
      else if (next != NULL) want(s, next, 0, 0, next->index == s->packed_product && next->block == t->block, micro_tiles);
      else s->wanted_each = 0;
      run_row_block(t, s, row, rows, from, depth);
    }
    from += depth;
  } while (from < product->k);
  if (product->finish_rows != NULL) product->finish_rows(product, t->row, t->rows, t->block, s->row_state);
}

/* ---- the schedule --------------------------------------------------------------------------------------------------- */

/* How a list is cut. Only speed depends on it. */
typedef struct cut {
  int64_t rows, panels; /* of a task, at most */
} cut;

static int64_t panel_count(const nn_product *product) {
  return product->b.interleave > 0 ? nn_ceil_div(product->b.interleave, NN_LANES) : nn_ceil_div(product->n, NR);
}

static int64_t row_tasks(const nn_product *product, cut by) { return nn_ceil_div(nn_ceil_div(product->m, MR), by.rows / MR); }

/* The first row of task `number` of row_tasks: whole panels, shared out evenly. */
static int64_t row_of_task(const nn_product *product, cut by, int64_t number) {
  return nn_min64(product->m, nn_ceil_div(product->m, MR) * number / row_tasks(product, by) * MR);
}

static int64_t task_count(const nn_product *product, cut by) {
  if (product->m <= 0 || product->n <= 0) return 0;
  return row_tasks(product, by) * nn_ceil_div(panel_count(product), by.panels);
}

static void describe(const nn_product_list *list, int64_t index, nn_product *product) {
  memset(product, 0, sizeof *product);
  product->alpha = 1.0f;
  list->describe(list->argument, index, product);
}

/* first[i] = tasks before product i (not for uniform lists), largest = the product with most rows. Returns all tasks. */
static int64_t count_tasks(const nn_product_list *list, cut by, int64_t *first, nn_product *largest) {
  if (list->uniform) {
    describe(list, 0, largest);
    return list->count * task_count(largest, by);
  }
  int64_t total = 0;
  for (int64_t i = 0; i < list->count; i++) {
    nn_product product;
    describe(list, i, &product);
    if (i == 0 || product.m > largest->m) *largest = product;
    first[i] = total;
    total += task_count(&product, by);
  }
  first[list->count] = total;
  return total;
}

/* Starts from the largest tasks and makes them smaller until every thread has enough: as many for each thread when the products
 * are alike, several when they are not, so that none waits long for the last. Tasks whose rows are finished over a whole column
 * block keep that block. */
static cut choose_cut(const nn_product_list *list, int threads, int64_t *first, int64_t *total) {
  nn_product product;
  cut by = {TASK_ROWS_DEEP, MAX_PANELS};
  count_tasks(list, by, first, &product);
  if (product.k <= K_BLOCK) by.rows = ROW_BLOCK;
  by.rows = nn_min64(by.rows, nn_ceil_div(nn_max64(product.m, 1), MR) * MR);
  by.panels = nn_min64(by.panels, nn_max64(panel_count(&product), 1));
  for (;;) {
    *total = count_tasks(list, by, first, &product);
    int rows_done = by.rows <= 4 * MR, columns_done = product.finish_rows != NULL || by.panels * NR <= 128;
    int enough = list->uniform ? *total % threads == 0 || *total >= 6 * threads : *total >= 6 * threads;
    if (threads == 1 || enough || (rows_done && columns_done)) return by;
    if (list->uniform && *total > threads && !rows_done) by.rows -= MR;
    else if (columns_done || (!rows_done && by.rows >= by.panels * NR)) by.rows = nn_ceil_div(by.rows / MR, 2) * MR;
    else by.panels = nn_ceil_div(by.panels, 2);
  }
}

/* Task number `number` of the list, of `total`. `t` holds another task of it or, with index -1, nothing. */
static void find_task(task *t, const nn_product_list *list, cut by, const int64_t *first, int64_t total, int64_t number) {
  int64_t index, begin;
  if (list->uniform) {
    index = number / (total / list->count);
    begin = index * (total / list->count);
  } else {
    int64_t low = 0, high = list->count; /* the last product whose first task is not after this one */
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      if (first[middle] <= number) low = middle;
      else high = middle;
    }
    index = low;
    begin = first[low];
  }
  if (t->index != index) describe(list, index, &t->product);
  int64_t row_number = (number - begin) % row_tasks(&t->product, by);
  t->index = index;
  t->row = row_of_task(&t->product, by, row_number);
  t->rows = row_of_task(&t->product, by, row_number + 1) - t->row;
  t->block = (number - begin) / row_tasks(&t->product, by);
  t->panel = t->block * by.panels;
  t->panels = nn_min64(by.panels, panel_count(&t->product) - t->panel);
}

void NN_SIMD(nn_run_products)(nn_context *context, const nn_product_list *list) {
  if (list->count <= 0) return;
  int64_t first[NN_MAX_PRODUCTS + 1], total, taken = 0;
  cut by = choose_cut(list, context->threads, first, &total);
  if (total == 0) return;
  int threads = nn_team(context, total, 1);
#pragma omp parallel num_threads(threads)
  {
    scratch *s = nn_thread_scratch(context);
    s->packed_product = -1;
    task tasks[2] = {{.index = -1}, {.index = -1}};
    int now = 0;
    for (;;) {
      /* A share of what is left, so that neighbouring tasks, which have their packed B in common, stay together. */
      int64_t number, end;
#pragma omp critical(nn_take_tasks)
      {
        number = taken;
        end = taken += nn_min64(total - taken, nn_max64(1, (total - taken) / (2 * threads)));
      }
      if (number == end) break;
      find_task(&tasks[now], list, by, first, total, number);
      for (; number < end; number++, now = !now) {
        if (number + 1 < end) find_task(&tasks[!now], list, by, first, total, number + 1);
        run_task(&tasks[now], number + 1 < end ? &tasks[!now] : NULL, s);
      }
    }
  }
}
