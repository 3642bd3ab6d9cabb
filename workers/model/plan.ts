/**
 * The memory of a trainer: which buffers there are, when each is alive, and where it lies in the one arena that is allocated
 * at the start. Pure: it neither knows a device nor moves a byte. Called by the trainer, doctor and the docs. Letters: sizes.ts.
 *
 * Time is counted in ticks, one for each group of kernels of a microbatch, in the order in which the trainer calls them:
 *
 *   embedding | layer 0: nine forward ticks | layer 1 | ... | head: three ticks | layer L-1: nine again, eleven backward | ... | embedding
 *
 * The nine forward ticks are the rows of FORWARD below, the "nine again" stay empty but for what is computed again in `layer`
 * mode, and the eleven are the rows of BACKWARD. Two buffers may share bytes when their ticks do not overlap.
 *
 * Computing again costs time, and gives the same bits: so `layer` mode need not do it for all layers. planWithin keeps as much as
 * the memory takes, of the last layers first, because what they keep is free again when the first layers' backward needs room.
 */
import type { ModelConfig } from '../../config/presets.ts';
import type { Precision, Recompute, RunSpec } from '../../config/run-spec.ts';
import { elementBytes } from '../../cuda/tensor.ts';
import type { DType } from '../../cuda/tensor.ts';
import { layoutParameters } from './parameters.ts';
import { computeType, sizesOf } from './sizes.ts';

export interface PlanOptions {
  readonly model: ModelConfig;
  readonly precision: Precision;
  readonly recompute: Recompute;
  /** What `layer` mode keeps all the same; default nothing but the last layer's. */
  readonly keep?: Keep | undefined;
  /** Sequences of a microbatch, and tokens of a sequence. */
  readonly sequences: number;
  readonly sequenceLength: number;
  readonly optimizer: Pick<RunSpec['optimizer'], 'stateDtype'>;
  /** A second gradient buffer, in which a shard of several microbatches is summed before it is added to the others. */
  readonly separateShards: boolean;
  /** Only the forward pass: no gradient, no optimizer state. Default false. */
  readonly evaluateOnly?: boolean | undefined;
}

/** In `layer` mode: how many of the last layers keep what their attention and their router computed, how many gate and up too, and how many h. */
export interface Keep {
  readonly attention: number;
  readonly gateUp: number;
  readonly h: number;
}

/** What of a layer's forward is still there in its backward; each word includes those before it. */
export type Kept = 'nothing' | 'attention' | 'gateUp' | 'h';

export type MemoryKind = 'weights' | 'optimizer' | 'gradients' | 'activations' | 'cache' | 'workspace' | 'tables';

export interface PlannedBuffer {
  readonly name: string;
  readonly kind: MemoryKind;
  readonly dtype: DType;
  readonly length: number;
  /** Ticks at which it is alive, both included. */
  readonly from: number;
  readonly to: number;
  /** Bytes from the start of the arena, a multiple of 256. */
  readonly offset: number;
}

export interface MemoryPlan {
  readonly totalBytes: number;
  readonly bytes: Readonly<Record<MemoryKind, number>>;
  readonly buffers: ReadonlyMap<string, PlannedBuffer>;
}

/** A buffer that has no place yet. */
export type Request = Omit<PlannedBuffer, 'offset'>;

const ALIGNMENT = 256;

const alignUp = (bytes: number): number => Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;

const bytesOf = ({ dtype, length }: Request): number => alignUp(length * elementBytes(dtype));

/** Forward ticks of a layer. */
const FORWARD = { norm1: 0, qkv: 1, attention: 2, output: 3, norm2: 4, router: 5, up: 6, down: 7, combine: 8 } as const;
const FORWARD_TICKS = 9;

/** Backward ticks of a layer, counted from its eleventh-last. */
const BACKWARD = { down: 0, downWeight: 1, up: 2, upWeight: 3, router: 4, combine: 5, norm2: 6, output: 7, attention: 8, qkv: 9, norm1: 10 } as const;
const BACKWARD_TICKS = 11;

