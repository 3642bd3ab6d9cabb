/**
 * One layer: attention, then the experts, each with its residual. Forward, the part of the forward that a backward needs
 * again, and backward. Only the order; memory comes from the plan. Shape letters: sizes.ts. Called by trainer.ts.
 */
import type { Kernels, Tensor } from '../../cuda/device.ts';
import { attentionBackward, attentionForward } from './attention.ts';
import type { AttentionScratch, AttentionState, RopeTables } from './attention.ts';
import { combineForward, expertsForward, moeBackward, routeForward } from './moe.ts';
import type { MoeScratch, MoeState } from './moe.ts';
import type { LayerViews } from './parameters.ts';
import type { BatchSizes, Sizes } from './sizes.ts';

/** Memory of one layer's forward. */
export interface LayerState extends AttentionState, MoeState {
  /** [T, H]: the attention's output before the residual; scratch. */
  readonly delta: Tensor;
}

export interface LayerScratch extends AttentionScratch, MoeScratch {}

/** out = the layer of x, and aux = its aux loss. `slots` [N, H] is scratch. */
export function layerForward(
  kernels: Kernels, out: Tensor, aux: Tensor, slots: Tensor, state: LayerState, x: Tensor, weights: LayerViews, rope: RopeTables,
  batch: BatchSizes, sizes: Sizes,
): void {
  layerInner(kernels, state, x, weights, rope, batch, sizes);
  combineForward(kernels, out, slots, state, weights, batch, sizes);
  kernels.auxLoss(aux, state.probability, state.load, batch.T, sizes.E, sizes.K);
}

/** Fills `state` from x as layerForward did, to the same bits, without computing the layer's output again. */
export function layerInner(
  kernels: Kernels, state: LayerState, x: Tensor, weights: LayerViews, rope: RopeTables, batch: BatchSizes, sizes: Sizes,
): void {
  attentionForward(kernels, state.delta, state, x, weights, rope, batch, sizes);
  routeForward(kernels, state, x, state.delta, weights, batch, sizes);
  expertsForward(kernels, state, weights, batch, sizes);
}

/** dx comes in as the gradient of the layer's output and goes out as that of x. `accumulate`: see moeBackward. */
export function layerBackward(
  kernels: Kernels, dx: Tensor, gradients: LayerViews, scratch: LayerScratch, state: LayerState, x: Tensor, weights: LayerViews, rope: RopeTables,
  batch: BatchSizes, sizes: Sizes, auxScale: number, accumulate: boolean,
): void {
  moeBackward(kernels, dx, gradients, scratch, state, weights, batch, sizes, auxScale, accumulate);
  attentionBackward(kernels, dx, gradients, scratch, state, x, weights, rope, batch, sizes);
}
