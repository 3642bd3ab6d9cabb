/**
 * The words of the run machine: its state, its events, its effects, and the record that others see of it. PURE, types
 * and small constructors only; the rules are in run-machine.ts and its layers, the doing in driver.ts.
 */
import { survives } from '../config/branches.ts';
import type { ErrorRecord } from '../config/errors.ts';
import type { Control } from '../config/keys.ts';
import type { Result, Rollback, RunEvent, RunPhase, RunRecord, StepReport } from '../config/messages.ts';
import type { RunSpec } from '../config/run-spec.ts';
import { changeAttempt } from './attempts.ts';
import { mostWorkers } from './plan.ts';
import { UNWATCHED } from './loss-spike.ts';
import type { LossWatch } from './loss-spike.ts';
import type { CheckpointPlace, Measurements, Way, WorkerView } from './plan.ts';
import type { Demand, Share } from './share.ts';

/** Faults that the record holds, the newest; of skipped steps, which may be every second one, no more than a few of these. */
const FAULTS_KEPT = 100;
const SKIPS_KEPT = 20;

/** The knobs that the machine obeys, and where its run lives. Constant for the life of a driver. */
export interface RunSettings {
  readonly run: string;
  readonly spec: RunSpec;
  /** Checkpoints are written to `<checkpointRoot>/<name>` (config/branches.ts). */
  readonly checkpointRoot: string;
  /** Steps whose reduced gradients the exchange may hold before a checkpoint is brought forward. */
  readonly logSteps: number;
  readonly maxReplans: number;
  readonly maxKills: number;
  readonly stepsPerJob: number;
  readonly lookupMs: number;
  readonly jobTimeoutMs: number;
  /** First pause after the second replan in a row, doubled each time up to the maximum. */
  readonly backoffMs: number;
  readonly backoffMaximumMs: number;
}

export type MachineJobName = 'steps' | 'shard' | 'reduce' | 'checkpoint' | 'digest' | 'eval';

/** Which queue: the shared one, or the worker's own. */
export interface QueueAddress {
  readonly queue: 'train' | 'eval';
  readonly worker: string | null;
}

export interface JobAddress extends QueueAddress {
  readonly id: string;
}

export interface NewJob extends JobAddress {
  readonly name: MachineJobName;
  readonly data: object;
  readonly priority: number;
}

/** `<run>.<epoch>.<name>.<step>.<part>`: the same job has the same id, so adding it twice adds it once. */
export const jobId = (run: string, epoch: number, name: MachineJobName, step: number, part: number): string => `${run}.${epoch}.${name}.${step}.${part}`;

export interface JobIdParts {
  readonly run: string;
  readonly epoch: number;
  readonly name: MachineJobName;
  readonly step: number;
  readonly part: number;
}

/** The parts of an id of `jobId`, or null. The run's name may itself hold dots, so the parts are read from the right. */
export function parseJobId(id: string): JobIdParts | null {
  const match = /^(.+)\.(\d+)\.(steps|shard|reduce|checkpoint|digest|eval)\.(\d+)\.(\d+)$/.exec(id);
  if (match === null) return null;
  return { run: match[1]!, epoch: Number(match[2]), name: match[3] as MachineJobName, step: Number(match[4]), part: Number(match[5]) };
}

/** A worker process: two processes of one id, one after the other, are two of these. */
export interface Holder {
  readonly id: string;
  readonly incarnation: string;
}

/** What is under way. At most one at a time; null: the machine is about to decide, or waits. */
export type Activity =
  | { readonly kind: 'claim'; readonly workers: readonly string[] }
  | { readonly kind: 'steps'; readonly job: JobAddress; readonly holder: Holder; readonly fromStep: number; readonly stepCount: number }
  | { readonly kind: 'flow'; readonly step: number; readonly parent: JobAddress; readonly children: readonly JobAddress[]; readonly holders: readonly Holder[] }
  | { readonly kind: 'checkpoint'; readonly job: JobAddress; readonly holder: Holder; readonly step: number; readonly directory: string }
  | { readonly kind: 'eval'; readonly job: JobAddress; readonly holder: Holder; readonly step: number }
  | {
      readonly kind: 'digest';
      readonly final: boolean;
      readonly step: number;
      readonly jobs: readonly (JobAddress & { readonly holder: Holder })[];
      readonly results: readonly Result<'digest'>[];
    }
  | { readonly kind: 'findCheckpoints' };

