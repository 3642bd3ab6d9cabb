/**
 * The protocol: every job payload, progress report and result that passes through BullMQ, with validators. Payloads are
 * small JSON; tensors never travel in them. A receiver calls the validator before it believes anything.
 *
 *   queue       job         put there by    result
 *   runs        run         client          RunResult (the record has the same)
 *   train       steps       orchestrator    StepsResult     `local`: many whole steps on one worker; progress per step
 *   train       shard       orchestrator    ShardResult     child of a flow: one shard's gradient of one step
 *   train       reduce      orchestrator    ReduceResult    parent of a flow: all shards' sum of one step
 *   train       checkpoint  orchestrator    CheckpointResult
 *   train       digest      orchestrator    DigestResult    to one worker's own queue
 *   eval        eval        both            EvalResult
 *   generate    generate    client          GenerateResult
 *
 * Each worker also has queues of its own, `train-<worker>` and so on, for what must go to the replica already there.
 * A `run` job carries only the run's id: the spec lies in the run's record.
 */
import { z } from 'zod';
import { NnError } from './errors.ts';
import type { ErrorRecord } from './errors.ts';

/**
 * The number of this protocol: the form and the meaning of jobs and results, of what lies in the exchange, and of the bits that a
 * version computes. Whoever changes one of them so that two versions of this program would misunderstand each other raises it.
 * Jobs and workers carry it: a worker leaves jobs of another number alone, an orchestrator plans with workers of its own only,
 * and one that takes up a run of another number begins at its checkpoint. Absent means 1.
 */
export const PROTOCOL = 1;

/** The number that a job or a worker's record carries. */
export const protocolOf = (value: unknown): number => {
  const number = (value as { protocol?: unknown } | null)?.protocol;
  return typeof number === 'number' ? number : 1;
};

const index = z.int().nonnegative();
/** Written by orchestrator/queues.ts into every job. */
const protocol = z.literal(PROTOCOL).optional();
const count = z.int().positive();
const runId = z.string().min(1).max(64);
/** JSON has no NaN: a number that is not finite travels as null. */
const measure = z.number().nullable();
const digest = z.string().regex(/^[0-9a-f]{32}$/);

/** Where a worker that lacks the replica finds its way to version `fromStep`. */
const origin = z.strictObject({
  protocol,
  run: runId,
  /** Raised by the orchestrator whenever it gives up on jobs; jobs and reports of an older epoch change nothing. */
  epoch: index,
  /** The newest good checkpoint at or before the wanted version: its directory and step; null: the seed's initial weights. */
  checkpoint: z.strictObject({ directory: z.string(), step: index }).nullable(),
  /** How often, from where and to where the run was rolled back, which decides what its versions are (config/branches.ts); absent: never. */
  rollbacks: z.array(z.strictObject({ fromStep: index, toStep: index })).min(1).optional(),
  /** The run's spec as checked JSON (config/run-spec.ts). */
  spec: z.record(z.string(), z.unknown()),
});

export const messages = {
  run: z.strictObject({ run: runId }),

  /** `local`: do steps fromStep+1 .. fromStep+stepCount, each with all shards, gradients staying on the device. */
  steps: origin.extend({ fromStep: index, stepCount: count }),
  /** One shard of step `step` (1-based; computed on version step-1). */
  shard: origin.extend({ step: count, shard: index }),
  /** Sum the shards of `step` in order, and publish the reduced gradient. */
  reduce: origin.extend({ step: count, shardCount: count }),
  /** Write version `step` as a checkpoint into `directory`. */
  checkpoint: origin.extend({ step: index, directory: z.string() }),
  /** Bring the replica to version `step` and report the digest of its weights. */
  digest: origin.extend({ step: index }),

  /** Loss of a version of a run, or of a checkpoint, on the first `sequences` sequences of a token file. */
  eval: z.strictObject({
    protocol,
    replica: origin.extend({ step: index }).nullable(),
    checkpoint: z.string().nullable(),
    data: z.string(),
    sequences: count,
    sequenceLength: count.nullable(),
  }),
  generate: z.strictObject({
    protocol,
    checkpoint: z.string(),
    prompts: z.array(z.string().max(1 << 20)).min(1).max(64),
    maxTokens: count.max(1 << 20),
    method: z.enum(['greedy', 'sample', 'top-k', 'top-p']),
    temperature: z.number().positive().default(1),
    topK: count.default(40),
    topP: z.number().gt(0).max(1).default(0.95),
    seed: index.default(0),
    ntkAlpha: z.number().min(1).nullable().default(null),
  }),
} as const;

const timings = z.strictObject({ computeMs: z.number(), exchangeMs: z.number(), waitMs: z.number() });

