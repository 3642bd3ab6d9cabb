/**
 * Generated from cuda/include/nn.h by cuda/generate-bindings.ts (`npm run generate`); not edited by hand. Prototypes of the
 * native library, and the kernels with their tensors checked. device.ts loads the library and makes the Kernels.
 */
import { bytesOf, code, refuse } from './check.ts';
import type { ComputeType, Tensor, TypedArray } from './tensor.ts';

/** The version of the ABI that these bindings speak. */
export const ABI_VERSION = 4;

/** What koffi binds: device addresses and contexts are numbers, host memory is a pointer. */
export const PROTOTYPES = {
  nn_abi_version: 'int32_t nn_abi_version(void)',
  nn_device_count: 'int32_t nn_device_count(void *count)',
  nn_device_describe: 'int32_t nn_device_describe(void *json, int32_t device, int64_t capacity)',
  nn_context_create: 'int32_t nn_context_create(void *context, int32_t device, int32_t threads)',
  nn_context_destroy: 'int32_t nn_context_destroy(uint64_t context)',
  nn_error_message: 'int32_t nn_error_message(uint64_t context, void *text, int64_t capacity)',
  nn_peak_flops: 'int32_t nn_peak_flops(uint64_t context, void *flops, double seconds)',
  nn_allocate: 'int32_t nn_allocate(uint64_t context, void *address, int64_t bytes)',
  nn_free: 'int32_t nn_free(uint64_t context, uint64_t address)',
  nn_set_workspace: 'int32_t nn_set_workspace(uint64_t context, uint64_t address, int64_t bytes)',
  nn_workspace_bytes: 'int32_t nn_workspace_bytes(uint64_t context, void *bytes, int64_t T, int64_t S, int64_t H, int64_t F, int64_t E, int64_t K, int64_t V, int64_t Q, int64_t G, int64_t D, int32_t dtype)',
  nn_copy_to_device: 'int32_t nn_copy_to_device(uint64_t context, uint64_t destination, void *source, int64_t bytes)',
  nn_copy_to_host: 'int32_t nn_copy_to_host(uint64_t context, void *destination, uint64_t source, int64_t bytes)',
  nn_copy: 'int32_t nn_copy(uint64_t context, uint64_t destination, uint64_t source, int64_t bytes)',
  nn_synchronize: 'int32_t nn_synchronize(uint64_t context)',
  nn_graph_begin: 'int32_t nn_graph_begin(uint64_t context)',
  nn_graph_end: 'int32_t nn_graph_end(uint64_t context, void *graph)',
  nn_graph_launch: 'int32_t nn_graph_launch(uint64_t context, uint64_t graph)',
  nn_graph_destroy: 'int32_t nn_graph_destroy(uint64_t context, uint64_t graph)',
  nn_timer_start: 'int32_t nn_timer_start(uint64_t context, void *timer)',
  nn_timer_stop: 'int32_t nn_timer_stop(uint64_t context, void *milliseconds, uint64_t timer)',
  nn_silu_forward: 'int32_t nn_silu_forward(uint64_t context, uint64_t y, uint64_t x, int64_t n, int32_t dtype)',
  nn_silu_backward: 'int32_t nn_silu_backward(uint64_t context, uint64_t dx, uint64_t dy, uint64_t x, int64_t n, int32_t dtype)',
  nn_add: 'int32_t nn_add(uint64_t context, uint64_t y, uint64_t a, uint64_t b, int64_t n, int32_t dtype)',
  nn_mul: 'int32_t nn_mul(uint64_t context, uint64_t y, uint64_t a, uint64_t b, int64_t n, int32_t dtype)',
  nn_scale: 'int32_t nn_scale(uint64_t context, uint64_t y, uint64_t x, int64_t n, float factor, int32_t dtype)',
  nn_cast: 'int32_t nn_cast(uint64_t context, uint64_t y, uint64_t x, int64_t n, int32_t out_dtype, int32_t dtype)',
  nn_split: 'int32_t nn_split(uint64_t context, uint64_t high, uint64_t low, uint64_t x, int64_t n)',
  nn_join: 'int32_t nn_join(uint64_t context, uint64_t x, uint64_t high, uint64_t low, int64_t n)',
  nn_swiglu_forward: 'int32_t nn_swiglu_forward(uint64_t context, uint64_t h, uint64_t gate_up, int64_t rows, int64_t F, int32_t dtype)',
  nn_swiglu_backward: 'int32_t nn_swiglu_backward(uint64_t context, uint64_t dgate_up, uint64_t dh, uint64_t gate_up, int64_t rows, int64_t F, int32_t dtype)',
  nn_sum: 'int32_t nn_sum(uint64_t context, uint64_t out, uint64_t x, int64_t n)',
  nn_digest: 'int32_t nn_digest(uint64_t context, uint64_t digest, uint64_t x, int64_t words)',
  nn_digest_halves: 'int32_t nn_digest_halves(uint64_t context, uint64_t digest, uint64_t high, uint64_t low, int64_t n)',
  nn_random_normal: 'int32_t nn_random_normal(uint64_t context, uint64_t x, int64_t n, uint64_t seed, uint64_t stream, int64_t offset, float standard_deviation)',
  nn_softmax_forward: 'int32_t nn_softmax_forward(uint64_t context, uint64_t y, uint64_t x, int64_t rows, int64_t columns, int32_t dtype)',
  nn_softmax_backward: 'int32_t nn_softmax_backward(uint64_t context, uint64_t dx, uint64_t dy, uint64_t y, int64_t rows, int64_t columns, int32_t dtype)',
  nn_softmax_topk_forward: 'int32_t nn_softmax_topk_forward(uint64_t context, uint64_t probability, uint64_t weight, uint64_t index, uint64_t logits, int64_t T, int64_t E, int64_t K)',
  nn_softmax_topk_backward: 'int32_t nn_softmax_topk_backward(uint64_t context, uint64_t dlogits, uint64_t dweight, uint64_t probability, uint64_t weight, uint64_t index, uint64_t load, int64_t T, int64_t E, int64_t K, float aux_scale)',
  nn_rmsnorm_forward: 'int32_t nn_rmsnorm_forward(uint64_t context, uint64_t y, uint64_t reciprocal, uint64_t x, uint64_t weight, int64_t T, int64_t H, float epsilon, int32_t dtype)',
  nn_rmsnorm_backward: 'int32_t nn_rmsnorm_backward(uint64_t context, uint64_t dx, uint64_t dweight, uint64_t dy, uint64_t x, uint64_t reciprocal, uint64_t weight, int64_t T, int64_t H, int32_t dtype)',
  nn_rmsnorm_residual_forward: 'int32_t nn_rmsnorm_residual_forward(uint64_t context, uint64_t sum, uint64_t y, uint64_t reciprocal, uint64_t x, uint64_t delta, uint64_t weight, int64_t T, int64_t H, float epsilon, int32_t dtype)',
  nn_rmsnorm_residual_backward: 'int32_t nn_rmsnorm_residual_backward(uint64_t context, uint64_t dx, uint64_t dweight, uint64_t dy, uint64_t dsum, uint64_t sum, uint64_t reciprocal, uint64_t weight, int64_t T, int64_t H, int32_t dtype)',
  nn_gemm: 'int32_t nn_gemm(uint64_t context, uint64_t c, uint64_t a, uint64_t b, int64_t m, int64_t n, int64_t k, int32_t transpose_a, int32_t transpose_b, int32_t out_dtype, int32_t dtype)',
  nn_gemm_beta: 'int32_t nn_gemm_beta(uint64_t context, uint64_t c, uint64_t a, uint64_t b, int64_t m, int64_t n, int64_t k, int32_t transpose_a, int32_t transpose_b, float alpha, float beta, int32_t out_dtype, int32_t dtype)',
  nn_gemm_batched: 'int32_t nn_gemm_batched(uint64_t context, uint64_t c, uint64_t a, uint64_t b, int64_t batch, int64_t m, int64_t n, int64_t k, int32_t transpose_a, int32_t transpose_b, int32_t out_dtype, int32_t dtype)',
  nn_rope_freqs: 'int32_t nn_rope_freqs(uint64_t context, uint64_t cosine, uint64_t sine, int64_t positions, int64_t D, double base, double ntk_alpha)',
  nn_rope_forward: 'int32_t nn_rope_forward(uint64_t context, uint64_t y, uint64_t x, uint64_t position, uint64_t cosine, uint64_t sine, int64_t T, int64_t heads, int64_t D, int64_t positions, int32_t direction, int32_t dtype)',
  nn_rope_qk: 'int32_t nn_rope_qk(uint64_t context, uint64_t qkv, uint64_t position, uint64_t cosine, uint64_t sine, int64_t T, int64_t Q, int64_t G, int64_t D, int64_t positions, int32_t direction, int32_t dtype)',
  nn_attention_scores: 'int32_t nn_attention_scores(uint64_t context, uint64_t score, uint64_t qkv, int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, int32_t dtype)',
  nn_attention_output: 'int32_t nn_attention_output(uint64_t context, uint64_t out, uint64_t probability, uint64_t qkv, int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, int32_t dtype)',
  nn_flash_attention_forward: 'int32_t nn_flash_attention_forward(uint64_t context, uint64_t out, uint64_t log_sum_exp, uint64_t qkv, int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, int32_t dtype)',
  nn_flash_attention_backward: 'int32_t nn_flash_attention_backward(uint64_t context, uint64_t dqkv, uint64_t dout, uint64_t out, uint64_t log_sum_exp, uint64_t qkv, int64_t B, int64_t S, int64_t Q, int64_t G, int64_t D, int32_t dtype)',
  nn_cache_append: 'int32_t nn_cache_append(uint64_t context, uint64_t key_cache, uint64_t value_cache, uint64_t qkv, uint64_t start, int64_t B, int64_t S, int64_t C, int64_t Q, int64_t G, int64_t D, int32_t dtype)',
  nn_attention_cached: 'int32_t nn_attention_cached(uint64_t context, uint64_t out, uint64_t qkv, uint64_t key_cache, uint64_t value_cache, uint64_t start, int64_t B, int64_t S, int64_t C, int64_t Q, int64_t G, int64_t D, int32_t dtype)',
  nn_moe_permute: 'int32_t nn_moe_permute(uint64_t context, uint64_t offsets, uint64_t load, uint64_t slot_token, uint64_t slot_weight, uint64_t slot_of, uint64_t index, uint64_t weight, int64_t T, int64_t E, int64_t K)',
  nn_moe_up_forward: 'int32_t nn_moe_up_forward(uint64_t context, uint64_t h, uint64_t gate_up, uint64_t x, uint64_t slot_token, uint64_t offsets, uint64_t gate_up_weight, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, int32_t dtype)',
  nn_moe_down_forward: 'int32_t nn_moe_down_forward(uint64_t context, uint64_t y, uint64_t h, uint64_t offsets, uint64_t down_weight, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, int32_t dtype)',
  nn_moe_combine: 'int32_t nn_moe_combine(uint64_t context, uint64_t out, uint64_t base, uint64_t y, uint64_t weight, uint64_t slot_of, int64_t T, int64_t H, int64_t K, int32_t dtype)',
  nn_moe_down_backward: 'int32_t nn_moe_down_backward(uint64_t context, uint64_t dgate_up, uint64_t h, uint64_t dweight, uint64_t dout, uint64_t gate_up, uint64_t slot_token, uint64_t slot_weight, uint64_t slot_of, uint64_t offsets, uint64_t down_weight, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, int32_t dtype)',
  nn_moe_down_weight_gradient: 'int32_t nn_moe_down_weight_gradient(uint64_t context, uint64_t ddown_weight, uint64_t dout, uint64_t h, uint64_t slot_token, uint64_t slot_weight, uint64_t offsets, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, int32_t accumulate, int32_t dtype)',
  nn_moe_up_backward: 'int32_t nn_moe_up_backward(uint64_t context, uint64_t dx_slots, uint64_t dgate_up, uint64_t offsets, uint64_t gate_up_weight, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, int32_t dtype)',
  nn_moe_up_weight_gradient: 'int32_t nn_moe_up_weight_gradient(uint64_t context, uint64_t dgate_up_weight, uint64_t dgate_up, uint64_t x, uint64_t slot_token, uint64_t offsets, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, int32_t accumulate, int32_t dtype)',
  nn_cross_entropy_forward: 'int32_t nn_cross_entropy_forward(uint64_t context, uint64_t loss, uint64_t logits, uint64_t target, int64_t T, int64_t V, int32_t dtype)',
  nn_cross_entropy_backward: 'int32_t nn_cross_entropy_backward(uint64_t context, uint64_t dlogits, uint64_t logits, uint64_t target, int64_t T, int64_t V, float scale, int32_t dtype)',
  nn_linear_cross_entropy: 'int32_t nn_linear_cross_entropy(uint64_t context, uint64_t loss, uint64_t dx, uint64_t dweight, uint64_t x, uint64_t target, uint64_t weight, int64_t T, int64_t H, int64_t V, float scale, int32_t dtype)',
  nn_aux_loss: 'int32_t nn_aux_loss(uint64_t context, uint64_t aux, uint64_t probability, uint64_t load, int64_t T, int64_t E, int64_t K)',
  nn_embedding_forward: 'int32_t nn_embedding_forward(uint64_t context, uint64_t y, uint64_t token, uint64_t table, int64_t T, int64_t H, int64_t V, int32_t dtype)',
  nn_scatter_add: 'int32_t nn_scatter_add(uint64_t context, uint64_t dtable, uint64_t dy, uint64_t token, int64_t T, int64_t H, int64_t V, int32_t dtype)',
  nn_zero_grad: 'int32_t nn_zero_grad(uint64_t context, uint64_t gradient, int64_t n)',
  nn_grad_norm: 'int32_t nn_grad_norm(uint64_t context, uint64_t sum_of_squares, uint64_t gradient, int64_t n)',
  nn_grad_clip: 'int32_t nn_grad_clip(uint64_t context, uint64_t control, uint64_t sum_of_squares, double clip)',
  nn_adamw_step: 'int32_t nn_adamw_step(uint64_t context, uint64_t parameter, uint64_t residue, uint64_t m, uint64_t v, uint64_t gradient, uint64_t control, uint64_t schedule, int64_t n, double beta1, double beta2, double epsilon, double decay, int32_t state_dtype, int32_t dtype)',
  nn_argmax: 'int32_t nn_argmax(uint64_t context, uint64_t token, uint64_t logits, int64_t B, int64_t V, int32_t dtype)',
  nn_sample: 'int32_t nn_sample(uint64_t context, uint64_t token, uint64_t logits, uint64_t counter, int64_t B, int64_t V, float temperature, uint64_t seed, int32_t dtype)',
  nn_topk_sample: 'int32_t nn_topk_sample(uint64_t context, uint64_t token, uint64_t logits, uint64_t counter, int64_t B, int64_t V, int64_t top_k, float temperature, uint64_t seed, int32_t dtype)',
  nn_topp_sample: 'int32_t nn_topp_sample(uint64_t context, uint64_t token, uint64_t logits, uint64_t counter, int64_t B, int64_t V, float top_p, float temperature, uint64_t seed, int32_t dtype)',
  nn_decode_attention: 'int32_t nn_decode_attention(uint64_t context, uint64_t out, uint64_t key_cache, uint64_t value_cache, uint64_t x, uint64_t start, uint64_t cosine, uint64_t sine, uint64_t norm, uint64_t qkv_weight, uint64_t output_weight, int64_t B, int64_t C, int64_t H, int64_t Q, int64_t G, int64_t D, int64_t positions, float epsilon, int32_t dtype)',
  nn_decode_moe: 'int32_t nn_decode_moe(uint64_t context, uint64_t out, uint64_t x, uint64_t norm, uint64_t router, uint64_t gate_up_weight, uint64_t down_weight, int64_t T, int64_t H, int64_t F, int64_t E, int64_t K, float epsilon, int32_t dtype)',
  nn_advance: 'int32_t nn_advance(uint64_t context, uint64_t history, uint64_t start, uint64_t counter, uint64_t step, uint64_t token, int64_t B, int64_t R)',
} as const;

