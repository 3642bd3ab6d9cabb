/**
 * The run machine: from what is known and what is heard to what is known and what is to be done. PURE: no IO, no clock,
 * no random source; time comes in through events. It decides everything about one run; driver.ts does what it asks and
 * test/sim holds it to its promises. The words are in run-state.ts, the arithmetic in plan.ts.
 *
 *   phase      event                       next       what is done
 *   queued     ready                       running    decide
 *   running    pause                       pausing    Control `stop`; a flow is given up (epoch + 1), other jobs end by themselves
 *   running    last digest reported        completed  finish
 *   running    never-failure, too many     failed     epoch + 1, Control `stop`, finish
 *   running    maxDurationSeconds are over failed     at the step boundary, after a checkpoint; finish
 *   running    checkpoint meets DISK_FULL  paused     the worker stays claimed, its replica is kept
 *   pausing    nothing under way           paused     after a checkpoint, if the version is nowhere else; release the workers
 *   pausing    resume                      running    Control `run` before the next job
 *   paused     resume                      running    epoch + 1, decide
 *   any of them  cancel                    cancelled  epoch + 1, Control `stop`, finish
 *
 * `decide`, when nothing is under way (the activity is null), takes the first of these that applies:
 *   1. pausing: a checkpoint if `version` is only at home; else paused.        5. version 0, N, 2N, ...: eval.
 *   2. no fitting worker: wait, and say why.                                   6. several replicas: compare digests.
 *      A worker that is another run's to use (share.ts) fits no more: a local job there is asked to yield.
 *   3. workers not yet claimed: claim them.                                    7. the last version: weights digest, then completed.
 *   4. the way leaves home, or a checkpoint is due: checkpoint at home;        8. local: a `steps` job; several workers: a flow.
 *      home is lost: fall back to the newest version anybody can reach.
 *
 * Exactly once: a report is appended when it is that of step + 1, and no other way. Jobs carry the epoch in id and payload;
 * only those of the activity at hand are listened to, and giving up on an activity raises the epoch.
 */
import type { ErrorRecord } from '../config/errors.ts';
import { ERROR_KINDS } from '../config/errors.ts';
import { parseMessage, parseResult, results, TERMINAL_PHASES } from '../config/messages.ts';
import type { Result, RunEvent, RunFault, RunPhase, StepReport } from '../config/messages.ts';
import { tokensPerStep } from '../config/run-spec.ts';
import { beginAttempt, changeAttempt, endAttempt } from './attempts.ts';
import { checkpointDue, checkpointsToDelete, chooseWay, comparisonDue, evalDue, nextBoundary } from './plan.ts';
import type { Way, WorkerView } from './plan.ts';
import { FAULTS_KEPT, jobId, parseJobId } from './run-state.ts';
import type { Activity, Effect, HistoryEntry, Holder, JobAddress, MachineEvent, NewJob, RunState, StepSource } from './run-state.ts';

type Draft = { -readonly [Key in keyof RunState]: RunState[Key] };
type Of<Kind extends Activity['kind']> = Extract<Activity, { kind: Kind }>;

/** Steps whose shard digests are remembered, for late reports. */
const DIGESTS_KEPT = 4;
/** Weight of the newest in a smoothed measurement. */
const SMOOTHING = 0.3;

/** Applies one event. Neither argument is changed. */
export function step(state: RunState, event: MachineEvent): { readonly state: RunState; readonly effects: readonly Effect[] } {
  if (TERMINAL_PHASES.includes(state.phase)) return { state, effects: [] };
  const machine = new Machine({ ...state }, event.atMs);
  machine.passTime();
  machine.hear(event);
  return { state: machine.state, effects: machine.effects };
}

/** One application of an event: a draft of the next state, and the effects so far. Lives for one call of `step`. */
class Machine {
  readonly state: Draft;
  readonly effects: Effect[] = [];
  readonly atMs: number;

  constructor(state: Draft, atMs: number) {
    this.state = state;
    this.atMs = atMs;
  }

  /** Time between two events belongs to the phase that the first left behind; time without an orchestrator to none. */
  passTime(): void {
    const { state, atMs } = this;
    const spentMs = state.clockMs === null ? 0 : Math.max(0, atMs - state.clockMs);
    state.clockMs = atMs;
    if (state.phase !== 'running' || spentMs === 0) return;
    const { shown } = state;
    const attempts = changeAttempt(shown.attempts, ({ runningMs }) => ({ runningMs: runningMs + spentMs }));
    state.shown = { ...shown, attempts, runningMs: shown.runningMs + spentMs };
    this.limitTime(attempts.at(-1)?.runningMs ?? 0);
  }

  /** The attempt has used up its time: it ends at the next step boundary, unless all that is left is to finish. */
  private limitTime(runningMs: number): void {
    const { state } = this;
    const { maxDurationSeconds: limit, steps } = state.settings.spec;
    if (!(limit > 0) || runningMs < 1000 * limit || state.ending !== null || !state.ready || state.version >= steps) return;
    const message = `running for ${limit} s, as long as maxDurationSeconds allows; \`cuda-nn retry\` goes on from step ${state.version} or a little later for as long again`;
    state.ending = { code: 'TIME_LIMIT', message, context: { seconds: limit } };
    if (state.activity?.kind === 'steps' && state.command === 'run') this.control('yield');
  }

