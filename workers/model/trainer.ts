/**
 * The whole native side of a replica: weights, optimizer state, gradient and activations on one device, and the order of work
 * of a step. Synchronous, and nothing is allocated after the constructor. Knows nothing of jobs, runs, files or other workers.
 * Used by workers/replica.ts, bench and doctor, on the thread that opened the device.
 *
 *   a step:  beginStep, then for each shard  beginShard, accumulate (for each microbatch), endShard,  then applyStep
 *
 * The gradient after a step's shards has the same bits whether the shards were computed here one after the other, or elsewhere
 * and brought in by addGradient in the same order: every sum starts at zero and takes one shard at a time.
 */
import { createHash } from 'node:crypto';
import type { RunSpec } from '../../config/run-spec.ts';
import { reinterpret, slice } from '../../cuda/device.ts';
import type { Device, Kernels, Tensor } from '../../cuda/device.ts';
import { decodeBf16, encodeBf16 } from '../../data/safetensors.ts';
import { Arena } from './arena.ts';
import { Gradient } from './gradient.ts';
import { Network } from './network.ts';
import type { Batch, Report } from './network.ts';
import { expertRanges, layoutParameters, viewsOf } from './parameters.ts';
import type { ElementRange, ParameterLayout, PlacedParameter, WeightSource } from './parameters.ts';
import { keptOf, memoryPlan, planWithin } from './plan.ts';
import type { Keep, PlanOptions } from './plan.ts';
import { Replay } from './replay.ts';
import { learningRate } from './schedule.ts';
import { sizesOf } from './sizes.ts';
import { masterWeights } from './weights.ts';
import type { MasterWeights } from './weights.ts';

export { memoryPlan } from './plan.ts';
export type { MemoryPlan } from './plan.ts';
export type { PlacedParameter, WeightSource } from './parameters.ts';
export { learningRate } from './schedule.ts';

export interface TrainerOptions extends PlanOptions {
  readonly optimizer: RunSpec['optimizer'];
  /** Steps of the whole run, which the learning rate's schedule needs. */
  readonly totalSteps: number;
  /** On a device that records graphs, whether microbatch and update become graphs, to the same bits. Default true. */
  readonly graph?: boolean | undefined;
}

/** What one microbatch did. */
export interface MicrobatchReport {
  /** Cross-entropy in nats, summed over the target tokens. */
  readonly lossSum: number;
  readonly targetTokens: number;
  /** Aux loss of each layer. */
  readonly aux: number[];
  /** Routed slots of each layer and expert. */
  readonly expertLoad: number[][];
}

export interface StepOutcome {
  /** Norm of the gradient before clipping. */
  readonly gradientNorm: number;
  readonly clipScale: number;
  readonly learningRate: number;
  /** The gradient was not finite, so the weights stayed as they were. */
  readonly skipped: boolean;
  /** Of a skipped step: the first parameter, in the order of parameterShapes, whose gradient has a NaN or an infinity. */
  readonly nonFinite: string | null;
}

export type StateKind = 'weight' | 'm' | 'v';

const STAGE_ELEMENTS = 1 << 20;

/** What a GPU's memory must have left beside the arena, for the code of kernels, graphs and the driver, before a layer is kept. */
const SPARE_BYTES = 1.5e9;

/** One range of parameters that AdamW treats alike, cut out of every flat buffer but the gradient. */
interface OptimizerRange extends ElementRange {
  readonly decay: boolean;
  readonly parameter: Tensor;
  readonly residue: Tensor | null;
  readonly m: Tensor;
  readonly v: Tensor;
}

export class Trainer {
  readonly parameters: readonly PlacedParameter[];
  /** Elements of each flat buffer, padding included. */
  readonly flatLength: number;
  /** In `layer` mode, what is kept all the same: on a GPU, what its free memory takes. */
  readonly keep: Keep;
  readonly #device: Device;
  readonly #kernels: Kernels;
  readonly #options: TrainerOptions;
  readonly #layout: ParameterLayout;
  readonly #arena: Arena;
  /** The step's sum, and, where shards are summed apart, the shard's; null without memory for gradients. */
  readonly #gradient: Gradient | null;
  readonly #shardGradient: Gradient | null;
  readonly #network: Network;
  readonly #update: Replay;
  readonly #workspace: Tensor;
  readonly #weights: MasterWeights;
  readonly #digest: Tensor;
  readonly #sumOfSquares: Tensor;
  readonly #control: Tensor;
  readonly #schedule: Tensor;
  readonly #ranges: readonly OptimizerRange[];
  readonly #controlHost = new Float64Array(3);
  readonly #scheduleHost = new Float64Array(2);