/** The functions of a loaded library. Each returns a status of nn.h, but for nn_abi_version. */
export interface Native {
  readonly nn_abi_version: () => number;
  readonly nn_device_count: (count: Int32Array) => number;
  readonly nn_device_describe: (json: Uint8Array, device: number, capacity: number) => number;
  readonly nn_context_create: (context: BigUint64Array, device: number, threads: number) => number;
  readonly nn_context_destroy: (context: number) => number;
  readonly nn_error_message: (context: number, text: Uint8Array, capacity: number) => number;
  readonly nn_peak_flops: (context: number, flops: Float64Array, seconds: number) => number;
  readonly nn_allocate: (context: number, address: BigUint64Array, bytes: number) => number;
  readonly nn_free: (context: number, address: number) => number;
  readonly nn_set_workspace: (context: number, address: number, bytes: number) => number;
  readonly nn_workspace_bytes: (context: number, bytes: BigInt64Array, T: number, S: number, H: number, F: number, E: number, K: number, V: number, Q: number, G: number, D: number, dtype: number) => number;
  readonly nn_copy_to_device: (context: number, destination: number, source: TypedArray, bytes: number) => number;
  readonly nn_copy_to_host: (context: number, destination: TypedArray, source: number, bytes: number) => number;
  readonly nn_copy: (context: number, destination: number, source: number, bytes: number) => number;
  readonly nn_synchronize: (context: number) => number;
  readonly nn_graph_begin: (context: number) => number;
  readonly nn_graph_end: (context: number, graph: BigUint64Array) => number;
  readonly nn_graph_launch: (context: number, graph: number) => number;
  readonly nn_graph_destroy: (context: number, graph: number) => number;
  readonly nn_timer_start: (context: number, timer: BigUint64Array) => number;
  readonly nn_timer_stop: (context: number, milliseconds: Float64Array, timer: number) => number;
  readonly nn_silu_forward: (context: number, y: number, x: number, n: number, dtype: number) => number;
  readonly nn_silu_backward: (context: number, dx: number, dy: number, x: number, n: number, dtype: number) => number;
  readonly nn_add: (context: number, y: number, a: number, b: number, n: number, dtype: number) => number;
  readonly nn_mul: (context: number, y: number, a: number, b: number, n: number, dtype: number) => number;
  readonly nn_scale: (context: number, y: number, x: number, n: number, factor: number, dtype: number) => number;
  readonly nn_cast: (context: number, y: number, x: number, n: number, outDtype: number, dtype: number) => number;
  readonly nn_split: (context: number, high: number, low: number, x: number, n: number) => number;
  readonly nn_join: (context: number, x: number, high: number, low: number, n: number) => number;
  readonly nn_swiglu_forward: (context: number, h: number, gateUp: number, rows: number, F: number, dtype: number) => number;
  readonly nn_swiglu_backward: (context: number, dgateUp: number, dh: number, gateUp: number, rows: number, F: number, dtype: number) => number;
  readonly nn_sum: (context: number, out: number, x: number, n: number) => number;
  readonly nn_digest: (context: number, digest: number, x: number, words: number) => number;
  readonly nn_digest_halves: (context: number, digest: number, high: number, low: number, n: number) => number;
  readonly nn_random_normal: (context: number, x: number, n: number, seed: number, stream: number, offset: number, standardDeviation: number) => number;
  readonly nn_softmax_forward: (context: number, y: number, x: number, rows: number, columns: number, dtype: number) => number;
  readonly nn_softmax_backward: (context: number, dx: number, dy: number, y: number, rows: number, columns: number, dtype: number) => number;
  readonly nn_softmax_topk_forward: (context: number, probability: number, weight: number, index: number, logits: number, T: number, E: number, K: number) => number;
  readonly nn_softmax_topk_backward: (context: number, dlogits: number, dweight: number, probability: number, weight: number, index: number, load: number, T: number, E: number, K: number, auxScale: number) => number;
  readonly nn_rmsnorm_forward: (context: number, y: number, reciprocal: number, x: number, weight: number, T: number, H: number, epsilon: number, dtype: number) => number;
  readonly nn_rmsnorm_backward: (context: number, dx: number, dweight: number, dy: number, x: number, reciprocal: number, weight: number, T: number, H: number, dtype: number) => number;
  readonly nn_rmsnorm_residual_forward: (context: number, sum: number, y: number, reciprocal: number, x: number, delta: number, weight: number, T: number, H: number, epsilon: number, dtype: number) => number;
  readonly nn_rmsnorm_residual_backward: (context: number, dx: number, dweight: number, dy: number, dsum: number, sum: number, reciprocal: number, weight: number, T: number, H: number, dtype: number) => number;
  readonly nn_gemm: (context: number, c: number, a: number, b: number, m: number, n: number, k: number, transposeA: number, transposeB: number, outDtype: number, dtype: number) => number;
  readonly nn_gemm_beta: (context: number, c: number, a: number, b: number, m: number, n: number, k: number, transposeA: number, transposeB: number, alpha: number, beta: number, outDtype: number, dtype: number) => number;
  readonly nn_gemm_batched: (context: number, c: number, a: number, b: number, batch: number, m: number, n: number, k: number, transposeA: number, transposeB: number, outDtype: number, dtype: number) => number;
  readonly nn_rope_freqs: (context: number, cosine: number, sine: number, positions: number, D: number, base: number, ntkAlpha: number) => number;
  readonly nn_rope_forward: (context: number, y: number, x: number, position: number, cosine: number, sine: number, T: number, heads: number, D: number, positions: number, direction: number, dtype: number) => number;
  readonly nn_rope_qk: (context: number, qkv: number, position: number, cosine: number, sine: number, T: number, Q: number, G: number, D: number, positions: number, direction: number, dtype: number) => number;
  readonly nn_attention_scores: (context: number, score: number, qkv: number, B: number, S: number, Q: number, G: number, D: number, dtype: number) => number;
  readonly nn_attention_output: (context: number, out: number, probability: number, qkv: number, B: number, S: number, Q: number, G: number, D: number, dtype: number) => number;
  readonly nn_flash_attention_forward: (context: number, out: number, logSumExp: number, qkv: number, B: number, S: number, Q: number, G: number, D: number, dtype: number) => number;
  readonly nn_flash_attention_backward: (context: number, dqkv: number, dout: number, out: number, logSumExp: number, qkv: number, B: number, S: number, Q: number, G: number, D: number, dtype: number) => number;
  readonly nn_cache_append: (context: number, keyCache: number, valueCache: number, qkv: number, start: number, B: number, S: number, C: number, Q: number, G: number, D: number, dtype: number) => number;
  readonly nn_attention_cached: (context: number, out: number, qkv: number, keyCache: number, valueCache: number, start: number, B: number, S: number, C: number, Q: number, G: number, D: number, dtype: number) => number;
  readonly nn_moe_permute: (context: number, offsets: number, load: number, slotToken: number, slotWeight: number, slotOf: number, index: number, weight: number, T: number, E: number, K: number) => number;
  readonly nn_moe_up_forward: (context: number, h: number, gateUp: number, x: number, slotToken: number, offsets: number, gateUpWeight: number, T: number, H: number, F: number, E: number, K: number, dtype: number) => number;
  readonly nn_moe_down_forward: (context: number, y: number, h: number, offsets: number, downWeight: number, T: number, H: number, F: number, E: number, K: number, dtype: number) => number;
  readonly nn_moe_combine: (context: number, out: number, base: number, y: number, weight: number, slotOf: number, T: number, H: number, K: number, dtype: number) => number;
  readonly nn_moe_down_backward: (context: number, dgateUp: number, h: number, dweight: number, dout: number, gateUp: number, slotToken: number, slotWeight: number, slotOf: number, offsets: number, downWeight: number, T: number, H: number, F: number, E: number, K: number, dtype: number) => number;
  readonly nn_moe_down_weight_gradient: (context: number, ddownWeight: number, dout: number, h: number, slotToken: number, slotWeight: number, offsets: number, T: number, H: number, F: number, E: number, K: number, accumulate: number, dtype: number) => number;
  readonly nn_moe_up_backward: (context: number, dxSlots: number, dgateUp: number, offsets: number, gateUpWeight: number, T: number, H: number, F: number, E: number, K: number, dtype: number) => number;
  readonly nn_moe_up_weight_gradient: (context: number, dgateUpWeight: number, dgateUp: number, x: number, slotToken: number, offsets: number, T: number, H: number, F: number, E: number, K: number, accumulate: number, dtype: number) => number;
  readonly nn_cross_entropy_forward: (context: number, loss: number, logits: number, target: number, T: number, V: number, dtype: number) => number;
  readonly nn_cross_entropy_backward: (context: number, dlogits: number, logits: number, target: number, T: number, V: number, scale: number, dtype: number) => number;
  readonly nn_linear_cross_entropy: (context: number, loss: number, dx: number, dweight: number, x: number, target: number, weight: number, T: number, H: number, V: number, scale: number, dtype: number) => number;
  readonly nn_aux_loss: (context: number, aux: number, probability: number, load: number, T: number, E: number, K: number) => number;
  readonly nn_embedding_forward: (context: number, y: number, token: number, table: number, T: number, H: number, V: number, dtype: number) => number;
  readonly nn_scatter_add: (context: number, dtable: number, dy: number, token: number, T: number, H: number, V: number, dtype: number) => number;
  readonly nn_zero_grad: (context: number, gradient: number, n: number) => number;
  readonly nn_grad_norm: (context: number, sumOfSquares: number, gradient: number, n: number) => number;
  readonly nn_grad_clip: (context: number, control: number, sumOfSquares: number, clip: number) => number;
  readonly nn_adamw_step: (context: number, parameter: number, residue: number, m: number, v: number, gradient: number, control: number, schedule: number, n: number, beta1: number, beta2: number, epsilon: number, decay: number, stateDtype: number, dtype: number) => number;
  readonly nn_argmax: (context: number, token: number, logits: number, B: number, V: number, dtype: number) => number;
  readonly nn_sample: (context: number, token: number, logits: number, counter: number, B: number, V: number, temperature: number, seed: number, dtype: number) => number;
  readonly nn_topk_sample: (context: number, token: number, logits: number, counter: number, B: number, V: number, topK: number, temperature: number, seed: number, dtype: number) => number;
  readonly nn_topp_sample: (context: number, token: number, logits: number, counter: number, B: number, V: number, topP: number, temperature: number, seed: number, dtype: number) => number;
  readonly nn_decode_attention: (context: number, out: number, keyCache: number, valueCache: number, x: number, start: number, cosine: number, sine: number, norm: number, qkvWeight: number, outputWeight: number, B: number, C: number, H: number, Q: number, G: number, D: number, positions: number, epsilon: number, dtype: number) => number;
  readonly nn_decode_moe: (context: number, out: number, x: number, norm: number, router: number, gateUpWeight: number, downWeight: number, T: number, H: number, F: number, E: number, K: number, epsilon: number, dtype: number) => number;
  readonly nn_advance: (context: number, history: number, start: number, counter: number, step: number, token: number, B: number, R: number) => number;
}

