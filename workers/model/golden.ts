/**
 * The check of this build against a golden model: a small model with its forward, gradients, training and greedy tokens, computed
 * in float64 by an independent implementation (test/golden/README.md says what such a file holds). Any shape is taken that the
 * model allows. In bf16 the reference is the CPU in float32, itself checked against the file, with the same weights rounded to
 * bf16. Measures and compares; what is done about a mismatch is the caller's. Called by `doctor --golden` and bench.
 */
import { readFileSync } from 'node:fs';
import { z } from 'zod';
import { NnError } from '../../config/errors.ts';
import { elementCount, parameterShapes, validateModel } from '../../config/presets.ts';
import type { ModelConfig } from '../../config/presets.ts';
import type { Precision } from '../../config/run-spec.ts';
import { Device } from '../../cuda/device.ts';
import type { DeviceOptions } from '../../cuda/device.ts';
import { SafetensorsFile, decodeBf16, encodeBf16 } from '../../data/safetensors.ts';
import { Decoder } from './decoder.ts';
import type { Batch } from './network.ts';
import { Trainer } from './trainer.ts';
import type { PlacedParameter, WeightSource } from './trainer.ts';

/** One comparison: the largest error of its kind. */
export interface GoldenRow {
  readonly what: string;
  /** How the error is measured. */
  readonly measure: 'relative' | 'absolute' | 'norm of the difference / norm' | 'entries that differ';
  readonly error: number;
  readonly tolerance: number;
  readonly passed: boolean;
  /** Which layer, tensor or step has the largest error, where there are several. */
  readonly worst?: string;
  /** How many things were compared. */
  readonly count: number;
}

export interface GoldenReport {
  readonly path: string;
  readonly model: ModelConfig;
  readonly precision: Precision;
  readonly rows: readonly GoldenRow[];
  readonly passed: boolean;
}

/** Largest errors allowed in float32. The history's are wider than a single step's: ten steps add up their rounding. */
export const GOLDEN_TOLERANCES = {
  loss: 1e-5,
  logits: 2e-4,
  gradient: 1e-4,
  historyLoss: 1e-4,
  historyNorm: 1e-3,
  learningRate: 1e-12,
  weightsAfter: 1e-3,
} as const;

/**
 * Largest errors allowed in bf16, whose numbers have 8 bits: each product rounds its result by up to 1/256. A single tensor's
 * gradient may be farther off than all together: a token near the border of two experts goes to the other one.
 */
export const GOLDEN_TOLERANCES_BF16 = { loss: 1e-2, gradients: 5e-2, gradient: 0.15, logits: 5e-2 } as const;

/** Tokens of `greedy_ref` that were given; the others were generated. */
const PROMPT_TOKENS = 5;

const size = z.int().positive();
const goldenSchema = z.object({
  config: z.object({
    vocabSize: size, hiddenSize: size, layers: size, queryHeads: size, kvHeads: size, headSize: size.optional(), experts: size, expertsPerToken: size,
    ffnSize: size, ropeTheta: z.number(), ntkAlpha: z.number().default(1), rmsNormEps: z.number(),
  }),
  batch: size,
  seq: size,
  loss: z.number(),
  ce: z.number(),
  aux_sum: z.number(),
  grad_norm: z.number(),
  train: z.object({
    hyper: z.object({
      base_lr: z.number(), warmup: z.int().nonnegative(), total: size, beta1: z.number(), beta2: z.number(), eps: z.number(), weight_decay: z.number(),
      clip: z.number(), aux_weight: z.number(),
    }),
    history: z.array(z.object({ step: size, ce: z.number(), aux_sum: z.number(), grad_norm: z.number(), lr: z.number() })),
  }),
});

type GoldenJson = z.output<typeof goldenSchema>;

/** The golden file with its JSON, checked: every tensor there, in the shape that the configuration asks for. */
interface Golden extends GoldenJson {
  readonly path: string;
  readonly file: SafetensorsFile;
  readonly model: ModelConfig;
}

