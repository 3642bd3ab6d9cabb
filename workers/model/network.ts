/**
 * The forward and the backward of the whole model over the buffers of a plan: which layer runs when, what is computed again,
 * and the one report that is read back. Knows nothing of optimizers and steps. Used by the trainer. Shape letters: sizes.ts.
 */
import type { Device, Kernels, Tensor } from '../../cuda/device.ts';
import type { Arena } from './arena.ts';
import type { RopeTables } from './attention.ts';
import { embeddingBackward, embeddingForward, headLogits, headLoss, headLossAndBackward } from './head.ts';
import type { HeadState } from './head.ts';
import { layerBackward, layerForward, layerInner } from './layer.ts';
import type { LayerScratch, LayerState } from './layer.ts';
import { expertsForward } from './moe.ts';
import type { ModelViews } from './parameters.ts';
import { reportBytes } from './plan.ts';
import type { Kept, ScratchName, StateName } from './plan.ts';
import { Replay } from './replay.ts';
import type { BatchSizes, Sizes } from './sizes.ts';

/** Token ids of whole sequences, one after the other; a target of -100 is ignored. */
export interface Batch {
  readonly inputs: Int32Array;
  readonly targets: Int32Array;
}

export interface Report {
  readonly lossSum: number;
  readonly aux: number[];
  readonly expertLoad: number[][];
}

export interface NetworkOptions {
  readonly sizes: Sizes;
  readonly sequenceLength: number;
  readonly maximumTokens: number;
  /** What each layer keeps, by the plan. */
  readonly kept: readonly Kept[];
  /** Whether a microbatch becomes a graph once it repeats. */
  readonly graph: boolean;
  readonly ropeTheta: number;
  readonly ntkAlpha: number;
  readonly weights: ModelViews;
  /** Where gradients are added; null: forward only. */
  readonly gradients: ModelViews | null;
}

/** Memory of one layer at work. */
interface LayerMemory {
  readonly x: Tensor;
  readonly out: Tensor;
  readonly aux: Tensor;
  readonly slots: Tensor;
  readonly kept: Kept;
  /** Of the forward, and of the backward: the same where nothing is computed again. */
  readonly state: LayerState;
  readonly backState: LayerState;
  readonly scratch: LayerScratch | null;
}

export class Network {
  readonly #device: Device;
  readonly #kernels: Kernels;
  readonly #options: NetworkOptions;
  readonly #rope: RopeTables;
  readonly #tokens: Tensor;
  readonly #targets: Tensor;
  readonly #head: HeadState;
  readonly #dx: Tensor | null;
  readonly #last: Tensor;
  readonly #layers: readonly LayerMemory[];
  readonly #report: Tensor;
  readonly #lossSum: Tensor;
  readonly #reportHost: Uint8Array;
  /** Of a microbatch that stores the experts' gradients, and of one that adds to them: a recording fixes which. */
  readonly #storing: Replay;
  readonly #adding: Replay;
  /** Sequence length that the position table holds now. */
  #positionsOf = 0;