/** Throws the error that belongs to a status other than NN_OK. */
export type Fail = (kernel: string, status: number) => never;

/** Every kernel of nn.h on one context. A tensor of another type, or too short for the sizes, is a bug: plain Error. */
export class Kernels {
  readonly #native: Native;
  readonly #context: number;
  readonly #fail: Fail;

  constructor(native: Native, context: number, fail: Fail) {
    this.#native = native;
    this.#context = context;
    this.#fail = fail;
  }

  copyToDevice(destination: Tensor, source: TypedArray, bytes: number): void {
    if (!(bytesOf(destination) >= bytes)) refuse('copy_to_device', 'destination', destination, 'u8', bytes);
    if (!(source.byteLength >= bytes)) refuse('copy_to_device', 'source', source, 'host u8', bytes);
    const status = this.#native.nn_copy_to_device(this.#context, destination.address, source, bytes);
    if (status !== 0) this.#fail('nn_copy_to_device', status);
  }

  /** Waits for the stream, then copies. */
  copyToHost(destination: TypedArray, source: Tensor, bytes: number): void {
    if (!(destination.byteLength >= bytes)) refuse('copy_to_host', 'destination', destination, 'host u8', bytes);
    if (!(bytesOf(source) >= bytes)) refuse('copy_to_host', 'source', source, 'u8', bytes);
    const status = this.#native.nn_copy_to_host(this.#context, destination, source.address, bytes);
    if (status !== 0) this.#fail('nn_copy_to_host', status);
  }

  copy(destination: Tensor, source: Tensor, bytes: number): void {
    if (!(bytesOf(destination) >= bytes)) refuse('copy', 'destination', destination, 'u8', bytes);
    if (!(bytesOf(source) >= bytes)) refuse('copy', 'source', source, 'u8', bytes);
    const status = this.#native.nn_copy(this.#context, destination.address, source.address, bytes);
    if (status !== 0) this.#fail('nn_copy', status);
  }

  /** y = x * sigmoid(x). y may be x. */
  siluForward(y: Tensor, x: Tensor, n: number, dtype: ComputeType): void {
    if (y.dtype !== dtype || !(y.length >= n)) refuse('silu_forward', 'y', y, dtype, n);
    if (x.dtype !== dtype || !(x.length >= n)) refuse('silu_forward', 'x', x, dtype, n);
    const status = this.#native.nn_silu_forward(this.#context, y.address, x.address, n, code(dtype));
    if (status !== 0) this.#fail('nn_silu_forward', status);
  }

  /** dx = dy * s * (1 + x * (1 - s)), s = sigmoid(x). dx may be dy. */
  siluBackward(dx: Tensor, dy: Tensor, x: Tensor, n: number, dtype: ComputeType): void {
    if (dx.dtype !== dtype || !(dx.length >= n)) refuse('silu_backward', 'dx', dx, dtype, n);
    if (dy.dtype !== dtype || !(dy.length >= n)) refuse('silu_backward', 'dy', dy, dtype, n);
    if (x.dtype !== dtype || !(x.length >= n)) refuse('silu_backward', 'x', x, dtype, n);
    const status = this.#native.nn_silu_backward(this.#context, dx.address, dy.address, x.address, n, code(dtype));
    if (status !== 0) this.#fail('nn_silu_backward', status);
  }

  /** y = a + b. y may be a or b. */
  add(y: Tensor, a: Tensor, b: Tensor, n: number, dtype: ComputeType): void {
    if (y.dtype !== dtype || !(y.length >= n)) refuse('add', 'y', y, dtype, n);
    if (a.dtype !== dtype || !(a.length >= n)) refuse('add', 'a', a, dtype, n);
    if (b.dtype !== dtype || !(b.length >= n)) refuse('add', 'b', b, dtype, n);
    const status = this.#native.nn_add(this.#context, y.address, a.address, b.address, n, code(dtype));
    if (status !== 0) this.#fail('nn_add', status);
  }

  /** y = a * b, element by element (its backward is two more of it). y may be a or b. */
  mul(y: Tensor, a: Tensor, b: Tensor, n: number, dtype: ComputeType): void {
    if (y.dtype !== dtype || !(y.length >= n)) refuse('mul', 'y', y, dtype, n);
    if (a.dtype !== dtype || !(a.length >= n)) refuse('mul', 'a', a, dtype, n);
    if (b.dtype !== dtype || !(b.length >= n)) refuse('mul', 'b', b, dtype, n);
    const status = this.#native.nn_mul(this.#context, y.address, a.address, b.address, n, code(dtype));
    if (status !== 0) this.#fail('nn_mul', status);
  }

  /** y = x * factor. y may be x. */
  scale(y: Tensor, x: Tensor, n: number, factor: number, dtype: ComputeType): void {
    if (y.dtype !== dtype || !(y.length >= n)) refuse('scale', 'y', y, dtype, n);
    if (x.dtype !== dtype || !(x.length >= n)) refuse('scale', 'x', x, dtype, n);
    const status = this.#native.nn_scale(this.#context, y.address, x.address, n, factor, code(dtype));
    if (status !== 0) this.#fail('nn_scale', status);
  }

  /** y = x, converted from `dtype` to `out_dtype`, round to nearest even. */
  cast(y: Tensor, x: Tensor, n: number, outDtype: ComputeType, dtype: ComputeType): void {
    if (y.dtype !== outDtype || !(y.length >= n)) refuse('cast', 'y', y, outDtype, n);
    if (x.dtype !== dtype || !(x.length >= n)) refuse('cast', 'x', x, dtype, n);
    const status = this.#native.nn_cast(this.#context, y.address, x.address, n, code(outDtype), code(dtype));
    if (status !== 0) this.#fail('nn_cast', status);
  }

  /** float32 numbers as two halves of 16 bits (cuda/include/nn_halves.h): high is x rounded to the nearest bfloat16, ties away from
   * zero, low the low 16 bits of x. Together they are x to the bit, a zero's sign and infinities too; but every NaN is 0x7FC00000. */
  split(high: Tensor, low: Tensor, x: Tensor, n: number): void {
    if (high.dtype !== 'bf16' || !(high.length >= n)) refuse('split', 'high', high, 'bf16', n);
    if (low.dtype !== 'u16' || !(low.length >= n)) refuse('split', 'low', low, 'u16', n);
    if (x.dtype !== 'f32' || !(x.length >= n)) refuse('split', 'x', x, 'f32', n);
    const status = this.#native.nn_split(this.#context, high.address, low.address, x.address, n);
    if (status !== 0) this.#fail('nn_split', status);
  }

  /** The float32 numbers whose halves these are: the inverse of nn_split. */
  join(x: Tensor, high: Tensor, low: Tensor, n: number): void {
    if (x.dtype !== 'f32' || !(x.length >= n)) refuse('join', 'x', x, 'f32', n);
    if (high.dtype !== 'bf16' || !(high.length >= n)) refuse('join', 'high', high, 'bf16', n);
    if (low.dtype !== 'u16' || !(low.length >= n)) refuse('join', 'low', low, 'u16', n);
    const status = this.#native.nn_join(this.#context, x.address, high.address, low.address, n);
    if (status !== 0) this.#fail('nn_join', status);
  }

  /** h = silu(gate) * up, where each row of gate_up is [gate (F) | up (F)]. */
  swigluForward(h: Tensor, gateUp: Tensor, rows: number, F: number, dtype: ComputeType): void {
    if (h.dtype !== dtype || !(h.length >= rows * F)) refuse('swiglu_forward', 'h', h, dtype, rows * F);
    if (gateUp.dtype !== dtype || !(gateUp.length >= rows * 2 * F)) refuse('swiglu_forward', 'gateUp', gateUp, dtype, rows * 2 * F);
    const status = this.#native.nn_swiglu_forward(this.#context, h.address, gateUp.address, rows, F, code(dtype));
    if (status !== 0) this.#fail('nn_swiglu_forward', status);
  }

  /** dgate = dh * up * silu'(gate), dup = dh * silu(gate). dgate_up may be gate_up. */
  swigluBackward(dgateUp: Tensor, dh: Tensor, gateUp: Tensor, rows: number, F: number, dtype: ComputeType): void {
    if (dgateUp.dtype !== dtype || !(dgateUp.length >= rows * 2 * F)) refuse('swiglu_backward', 'dgateUp', dgateUp, dtype, rows * 2 * F);
    if (dh.dtype !== dtype || !(dh.length >= rows * F)) refuse('swiglu_backward', 'dh', dh, dtype, rows * F);
    if (gateUp.dtype !== dtype || !(gateUp.length >= rows * 2 * F)) refuse('swiglu_backward', 'gateUp', gateUp, dtype, rows * 2 * F);
    const status = this.#native.nn_swiglu_backward(this.#context, dgateUp.address, dh.address, gateUp.address, rows, F, code(dtype));
    if (status !== 0) this.#fail('nn_swiglu_backward', status);
  }