/**
 * Checks FILE.safetensors with FILE.json beside it on a device. Throws FILE_NOT_FOUND, CHECKPOINT_INVALID in one line when a
 * tensor or setting is missing or does not fit, or DEVICE_UNSUPPORTED for bf16 on a CPU; a mismatch of numbers is not thrown but
 * reported.
 */
export function checkGolden(path: string, options: DeviceOptions, precision: Precision = 'fp32'): GoldenReport {
  const golden = openGolden(path);
  try {
    const device = Device.open(options);
    try {
      if (precision === 'bf16' && device.description.kind === 'cpu') {
        throw new NnError('DEVICE_UNSUPPORTED', 'the CPU computes in fp32 only; take a GPU, such as --device cuda:0, for bf16');
      }
      const rows = precision === 'bf16' ? checkRounded(golden, device) : [...checkTraining(golden, device), checkGreedy(golden, device)];
      return { path, model: golden.model, precision, rows, passed: rows.every(({ passed }) => passed) };
    } finally {
      device.close();
    }
  } finally {
    golden.file.close();
  }
}

/** What one microbatch of set 0 leaves, and the logits of its first sequence as the decoder gives them. */
interface Outcome {
  readonly loss: number;
  readonly gradients: ReadonlyMap<string, Float32Array>;
  readonly logits: Float32Array;
}

/** bf16 against float32 on the CPU, both from the weights rounded to bf16. */
function checkRounded(golden: Golden, device: Device): GoldenRow[] {
  const got = runRounded(golden, device, 'bf16');
  const cpu = Device.open({ library: 'cpu', index: 0, threads: 0 });
  try {
    const wanted = runRounded(golden, cpu, 'fp32');
    const measure = 'norm of the difference / norm';
    const tolerance = GOLDEN_TOLERANCES_BF16;
    const each = [...wanted.gradients].map(([name, gradient]): [string, number] => [name, distance(got.gradients.get(name)!, gradient)]);
    const together = distanceOfAll([...wanted.gradients].map(([name, gradient]) => [got.gradients.get(name)!, gradient]));
    return [
      row('loss', 'relative', tolerance.loss, [['', relative(got.loss, wanted.loss)]]),
      { ...row('gradients, all together', measure, tolerance.gradients, [['', together]]), count: each.length },
      row('gradients, each tensor', measure, tolerance.gradient, each),
      { ...row('logits of the decoder', measure, tolerance.logits, [['', distance(got.logits, wanted.logits)]]), count: wanted.logits.length },
    ];
  } finally {
    cpu.close();
  }
}

function runRounded(golden: Golden, device: Device, precision: Precision): Outcome {
  const batch = batchOf(golden, 0);
  const source = roundedWeightsOf(golden);
  const trainer = openTrainer(golden, device, precision);
  let outcome: Omit<Outcome, 'logits'>;
  try {
    trainer.loadWeights(source);
    trainer.beginStep();
    const { lossSum, targetTokens, aux } = trainer.accumulate(batch, scaleOf(golden, batch));
    const gradients = new Map(
      trainer.parameters.map(({ name, offset, length }) => {
        const gradient = new Float32Array(length);
        trainer.readGradient(offset, gradient);
        return [name, gradient];
      }),
    );
    outcome = { loss: lossSum / targetTokens + golden.train.hyper.aux_weight * sum(aux), gradients };
  } finally {
    trainer.close();
  }
  const decoder = new Decoder(device, { model: golden.model, precision, capacity: golden.seq, batch: 1 });
  try {
    decoder.loadWeights(source);
    return { ...outcome, logits: decoder.logits(Array.from(batch.inputs.subarray(0, golden.seq)), Math.max(1, Math.floor(golden.seq / 3))) };
  } finally {
    decoder.close();
  }
}

function openTrainer(golden: Golden, device: Device, precision: Precision): Trainer {
  const { hyper } = golden.train;
  return new Trainer(device, {
    model: golden.model, precision, recompute: 'swiglu', sequences: golden.batch, sequenceLength: golden.seq, totalSteps: hyper.total, separateShards: false,
    optimizer: {
      learningRate: hyper.base_lr, minLearningRateRatio: 0.1, warmupSteps: hyper.warmup, beta1: hyper.beta1, beta2: hyper.beta2, epsilon: hyper.eps,
      weightDecay: hyper.weight_decay, clipNorm: hyper.clip, auxLossWeight: hyper.aux_weight, stateDtype: 'fp32',
    },
  });
}

