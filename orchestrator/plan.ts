/**
 * The decisions of a run that are arithmetic: how steps are shared and by whom, where a job must end, which checkpoints
 * stay. PURE: no IO, no clock; machine-decisions.ts calls it at step boundaries. It knows nothing of jobs, queues or Redis.
 */
import { parameterCount } from '../config/presets.ts';
import type { RunSpec } from '../config/run-spec.ts';
import { PROTOCOL } from '../config/messages.ts';
import type { WorkerRecord } from '../config/messages.ts';
import type { Share } from './share.ts';

/** A live worker, as a run sees it. */
export interface WorkerView {
  readonly id: string;
  readonly incarnation: string;
  /** The number of the protocol that it speaks (config/messages.ts); absent: this one. */
  readonly protocol?: number;
  readonly precisions: WorkerRecord['precisions'];
  readonly state: WorkerRecord['state'];
  readonly replica: WorkerRecord['replica'];
  readonly startedAtMs: number;
  readonly lastExit: WorkerRecord['lastExit'];
  /** The run that claims this worker; it serves no other until it is released. */
  readonly heldBy: string | null;
}

/** What earlier steps took, smoothed; null until something was measured. */
export interface Measurements {
  readonly shardComputeMs: number | null;
  readonly exchangeBytesPerMs: number | null;
}

/** How the next steps are computed. No workers: the run waits, and `reason` says for what. */
export interface Way {
  readonly exchange: 'local' | 'redis';
  readonly workers: readonly string[];
  /** A flow's jobs go to the shared queue: every live worker takes part. Else to the queues of `workers`. */
  readonly shared: boolean;
  readonly reason: string;
}

export interface WayInput {
  readonly run: string;
  readonly spec: RunSpec;
  readonly workers: readonly WorkerView[];
  /** Workers whose replica was found to differ: `id/incarnation`. */
  readonly excluded: readonly string[];
  /** The worker whose replica stands at the wanted version, if it lives. */
  readonly home: string | null;
  readonly current: Way | null;
  readonly measurements: Measurements;
  /** The workers that are the run's to use, and why these are fewer than there could be; null: all that no other run holds. */
  readonly share: Share | null;
}

/** Bytes of one gradient in the exchange: float32, every parameter. */
export const gradientBytes = (spec: RunSpec): number => 4 * parameterCount(spec.model);

/** Taken for the exchange's speed until a transfer was measured: half a gigabyte a second, a modest Redis on one host. */
const ASSUMED_EXCHANGE_BYTES_PER_MS = 500_000;
/** `auto` leaves a way only for one that is shorter by this factor, so that noise does not make it swing. */
const HYSTERESIS = 0.85;

/** Milliseconds of a step with `workers` of them: shards in rounds, uploads in parallel, the reducer's transfers in turn. */
export function stepEstimateMs(spec: RunSpec, workers: number, measurements: Measurements): number {
  const compute = measurements.shardComputeMs ?? 0;
  const shards = spec.batch.shards;
  if (workers <= 1) return shards * compute;
  const transfer = gradientBytes(spec) / (measurements.exchangeBytesPerMs ?? ASSUMED_EXCHANGE_BYTES_PER_MS);
  return Math.ceil(shards / workers) * (compute + transfer) + (shards + 2) * transfer;
}

const milliseconds = (value: number): string => (value < 10 ? value.toFixed(1) : value.toFixed(0)) + ' ms';

/** The way of the next steps, and why. Deterministic in its input. */
export function chooseWay(input: WayInput): Way {
  const { run, spec, workers } = input;
  const waiting = (reason: string): Way => ({ exchange: 'local', workers: [], shared: false, reason });
  if (workers.length === 0) return waiting('waiting: no live worker');
  const serving = workers.filter((worker) => worker.state !== 'draining');
  if (serving.length === 0) return waiting('waiting: every live worker is draining');
  const speaking = serving.filter(({ protocol = PROTOCOL }) => protocol === PROTOCOL);
  if (speaking.length === 0) {
    const spoken = [...new Set(serving.map(({ protocol = PROTOCOL }) => protocol))].sort((a, b) => a - b).join(', ');
    return waiting(`waiting: every live worker speaks protocol ${spoken}, this orchestrator ${PROTOCOL}; upgrade what is older`);
  }
  const capable = speaking.filter((worker) => worker.precisions.includes(spec.precision));
  if (capable.length === 0) return waiting(`waiting: no live worker computes in ${spec.precision}`);
  const trusted = capable.filter((worker) => !input.excluded.includes(`${worker.id}/${worker.incarnation}`));
  if (trusted.length === 0) return waiting('waiting: the replica of every live worker differed; restart the workers');
  const { share } = input;
  const ours = share === null ? trusted : trusted.filter((worker) => share.workers.includes(worker.id));
  if (ours.length === 0) return waiting(`waiting: ${share!.reason ?? 'no worker is to be had'}`);
  const free = ours.filter((worker) => worker.heldBy === null || worker.heldBy === run);
  if (free.length === 0) {
    const others = [...new Set(ours.map((worker) => worker.heldBy))].slice(0, 3).join(', ');
    return waiting(share === null ? `waiting: every fitting worker serves another run (${others})` : `waiting: ${others} gives up a worker at its next step`);
  }

  const ranked = rank(free, input);
  const most = Math.min(ranked.length, spec.batch.shards);
  const because = (reason: string): string => (share === null || share.reason === null ? reason : `${reason}; ${share.reason}`);
  const local = (reason: string): Way => ({ exchange: 'local', workers: ranked.slice(0, 1), shared: false, reason: because(reason) });
  const flow = (count: number, reason: string): Way => {
    const chosen = ranked.slice(0, count);
    return { exchange: 'redis', workers: chosen, shared: chosen.length === workers.length, reason: because(reason) };
  };
  if (spec.batch.shards === 1) return local('a step has one shard: nothing to share');
  if (spec.parallelism === 1) return local('parallelism is 1');
  if (most === 1) return local(spec.parallelism === 'auto' ? 'one worker is free' : `parallelism is ${spec.parallelism}, but one worker is free`);
  if (spec.parallelism !== 'auto') {
    const count = Math.min(spec.parallelism, most);
    const short = count === spec.parallelism ? '' : most === spec.batch.shards ? `, but a step has ${most} shards` : `, but ${most} workers are free`;
    return flow(count, `parallelism is ${spec.parallelism}${short}`);
  }
  return automatic(input, most, local, flow);
}