  /** out = sum of x in float64, in the fixed order of nn_grad_norm. */
  sum(out: Tensor, x: Tensor, n: number): void {
    if (out.dtype !== 'f64' || !(out.length >= 1)) refuse('sum', 'out', out, 'f64', 1);
    if (x.dtype !== 'f32' || !(x.length >= n)) refuse('sum', 'x', x, 'f32', n);
    const status = this.#native.nn_sum(this.#context, out.address, x.address, n);
    if (status !== 0) this.#fail('nn_sum', status);
  }

  /** A 128-bit digest of `words` 32-bit words: two sums modulo 2^64 over i of mix64(word[i] + (i+1) * odd constant), with
   * mix64 the finaliser of splitmix64 and another constant for each sum (cuda/include/nn_random.h). Integer sums have no
   * order, so every device gives the same digest for the same bits. The padding words of a plan are part of it. */
  digest(digest: Tensor, x: Tensor, words: number): void {
    if (digest.dtype !== 'u64' || !(digest.length >= 2)) refuse('digest', 'digest', digest, 'u64', 2);
    if (!(bytesOf(x) >= words * 4)) refuse('digest', 'x', x, 'u8', words * 4);
    const status = this.#native.nn_digest(this.#context, digest.address, x.address, words);
    if (status !== 0) this.#fail('nn_digest', status);
  }

  /** nn_digest of the float32 numbers whose halves these are (nn_split). */
  digestHalves(digest: Tensor, high: Tensor, low: Tensor, n: number): void {
    if (digest.dtype !== 'u64' || !(digest.length >= 2)) refuse('digest_halves', 'digest', digest, 'u64', 2);
    if (high.dtype !== 'bf16' || !(high.length >= n)) refuse('digest_halves', 'high', high, 'bf16', n);
    if (low.dtype !== 'u16' || !(low.length >= n)) refuse('digest_halves', 'low', low, 'u16', n);
    const status = this.#native.nn_digest_halves(this.#context, digest.address, high.address, low.address, n);
    if (status !== 0) this.#fail('nn_digest_halves', status);
  }

  /** Draws x[i] = standard_deviation * z(seed, stream, offset + i) from a counter-based generator (Philox 4x32-10) and an
   * inverse normal distribution in float64 made of IEEE operations only (cuda/include/nn_random.h), rounded once to
   * float32: the same bits on every machine. */
  randomNormal(x: Tensor, n: number, seed: number, stream: number, offset: number, standardDeviation: number): void {
    if (x.dtype !== 'f32' || !(x.length >= n)) refuse('random_normal', 'x', x, 'f32', n);
    const status = this.#native.nn_random_normal(this.#context, x.address, n, seed, stream, offset, standardDeviation);
    if (status !== 0) this.#fail('nn_random_normal', status);
  }

  /** y[r] = softmax(x[r]) in float32 whatever the dtype, the row's maximum subtracted. y may be x. */
  softmaxForward(y: Tensor, x: Tensor, rows: number, columns: number, dtype: ComputeType): void {
    if (y.dtype !== dtype || !(y.length >= rows * columns)) refuse('softmax_forward', 'y', y, dtype, rows * columns);
    if (x.dtype !== dtype || !(x.length >= rows * columns)) refuse('softmax_forward', 'x', x, dtype, rows * columns);
    const status = this.#native.nn_softmax_forward(this.#context, y.address, x.address, rows, columns, code(dtype));
    if (status !== 0) this.#fail('nn_softmax_forward', status);
  }

  /** dx = y * (dy - sum(y * dy)). dx may be dy. */
  softmaxBackward(dx: Tensor, dy: Tensor, y: Tensor, rows: number, columns: number, dtype: ComputeType): void {
    if (dx.dtype !== dtype || !(dx.length >= rows * columns)) refuse('softmax_backward', 'dx', dx, dtype, rows * columns);
    if (dy.dtype !== dtype || !(dy.length >= rows * columns)) refuse('softmax_backward', 'dy', dy, dtype, rows * columns);
    if (y.dtype !== dtype || !(y.length >= rows * columns)) refuse('softmax_backward', 'y', y, dtype, rows * columns);
    const status = this.#native.nn_softmax_backward(this.#context, dx.address, dy.address, y.address, rows, columns, code(dtype));
    if (status !== 0) this.#fail('nn_softmax_backward', status);
  }

  /** The router: probability = softmax over all E, then the K largest in falling order (ties to the lower index), their
   * probabilities divided by their sum. Requires K <= E. NaN logits sort first and make NaN weights. */
  softmaxTopkForward(probability: Tensor, weight: Tensor, index: Tensor, logits: Tensor, T: number, E: number, K: number): void {
    if (probability.dtype !== 'f32' || !(probability.length >= T * E)) refuse('softmax_topk_forward', 'probability', probability, 'f32', T * E);
    if (weight.dtype !== 'f32' || !(weight.length >= T * K)) refuse('softmax_topk_forward', 'weight', weight, 'f32', T * K);
    if (index.dtype !== 'i32' || !(index.length >= T * K)) refuse('softmax_topk_forward', 'index', index, 'i32', T * K);
    if (logits.dtype !== 'f32' || !(logits.length >= T * E)) refuse('softmax_topk_forward', 'logits', logits, 'f32', T * E);
    const status = this.#native.nn_softmax_topk_forward(this.#context, probability.address, weight.address, index.address, logits.address, T, E, K);
    if (status !== 0) this.#fail('nn_softmax_topk_forward', status);
  }

  /** The router's backward, with the aux loss: dprobability[t, i] = aux_scale * E * f_i / T + (through the renormalised top-K
   * weights), then through the softmax. f_i = load[i] / (T*K). aux_scale: aux loss weight / (microbatches of the step). */
  softmaxTopkBackward(dlogits: Tensor, dweight: Tensor, probability: Tensor, weight: Tensor, index: Tensor, load: Tensor, T: number, E: number, K: number, auxScale: number): void {
    if (dlogits.dtype !== 'f32' || !(dlogits.length >= T * E)) refuse('softmax_topk_backward', 'dlogits', dlogits, 'f32', T * E);
    if (dweight.dtype !== 'f32' || !(dweight.length >= T * K)) refuse('softmax_topk_backward', 'dweight', dweight, 'f32', T * K);
    if (probability.dtype !== 'f32' || !(probability.length >= T * E)) refuse('softmax_topk_backward', 'probability', probability, 'f32', T * E);
    if (weight.dtype !== 'f32' || !(weight.length >= T * K)) refuse('softmax_topk_backward', 'weight', weight, 'f32', T * K);
    if (index.dtype !== 'i32' || !(index.length >= T * K)) refuse('softmax_topk_backward', 'index', index, 'i32', T * K);
    if (load.dtype !== 'i32' || !(load.length >= E)) refuse('softmax_topk_backward', 'load', load, 'i32', E);
    const status = this.#native.nn_softmax_topk_backward(this.#context, dlogits.address, dweight.address, probability.address, weight.address, index.address, load.address, T, E, K, auxScale);
    if (status !== 0) this.#fail('nn_softmax_topk_backward', status);
  }

  /** reciprocal[t] = 1 / sqrt(mean(x[t]^2) + epsilon); y = x * reciprocal * weight. Zhang and Sennrich, arXiv 1910.07467. */
  rmsnormForward(y: Tensor, reciprocal: Tensor, x: Tensor, weight: Tensor, T: number, H: number, epsilon: number, dtype: ComputeType): void {
    if (y.dtype !== dtype || !(y.length >= T * H)) refuse('rmsnorm_forward', 'y', y, dtype, T * H);
    if (reciprocal.dtype !== 'f32' || !(reciprocal.length >= T)) refuse('rmsnorm_forward', 'reciprocal', reciprocal, 'f32', T);
    if (x.dtype !== dtype || !(x.length >= T * H)) refuse('rmsnorm_forward', 'x', x, dtype, T * H);
    if (weight.dtype !== dtype || !(weight.length >= H)) refuse('rmsnorm_forward', 'weight', weight, dtype, H);
    const status = this.#native.nn_rmsnorm_forward(this.#context, y.address, reciprocal.address, x.address, weight.address, T, H, epsilon, code(dtype));
    if (status !== 0) this.#fail('nn_rmsnorm_forward', status);
  }

  /** dx = the gradient of x; dweight += sum over t of dy * x * reciprocal. dx may be dy. */
  rmsnormBackward(dx: Tensor, dweight: Tensor, dy: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, T: number, H: number, dtype: ComputeType): void {
    if (dx.dtype !== dtype || !(dx.length >= T * H)) refuse('rmsnorm_backward', 'dx', dx, dtype, T * H);
    if (dweight.dtype !== 'f32' || !(dweight.length >= H)) refuse('rmsnorm_backward', 'dweight', dweight, 'f32', H);
    if (dy.dtype !== dtype || !(dy.length >= T * H)) refuse('rmsnorm_backward', 'dy', dy, dtype, T * H);
    if (x.dtype !== dtype || !(x.length >= T * H)) refuse('rmsnorm_backward', 'x', x, dtype, T * H);
    if (reciprocal.dtype !== 'f32' || !(reciprocal.length >= T)) refuse('rmsnorm_backward', 'reciprocal', reciprocal, 'f32', T);
    if (weight.dtype !== dtype || !(weight.length >= H)) refuse('rmsnorm_backward', 'weight', weight, dtype, H);
    const status = this.#native.nn_rmsnorm_backward(this.#context, dx.address, dweight.address, dy.address, x.address, reciprocal.address, weight.address, T, H, code(dtype));
    if (status !== 0) this.#fail('nn_rmsnorm_backward', status);
  }

  /** sum = x + delta; y = rmsnorm(sum). sum may be x. */
  rmsnormResidualForward(sum: Tensor, y: Tensor, reciprocal: Tensor, x: Tensor, delta: Tensor, weight: Tensor, T: number, H: number, epsilon: number, dtype: ComputeType): void {
    if (sum.dtype !== dtype || !(sum.length >= T * H)) refuse('rmsnorm_residual_forward', 'sum', sum, dtype, T * H);
    if (y.dtype !== dtype || !(y.length >= T * H)) refuse('rmsnorm_residual_forward', 'y', y, dtype, T * H);
    if (reciprocal.dtype !== 'f32' || !(reciprocal.length >= T)) refuse('rmsnorm_residual_forward', 'reciprocal', reciprocal, 'f32', T);
    if (x.dtype !== dtype || !(x.length >= T * H)) refuse('rmsnorm_residual_forward', 'x', x, dtype, T * H);
    if (delta.dtype !== dtype || !(delta.length >= T * H)) refuse('rmsnorm_residual_forward', 'delta', delta, dtype, T * H);
    if (weight.dtype !== dtype || !(weight.length >= H)) refuse('rmsnorm_residual_forward', 'weight', weight, dtype, H);
    const status = this.#native.nn_rmsnorm_residual_forward(this.#context, sum.address, y.address, reciprocal.address, x.address, delta.address, weight.address, T, H, epsilon, code(dtype));
    if (status !== 0) this.#fail('nn_rmsnorm_residual_forward', status);
  }

