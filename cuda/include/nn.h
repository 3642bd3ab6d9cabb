/* nn.h: the one table of kernels.
 *
 * A plain C ABI which the CPU library (cuda/cpu) and the CUDA library (cuda/kernels) both export, symbol for symbol, so
 * that TypeScript does not know which of the two it has. cuda/generate-bindings.ts reads this file; its comments beside
 * pointer parameters are part of the contract, because the generated bindings check every tensor against them.
 *
 * Grammar of a parameter comment:   <way> <type> [<length>]{, null}
 *   way     out (`=`), add (`+=`), inout, in: device memory.   host: memory of the calling process, read or written
 *           before the call returns.
 *   type    f32 f64 bf16 i32 i64 u64 u16 u8, or dtype (the argument `dtype`), or out_dtype (the argument `out_dtype`).
 *   length  elements, as a product or an expression of the size arguments: [T, H] means T*H.
 *   null    NULL is allowed and means "not wanted" or "not there".
 *
 * Rules for every kernel:
 * - arguments in the order context, outputs, inputs, weights, sizes, scalars. Matrices are row-major and packed.
 * - returns a status; never exits, never prints, never allocates device memory. Scratch comes from the context's
 *   workspace (nn_set_workspace); too little of it is NN_ERROR_WORKSPACE with the bytes needed in nn_error_message.
 * - sizes of 0 are allowed and do nothing (an `out` of a reduction over nothing becomes 0).
 * - outputs never alias inputs, unless the docstring says that they may.
 * - work is queued on the context's stream; only nn_synchronize and copies to the host wait for it.
 * - deterministic: no float atomics; every sum has a fixed order that does not depend on threads or timing.
 * - `add` outputs: each element's whole contribution of the call is summed first and then added once, so that
 *   accumulating into a buffer gives the same bits as computing into zeros and adding the two buffers.
 *
 * Shape letters: B sequences, S sequence length, T = B*S tokens, H hidden size, F ffn size, E experts, K experts per
 * token, N = T*K slots, V vocabulary, D head size, Q query heads, G key/value heads, P = (Q + 2*G)*D columns of qkv,
 * C capacity of a key/value cache in positions.
 *
 * A "slot" is one (token, choice) pair. nn_moe_permute sorts the slots by expert, by token within an expert; sorted
 * slots offsets[e] .. offsets[e+1]-1 belong to expert e. Offsets live on the device, so that nothing waits for the host.
 */
#ifndef NN_H
#define NN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define NN_API __declspec(dllexport)
#else
#define NN_API __attribute__((visibility("default")))
#endif

/* Raised whenever a signature or its meaning changes; a library of another version is refused when it is loaded. */
#define NN_ABI_VERSION 4

typedef enum nn_status {
  NN_OK = 0,
  NN_ERROR_ARGUMENT = 1,    /* an impossible size or scalar: a bug of the caller */
  NN_ERROR_UNSUPPORTED = 2, /* this library has no kernel for that dtype, size or device */
  NN_ERROR_WORKSPACE = 3,   /* the workspace is too small */
  NN_ERROR_MEMORY = 4,      /* the device has not enough memory */
  NN_ERROR_DEVICE = 5,      /* no such device, or its driver refuses */
  NN_ERROR_FAULT = 6        /* the device reported a fault; it is cured only by a new process */
} nn_status;

typedef enum nn_dtype { NN_F32 = 0, NN_BF16 = 1 } nn_dtype;

/* Tokens that nn_decode_attention and nn_decode_moe take at most. */
#define NN_DECODE_TOKENS 64

/* One device with its stream, workspace and threads. Used by one thread at a time. */
typedef struct nn_context nn_context;

/* ---- library and devices ------------------------------------------------------------------------------------- */

/* NN_ABI_VERSION of the library that was loaded. */
NN_API int32_t nn_abi_version(void);

/* Number of devices this library can use: 1 for the CPU; for CUDA the GPUs (0 without driver or GPU). */
NN_API nn_status nn_device_count(
    int32_t *count // host i32 [1]
);

/* Describes a device as one JSON object, NUL-terminated: {"kind":"cpu"|"cuda","name","memoryBytes","freeBytes",
 * "cores", "isa" (CPU: "avx512"|"avx2"|"plain") or "computeCapability","driverVersion","runtimeVersion"}. */
NN_API nn_status nn_device_describe(
    char *json, // host u8 [capacity]
    int32_t device, int64_t capacity);

/* Opens a device. `threads`: CPU threads to compute with (0: all cores); ignored by CUDA. */
NN_API nn_status nn_context_create(
    uint64_t *context, // host u64 [1]
    int32_t device, int32_t threads);

NN_API nn_status nn_context_destroy(nn_context *context);

/* What the last failing call on this context (or, with a NULL context, on this thread) had to say, NUL-terminated. */
NN_API nn_status nn_error_message(
    nn_context *context,
    char *text, // host u8 [capacity]
    int64_t capacity);

