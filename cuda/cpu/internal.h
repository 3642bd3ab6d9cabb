/* internal.h: what the files of the CPU library share and nobody else sees.
 *
 * Owns the context, error texts, the workspace carve, the instruction set chosen at run time and the thread scratch. Knows no
 * kernel. Vector code includes simd.h, the matrix products are in gemm.h.
 *
 * How a kernel is built (cuda/build.mjs):
 *   name.c         compiled once for the baseline of the architecture.
 *   name.simd.c    compiled once for each instruction set (plain, avx2, avx512; elsewhere than on x86-64 only plain). Each
 *                  function in it that is not static has its name wrapped, NN_SIMD(nn_exp_row), and becomes
 *                  nn_exp_row_plain, nn_exp_row_avx2, nn_exp_row_avx512. NN_DECLARE_SIMD declares the three,
 *                  NN_DISPATCH(context, nn_exp_row)(y, x, n) calls the one for the context.
 *   A file with the comment "build: -ffp-contract=off" in it is compiled with that flag (and every simd copy of it is):
 *                  where bits must equal the GPU's, no multiply and add may melt together.
 */
#ifndef NN_INTERNAL_H
#define NN_INTERNAL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_procs(void) { return 1; }
#endif

#include "../include/nn.h"

/* In rising order: a context never has more than the CPU has, and CUDA_NN_ISA=plain|avx2|avx512 can ask for less. */
typedef enum nn_isa { NN_ISA_PLAIN = 0, NN_ISA_AVX2 = 1, NN_ISA_AVX512 = 2 } nn_isa;

#define NN_MAX_THREADS 256
#define NN_ERROR_TEXT_BYTES 512

/* Scratch of one thread inside a kernel: the gemm engine packs its panels here, attention may keep its tiles here. A kernel
 * that calls the gemm engine from inside a parallel region has lost it. */
#define NN_THREAD_SCRATCH_BYTES ((int64_t)4 << 20)

struct nn_context {
  int threads; /* 1 .. NN_MAX_THREADS */
  nn_isa isa;
  char *workspace;         /* lent by nn_set_workspace, 256-byte aligned or NULL */
  int64_t workspace_bytes; /* of it */
  char *scratch;           /* threads * NN_THREAD_SCRATCH_BYTES, 4096-byte aligned */
  char error[NN_ERROR_TEXT_BYTES];
};

/* ---- errors: every entry of nn.h checks with these and returns their status ---------------------------------------- */

