/**
 * The run spec: everything that decides what a run computes, and nothing about where. The weights after step t are a pure
 * function of (spec, data), so whatever could change a bit is in here; worker counts and machines are not.
 * Called by the client, the CLI and the HTTP API on whatever a user wrote; everybody else gets a checked RunSpec.
 */
import { z } from 'zod';
import { NnError } from './errors.ts';
import { PRESETS, validateModel } from './presets.ts';
import type { ModelConfig, PresetName } from './presets.ts';

const count = z.int().positive();
const countOrZero = z.int().nonnegative();
const fraction = z.number().min(0).max(1);

const modelSchema = z.strictObject({
  preset: z.enum(Object.keys(PRESETS) as [PresetName, ...PresetName[]]).optional(),
  vocabSize: count.optional(),
  hiddenSize: count.optional(),
  layers: count.optional(),
  queryHeads: count.optional(),
  kvHeads: count.optional(),
  headSize: count.optional(),
  experts: count.optional(),
  expertsPerToken: count.optional(),
  ffnSize: count.optional(),
  ropeTheta: z.number().positive().optional(),
  ntkAlpha: z.number().min(1).optional(),
  rmsNormEps: z.number().positive().optional(),
});

const specSchema = z.strictObject({
  /** The run's name and id: its directory, its queue keys. */
  name: z.string().regex(/^[a-z0-9][a-z0-9._-]{0,63}$/, 'must be 1 to 64 of a-z 0-9 . _ - and start with a letter or digit'),
  /** A preset, sizes, or a preset with some sizes changed. */
  model: z.union([z.enum(Object.keys(PRESETS) as [PresetName, ...PresetName[]]), modelSchema]),
  data: z.strictObject({
    /** Token file to train on. */
    train: z.string().min(1),
    /** Token file to evaluate on; without it there are no evals. */
    validation: z.string().min(1).optional(),
    /** tokenizer.json to put into checkpoints. */
    tokenizer: z.string().min(1).optional(),
  }),
  /** Seeds the initial weights and the order of the data. */
  seed: z.int().min(0).max(0xffffffff).default(0),
  /** Optimizer steps in all. */
  steps: count,
  batch: z.strictObject({
    /** Slices of a step's batch that can be computed apart; never the number of workers. */
    shards: count.max(4096).default(1),
    /** Microbatches that a shard accumulates. */
    microBatches: count.max(4096).default(1),
    /** Sequences in a microbatch. */
    sequences: count.max(65536),
    /** Tokens in a sequence. */
    sequenceLength: count.max(1 << 20),
  }),
  optimizer: z
    .strictObject({
      learningRate: z.number().positive().default(1e-3),
      minLearningRateRatio: fraction.default(0.1),
      warmupSteps: countOrZero.default(0),
      beta1: z.number().min(0).lt(1).default(0.9),
      beta2: z.number().min(0).lt(1).default(0.95),
      epsilon: z.number().positive().default(1e-8),
      weightDecay: z.number().nonnegative().default(0.1),
      clipNorm: z.number().positive().default(1),
      auxLossWeight: z.number().nonnegative().default(0.01),
      /** bf16 halves the memory of m and v. */
      stateDtype: z.enum(['fp32', 'bf16']).default('fp32'),
    })
    .prefault({}),
  /** fp32, or bf16 weights and activations with float32 master weights (GPU only). */
  precision: z.enum(['fp32', 'bf16']).default('fp32'),
  /** What the backward pass computes again instead of keeping. */
  recompute: z.enum(['none', 'swiglu', 'layer']).default('swiglu'),
  /** Workers that share a step, or `auto`: as many as shorten the step, by what was measured. */
  parallelism: z.union([count.max(4096), z.literal('auto')]).default('auto'),
  evaluation: z
    .strictObject({
      /** Steps between evals; 0: only at the end. */
      every: countOrZero.default(0),
      /** Sequences (of batch.sequenceLength) an eval reads, from the start of the validation file. */
      sequences: count.default(32),
    })
    .prefault({}),
  checkpoint: z
    .strictObject({
      /** Steps between checkpoints; 0: only at the end. */
      every: countOrZero.default(0),
      /** Checkpoints kept, newest first. */
      keep: count.default(2),
      /** Checkpoints at multiples of this many steps are kept for ever; 0: none. */
      keepEvery: countOrZero.default(0),
    })
    .prefault({}),
  /** Steps between comparisons of the replicas' weight digests; 0: never. */
  compareDigestsEvery: countOrZero.default(50),
  /** Steps in a row with NaN or infinite gradients after which the run stops. */
  maxNonFiniteSteps: count.default(5),
  /**
   * A loss that rises too far rolls the run back to an earlier version, from where it goes on with the data after that which was read
   * since: a step is above when its loss exceeds `factor` times the median of the `window` steps before that were not.
   */
  lossSpike: z
    .strictObject({
      /** Above 1; 0: never roll back. */
      factor: z.number().max(1e6).refine((value) => value === 0 || value > 1, 'must be above 1, or 0 for never').default(0),
      /** Steps whose losses are compared with; before there are so many, nothing is above. */
      window: count.max(1000).default(50),
      /** Steps in a row that must be above. */
      patience: count.max(100).default(3),
      /** Rollbacks after which another spike fails the run. */
      maxRollbacks: countOrZero.max(100).default(3),
    })
    .prefault({}),
  /** Seconds in phase `running` after which an attempt at the run ends as failed, at a checkpoint; a retry has them anew. 0: no limit. */
  maxDurationSeconds: countOrZero.default(0),
  /** 1 is served first. */
  priority: z.int().min(1).max(1000).default(100),
  /** Start from the weights of this checkpoint directory (not its optimizer state) instead of random ones. */
  initialCheckpoint: z.string().min(1).optional(),
});