/* The most float32 multiply-adds a second that this device was seen to do out of registers, times two, measured for about
 * `seconds` (twice that at most) with the context's threads. A ceiling for benchmarks; waits until it is done. */
NN_API nn_status nn_peak_flops(
    nn_context *context,
    double *flops, // host f64 [1]
    double seconds);

/* ---- memory -------------------------------------------------------------------------------------------------- */

/* Allocates device memory, aligned to 256 bytes, not cleared. An address is an opaque number to the caller. */
NN_API nn_status nn_allocate(
    nn_context *context,
    uint64_t *address, // host u64 [1]
    int64_t bytes);

NN_API nn_status nn_free(nn_context *context, uint64_t address);

/* Lends `bytes` at a device address to the kernels as scratch. The content is lost at every call. */
NN_API nn_status nn_set_workspace(nn_context *context, uint64_t address, int64_t bytes);

/* Bytes of workspace with which every kernel works for a model of these sizes and T tokens a call in sequences of S.
 * `dtype` is the activations' type. (N = T*K.) */
NN_API nn_status nn_workspace_bytes(
    nn_context *context,
    int64_t *bytes, // host i64 [1]
    int64_t T, int64_t S, int64_t H, int64_t F, int64_t E, int64_t K, int64_t V, int64_t Q, int64_t G, int64_t D,
    nn_dtype dtype);

NN_API nn_status nn_copy_to_device(
    nn_context *context,
    void *destination,  // out u8 [bytes]
    const void *source, // host u8 [bytes]
    int64_t bytes);

/* Waits for the stream, then copies. */
NN_API nn_status nn_copy_to_host(
    nn_context *context,
    void *destination,  // host u8 [bytes]
    const void *source, // in u8 [bytes]
    int64_t bytes);

NN_API nn_status nn_copy(
    nn_context *context,
    void *destination,  // out u8 [bytes]
    const void *source, // in u8 [bytes]
    int64_t bytes);

/* Waits for everything queued on the stream; reports a fault of any kernel before it. */
NN_API nn_status nn_synchronize(nn_context *context);

/* ---- graphs and time ------------------------------------------------------------------------------------------ */

/* From here to nn_graph_end what is called on this context is recorded instead of run, by this thread only. Copies to and from
 * the host, waiting and allocating are mistakes until then. Addresses and scalars are recorded by value; what they point to is
 * read when the graph runs. NN_ERROR_UNSUPPORTED from a library without graphs (the CPU's): call the kernels each time. */
NN_API nn_status nn_graph_begin(nn_context *context);

/* Ends the recording. The graph may be launched any number of times, each time for the same effect as the recorded calls. */
NN_API nn_status nn_graph_end(
    nn_context *context,
    uint64_t *graph // host u64 [1]
);

/* Queues all that was recorded. */
NN_API nn_status nn_graph_launch(nn_context *context, uint64_t graph);

NN_API nn_status nn_graph_destroy(nn_context *context, uint64_t graph);

/* Marks a point in the context's queue. */
NN_API nn_status nn_timer_start(
    nn_context *context,
    uint64_t *timer // host u64 [1]
);

/* Waits for the queue; milliseconds by the device's clock from the mark to here. The timer is used up. */
NN_API nn_status nn_timer_stop(
    nn_context *context,
    double *milliseconds, // host f64 [1]
    uint64_t timer);

/* ---- elementwise --------------------------------------------------------------------------------------------- */

/* y = x * sigmoid(x). y may be x. */
NN_API nn_status nn_silu_forward(
    nn_context *context,
    void *y,       // out dtype [n]
    const void *x, // in dtype [n]
    int64_t n, nn_dtype dtype);

/* dx = dy * s * (1 + x * (1 - s)), s = sigmoid(x). dx may be dy. */
NN_API nn_status nn_silu_backward(
    nn_context *context,
    void *dx,       // out dtype [n]
    const void *dy, // in dtype [n]
    const void *x,  // in dtype [n]
    int64_t n, nn_dtype dtype);

/* y = a + b. y may be a or b. */
NN_API nn_status nn_add(
    nn_context *context,
    void *y,       // out dtype [n]
    const void *a, // in dtype [n]
    const void *b, // in dtype [n]
    int64_t n, nn_dtype dtype);

/* y = a * b, element by element (its backward is two more of it). y may be a or b. */
NN_API nn_status nn_mul(
    nn_context *context,
    void *y,       // out dtype [n]
    const void *a, // in dtype [n]
    const void *b, // in dtype [n]
    int64_t n, nn_dtype dtype);

/* y = x * factor. y may be x. */
NN_API nn_status nn_scale(
    nn_context *context,
    void *y,       // out dtype [n]
    const void *x, // in dtype [n]
    int64_t n, float factor, nn_dtype dtype);

/* y = x, converted from `dtype` to `out_dtype`, round to nearest even. */
NN_API nn_status nn_cast(
    nn_context *context,
    void *y,       // out out_dtype [n]
    const void *x, // in dtype [n]
    int64_t n, nn_dtype out_dtype, nn_dtype dtype);