/** Forward and gradients on set 0, then the steps on the sets that follow. */
function checkTraining(golden: Golden, device: Device): GoldenRow[] {
  const { history } = golden.train;
  const trainer = openTrainer(golden, device, 'fp32');
  try {
    trainer.loadWeights(weightsOf(golden));
    const rows = [...checkForward(golden, trainer), checkGradients(golden, trainer)];
    const steps = history.map(({ step }) => takeStep(golden, trainer, step));
    const compare = (what: string, tolerance: number, got: (at: number) => number, wanted: (at: number) => number): GoldenRow =>
      row(what, 'relative', tolerance, history.map(({ step }, at) => [`step ${step}`, relative(got(at), wanted(at))]));
    const { historyLoss, historyNorm } = GOLDEN_TOLERANCES;
    rows.push(
      compare('history: cross-entropy', historyLoss, (at) => steps[at]!.ce, (at) => history[at]!.ce),
      compare('history: aux loss', historyLoss, (at) => steps[at]!.aux, (at) => history[at]!.aux_sum),
      compare('history: gradient norm', historyNorm, (at) => steps[at]!.norm, (at) => history[at]!.grad_norm),
      compare('history: learning rate', GOLDEN_TOLERANCES.learningRate, (at) => steps[at]!.rate, (at) => history[at]!.lr),
      compareTensors(golden, trainer, `weights after ${history.length} steps`, `after${history.length}.`, GOLDEN_TOLERANCES.weightsAfter, (parameter, into) =>
        trainer.readState('weight', parameter, into),
      ),
    );
    return rows;
  } finally {
    trainer.close();
  }
}

function checkForward(golden: Golden, trainer: Trainer): GoldenRow[] {
  const { layers, experts } = golden.model;
  const batch = batchOf(golden, 0);
  const logits = trainer.logits(batch.inputs);
  trainer.beginStep();
  const report = trainer.accumulate(batch, scaleOf(golden, batch));
  const ce = report.lossSum / report.targetTokens;
  const auxSum = sum(report.aux);
  const wantedAux = readFloats(golden, 'aux_per_layer', [layers]);
  const wantedLoad = readIntegers(golden, 'expert_load', [layers, experts]);
  const wantedLogits = readFloats(golden, 'logits', [golden.batch, golden.seq, golden.model.vocabSize]);
  const loads = report.expertLoad.map((load, layer): [string, number] => [
    `layer ${layer}`, load.filter((count, expert) => count !== wantedLoad[layer * experts + expert]).length,
  ]);
  const loss = ce + golden.train.hyper.aux_weight * auxSum;
  return [
    row('loss', 'relative', GOLDEN_TOLERANCES.loss, [['', relative(loss, golden.loss)]]),
    row('cross-entropy', 'relative', GOLDEN_TOLERANCES.loss, [['', relative(ce, golden.ce)]]),
    row('aux loss', 'relative', GOLDEN_TOLERANCES.loss, [
      ...report.aux.map((aux, layer): [string, number] => [`layer ${layer}`, relative(aux, wantedAux[layer]!)]),
      ['sum', relative(auxSum, golden.aux_sum)],
    ]),
    { ...row('expert load', 'entries that differ', 0, loads), error: sum(loads.map(([, differing]) => differing)), count: layers * experts },
    { ...row('logits', 'absolute', GOLDEN_TOLERANCES.logits, [['', largestDifference(logits, wantedLogits)]]), count: logits.length },
  ];
}

/** The gradient that checkForward has left. */
function checkGradients(golden: Golden, trainer: Trainer): GoldenRow {
  return compareTensors(golden, trainer, 'gradients', 'grad.', GOLDEN_TOLERANCES.gradient, ({ offset }, into) => trainer.readGradient(offset, into));
}