/** What a step did, as the metrics keep it. Losses are means over the step's target tokens, aux over its microbatches. */
const stepReport = z.strictObject({
  step: count,
  loss: measure, // cross-entropy, nats a token
  auxLoss: z.array(measure), // per layer
  expertLoad: z.array(z.array(index)), // per layer and expert: routed slots
  targetTokens: index,
  gradientNorm: measure, // before clipping
  clipScale: measure,
  learningRate: z.number(),
  skipped: z.boolean(), // the gradient was not finite
  nonFinite: z.string().nullable(), // of a skipped step: the first parameter, in the order of parameterShapes, whose gradient was not finite
  milliseconds: z.number(),
});

const shardReport = z.strictObject({
  lossSum: measure, // summed over the shard's target tokens
  auxLossSum: z.array(measure), // per layer, summed over the shard's microbatches
  expertLoad: z.array(z.array(index)),
  targetTokens: index,
});

export const results = {
  /** progress of a `steps` job, one for each step */
  stepProgress: z.strictObject({ worker: z.string(), epoch: index, report: stepReport }),
  /**
   * progress of a `checkpoint` job, at most one: the state is copied, and the worker is free for the next job of the run while the
   * files are written. A worker that has no memory for a copy sends none.
   */
  checkpointProgress: z.strictObject({ worker: z.string(), epoch: index, step: index, copied: z.literal(true) }),
  /** stepsDone < stepCount: stopped at a step boundary by pause, cancel or a change of the way. */
  steps: z.strictObject({ worker: z.string(), epoch: index, fromStep: index, stepsDone: index, reports: z.array(stepReport), timings }),
  shard: shardReport.extend({
    worker: z.string(), epoch: index, step: count, shard: index,
    digest, // of the gradient's bits
    key: z.string(), // where it lies in the exchange
    bytes: index,
    timings,
  }),
  reduce: z.strictObject({
    worker: z.string(), epoch: index, digest, key: z.string(), bytes: index, report: stepReport, timings,
    shards: z.array(z.strictObject({ shard: index, worker: z.string(), epoch: index, digest })), // what was summed, in this order
  }),
  /** The checkpoint is complete on the disk. */
  checkpoint: z.strictObject({ worker: z.string(), epoch: index, step: index, directory: z.string(), bytes: index, milliseconds: z.number() }),
  digest: z.strictObject({ worker: z.string(), epoch: index, step: index, digest, weightsDigest: z.string().nullable() }),
  eval: z.strictObject({ worker: z.string(), step: index.nullable(), loss: measure, targetTokens: index, milliseconds: z.number() }),
  generate: z.strictObject({
    worker: z.string(),
    completions: z.array(z.strictObject({ text: z.string(), tokens: z.array(index) })),
    tokensPerSecond: z.number(),
  }),
} as const;

export type Message<Name extends keyof typeof messages> = z.output<(typeof messages)[Name]>;
export type Result<Name extends keyof typeof results> = z.output<(typeof results)[Name]>;
export type Origin = z.output<typeof origin>;
export type StepReport = z.output<typeof stepReport>;
export type ShardReport = z.output<typeof shardReport>;
export type TrainJobName = 'steps' | 'shard' | 'reduce' | 'checkpoint' | 'digest';
export type JobName = keyof typeof messages;

export const QUEUES = ['runs', 'train', 'eval', 'generate'] as const;
export type QueueName = (typeof QUEUES)[number];

function parse<Schema extends z.ZodType>(schema: Schema, what: string, value: unknown): z.output<Schema> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0]!;
  throw new NnError('MESSAGE_INVALID', `${what}: ${issue.path.map(String).join('.')}: ${issue.message}`, { what });
}

/** Throws MESSAGE_INVALID, naming the field. */
export function parseMessage<Name extends keyof typeof messages>(name: Name, value: unknown): Message<Name> {
  return parse(messages[name], `job ${name}`, value) as Message<Name>;
}

/** Throws MESSAGE_INVALID, naming the field. */
export function parseResult<Name extends keyof typeof results>(name: Name, value: unknown): Result<Name> {
  return parse(results[name], `result of ${name}`, value) as Result<Name>;
}

/** How the process of a worker ended when nobody had asked it to: the evidence against the job that it held. */
export interface ExitRecord {
  /** Id of the job that it held, in whatever queue; null: none. */
  readonly job: string | null;
  readonly code: number | null;
  readonly signal: string | null;
  /** What it reported before its end, or what its supervisor has to say; the context's `stderr` holds the end of what it printed. */
  readonly error: ErrorRecord | null;
  readonly atMs: number;
}

/** A process that ended with work of a run in hand: `step` and `part` name the work (orchestrator/kills.ts). */
export interface WorkKill {
  readonly name: 'steps' | 'shard' | 'reduce' | 'checkpoint' | 'digest' | 'eval';
  readonly step: number;
  readonly part: number;
  readonly worker: string;
  /** The process that came after, and told of it. */
  readonly incarnation: string;
  readonly epoch: number;
  readonly exit: ExitRecord;
}