  /** dx = dsum + (gradient through the norm); dweight as in nn_rmsnorm_backward. `sum` is the norm's input, `dsum` the
   * gradient that reaches it past the norm. dx may be dsum. */
  rmsnormResidualBackward(dx: Tensor, dweight: Tensor, dy: Tensor, dsum: Tensor, sum: Tensor, reciprocal: Tensor, weight: Tensor, T: number, H: number, dtype: ComputeType): void {
    if (dx.dtype !== dtype || !(dx.length >= T * H)) refuse('rmsnorm_residual_backward', 'dx', dx, dtype, T * H);
    if (dweight.dtype !== 'f32' || !(dweight.length >= H)) refuse('rmsnorm_residual_backward', 'dweight', dweight, 'f32', H);
    if (dy.dtype !== dtype || !(dy.length >= T * H)) refuse('rmsnorm_residual_backward', 'dy', dy, dtype, T * H);
    if (dsum.dtype !== dtype || !(dsum.length >= T * H)) refuse('rmsnorm_residual_backward', 'dsum', dsum, dtype, T * H);
    if (sum.dtype !== dtype || !(sum.length >= T * H)) refuse('rmsnorm_residual_backward', 'sum', sum, dtype, T * H);
    if (reciprocal.dtype !== 'f32' || !(reciprocal.length >= T)) refuse('rmsnorm_residual_backward', 'reciprocal', reciprocal, 'f32', T);
    if (weight.dtype !== dtype || !(weight.length >= H)) refuse('rmsnorm_residual_backward', 'weight', weight, dtype, H);
    const status = this.#native.nn_rmsnorm_residual_backward(this.#context, dx.address, dweight.address, dy.address, dsum.address, sum.address, reciprocal.address, weight.address, T, H, code(dtype));
    if (status !== 0) this.#fail('nn_rmsnorm_residual_backward', status);
  }

  /** C = op(A) op(B). */
  gemm(c: Tensor, a: Tensor, b: Tensor, m: number, n: number, k: number, transposeA: number, transposeB: number, outDtype: ComputeType, dtype: ComputeType): void {
    if (c.dtype !== outDtype || !(c.length >= m * n)) refuse('gemm', 'c', c, outDtype, m * n);
    if (a.dtype !== dtype || !(a.length >= m * k)) refuse('gemm', 'a', a, dtype, m * k);
    if (b.dtype !== dtype || !(b.length >= k * n)) refuse('gemm', 'b', b, dtype, k * n);
    const status = this.#native.nn_gemm(this.#context, c.address, a.address, b.address, m, n, k, transposeA, transposeB, code(outDtype), code(dtype));
    if (status !== 0) this.#fail('nn_gemm', status);
  }

  /** C = alpha * op(A) op(B) + beta * C, the product summed wholly before it is added. beta = 0 does not read C. */
  gemmBeta(c: Tensor, a: Tensor, b: Tensor, m: number, n: number, k: number, transposeA: number, transposeB: number, alpha: number, beta: number, outDtype: ComputeType, dtype: ComputeType): void {
    if (c.dtype !== outDtype || !(c.length >= m * n)) refuse('gemm_beta', 'c', c, outDtype, m * n);
    if (a.dtype !== dtype || !(a.length >= m * k)) refuse('gemm_beta', 'a', a, dtype, m * k);
    if (b.dtype !== dtype || !(b.length >= k * n)) refuse('gemm_beta', 'b', b, dtype, k * n);
    const status = this.#native.nn_gemm_beta(this.#context, c.address, a.address, b.address, m, n, k, transposeA, transposeB, alpha, beta, code(outDtype), code(dtype));
    if (status !== 0) this.#fail('nn_gemm_beta', status);
  }

  /** C[i] = op(A[i]) op(B[i]) for `batch` packed matrices. */
  gemmBatched(c: Tensor, a: Tensor, b: Tensor, batch: number, m: number, n: number, k: number, transposeA: number, transposeB: number, outDtype: ComputeType, dtype: ComputeType): void {
    if (c.dtype !== outDtype || !(c.length >= batch * m * n)) refuse('gemm_batched', 'c', c, outDtype, batch * m * n);
    if (a.dtype !== dtype || !(a.length >= batch * m * k)) refuse('gemm_batched', 'a', a, dtype, batch * m * k);
    if (b.dtype !== dtype || !(b.length >= batch * k * n)) refuse('gemm_batched', 'b', b, dtype, batch * k * n);
    const status = this.#native.nn_gemm_batched(this.#context, c.address, a.address, b.address, batch, m, n, k, transposeA, transposeB, code(outDtype), code(dtype));
    if (status !== 0) this.#fail('nn_gemm_batched', status);
  }

  /** cosine/sine[p, i] = cos/sin(p * base'^(-2i/D)) for positions p < positions and i < D/2, computed in float64, with
   * base' = base * ntk_alpha^(D/(D-2)). */
  ropeFreqs(cosine: Tensor, sine: Tensor, positions: number, D: number, base: number, ntkAlpha: number): void {
    if (cosine.dtype !== 'f32' || !(cosine.length >= positions * D / 2)) refuse('rope_freqs', 'cosine', cosine, 'f32', positions * D / 2);
    if (sine.dtype !== 'f32' || !(sine.length >= positions * D / 2)) refuse('rope_freqs', 'sine', sine, 'f32', positions * D / 2);
    const status = this.#native.nn_rope_freqs(this.#context, cosine.address, sine.address, positions, D, base, ntkAlpha);
    if (status !== 0) this.#fail('nn_rope_freqs', status);
  }

  /** Rotates each head of each row: (a, b) -> (a cos - b sin, b cos + a sin), a the head's first half and b its second.
   * Row t has position position[t] < positions. direction 1 is the forward, -1 the backward (the inverse). y may be x. */
  ropeForward(y: Tensor, x: Tensor, position: Tensor, cosine: Tensor, sine: Tensor, T: number, heads: number, D: number, positions: number, direction: number, dtype: ComputeType): void {
    if (y.dtype !== dtype || !(y.length >= T * heads * D)) refuse('rope_forward', 'y', y, dtype, T * heads * D);
    if (x.dtype !== dtype || !(x.length >= T * heads * D)) refuse('rope_forward', 'x', x, dtype, T * heads * D);
    if (position.dtype !== 'i32' || !(position.length >= T)) refuse('rope_forward', 'position', position, 'i32', T);
    if (cosine.dtype !== 'f32' || !(cosine.length >= positions * D / 2)) refuse('rope_forward', 'cosine', cosine, 'f32', positions * D / 2);
    if (sine.dtype !== 'f32' || !(sine.length >= positions * D / 2)) refuse('rope_forward', 'sine', sine, 'f32', positions * D / 2);
    const status = this.#native.nn_rope_forward(this.#context, y.address, x.address, position.address, cosine.address, sine.address, T, heads, D, positions, direction, code(dtype));
    if (status !== 0) this.#fail('nn_rope_forward', status);
  }

  /** Rotates the Q query and G key heads of qkv rows [q | k | v] in place and leaves v. */
  ropeQk(qkv: Tensor, position: Tensor, cosine: Tensor, sine: Tensor, T: number, Q: number, G: number, D: number, positions: number, direction: number, dtype: ComputeType): void {
    if (qkv.dtype !== dtype || !(qkv.length >= T * ((Q + 2 * G) * D))) refuse('rope_qk', 'qkv', qkv, dtype, T * ((Q + 2 * G) * D));
    if (position.dtype !== 'i32' || !(position.length >= T)) refuse('rope_qk', 'position', position, 'i32', T);
    if (cosine.dtype !== 'f32' || !(cosine.length >= positions * D / 2)) refuse('rope_qk', 'cosine', cosine, 'f32', positions * D / 2);
    if (sine.dtype !== 'f32' || !(sine.length >= positions * D / 2)) refuse('rope_qk', 'sine', sine, 'f32', positions * D / 2);
    const status = this.#native.nn_rope_qk(this.#context, qkv.address, position.address, cosine.address, sine.address, T, Q, G, D, positions, direction, code(dtype));
    if (status !== 0) this.#fail('nn_rope_qk', status);
  }

  /** score[b, h, i, j] = q . k * scale for j <= i, -infinity above. The plain way, for reading and for tests. */
  attentionScores(score: Tensor, qkv: Tensor, B: number, S: number, Q: number, G: number, D: number, dtype: ComputeType): void {
    if (score.dtype !== 'f32' || !(score.length >= B * Q * S * S)) refuse('attention_scores', 'score', score, 'f32', B * Q * S * S);
    if (qkv.dtype !== dtype || !(qkv.length >= B * S * ((Q + 2 * G) * D))) refuse('attention_scores', 'qkv', qkv, dtype, B * S * ((Q + 2 * G) * D));
    const status = this.#native.nn_attention_scores(this.#context, score.address, qkv.address, B, S, Q, G, D, code(dtype));
    if (status !== 0) this.#fail('nn_attention_scores', status);
  }

  /** out[b, i, h] = sum over j of probability[b, h, i, j] * v[b, j]. */
  attentionOutput(out: Tensor, probability: Tensor, qkv: Tensor, B: number, S: number, Q: number, G: number, D: number, dtype: ComputeType): void {
    if (out.dtype !== dtype || !(out.length >= B * S * Q * D)) refuse('attention_output', 'out', out, dtype, B * S * Q * D);
    if (probability.dtype !== 'f32' || !(probability.length >= B * Q * S * S)) refuse('attention_output', 'probability', probability, 'f32', B * Q * S * S);
    if (qkv.dtype !== dtype || !(qkv.length >= B * S * ((Q + 2 * G) * D))) refuse('attention_output', 'qkv', qkv, dtype, B * S * ((Q + 2 * G) * D));
    const status = this.#native.nn_attention_output(this.#context, out.address, probability.address, qkv.address, B, S, Q, G, D, code(dtype));
    if (status !== 0) this.#fail('nn_attention_output', status);
  }

  /** Attention in tiles with a running softmax; log_sum_exp is of the scaled scores. Dao, arXiv 2307.08691. */
  flashAttentionForward(out: Tensor, logSumExp: Tensor, qkv: Tensor, B: number, S: number, Q: number, G: number, D: number, dtype: ComputeType): void {
    if (out.dtype !== dtype || !(out.length >= B * S * Q * D)) refuse('flash_attention_forward', 'out', out, dtype, B * S * Q * D);
    if (logSumExp.dtype !== 'f32' || !(logSumExp.length >= B * Q * S)) refuse('flash_attention_forward', 'logSumExp', logSumExp, 'f32', B * Q * S);
    if (qkv.dtype !== dtype || !(qkv.length >= B * S * ((Q + 2 * G) * D))) refuse('flash_attention_forward', 'qkv', qkv, dtype, B * S * ((Q + 2 * G) * D));
    const status = this.#native.nn_flash_attention_forward(this.#context, out.address, logSumExp.address, qkv.address, B, S, Q, G, D, code(dtype));
    if (status !== 0) this.#fail('nn_flash_attention_forward', status);
  }

  flashAttentionBackward(dqkv: Tensor, dout: Tensor, out: Tensor, logSumExp: Tensor, qkv: Tensor, B: number, S: number, Q: number, G: number, D: number, dtype: ComputeType): void {
    if (dqkv.dtype !== dtype || !(dqkv.length >= B * S * ((Q + 2 * G) * D))) refuse('flash_attention_backward', 'dqkv', dqkv, dtype, B * S * ((Q + 2 * G) * D));
    if (dout.dtype !== dtype || !(dout.length >= B * S * Q * D)) refuse('flash_attention_backward', 'dout', dout, dtype, B * S * Q * D);
    if (out.dtype !== dtype || !(out.length >= B * S * Q * D)) refuse('flash_attention_backward', 'out', out, dtype, B * S * Q * D);
    if (logSumExp.dtype !== 'f32' || !(logSumExp.length >= B * Q * S)) refuse('flash_attention_backward', 'logSumExp', logSumExp, 'f32', B * Q * S);
    if (qkv.dtype !== dtype || !(qkv.length >= B * S * ((Q + 2 * G) * D))) refuse('flash_attention_backward', 'qkv', qkv, dtype, B * S * ((Q + 2 * G) * D));
    const status = this.#native.nn_flash_attention_backward(this.#context, dqkv.address, dout.address, out.address, logSumExp.address, qkv.address, B, S, Q, G, D, code(dtype));
    if (status !== 0) this.#fail('nn_flash_attention_backward', status);
  }