  /** Throws DEVICE_MEMORY with the bytes needed and there, before it allocates anything. The state is not yet defined: initialise or writeState. */
  constructor(device: Device, options: TrainerOptions) {
    const { model, sequences, sequenceLength } = options;
    const sizes = sizesOf(model, options.precision);
    const workspaceBytes = device.workspaceBytes({ T: sequences * sequenceLength, S: sequenceLength, ...sizes }, sizes.dtype);
    this.#device = device;
    this.#kernels = device.kernels;
    this.#options = options;
    this.#layout = layoutParameters(model);
    this.parameters = this.#layout.parameters;
    this.flatLength = this.#layout.flatLength;
    const advice = 'take smaller batch.sequences (with more microBatches), recompute: layer, optimizer.stateDtype: bf16, or a larger device';
    const spare = options.keep === undefined && device.description.kind === 'cuda' ? device.freeBytes() - SPARE_BYTES : 0;
    const { plan, keep } = options.keep === undefined ? planWithin(options, workspaceBytes, spare) : { plan: memoryPlan(options, workspaceBytes), keep: options.keep };
    this.keep = keep;
    this.#arena = new Arena(device, plan, advice);
    this.#update = new Replay(device, options.graph !== false);

    const at = (name: string): Tensor => this.#arena.tensor(name);
    this.#workspace = at('workspace');
    this.#weights = masterWeights(device, this.#arena, options.precision);
    this.#digest = at('digest');
    this.#sumOfSquares = slice(at('control'), 0, 1);
    this.#control = slice(at('control'), 1, 3);
    this.#schedule = slice(at('control'), 4, 2);
    this.#enter();
    const training = options.evaluateOnly !== true;
    this.#weights.clear();
    this.#clearOptimizer();
    this.#ranges = !training
      ? []
      : this.#layout.ranges.map(({ offset, length, decay }) => ({
          offset,
          length,
          decay,
          ...this.#weights.range({ offset, length }),
          m: slice(at('m'), offset, length),
          v: slice(at('v'), offset, length),
        }));
    // What microbatches add to is stored first; a sum of shards apart begins at zero.
    const stored = expertRanges(this.#layout);
    this.#gradient = training ? new Gradient(this.#kernels, at('gradient'), options.separateShards ? [] : stored) : null;
    this.#shardGradient = training && options.separateShards ? new Gradient(this.#kernels, at('shardGradient'), stored) : null;
    const accumulator = training ? at(options.separateShards ? 'shardGradient' : 'gradient') : null;
    this.#network = new Network(device, this.#arena, {
      sizes,
      sequenceLength,
      maximumTokens: sequences * sequenceLength,
      kept: Array.from({ length: sizes.L }, (_, layer) => keptOf({ ...options, keep }, layer)),
      graph: options.graph !== false,
      ropeTheta: model.ropeTheta,
      ntkAlpha: model.ntkAlpha,
      weights: viewsOf(model, this.#layout, this.#weights.compute),
      gradients: accumulator === null ? null : viewsOf(model, this.#layout, accumulator),
    });
  }

  /** The state of version 0: weights from the seed (Normal(0, 0.02), a stream for each tensor), norms 1, m = v = 0. `check` is called before each tensor and may throw. */
  initialise(seed: number, check: () => void = () => undefined): void {
    this.#enter();
    this.#weights.clear();
    for (const [index, parameter] of this.parameters.entries()) {
      check();
      if (parameter.shape.length >= 2) this.#weights.draw(parameter, seed, index, 0.02);
      else this.#weights.write(parameter.offset, new Float32Array(parameter.length).fill(1));
    }
    this.#clearOptimizer();
  }

  /** Weights from elsewhere, m = v = 0. The source's sizes are the caller's to check; what it lacks, it throws for. */
  loadWeights(source: WeightSource): void {
    this.#enter();
    for (const parameter of this.parameters) {
      const values = new Float32Array(parameter.length);
      source.read(parameter.name, values);
      this.#weights.write(parameter.offset, values);
    }
    this.#clearOptimizer();
  }

  /** The step's gradient becomes zero. */
  beginStep(): void {
    this.#stepGradient().clear();
  }

  /** What follows until endShard belongs to the next shard of the step. */
  beginShard(): void {
    this.#shardGradient?.clear();
  }

  /** Adds the shard's gradient to the step's. */
  endShard(): void {
    if (this.#shardGradient === null) return;
    const gradient = this.#stepGradient().whole();
    this.#kernels.add(gradient, gradient, this.#shardGradient.whole(), this.flatLength, 'f32');
  }

  /**
   * Forward and backward of one microbatch. scale.loss is 1 / (target tokens of the whole step), scale.aux is the aux loss
   * weight / (microbatches of the whole step). Waits for the device once, for the report.
   */
  accumulate(batch: Batch, scale: { readonly loss: number; readonly aux: number }): MicrobatchReport {
    this.#enter();
    const accumulator = this.#shardGradient ?? this.#stepGradient();
    return accumulator.microbatch((accumulate) => reportOf(this.#network.forwardAndBackward(batch, scale, accumulate), batch));
  }

  /** 32 hex digits: nn_digest of the step's gradient. */
  gradientDigest(): string {
    const gradient = this.#stepGradient().whole();
    this.#kernels.digest(this.#digest, gradient, gradient.length);
    return this.#readDigest();
  }

  /** Elements offset .. offset+into.length-1 of the step's gradient. */
  readGradient(offset: number, into: Float32Array): void {
    this.#device.download(into, slice(this.#stepGradient().whole(), offset, into.length));
  }

  writeGradient(offset: number, from: Float32Array): void {
    this.#device.upload(slice(this.#stepGradient().whole(), offset, from.length), from);
  }

  /** gradient += from, element by element. */
  addGradient(offset: number, from: Float32Array): void {
    const gradient = this.#stepGradient().whole();
    const staging = this.#arena.staging();
    for (let start = 0; start < from.length; start += staging.length) {
      const piece = from.subarray(start, start + staging.length);
      const target = slice(gradient, offset + start, piece.length);
      this.#device.upload(staging, piece);
      this.#kernels.add(target, target, staging, piece.length, 'f32');
    }
  }

  /** Clips the step's gradient by its norm and takes AdamW step `step` (from 1). A gradient that is not finite changes nothing. */
  applyStep(step: number): StepOutcome {
    this.#enter();
    const { optimizer, totalSteps } = this.#options;
    const rate = learningRate(optimizer, totalSteps, step);
    this.#scheduleHost[0] = rate;
    this.#scheduleHost[1] = step;
    this.#device.upload(this.#schedule, this.#scheduleHost);
    // Outside of the recording, which is of the update alone.
    const gradient = this.#stepGradient().whole();
    this.#update.run('update', () => this.#queueUpdate(gradient));
    this.#device.download(this.#controlHost, this.#control);
    const [gradientNorm, clipScale, skip] = this.#controlHost as unknown as [number, number, number];
    const skipped = skip !== 0;
    return { gradientNorm, clipScale, learningRate: rate, skipped, nonFinite: skipped ? this.#firstNonFinite(gradient) : null };
  }

  /** A sum of float32 squares in float64 is finite exactly when every element is. Waits for the device once for each parameter. */
  #firstNonFinite(gradient: Tensor): string | null {
    const sum = new Float64Array(1);
    for (const { name, offset, length } of this.parameters) {
      this.#kernels.gradNorm(this.#sumOfSquares, slice(gradient, offset, length), length);
      this.#device.download(sum, this.#sumOfSquares);
      if (!Number.isFinite(sum[0]!)) return name;
    }
    return null;
  }

  /** Norm, clip and AdamW over all ranges; learning rate and step number lie on the device. */
  #queueUpdate(gradient: Tensor): void {
    const { optimizer } = this.#options;
    const kernels = this.#kernels;
    kernels.gradNorm(this.#sumOfSquares, gradient, this.flatLength);
    kernels.gradClip(this.#control, this.#sumOfSquares, optimizer.clipNorm);
    const stateDtype = optimizer.stateDtype === 'bf16' ? 'bf16' : 'f32';
    const dtype = this.#options.precision === 'bf16' ? 'bf16' : 'f32';
    for (const { parameter, residue, m, v, offset, length, decay } of this.#ranges) {
      kernels.adamwStep(
        parameter, residue, m, v, slice(gradient, offset, length), this.#control, this.#schedule, length, optimizer.beta1, optimizer.beta2, optimizer.epsilon,
        decay ? optimizer.weightDecay : 0, stateDtype, dtype,
      );
    }
  }

  /** The loss of a batch; no gradient. A shorter sequenceLength than the trainer's is allowed. */
  evaluate(batch: Batch, sequenceLength = this.#options.sequenceLength): { lossSum: number; targetTokens: number } {
    this.#enter();
    const { lossSum, targetTokens } = reportOf(this.#network.evaluate(batch, sequenceLength), batch);
    return { lossSum, targetTokens };
  }

  /** All logits [T, V] of a batch in float32: for checks, not for speed. Allocates on the device for the call. */
  logits(inputs: Int32Array): Float32Array {
    this.#enter();
    return this.#network.logits(inputs);
  }

  /** 32 hex digits: nn_digest of the master weights. */
  stateDigest(): string {
    this.#weights.digest(this.#digest);
    return this.#readDigest();
  }

  /** sha-256 over all float32 master weights, little-endian, tensors in the order of parameterShapes, without padding. */
  weightsDigest(): string {
    const hash = createHash('sha256');
    const host = new Float32Array(STAGE_ELEMENTS);
    for (const { offset, length } of this.parameters) {
      for (let start = 0; start < length; start += STAGE_ELEMENTS) {
        const piece = host.subarray(0, Math.min(STAGE_ELEMENTS, length - start));
        this.#weights.read(offset + start, piece);
        hash.update(new Uint8Array(piece.buffer, 0, piece.byteLength));
      }
    }
    return hash.digest('hex');
  }

  /** A whole parameter's master weight, m or v as float32. */
  readState(kind: StateKind, parameter: PlacedParameter, into: Float32Array): void {
    requireLength(kind, parameter, into);
    if (kind === 'weight') return this.#weights.read(parameter.offset, into);
    const tensor = slice(this.#arena.tensor(kind), parameter.offset, parameter.length);
    if (tensor.dtype === 'f32') return this.#device.download(into, tensor);
    const bits = new Uint16Array(into.length);
    this.#device.download(bits, tensor);
    decodeBf16(bits, into);
  }

  /** The type of what readFlat reads. */
  stateDtype(kind: StateKind): 'f32' | 'bf16' {
    return kind !== 'weight' && this.#options.optimizer.stateDtype === 'bf16' ? 'bf16' : 'f32';
  }

  /** Elements offset .. offset+into.length-1 of the flat weights, m or v, padding included, of the type that stateDtype says. */
  readFlat(kind: StateKind, offset: number, into: Float32Array | Uint16Array): void {
    if (kind !== 'weight') return this.#device.download(into, slice(this.#arena.tensor(kind), offset, into.length));
    if (!(into instanceof Float32Array)) throw new Error('weights are read as float32');
    this.#weights.read(offset, into);
  }

  /** Replaces a whole parameter's master weight, m or v. */
  writeState(kind: StateKind, parameter: PlacedParameter, from: Float32Array): void {
    requireLength(kind, parameter, from);
    if (kind === 'weight') return this.#weights.write(parameter.offset, from);
    const tensor = slice(this.#arena.tensor(kind), parameter.offset, parameter.length);
    if (tensor.dtype === 'f32') return this.#device.upload(tensor, from);
    const bits = new Uint16Array(from.length);
    encodeBf16(from, bits);
    this.#device.upload(tensor, bits);
  }

  /** Gives the memory back; the trainer is of no use afterwards. */
  close(): void {
    this.#network.close();
    this.#update.close();
    this.#device.setWorkspace(null);
    this.#arena.free();
  }

  /** Several trainers and decoders may share a device: each lends its own workspace before it computes. */
  #enter(): void {
    this.#device.setWorkspace(this.#workspace);
  }

  #stepGradient(): Gradient {
    if (this.#gradient === null) throw new Error('this trainer has no memory for gradients');
    return this.#gradient;
  }

  #zero(tensor: Tensor): void {
    const words = reinterpret(tensor, 'f32');
    this.#kernels.zeroGrad(words, words.length);
  }

  #clearOptimizer(): void {
    if (this.#options.evaluateOnly === true) return;
    this.#zero(this.#arena.tensor('m'));
    this.#zero(this.#arena.tensor('v'));
  }

  /** What the last digest of a buffer was, as 32 hex digits. */
  #readDigest(): string {
    const words = new BigUint64Array(2);
    this.#device.download(words, this.#digest);
    return [...words].map((word) => word.toString(16).padStart(16, '0')).join('');
  }
}

function requireLength(kind: StateKind, { name, length }: PlacedParameter, host: Float32Array): void {
  if (host.length !== length) throw new Error(`${kind} of ${name} has ${length} elements, not ${host.length}`);
}

function reportOf(report: Report, { targets }: Batch): MicrobatchReport {
  let targetTokens = 0;
  for (const target of targets) if (target !== -100) targetTokens++;
  return { ...report, targetTokens };
}