/** When each part of a layer's state is written, read last in the forward, and read last in the backward (null: not at all). */
const STATE = {
  reciprocal1: [FORWARD.norm1, FORWARD.norm1, BACKWARD.norm1],
  normed1: [FORWARD.norm1, FORWARD.qkv, BACKWARD.qkv],
  qkv: [FORWARD.qkv, FORWARD.attention, BACKWARD.attention],
  attention: [FORWARD.attention, FORWARD.output, BACKWARD.attention],
  logSumExp: [FORWARD.attention, FORWARD.attention, BACKWARD.attention],
  delta: [FORWARD.output, FORWARD.norm2, null],
  sum: [FORWARD.norm2, FORWARD.combine, BACKWARD.norm2],
  reciprocal2: [FORWARD.norm2, FORWARD.norm2, BACKWARD.norm2],
  normed2: [FORWARD.norm2, FORWARD.up, BACKWARD.router],
  logits: [FORWARD.router, FORWARD.router, null],
  probability: [FORWARD.router, FORWARD.combine, BACKWARD.router],
  weight: [FORWARD.router, FORWARD.combine, BACKWARD.router],
  index: [FORWARD.router, FORWARD.router, BACKWARD.router],
  offsets: [FORWARD.router, FORWARD.down, BACKWARD.upWeight],
  slotToken: [FORWARD.router, FORWARD.up, BACKWARD.upWeight],
  slotWeight: [FORWARD.router, FORWARD.router, BACKWARD.downWeight],
  slotOf: [FORWARD.router, FORWARD.combine, BACKWARD.combine],
  gateUp: [FORWARD.up, FORWARD.up, BACKWARD.upWeight],
  h: [FORWARD.up, FORWARD.down, BACKWARD.downWeight],
} as const;

export type StateName = keyof typeof STATE;
export const STATE_NAMES = Object.keys(STATE) as StateName[];

/** Scratch of a layer's backward: written, read last. h only where it is not kept; dlogitsCompute only in bf16. */
const SCRATCH = {
  h: [BACKWARD.down, BACKWARD.downWeight],
  dweight: [BACKWARD.down, BACKWARD.router],
  dslots: [BACKWARD.up, BACKWARD.combine],
  dlogits: [BACKWARD.router, BACKWARD.combine],
  dlogitsCompute: [BACKWARD.router, BACKWARD.combine],
  dnormed2: [BACKWARD.router, BACKWARD.norm2],
  dattention: [BACKWARD.output, BACKWARD.attention],
  dqkv: [BACKWARD.attention, BACKWARD.qkv],
  dnormed1: [BACKWARD.qkv, BACKWARD.norm1],
} as const;

export type ScratchName = keyof typeof SCRATCH;
export const SCRATCH_NAMES = Object.keys(SCRATCH) as ScratchName[];

/** Bytes of the report of a microbatch: loss sum (f64), aux (f32 [L]), expert load (i32 [L, E]). */
export const reportBytes = (layers: number, experts: number): number => 8 + 4 * layers + 4 * layers * experts;

/**
 * The names in `buffers`: master, or compute and residue (weights.ts), m, v, gradient, shardGradient, workspace, cosine, sine, position, tokens, targets,
 * report, control; x.0 .. x.L (the residual stream before each layer, and after the last); layer.<l>.<StateName>, in `layer`
 * mode also again.<l>.<StateName>; slots.<l>; back.<l>.<ScratchName>; head.normed, head.reciprocal, head.loss, dx.
 */
export function memoryPlan(options: PlanOptions, workspaceBytes = 0): MemoryPlan {
  return layOut(lastingBuffers(options, workspaceBytes), activationBuffers(options));
}

/**
 * The plan of these options that computes least again within `availableBytes`. In `layer` mode attention is kept before gate and
 * up, and those before h: that saves most time a byte. What does not fit at all is planned with nothing kept, for the arena to refuse.
 */
export function planWithin(options: PlanOptions, workspaceBytes: number, availableBytes: number): { readonly plan: MemoryPlan; readonly keep: Keep } {
  const L = options.model.layers;
  const planOf = (keep: Keep): MemoryPlan => memoryPlan({ ...options, keep }, workspaceBytes);
  /** The most of 1 .. L that fits; 1 if nothing does. */
  const most = (keepOf: (count: number) => Keep): Keep => {
    let [low, high] = [1, L];
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (planOf(keepOf(middle)).totalBytes <= availableBytes) low = middle;
      else high = middle - 1;
    }
    return keepOf(low);
  };
  let keep: Keep = { attention: 1, gateUp: 1, h: 1 };
  if (options.recompute === 'layer' && options.evaluateOnly !== true) {
    keep = most((attention) => ({ attention, gateUp: 1, h: 1 }));
    if (keep.attention === L) keep = most((gateUp) => ({ attention: L, gateUp, h: 1 }));
    if (keep.gateUp === L) keep = most((h) => ({ attention: L, gateUp: L, h }));
  }
  return { plan: planOf(keep), keep };
}