  /** Copies the keys and values of qkv rows into a cache: row (b, i) goes to position start[b] + i, which must be < C. */
  cacheAppend(keyCache: Tensor, valueCache: Tensor, qkv: Tensor, start: Tensor, B: number, S: number, C: number, Q: number, G: number, D: number, dtype: ComputeType): void {
    if (keyCache.dtype !== dtype || !(keyCache.length >= B * C * G * D)) refuse('cache_append', 'keyCache', keyCache, dtype, B * C * G * D);
    if (valueCache.dtype !== dtype || !(valueCache.length >= B * C * G * D)) refuse('cache_append', 'valueCache', valueCache, dtype, B * C * G * D);
    if (qkv.dtype !== dtype || !(qkv.length >= B * S * ((Q + 2 * G) * D))) refuse('cache_append', 'qkv', qkv, dtype, B * S * ((Q + 2 * G) * D));
    if (start.dtype !== 'i32' || !(start.length >= B)) refuse('cache_append', 'start', start, 'i32', B);
    const status = this.#native.nn_cache_append(this.#context, keyCache.address, valueCache.address, qkv.address, start.address, B, S, C, Q, G, D, code(dtype));
    if (status !== 0) this.#fail('nn_cache_append', status);
  }

  /** Attention of S new queries for each sequence over its cache, for prefill in pieces (S > 1) and decoding (S = 1):
   * query (b, i) sees positions 0 .. start[b] + i, which nn_cache_append has filled before. */
  attentionCached(out: Tensor, qkv: Tensor, keyCache: Tensor, valueCache: Tensor, start: Tensor, B: number, S: number, C: number, Q: number, G: number, D: number, dtype: ComputeType): void {
    if (out.dtype !== dtype || !(out.length >= B * S * Q * D)) refuse('attention_cached', 'out', out, dtype, B * S * Q * D);
    if (qkv.dtype !== dtype || !(qkv.length >= B * S * ((Q + 2 * G) * D))) refuse('attention_cached', 'qkv', qkv, dtype, B * S * ((Q + 2 * G) * D));
    if (keyCache.dtype !== dtype || !(keyCache.length >= B * C * G * D)) refuse('attention_cached', 'keyCache', keyCache, dtype, B * C * G * D);
    if (valueCache.dtype !== dtype || !(valueCache.length >= B * C * G * D)) refuse('attention_cached', 'valueCache', valueCache, dtype, B * C * G * D);
    if (start.dtype !== 'i32' || !(start.length >= B)) refuse('attention_cached', 'start', start, 'i32', B);
    const status = this.#native.nn_attention_cached(this.#context, out.address, qkv.address, keyCache.address, valueCache.address, start.address, B, S, C, Q, G, D, code(dtype));
    if (status !== 0) this.#fail('nn_attention_cached', status);
  }

  /** Sorts the slots by expert (stable: by token, then choice). For sorted slot s: slot_token[s] is its token, slot_weight[s]
   * its routing weight; slot_of[t, k] is where (t, k) went. load[e] = offsets[e+1] - offsets[e]. An index outside 0..E-1
   * counts as expert 0 (softmax_topk never makes one). */
  moePermute(offsets: Tensor, load: Tensor, slotToken: Tensor, slotWeight: Tensor, slotOf: Tensor, index: Tensor, weight: Tensor, T: number, E: number, K: number): void {
    if (offsets.dtype !== 'i32' || !(offsets.length >= E + 1)) refuse('moe_permute', 'offsets', offsets, 'i32', E + 1);
    if (load.dtype !== 'i32' || !(load.length >= E)) refuse('moe_permute', 'load', load, 'i32', E);
    if (slotToken.dtype !== 'i32' || !(slotToken.length >= T * K)) refuse('moe_permute', 'slotToken', slotToken, 'i32', T * K);
    if (slotWeight.dtype !== 'f32' || !(slotWeight.length >= T * K)) refuse('moe_permute', 'slotWeight', slotWeight, 'f32', T * K);
    if (slotOf.dtype !== 'i32' || !(slotOf.length >= T * K)) refuse('moe_permute', 'slotOf', slotOf, 'i32', T * K);
    if (index.dtype !== 'i32' || !(index.length >= T * K)) refuse('moe_permute', 'index', index, 'i32', T * K);
    if (weight.dtype !== 'f32' || !(weight.length >= T * K)) refuse('moe_permute', 'weight', weight, 'f32', T * K);
    const status = this.#native.nn_moe_permute(this.#context, offsets.address, load.address, slotToken.address, slotWeight.address, slotOf.address, index.address, weight.address, T, E, K);
    if (status !== 0) this.#fail('nn_moe_permute', status);
  }

  /** For each sorted slot s of expert e: gate_up[s] = x[slot_token[s]] gate_up_weight[e]^T, h[s] = silu(gate) * up, with SwiGLU in the
   * epilogue. The gather is part of the loads, except that the CUDA library on Hopper packs bf16 rows in the workspace first (and in the
   * backward and the weight gradients likewise). An expert's weights are [gate (w1): F, H | up (w3): F, H]. */
  moeUpForward(h: Tensor, gateUp: Tensor | null, x: Tensor, slotToken: Tensor, offsets: Tensor, gateUpWeight: Tensor, T: number, H: number, F: number, E: number, K: number, dtype: ComputeType): void {
    if (h.dtype !== dtype || !(h.length >= T * K * F)) refuse('moe_up_forward', 'h', h, dtype, T * K * F);
    if (gateUp !== null && (gateUp.dtype !== dtype || !(gateUp.length >= T * K * 2 * F))) refuse('moe_up_forward', 'gateUp', gateUp, dtype, T * K * 2 * F);
    if (x.dtype !== dtype || !(x.length >= T * H)) refuse('moe_up_forward', 'x', x, dtype, T * H);
    if (slotToken.dtype !== 'i32' || !(slotToken.length >= T * K)) refuse('moe_up_forward', 'slotToken', slotToken, 'i32', T * K);
    if (offsets.dtype !== 'i32' || !(offsets.length >= E + 1)) refuse('moe_up_forward', 'offsets', offsets, 'i32', E + 1);
    if (gateUpWeight.dtype !== dtype || !(gateUpWeight.length >= E * 2 * F * H)) refuse('moe_up_forward', 'gateUpWeight', gateUpWeight, dtype, E * 2 * F * H);
    const status = this.#native.nn_moe_up_forward(this.#context, h.address, gateUp === null ? 0 : gateUp.address, x.address, slotToken.address, offsets.address, gateUpWeight.address, T, H, F, E, K, code(dtype));
    if (status !== 0) this.#fail('nn_moe_up_forward', status);
  }

  /** y[s] = h[s] down_weight[e]^T (w2: [H, F] for each expert). */
  moeDownForward(y: Tensor, h: Tensor, offsets: Tensor, downWeight: Tensor, T: number, H: number, F: number, E: number, K: number, dtype: ComputeType): void {
    if (y.dtype !== dtype || !(y.length >= T * K * H)) refuse('moe_down_forward', 'y', y, dtype, T * K * H);
    if (h.dtype !== dtype || !(h.length >= T * K * F)) refuse('moe_down_forward', 'h', h, dtype, T * K * F);
    if (offsets.dtype !== 'i32' || !(offsets.length >= E + 1)) refuse('moe_down_forward', 'offsets', offsets, 'i32', E + 1);
    if (downWeight.dtype !== dtype || !(downWeight.length >= E * H * F)) refuse('moe_down_forward', 'downWeight', downWeight, dtype, E * H * F);
    const status = this.#native.nn_moe_down_forward(this.#context, y.address, h.address, offsets.address, downWeight.address, T, H, F, E, K, code(dtype));
    if (status !== 0) this.#fail('nn_moe_down_forward', status);
  }

  /** out[t] = base[t] + sum over k = 0..K-1, in that order, of weight[t, k] * y[slot_of[t, k]]; without weight all are 1,
   * without base it is 0. out may be base. */
  moeCombine(out: Tensor, base: Tensor | null, y: Tensor, weight: Tensor | null, slotOf: Tensor, T: number, H: number, K: number, dtype: ComputeType): void {
    if (out.dtype !== dtype || !(out.length >= T * H)) refuse('moe_combine', 'out', out, dtype, T * H);
    if (base !== null && (base.dtype !== dtype || !(base.length >= T * H))) refuse('moe_combine', 'base', base, dtype, T * H);
    if (y.dtype !== dtype || !(y.length >= T * K * H)) refuse('moe_combine', 'y', y, dtype, T * K * H);
    if (weight !== null && (weight.dtype !== 'f32' || !(weight.length >= T * K))) refuse('moe_combine', 'weight', weight, 'f32', T * K);
    if (slotOf.dtype !== 'i32' || !(slotOf.length >= T * K)) refuse('moe_combine', 'slotOf', slotOf, 'i32', T * K);
    const status = this.#native.nn_moe_combine(this.#context, out.address, base === null ? 0 : base.address, y.address, weight === null ? 0 : weight.address, slotOf.address, T, H, K, code(dtype));
    if (status !== 0) this.#fail('nn_moe_combine', status);
  }

  /** Backward through the weighted sum, the down product and SwiGLU, for sorted slot s with token t and weight w:
   *   dh = dout[t] down_weight[e];   dweight[t, k] = dh . h[s];   dgate_up[s] = swiglu backward of w * dh.
   * h is computed again from gate_up, to the bits of nn_moe_up_forward; it is stored for nn_moe_down_weight_gradient unless h is NULL,
   * because the forward's was kept. dgate_up may be gate_up. */
  moeDownBackward(dgateUp: Tensor, h: Tensor | null, dweight: Tensor, dout: Tensor, gateUp: Tensor, slotToken: Tensor, slotWeight: Tensor, slotOf: Tensor, offsets: Tensor, downWeight: Tensor, T: number, H: number, F: number, E: number, K: number, dtype: ComputeType): void {
    if (dgateUp.dtype !== dtype || !(dgateUp.length >= T * K * 2 * F)) refuse('moe_down_backward', 'dgateUp', dgateUp, dtype, T * K * 2 * F);
    if (h !== null && (h.dtype !== dtype || !(h.length >= T * K * F))) refuse('moe_down_backward', 'h', h, dtype, T * K * F);
    if (dweight.dtype !== 'f32' || !(dweight.length >= T * K)) refuse('moe_down_backward', 'dweight', dweight, 'f32', T * K);
    if (dout.dtype !== dtype || !(dout.length >= T * H)) refuse('moe_down_backward', 'dout', dout, dtype, T * H);
    if (gateUp.dtype !== dtype || !(gateUp.length >= T * K * 2 * F)) refuse('moe_down_backward', 'gateUp', gateUp, dtype, T * K * 2 * F);
    if (slotToken.dtype !== 'i32' || !(slotToken.length >= T * K)) refuse('moe_down_backward', 'slotToken', slotToken, 'i32', T * K);
    if (slotWeight.dtype !== 'f32' || !(slotWeight.length >= T * K)) refuse('moe_down_backward', 'slotWeight', slotWeight, 'f32', T * K);
    if (slotOf.dtype !== 'i32' || !(slotOf.length >= T * K)) refuse('moe_down_backward', 'slotOf', slotOf, 'i32', T * K);
    if (offsets.dtype !== 'i32' || !(offsets.length >= E + 1)) refuse('moe_down_backward', 'offsets', offsets, 'i32', E + 1);
    if (downWeight.dtype !== dtype || !(downWeight.length >= E * H * F)) refuse('moe_down_backward', 'downWeight', downWeight, dtype, E * H * F);
    const status = this.#native.nn_moe_down_backward(this.#context, dgateUp.address, h === null ? 0 : h.address, dweight.address, dout.address, gateUp.address, slotToken.address, slotWeight.address, slotOf.address, offsets.address, downWeight.address, T, H, F, E, K, code(dtype));
    if (status !== 0) this.#fail('nn_moe_down_backward', status);
  }

