/**
 * Which tokens a microbatch reads: a pure function of (seed, step, shard, microbatch) and the token file, computed alone
 * in constant memory, so that any worker can compute any microbatch of any step, and a step that is computed again is the
 * same. Knows no file format and no device. Called by workers with an open TokenFile.
 *
 * The file is cut into windows of sequenceLength + 1 tokens that overlap by one, so that every token but the first is a
 * target once:
 *
 *   shift            L            L            L
 *   |.....|----------|-----------|-----------|--   window w: tokens shift + w L .. shift + (w + 1) L, both included
 *
 * Epoch e visits all windows once in the order of a permutation keyed by (seed, e), with a shift below L keyed alike, so
 * that later epochs cut elsewhere. Sequence p of the run (p counts through step, shard, microbatch, sequence) is window
 * permutation(p mod n) of epoch floor(p / n): cutting a step into other shards moves no sequence to another step.
 */
import assert from 'node:assert/strict';
import { NnError } from '../config/errors.ts';
import type { RunSpec } from '../config/run-spec.ts';
import { SPECIAL_IDS } from './special-tokens.ts';

/** What the sampler needs of a token file. */
export interface TokenSource {
  readonly path?: string;
  /** Tokens in all. */
  readonly count: number;
  /** Tokens that are <pad>. */
  readonly padCount: number;
  read(start: number, into: Int32Array): void;
}

/** What decides the order of the data. */
export interface DataOrder {
  readonly seed: number;
  readonly batch: RunSpec['batch'];
}

/** [sequences, sequenceLength] each, row by row. targets[i] follows inputs[i]; -100: not counted. */
export interface Batch {
  readonly inputs: Int32Array;
  readonly targets: Int32Array;
}

/** A target that does not count (the loss kernels skip it). */
export const IGNORED = -100;

/** Rounds of the Feistel network; 4 are enough for a random-looking order, the others cost nothing beside a read. */
const ROUNDS = 6;