/** How the report of a step came about: the part of its history that the report does not hold. */
export type StepSource = Pick<Extract<HistoryEntry, { type: 'step' }>, 'way' | 'worker' | 'digest' | 'shards'>;

/**
 * A checkpoint whose state is copied and whose files are being written by its worker, beside the activity. Its bits are those of
 * the version whatever happens to the run meanwhile, so no replan and no epoch voids it: it ends with its result, its failure or
 * its worker. Nothing rests on it before it is complete. At most one at a time.
 */
export interface Saving {
  readonly job: JobAddress;
  readonly holder: Holder;
  readonly step: number;
  readonly directory: string;
  /** Its replica turned out to be wrong: it is deleted when it is complete. */
  readonly unwanted: boolean;
  /** When it was last heard of, or looked up. */
  readonly checkedAtMs: number;
}

export interface RunState {
  readonly settings: RunSettings;
  /** False until recovery has told everything; nothing is decided before. */
  readonly ready: boolean;
  readonly phase: RunPhase;
  readonly epoch: number;
  /** What Control says now. */
  readonly command: Control['command'];
  /** Steps counted: reported and appended to the metrics, each once on its branch, in order. Falls at a rollback, and never else. */
  readonly step: number;
  /** Oldest first. The present branch is that of the last one. */
  readonly rollbacks: readonly Rollback[];
  readonly lossWatch: LossWatch;
  /** Where the computation stands. Falls back to `sharedVersion` when the only replica at it is lost. */
  readonly version: number;
  /** The newest version of the present branch that any worker can reach: the newest checkpoint and the reduced gradients after it. */
  readonly sharedVersion: number;
  /** Who holds a replica at `version`. */
  readonly home: Holder | null;
  /** Good checkpoints, oldest first. */
  readonly checkpoints: readonly CheckpointPlace[];
  /** Reduced gradients up to here were deleted from the exchange. */
  readonly trimmedThrough: number;
  readonly activity: Activity | null;
  readonly saving: Saving | null;
  /**
   * Checkpoints begun, the last part of their jobs' ids: one that failed in the background is tried again in the same epoch, while
   * the old job may still lie in Redis under the lock of a worker that died.
   */
  readonly saves: number;
  /** Checkpoints that failed since the last complete one or the last new step, and when the next may be begun. */
  readonly saveFailures: number;
  readonly saveNotBeforeMs: number;
  /** A checkpoint met a full disk: the run pauses at the step boundary, and whoever resumes it asks for a checkpoint at once. */
  readonly diskFull: boolean;
  /** Reports that came before those of earlier steps. */
  readonly early: ReadonlyMap<number, { readonly report: StepReport; readonly source: StepSource }>;
  /** Digest of each shard's gradient, for the last few steps: step -> shard -> digest and who computed it. */
  readonly digests: ReadonlyMap<number, ReadonlyMap<number, { readonly digest: string; readonly worker: string }>>;
  readonly workers: readonly WorkerView[];
  readonly excluded: readonly string[];
  readonly claims: readonly string[];
  /** The workers that are this run's to use among all live runs; null: nobody told. */
  readonly share: Share | null;
  readonly way: Way | null;
  readonly measurements: Measurements;
  readonly lastEvalStep: number;
  readonly lastComparisonStep: number;
  /** Skipped steps at the end of what was counted. */
  readonly skippedInARow: number;
  /** Processes that ended with this run's work in hand (kills.ts), and the incarnations that told of one, the newest of them. */
  readonly kills: RunRecord['kills'];
  readonly toldBy: readonly string[];
  /** Times jobs were given up since the last new step. */
  readonly replans: number;
  /** GRADIENT_LOST since the last new step. */
  readonly losses: number;
  readonly notBeforeMs: number;
  readonly lastNewsMs: number;
  readonly lastStepAtMs: number | null;
  /** A fault about the present silence was recorded already. */
  readonly silenceRecorded: boolean;
  /** Why the run is to fail at the next step boundary, after a checkpoint; null: it is not. */
  readonly ending: ErrorRecord | null;
  /** When this machine last heard anything; null: not yet. */
  readonly clockMs: number | null;
  /** What the record shows and nothing decides by. */
  readonly shown: {
    readonly lastReport: StepReport | null;
    readonly firstLoss: number | null;
    readonly validation: RunRecord['validation'];
    readonly validationBefore: number | null;
    readonly tokensPerSecond: number | null;
    readonly weightsDigest: string | null;
    readonly skippedSteps: number;
    readonly faults: RunRecord['faults'];
    readonly faultCounts: RunRecord['faultCounts'];
    readonly attempts: RunRecord['attempts'];
    readonly runningMs: number;
    readonly error: ErrorRecord | null;
    readonly createdAtMs: number;
    readonly startedAtMs: number | null;
    readonly finishedAtMs: number | null;
  };
}