/** What a live worker says of itself, every heartbeat, in the hash `workers` under its id. */
export interface WorkerRecord {
  readonly id: string;
  /** Distinguishes two processes with one id, one after the other. */
  readonly incarnation: string;
  /** The number of the protocol that it speaks; absent: 1. */
  readonly protocol?: number;
  readonly host: string;
  readonly processId: number;
  readonly device: { readonly kind: 'cpu' | 'cuda'; readonly name: string; readonly index: number; readonly memoryBytes: number };
  readonly precisions: readonly ('fp32' | 'bf16')[];
  readonly state: 'idle' | 'busy' | 'draining';
  /** `branch`: the one that its version was computed on; absent: 0. */
  readonly replica: { readonly run: string; readonly step: number; readonly branch?: number } | null;
  readonly heartbeatAtMs: number;
  readonly startedAtMs: number;
  /** How the process before this incarnation ended; null: as it was asked to, or there was none. */
  readonly lastExit: ExitRecord | null;
}

export type RunPhase = 'queued' | 'running' | 'pausing' | 'paused' | 'completed' | 'failed' | 'cancelled';
export const TERMINAL_PHASES: readonly RunPhase[] = ['completed', 'failed', 'cancelled'];

/** From the moment an orchestrator takes a queued run up until it is over; `retry` begins another. */
export interface RunAttempt {
  /** From 1. */
  readonly number: number;
  readonly startedAtMs: number;
  /** Null: it goes on. */
  readonly endedAtMs: number | null;
  /** The version that it began at: that of a checkpoint, or 0. */
  readonly fromStep: number;
  /** Steps of the run counted at its end, or now. */
  readonly toStep: number;
  /** Where it ended, or stands. */
  readonly phase: RunPhase;
  readonly error: ErrorRecord | null;
  /** Time in phase `running`, as far as orchestrators saw it. */
  readonly runningMs: number;
}

export interface RunFault {
  readonly atMs: number;
  readonly what: string;
  /** Who had the job, where that is known. */
  readonly worker: string | null;
  readonly error: ErrorRecord;
}

/** The run went back to an earlier version, because its loss had risen too far (spec.lossSpike). */
export interface Rollback {
  readonly atMs: number;
  /** The branch that begins with it, from 1 (config/branches.ts). */
  readonly branch: number;
  /** The last step of the branch before, whose loss made the decision. */
  readonly fromStep: number;
  readonly toStep: number;
  /** The first epoch of the new branch. */
  readonly epoch: number;
  readonly loss: number;
  /** What the loss was above. */
  readonly threshold: number;
}

/** What Redis and the run's directory keep of a run; `status` prints it. */
export interface RunRecord {
  readonly run: string;
  readonly phase: RunPhase;
  /** The version reached: steps done. Falls when the run is rolled back, and never else. */
  readonly step: number;
  readonly steps: number;
  readonly epoch: number;
  /** The newest complete checkpoint. */
  readonly checkpoint: { readonly directory: string; readonly step: number } | null;
  readonly lastReport: StepReport | null;
  readonly firstLoss: number | null;
  readonly validation: { readonly step: number; readonly loss: number } | null;
  readonly validationBefore: number | null;
  readonly tokensPerSecond: number | null;
  readonly weightsDigest: string | null;
  /** How steps are computed now, and why. */
  readonly way: { readonly exchange: 'local' | 'redis' | 'nccl'; readonly workers: number; readonly reason: string } | null;
  readonly skippedSteps: number;
  /** Oldest first; at most lossSpike.maxRollbacks. */
  readonly rollbacks: readonly Rollback[];
  /** Faults, oldest first, the last 100, and of skipped steps the last 20; all of them lie in the run's faults.jsonl. */
  readonly faults: readonly RunFault[];
  /** How many faults there ever were, by code. */
  readonly faultCounts: Readonly<Record<string, number>>;
  /** Worker processes that ended with the work at hand, and that no later work of its kind has forgiven. */
  readonly kills: readonly WorkKill[];
  /** Oldest first, the last 50. */
  readonly attempts: readonly RunAttempt[];
  /** Time in phase `running` over all attempts, as far as orchestrators saw it. */
  readonly runningMs: number;
  readonly error: ErrorRecord | null;
  readonly createdAtMs: number;
  readonly startedAtMs: number | null;
  readonly finishedAtMs: number | null;
}

/** One entry of a run's event stream (and of Client's `events()`). */
export type RunEvent =
  | { readonly type: 'phase'; readonly phase: RunPhase; readonly atMs: number }
  | { readonly type: 'step'; readonly report: StepReport; readonly tokensPerSecond: number; readonly atMs: number }
  | { readonly type: 'eval'; readonly step: number; readonly loss: number; readonly atMs: number }
  | { readonly type: 'checkpoint'; readonly step: number; readonly directory: string; readonly atMs: number }
  | { readonly type: 'way'; readonly exchange: string; readonly workers: number; readonly reason: string; readonly atMs: number }
  | ({ readonly type: 'rollback' } & Rollback)
  | ({ readonly type: 'fault' } & RunFault);