  /** ddown_weight[e] += sum over the slots s of e of (slot_weight[s] * dout[slot_token[s]])^T h[s]; the weighted row is rounded to dtype.
   * accumulate 0: the sum replaces what was there, which is not read: all E matrices are written, zeros for an expert without slots. Each
   * element then has the bits that adding to zero gives it, so a sum of -0 is stored as 0. */
  moeDownWeightGradient(ddownWeight: Tensor, dout: Tensor, h: Tensor, slotToken: Tensor, slotWeight: Tensor, offsets: Tensor, T: number, H: number, F: number, E: number, K: number, accumulate: number, dtype: ComputeType): void {
    if (ddownWeight.dtype !== 'f32' || !(ddownWeight.length >= E * H * F)) refuse('moe_down_weight_gradient', 'ddownWeight', ddownWeight, 'f32', E * H * F);
    if (dout.dtype !== dtype || !(dout.length >= T * H)) refuse('moe_down_weight_gradient', 'dout', dout, dtype, T * H);
    if (h.dtype !== dtype || !(h.length >= T * K * F)) refuse('moe_down_weight_gradient', 'h', h, dtype, T * K * F);
    if (slotToken.dtype !== 'i32' || !(slotToken.length >= T * K)) refuse('moe_down_weight_gradient', 'slotToken', slotToken, 'i32', T * K);
    if (slotWeight.dtype !== 'f32' || !(slotWeight.length >= T * K)) refuse('moe_down_weight_gradient', 'slotWeight', slotWeight, 'f32', T * K);
    if (offsets.dtype !== 'i32' || !(offsets.length >= E + 1)) refuse('moe_down_weight_gradient', 'offsets', offsets, 'i32', E + 1);
    const status = this.#native.nn_moe_down_weight_gradient(this.#context, ddownWeight.address, dout.address, h.address, slotToken.address, slotWeight.address, offsets.address, T, H, F, E, K, accumulate, code(dtype));
    if (status !== 0) this.#fail('nn_moe_down_weight_gradient', status);
  }

  /** dx_slots[s] = dgate_up[s] gate_up_weight[e]; nn_moe_combine without weights then sums a token's slots. */
  moeUpBackward(dxSlots: Tensor, dgateUp: Tensor, offsets: Tensor, gateUpWeight: Tensor, T: number, H: number, F: number, E: number, K: number, dtype: ComputeType): void {
    if (dxSlots.dtype !== dtype || !(dxSlots.length >= T * K * H)) refuse('moe_up_backward', 'dxSlots', dxSlots, dtype, T * K * H);
    if (dgateUp.dtype !== dtype || !(dgateUp.length >= T * K * 2 * F)) refuse('moe_up_backward', 'dgateUp', dgateUp, dtype, T * K * 2 * F);
    if (offsets.dtype !== 'i32' || !(offsets.length >= E + 1)) refuse('moe_up_backward', 'offsets', offsets, 'i32', E + 1);
    if (gateUpWeight.dtype !== dtype || !(gateUpWeight.length >= E * 2 * F * H)) refuse('moe_up_backward', 'gateUpWeight', gateUpWeight, dtype, E * 2 * F * H);
    const status = this.#native.nn_moe_up_backward(this.#context, dxSlots.address, dgateUp.address, offsets.address, gateUpWeight.address, T, H, F, E, K, code(dtype));
    if (status !== 0) this.#fail('nn_moe_up_backward', status);
  }

  /** dgate_up_weight[e] += sum over the slots of e of dgate_up[s]^T x[slot_token[s]].
   * accumulate as in nn_moe_down_weight_gradient. */
  moeUpWeightGradient(dgateUpWeight: Tensor, dgateUp: Tensor, x: Tensor, slotToken: Tensor, offsets: Tensor, T: number, H: number, F: number, E: number, K: number, accumulate: number, dtype: ComputeType): void {
    if (dgateUpWeight.dtype !== 'f32' || !(dgateUpWeight.length >= E * 2 * F * H)) refuse('moe_up_weight_gradient', 'dgateUpWeight', dgateUpWeight, 'f32', E * 2 * F * H);
    if (dgateUp.dtype !== dtype || !(dgateUp.length >= T * K * 2 * F)) refuse('moe_up_weight_gradient', 'dgateUp', dgateUp, dtype, T * K * 2 * F);
    if (x.dtype !== dtype || !(x.length >= T * H)) refuse('moe_up_weight_gradient', 'x', x, dtype, T * H);
    if (slotToken.dtype !== 'i32' || !(slotToken.length >= T * K)) refuse('moe_up_weight_gradient', 'slotToken', slotToken, 'i32', T * K);
    if (offsets.dtype !== 'i32' || !(offsets.length >= E + 1)) refuse('moe_up_weight_gradient', 'offsets', offsets, 'i32', E + 1);
    const status = this.#native.nn_moe_up_weight_gradient(this.#context, dgateUpWeight.address, dgateUp.address, x.address, slotToken.address, offsets.address, T, H, F, E, K, accumulate, code(dtype));
    if (status !== 0) this.#fail('nn_moe_up_weight_gradient', status);
  }

  /** loss[t] = log(sum(exp(logits[t]))) - logits[t, target[t]]. */
  crossEntropyForward(loss: Tensor, logits: Tensor, target: Tensor, T: number, V: number, dtype: ComputeType): void {
    if (loss.dtype !== 'f32' || !(loss.length >= T)) refuse('cross_entropy_forward', 'loss', loss, 'f32', T);
    if (logits.dtype !== dtype || !(logits.length >= T * V)) refuse('cross_entropy_forward', 'logits', logits, dtype, T * V);
    if (target.dtype !== 'i32' || !(target.length >= T)) refuse('cross_entropy_forward', 'target', target, 'i32', T);
    const status = this.#native.nn_cross_entropy_forward(this.#context, loss.address, logits.address, target.address, T, V, code(dtype));
    if (status !== 0) this.#fail('nn_cross_entropy_forward', status);
  }

  /** dlogits = scale * (softmax(logits) - onehot(target)). dlogits may be logits. */
  crossEntropyBackward(dlogits: Tensor, logits: Tensor, target: Tensor, T: number, V: number, scale: number, dtype: ComputeType): void {
    if (dlogits.dtype !== dtype || !(dlogits.length >= T * V)) refuse('cross_entropy_backward', 'dlogits', dlogits, dtype, T * V);
    if (logits.dtype !== dtype || !(logits.length >= T * V)) refuse('cross_entropy_backward', 'logits', logits, dtype, T * V);
    if (target.dtype !== 'i32' || !(target.length >= T)) refuse('cross_entropy_backward', 'target', target, 'i32', T);
    const status = this.#native.nn_cross_entropy_backward(this.#context, dlogits.address, logits.address, target.address, T, V, scale, code(dtype));
    if (status !== 0) this.#fail('nn_cross_entropy_backward', status);
  }

  /** The LM head and the loss in one, in chunks, so that all logits never exist at once: logits = x weight^T, loss as above;
   * dx = scale * dlogits weight and dweight += scale * dlogits^T x. With dx = NULL only the loss is computed (then dweight
   * must be NULL too). Liger, arXiv 2410.10989. */
  linearCrossEntropy(loss: Tensor, dx: Tensor | null, dweight: Tensor | null, x: Tensor, target: Tensor, weight: Tensor, T: number, H: number, V: number, scale: number, dtype: ComputeType): void {
    if (loss.dtype !== 'f32' || !(loss.length >= T)) refuse('linear_cross_entropy', 'loss', loss, 'f32', T);
    if (dx !== null && (dx.dtype !== dtype || !(dx.length >= T * H))) refuse('linear_cross_entropy', 'dx', dx, dtype, T * H);
    if (dweight !== null && (dweight.dtype !== 'f32' || !(dweight.length >= V * H))) refuse('linear_cross_entropy', 'dweight', dweight, 'f32', V * H);
    if (x.dtype !== dtype || !(x.length >= T * H)) refuse('linear_cross_entropy', 'x', x, dtype, T * H);
    if (target.dtype !== 'i32' || !(target.length >= T)) refuse('linear_cross_entropy', 'target', target, 'i32', T);
    if (weight.dtype !== dtype || !(weight.length >= V * H)) refuse('linear_cross_entropy', 'weight', weight, dtype, V * H);
    const status = this.#native.nn_linear_cross_entropy(this.#context, loss.address, dx === null ? 0 : dx.address, dweight === null ? 0 : dweight.address, x.address, target.address, weight.address, T, H, V, scale, code(dtype));
    if (status !== 0) this.#fail('nn_linear_cross_entropy', status);
  }

  /** aux = E * sum over i of (load[i] / (T*K)) * mean over t of probability[t, i]. Fedus et al., arXiv 2101.03961. */
  auxLoss(aux: Tensor, probability: Tensor, load: Tensor, T: number, E: number, K: number): void {
    if (aux.dtype !== 'f32' || !(aux.length >= 1)) refuse('aux_loss', 'aux', aux, 'f32', 1);
    if (probability.dtype !== 'f32' || !(probability.length >= T * E)) refuse('aux_loss', 'probability', probability, 'f32', T * E);
    if (load.dtype !== 'i32' || !(load.length >= E)) refuse('aux_loss', 'load', load, 'i32', E);
    const status = this.#native.nn_aux_loss(this.#context, aux.address, probability.address, load.address, T, E, K);
    if (status !== 0) this.#fail('nn_aux_loss', status);
  }

  /** y[t] = table[token[t]]; a token outside 0..V-1 makes a row of NaN. */
  embeddingForward(y: Tensor, token: Tensor, table: Tensor, T: number, H: number, V: number, dtype: ComputeType): void {
    if (y.dtype !== dtype || !(y.length >= T * H)) refuse('embedding_forward', 'y', y, dtype, T * H);
    if (token.dtype !== 'i32' || !(token.length >= T)) refuse('embedding_forward', 'token', token, 'i32', T);
    if (table.dtype !== dtype || !(table.length >= V * H)) refuse('embedding_forward', 'table', table, dtype, V * H);
    const status = this.#native.nn_embedding_forward(this.#context, y.address, token.address, table.address, T, H, V, code(dtype));
    if (status !== 0) this.#fail('nn_embedding_forward', status);
  }

  /** dtable[token[t]] += dy[t]: the embedding's backward. A row's tokens are summed in rising t, then added once. */
  scatterAdd(dtable: Tensor, dy: Tensor, token: Tensor, T: number, H: number, V: number, dtype: ComputeType): void {
    if (dtable.dtype !== 'f32' || !(dtable.length >= V * H)) refuse('scatter_add', 'dtable', dtable, 'f32', V * H);
    if (dy.dtype !== dtype || !(dy.length >= T * H)) refuse('scatter_add', 'dy', dy, dtype, T * H);
    if (token.dtype !== 'i32' || !(token.length >= T)) refuse('scatter_add', 'token', token, 'i32', T);
    const status = this.#native.nn_scatter_add(this.#context, dtable.address, dy.address, token.address, T, H, V, code(dtype));
    if (status !== 0) this.#fail('nn_scatter_add', status);
  }

  zeroGrad(gradient: Tensor, n: number): void {
    if (gradient.dtype !== 'f32' || !(gradient.length >= n)) refuse('zero_grad', 'gradient', gradient, 'f32', n);
    const status = this.#native.nn_zero_grad(this.#context, gradient.address, n);
    if (status !== 0) this.#fail('nn_zero_grad', status);
  }

  /** sum_of_squares = sum of gradient[i]^2 in float64 (each square is exact), in this order on every device: the elements are
   * cut into chunks of 4096; in a chunk lane l of 64 sums elements l, l + 64, ... in rising order; the lanes are added in
   * halves (l + 32, l + 16, ... 1); the chunks' sums are reduced in the same way, as if they were elements not squared, until
   * one is left. nn_sum uses the same order without the squares. */
  gradNorm(sumOfSquares: Tensor, gradient: Tensor, n: number): void {
    if (sumOfSquares.dtype !== 'f64' || !(sumOfSquares.length >= 1)) refuse('grad_norm', 'sumOfSquares', sumOfSquares, 'f64', 1);
    if (gradient.dtype !== 'f32' || !(gradient.length >= n)) refuse('grad_norm', 'gradient', gradient, 'f32', n);
    const status = this.#native.nn_grad_norm(this.#context, sumOfSquares.address, gradient.address, n);
    if (status !== 0) this.#fail('nn_grad_norm', status);
  }

