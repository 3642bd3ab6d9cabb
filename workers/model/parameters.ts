/**
 * Where each parameter lies in a flat buffer. Master weights (in bf16: each of their halves), m, v and the gradient are
 * buffers of this one layout, so that a position means the same parameter in all of them. Pure but for `viewsOf`, which cuts
 * tensors out of a buffer. Used by the trainer, its gradients, the decoder, the plan and the exchange.
 *
 *   embedding | per layer: norm | q k v | o | norm | router | (w1 w3) of every expert | w2 of every expert | norm | head
 *
 * Each group between bars starts at a multiple of 64 elements; inside a group nothing is padded, so that q, k, v are one
 * [P, H] matrix, w1 and w3 are [E, 2F, H], and w2 is [E, H, F]. The padding is zero in every buffer, and stays so.
 */
import { elementCount, parameterShapes } from '../../config/presets.ts';
import type { ModelConfig } from '../../config/presets.ts';
import { slice } from '../../cuda/tensor.ts';
import type { Tensor } from '../../cuda/tensor.ts';

/** One tensor of the model at its place: `offset` counts elements of the flat buffer. */
export interface PlacedParameter {
  readonly name: string;
  readonly shape: readonly number[];
  readonly offset: number;
  readonly length: number;
}

/** A run of elements of a flat buffer. */
export interface ElementRange {
  readonly offset: number;
  readonly length: number;
}

/** A run of elements which AdamW treats alike. */
export interface DecayRange extends ElementRange {
  readonly decay: boolean;
}

export interface ParameterLayout {
  readonly parameters: readonly PlacedParameter[];
  /** Elements of a flat buffer, padding included; a multiple of 64. */
  readonly flatLength: number;
  readonly ranges: readonly DecayRange[];
}

/** Weights from elsewhere, by Hugging Face name, as float32: a checkpoint reader is one. */
export interface WeightSource {
  readonly model: ModelConfig;
  has(name: string): boolean;
  read(name: string, into: Float32Array): void;
}

const ALIGNMENT = 64;

const alignUp = (length: number): number => Math.ceil(length / ALIGNMENT) * ALIGNMENT;

/** Parameters of one name without layer and expert number, q k v and w1 w3 taken together, are one group. */
function groupOf(name: string): string {
  return name
    .replace(/\.[qkv]_proj\./, '.qkv.')
    .replace(/\.experts\.\d+\.w[13]\./, '.experts.up.')
    .replace(/\.experts\.\d+\.w2\./, '.experts.down.');
}

/** The layout of a model. */
export function layoutParameters(model: ModelConfig): ParameterLayout {
  const parameters: PlacedParameter[] = [];
  const ranges: { offset: number; length: number; decay: boolean }[] = [];
  let end = 0;
  let group = '';
  for (const { name, shape } of parameterShapes(model)) {
    const decay = shape.length >= 2;
    if (groupOf(name) !== group) {
      group = groupOf(name);
      end = alignUp(end);
      const last = ranges.at(-1);
      // The padding before a group goes to the range before it.
      if (last !== undefined) last.length = end - last.offset;
      if (last?.decay !== decay) ranges.push({ offset: end, length: 0, decay });
    }
    const length = elementCount(shape);
    parameters.push({ name, shape, offset: end, length });
    end += length;
  }
  const flatLength = alignUp(end);
  const last = ranges.at(-1)!;
  last.length = flatLength - last.offset;
  return { parameters, flatLength, ranges };
}

/** Where the experts' matrices lie, in rising order and without padding: what the two nn_moe_*_weight_gradient write. */
export function expertRanges({ parameters }: ParameterLayout): ElementRange[] {
  const ranges: { offset: number; length: number }[] = [];
  for (const { name, offset, length } of parameters) {
    if (!/\.experts\.\d+\./.test(name)) continue;
    const last = ranges.at(-1);
    if (last !== undefined && last.offset + last.length === offset) last.length += length;
    else ranges.push({ offset, length });
  }
  return ranges;
}

/** The matrices of one layer, as kernels take them. */
export interface LayerViews {
  readonly attentionNorm: Tensor; // [H]
  readonly qkv: Tensor; // [P, H]
  readonly output: Tensor; // [H, Q*D]
  readonly moeNorm: Tensor; // [H]
  readonly router: Tensor; // [E, H]
  readonly gateUp: Tensor; // [E, 2*F, H]
  readonly down: Tensor; // [E, H, F]
}

/** The matrices of a model in one flat buffer, be it weights or gradients. */
export interface ModelViews {
  readonly embedding: Tensor; // [V, H]
  readonly layers: readonly LayerViews[];
  readonly norm: Tensor; // [H]
  readonly head: Tensor; // [V, H]
}

/** Cuts a flat buffer into the model's matrices. */
export function viewsOf(model: ModelConfig, layout: ParameterLayout, flat: Tensor): ModelViews {
  const groups = new Map<string, { offset: number; length: number }>();
  for (const { name, offset, length } of layout.parameters) {
    const group = groups.get(groupOf(name));
    if (group === undefined) groups.set(groupOf(name), { offset, length });
    else group.length += length;
  }
  const view = (name: string): Tensor => {
    const group = groups.get(name);
    if (group === undefined) throw new Error(`the model has no parameters ${name}`);
    return slice(flat, group.offset, group.length);
  };
  const layers = Array.from({ length: model.layers }, (_, layer): LayerViews => {
    const at = `model.layers.${layer}.`;
    return {
      attentionNorm: view(`${at}input_layernorm.weight`),
      qkv: view(`${at}self_attn.qkv.weight`),
      output: view(`${at}self_attn.o_proj.weight`),
      moeNorm: view(`${at}post_attention_layernorm.weight`),
      router: view(`${at}block_sparse_moe.gate.weight`),
      gateUp: view(`${at}block_sparse_moe.experts.up.weight`),
      down: view(`${at}block_sparse_moe.experts.down.weight`),
    };
  });
  return { embedding: view('model.embed_tokens.weight'), layers, norm: view('model.norm.weight'), head: view('lm_head.weight') };
}