/* float32 numbers as two halves of 16 bits (cuda/include/nn_halves.h): high is x rounded to the nearest bfloat16, ties away from
 * zero, low the low 16 bits of x. Together they are x to the bit, a zero's sign and infinities too; but every NaN is 0x7FC00000. */
NN_API nn_status nn_split(
    nn_context *context,
    void *high,     // out bf16 [n]
    uint16_t *low,  // out u16 [n]
    const float *x, // in f32 [n]
    int64_t n);

/* The float32 numbers whose halves these are: the inverse of nn_split. */
NN_API nn_status nn_join(
    nn_context *context,
    float *x,            // out f32 [n]
    const void *high,    // in bf16 [n]
    const uint16_t *low, // in u16 [n]
    int64_t n);

/* h = silu(gate) * up, where each row of gate_up is [gate (F) | up (F)]. */
NN_API nn_status nn_swiglu_forward(
    nn_context *context,
    void *h,             // out dtype [rows, F]
    const void *gate_up, // in dtype [rows, 2*F]
    int64_t rows, int64_t F, nn_dtype dtype);

/* dgate = dh * up * silu'(gate), dup = dh * silu(gate). dgate_up may be gate_up. */
NN_API nn_status nn_swiglu_backward(
    nn_context *context,
    void *dgate_up,      // out dtype [rows, 2*F]
    const void *dh,      // in dtype [rows, F]
    const void *gate_up, // in dtype [rows, 2*F]
    int64_t rows, int64_t F, nn_dtype dtype);

/* out = sum of x in float64, in the fixed order of nn_grad_norm. */
NN_API nn_status nn_sum(
    nn_context *context,
    double *out,    // out f64 [1]
    const float *x, // in f32 [n]
    int64_t n);

/* A 128-bit digest of `words` 32-bit words: two sums modulo 2^64 over i of mix64(word[i] + (i+1) * odd constant), with
 * mix64 the finaliser of splitmix64 and another constant for each sum (cuda/include/nn_random.h). Integer sums have no
 * order, so every device gives the same digest for the same bits. The padding words of a plan are part of it. */
NN_API nn_status nn_digest(
    nn_context *context,
    uint64_t *digest, // out u64 [2]
    const void *x,    // in u8 [words*4]
    int64_t words);

/* nn_digest of the float32 numbers whose halves these are (nn_split). */
NN_API nn_status nn_digest_halves(
    nn_context *context,
    uint64_t *digest,    // out u64 [2]
    const void *high,    // in bf16 [n]
    const uint16_t *low, // in u16 [n]
    int64_t n);

/* Draws x[i] = standard_deviation * z(seed, stream, offset + i) from a counter-based generator (Philox 4x32-10) and an
 * inverse normal distribution in float64 made of IEEE operations only (cuda/include/nn_random.h), rounded once to
 * float32: the same bits on every machine. */
NN_API nn_status nn_random_normal(
    nn_context *context,
    float *x, // out f32 [n]
    int64_t n, uint64_t seed, uint64_t stream, int64_t offset, float standard_deviation);

/* ---- softmax ------------------------------------------------------------------------------------------------- */

/* y[r] = softmax(x[r]) in float32 whatever the dtype, the row's maximum subtracted. y may be x. */
NN_API nn_status nn_softmax_forward(
    nn_context *context,
    void *y,       // out dtype [rows, columns]
    const void *x, // in dtype [rows, columns]
    int64_t rows, int64_t columns, nn_dtype dtype);

/* dx = y * (dy - sum(y * dy)). dx may be dy. */
NN_API nn_status nn_softmax_backward(
    nn_context *context,
    void *dx,       // out dtype [rows, columns]
    const void *dy, // in dtype [rows, columns]
    const void *y,  // in dtype [rows, columns]
    int64_t rows, int64_t columns, nn_dtype dtype);

/* The router: probability = softmax over all E, then the K largest in falling order (ties to the lower index), their
 * probabilities divided by their sum. Requires K <= E. NaN logits sort first and make NaN weights. */
NN_API nn_status nn_softmax_topk_forward(
    nn_context *context,
    float *probability,  // out f32 [T, E]
    float *weight,       // out f32 [T, K]
    int32_t *index,      // out i32 [T, K]
    const float *logits, // in f32 [T, E]
    int64_t T, int64_t E, int64_t K);

/* The router's backward, with the aux loss: dprobability[t, i] = aux_scale * E * f_i / T + (through the renormalised top-K
 * weights), then through the softmax. f_i = load[i] / (T*K). aux_scale: aux loss weight / (microbatches of the step). */
NN_API nn_status nn_softmax_topk_backward(
    nn_context *context,
    float *dlogits,           // out f32 [T, E]
    const float *dweight,     // in f32 [T, K]
    const float *probability, // in f32 [T, E]
    const float *weight,      // in f32 [T, K]
    const int32_t *index,     // in i32 [T, K]
    const int32_t *load,      // in i32 [E]
    int64_t T, int64_t E, int64_t K, float aux_scale);