function takeStep(golden: Golden, trainer: Trainer, step: number): { ce: number; aux: number; norm: number; rate: number } {
  const batch = batchOf(golden, step);
  trainer.beginStep();
  const { lossSum, targetTokens, aux } = trainer.accumulate(batch, scaleOf(golden, batch));
  const outcome = trainer.applyStep(step);
  return { ce: lossSum / targetTokens, aux: sum(aux), norm: outcome.gradientNorm, rate: outcome.learningRate };
}

function checkGreedy(golden: Golden, device: Device): GoldenRow {
  const length = golden.file.entry('greedy_ref').length;
  if (length <= PROMPT_TOKENS) throw invalid(golden.path, `greedy_ref has ${length} tokens, but the first ${PROMPT_TOKENS} are the prompt`);
  const wanted = Array.from(readIntegers(golden, 'greedy_ref', [length]));
  const maxTokens = length - PROMPT_TOKENS;
  const decoder = new Decoder(device, { model: golden.model, precision: 'fp32', capacity: length, batch: 1 });
  try {
    decoder.loadWeights(weightsOf(golden));
    const [tokens] = decoder.generate({ prompts: [wanted.slice(0, PROMPT_TOKENS)], maxTokens, method: 'greedy' });
    const differing = wanted.slice(PROMPT_TOKENS).filter((token, at) => token !== tokens![at]).length;
    return { ...row('greedy tokens', 'entries that differ', 0, [['', differing]]), count: maxTokens };
  } finally {
    decoder.close();
  }
}

function compareTensors(
  golden: Golden, trainer: Trainer, what: string, prefix: string, tolerance: number, read: (parameter: PlacedParameter, into: Float32Array) => void,
): GoldenRow {
  const errors = trainer.parameters.map((parameter): [string, number] => {
    const got = new Float32Array(parameter.length);
    read(parameter, got);
    return [parameter.name, distance(got, readFloats(golden, prefix + parameter.name, parameter.shape))];
  });
  return row(what, 'norm of the difference / norm', tolerance, errors);
}

/** A row from named errors. An error that is not a number is the worst of all. */
function row(what: string, measure: GoldenRow['measure'], tolerance: number, errors: readonly (readonly [string, number])[]): GoldenRow {
  let [worst, error] = errors[0] ?? ['', 0];
  for (const [name, each] of errors) if (!(each <= error)) [worst, error] = [name, each];
  return { what, measure, error, tolerance, passed: error <= tolerance, count: errors.length, ...(worst === '' || error === 0 ? {} : { worst }) };
}

const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0);

/** |a - b| / |b|; where b is 0, |a|. */
const relative = (a: number, b: number): number => Math.abs(a - b) / (b === 0 ? 1 : Math.abs(b));

function largestDifference(a: Float32Array, b: Float32Array): number {
  let largest = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i]! - b[i]!);
    if (!(difference <= largest)) largest = difference;
    if (Number.isNaN(largest)) break;
  }
  return largest;
}

/** ||a - b|| / ||b||; where b is all zeros (an expert that no token chose), ||a||. */
const distance = (a: Float32Array, b: Float32Array): number => distanceOfAll([[a, b]]);

/** The same of pairs [a, b], as if each side were one long vector. */
function distanceOfAll(pairs: readonly (readonly [Float32Array, Float32Array])[]): number {
  let difference = 0;
  let norm = 0;
  for (const [a, b] of pairs) {
    for (let i = 0; i < a.length; i++) {
      difference += (a[i]! - b[i]!) ** 2;
      norm += b[i]! ** 2;
    }
  }
  return Math.sqrt(difference) / (norm === 0 ? 1 : Math.sqrt(norm));
}

const invalid = (path: string, problem: string): NnError => new NnError('CHECKPOINT_INVALID', `${path}: ${problem}`, { path });