  hear(event: MachineEvent): void {
    switch (event.type) {
      case 'workers':
        this.state.share = event.share ?? null;
        return this.hearWorkers(event.workers);
      case 'adopt': return this.guarded(`job ${event.job.id}`, () => this.adopt(event));
      case 'ready': return this.begin();
      case 'claimed': return this.hearClaimed(event.workers);
      case 'progress': return this.hearProgress(event.id, event.data);
      case 'completed': return this.guarded(`result of ${event.id}`, () => this.hearCompleted(event.id, event.result));
      case 'failed': return this.hearFailed(event.id, event.error);
      case 'missing': return this.hearMissing(event.id);
      case 'checkpoints': return this.hearCheckpoints(event.good, event.bad);
      case 'wish': return this.hearWish(event.wish);
      case 'fault': return this.fault(event.what, event.error);
      case 'fatal': return this.fail(event.error);
      case 'restarted': return this.hearRestarted();
      case 'tick': return this.tick();
    }
  }

  // --- What is heard ------------------------------------------------------------------------------------------------

  private begin(): void {
    const state = this.state;
    state.ready = true;
    state.lastNewsMs = this.atMs;
    if (state.activity === null && state.home === null) {
      const { run } = state.settings;
      const holder = state.workers.find((worker) => worker.heldBy === run && worker.replica?.run === run && worker.replica.step === state.version);
      if (holder !== undefined) state.home = { id: holder.id, incarnation: holder.incarnation };
    }
    const fromStep = state.activity === null && state.home === null ? Math.min(state.version, state.sharedVersion) : state.version;
    state.shown = { ...state.shown, attempts: beginAttempt(state.shown.attempts, { fromStep, atMs: this.atMs }) };
    if (state.phase === 'queued') {
      state.shown = { ...state.shown, startedAtMs: state.shown.startedAtMs ?? this.atMs };
      this.enter('running');
    }
    this.hearWorkers(state.workers);
  }

  private hearWorkers(workers: readonly WorkerView[]): void {
    const state = this.state;
    state.workers = workers;
    if (!state.ready) {
      state.claims = workers.filter((worker) => worker.heldBy === state.settings.run).map((worker) => worker.id);
      return;
    }
    if (state.home !== null && !this.lives(state.home)) state.home = null;
    if (state.activity?.kind === 'flow' && state.activity.parent.worker === null) state.activity = this.withJoiners(state.activity);
    const dead = this.holders().find((holder) => !this.lives(holder));
    if (dead !== undefined) {
      const error: ErrorRecord = { code: 'WORKER_LOST', message: `worker ${dead.id} ended while it held a job of this run`, context: { worker: dead.id } };
      this.fault(this.activityName(), error);
      return this.replan(error);
    }
    if (state.activity?.kind === 'steps' && state.command === 'run' && state.phase === 'running') this.yieldIfBetter(state.activity);
    this.decide();
  }

  /** Whoever lives may take jobs from the shared queue, so all of them are watched. */
  private withJoiners(activity: Of<'flow'>): Activity {
    const joiners = this.state.workers.filter((worker) => !activity.holders.some((holder) => holder.id === worker.id));
    if (joiners.length === 0) return activity;
    return { ...activity, holders: [...activity.holders, ...joiners.map(({ id, incarnation }) => ({ id, incarnation }))] };
  }

  /** A local job is under way: asks it to end at the next step boundary if the way has changed, or its worker is another run's to use. */
  private yieldIfBetter(activity: Of<'steps'>): void {
    const { share } = this.state;
    const way = this.wanted();
    if (way.exchange === 'local' && way.workers[0] === activity.holder.id) return;
    if (way.workers.length === 0 && (share === null || share.workers.includes(activity.holder.id))) return;
    this.control('yield');
  }

  private hearClaimed(workers: readonly WorkerView[]): void {
    if (this.state.activity?.kind !== 'claim') return;
    this.state.activity = null;
    this.state.claims = workers.filter((worker) => worker.heldBy === this.state.settings.run).map((worker) => worker.id);
    this.hearWorkers(workers);
  }

  private hearProgress(id: string, data: unknown): void {
    const { activity } = this.state;
    if (activity?.kind !== 'steps' || activity.job.id !== id) return;
    this.guarded(`progress of ${id}`, () => {
      const { report, worker } = parseResult('stepProgress', data);
      if (report.step <= activity.fromStep || report.step > activity.fromStep + activity.stepCount) return;
      this.reach(report.step, activity.holder);
      this.measureCompute(report.milliseconds / this.state.settings.spec.batch.shards);
      this.count(report, alone(worker));
    });
  }

  private hearCompleted(id: string, value: unknown): void {
    const { activity } = this.state;
    this.noteShard(id, value);
    if (this.over()) return;
    switch (activity?.kind) {
      case 'steps': return activity.job.id === id ? this.stepsCompleted(activity, parseResult('steps', value)) : undefined;
      case 'flow': return activity.parent.id === id ? this.flowCompleted(activity, parseResult('reduce', value)) : undefined;
      case 'checkpoint': return activity.job.id === id ? this.checkpointCompleted(activity, parseResult('checkpoint', value)) : undefined;
      case 'eval': return activity.job.id === id ? this.evalCompleted(activity, parseResult('eval', value)) : undefined;
      case 'digest': return activity.jobs.some((job) => job.id === id) ? this.digestCompleted(activity, id, parseResult('digest', value)) : undefined;
      case 'claim': case 'findCheckpoints': case undefined: return;
    }
  }

