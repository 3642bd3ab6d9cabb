/**
 * The two-way translation between a ModelConfig and Hugging Face's config.json of a MixtralForCausalLM. Pure; knows no
 * files. Called by checkpoint-files.ts and checkpoint-reader.ts.
 *
 * NTK scaling is written as what every reader of Mixtral understands, a larger rope_theta:
 * base' = base * alpha^(d / (d - 2)), d = head size. Under the key `cuda_nn` the original base and alpha are kept, so that a
 * round trip gives the same ModelConfig; they count only while rope_theta still is what they say.
 */
import { NnError } from '../config/errors.ts';
import { validateModel } from '../config/presets.ts';
import type { ModelConfig } from '../config/presets.ts';
import type { Precision } from '../config/run-spec.ts';
import { SPECIAL_IDS, SPECIAL_TOKENS } from './special-tokens.ts';

/** Positions that the config claims without NTK: what design and presets call a 32K model. */
const BASE_POSITIONS = 32_768;

/** A config that asks for more tensors is refused before they are counted one by one; 6.9b has 1,653. */
const MAXIMUM_TENSORS = 1_000_000;

/** RoPE's base after NTK scaling: base * alpha^(d / (d - 2)). */
export const scaledRopeTheta = ({ ropeTheta, ntkAlpha, headSize }: Pick<ModelConfig, 'ropeTheta' | 'ntkAlpha' | 'headSize'>): number =>
  ntkAlpha === 1 ? ropeTheta : ropeTheta * ntkAlpha ** (headSize / (headSize - 2));

/** config.json of a checkpoint. `maximumPositions`: what a reader may take for the longest sequence (32,768 x alpha). */
export function huggingFaceConfig(
  model: ModelConfig,
  { precision = 'fp32', auxLossWeight = 0.01, maximumPositions }: { precision?: Precision; auxLossWeight?: number; maximumPositions?: number } = {},
): Record<string, unknown> {
  return {
    architectures: ['MixtralForCausalLM'],
    bos_token_id: SPECIAL_IDS.bos,
    cuda_nn: { rope_theta: model.ropeTheta, ntk_alpha: model.ntkAlpha },
    eos_token_id: SPECIAL_IDS.eos,
    head_dim: model.headSize,
    hidden_act: 'silu',
    hidden_size: model.hiddenSize,
    initializer_range: 0.02,
    intermediate_size: model.ffnSize,
    max_position_embeddings: maximumPositions ?? Math.round(BASE_POSITIONS * model.ntkAlpha),
    model_type: 'mixtral',
    num_attention_heads: model.queryHeads,
    num_experts_per_tok: model.expertsPerToken,
    num_hidden_layers: model.layers,
    num_key_value_heads: model.kvHeads,
    num_local_experts: model.experts,
    output_router_logits: false,
    pad_token_id: SPECIAL_IDS.pad,
    rms_norm_eps: model.rmsNormEps,
    rope_theta: scaledRopeTheta(model),
    router_aux_loss_coef: auxLossWeight,
    sliding_window: null,
    tie_word_embeddings: false,
    torch_dtype: precision === 'bf16' ? 'bfloat16' : 'float32',
    use_cache: true,
    vocab_size: model.vocabSize,
  };
}

/**
 * A config.json as text. Readers of Hugging Face's formats tell 10000 from 10000.0 and refuse the one where a float
 * belongs, so floats that happen to be whole are written with a point.
 */
export const encodeHuggingFaceConfig = (config: Readonly<Record<string, unknown>>): Uint8Array =>
  Buffer.from(
    `${JSON.stringify(config, null, 2).replaceAll(/"(rope_theta|ntk_alpha|rms_norm_eps|initializer_range|router_aux_loss_coef)": (-?\d+)(?=[,\n])/g, '"$1": $2.0')}\n`,
  );

type Json = Readonly<Record<string, unknown>>;

const isObject = (value: unknown): value is Json => typeof value === 'object' && value !== null && !Array.isArray(value);

/** Mixtral's own defaults in Hugging Face, for keys that a config may leave out. */
const DEFAULTS: Json = { num_key_value_heads: 8, rms_norm_eps: 1e-5, rope_theta: 1e6, num_experts_per_tok: 2, num_local_experts: 8 };