/** A plan with the lasting buffers one after the other, and behind them the passing ones, which share what they can. */
export function layOut(lasting: readonly Request[], passing: readonly Request[]): MemoryPlan {
  const buffers = new Map<string, PlannedBuffer>();
  let end = 0;
  for (const request of lasting) {
    buffers.set(request.name, { ...request, offset: end });
    end += bytesOf(request);
  }
  const { offsets, bytes: activationBytes } = place(passing);
  passing.forEach((request, index) => buffers.set(request.name, { ...request, offset: end + offsets[index]! }));
  const bytes: Record<MemoryKind, number> = { weights: 0, optimizer: 0, gradients: 0, activations: activationBytes, cache: 0, workspace: 0, tables: 0 };
  for (const request of lasting) bytes[request.kind] += bytesOf(request);
  return { totalBytes: end + activationBytes, bytes, buffers };
}

/** What is alive from the first step to the last. */
function lastingBuffers(options: PlanOptions, workspaceBytes: number): Request[] {
  const { model, precision, sequences, sequenceLength } = options;
  const { flatLength } = layoutParameters(model);
  const T = sequences * sequenceLength;
  const table = sequenceLength * (model.headSize / 2);
  const state = options.optimizer.stateDtype === 'bf16' ? 'bf16' : 'f32';
  const training = options.evaluateOnly !== true;
  const buffer = (name: string, kind: MemoryKind, dtype: DType, length: number): Request => ({ name, kind, dtype, length, from: 0, to: Infinity });
  return [
    ...(precision === 'bf16'
      ? [buffer('compute', 'weights', 'bf16', flatLength), buffer('residue', 'weights', 'u16', flatLength)]
      : [buffer('master', 'weights', 'f32', flatLength)]),
    ...(training ? [buffer('m', 'optimizer', state, flatLength), buffer('v', 'optimizer', state, flatLength), buffer('gradient', 'gradients', 'f32', flatLength)] : []),
    ...(training && options.separateShards ? [buffer('shardGradient', 'gradients', 'f32', flatLength)] : []),
    buffer('workspace', 'workspace', 'u8', workspaceBytes),
    buffer('cosine', 'tables', 'f32', table),
    buffer('sine', 'tables', 'f32', table),
    buffer('position', 'tables', 'i32', T),
    buffer('tokens', 'tables', 'i32', T),
    buffer('targets', 'tables', 'i32', T),
    buffer('report', 'tables', 'u8', reportBytes(model.layers, model.experts)),
    // sum of squares | norm, clip scale, skip | learning rate, step
    buffer('control', 'tables', 'f64', 6),
    buffer('digest', 'tables', 'u64', 2),
  ];
}

