/**
 * The shape letters of nn.h for one model, and of one call. Pure; every file of workers/model speaks in these letters.
 *
 *   B sequences   S sequence length   T = B*S tokens   H hidden size   F ffn size   E experts   K experts per token
 *   N = T*K slots   V vocabulary   Q query heads   G key/value heads   D head size   P = (Q + 2*G)*D columns of qkv   L layers
 */
import type { ModelConfig } from '../../config/presets.ts';
import type { Precision } from '../../config/run-spec.ts';
import type { ComputeType } from '../../cuda/tensor.ts';

/** What a model fixes. */
export interface Sizes {
  readonly H: number;
  readonly F: number;
  readonly E: number;
  readonly K: number;
  readonly V: number;
  readonly Q: number;
  readonly G: number;
  readonly D: number;
  readonly P: number;
  readonly L: number;
  readonly epsilon: number;
  /** Type of weights and activations in the kernels. */
  readonly dtype: ComputeType;
}

/** What a batch fixes. */
export interface BatchSizes {
  readonly B: number;
  readonly S: number;
  readonly T: number;
}

export const computeType = (precision: Precision): ComputeType => (precision === 'bf16' ? 'bf16' : 'f32');

export function sizesOf(model: ModelConfig, precision: Precision): Sizes {
  return {
    H: model.hiddenSize,
    F: model.ffnSize,
    E: model.experts,
    K: model.expertsPerToken,
    V: model.vocabSize,
    Q: model.queryHeads,
    G: model.kvHeads,
    D: model.headSize,
    P: (model.queryHeads + 2 * model.kvHeads) * model.headSize,
    L: model.layers,
    epsilon: model.rmsNormEps,
    dtype: computeType(precision),
  };
}