/** The most workers that the run could use now, were all of them free: what it demands of them. At least 1. */
export function mostWorkers(input: Omit<WayInput, 'share'>): number {
  const workers = input.workers.map((worker) => ({ ...worker, heldBy: null }));
  return Math.max(1, chooseWay({ ...input, workers, share: null }).workers.length);
}

/** `auto`: the count of workers with the shortest estimated step. */
function automatic(input: WayInput, most: number, local: (reason: string) => Way, flow: (count: number, reason: string) => Way): Way {
  const { spec, measurements, current } = input;
  if (measurements.shardComputeMs === null) return local('auto: one worker measures first');
  const alone = stepEstimateMs(spec, 1, measurements);
  let best = 2;
  for (let count = 3; count <= most; count++) {
    if (stepEstimateMs(spec, count, measurements) < stepEstimateMs(spec, best, measurements)) best = count;
  }
  const together = stepEstimateMs(spec, best, measurements);
  const speed = measurements.exchangeBytesPerMs === null ? 'assumed' : 'measured';
  const numbers = `a step on 1 worker takes ${milliseconds(alone)}, on ${best} about ${milliseconds(together)} (exchange speed ${speed})`;
  const inFlow = current?.exchange === 'redis' && current.workers.length > 0;
  const shared = together < (inFlow ? alone / HYSTERESIS : alone * HYSTERESIS);
  return shared ? flow(best, `auto: ${numbers}`) : local(`auto: ${numbers}`);
}

/** Free workers, the most fitting first: home, those in use already, those that hold the run's replica, those that hold none. */
function rank(free: readonly WorkerView[], { run, home, current }: WayInput): string[] {
  const score = (worker: WorkerView): number => {
    if (worker.id === home) return 0;
    if (current?.workers.includes(worker.id)) return 1;
    if (worker.replica?.run === run) return 2;
    return worker.replica === null ? 3 : 4;
  };
  return [...free].sort((a, b) => score(a) - score(b) || (a.id < b.id ? -1 : 1)).map((worker) => worker.id);
}

const multipleAfter = (version: number, every: number): number => (every === 0 ? Infinity : (Math.floor(version / every) + 1) * every);
const isMultiple = (version: number, every: number): boolean => every > 0 && version > 0 && version % every === 0;

/** The last step that a local job from `version` on may do: the next checkpoint, eval or the end, at most `limit` steps on. */
export function nextBoundary(spec: RunSpec, version: number, limit: number): number {
  const evals = spec.data.validation === undefined ? 0 : spec.evaluation.every;
  return Math.min(spec.steps, version + limit, multipleAfter(version, spec.checkpoint.every), multipleAfter(version, evals));
}

/** Whether the run's rules (not its circumstances) ask for a checkpoint of `version`. */
export const checkpointDue = (spec: RunSpec, version: number): boolean => version === spec.steps || isMultiple(version, spec.checkpoint.every);

/** Whether an eval of `version` is due: before the first step, every N steps, at the end. */
export const evalDue = (spec: RunSpec, version: number): boolean =>
  spec.data.validation !== undefined && (version === 0 || version === spec.steps || isMultiple(version, spec.evaluation.every));

/** Whether the replicas' digests are to be compared at `version`. */
export const comparisonDue = (spec: RunSpec, version: number): boolean => isMultiple(version, spec.compareDigestsEvery);

export interface CheckpointPlace {
  readonly directory: string;
  readonly step: number;
}

/**
 * The checkpoints, oldest first, that the spec's rules no longer keep. Never the newest, nor the newest at or before `target`: the
 * version to which the run may be rolled back (null: none).
 */
export function checkpointsToDelete(spec: RunSpec, checkpoints: readonly CheckpointPlace[], target: number | null = null): CheckpointPlace[] {
  const old = checkpoints.slice(0, Math.max(0, checkpoints.length - spec.checkpoint.keep));
  const needed = target === null ? undefined : checkpoints.findLast(({ step }) => step <= target);
  return old.filter((each) => each !== needed && !isMultiple(each.step, spec.checkpoint.keepEvery));
}