  private stepsCompleted(activity: Of<'steps'>, result: Result<'steps'>): void {
    const { settings } = this.state;
    for (const report of result.reports) this.count(report, alone(result.worker));
    if (this.over()) return;
    const reached = activity.fromStep + result.stepsDone;
    if (this.state.step < reached) return this.badResult(`${activity.job.id} tells of ${result.stepsDone} steps, but not of each`);
    this.reach(reached, activity.holder);
    if (result.stepsDone > 0) this.measureCompute(result.timings.computeMs / (result.stepsDone * settings.spec.batch.shards));
    this.idle();
    if (result.stepsDone === 0) this.raiseEpoch();
    if (result.stepsDone === 0 && this.state.command === 'run') {
      return this.replan({ code: 'TIMEOUT', message: `worker ${activity.holder.id} gave ${activity.job.id} back undone`, context: {} });
    }
    this.decide();
  }

  /** Any shard's report, of whatever epoch: it counts for nothing but the comparison of digests and the timings. */
  private noteShard(id: string, value: unknown): void {
    const parts = parseJobId(id);
    if (parts?.name !== 'shard' || parts.run !== this.state.settings.run) return;
    const current = parts.epoch === this.state.epoch;
    const read = results.shard.safeParse(value);
    if (!read.success) return current ? this.badResult(`result of ${id}: ${read.error.issues[0]!.message}`) : undefined;
    const result = read.data;
    if (current) this.state.lastNewsMs = this.atMs;
    this.measureCompute(result.timings.computeMs);
    this.measureExchange(result.bytes, result.timings.exchangeMs);
    const known = this.state.digests.get(result.step)?.get(result.shard);
    if (known?.digest !== result.digest || known.worker !== result.worker) {
      const { step: at, shard, worker, epoch, digest } = result;
      this.note({ type: 'shard', step: at, shard, worker, reportEpoch: epoch, digest });
    }
    if (known === undefined) {
      if (result.step <= this.state.step - DIGESTS_KEPT) return;
      const ofStep = new Map(this.state.digests.get(result.step)).set(result.shard, { digest: result.digest, worker: result.worker });
      const kept = [...this.state.digests].filter(([at]) => at > this.state.step - DIGESTS_KEPT && at !== result.step);
      this.state.digests = new Map([...kept, [result.step, ofStep]]);
      return;
    }
    if (known.digest === result.digest) return;
    this.fault(`shard ${result.shard} of step ${result.step}`, {
      code: 'REPLICA_DIVERGED',
      message: `two gradients of one shard differ: ${known.worker} computed ${known.digest}, ${result.worker} computed ${result.digest}; one of them has a fault in memory or hardware`,
      context: { step: result.step, shard: result.shard, first: known.worker, second: result.worker },
    });
  }

  private flowCompleted(activity: Of<'flow'>, result: Result<'reduce'>): void {
    if (result.report.step !== activity.step) return this.badResult(`${activity.parent.id} tells of step ${result.report.step}`);
    this.measureExchange(result.bytes * (activity.children.length + 1), result.timings.exchangeMs);
    const holder = this.holderOf(result.worker);
    if (this.state.sharedVersion === activity.step - 1) this.state.sharedVersion = activity.step;
    this.reach(activity.step, holder);
    this.count(result.report, { way: 'flow', worker: result.worker, digest: result.digest, shards: result.shards });
    if (this.over()) return;
    this.idle();
    this.decide();
  }

  private checkpointCompleted(activity: Of<'checkpoint'>, result: Result<'checkpoint'>): void {
    const state = this.state;
    if (result.step !== activity.step) return this.badResult(`${activity.job.id} tells of step ${result.step}`);
    this.idle();
    state.replans = 0;
    const checkpoints = [...state.checkpoints.filter((each) => each.step !== activity.step), { directory: activity.directory, step: activity.step }];
    const old = checkpointsToDelete(state.settings.spec, checkpoints);
    state.checkpoints = checkpoints.filter((each) => !old.includes(each));
    state.sharedVersion = Math.max(state.sharedVersion, activity.step);
    this.note({ type: 'checkpoint', step: activity.step, worker: result.worker });
    this.publish({ type: 'checkpoint', step: activity.step, directory: activity.directory, atMs: this.atMs });
    if (old.length > 0) this.effects.push({ type: 'deleteCheckpoints', directories: old.map(({ directory }) => directory) });
    if (activity.step > state.trimmedThrough) {
      this.effects.push({ type: 'trim', from: state.trimmedThrough, through: activity.step });
      state.trimmedThrough = activity.step;
    }
    this.decide();
  }

  private evalCompleted(activity: Of<'eval'>, result: Result<'eval'>): void {
    const { shown } = this.state;
    this.idle();
    this.state.replans = 0;
    this.state.lastEvalStep = activity.step;
    this.state.shown = {
      ...shown,
      validation: result.loss === null ? shown.validation : { step: activity.step, loss: result.loss },
      validationBefore: activity.step === 0 ? result.loss : shown.validationBefore,
    };
    this.effects.push({ type: 'metrics', line: { type: 'eval', atMs: this.atMs, step: activity.step, loss: result.loss } });
    if (result.loss !== null) this.publish({ type: 'eval', step: activity.step, loss: result.loss, atMs: this.atMs });
    this.decide();
  }