  /** control[0] = norm = sqrt(sum_of_squares); control[1] = min(1, clip / (norm + 1e-6)); control[2] = 1 if norm is NaN or
   * infinite (the step must be skipped), else 0. Stays on the device: nothing waits for the host. */
  gradClip(control: Tensor, sumOfSquares: Tensor, clip: number): void {
    if (control.dtype !== 'f64' || !(control.length >= 3)) refuse('grad_clip', 'control', control, 'f64', 3);
    if (sumOfSquares.dtype !== 'f64' || !(sumOfSquares.length >= 1)) refuse('grad_clip', 'sumOfSquares', sumOfSquares, 'f64', 1);
    const status = this.#native.nn_grad_clip(this.#context, control.address, sumOfSquares.address, clip);
    if (status !== 0) this.#fail('nn_grad_clip', status);
  }

  /** AdamW with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101), in float32 with exactly these IEEE operations and no
   * fused multiply-add, so that CPU and GPU give the same bits; does nothing when control[2] is not 0:
   *   g = gradient * (float)control[1]
   *   m = m*beta1 + g*(1-beta1);   v = v*beta2 + (g*g)*(1-beta2)
   *   p = p - (lr*decay)*p - (m*(1/correction1))*lr / (sqrt(v*(1/correction2)) + epsilon)
   * evaluated left to right as written, with correction_i = 1 - beta_i^step, 1-beta_i, lr*decay and 1/correction_i computed in
   * float64 by this function and rounded to float32 once. schedule = [learning rate, step] (step counts from 1) lies on the device, so that a captured step can
   * be replayed. With dtype f32, `parameter` is p and `residue` NULL. With bf16 they are p's halves, high and low of nn_split: p is the
   * same float32 as ever, and `parameter` its rounding, to compute with. m and v have state_dtype, rounded to nearest even. */
  adamwStep(parameter: Tensor, residue: Tensor | null, m: Tensor, v: Tensor, gradient: Tensor, control: Tensor, schedule: Tensor, n: number, beta1: number, beta2: number, epsilon: number, decay: number, stateDtype: ComputeType, dtype: ComputeType): void {
    if (parameter.dtype !== dtype || !(parameter.length >= n)) refuse('adamw_step', 'parameter', parameter, dtype, n);
    if (residue !== null && (residue.dtype !== 'u16' || !(residue.length >= n))) refuse('adamw_step', 'residue', residue, 'u16', n);
    if (m.dtype !== stateDtype || !(m.length >= n)) refuse('adamw_step', 'm', m, stateDtype, n);
    if (v.dtype !== stateDtype || !(v.length >= n)) refuse('adamw_step', 'v', v, stateDtype, n);
    if (gradient.dtype !== 'f32' || !(gradient.length >= n)) refuse('adamw_step', 'gradient', gradient, 'f32', n);
    if (control.dtype !== 'f64' || !(control.length >= 3)) refuse('adamw_step', 'control', control, 'f64', 3);
    if (schedule.dtype !== 'f64' || !(schedule.length >= 2)) refuse('adamw_step', 'schedule', schedule, 'f64', 2);
    const status = this.#native.nn_adamw_step(this.#context, parameter.address, residue === null ? 0 : residue.address, m.address, v.address, gradient.address, control.address, schedule.address, n, beta1, beta2, epsilon, decay, code(stateDtype), code(dtype));
    if (status !== 0) this.#fail('nn_adamw_step', status);
  }

  /** token[b] = index of the largest logit, ties to the lower index; NaN counts as -infinity. */
  argmax(token: Tensor, logits: Tensor, B: number, V: number, dtype: ComputeType): void {
    if (token.dtype !== 'i32' || !(token.length >= B)) refuse('argmax', 'token', token, 'i32', B);
    if (logits.dtype !== dtype || !(logits.length >= B * V)) refuse('argmax', 'logits', logits, dtype, B * V);
    const status = this.#native.nn_argmax(this.#context, token.address, logits.address, B, V, code(dtype));
    if (status !== 0) this.#fail('nn_argmax', status);
  }

  /** One token from the whole distribution. */
  sample(token: Tensor, logits: Tensor, counter: Tensor, B: number, V: number, temperature: number, seed: number, dtype: ComputeType): void {
    if (token.dtype !== 'i32' || !(token.length >= B)) refuse('sample', 'token', token, 'i32', B);
    if (logits.dtype !== dtype || !(logits.length >= B * V)) refuse('sample', 'logits', logits, dtype, B * V);
    if (counter.dtype !== 'i32' || !(counter.length >= B)) refuse('sample', 'counter', counter, 'i32', B);
    const status = this.#native.nn_sample(this.#context, token.address, logits.address, counter.address, B, V, temperature, seed, code(dtype));
    if (status !== 0) this.#fail('nn_sample', status);
  }

  /** From the top_k (1 .. V) most probable ones. */
  topkSample(token: Tensor, logits: Tensor, counter: Tensor, B: number, V: number, topK: number, temperature: number, seed: number, dtype: ComputeType): void {
    if (token.dtype !== 'i32' || !(token.length >= B)) refuse('topk_sample', 'token', token, 'i32', B);
    if (logits.dtype !== dtype || !(logits.length >= B * V)) refuse('topk_sample', 'logits', logits, dtype, B * V);
    if (counter.dtype !== 'i32' || !(counter.length >= B)) refuse('topk_sample', 'counter', counter, 'i32', B);
    const status = this.#native.nn_topk_sample(this.#context, token.address, logits.address, counter.address, B, V, topK, temperature, seed, code(dtype));
    if (status !== 0) this.#fail('nn_topk_sample', status);
  }

  /** From the smallest set whose probability reaches top_p (0 < top_p <= 1): nucleus sampling, arXiv 1904.09751. */
  toppSample(token: Tensor, logits: Tensor, counter: Tensor, B: number, V: number, topP: number, temperature: number, seed: number, dtype: ComputeType): void {
    if (token.dtype !== 'i32' || !(token.length >= B)) refuse('topp_sample', 'token', token, 'i32', B);
    if (logits.dtype !== dtype || !(logits.length >= B * V)) refuse('topp_sample', 'logits', logits, dtype, B * V);
    if (counter.dtype !== 'i32' || !(counter.length >= B)) refuse('topp_sample', 'counter', counter, 'i32', B);
    const status = this.#native.nn_topp_sample(this.#context, token.address, logits.address, counter.address, B, V, topP, temperature, seed, code(dtype));
    if (status !== 0) this.#fail('nn_topp_sample', status);
  }

  /** The attention half of a layer for one new token of each of B sequences: out = x + attention(rope(rmsnorm(x) qkv_weight^T)) output_weight^T,
   * where sequence b's token stands at position start[b] (< C, < positions), its key and value go into the cache there, and it sees positions
   * 0 .. start[b]. B <= NN_DECODE_TOKENS. The same as the entries that it is made of, but for roundings. It must not follow right after a
   * call that wrote any of its inputs but x: on a GPU it reads them while that call may still run. out is not x. */
  decodeAttention(out: Tensor, keyCache: Tensor, valueCache: Tensor, x: Tensor, start: Tensor, cosine: Tensor, sine: Tensor, norm: Tensor, qkvWeight: Tensor, outputWeight: Tensor, B: number, C: number, H: number, Q: number, G: number, D: number, positions: number, epsilon: number, dtype: ComputeType): void {
    if (out.dtype !== dtype || !(out.length >= B * H)) refuse('decode_attention', 'out', out, dtype, B * H);
    if (keyCache.dtype !== dtype || !(keyCache.length >= B * C * G * D)) refuse('decode_attention', 'keyCache', keyCache, dtype, B * C * G * D);
    if (valueCache.dtype !== dtype || !(valueCache.length >= B * C * G * D)) refuse('decode_attention', 'valueCache', valueCache, dtype, B * C * G * D);
    if (x.dtype !== dtype || !(x.length >= B * H)) refuse('decode_attention', 'x', x, dtype, B * H);
    if (start.dtype !== 'i32' || !(start.length >= B)) refuse('decode_attention', 'start', start, 'i32', B);
    if (cosine.dtype !== 'f32' || !(cosine.length >= positions * D / 2)) refuse('decode_attention', 'cosine', cosine, 'f32', positions * D / 2);
    if (sine.dtype !== 'f32' || !(sine.length >= positions * D / 2)) refuse('decode_attention', 'sine', sine, 'f32', positions * D / 2);
    if (norm.dtype !== dtype || !(norm.length >= H)) refuse('decode_attention', 'norm', norm, dtype, H);
    if (qkvWeight.dtype !== dtype || !(qkvWeight.length >= ((Q + 2 * G) * D) * H)) refuse('decode_attention', 'qkvWeight', qkvWeight, dtype, ((Q + 2 * G) * D) * H);
    if (outputWeight.dtype !== dtype || !(outputWeight.length >= H * Q * D)) refuse('decode_attention', 'outputWeight', outputWeight, dtype, H * Q * D);
    const status = this.#native.nn_decode_attention(this.#context, out.address, keyCache.address, valueCache.address, x.address, start.address, cosine.address, sine.address, norm.address, qkvWeight.address, outputWeight.address, B, C, H, Q, G, D, positions, epsilon, code(dtype));
    if (status !== 0) this.#fail('nn_decode_attention', status);
  }

  /** The experts' half of a layer for T <= NN_DECODE_TOKENS tokens: out = x + moe(rmsnorm(x)). The same as the entries that it is made of, but
   * for roundings, and under the same condition as nn_decode_attention. out is not x. */
  decodeMoe(out: Tensor, x: Tensor, norm: Tensor, router: Tensor, gateUpWeight: Tensor, downWeight: Tensor, T: number, H: number, F: number, E: number, K: number, epsilon: number, dtype: ComputeType): void {
    if (out.dtype !== dtype || !(out.length >= T * H)) refuse('decode_moe', 'out', out, dtype, T * H);
    if (x.dtype !== dtype || !(x.length >= T * H)) refuse('decode_moe', 'x', x, dtype, T * H);
    if (norm.dtype !== dtype || !(norm.length >= H)) refuse('decode_moe', 'norm', norm, dtype, H);
    if (router.dtype !== dtype || !(router.length >= E * H)) refuse('decode_moe', 'router', router, dtype, E * H);
    if (gateUpWeight.dtype !== dtype || !(gateUpWeight.length >= E * 2 * F * H)) refuse('decode_moe', 'gateUpWeight', gateUpWeight, dtype, E * 2 * F * H);
    if (downWeight.dtype !== dtype || !(downWeight.length >= E * H * F)) refuse('decode_moe', 'downWeight', downWeight, dtype, E * H * F);
    const status = this.#native.nn_decode_moe(this.#context, out.address, x.address, norm.address, router.address, gateUpWeight.address, downWeight.address, T, H, F, E, K, epsilon, code(dtype));
    if (status !== 0) this.#fail('nn_decode_moe', status);
  }

  /** One decoding step further, so that a loop of steps needs no host: for each sequence b, history[row, b] = token[b] with
   * row = step[0], start[b] += 1 and counter[b] += 1; then step[0] = (row + 1) % R. step[0] must be in 0 .. R-1, else nothing is done. */
  advance(history: Tensor, start: Tensor, counter: Tensor, step: Tensor, token: Tensor, B: number, R: number): void {
    if (history.dtype !== 'i32' || !(history.length >= R * B)) refuse('advance', 'history', history, 'i32', R * B);
    if (start.dtype !== 'i32' || !(start.length >= B)) refuse('advance', 'start', start, 'i32', B);
    if (counter.dtype !== 'i32' || !(counter.length >= B)) refuse('advance', 'counter', counter, 'i32', B);
    if (step.dtype !== 'i32' || !(step.length >= 1)) refuse('advance', 'step', step, 'i32', 1);
    if (token.dtype !== 'i32' || !(token.length >= B)) refuse('advance', 'token', token, 'i32', B);
    const status = this.#native.nn_advance(this.#context, history.address, start.address, counter.address, step.address, token.address, B, R);
    if (status !== 0) this.#fail('nn_advance', status);
  }
}