/** Mixes 32 bits: the finaliser of MurmurHash3, which is a bijection. */
function mix(word: number): number {
  let hash = word | 0;
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

/** A word keyed by (seed, epoch, purpose). */
function keyed(seed: number, epoch: number, purpose: number): number {
  let hash = mix(seed ^ 0x9e3779b9);
  hash = mix(hash ^ (epoch % 2 ** 32));
  hash = mix(hash + Math.floor(epoch / 2 ** 32) + 0x7f4a7c15);
  return mix(hash + Math.imul(purpose, 0x61c88647));
}

/**
 * Where `index` (0..size - 1) goes in the permutation of 0..size - 1 keyed by (seed, epoch). A Feistel network permutes
 * the next power of four; what falls outside is sent through again until it falls inside (cycle walking), four times at
 * most on average. Constant time and memory; size up to 2^52.
 */
export function permute(index: number, size: number, seed: number, epoch: number): number {
  assert(index >= 0 && index < size && size <= 2 ** 52, `index ${index} of ${size}`);
  let half = 2;
  while (half * half < size) half *= 2;
  const mask = half - 1;
  let value = index;
  do {
    let left = Math.floor(value / half);
    let right = value % half;
    for (let round = 0; round < ROUNDS; round++) {
      const next = left ^ (mix(right + keyed(seed, epoch, round + 1)) & mask);
      left = right;
      right = next;
    }
    value = left * half + right;
  } while (value >= size);
  return value;
}

/** Windows of an epoch, and the tokens that a shift may take from the start. Throws DATA_INVALID when not one fits. */
export function windowsOf(source: TokenSource, sequenceLength: number): { windows: number; shifts: number } {
  const { count } = source;
  if (count < sequenceLength + 1) {
    throw new NnError('DATA_INVALID', `${source.path ?? 'token data'}: has ${count} tokens, but one sequence takes batch.sequenceLength + 1 = ${sequenceLength + 1}`, {
      ...(source.path === undefined ? {} : { path: source.path }),
      count,
    });
  }
  const windows = Math.max(1, Math.floor((count - sequenceLength) / sequenceLength));
  return { windows, shifts: Math.min(sequenceLength, count - windows * sequenceLength) };
}

/** The first token of sequence `position` (0-based, counted over the whole run). Pure. */
export function sequenceStart(source: TokenSource, seed: number, sequenceLength: number, position: number): number {
  const { windows, shifts } = windowsOf(source, sequenceLength);
  const epoch = Math.floor(position / windows);
  const shift = keyed(seed, epoch, 0) % shifts;
  return shift + permute(position % windows, windows, seed, epoch) * sequenceLength;
}

/** Writes one window as row `row`: inputs are its first L tokens, targets its last L, <pad> as -100. */
function fillRow(batch: Batch, row: number, window: Int32Array): void {
  const length = window.length - 1;
  const at = row * length;
  batch.inputs.set(window.subarray(0, length), at);
  for (let index = 0; index < length; index++) {
    const target = window[index + 1]!;
    batch.targets[at + index] = target === SPECIAL_IDS.pad ? IGNORED : target;
  }
}

/**
 * The microbatch of (step from 1, shard from 0, microBatch from 0): [batch.sequences, batch.sequenceLength].
 * Throws DATA_INVALID when the file is too short, and what the file's `read` throws.
 */
export function trainingBatch(source: TokenSource, order: DataOrder, step: number, shard: number, microBatch: number): Batch {
  const { shards, microBatches, sequences, sequenceLength } = order.batch;
  assert(step >= 1 && shard >= 0 && shard < shards && microBatch >= 0 && microBatch < microBatches, `step ${step}, shard ${shard}, microbatch ${microBatch}`);
  const first = (((step - 1) * shards + shard) * microBatches + microBatch) * sequences;
  const batch: Batch = { inputs: new Int32Array(sequences * sequenceLength), targets: new Int32Array(sequences * sequenceLength) };
  const window = new Int32Array(sequenceLength + 1);
  for (let row = 0; row < sequences; row++) {
    source.read(sequenceStart(source, order.seed, sequenceLength, first + row), window);
    fillRow(batch, row, window);
  }
  return batch;
}

/**
 * Targets of a whole step that count: the divisor of its loss. Without <pad> in the file it is the batch's tokens;
 * with some, the step's tokens are read.
 */
export function stepTargetTokens(source: TokenSource, order: DataOrder, step: number): number {
  const { shards, microBatches, sequences, sequenceLength } = order.batch;
  windowsOf(source, sequenceLength);
  const sequencesPerStep = shards * microBatches * sequences;
  if (source.padCount === 0) return sequencesPerStep * sequenceLength;
  const window = new Int32Array(sequenceLength + 1);
  let targets = 0;
  for (let sequence = 0; sequence < sequencesPerStep; sequence++) {
    source.read(sequenceStart(source, order.seed, sequenceLength, (step - 1) * sequencesPerStep + sequence), window);
    for (let index = 1; index <= sequenceLength; index++) if (window[index] !== SPECIAL_IDS.pad) targets++;
  }
  return targets;
}

/**
 * The first `sequences` windows of a file in order (all of them when there are fewer), in batches of
 * [perBatch, sequenceLength]; rows that are missing in the last batch have inputs 0 and targets -100. One batch is in
 * memory at a time. Throws DATA_INVALID when not one window fits.
 */
export function* evaluationBatches(
  source: TokenSource,
  { sequences, sequenceLength, perBatch }: { sequences: number; sequenceLength: number; perBatch: number },
): Generator<Batch> {
  windowsOf(source, sequenceLength);
  const total = Math.min(sequences, Math.floor((source.count - 1) / sequenceLength));
  const window = new Int32Array(sequenceLength + 1);
  for (let first = 0; first < total; first += perBatch) {
    const batch: Batch = {
      inputs: new Int32Array(perBatch * sequenceLength),
      targets: new Int32Array(perBatch * sequenceLength).fill(IGNORED),
    };
    for (let row = 0; row < perBatch && first + row < total; row++) {
      source.read((first + row) * sequenceLength, window);
      fillRow(batch, row, window);
    }
    yield batch;
  }
}