  private digestCompleted(activity: Of<'digest'>, id: string, result: Result<'digest'>): void {
    const jobs = activity.jobs.filter((job) => job.id !== id);
    const reports = [...activity.results, result];
    this.state.lastNewsMs = this.atMs;
    if (jobs.length > 0) {
      this.state.activity = { ...activity, jobs, results: reports };
      return;
    }
    this.idle();
    if (activity.final) {
      if (result.weightsDigest === null) return this.badResult(`${id} brings no weights digest of the last version`);
      this.state.shown = { ...this.state.shown, weightsDigest: result.weightsDigest };
      return this.finish('completed', null);
    }
    this.state.lastComparisonStep = activity.step;
    this.compareDigests(reports);
  }

  /** The majority is right; the others' replicas are not used again. Without a majority all go back to the checkpoint. */
  private compareDigests(reports: readonly Result<'digest'>[]): void {
    const state = this.state;
    const votes = new Map<string, number>();
    for (const { digest } of reports) votes.set(digest, (votes.get(digest) ?? 0) + 1);
    if (votes.size === 1) return this.decide();
    const [digest, count] = [...votes].sort((a, b) => b[1] - a[1])[0]!;
    const most = count * 2 > reports.length ? digest : null;
    for (const result of reports) {
      if (result.digest === most) continue;
      const error: ErrorRecord = {
        code: 'REPLICA_DIVERGED',
        message: `worker ${result.worker} holds other weights of version ${result.step} than ${most === null ? 'another' : 'the rest'} (digest ${result.digest})`,
        context: { worker: result.worker, step: result.step },
      };
      this.fault(`replica of ${result.worker}`, error);
      if (most !== null) {
        const holder = this.holderOf(result.worker);
        state.excluded = [...state.excluded, `${holder.id}/${holder.incarnation}`];
        if (state.home?.id === holder.id) state.home = null;
      }
    }
    if (most !== null) return this.decide();
    this.distrustLog();
    this.replan({ code: 'REPLICA_DIVERGED', message: 'replicas differ and no majority says which is right', context: {} });
  }

  private hearFailed(id: string, error: ErrorRecord): void {
    const { activity, phase } = this.state;
    if (!this.activityJobs().some((job) => job.id === id)) return;
    if (phase === 'pausing' && error.code === 'CANCELLED') {
      this.leaveUnfinished();
      this.idle();
      this.raiseEpoch();
      return this.decide();
    }
    this.fault(`${this.activityName()} (${id})`, error, this.activityJobs().find((job) => job.id === id)!.worker);
    if (this.blamesOwnCheckpoint(error)) {
      this.giveUp();
      this.state.home = null;
      this.state.activity = { kind: 'findCheckpoints' };
      this.effects.push({ type: 'findCheckpoints' });
      return;
    }
    if (error.code === 'DISK_FULL' && activity?.kind === 'checkpoint') {
      this.giveUp();
      return this.pauseOnFullDisk();
    }
    if (error.code === 'BUG' || (ERROR_KINDS[error.code].recovery === 'never' && error.code !== 'CANCELLED')) return this.fail(error);
    if (error.code === 'GRADIENT_LOST' && ++this.state.losses > 1) this.distrustLog();
    this.replan(error);
  }

  /** Whether the failure is that of a checkpoint of this run, which has others or its seed; the one it began with has no other. */
  private blamesOwnCheckpoint({ code, context }: ErrorRecord): boolean {
    const { checkpointRoot, spec } = this.state.settings;
    const path = typeof context['path'] === 'string' ? context['path'] : '';
    if (code === 'FILE_NOT_FOUND') return path.startsWith(`${checkpointRoot}/`);
    return code === 'CHECKPOINT_INVALID' && (spec.initialCheckpoint === undefined || !path.startsWith(spec.initialCheckpoint));
  }

  private hearMissing(id: string): void {
    if (!this.activityJobs().some((job) => job.id === id)) return;
    const error: ErrorRecord = { code: 'TIMEOUT', message: `${id} is no longer in Redis; it is planned anew`, context: {} };
    this.fault(this.activityName(), error);
    this.replan(error);
  }

  private hearCheckpoints(good: RunState['checkpoints'], bad: readonly { directory: string; error: ErrorRecord }[]): void {
    const state = this.state;
    if (state.activity?.kind !== 'findCheckpoints') return;
    for (const each of bad) this.fault(`checkpoint ${each.directory}`, each.error);
    this.idle();
    state.checkpoints = good.filter((each) => each.step <= state.step);
    state.sharedVersion = state.checkpoints.at(-1)?.step ?? 0;
    this.replan({ code: 'CHECKPOINT_INVALID', message: 'a checkpoint is damaged; the one before is used', context: {} });
  }

  /** Control, claims and jobs may be older than we know. A new epoch makes whatever came back of them void. */
  private hearRestarted(): void {
    const state = this.state;
    if (!state.ready) return;
    const message = 'Redis was started anew and may have lost its last writes; what was under way is planned again';
    this.fault('Redis', { code: 'REDIS_LOST', message, context: {} });
    state.claims = state.workers.filter((worker) => worker.heldBy === state.settings.run).map((worker) => worker.id);
    this.giveUp();
    this.decide();
  }

  private hearWish(wish: 'pause' | 'resume' | 'cancel'): void {
    const state = this.state;
    if (wish === 'cancel') return this.finish('cancelled', null);
    if (wish === 'resume') {
      if (state.phase === 'paused') {
        this.raiseEpoch();
        state.replans = 0;
      } else if (state.phase !== 'pausing') return;
      this.enter('running');
      return this.decide();
    }
    if (state.phase !== 'running') return;
    this.enter('pausing');
    if (state.activity?.kind === 'flow') this.giveUp();
    if (state.activity?.kind === 'steps') this.control('stop');
    this.decide();
  }