/* ---- rmsnorm ------------------------------------------------------------------------------------------------- */

/* reciprocal[t] = 1 / sqrt(mean(x[t]^2) + epsilon); y = x * reciprocal * weight. Zhang and Sennrich, arXiv 1910.07467. */
NN_API nn_status nn_rmsnorm_forward(
    nn_context *context,
    void *y,            // out dtype [T, H]
    float *reciprocal,  // out f32 [T]
    const void *x,      // in dtype [T, H]
    const void *weight, // in dtype [H]
    int64_t T, int64_t H, float epsilon, nn_dtype dtype);

/* dx = the gradient of x; dweight += sum over t of dy * x * reciprocal. dx may be dy. */
NN_API nn_status nn_rmsnorm_backward(
    nn_context *context,
    void *dx,                // out dtype [T, H]
    float *dweight,          // add f32 [H]
    const void *dy,          // in dtype [T, H]
    const void *x,           // in dtype [T, H]
    const float *reciprocal, // in f32 [T]
    const void *weight,      // in dtype [H]
    int64_t T, int64_t H, nn_dtype dtype);

/* sum = x + delta; y = rmsnorm(sum). sum may be x. */
NN_API nn_status nn_rmsnorm_residual_forward(
    nn_context *context,
    void *sum,          // out dtype [T, H]
    void *y,            // out dtype [T, H]
    float *reciprocal,  // out f32 [T]
    const void *x,      // in dtype [T, H]
    const void *delta,  // in dtype [T, H]
    const void *weight, // in dtype [H]
    int64_t T, int64_t H, float epsilon, nn_dtype dtype);

/* dx = dsum + (gradient through the norm); dweight as in nn_rmsnorm_backward. `sum` is the norm's input, `dsum` the
 * gradient that reaches it past the norm. dx may be dsum. */
NN_API nn_status nn_rmsnorm_residual_backward(
    nn_context *context,
    void *dx,                // out dtype [T, H]
    float *dweight,          // add f32 [H]
    const void *dy,          // in dtype [T, H]
    const void *dsum,        // in dtype [T, H]
    const void *sum,         // in dtype [T, H]
    const float *reciprocal, // in f32 [T]
    const void *weight,      // in dtype [H]
    int64_t T, int64_t H, nn_dtype dtype);

/* ---- gemm ---------------------------------------------------------------------------------------------------- */
/* op(A) is A [m, k], or with transpose_a the transpose of A [k, m]; op(B) is B [k, n], or with transpose_b the
 * transpose of B [n, k]. dtype is A's and B's, out_dtype C's. Accumulation is in float32 at least. */

/* C = op(A) op(B). */
NN_API nn_status nn_gemm(
    nn_context *context,
    void *c,       // out out_dtype [m, n]
    const void *a, // in dtype [m, k]
    const void *b, // in dtype [k, n]
    int64_t m, int64_t n, int64_t k, int32_t transpose_a, int32_t transpose_b, nn_dtype out_dtype, nn_dtype dtype);

/* C = alpha * op(A) op(B) + beta * C, the product summed wholly before it is added. beta = 0 does not read C. */
NN_API nn_status nn_gemm_beta(
    nn_context *context,
    void *c,       // inout out_dtype [m, n]
    const void *a, // in dtype [m, k]
    const void *b, // in dtype [k, n]
    int64_t m, int64_t n, int64_t k, int32_t transpose_a, int32_t transpose_b, float alpha, float beta,
    nn_dtype out_dtype, nn_dtype dtype);

/* C[i] = op(A[i]) op(B[i]) for `batch` packed matrices. */
NN_API nn_status nn_gemm_batched(
    nn_context *context,
    void *c,       // out out_dtype [batch, m, n]
    const void *a, // in dtype [batch, m, k]
    const void *b, // in dtype [batch, k, n]
    int64_t batch, int64_t m, int64_t n, int64_t k, int32_t transpose_a, int32_t transpose_b, nn_dtype out_dtype,
    nn_dtype dtype);

/* ---- rope ---------------------------------------------------------------------------------------------------- */

/* cosine/sine[p, i] = cos/sin(p * base'^(-2i/D)) for positions p < positions and i < D/2, computed in float64, with
 * base' = base * ntk_alpha^(D/(D-2)). */
NN_API nn_status nn_rope_freqs(
    nn_context *context,
    float *cosine, // out f32 [positions, D/2]
    float *sine,   // out f32 [positions, D/2]
    int64_t positions, int64_t D, double base, double ntk_alpha);

/* Rotates each head of each row: (a, b) -> (a cos - b sin, b cos + a sin), a the head's first half and b its second.
 * Row t has position position[t] < positions. direction 1 is the forward, -1 the backward (the inverse). y may be x. */