/**
 * The model that a config.json describes. Throws CHECKPOINT_INVALID, naming `where` and the key, when it is not Mixtral, or
 * asks for what this project does not compute (sliding window, scaled RoPE, tied embeddings, another activation).
 */
export function modelFromHuggingFace(json: unknown, where = 'config.json'): ModelConfig {
  const refuse = (key: string, problem: string): never => {
    throw new NnError('CHECKPOINT_INVALID', `${where}: ${key} ${problem}`, { path: where, key });
  };
  if (!isObject(json)) return refuse('the config', 'is no JSON object');
  const rope: Json = { ...(isObject(json['rope_scaling']) ? json['rope_scaling'] : {}), ...(isObject(json['rope_parameters']) ? json['rope_parameters'] : {}) };
  const value = (key: string): unknown => json[key] ?? (key === 'rope_theta' ? rope['rope_theta'] : undefined) ?? DEFAULTS[key];
  const number = (key: string): number => {
    const found = value(key);
    if (typeof found !== 'number' || !Number.isFinite(found)) return refuse(key, found === undefined ? 'is missing' : `is ${JSON.stringify(found).slice(0, 60)}, but a number is wanted`);
    return found;
  };
  const only = (key: string, wanted: unknown, found: unknown): void => {
    if (found !== undefined && found !== null && found !== wanted) refuse(key, `is ${JSON.stringify(found).slice(0, 60)}, but only ${JSON.stringify(wanted)} can be computed`);
  };
  if (json['model_type'] !== 'mixtral') refuse('model_type', `is ${JSON.stringify(json['model_type'] ?? null).slice(0, 60)}, but "mixtral" is wanted`);
  only('hidden_act', 'silu', json['hidden_act']);
  only('sliding_window', null, json['sliding_window']);
  only('tie_word_embeddings', false, json['tie_word_embeddings']);
  only('rope_type', 'default', rope['rope_type'] ?? rope['type']);

  const hiddenSize = number('hidden_size');
  const queryHeads = number('num_attention_heads');
  const headSize = typeof json['head_dim'] === 'number' ? json['head_dim'] : hiddenSize / queryHeads;
  const ropeTheta = number('rope_theta');
  const own = isObject(json['cuda_nn']) ? json['cuda_nn'] : {};
  const ownRope = { ropeTheta: Number(own['rope_theta']), ntkAlpha: Number(own['ntk_alpha']), headSize };
  const model: ModelConfig = {
    vocabSize: number('vocab_size'),
    hiddenSize,
    layers: number('num_hidden_layers'),
    queryHeads,
    kvHeads: number('num_key_value_heads'),
    headSize,
    experts: number('num_local_experts'),
    expertsPerToken: number('num_experts_per_tok'),
    ffnSize: number('intermediate_size'),
    ...(scaledRopeTheta(ownRope) === ropeTheta ? { ropeTheta: ownRope.ropeTheta, ntkAlpha: ownRope.ntkAlpha } : { ropeTheta, ntkAlpha: 1 }),
    rmsNormEps: number('rms_norm_eps'),
  };
  try {
    validateModel(model, where);
  } catch (error) {
    throw new NnError('CHECKPOINT_INVALID', (error as Error).message, { path: where }, error);
  }
  if (model.layers * (7 + 3 * model.experts) > MAXIMUM_TENSORS) refuse('num_hidden_layers', `x num_local_experts = ${model.layers} x ${model.experts} is beyond what can be read`);
  return model;
}

/** generation_config.json: where generation begins and ends. */
export const generationConfig = (): Record<string, unknown> => ({
  bos_token_id: SPECIAL_IDS.bos,
  eos_token_id: SPECIAL_IDS.eos,
  pad_token_id: SPECIAL_IDS.pad,
});

/** tokenizer_config.json: what lets transformers load tokenizer.json as it is. */
export const tokenizerConfig = (): Record<string, unknown> => ({
  tokenizer_class: 'PreTrainedTokenizerFast',
  pad_token: SPECIAL_TOKENS[0],
  unk_token: SPECIAL_TOKENS[1],
  bos_token: SPECIAL_TOKENS[2],
  eos_token: SPECIAL_TOKENS[3],
  clean_up_tokenization_spaces: false,
});