/* Keeps the text for nn_error_message (in the thread's own place when `context` is NULL) and returns `status`. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
nn_status nn_fail(nn_context *context, nn_status status, const char *format, ...);

/* NN_ERROR_ARGUMENT, naming the function, unless the condition holds: NN_REQUIRE(context, T >= 0 && H >= 0). */
#define NN_REQUIRE(context, condition)                                                                                  \
  do {                                                                                                                  \
    if (!(condition)) return nn_fail((context), NN_ERROR_ARGUMENT, "%s: requires %s", __func__, #condition);            \
  } while (0)

/* NN_ERROR_UNSUPPORTED unless the dtype is float32, the only one that the CPU computes with (nn_cast converts). */
#define NN_REQUIRE_F32(context, dtype)                                                                                  \
  do {                                                                                                                  \
    if ((dtype) != NN_F32)                                                                                              \
      return nn_fail((context), NN_ERROR_UNSUPPORTED, "%s: the CPU library computes in float32 only", __func__);        \
  } while (0)

/* ---- workspace: a cursor over the context's workspace, taken anew by each call -------------------------------------- */

typedef struct nn_carve {
  char *base;       /* NULL only measures */
  int64_t capacity; /* bytes */
  int64_t used;     /* bytes asked for so far, whether they were there or not */
} nn_carve;

static inline nn_carve nn_carve_begin(nn_context *context) {
  nn_carve carve = {context->workspace, context->workspace_bytes, 0};
  return carve;
}

/* The next `bytes` bytes, 256-byte aligned, uninitialised; NULL when they are not there. Ask for everything, then check once
 * with NN_CARVE_CHECK. */
static inline void *nn_carve_take(nn_carve *carve, int64_t bytes) {
  int64_t at = carve->used;
  carve->used += (bytes + 255) & ~(int64_t)255;
  return carve->base != NULL && carve->used <= carve->capacity ? carve->base + at : NULL;
}

#define NN_CARVE_CHECK(context, carve)                                                                                  \
  do {                                                                                                                  \
    if ((carve).used > (carve).capacity)                                                                                \
      return nn_fail((context), NN_ERROR_WORKSPACE, "%s: needs %lld bytes of workspace, has %lld", __func__,            \
                     (long long)(carve).used, (long long)(carve).capacity);                                             \
  } while (0)

/* The sizes of nn_workspace_bytes. */
typedef struct nn_sizes {
  int64_t T, S, H, F, E, K, V, Q, G, D;
} nn_sizes;

/* Each file with kernels that carve says here what they need at most (context.c takes the maximum and rounds up). Kernels
 * that are not of gemm, moe or linear_cross_entropy may use nn_rows_workspace_bytes without saying so: room for several
 * activations of T rows and a few vectors of H or V for each of 64 blocks. */
int64_t nn_moe_workspace_bytes(const nn_sizes *sizes);
int64_t nn_linear_cross_entropy_workspace_bytes(const nn_sizes *sizes);
int64_t nn_sample_workspace_bytes(const nn_context *context, const nn_sizes *sizes); /* T sequences */
int64_t nn_decode_step_workspace_bytes(const nn_sizes *sizes); /* beside what the entries of which a step is made take */
static inline int64_t nn_rows_workspace_bytes(const nn_sizes *z) {
  int64_t row = 2 * z->H + 4 * (z->Q + 2 * z->G) * z->D + 2 * z->Q + 2 * z->E + 4 * z->K + 16;
  return ((int64_t)1 << 20) + 4 * (z->T * row + 64 * 4 * z->H + 16 * z->V);
}

/* ---- threads -------------------------------------------------------------------------------------------------------- */
/* Plain OpenMP: `#pragma omp parallel for num_threads(nn_team(context, elements, NN_GRAIN)) schedule(static)`. Which thread does an
 * element must never change its bits: a sum over rows is cut into blocks by the sizes alone, never by the number of threads. */

/* The scratch of the calling OpenMP thread, NN_THREAD_SCRATCH_BYTES of it. */
static inline void *nn_thread_scratch(nn_context *context) {
  return context->scratch + (int64_t)omp_get_thread_num() * NN_THREAD_SCRATCH_BYTES;
}

/* Threads for so much work: all, or only the caller when there is less than twice `grain`. Nothing in between, because an OpenMP
 * team that changes its size is made anew. */
static inline int nn_team(const nn_context *context, int64_t units, int64_t grain) {
  return units >= 2 * grain ? context->threads : 1;
}

/* ---- instruction sets ----------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#define NN_HAS_X86 1
#else
#define NN_HAS_X86 0
#endif

/* NN_DECLARE_SIMD(void, nn_exp_row, (float *y, const float *x, int64_t n)); */
#if NN_HAS_X86
#define NN_DECLARE_SIMD(result, name, parameters)                                                                       \
  result name##_plain parameters;                                                                                       \
  result name##_avx2 parameters;                                                                                        \
  result name##_avx512 parameters
#define NN_DISPATCH(context, name)                                                                                      \
  ((context)->isa == NN_ISA_AVX512 ? name##_avx512 : (context)->isa == NN_ISA_AVX2 ? name##_avx2 : name##_plain)
#else
#define NN_DECLARE_SIMD(result, name, parameters) result name##_plain parameters
#define NN_DISPATCH(context, name) (name##_plain)
#endif

static inline int64_t nn_min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t nn_max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t nn_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