/** All that a machine hears. `atMs` is the orchestrator's clock. */
export type MachineEvent = { readonly atMs: number } & (
  | { readonly type: 'workers'; readonly workers: readonly WorkerView[]; readonly share?: Share }
  | {
      /**
       * Recovery found this job of the current epoch, or this checkpoint of any; its end, if it is finished, follows as an event of
       * its own.
       */
      readonly type: 'adopt';
      readonly job: JobAddress;
      readonly data: unknown;
      readonly processedAtMs: number | null;
      readonly finished: boolean;
      /** The last progress that the job reported, as far as Redis knows; null: none. */
      readonly progress: unknown;
      /** The shards of a reduce job. */
      readonly related: readonly JobAddress[];
    }
  | { readonly type: 'ready' }
  | { readonly type: 'claimed'; readonly workers: readonly WorkerView[] }
  | { readonly type: 'progress'; readonly id: string; readonly data: unknown }
  | { readonly type: 'completed'; readonly id: string; readonly result: unknown }
  | { readonly type: 'failed'; readonly id: string; readonly error: ErrorRecord }
  /** Redis knows nothing of this job any more. */
  | { readonly type: 'missing'; readonly id: string }
  | { readonly type: 'checkpoints'; readonly good: readonly CheckpointPlace[]; readonly bad: readonly { readonly directory: string; readonly error: ErrorRecord }[] }
  | { readonly type: 'wish'; readonly wish: 'pause' | 'resume' | 'cancel' }
  /** The driver met a fault that does not stop the run. */
  | { readonly type: 'fault'; readonly what: string; readonly error: ErrorRecord }
  /** The driver met a failure that does. */
  | { readonly type: 'fatal'; readonly error: ErrorRecord }
  /** Redis was started anew, or another took its place: what it was told last may be lost. */
  | { readonly type: 'restarted' }
  | { readonly type: 'tick' }
);

/** One line of metrics.jsonl. */
export type MetricsLine =
  | { readonly type: 'step'; readonly atMs: number; readonly epoch: number; readonly tokensPerSecond: number; readonly report: StepReport }
  | { readonly type: 'eval'; readonly atMs: number; readonly step: number; readonly loss: number | null; /** Absent: 0. */ readonly branch?: number }
  | ({ readonly type: 'rollback' } & Rollback);

/** A gradient that went into a step's sum. */
export type ShardInput = Result<'reduce'>['shards'][number];

/** What happened to a run, as far as one must know it to say that nothing counted twice and nothing was left out. */
export type HistoryEntry =
  /** A step counted. `local`: all shards on one worker, whose gradients nobody else sees. */
  | { readonly type: 'step'; readonly step: number; readonly way: 'local' | 'flow'; readonly worker: string; readonly digest: string | null; readonly shards: readonly ShardInput[] | null }
  /** A shard's report was heard; it may come late, or again, or of an epoch (`reportEpoch`) long over. */
  | { readonly type: 'shard'; readonly step: number; readonly shard: number; readonly worker: string; readonly reportEpoch: number; readonly digest: string }
  /** Jobs were decided on that begin at version `from` and end at `through`. */
  | { readonly type: 'job'; readonly kind: Exclude<Activity['kind'], 'claim' | 'findCheckpoints'>; readonly from: number; readonly through: number; readonly workers: readonly string[] }
  | { readonly type: 'epoch' }
  /** Steps after `toStep` are void from here on, and so is what any epoch before this line's tells of them. */
  | { readonly type: 'rollback'; readonly branch: number; readonly fromStep: number; readonly toStep: number }
  | { readonly type: 'checkpoint'; readonly step: number; readonly worker: string }
  | { readonly type: 'phase'; readonly phase: RunPhase; readonly weightsDigest: string | null }
  | { readonly type: 'fault'; readonly what: string; readonly code: ErrorRecord['code'] };

/** One line of history.jsonl, but for the driver that wrote it. `epoch` is that of the run. */
export type HistoryEvent = { readonly atMs: number; readonly epoch: number } & HistoryEntry;

