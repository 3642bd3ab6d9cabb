/**
 * The mixture-of-experts half of a layer, forward and backward. It takes up the attention's delta first, because residual sum
 * and norm are one kernel. Only the order of kernels; memory comes from the plan. Shape letters: sizes.ts. Called by layer.ts
 * and decoder.ts.
 */
import type { Kernels, Tensor } from '../../cuda/device.ts';
import type { LayerViews } from './parameters.ts';
import type { BatchSizes, Sizes } from './sizes.ts';

/** What the forward leaves for the backward. Decoding keeps no gateUp. */
export interface MoeState {
  readonly sum: Tensor; // [T, H], the residual stream between the halves
  readonly reciprocal2: Tensor; // f32 [T]
  readonly normed2: Tensor; // [T, H]
  readonly logits: Tensor; // f32 [T, E]
  readonly probability: Tensor; // f32 [T, E]
  readonly weight: Tensor; // f32 [T, K]
  readonly index: Tensor; // i32 [T, K]
  readonly offsets: Tensor; // i32 [E+1]
  readonly load: Tensor; // i32 [E]
  readonly slotToken: Tensor; // i32 [N]
  readonly slotWeight: Tensor; // f32 [N]
  readonly slotOf: Tensor; // i32 [T, K]
  readonly gateUp: Tensor | null; // [N, 2*F]
  readonly h: Tensor; // [N, F]
}

/** Scratch of the backward. */
export interface MoeScratch {
  readonly h: Tensor | null; // [N, F]: to store h again; null: the state's is still there
  readonly dweight: Tensor; // f32 [T, K]
  readonly dslots: Tensor; // [N, H]
  readonly dlogits: Tensor; // f32 [T, E]
  readonly dlogitsCompute: Tensor; // [T, E]; the same as dlogits in float32
  readonly dnormed2: Tensor; // [T, H]
}

/** sum = x + delta, its norm, the router and the sort of the slots: everything up to the experts. */
export function routeForward(kernels: Kernels, state: MoeState, x: Tensor, delta: Tensor, weights: LayerViews, { T }: BatchSizes, sizes: Sizes): void {
  const { H, E, K, epsilon, dtype } = sizes;
  kernels.rmsnormResidualForward(state.sum, state.normed2, state.reciprocal2, x, delta, weights.moeNorm, T, H, epsilon, dtype);
  kernels.gemm(state.logits, state.normed2, weights.router, T, E, H, 0, 1, 'f32', dtype);
  kernels.softmaxTopkForward(state.probability, state.weight, state.index, state.logits, T, E, K);
  kernels.moePermute(state.offsets, state.load, state.slotToken, state.slotWeight, state.slotOf, state.index, state.weight, T, E, K);
}

/** h and gateUp of the experts. */
export function expertsForward(kernels: Kernels, state: MoeState, weights: LayerViews, { T }: BatchSizes, { H, F, E, K, dtype }: Sizes): void {
  kernels.moeUpForward(state.h, state.gateUp, state.normed2, state.slotToken, state.offsets, weights.gateUp, T, H, F, E, K, dtype);
}

/** out = sum + the experts' outputs, weighted. `slots` [N, H] is scratch. out may be the state's sum. */
export function combineForward(
  kernels: Kernels, out: Tensor, slots: Tensor, state: MoeState, weights: LayerViews, { T }: BatchSizes, { H, F, E, K, dtype }: Sizes,
): void {
  kernels.moeDownForward(slots, state.h, state.offsets, weights.down, T, H, F, E, K, dtype);
  kernels.moeCombine(out, state.sum, slots, state.weight, state.slotOf, T, H, K, dtype);
}

/**
 * dx = the gradient of `sum`, where dx comes in as the gradient of the layer's output; the weights' gradients are added to;
 * without `accumulate` those of the experts' matrices are stored instead, all of them, whatever is there.
 * auxScale: aux loss weight / microbatches of the step. gateUp is overwritten by its gradient.
 */
export function moeBackward(
  kernels: Kernels, dx: Tensor, gradients: LayerViews, scratch: MoeScratch, state: MoeState, weights: LayerViews, { T }: BatchSizes, sizes: Sizes,
  auxScale: number, accumulate: boolean,
): void {
  const add = accumulate ? 1 : 0;
  const { H, F, E, K, dtype } = sizes;
  const { slotToken, slotWeight, slotOf, offsets } = state;
  const gateUp = state.gateUp!;
  kernels.moeDownBackward(gateUp, scratch.h, scratch.dweight, dx, gateUp, slotToken, slotWeight, slotOf, offsets, weights.down, T, H, F, E, K, dtype);
  kernels.moeDownWeightGradient(gradients.down, dx, scratch.h ?? state.h, slotToken, slotWeight, offsets, T, H, F, E, K, add, dtype);
  kernels.moeUpBackward(scratch.dslots, gateUp, offsets, weights.gateUp, T, H, F, E, K, dtype);
  kernels.moeUpWeightGradient(gradients.gateUp, gateUp, state.normed2, slotToken, offsets, T, H, F, E, K, add, dtype);
  kernels.softmaxTopkBackward(scratch.dlogits, scratch.dweight, state.probability, state.weight, state.index, state.load, T, E, K, auxScale);
  if (dtype !== 'f32') kernels.cast(scratch.dlogitsCompute, scratch.dlogits, T * E, dtype, 'f32');
  kernels.gemmBeta(gradients.router, scratch.dlogitsCompute, state.normed2, E, H, T, 1, 0, 1, 1, 'f32', dtype);
  kernels.gemm(scratch.dnormed2, scratch.dlogitsCompute, weights.router, T, H, E, 0, 0, dtype, dtype);
  kernels.moeCombine(scratch.dnormed2, scratch.dnormed2, scratch.dslots, null, slotOf, T, H, K, dtype);
  kernels.rmsnormResidualBackward(dx, gradients.moeNorm, scratch.dnormed2, dx, state.sum, state.reciprocal2, weights.moeNorm, T, H, dtype);
}