function openGolden(path: string): Golden {
  if (!path.endsWith('.safetensors')) throw invalid(path, 'is no golden file: its name must end in .safetensors, with a .json beside it');
  const json = readJson(path.replace(/\.safetensors$/, '.json'));
  const { config } = json;
  if (config.headSize === undefined && config.hiddenSize % config.queryHeads !== 0) {
    throw invalid(path, `config.hiddenSize is ${config.hiddenSize}, but must be divisible by config.queryHeads = ${config.queryHeads}`);
  }
  const model: ModelConfig = { ...config, headSize: config.headSize ?? config.hiddenSize / config.queryHeads };
  try {
    validateModel(model, path);
  } catch (error) {
    throw new NnError('CHECKPOINT_INVALID', (error as Error).message, { path }, error);
  }
  const file = SafetensorsFile.open(path);
  try {
    const golden: Golden = { ...json, path, file, model };
    const sets = 1 + json.train.history.length;
    requireShape(golden, 'tokens', [null, json.batch, json.seq + 1]);
    if (file.entry('tokens').shape[0]! < sets) throw invalid(path, `tokens holds ${file.entry('tokens').shape[0]} sets, but its training takes ${sets}`);
    for (const { name, shape } of parameterShapes(model)) {
      for (const prefix of ['param.', 'grad.', `after${json.train.history.length}.`]) requireShape(golden, prefix + name, shape);
    }
    return golden;
  } catch (error) {
    file.close();
    throw error;
  }
}

function readJson(path: string): GoldenJson {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    throw new NnError('FILE_NOT_FOUND', `${path}: cannot be read (${(error as NodeJS.ErrnoException).code ?? 'unknown'}); it belongs beside the .safetensors file`, { path }, error);
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new NnError('CHECKPOINT_INVALID', `${path}: is no JSON`, { path }, error);
  }
  const result = goldenSchema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0]!;
  throw invalid(path, `${issue.path.map(String).join('.') || 'the file'}: ${issue.message}`);
}

/** Throws CHECKPOINT_INVALID unless the tensor is there in that shape; null stands for any size. */
function requireShape({ path, file }: Golden, name: string, shape: readonly (number | null)[]): void {
  const got = file.entry(name).shape;
  if (got.length !== shape.length || shape.some((wanted, at) => wanted !== null && wanted !== got[at])) {
    throw invalid(path, `tensor '${name}' has the shape [${got.join(', ')}], but [${shape.map((each) => each ?? 'any').join(', ')}] is wanted`);
  }
}

function readFloats(golden: Golden, name: string, shape: readonly number[]): Float32Array {
  requireShape(golden, name, shape);
  const values = new Float32Array(elementCount(shape));
  golden.file.readFloats(name, values);
  return values;
}

function readIntegers(golden: Golden, name: string, shape: readonly number[]): Int32Array {
  requireShape(golden, name, shape);
  const values = new Int32Array(elementCount(shape));
  // Counts may be stored as floats.
  if (golden.file.entry(name).dtype.startsWith('F')) values.set(readFloats(golden, name, shape));
  else golden.file.readIntegers(name, values);
  return values;
}

/** Inputs and targets of set `set`: the same tokens, the targets one further. */
function batchOf({ path, file, batch, seq, model }: Golden, set: number): Batch {
  const tokens = new Int32Array(batch * (seq + 1));
  file.readIntegers('tokens', tokens, set * tokens.length);
  const bad = tokens.find((token) => token < 0 || token >= model.vocabSize);
  if (bad !== undefined) throw invalid(path, `tokens holds ${bad} in set ${set}, but the vocabulary has ${model.vocabSize}`);
  const cut = (shift: number): Int32Array => Int32Array.from({ length: batch * seq }, (_, at) => tokens[Math.floor(at / seq) * (seq + 1) + (at % seq) + shift]!);
  return { inputs: cut(0), targets: cut(1) };
}

const scaleOf = (golden: Golden, { targets }: Batch): { loss: number; aux: number } => ({ loss: 1 / targets.length, aux: golden.train.hyper.aux_weight });

const weightsOf = ({ file, model }: Golden): WeightSource => ({
  model,
  has: (name) => file.tensors.has(`param.${name}`),
  read: (name, into) => file.readFloats(`param.${name}`, into),
});

/** The same weights, each rounded to the nearest bf16 number. */
function roundedWeightsOf(golden: Golden): WeightSource {
  const exact = weightsOf(golden);
  return {
    ...exact,
    read: (name, into) => {
      const bits = new Uint16Array(into.length);
      exact.read(name, into);
      encodeBf16(into, bits);
      decodeBf16(bits, into);
    },
  };
}