/** All that a machine may ask for, in order. */
export type Effect =
  /** Must be in Redis before anything that follows. */
  | { readonly type: 'control'; readonly control: Control }
  | { readonly type: 'claim'; readonly workers: readonly string[] }
  | { readonly type: 'release'; readonly workers: readonly string[] }
  | { readonly type: 'add'; readonly job: NewJob }
  | { readonly type: 'flow'; readonly parent: NewJob; readonly children: readonly NewJob[] }
  | { readonly type: 'remove'; readonly jobs: readonly JobAddress[] }
  | { readonly type: 'lookup'; readonly jobs: readonly JobAddress[] }
  | { readonly type: 'metrics'; readonly line: MetricsLine }
  /** A step that counted before was computed again: it must be the same. */
  | { readonly type: 'recount'; readonly report: StepReport }
  /** Follows the effect that it tells of. */
  | { readonly type: 'history'; readonly event: HistoryEvent }
  | { readonly type: 'publish'; readonly event: RunEvent }
  /** Delete reduced gradients of steps after `from` up to `through`, of the branch that `rollbacks` (absent: none) led to. */
  | { readonly type: 'trim'; readonly from: number; readonly through: number; readonly rollbacks?: readonly Rollback[] }
  | { readonly type: 'deleteCheckpoints'; readonly directories: readonly string[] }
  /** Verify the checkpoints on disk, and answer with `checkpoints`. */
  | { readonly type: 'findCheckpoints' }
  | { readonly type: 'finish' };

/** What recovery (driver.ts) knows of a run before its first event. */
export interface Recovered {
  readonly record: RunRecord;
  readonly control: Control | null;
  /** From metrics.jsonl; it wins over the record, which is written later. */
  readonly counted: {
    readonly step: number;
    readonly lastReport: StepReport | null;
    readonly skippedInARow: number;
    readonly lastEvalStep: number;
    /** Absent: the run was never rolled back, and nobody watches its loss. */
    readonly branch?: { readonly rollbacks: readonly Rollback[]; readonly lossWatch: LossWatch };
  } | null;
  /** From faults.jsonl; null: there is none. */
  readonly faults: Pick<RunRecord, 'faults' | 'faultCounts'> | null;
  readonly checkpoints: readonly CheckpointPlace[];
  /** Reduced gradients lie in the exchange without a gap from the newest checkpoint up to here. */
  readonly logThrough: number;
}

export function initialState(settings: RunSettings, recovered: Recovered): RunState {
  const { record, counted, checkpoints } = recovered;
  const step = counted?.step ?? record.step;
  // Steps that were skipped in earlier attempts do not end this one.
  const ended = record.attempts.findLast((attempt) => attempt.endedAtMs !== null);
  const newest = checkpoints.at(-1)?.step ?? 0;
  const rollbacks = counted === null ? record.rollbacks : (counted.branch?.rollbacks ?? []);
  const { control } = recovered;
  // A rollback is written down before anybody is told of its epoch.
  const epoch = Math.max(record.epoch, control?.epoch ?? 0, rollbacks.at(-1)?.epoch ?? 0);
  const stepsBefore = ended === undefined || rollbacks.some(({ atMs }) => atMs >= ended.endedAtMs!) ? 0 : ended.toStep;
  const validation = survives(record.validation?.step ?? 0, rollbacks.slice(record.rollbacks.length)) ? record.validation : null;
  return {
    settings,
    ready: false,
    phase: record.phase,
    epoch,
    // Without a control key workers take the run for over, and one of an older epoch lets them do its jobs: the first job is preceded by one.
    command: control !== null && control.epoch === epoch ? control.command : 'stop',
    step: Math.max(step, newest),
    rollbacks,
    lossWatch: counted?.branch?.lossWatch ?? UNWATCHED,
    version: Math.max(step, newest),
    sharedVersion: Math.min(Math.max(newest, recovered.logThrough), Math.max(step, newest)),
    home: null,
    checkpoints,
    trimmedThrough: newest,
    activity: null,
    saving: null,
    saves: 0,
    saveFailures: 0,
    saveNotBeforeMs: 0,
    diskFull: false,
    early: new Map(),
    digests: new Map(),
    workers: [],
    excluded: [],
    claims: [],
    share: null,
    way: null,
    measurements: { shardComputeMs: null, exchangeBytesPerMs: null },
    lastEvalStep: Math.max(counted?.lastEvalStep ?? -1, validation?.step ?? -1, record.validationBefore === null ? -1 : 0),
    lastComparisonStep: 0,
    skippedInARow: Math.max(0, Math.min(counted?.skippedInARow ?? 0, step - stepsBefore)),
    // A run that is tried again is given the benefit of the doubt.
    kills: record.phase === 'queued' ? [] : record.kills,
    toldBy: record.kills.map(({ incarnation }) => incarnation),
    replans: 0,
    losses: 0,
    notBeforeMs: 0,
    lastNewsMs: 0,
    lastStepAtMs: null,
    silenceRecorded: false,
    ending: null,
    clockMs: null,
    shown: {
      lastReport: counted?.lastReport ?? record.lastReport,
      firstLoss: record.firstLoss,
      validation,
      validationBefore: record.validationBefore,
      tokensPerSecond: record.tokensPerSecond,
      weightsDigest: record.weightsDigest,
      skippedSteps: record.skippedSteps,
      faults: recovered.faults?.faults ?? record.faults,
      faultCounts: recovered.faults?.faultCounts ?? record.faultCounts,
      attempts: record.attempts,
      runningMs: record.runningMs,
      error: record.error,
      createdAtMs: record.createdAtMs,
      startedAtMs: record.startedAtMs,
      finishedAtMs: record.finishedAtMs,
    },
  };
}