NN_API nn_status nn_rope_forward(
    nn_context *context,
    void *y,                 // out dtype [T, heads*D]
    const void *x,           // in dtype [T, heads*D]
    const int32_t *position, // in i32 [T]
    const float *cosine,     // in f32 [positions, D/2]
    const float *sine,       // in f32 [positions, D/2]
    int64_t T, int64_t heads, int64_t D, int64_t positions, int32_t direction, nn_dtype dtype);

/* Rotates the Q query and G key heads of qkv rows [q | k | v] in place and leaves v. */
NN_API nn_status nn_rope_qk(
    nn_context *context,
    void *qkv,               // inout dtype [T, (Q+2*G)*D]
    const int32_t *position, // in i32 [T]
    const float *cosine,     // in f32 [positions, D/2]
    const float *sine,       // in f32 [positions, D/2]
    int64_t T, int64_t Q, int64_t G, int64_t D, int64_t positions, int32_t direction, nn_dtype dtype);

/* ---- attention ----------------------------------------------------------------------------------------------- */
/* Query head h uses key/value head h / (Q/G). scale = 1/sqrt(D). Causal. qkv rows are [q | k | v] after RoPE. */

/* score[b, h, i, j] = q . k * scale for j <= i, -infinity above. The plain way, for reading and for tests. */
NN_API nn_status nn_attention_scores(
    nn_context *context,
    float *score,    // out f32 [B, Q, S, S]
    const void *qkv, // in dtype [B, S, (Q+2*G)*D]
    int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, nn_dtype dtype);

/* out[b, i, h] = sum over j of probability[b, h, i, j] * v[b, j]. */
NN_API nn_status nn_attention_output(
    nn_context *context,
    void *out,                // out dtype [B, S, Q*D]
    const float *probability, // in f32 [B, Q, S, S]
    const void *qkv,          // in dtype [B, S, (Q+2*G)*D]
    int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, nn_dtype dtype);

/* Attention in tiles with a running softmax; log_sum_exp is of the scaled scores. Dao, arXiv 2307.08691. */
NN_API nn_status nn_flash_attention_forward(
    nn_context *context,
    void *out,          // out dtype [B, S, Q*D]
    float *log_sum_exp, // out f32 [B, Q, S]
    const void *qkv,    // in dtype [B, S, (Q+2*G)*D]
    int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, nn_dtype dtype);

NN_API nn_status nn_flash_attention_backward(
    nn_context *context,
    void *dqkv,               // out dtype [B, S, (Q+2*G)*D]
    const void *dout,         // in dtype [B, S, Q*D]
    const void *out,          // in dtype [B, S, Q*D]
    const float *log_sum_exp, // in f32 [B, Q, S]
    const void *qkv,          // in dtype [B, S, (Q+2*G)*D]
    int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, nn_dtype dtype);

/* Copies the keys and values of qkv rows into a cache: row (b, i) goes to position start[b] + i, which must be < C. */
NN_API nn_status nn_cache_append(
    nn_context *context,
    void *key_cache,      // inout dtype [B, C, G*D]
    void *value_cache,    // inout dtype [B, C, G*D]
    const void *qkv,      // in dtype [B, S, (Q+2*G)*D]
    const int32_t *start, // in i32 [B]
    int64_t B, int64_t S, int64_t C, int64_t Q, int64_t G, int64_t D, nn_dtype dtype);

/* Attention of S new queries for each sequence over its cache, for prefill in pieces (S > 1) and decoding (S = 1):
 * query (b, i) sees positions 0 .. start[b] + i, which nn_cache_append has filled before. */
NN_API nn_status nn_attention_cached(
    nn_context *context,
    void *out,               // out dtype [B, S, Q*D]
    const void *qkv,         // in dtype [B, S, (Q+2*G)*D]
    const void *key_cache,   // in dtype [B, C, G*D]
    const void *value_cache, // in dtype [B, C, G*D]
    const int32_t *start,    // in i32 [B]
    int64_t B, int64_t S, int64_t C, int64_t Q, int64_t G, int64_t D, nn_dtype dtype);

/* ---- moe ----------------------------------------------------------------------------------------------------- */

/* Sorts the slots by expert (stable: by token, then choice). For sorted slot s: slot_token[s] is its token, slot_weight[s]
 * its routing weight; slot_of[t, k] is where (t, k) went. load[e] = offsets[e+1] - offsets[e]. An index outside 0..E-1
 * counts as expert 0 (softmax_topk never makes one). */
NN_API nn_status nn_moe_permute(
    nn_context *context,
    int32_t *offsets,     // out i32 [E+1]
    int32_t *load,        // out i32 [E]
    int32_t *slot_token,  // out i32 [T*K]
    float *slot_weight,   // out f32 [T*K]
    int32_t *slot_of,     // out i32 [T, K]
    const int32_t *index, // in i32 [T, K]
    const float *weight,  // in f32 [T, K]
    int64_t T, int64_t E, int64_t K);