  private tick(): void {
    const state = this.state;
    if (!state.ready) return;
    const silentMs = this.atMs - state.lastNewsMs;
    const jobs = this.activityJobs();
    if (jobs.length > 0 && silentMs >= state.settings.lookupMs) this.effects.push({ type: 'lookup', jobs });
    if (state.phase === 'running' && silentMs >= state.settings.jobTimeoutMs && !state.silenceRecorded) {
      state.silenceRecorded = true;
      const seconds = Math.round(silentMs / 1000);
      const waiting = state.activity === null && state.way?.workers.length === 0;
      this.fault(waiting ? 'no worker' : this.activityName(), waiting
        ? { code: 'NO_WORKER', message: `${state.way!.reason}, for ${seconds} s; the run goes on when one comes`, context: {} }
        : { code: 'TIMEOUT', message: `nothing was heard of ${this.activityName()} for ${seconds} s; the run waits on`, context: {} });
    }
    this.decide();
  }

  /**
   * A job of the current epoch from before this orchestrator: it becomes the activity, as if it had just been added. What has
   * not ended and cannot be taken up is given up: a flow, since nobody knows which of its workers still live (what it published
   * is found again), a comparison of digests, and what does not fit the version.
   */
  private adopt({ job, data, processedAtMs, finished, related }: Extract<MachineEvent, { type: 'adopt' }>): void {
    const { state } = this;
    const parts = parseJobId(job.id);
    if (parts === null || parts.epoch !== state.epoch || parts.run !== state.settings.run || parts.name === 'shard') return;
    // A worker that started after the job was taken is not the one that took it.
    const view = state.workers.find((worker) => worker.id === job.worker);
    const gone = view === undefined || (processedAtMs !== null && view.startedAtMs > processedAtMs);
    const activity = this.adoptable(parts.name, job, data, { id: job.worker ?? '', incarnation: gone ? '' : view.incarnation }, related);
    if (activity !== null && (finished || activity.kind !== 'flow')) {
      state.activity = activity;
      if (activity.kind === 'steps') state.version = activity.fromStep;
    } else if (!finished) {
      this.effects.push({ type: 'remove', jobs: [job, ...related] });
      this.giveUp();
    }
  }

  /** The activity that a job found in Redis is, if the run as it stands could have it. */
  private adoptable(name: NewJob['name'], job: JobAddress, data: unknown, holder: Holder, related: readonly JobAddress[]): Activity | null {
    const { step: counted, version, checkpoints, lastEvalStep } = this.state;
    switch (name) {
      case 'steps': {
        const { fromStep, stepCount } = parseMessage('steps', data);
        return fromStep <= counted && fromStep + stepCount >= counted ? { kind: 'steps', job, holder, fromStep, stepCount } : null;
      }
      case 'reduce': {
        const { step: at } = parseMessage('reduce', data);
        return at === version + 1 ? { kind: 'flow', step: at, parent: job, children: related, holders: [] } : null;
      }
      case 'checkpoint': {
        const { step: at, directory } = parseMessage('checkpoint', data);
        return at === version && at > (checkpoints.at(-1)?.step ?? 0) ? { kind: 'checkpoint', job, holder, step: at, directory } : null;
      }
      case 'eval': {
        const { replica } = parseMessage('eval', data);
        return replica?.step === version && version > lastEvalStep ? { kind: 'eval', job, holder, step: version } : null;
      }
      case 'shard': case 'digest': return null;
    }
  }

  // --- What is decided ----------------------------------------------------------------------------------------------

  private decide(): void {
    const state = this.state;
    if (!state.ready || state.activity !== null || this.atMs < state.notBeforeMs) return;
    if (state.phase === 'pausing') return this.decidePausing();
    if (state.phase !== 'running') return;
    if (state.ending !== null) return this.decideEnding(state.ending);
    const way = this.wanted();
    this.setWay(way);
    if (!this.standOnGround(way)) return;
    if (way.workers.length === 0) return this.release([]);
    const unclaimed = way.workers.filter((id) => !state.claims.includes(id));
    if (unclaimed.length > 0) {
      state.activity = { kind: 'claim', workers: unclaimed };
      this.effects.push({ type: 'claim', workers: unclaimed });
      return;
    }
    this.release(way.workers);
    const { spec, logSteps } = state.settings;
    const { version } = state;
    const newest = state.checkpoints.at(-1)?.step ?? 0;
    const at = this.holderOf(state.home !== null && way.workers.includes(state.home.id) ? state.home.id : way.workers[0]!);
    const overflow = way.exchange === 'redis' && version - newest >= logSteps;
    if (version > newest && (checkpointDue(spec, version) || overflow)) return this.addCheckpoint(at);
    if (evalDue(spec, version) && version > state.lastEvalStep) return this.addEval(at);
    if (way.exchange === 'redis' && comparisonDue(spec, version) && version > state.lastComparisonStep && version < spec.steps) {
      return this.addDigests(way.workers.map((id) => this.holderOf(id)), false);
    }
    if (version >= spec.steps) return this.addDigests([at], true);
    if (way.exchange === 'local') this.addSteps(at);
    else this.addFlow(way);
  }