/** What comes and goes within a microbatch. */
function activationBuffers(options: PlanOptions): Request[] {
  const { model } = options;
  const { H, F, E, K, Q, D, P, L } = sizesOf(model, options.precision);
  const dtype = computeType(options.precision);
  const T = options.sequences * options.sequenceLength;
  const N = T * K;
  const training = options.evaluateOnly !== true;

  const forward = (layer: number): number => 1 + layer * FORWARD_TICKS;
  const head = forward(L);
  const again = (layer: number): number => head + 3 + (L - 1 - layer) * (FORWARD_TICKS + BACKWARD_TICKS);
  const backward = (layer: number): number => again(layer) + FORWARD_TICKS;
  const end = backward(0) + BACKWARD_TICKS;

  const stateType: Record<StateName, [DType, number]> = {
    reciprocal1: ['f32', T], normed1: [dtype, T * H], qkv: [dtype, T * P], attention: [dtype, T * Q * D], logSumExp: ['f32', T * Q], delta: [dtype, T * H],
    sum: [dtype, T * H], reciprocal2: ['f32', T], normed2: [dtype, T * H], logits: ['f32', T * E], probability: ['f32', T * E], weight: ['f32', N],
    index: ['i32', N], offsets: ['i32', E + 1], slotToken: ['i32', N], slotWeight: ['f32', N], slotOf: ['i32', N], gateUp: [dtype, N * 2 * F], h: [dtype, N * F],
  };
  const scratchType: Record<ScratchName, [DType, number]> = {
    h: [dtype, N * F], dweight: ['f32', N], dslots: [dtype, N * H], dlogits: ['f32', T * E], dlogitsCompute: [dtype, T * E],
    dnormed2: [dtype, T * H], dattention: [dtype, T * Q * D], dqkv: [dtype, T * P], dnormed1: [dtype, T * H],
  };

  const requests: Request[] = [];
  const add = (name: string, [type, length]: [DType, number], from: number, to: number): void => {
    requests.push({ name, kind: 'activations', dtype: type, length, from, to });
  };

  for (let layer = 0; layer <= L; layer++) {
    const written = layer === 0 ? 0 : forward(layer - 1) + FORWARD.combine;
    const lastForward = layer === L ? head : forward(layer) + FORWARD.norm2;
    add(`x.${layer}`, [dtype, T * H], written, !training ? lastForward : layer === L ? head + 2 : backward(layer) + BACKWARD.norm1);
  }
  for (let layer = 0; layer < L; layer++) {
    const kept = training ? keptOf(options, layer) : 'nothing';
    for (const name of STATE_NAMES) {
      const [written, readForward, readBackward] = STATE[name];
      const isKept = readBackward !== null && keeps(kept, name);
      // A forward that no backward follows has no use for gateUp.
      if (isKept || name !== 'gateUp') add(`layer.${layer}.${name}`, stateType[name], forward(layer) + written, isKept ? backward(layer) + readBackward : forward(layer) + readForward);
      if (training && isAgain(kept, name)) {
        add(`again.${layer}.${name}`, stateType[name], again(layer) + written, readBackward === null ? again(layer) + readForward : backward(layer) + readBackward);
      }
    }
    add(`slots.${layer}`, [dtype, N * H], forward(layer) + FORWARD.down, forward(layer) + FORWARD.combine);
    if (!training) continue;
    for (const name of SCRATCH_NAMES) {
      if (name === 'h' && hasH(kept)) continue;
      if (name === 'dlogitsCompute' && dtype === 'f32') continue;
      const [written, read] = SCRATCH[name];
      add(`back.${layer}.${name}`, scratchType[name], backward(layer) + written, backward(layer) + read);
    }
  }
  add('head.normed', [dtype, T * H], head, head + 1);
  add('head.reciprocal', ['f32', T], head, head + 2);
  add('head.loss', ['f32', T], head + 1, head + 1);
  if (training) add('dx', [dtype, T * H], head + 1, end);
  return requests;
}

/** What a layer keeps. In `layer` mode the last one keeps all: its backward comes next. */
export function keptOf({ model, recompute, keep }: Pick<PlanOptions, 'model' | 'recompute' | 'keep'>, layer: number): Kept {
  const fromEnd = model.layers - layer; // 1: the last
  if (recompute === 'none' || (recompute === 'layer' && fromEnd <= Math.max(keep?.h ?? 0, 1))) return 'h';
  if (recompute === 'swiglu' || fromEnd <= (keep?.gateUp ?? 0)) return 'gateUp';
  return fromEnd <= (keep?.attention ?? 0) ? 'attention' : 'nothing';
}

const keeps = (kept: Kept, name: StateName): boolean => (name === 'h' ? kept === 'h' : name === 'gateUp' ? kept === 'h' || kept === 'gateUp' : kept !== 'nothing');

/** What is computed again: the whole forward, or from kept attention on gate and up with h. h alone is not: the backward's kernel stores it again. */
const isAgain = (kept: Kept, name: StateName): boolean => kept === 'nothing' || (kept === 'attention' && (name === 'gateUp' || name === 'h'));

/** Whether a layer's h is there in its backward: kept, or computed again with gate and up. */
const hasH = (kept: Kept): boolean => kept !== 'gateUp';

/**
 * Gives each request an offset so that no two which are alive at once overlap: the largest first, each at the lowest place
 * that is free during its life. Bytes: the end of the furthest.
 */
export function place(requests: readonly Pick<Request, 'dtype' | 'length' | 'from' | 'to'>[]): { offsets: number[]; bytes: number } {
  const sized = requests.map((request, index) => ({ from: request.from, to: request.to, index, bytes: bytesOf(request as Request), offset: 0 }));
  sized.sort((a, b) => b.bytes - a.bytes || a.from - b.from || a.index - b.index);
  const placed: typeof sized = []; // in rising order of offset
  let total = 0;
  for (const request of sized) {
    let offset = 0;
    for (const other of placed) {
      if (other.from > request.to || other.to < request.from) continue;
      if (offset + request.bytes <= other.offset) break;
      offset = Math.max(offset, other.offset + other.bytes);
    }
    request.offset = offset;
    const after = placed.findIndex((other) => other.offset > offset);
    placed.splice(after === -1 ? placed.length : after, 0, request);
    total = Math.max(total, offset + request.bytes);
  }
  const offsets: number[] = Array.from({ length: requests.length }, () => 0);
  for (const { index, offset } of sized) offsets[index] = offset;
  return { offsets, bytes: total };
}