  /** Fills the RoPE tables. */
  constructor(device: Device, arena: Arena, options: NetworkOptions) {
    const { sizes, sequenceLength, ropeTheta, ntkAlpha } = options;
    const { L, E, D } = sizes;
    this.#device = device;
    this.#kernels = device.kernels;
    this.#options = options;
    this.#storing = new Replay(device, options.graph);
    this.#adding = new Replay(device, options.graph);
    this.#rope = { cosine: arena.tensor('cosine'), sine: arena.tensor('sine'), position: arena.tensor('position'), positions: sequenceLength };
    this.#tokens = arena.tensor('tokens');
    this.#targets = arena.tensor('targets');
    this.#head = { normed: arena.tensor('head.normed'), reciprocal: arena.tensor('head.reciprocal'), loss: arena.tensor('head.loss') };
    this.#dx = options.gradients === null ? null : arena.tensor('dx');
    this.#last = arena.tensor(`x.${L}`);
    this.#report = arena.tensor('report');
    this.#reportHost = new Uint8Array(reportBytes(L, E));
    this.#lossSum = { address: this.#report.address, dtype: 'f64', length: 1 };
    const training = options.gradients !== null;
    this.#layers = Array.from({ length: L }, (_, layer): LayerMemory => {
      const load: Tensor = { address: this.#report.address + 8 + 4 * L + 4 * E * layer, dtype: 'i32', length: E };
      const kept = options.kept[layer]!;
      const state = stateFrom(arena, `layer.${layer}`, load);
      const again = (): LayerState =>
        kept === 'nothing' ? stateFrom(arena, `again.${layer}`, load) : { ...state, gateUp: arena.tensor(`again.${layer}.gateUp`), h: arena.tensor(`again.${layer}.h`) };
      return {
        x: arena.tensor(`x.${layer}`),
        out: arena.tensor(`x.${layer + 1}`),
        aux: { address: this.#report.address + 8 + 4 * layer, dtype: 'f32', length: 1 },
        slots: arena.tensor(`slots.${layer}`),
        kept,
        state,
        backState: training && (kept === 'nothing' || kept === 'attention') ? again() : state,
        scratch: training ? scratchFrom(arena, layer) : null,
      };
    });
    this.#kernels.ropeFreqs(this.#rope.cosine, this.#rope.sine, sequenceLength, D, ropeTheta, ntkAlpha);
  }