  /** `version` can be reached by the way's workers: else a checkpoint at home is begun (false), or the run falls back. */
  private standOnGround(way: Way): boolean {
    const state = this.state;
    if (state.version <= state.sharedVersion) return true;
    if (state.home === null) {
      state.version = state.sharedVersion;
      this.raiseEpoch();
      return true;
    }
    if (way.exchange === 'local' && way.workers[0] === state.home.id) return true;
    this.addCheckpoint(state.home);
    return false;
  }

  /** What was computed is kept if anybody has it; then the run fails. */
  private decideEnding(error: ErrorRecord): void {
    const { home, version, sharedVersion, checkpoints, claims, workers } = this.state;
    const other = version <= sharedVersion ? workers.find((worker) => claims.includes(worker.id)) : undefined;
    const at = home ?? other ?? null;
    if (at !== null && version > (checkpoints.at(-1)?.step ?? 0)) return this.addCheckpoint({ id: at.id, incarnation: at.incarnation });
    this.fail(error);
  }

  private decidePausing(): void {
    const { home, version, checkpoints } = this.state;
    if (home !== null && version > (checkpoints.at(-1)?.step ?? 0)) return this.addCheckpoint(home);
    this.pauseNow();
  }

  /** Nothing is released: the version lies nowhere but in its worker, and `resume` tries the checkpoint again there. */
  private pauseOnFullDisk(): void {
    if (this.state.ending !== null) return this.fail(this.state.ending);
    this.enter('paused');
  }

  private pauseNow(): void {
    this.idle();
    this.enter('paused');
    this.state.home = null;
    this.state.version = Math.min(this.state.version, this.state.sharedVersion);
    this.release([]);
  }

  private wanted(): Way {
    const { settings, workers, excluded, home, way, measurements, share } = this.state;
    return chooseWay({ run: settings.run, spec: settings.spec, workers, excluded, home: home?.id ?? null, current: way, measurements, share });
  }

  private setWay(way: Way): void {
    const before = this.state.way;
    this.state.way = way;
    if (before !== null && before.exchange === way.exchange && before.workers.length === way.workers.length && (way.workers.length > 0 || before.reason === way.reason)) return;
    this.publish({ type: 'way', exchange: way.exchange, workers: way.workers.length, reason: way.reason, atMs: this.atMs });
  }

  private addSteps(holder: Holder): void {
    const { settings, version } = this.state;
    const stepCount = nextBoundary(settings.spec, version, settings.stepsPerJob) - version;
    this.ensureRunning();
    const job = this.job('steps', version, 0, holder.id, { ...this.origin(), fromStep: version, stepCount });
    this.start({ kind: 'steps', job: address(job), holder, fromStep: version, stepCount });
    this.effects.push({ type: 'add', job });
  }

  private addFlow(way: Way): void {
    const { spec } = this.state.settings;
    const at = this.state.version + 1;
    this.ensureRunning();
    const origin = this.origin();
    const place = (index: number): string | null => (way.shared ? null : way.workers[index % way.workers.length]!);
    const parent = this.job('reduce', at, 0, place(0), { ...origin, step: at, shardCount: spec.batch.shards });
    const children = Array.from({ length: spec.batch.shards }, (_, shard) => this.job('shard', at, shard, place(shard), { ...origin, step: at, shard }));
    const holders = way.workers.map((id) => this.holderOf(id));
    this.start({ kind: 'flow', step: at, parent: address(parent), children: children.map(address), holders });
    this.effects.push({ type: 'flow', parent, children });
  }

  private addCheckpoint(holder: Holder): void {
    const { settings, version } = this.state;
    const directory = `${settings.checkpointRoot}/step-${version}`;
    this.ensureRunning();
    const job = this.job('checkpoint', version, 0, holder.id, { ...this.origin(), step: version, directory });
    this.start({ kind: 'checkpoint', job: address(job), holder, step: version, directory });
    this.effects.push({ type: 'add', job });
  }

  private addEval(holder: Holder): void {
    const { settings, version } = this.state;
    this.ensureRunning();
    const { data: { validation }, evaluation: { sequences }, batch: { sequenceLength } } = settings.spec;
    const data = { replica: { ...this.origin(), step: version }, checkpoint: null, data: validation!, sequences, sequenceLength };
    const job = this.job('eval', version, 0, holder.id, data);
    this.start({ kind: 'eval', job: address(job), holder, step: version });
    this.effects.push({ type: 'add', job });
  }

  private addDigests(holders: readonly Holder[], final: boolean): void {
    const { version } = this.state;
    this.ensureRunning();
    const jobs = holders.map((holder, part) => ({ holder, job: this.job('digest', version, part, holder.id, { ...this.origin(), step: version }) }));
    this.start({ kind: 'digest', final, step: version, jobs: jobs.map(({ job, holder }) => ({ ...address(job), holder })), results: [] });
    for (const { job } of jobs) this.effects.push({ type: 'add', job });
  }

  // --- Giving up ----------------------------------------------------------------------------------------------------

  /** The activity at hand is void from here on: no job of this epoch has effect any more. */
  private giveUp(): void {
    const jobs = this.activityJobs();
    this.leaveUnfinished();
    this.idle();
    this.state.command = this.state.phase === 'running' ? 'run' : 'stop';
    this.raiseEpoch();
    if (jobs.length > 0) this.effects.push({ type: 'remove', jobs });
  }

  /** A local job ended without its result: if reports are missing, its worker is ahead of what was counted. */
  private leaveUnfinished(): void {
    if (this.state.early.size > 0) {
      this.state.early = new Map();
      this.state.home = null;
    }
    if (this.state.version > this.state.step) this.state.version = this.state.sharedVersion;
  }