/* For each sorted slot s of expert e: gate_up[s] = x[slot_token[s]] gate_up_weight[e]^T, h[s] = silu(gate) * up, with SwiGLU in the
 * epilogue. The gather is part of the loads, except that the CUDA library on Hopper packs bf16 rows in the workspace first (and in the
 * backward and the weight gradients likewise). An expert's weights are [gate (w1): F, H | up (w3): F, H]. */
NN_API nn_status nn_moe_up_forward(
    nn_context *context,
    void *h,                    // out dtype [T*K, F]
    void *gate_up,              // out dtype [T*K, 2*F], null
    const void *x,              // in dtype [T, H]
    const int32_t *slot_token,  // in i32 [T*K]
    const int32_t *offsets,     // in i32 [E+1]
    const void *gate_up_weight, // in dtype [E, 2*F, H]
    int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, nn_dtype dtype);

/* y[s] = h[s] down_weight[e]^T (w2: [H, F] for each expert). */
NN_API nn_status nn_moe_down_forward(
    nn_context *context,
    void *y,                 // out dtype [T*K, H]
    const void *h,           // in dtype [T*K, F]
    const int32_t *offsets,  // in i32 [E+1]
    const void *down_weight, // in dtype [E, H, F]
    int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, nn_dtype dtype);

/* out[t] = base[t] + sum over k = 0..K-1, in that order, of weight[t, k] * y[slot_of[t, k]]; without weight all are 1,
 * without base it is 0. out may be base. */
NN_API nn_status nn_moe_combine(
    nn_context *context,
    void *out,              // out dtype [T, H]
    const void *base,       // in dtype [T, H], null
    const void *y,          // in dtype [T*K, H]
    const float *weight,    // in f32 [T, K], null
    const int32_t *slot_of, // in i32 [T, K]
    int64_t T, int64_t H, int64_t K, nn_dtype dtype);

/* Backward through the weighted sum, the down product and SwiGLU, for sorted slot s with token t and weight w:
 *   dh = dout[t] down_weight[e];   dweight[t, k] = dh . h[s];   dgate_up[s] = swiglu backward of w * dh.
 * h is computed again from gate_up, to the bits of nn_moe_up_forward; it is stored for nn_moe_down_weight_gradient unless h is NULL,
 * because the forward's was kept. dgate_up may be gate_up. */
NN_API nn_status nn_moe_down_backward(
    nn_context *context,
    void *dgate_up,            // out dtype [T*K, 2*F]
    void *h,                   // out dtype [T*K, F], null
    float *dweight,            // out f32 [T, K]
    const void *dout,          // in dtype [T, H]
    const void *gate_up,       // in dtype [T*K, 2*F]
    const int32_t *slot_token, // in i32 [T*K]
    const float *slot_weight,  // in f32 [T*K]
    const int32_t *slot_of,    // in i32 [T, K]
    const int32_t *offsets,    // in i32 [E+1]
    const void *down_weight,   // in dtype [E, H, F]
    int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, nn_dtype dtype);

/* ddown_weight[e] += sum over the slots s of e of (slot_weight[s] * dout[slot_token[s]])^T h[s]; the weighted row is rounded to dtype.
 * accumulate 0: the sum replaces what was there, which is not read: all E matrices are written, zeros for an expert without slots. Each
 * element then has the bits that adding to zero gives it, so a sum of -0 is stored as 0. */
NN_API nn_status nn_moe_down_weight_gradient(
    nn_context *context,
    float *ddown_weight,       // inout f32 [E, H, F]
    const void *dout,          // in dtype [T, H]
    const void *h,             // in dtype [T*K, F]
    const int32_t *slot_token, // in i32 [T*K]
    const float *slot_weight,  // in f32 [T*K]
    const int32_t *offsets,    // in i32 [E+1]
    int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, int32_t accumulate, nn_dtype dtype);

/* dx_slots[s] = dgate_up[s] gate_up_weight[e]; nn_moe_combine without weights then sums a token's slots. */
NN_API nn_status nn_moe_up_backward(
    nn_context *context,
    void *dx_slots,             // out dtype [T*K, H]
    const void *dgate_up,       // in dtype [T*K, 2*F]
    const int32_t *offsets,     // in i32 [E+1]
    const void *gate_up_weight, // in dtype [E, 2*F, H]
    int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, nn_dtype dtype);

/* dgate_up_weight[e] += sum over the slots of e of dgate_up[s]^T x[slot_token[s]].
 * accumulate as in nn_moe_down_weight_gradient. */
NN_API nn_status nn_moe_up_weight_gradient(
    nn_context *context,
    float *dgate_up_weight,    // inout f32 [E, 2*F, H]
    const void *dgate_up,      // in dtype [T*K, 2*F]
    const void *x,             // in dtype [T, H]
    const int32_t *slot_token, // in i32 [T*K]
    const int32_t *offsets,    // in i32 [E+1]
    int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, int32_t accumulate, nn_dtype dtype);

/* ---- loss ---------------------------------------------------------------------------------------------------- */
/* A target of -100 is ignored: its loss and gradient are 0. Any other target outside 0..V-1 makes a NaN loss. */