  /**
   * Forward and backward; gradients are added to. Without `accumulate` those of the experts' matrices are stored, whatever is there.
   * scale.loss and scale.aux as in Trainer.accumulate.
   */
  forwardAndBackward(batch: Batch, scale: { readonly loss: number; readonly aux: number }, accumulate: boolean): Report {
    const { gradients, sequenceLength } = this.#options;
    if (gradients === null) throw new Error('this network has no memory for gradients');
    const of = this.#begin(batch.inputs, batch.targets, sequenceLength);
    const replay = accumulate ? this.#adding : this.#storing;
    replay.run(`${of.T} tokens, ${scale.loss}, ${scale.aux}`, () => this.#queueMicrobatch(of, gradients, scale, accumulate));
    return this.#readReport();
  }

  /** The kernels of a microbatch, none of which the host waits for. */
  #queueMicrobatch(of: BatchSizes, gradients: ModelViews, scale: { readonly loss: number; readonly aux: number }, accumulate: boolean): void {
    const { sizes, weights } = this.#options;
    const kernels = this.#kernels;
    const dx = this.#dx!;
    this.#forward(of);
    headLossAndBackward(kernels, this.#lossSum, dx, gradients, this.#head, this.#last, this.#targets, weights, of, sizes, scale.loss);
    for (let layer = sizes.L - 1; layer >= 0; layer--) {
      const { x, kept, backState, scratch } = this.#layers[layer]!;
      if (kept === 'nothing') layerInner(kernels, backState, x, weights.layers[layer]!, this.#rope, of, sizes);
      else if (kept === 'attention') expertsForward(kernels, backState, weights.layers[layer]!, of, sizes);
      layerBackward(kernels, dx, gradients.layers[layer]!, scratch!, backState, x, weights.layers[layer]!, this.#rope, of, sizes, scale.aux, accumulate);
    }
    embeddingBackward(kernels, gradients, dx, this.#tokens, of, sizes);
  }

  /** Forward and loss only. */
  evaluate(batch: Batch, sequenceLength: number): Report {
    const { sizes, weights } = this.#options;
    const of = this.#begin(batch.inputs, batch.targets, sequenceLength);
    this.#forward(of);
    headLoss(this.#kernels, this.#lossSum, this.#head, this.#last, this.#targets, weights, of, sizes);
    return this.#readReport();
  }

  /** Logits [T, V] in float32. */
  logits(inputs: Int32Array): Float32Array {
    const { sizes, weights, sequenceLength } = this.#options;
    const of = this.#begin(inputs, null, sequenceLength);
    this.#forward(of);
    const logits = this.#device.allocate('f32', of.T * sizes.V);
    try {
      headLogits(this.#kernels, logits, this.#head, this.#last, weights, of.T, sizes);
      const host = new Float32Array(of.T * sizes.V);
      this.#device.download(host, logits);
      return host;
    } finally {
      this.#device.free(logits);
    }
  }

  /** Gives the recorded graphs back. */
  close(): void {
    this.#storing.close();
    this.#adding.close();
  }

  /** Uploads a batch. Its length must be whole sequences, no more tokens than planned. */
  #begin(inputs: Int32Array, targets: Int32Array | null, S: number): BatchSizes {
    const { maximumTokens, sequenceLength } = this.#options;
    const T = inputs.length;
    if (T === 0 || T > maximumTokens || T % S !== 0 || S > sequenceLength || (targets !== null && targets.length !== T)) {
      throw new Error(`a batch of ${T} inputs and ${targets?.length ?? T} targets in sequences of ${S} does not fit the plan: ${maximumTokens} tokens in sequences of ${sequenceLength}`);
    }
    if (this.#positionsOf !== S) {
      this.#device.upload(this.#rope.position, Int32Array.from({ length: maximumTokens }, (_, token) => token % S));
      this.#positionsOf = S;
    }
    this.#device.upload(this.#tokens, inputs);
    if (targets !== null) this.#device.upload(this.#targets, targets);
    return { B: T / S, S, T };
  }

  #forward(of: BatchSizes): void {
    const { sizes, weights } = this.#options;
    embeddingForward(this.#kernels, this.#layers[0]!.x, this.#tokens, weights, of, sizes);
    for (const [layer, { x, out, aux, slots, state }] of this.#layers.entries()) {
      layerForward(this.#kernels, out, aux, slots, state, x, weights.layers[layer]!, this.#rope, of, sizes);
    }
  }

  /** The one wait of a microbatch. */
  #readReport(): Report {
    const { L, E } = this.#options.sizes;
    this.#device.download(this.#reportHost, this.#report);
    const { buffer, byteOffset } = this.#reportHost;
    const load = new Int32Array(buffer, byteOffset + 8 + 4 * L, L * E);
    return {
      lossSum: new Float64Array(buffer, byteOffset, 1)[0]!,
      aux: Array.from(new Float32Array(buffer, byteOffset + 8, L)),
      expertLoad: Array.from({ length: L }, (_, layer) => Array.from(load.subarray(layer * E, (layer + 1) * E))),
    };
  }
}

function stateFrom(arena: Arena, prefix: string, load: Tensor): LayerState {
  const at = (name: StateName): Tensor => arena.tensor(`${prefix}.${name}`);
  return {
    reciprocal1: at('reciprocal1'), normed1: at('normed1'), qkv: at('qkv'), attention: at('attention'), logSumExp: at('logSumExp'), delta: at('delta'),
    sum: at('sum'), reciprocal2: at('reciprocal2'), normed2: at('normed2'), logits: at('logits'), probability: at('probability'), weight: at('weight'),
    index: at('index'), offsets: at('offsets'), load, slotToken: at('slotToken'), slotWeight: at('slotWeight'), slotOf: at('slotOf'),
    gateUp: arena.has(`${prefix}.gateUp`) ? at('gateUp') : null, h: at('h'),
  };
}

function scratchFrom(arena: Arena, layer: number): LayerScratch {
  const at = (name: ScratchName): Tensor => arena.tensor(`back.${layer}.${name}`);
  const has = (name: ScratchName): boolean => arena.has(`back.${layer}.${name}`);
  return {
    h: has('h') ? at('h') : null, dweight: at('dweight'), dslots: at('dslots'), dlogits: at('dlogits'),
    dlogitsCompute: has('dlogitsCompute') ? at('dlogitsCompute') : at('dlogits'), dnormed2: at('dnormed2'), dattention: at('dattention'),
    dqkv: at('dqkv'), dnormed1: at('dnormed1'),
  };
}