  private replan(error: ErrorRecord): void {
    const { settings } = this.state;
    this.giveUp();
    const replans = ++this.state.replans;
    if (replans > settings.maxReplans) {
      const message = `no step succeeded in ${replans} plans in a row; the last failure: ${error.message}`;
      return this.fail({ ...error, message });
    }
    if (replans > 1) this.state.notBeforeMs = this.atMs + Math.min(settings.backoffMaximumMs, settings.backoffMs * 2 ** Math.min(replans - 2, 20));
    this.decide();
  }

  /** What the exchange holds is not believed any more: from the newest checkpoint on everything is computed again. */
  private distrustLog(): void {
    this.state.losses = 0;
    this.state.home = null;
    this.state.sharedVersion = this.state.checkpoints.at(-1)?.step ?? 0;
    this.state.version = this.state.sharedVersion;
  }

  private fail(error: ErrorRecord): void {
    this.finish('failed', error);
  }

  private finish(phase: 'completed' | 'failed' | 'cancelled', error: ErrorRecord | null): void {
    const jobs = this.activityJobs();
    const { shown, step } = this.state;
    const attempts = endAttempt(shown.attempts, { phase, toStep: step, atMs: this.atMs, error });
    this.state.shown = { ...shown, attempts, error, finishedAtMs: this.atMs };
    if (phase !== 'completed') this.state.epoch++;
    this.control('stop');
    if (jobs.length > 0) this.effects.push({ type: 'remove', jobs });
    this.state.activity = null;
    this.release([]);
    this.enter(phase);
    this.effects.push({ type: 'finish' });
  }

  private badResult(message: string): void {
    this.fail({ code: 'MESSAGE_INVALID', message, context: {} });
  }

  /** Runs `body`; a message that is not of the protocol's form fails the run, naming it. */
  private guarded(what: string, body: () => void): void {
    try {
      body();
    } catch (error) {
      const { code, message } = error as { code?: unknown; message: string };
      if (code !== 'MESSAGE_INVALID') throw error;
      this.badResult(`${what}: ${message}`);
    }
  }

  // --- Small things -------------------------------------------------------------------------------------------------

  /** A replica on `holder` stands at `version`. */
  private reach(version: number, holder: Holder): void {
    if (version < this.state.version) return;
    this.state.version = version;
    // A worker of another run may have taken a job from the shared queue: its replica will not stay.
    this.state.home = this.lives(holder) && this.state.claims.includes(holder.id) ? holder : null;
    this.state.lastNewsMs = this.atMs;
    this.state.silenceRecorded = false;
  }

  /** Appends the report if it is the next one, and those that waited for it; anything else changes nothing. */
  private count(report: StepReport, source: StepSource): void {
    const state = this.state;
    if (report.step <= state.step) return;
    if (report.step > state.step + 1) {
      state.early = new Map(state.early).set(report.step, { report, source });
      return;
    }
    this.append(report, source);
    for (let next = state.early.get(state.step + 1); next !== undefined && !this.over(); next = state.early.get(state.step + 1)) this.append(next.report, next.source);
    if (state.early.size > 0) state.early = new Map([...state.early].filter(([at]) => at > state.step));
  }

  private append(report: StepReport, source: StepSource): void {
    const state = this.state;
    const { shown, settings } = state;
    const elapsedMs = state.way?.exchange === 'redis' && state.lastStepAtMs !== null ? this.atMs - state.lastStepAtMs : report.milliseconds;
    const now = (1000 * tokensPerStep(settings.spec)) / Math.max(elapsedMs, 1e-3);
    const tokensPerSecond = shown.tokensPerSecond === null ? now : shown.tokensPerSecond + SMOOTHING * (now - shown.tokensPerSecond);
    state.step = report.step;
    state.lastStepAtMs = this.atMs;
    state.replans = 0;
    state.losses = 0;
    state.notBeforeMs = 0;
    state.skippedInARow = report.skipped ? state.skippedInARow + 1 : 0;
    state.shown = {
      ...shown,
      lastReport: report,
      tokensPerSecond,
      firstLoss: report.step === 1 ? report.loss : shown.firstLoss,
      skippedSteps: shown.skippedSteps + (report.skipped ? 1 : 0),
    };
    this.effects.push({ type: 'metrics', line: { type: 'step', atMs: this.atMs, epoch: state.epoch, tokensPerSecond, report } });
    this.note({ type: 'step', step: report.step, ...source });
    this.publish({ type: 'step', report, tokensPerSecond, atMs: this.atMs });
    if (state.skippedInARow >= settings.spec.maxNonFiniteSteps) {
      const message = `${state.skippedInARow} steps in a row, up to step ${report.step}, had NaN or infinite gradients; lower the learning rate or look at the data`;
      this.fail({ code: 'NON_FINITE', message, context: { step: report.step } });
    }
  }

  private measureCompute(value: number): void {
    if (!(value > 0)) return;
    const { shardComputeMs } = this.state.measurements;
    this.state.measurements = { ...this.state.measurements, shardComputeMs: shardComputeMs === null ? value : shardComputeMs + SMOOTHING * (value - shardComputeMs) };
  }

  private measureExchange(bytes: number, milliseconds: number): void {
    if (!(bytes > 0 && milliseconds > 0)) return;
    const { exchangeBytesPerMs } = this.state.measurements;
    const value = bytes / milliseconds;
    this.state.measurements = { ...this.state.measurements, exchangeBytesPerMs: exchangeBytesPerMs === null ? value : exchangeBytesPerMs + SMOOTHING * (value - exchangeBytesPerMs) };
  }