/** What a user may write. */
export type RunSpecInput = z.input<typeof specSchema>;

type Parsed = z.output<typeof specSchema>;

/** A checked spec with all defaults filled in; frozen JSON. */
export type RunSpec = Readonly<Omit<Parsed, 'model'> & { model: ModelConfig }>;

export type Precision = RunSpec['precision'];
export type Recompute = RunSpec['recompute'];

/** Tokens of one step over all shards. */
export const tokensPerStep = ({ batch }: RunSpec): number =>
  batch.shards * batch.microBatches * batch.sequences * batch.sequenceLength;

function resolveModel(model: Parsed['model'], where: string): ModelConfig {
  const given = typeof model === 'string' ? { preset: model } : model;
  const { preset, ...sizes } = given;
  const base: Partial<ModelConfig> = preset === undefined ? { ropeTheta: 10000, ntkAlpha: 1, rmsNormEps: 1e-5, kvHeads: 1 } : PRESETS[preset];
  const defined = Object.fromEntries(Object.entries(sizes).filter(([, value]) => value !== undefined));
  const merged: Partial<ModelConfig> = { ...base, ...defined };
  for (const field of ['vocabSize', 'hiddenSize', 'layers', 'queryHeads', 'experts', 'expertsPerToken', 'ffnSize'] as const) {
    if (merged[field] === undefined) throw new NnError('SPEC_INVALID', `${where}: model.${field} is missing and no preset is named`, { field: `model.${field}` });
  }
  const resolved = merged as ModelConfig;
  if (defined['headSize'] === undefined && (defined['hiddenSize'] !== undefined || defined['queryHeads'] !== undefined || preset === undefined)) {
    if (resolved.hiddenSize % resolved.queryHeads !== 0) {
      throw new NnError('SPEC_INVALID', `${where}: model.hiddenSize is ${resolved.hiddenSize}, but must be divisible by model.queryHeads = ${resolved.queryHeads}`, {
        field: 'model.hiddenSize',
        value: resolved.hiddenSize,
      });
    }
    (resolved as { headSize: number }).headSize = resolved.hiddenSize / resolved.queryHeads;
  }
  validateModel(resolved, where);
  return resolved;
}

function describeIssue(issue: z.core.$ZodIssue): string {
  const at = issue.path.map(String).join('.');
  if (issue.code === 'unrecognized_keys') {
    const keys = issue.keys.map((key) => (at === '' ? key : `${at}.${key}`));
    return `unknown key ${keys.join(', ')}`;
  }
  if (issue.code === 'invalid_union') {
    const inner = issue.errors.flat().find((each) => each.code === 'unrecognized_keys' || each.path.length > 0);
    if (inner !== undefined) return describeIssue({ ...inner, path: [...issue.path, ...inner.path] });
  }
  return `${at === '' ? 'the spec' : at}: ${issue.message}`;
}

/** Checks a user's spec and fills in the defaults. Throws SPEC_INVALID with one line that names `where` and the field. */
export function parseRunSpec(input: unknown, where = 'run spec'): RunSpec {
  const result = specSchema.safeParse(input);
  if (!result.success) {
    const issue = result.error.issues[0]!;
    throw new NnError('SPEC_INVALID', `${where}: ${describeIssue(issue)}`, { field: issue.path.map(String).join('.') });
  }
  const { model, ...rest } = result.data;
  if (rest.optimizer.warmupSteps > rest.steps) {
    throw new NnError('SPEC_INVALID', `${where}: optimizer.warmupSteps is ${rest.optimizer.warmupSteps}, but there are only ${rest.steps} steps`, {
      field: 'optimizer.warmupSteps',
    });
  }
  return { ...rest, model: resolveModel(model, where) };
}