/* loss[t] = log(sum(exp(logits[t]))) - logits[t, target[t]]. */
NN_API nn_status nn_cross_entropy_forward(
    nn_context *context,
    float *loss,           // out f32 [T]
    const void *logits,    // in dtype [T, V]
    const int32_t *target, // in i32 [T]
    int64_t T, int64_t V, nn_dtype dtype);

/* dlogits = scale * (softmax(logits) - onehot(target)). dlogits may be logits. */
NN_API nn_status nn_cross_entropy_backward(
    nn_context *context,
    void *dlogits,         // out dtype [T, V]
    const void *logits,    // in dtype [T, V]
    const int32_t *target, // in i32 [T]
    int64_t T, int64_t V, float scale, nn_dtype dtype);

/* The LM head and the loss in one, in chunks, so that all logits never exist at once: logits = x weight^T, loss as above;
 * dx = scale * dlogits weight and dweight += scale * dlogits^T x. With dx = NULL only the loss is computed (then dweight
 * must be NULL too). Liger, arXiv 2410.10989. */
NN_API nn_status nn_linear_cross_entropy(
    nn_context *context,
    float *loss,           // out f32 [T]
    void *dx,              // out dtype [T, H], null
    float *dweight,        // add f32 [V, H], null
    const void *x,         // in dtype [T, H]
    const int32_t *target, // in i32 [T]
    const void *weight,    // in dtype [V, H]
    int64_t T, int64_t H, int64_t V, float scale, nn_dtype dtype);

/* aux = E * sum over i of (load[i] / (T*K)) * mean over t of probability[t, i]. Fedus et al., arXiv 2101.03961. */
NN_API nn_status nn_aux_loss(
    nn_context *context,
    float *aux,               // out f32 [1]
    const float *probability, // in f32 [T, E]
    const int32_t *load,      // in i32 [E]
    int64_t T, int64_t E, int64_t K);

/* ---- embedding and optimizer --------------------------------------------------------------------------------- */

/* y[t] = table[token[t]]; a token outside 0..V-1 makes a row of NaN. */
NN_API nn_status nn_embedding_forward(
    nn_context *context,
    void *y,              // out dtype [T, H]
    const int32_t *token, // in i32 [T]
    const void *table,    // in dtype [V, H]
    int64_t T, int64_t H, int64_t V, nn_dtype dtype);

/* dtable[token[t]] += dy[t]: the embedding's backward. A row's tokens are summed in rising t, then added once. */
NN_API nn_status nn_scatter_add(
    nn_context *context,
    float *dtable,        // add f32 [V, H]
    const void *dy,       // in dtype [T, H]
    const int32_t *token, // in i32 [T]
    int64_t T, int64_t H, int64_t V, nn_dtype dtype);

NN_API nn_status nn_zero_grad(
    nn_context *context,
    float *gradient, // out f32 [n]
    int64_t n);

/* sum_of_squares = sum of gradient[i]^2 in float64 (each square is exact), in this order on every device: the elements are
 * cut into chunks of 4096; in a chunk lane l of 64 sums elements l, l + 64, ... in rising order; the lanes are added in
 * halves (l + 32, l + 16, ... 1); the chunks' sums are reduced in the same way, as if they were elements not squared, until
 * one is left. nn_sum uses the same order without the squares. */
NN_API nn_status nn_grad_norm(
    nn_context *context,
    double *sum_of_squares, // out f64 [1]
    const float *gradient,  // in f32 [n]
    int64_t n);

/* control[0] = norm = sqrt(sum_of_squares); control[1] = min(1, clip / (norm + 1e-6)); control[2] = 1 if norm is NaN or
 * infinite (the step must be skipped), else 0. Stays on the device: nothing waits for the host. */
NN_API nn_status nn_grad_clip(
    nn_context *context,
    double *control,              // out f64 [3]
    const double *sum_of_squares, // in f64 [1]
    double clip);

/* AdamW with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101), in float32 with exactly these IEEE operations and no
 * fused multiply-add, so that CPU and GPU give the same bits; does nothing when control[2] is not 0:
 *   g = gradient * (float)control[1]
 *   m = m*beta1 + g*(1-beta1);   v = v*beta2 + (g*g)*(1-beta2)
 *   p = p - (lr*decay)*p - (m*(1/correction1))*lr / (sqrt(v*(1/correction2)) + epsilon)
 * evaluated left to right as written, with correction_i = 1 - beta_i^step, 1-beta_i, lr*decay and 1/correction_i computed in
 * float64 by this function and rounded to float32 once. schedule = [learning rate, step] (step counts from 1) lies on the device, so that a captured step can
 * be replayed. With dtype f32, `parameter` is p and `residue` NULL. With bf16 they are p's halves, high and low of nn_split: p is the
 * same float32 as ever, and `parameter` its rounding, to compute with. m and v have state_dtype, rounded to nearest even. */
