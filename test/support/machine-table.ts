/**
 * The run machine on a table, for tests that drive it by hand: each tells it one event at a time and reads what it asks for. Owns the
 * smallest worker, report, job and settings that such tests begin with, and the answers of workers to the jobs that were added. It holds
 * the machine to nothing and disturbs nothing by itself; test/sim does. Used by the tests of the machine's layers and of what they rest on.
 */
import type { ErrorCode, ErrorRecord } from '../../config/errors.ts';
import type { Control } from '../../config/keys.ts';
import type { Result, StepReport } from '../../config/messages.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import type { WorkerView } from '../../orchestrator/plan.ts';
import { step } from '../../orchestrator/run-machine.ts';
import { initialState, queuedRecord } from '../../orchestrator/run-state.ts';
import type { Effect, JobAddress, MachineEvent, NewJob, Recovered, RunSettings, RunState } from '../../orchestrator/run-state.ts';

/** What a machine is told; the time is added as it is. */
export type Told = MachineEvent extends infer Event ? (Event extends MachineEvent ? Omit<Event, 'atMs'> : never) : never;
type EffectOf<Type extends Effect['type']> = Extract<Effect, { type: Type }>;
/** What the messages of jobs have in them, each its part. */
interface JobData {
  readonly epoch: number;
  readonly step: number;
  readonly fromStep: number;
  readonly shard: number;
  readonly shardCount: number;
  readonly directory: string;
}

export const SETTINGS = {
  run: 'r', checkpointRoot: 'c', logSteps: 100, maxReplans: 3, maxKills: 3, stepsPerJob: 100, lookupMs: 300, jobTimeoutMs: 2_000, backoffMs: 10, backoffMaximumMs: 10,
} as const;
export const TIMINGS = { computeMs: 1, exchangeMs: 1, waitMs: 0 };

export const hex = (digit: string): string => digit.repeat(32);
export const dataOf = ({ data }: Pick<NewJob, 'data'>): JobData => data as JobData;

/** An idle worker that nobody holds. */
export const worker = (id: string, changes: Partial<WorkerView> = {}): WorkerView => ({
  id, incarnation: `${id}-1`, precisions: ['fp32'], state: 'idle', replica: null, startedAtMs: 0, lastExit: null, heldBy: null, ...changes,
});

/** The report of a step that took a millisecond and went well. */
export const report = (at: number, changes: Partial<StepReport> = {}): StepReport => ({
  step: at, loss: 1, auxLoss: [1], expertLoad: [[1]], targetTokens: 4, gradientNorm: 1, clipScale: 1, learningRate: 1, skipped: false, nonFinite: null, milliseconds: 1,
  ...changes,
});

/** A machine with its hand on the table: every effect so far, claims granted at once, time that passes when it is told to. */
export class Table {
  state: RunState;
  effects: Effect[] = [];
  workers: WorkerView[];
  now = 0;

