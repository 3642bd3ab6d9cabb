/**
 * The shapes of models that have a name, and the arithmetic on shapes that needs no device: which tensors a model has,
 * in which order, and how many parameters. The order here is the documented order of the weights digest, of the flat
 * parameter buffer and of checkpoints. Imports nothing of ours but the errors.
 */
import { NnError } from './errors.ts';

/** The architecture: Mixtral with grouped-query attention. Sizes are element counts. */
export interface ModelConfig {
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly layers: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headSize: number;
  readonly experts: number;
  readonly expertsPerToken: number;
  readonly ffnSize: number;
  readonly ropeTheta: number;
  /** NTK scaling of the RoPE base, 1 for none; 8 takes a model trained at 32K to 256K. */
  readonly ntkAlpha: number;
  readonly rmsNormEps: number;
}

const common = { kvHeads: 1, ropeTheta: 10000, ntkAlpha: 1, rmsNormEps: 1e-5 } as const;

export const PRESETS = {
  tiny: { ...common, vocabSize: 512, hiddenSize: 64, layers: 2, queryHeads: 4, headSize: 16, experts: 4, expertsPerToken: 2, ffnSize: 128 },
  demo: { ...common, vocabSize: 4096, hiddenSize: 256, layers: 4, queryHeads: 4, headSize: 64, experts: 8, expertsPerToken: 2, ffnSize: 512 },
  '6.9b': { ...common, vocabSize: 32000, hiddenSize: 768, layers: 30, queryHeads: 12, headSize: 64, experts: 16, expertsPerToken: 4, ffnSize: 6144 },
} as const satisfies Record<string, ModelConfig>;

export type PresetName = keyof typeof PRESETS;

/** One tensor of a model: its Hugging Face name and shape. Matrices are [out, in]. */
export interface ParameterShape {
  readonly name: string;
  readonly shape: readonly number[];
}

/**
 * Every tensor in the documented order: embedding, then for each layer the first norm, q, k, v, o, the second norm, the
 * router, the experts' w1 and w3 in turn (w1 of 0, w3 of 0, w1 of 1, ...), the experts' w2; then the last norm and the head.
 * q, k, v lie side by side so that they are one matrix, and so do w1 and w3 of one expert.
 */
export function parameterShapes(model: ModelConfig): ParameterShape[] {
  const { hiddenSize: hidden, headSize, ffnSize, vocabSize } = model;
  const shapes: ParameterShape[] = [{ name: 'model.embed_tokens.weight', shape: [vocabSize, hidden] }];
  for (let layer = 0; layer < model.layers; layer++) {
    const at = `model.layers.${layer}.`;
    const queryRows = model.queryHeads * headSize;
    const kvRows = model.kvHeads * headSize;
    shapes.push(
      { name: `${at}input_layernorm.weight`, shape: [hidden] },
      { name: `${at}self_attn.q_proj.weight`, shape: [queryRows, hidden] },
      { name: `${at}self_attn.k_proj.weight`, shape: [kvRows, hidden] },
      { name: `${at}self_attn.v_proj.weight`, shape: [kvRows, hidden] },
      { name: `${at}self_attn.o_proj.weight`, shape: [hidden, queryRows] },
      { name: `${at}post_attention_layernorm.weight`, shape: [hidden] },
      { name: `${at}block_sparse_moe.gate.weight`, shape: [model.experts, hidden] },
    );
    const experts = Array.from({ length: model.experts }, (_, expert) => `${at}block_sparse_moe.experts.${expert}.`);
    for (const expert of experts) {
      shapes.push({ name: `${expert}w1.weight`, shape: [ffnSize, hidden] }, { name: `${expert}w3.weight`, shape: [ffnSize, hidden] });
    }
    for (const expert of experts) shapes.push({ name: `${expert}w2.weight`, shape: [hidden, ffnSize] });
  }
  shapes.push({ name: 'model.norm.weight', shape: [hidden] }, { name: 'lm_head.weight', shape: [vocabSize, hidden] });
  return shapes;
}

export const elementCount = (shape: readonly number[]): number => shape.reduce((product, size) => product * size, 1);

export function parameterCount(model: ModelConfig): number {
  return parameterShapes(model).reduce((sum, { shape }) => sum + elementCount(shape), 0);
}

/** Parameters that one token's forward pass multiplies with: all but the experts that are not chosen and the embedding. */
export function activeParameterCount(model: ModelConfig): number {
  const idle = model.layers * (model.experts - model.expertsPerToken) * 3 * model.hiddenSize * model.ffnSize;
  return parameterCount(model) - idle - model.vocabSize * model.hiddenSize;
}

/** FLOPs of training on one token (forward and backward) in sequences of `sequenceLength`, causal attention counted at half. */
export function trainingFlopsPerToken(model: ModelConfig, sequenceLength: number): number {
  const attention = 3 * model.layers * 2 * model.queryHeads * model.headSize * sequenceLength;
  return 6 * activeParameterCount(model) + attention;
}

const positiveIntegers = [
  'vocabSize', 'hiddenSize', 'layers', 'queryHeads', 'kvHeads', 'headSize', 'experts', 'expertsPerToken', 'ffnSize',
] as const satisfies readonly (keyof ModelConfig)[];

/** Throws SPEC_INVALID, naming the field, unless the sizes make a model. `where` names the file or object they come from. */
export function validateModel(model: ModelConfig, where: string): void {
  const refuse = (field: keyof ModelConfig, problem: string): never => {
    throw new NnError('SPEC_INVALID', `${where}: model.${field} ${problem}`, { field: `model.${field}`, value: model[field] });
  };
  for (const field of positiveIntegers) {
    if (!Number.isSafeInteger(model[field]) || model[field] < 1) refuse(field, `must be a positive whole number, not ${model[field]}`);
  }
  if (model.hiddenSize !== model.queryHeads * model.headSize) {
    refuse('hiddenSize', `is ${model.hiddenSize}, but must be queryHeads x headSize = ${model.queryHeads} x ${model.headSize}`);
  }
  if (model.queryHeads % model.kvHeads !== 0) refuse('kvHeads', `is ${model.kvHeads}, but must divide queryHeads = ${model.queryHeads}`);
  if (model.headSize % 2 !== 0) refuse('headSize', `is ${model.headSize}, but must be even for RoPE`);
  if (model.headSize < 4) refuse('headSize', `is ${model.headSize}, but must be at least 4`);
  if (model.expertsPerToken > model.experts) {
    refuse('expertsPerToken', `is ${model.expertsPerToken}, but there are only ${model.experts} experts`);
  }
  if (!(model.ropeTheta > 1)) refuse('ropeTheta', 'must be above 1');
  if (!(model.ntkAlpha >= 1)) refuse('ntkAlpha', 'must be at least 1');
  if (!(model.rmsNormEps > 0)) refuse('rmsNormEps', 'must be above 0');
}