/** What a record keeps of these faults, oldest first. */
export function newestFaults<Fault extends { readonly error: Pick<ErrorRecord, 'code'> }>(faults: readonly Fault[]): readonly Fault[] {
  let skips = faults.reduce((count, { error }) => count + Number(error.code === 'NON_FINITE'), 0);
  const kept = skips <= SKIPS_KEPT ? faults : faults.filter(({ error }) => error.code !== 'NON_FINITE' || skips-- <= SKIPS_KEPT);
  return kept.slice(-FAULTS_KEPT);
}

/** The record of a run that was asked for and not begun. */
export function queuedRecord(run: string, spec: RunSpec, atMs: number): RunRecord {
  return {
    run, phase: 'queued', step: 0, steps: spec.steps, epoch: 0, checkpoint: null, lastReport: null, firstLoss: null, validation: null,
    validationBefore: null, tokensPerSecond: null, weightsDigest: null, way: null, skippedSteps: 0, rollbacks: [], faults: [], faultCounts: {}, kills: [], attempts: [], runningMs: 0, error: null,
    createdAtMs: atMs, startedAtMs: null, finishedAtMs: null,
  };
}

/** What the run asks of the workers, but for since when it has them; null: nothing, it stands still. */
export function demandOf(state: RunState): Omit<Demand, 'servedSinceMs' | 'waitingSinceMs' | 'wasServed'> | null {
  const { settings, shown, home, way, excluded, workers, measurements } = state;
  if (state.phase !== 'queued' && state.phase !== 'running' && state.phase !== 'pausing') return null;
  const { run, spec } = settings;
  return {
    run,
    priority: spec.priority,
    precision: spec.precision,
    most: mostWorkers({ run, spec, workers, excluded, home: home?.id ?? null, current: way, measurements }),
    createdAtMs: shown.createdAtMs,
    home: home?.id ?? way?.workers[0] ?? null,
    excluded,
  };
}

export function recordOf(state: RunState): RunRecord {
  const { settings, shown, way } = state;
  return {
    run: settings.run,
    phase: state.phase,
    step: state.step,
    steps: settings.spec.steps,
    epoch: state.epoch,
    checkpoint: state.checkpoints.at(-1) ?? null,
    lastReport: shown.lastReport,
    firstLoss: shown.firstLoss,
    validation: shown.validation,
    validationBefore: shown.validationBefore,
    tokensPerSecond: shown.tokensPerSecond,
    weightsDigest: shown.weightsDigest,
    way: way === null ? null : { exchange: way.exchange, workers: way.workers.length, reason: way.reason },
    skippedSteps: shown.skippedSteps,
    rollbacks: state.rollbacks,
    faults: shown.faults,
    faultCounts: shown.faultCounts,
    kills: state.kills,
    attempts: changeAttempt(shown.attempts, () => ({ toStep: state.step, phase: state.phase })),
    runningMs: shown.runningMs,
    error: shown.error,
    createdAtMs: shown.createdAtMs,
    startedAtMs: shown.startedAtMs,
    finishedAtMs: shown.finishedAtMs,
  };
}
