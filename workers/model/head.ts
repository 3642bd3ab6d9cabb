/**
 * Both ends of the model: the embedding, and the last norm with the LM head and its loss. Forward and backward; only the
 * order of kernels, memory comes from the plan. Shape letters: sizes.ts. Called by trainer.ts and decoder.ts.
 */
import type { Kernels, Tensor } from '../../cuda/device.ts';
import type { ModelViews } from './parameters.ts';
import type { BatchSizes, Sizes } from './sizes.ts';

/** Memory of the head. */
export interface HeadState {
  readonly normed: Tensor; // [T, H]
  readonly reciprocal: Tensor; // f32 [T]
  readonly loss: Tensor; // f32 [T]
}

/** x = embedding[token]. */
export function embeddingForward(kernels: Kernels, x: Tensor, tokens: Tensor, weights: ModelViews, { T }: BatchSizes, { H, V, dtype }: Sizes): void {
  kernels.embeddingForward(x, tokens, weights.embedding, T, H, V, dtype);
}

export function embeddingBackward(kernels: Kernels, gradients: ModelViews, dx: Tensor, tokens: Tensor, { T }: BatchSizes, { H, V, dtype }: Sizes): void {
  kernels.scatterAdd(gradients.embedding, dx, tokens, T, H, V, dtype);
}

/** lossSum f64 [1] = sum of the cross-entropies of the last hidden states x; nothing is kept for a backward. */
export function headLoss(
  kernels: Kernels, lossSum: Tensor, state: HeadState, x: Tensor, targets: Tensor, weights: ModelViews, { T }: BatchSizes, sizes: Sizes,
): void {
  const { H, V, epsilon, dtype } = sizes;
  kernels.rmsnormForward(state.normed, state.reciprocal, x, weights.norm, T, H, epsilon, dtype);
  kernels.linearCrossEntropy(state.loss, null, null, state.normed, targets, weights.head, T, H, V, 1, dtype);
  kernels.sum(lossSum, state.loss, T);
}

/** headLoss, and dx = the gradient of x for a loss scaled by `scale`; the weights' gradients are added to. */
export function headLossAndBackward(
  kernels: Kernels, lossSum: Tensor, dx: Tensor, gradients: ModelViews, state: HeadState, x: Tensor, targets: Tensor, weights: ModelViews,
  { T }: BatchSizes, sizes: Sizes, scale: number,
): void {
  const { H, V, epsilon, dtype } = sizes;
  kernels.rmsnormForward(state.normed, state.reciprocal, x, weights.norm, T, H, epsilon, dtype);
  kernels.linearCrossEntropy(state.loss, dx, gradients.head, state.normed, targets, weights.head, T, H, V, scale, dtype);
  kernels.sum(lossSum, state.loss, T);
  kernels.rmsnormBackward(dx, gradients.norm, dx, x, state.reciprocal, weights.norm, T, H, dtype);
}

/** logits f32 [rows, V] of the last hidden states x [rows, H]; `state.normed` and `state.reciprocal` are scratch. */
export function headLogits(kernels: Kernels, logits: Tensor, state: Omit<HeadState, 'loss'>, x: Tensor, weights: ModelViews, rows: number, sizes: Sizes): void {
  const { H, V, epsilon, dtype } = sizes;
  kernels.rmsnormForward(state.normed, state.reciprocal, x, weights.norm, rows, H, epsilon, dtype);
  kernels.gemm(logits, state.normed, weights.head, rows, V, H, 0, 1, 'f32', dtype);
}