  /** With a `control`, as recovery finds it after `counted` steps: the caller tells the rest, and `ready`. */
  constructor(
    spec: Partial<RunSpecInput>, workers: string[], settings: Partial<RunSettings> = {}, control: Control | null = null, counted = 0, recovered: Partial<Recovered> = {},
  ) {
    const batch = { shards: 2, sequences: 1, sequenceLength: 4 };
    const checked = parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't' }, steps: 9, batch, parallelism: workers.length, ...spec });
    this.workers = workers.map((id) => worker(id));
    this.state = initialState(
      { spec: checked, ...SETTINGS, ...settings },
      {
        record: { ...queuedRecord('r', checked, 0), phase: control === null ? 'queued' : 'running' }, control,
        counted: counted === 0 ? null : { step: counted, lastReport: report(counted), skippedInARow: 0, lastEvalStep: -1 }, faults: null, checkpoints: [], logThrough: 0,
        ...recovered,
      },
    );
    if (control !== null) return;
    this.see(...this.workers).tell({ type: 'ready' });
  }

  tell(event: Told): this {
    const next = step(this.state, { ...event, atMs: this.now });
    this.state = next.state;
    this.effects.push(...next.effects);
    for (const effect of next.effects) {
      if (effect.type !== 'claim') continue;
      this.workers = this.workers.map((each) => (effect.workers.includes(each.id) ? { ...each, heldBy: 'r' } : each));
      this.tell({ type: 'claimed', workers: this.workers });
    }
    return this;
  }

  /** Time passes, and the clock is heard. */
  wait(milliseconds: number): this {
    this.now += milliseconds;
    return this.tell({ type: 'tick' });
  }

  /** These workers live, and no other. */
  see(...workers: WorkerView[]): this {
    this.workers = workers;
    return this.tell({ type: 'workers', workers });
  }

  /** Of the workers that live these are the run's to use. */
  give(...ids: string[]): this {
    return this.tell({ type: 'workers', workers: this.workers, share: { workers: ids, reason: 'shares with another' } });
  }

  wish(wish: 'pause' | 'resume' | 'cancel'): this {
    return this.tell({ type: 'wish', wish });
  }

  // --- What it asked for ---------------------------------------------------------------------------------------------

  all<Type extends Effect['type']>(type: Type): EffectOf<Type>[] {
    return this.effects.filter((effect): effect is EffectOf<Type> => effect.type === type);
  }

  get added(): NewJob[] {
    return this.effects.flatMap((effect) => (effect.type === 'add' ? [effect.job] : effect.type === 'flow' ? [effect.parent, ...effect.children] : []));
  }

  last(name: NewJob['name']): NewJob {
    const job = this.added.findLast((each) => each.name === name);
    if (job === undefined) throw new Error(`no ${name} job was added`);
    return job;
  }

  /** The newest job of that shard. */
  shardJob(shard: number): NewJob {
    return this.added.findLast((job) => job.name === 'shard' && dataOf(job).shard === shard)!;
  }

  get faults(): (ErrorCode | 'BUG')[] {
    return this.state.shown.faults.map((fault) => fault.error.code);
  }

  get counted(): number[] {
    return this.all('metrics').flatMap(({ line }) => (line.type === 'step' ? [line.report.step] : []));
  }

  get commands(): Control['command'][] {
    return this.all('control').map(({ control }) => control.command);
  }

  get released(): string[] {
    return this.all('release').flatMap(({ workers }) => workers);
  }

  // --- What workers answer -------------------------------------------------------------------------------------------

  fail(job: NewJob, code: ErrorRecord['code'], context: ErrorRecord['context'] = {}): this {
    return this.tell({ type: 'failed', id: job.id, error: { code, message: code, context } });
  }

  /** A local job tells of one step. */
  progress(at: number, changes: Partial<StepReport> = {}, job = this.last('steps')): this {
    return this.tell({ type: 'progress', id: job.id, data: { worker: job.worker!, epoch: dataOf(job).epoch, report: report(at, changes) } });
  }

  completeSteps(done: number, changes: Partial<Result<'steps'>> = {}): this {
    const job = this.last('steps');
    const { epoch, fromStep } = dataOf(job);
    const reports = Array.from({ length: done }, (_, index) => report(fromStep + 1 + index));
    return this.tell({ type: 'completed', id: job.id, result: { worker: job.worker!, epoch, fromStep, stepsDone: done, reports, timings: TIMINGS, ...changes } });
  }

  completeShard(shard: number, digest: string, by: string, job = this.shardJob(shard), changes: Partial<Result<'shard'>> = {}): this {
    const { epoch, step: at } = dataOf(job);
    const result: Result<'shard'> = {
      worker: by, epoch, step: at, shard, lossSum: 1, auxLossSum: [1], expertLoad: [[1]], targetTokens: 4, digest, key: 'k', bytes: 4, timings: TIMINGS, ...changes,
    };
    return this.tell({ type: 'completed', id: job.id, result });
  }

  completeReduce(by = this.workers[0]!.id, job = this.last('reduce'), changes: Partial<Result<'reduce'>> = {}): this {
    const { epoch, step: at, shardCount } = dataOf(job);
    const shards = Array.from({ length: shardCount }, (_, shard) => ({ shard, worker: by, epoch, digest: hex(String(shard)) }));
    return this.tell({ type: 'completed', id: job.id, result: { worker: by, epoch, digest: hex('0'), key: 'k', bytes: 4, report: report(at), timings: TIMINGS, shards, ...changes } });
  }

  completeEval(loss: number | null): this {
    const job = this.last('eval');
    const { replica: { step: at } } = job.data as { replica: JobData };
    return this.tell({ type: 'completed', id: job.id, result: { worker: job.worker!, step: at, loss, targetTokens: 4, milliseconds: 1 } });
  }

  completeDigest(job: NewJob, digest: string, weightsDigest: string | null = null): this {
    const { epoch, step: at } = dataOf(job);
    return this.tell({ type: 'completed', id: job.id, result: { worker: job.worker!, epoch, step: at, digest, weightsDigest } });
  }

  /** Of the newest checkpoint, unless `job` is named. */
  copied(job = this.last('checkpoint')): this {
    const { epoch, step: at } = dataOf(job);
    return this.tell({ type: 'progress', id: job.id, data: { worker: job.worker!, epoch, step: at, copied: true } });
  }

  saved(job = this.last('checkpoint')): this {
    const { epoch, step: at, directory } = dataOf(job);
    return this.tell({ type: 'completed', id: job.id, result: { worker: job.worker!, epoch, step: at, directory, bytes: 1, milliseconds: 1 } });
  }

  // --- What recovery finds -------------------------------------------------------------------------------------------

  /** A job in Redis, taken by its worker at 5 ms and not ended, unless `more` says otherwise. */
  adopt({ queue, worker: by, id, data }: JobAddress & Pick<NewJob, 'data'>, more: Partial<Extract<Told, { type: 'adopt' }>> = {}): this {
    return this.tell({ type: 'adopt', job: { queue, worker: by, id }, data, processedAtMs: 5, finished: false, progress: null, related: [], ...more });
  }
}