NN_API nn_status nn_adamw_step(
    nn_context *context,
    void *parameter,        // inout dtype [n]
    uint16_t *residue,      // inout u16 [n], null
    void *m,                // inout state_dtype [n]
    void *v,                // inout state_dtype [n]
    const float *gradient,  // in f32 [n]
    const double *control,  // in f64 [3]
    const double *schedule, // in f64 [2]
    int64_t n, double beta1, double beta2, double epsilon, double decay, nn_dtype state_dtype, nn_dtype dtype);

/* ---- decode -------------------------------------------------------------------------------------------------- */
/* Random numbers: u = uniform(seed, sequence b, counter[b]) from the generator of nn_random.h, so that a token depends on its
 * seed and position alone. Logits are divided by temperature (> 0) first. Candidates are taken in falling order of logit, ties
 * to the lower index; the first whose cumulative probability exceeds u * (total of the candidates) is the token. */

/* token[b] = index of the largest logit, ties to the lower index; NaN counts as -infinity. */
NN_API nn_status nn_argmax(
    nn_context *context,
    int32_t *token,     // out i32 [B]
    const void *logits, // in dtype [B, V]
    int64_t B, int64_t V, nn_dtype dtype);

/* One token from the whole distribution. */
NN_API nn_status nn_sample(
    nn_context *context,
    int32_t *token,         // out i32 [B]
    const void *logits,     // in dtype [B, V]
    const int32_t *counter, // in i32 [B]
    int64_t B, int64_t V, float temperature, uint64_t seed, nn_dtype dtype);

/* From the top_k (1 .. V) most probable ones. */
NN_API nn_status nn_topk_sample(
    nn_context *context,
    int32_t *token,         // out i32 [B]
    const void *logits,     // in dtype [B, V]
    const int32_t *counter, // in i32 [B]
    int64_t B, int64_t V, int64_t top_k, float temperature, uint64_t seed, nn_dtype dtype);

/* From the smallest set whose probability reaches top_p (0 < top_p <= 1): nucleus sampling, arXiv 1904.09751. */
NN_API nn_status nn_topp_sample(
    nn_context *context,
    int32_t *token,         // out i32 [B]
    const void *logits,     // in dtype [B, V]
    const int32_t *counter, // in i32 [B]
    int64_t B, int64_t V, float top_p, float temperature, uint64_t seed, nn_dtype dtype);

/* The attention half of a layer for one new token of each of B sequences: out = x + attention(rope(rmsnorm(x) qkv_weight^T)) output_weight^T,
 * where sequence b's token stands at position start[b] (< C, < positions), its key and value go into the cache there, and it sees positions
 * 0 .. start[b]. B <= NN_DECODE_TOKENS. The same as the entries that it is made of, but for roundings. It must not follow right after a
 * call that wrote any of its inputs but x: on a GPU it reads them while that call may still run. out is not x. */
NN_API nn_status nn_decode_attention(
    nn_context *context,
    void *out,                 // out dtype [B, H]
    void *key_cache,           // inout dtype [B, C, G*D]
    void *value_cache,         // inout dtype [B, C, G*D]
    const void *x,             // in dtype [B, H]
    const int32_t *start,      // in i32 [B]
    const float *cosine,       // in f32 [positions, D/2]
    const float *sine,         // in f32 [positions, D/2]
    const void *norm,          // in dtype [H]
    const void *qkv_weight,    // in dtype [(Q+2*G)*D, H]
    const void *output_weight, // in dtype [H, Q*D]
    int64_t B, int64_t C, int64_t H, int64_t Q, int64_t G, int64_t D, int64_t positions, float epsilon, nn_dtype dtype);

/* The experts' half of a layer for T <= NN_DECODE_TOKENS tokens: out = x + moe(rmsnorm(x)). The same as the entries that it is made of, but
 * for roundings, and under the same condition as nn_decode_attention. out is not x. */
NN_API nn_status nn_decode_moe(
    nn_context *context,
    void *out,                  // out dtype [T, H]
    const void *x,              // in dtype [T, H]
    const void *norm,           // in dtype [H]
    const void *router,         // in dtype [E, H]
    const void *gate_up_weight, // in dtype [E, 2*F, H]
    const void *down_weight,    // in dtype [E, H, F]
    int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, float epsilon, nn_dtype dtype);

/* One decoding step further, so that a loop of steps needs no host: for each sequence b, history[row, b] = token[b] with
 * row = step[0], start[b] += 1 and counter[b] += 1; then step[0] = (row + 1) % R. step[0] must be in 0 .. R-1, else nothing is done. */
NN_API nn_status nn_advance(
    nn_context *context,
    int32_t *history,     // inout i32 [R, B]
    int32_t *start,       // inout i32 [B]
    int32_t *counter,     // inout i32 [B]
    int32_t *step,        // inout i32 [1]
    const int32_t *token, // in i32 [B]
    int64_t B, int64_t R);

#ifdef __cplusplus
}
#endif

#endif
