/**
 * The attention half of a layer, forward and backward: x -> delta, the residual is added by the half that follows. Only the
 * order of kernels; memory comes from the plan. Shape letters: sizes.ts. Called by layer.ts.
 */
import type { Kernels, Tensor } from '../../cuda/device.ts';
import type { LayerViews } from './parameters.ts';
import type { BatchSizes, Sizes } from './sizes.ts';

/** Tables that every layer shares. */
export interface RopeTables {
  readonly cosine: Tensor; // f32 [positions, D/2]
  readonly sine: Tensor; // f32 [positions, D/2]
  readonly position: Tensor; // i32 [T]
  readonly positions: number;
}

/** What the forward leaves for the backward. */
export interface AttentionState {
  readonly reciprocal1: Tensor; // f32 [T]
  readonly normed1: Tensor; // [T, H]
  readonly qkv: Tensor; // [T, P], after RoPE
  readonly attention: Tensor; // [T, Q*D]
  readonly logSumExp: Tensor; // f32 [B, Q, S]
}

/** Scratch of the backward. */
export interface AttentionScratch {
  readonly dattention: Tensor; // [T, Q*D]
  readonly dqkv: Tensor; // [T, P]
  readonly dnormed1: Tensor; // [T, H]
}

/** delta = attention(rope(rmsnorm(x) Wqkv^T)) Wo^T. */
export function attentionForward(
  kernels: Kernels, delta: Tensor, state: AttentionState, x: Tensor, weights: LayerViews, rope: RopeTables, { B, S, T }: BatchSizes, sizes: Sizes,
): void {
  const { H, Q, G, D, P, epsilon, dtype } = sizes;
  kernels.rmsnormForward(state.normed1, state.reciprocal1, x, weights.attentionNorm, T, H, epsilon, dtype);
  kernels.gemm(state.qkv, state.normed1, weights.qkv, T, P, H, 0, 1, dtype, dtype);
  kernels.ropeQk(state.qkv, rope.position, rope.cosine, rope.sine, T, Q, G, D, rope.positions, 1, dtype);
  kernels.flashAttentionForward(state.attention, state.logSumExp, state.qkv, B, S, Q, G, D, dtype);
  kernels.gemm(delta, state.attention, weights.output, T, H, Q * D, 0, 1, dtype, dtype);
}

/** dx = the gradient of x, where dx comes in as the gradient of x + delta; the weights' gradients are added to. */
export function attentionBackward(
  kernels: Kernels, dx: Tensor, gradients: LayerViews, scratch: AttentionScratch, state: AttentionState, x: Tensor, weights: LayerViews, rope: RopeTables,
  { B, S, T }: BatchSizes, sizes: Sizes,
): void {
  const { H, Q, G, D, P, dtype } = sizes;
  kernels.gemmBeta(gradients.output, dx, state.attention, H, Q * D, T, 1, 0, 1, 1, 'f32', dtype);
  kernels.gemm(scratch.dattention, dx, weights.output, T, Q * D, H, 0, 0, dtype, dtype);
  kernels.flashAttentionBackward(scratch.dqkv, scratch.dattention, state.attention, state.logSumExp, state.qkv, B, S, Q, G, D, dtype);
  kernels.ropeQk(scratch.dqkv, rope.position, rope.cosine, rope.sine, T, Q, G, D, rope.positions, -1, dtype);
  kernels.gemmBeta(gradients.qkv, scratch.dqkv, state.normed1, P, H, T, 1, 0, 1, 1, 'f32', dtype);
  kernels.gemm(scratch.dnormed1, scratch.dqkv, weights.qkv, T, H, P, 0, 0, dtype, dtype);
  kernels.rmsnormResidualBackward(dx, gradients.attentionNorm, scratch.dnormed1, dx, x, state.reciprocal1, weights.attentionNorm, T, H, dtype);
}

/** Keys and values of one layer, of C positions for each sequence, and where each sequence stands. */
export interface AttentionCache {
  readonly keys: Tensor; // [B, C, G*D]
  readonly values: Tensor; // [B, C, G*D]
  readonly start: Tensor; // i32 [B]
  readonly capacity: number;
}

/** out = x + attentionCachedForward of one new token of each of at most DECODE_TOKENS sequences: the same but for roundings. */
export function attentionStep(
  kernels: Kernels, out: Tensor, cache: AttentionCache, x: Tensor, weights: LayerViews, rope: Omit<RopeTables, 'position'>, B: number, sizes: Sizes,
): void {
  const { H, Q, G, D, epsilon, dtype } = sizes;
  const { keys, values, start, capacity } = cache;
  kernels.decodeAttention(
    out, keys, values, x, start, rope.cosine, rope.sine, weights.attentionNorm, weights.qkv, weights.output, B, capacity, H, Q, G, D, rope.positions, epsilon, dtype,
  );
}

/** attentionForward of S new tokens for each sequence, which see the cache and are put into it. No backward. */
export function attentionCachedForward(
  kernels: Kernels, delta: Tensor, state: Omit<AttentionState, 'logSumExp'>, cache: AttentionCache, x: Tensor, weights: LayerViews, rope: RopeTables,
  { B, S, T }: BatchSizes, sizes: Sizes,
): void {
  const { H, Q, G, D, P, epsilon, dtype } = sizes;
  const { keys, values, start, capacity } = cache;
  kernels.rmsnormForward(state.normed1, state.reciprocal1, x, weights.attentionNorm, T, H, epsilon, dtype);
  kernels.gemm(state.qkv, state.normed1, weights.qkv, T, P, H, 0, 1, dtype, dtype);
  kernels.ropeQk(state.qkv, rope.position, rope.cosine, rope.sine, T, Q, G, D, rope.positions, 1, dtype);
  kernels.cacheAppend(keys, values, state.qkv, start, B, S, capacity, Q, G, D, dtype);
  kernels.attentionCached(state.attention, state.qkv, keys, values, start, B, S, capacity, Q, G, D, dtype);
  kernels.gemm(delta, state.attention, weights.output, T, H, Q * D, 0, 1, dtype, dtype);
}