  private origin(): { run: string; epoch: number; checkpoint: RunState['checkpoints'][number] | null; spec: RunState['settings']['spec'] } {
    const { settings, epoch, checkpoints, version } = this.state;
    return { run: settings.run, epoch, checkpoint: checkpoints.filter((each) => each.step <= version).at(-1) ?? null, spec: settings.spec };
  }

  private job(name: NewJob['name'], at: number, part: number, worker: string | null, data: object): NewJob {
    const { settings, epoch } = this.state;
    return { queue: name === 'eval' ? 'eval' : 'train', worker, id: jobId(settings.run, epoch, name, at, part), name, data, priority: settings.spec.priority };
  }

  private start(activity: Of<'steps' | 'flow' | 'checkpoint' | 'eval' | 'digest'>): void {
    this.state.activity = activity;
    const { version } = this.state;
    const through = activity.kind === 'steps' ? version + activity.stepCount : activity.step;
    this.note({ type: 'job', kind: activity.kind, from: version, through, workers: this.holders().map(({ id }) => id) });
    this.state.lastNewsMs = this.atMs;
    this.state.silenceRecorded = false;
  }

  private idle(): void {
    this.state.activity = null;
    this.state.lastNewsMs = this.atMs;
  }

  private ensureRunning(): void {
    if (this.state.command !== 'run') this.control('run');
  }

  /** From here on no job of an earlier epoch has effect. Ids of jobs differ too, so what is done again is not taken for done. */
  private raiseEpoch(): void {
    this.state.epoch++;
    this.control(this.state.command);
    this.note({ type: 'epoch' });
  }

  private control(command: RunState['command']): void {
    this.state.command = command;
    this.effects.push({ type: 'control', control: { epoch: this.state.epoch, command } });
  }

  private release(kept: readonly string[]): void {
    const gone = this.state.claims.filter((id) => !kept.includes(id));
    if (gone.length === 0) return;
    this.state.claims = this.state.claims.filter((id) => kept.includes(id));
    this.effects.push({ type: 'release', workers: gone });
  }

  private enter(phase: RunPhase): void {
    this.state.phase = phase;
    this.note({ type: 'phase', phase, weightsDigest: this.state.shown.weightsDigest });
    this.publish({ type: 'phase', phase, atMs: this.atMs });
  }

  /** A line of the history. What it tells of comes before it, so that a crash in between leaves a gap and never a claim. */
  private note(entry: HistoryEntry): void {
    this.effects.push({ type: 'history', event: { atMs: this.atMs, epoch: this.state.epoch, ...entry } });
  }

  private publish(event: RunEvent): void {
    this.effects.push({ type: 'publish', event });
  }

  /** `by`: the worker that had the job, if the error itself names none. */
  private fault(what: string, error: ErrorRecord, by: string | null = null): void {
    const { shown } = this.state;
    const named = error.context['worker'];
    const fault: RunFault = { atMs: this.atMs, what, worker: typeof named === 'string' ? named : by, error };
    const faultCounts = { ...shown.faultCounts, [error.code]: (shown.faultCounts[error.code] ?? 0) + 1 };
    this.state.shown = { ...shown, faultCounts, faults: [...shown.faults, fault].slice(-FAULTS_KEPT) };
    this.note({ type: 'fault', what, code: error.code });
    this.publish({ type: 'fault', ...fault });
  }

  private over(): boolean {
    return TERMINAL_PHASES.includes(this.state.phase);
  }

  private lives(holder: Holder): boolean {
    return this.state.workers.some((worker) => worker.id === holder.id && worker.incarnation === holder.incarnation);
  }

  private holderOf(id: string): Holder {
    return { id, incarnation: this.state.workers.find((worker) => worker.id === id)?.incarnation ?? '' };
  }

  private holders(): readonly Holder[] {
    const { activity } = this.state;
    switch (activity?.kind) {
      case 'steps': case 'checkpoint': case 'eval': return [activity.holder];
      case 'flow': return activity.holders;
      case 'digest': return activity.jobs.map((job) => job.holder);
      case 'claim': case 'findCheckpoints': case undefined: return [];
    }
  }

  private activityJobs(): readonly JobAddress[] {
    const { activity } = this.state;
    switch (activity?.kind) {
      case 'steps': case 'checkpoint': case 'eval': return [activity.job];
      case 'flow': return [activity.parent, ...activity.children];
      case 'digest': return activity.jobs;
      case 'claim': case 'findCheckpoints': case undefined: return [];
    }
  }

  private activityName(): string {
    const { activity } = this.state;
    switch (activity?.kind) {
      case 'steps': return `steps ${activity.fromStep + 1} to ${activity.fromStep + activity.stepCount}`;
      case 'flow': return `step ${activity.step}`;
      case 'checkpoint': return `checkpoint of step ${activity.step}`;
      case 'eval': return `eval of step ${activity.step}`;
      case 'digest': return `digest of step ${activity.step}`;
      case 'claim': return 'the claim of workers';
      case 'findCheckpoints': return 'the search for a good checkpoint';
      case undefined: return 'the run';
    }
  }
}

const alone = (worker: string): StepSource => ({ way: 'local', worker, digest: null, shards: null });
const address = ({ queue, worker, id }: NewJob): JobAddress => ({ queue, worker, id });
