/**
 * The run machine: from what is known and what is heard to what is known and what is to be done. PURE: no IO, no clock,
 * no random source; time comes in through events. It decides everything about one run; driver.ts does what it asks and
 * test/sim holds it to its promises. The words are in run-state.ts. Its layers, each of which calls only those below it:
 *
 *   run-machine.ts         what each event means: workers, results, failures, wishes, a run that is taken up
 *   machine-counting.ts    what counts: each step once, in order; and when the loss rose too far, the way back
 *   machine-decisions.ts   what is done next when nothing is under way; giving up, failing, the end
 *   machine-draft.ts       the small verbs that change the state
 *
 *   phase      event                       next       what is done
 *   queued     ready                       running    decide
 *   running    pause                       pausing    Control `stop`; a flow is given up (epoch + 1), other jobs end by themselves
 *   running    last digest reported        completed  finish
 *   running    never-failure, too many     failed     epoch + 1, Control `stop`, finish
 *   any        the loss rose too far       the same   epoch + 1, back to an earlier version, `step` with it; a new branch begins there
 *   running    maxDurationSeconds are over failed     at the step boundary, after a checkpoint; finish
 *   running    checkpoint meets DISK_FULL  pausing    then paused at the step boundary: the worker stays claimed, its replica is kept
 *   pausing    nothing under way           paused     after a checkpoint, if the version is nowhere else; release the workers
 *   pausing    resume                      running    Control `run` before the next job
 *   paused     resume                      running    epoch + 1, decide
 *   any of them  cancel                    cancelled  epoch + 1, Control `stop`, finish
 *
 * The fence: jobs carry the epoch in id and payload; only those of the activity at hand are listened to, and giving up on an
 * activity raises the epoch.
 */
import { branchOf } from '../config/branches.ts';
import type { ErrorRecord } from '../config/errors.ts';
import { ERROR_KINDS } from '../config/errors.ts';
import { parseMessage, parseResult, results, TERMINAL_PHASES } from '../config/messages.ts';
import type { Result } from '../config/messages.ts';
import { adoptable, holdersOf, jobsOf, nameOf } from './activities.ts';
import type { Of } from './activities.ts';
import { beginAttempt, spend, timeLimit } from './attempts.ts';
import { fatalJob, forgive, killOf, tooMany } from './kills.ts';
import { MachineCounting } from './machine-counting.ts';
import { backoff } from './machine-decisions.ts';
import type { WorkerView } from './plan.ts';
import { rollbacksIn, standsAtVersion } from './rollback.ts';
import { parseJobId } from './run-state.ts';
import type { Activity, Effect, Holder, JobAddress, MachineEvent, RunState, Saving, StepSource } from './run-state.ts';

/** Incarnations of workers remembered for having told of a death. */
const TOLD_KEPT = 256;

/** Applies one event. Neither argument is changed. */
export function step(state: RunState, event: MachineEvent): { readonly state: RunState; readonly effects: readonly Effect[] } {
  if (TERMINAL_PHASES.includes(state.phase)) return { state, effects: [] };
  const machine = new Machine({ ...state }, event.atMs);
  machine.passTime();
  machine.hear(event);
  return { state: machine.state, effects: machine.effects };
}

/** One application of an event: a draft of the next state, and the effects so far. Lives for one call of `step`. */
class Machine extends MachineCounting {
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

  // --- Time, and the user's wishes -----------------------------------------------------------------------------------

  /** Time between two events belongs to the phase that the first left behind; time without an orchestrator to none. */
  passTime(): void {
    const { state, atMs } = this;
    const spentMs = state.clockMs === null ? 0 : Math.max(0, atMs - state.clockMs);
    state.clockMs = atMs;
    if (state.phase !== 'running' || spentMs === 0) return;
    state.shown = { ...state.shown, ...spend(state.shown, spentMs) };
    this.limitTime(state.shown.attempts.at(-1)?.runningMs ?? 0);
  }

  /** The attempt has used up its time: it ends at the next step boundary, unless all that is left is to finish. */
  private limitTime(runningMs: number): void {
    const { state } = this;
    if (state.ending !== null || !state.ready || state.version >= state.settings.spec.steps) return;
    state.ending = timeLimit(state.settings.spec, runningMs);
    if (state.ending !== null && state.activity?.kind === 'steps' && state.command === 'run') this.control('yield');
  }

  private tick(): void {
    const state = this.state;
    if (!state.ready) return;
    const silentMs = this.atMs - state.lastNewsMs;
    const jobs = jobsOf(this.state.activity);
    if (jobs.length > 0 && silentMs >= state.settings.lookupMs) this.effects.push({ type: 'lookup', jobs });
    if (state.saving !== null && this.atMs - state.saving.checkedAtMs >= state.settings.lookupMs) {
      state.saving = { ...state.saving, checkedAtMs: this.atMs };
      this.effects.push({ type: 'lookup', jobs: [state.saving.job] });
    }
    if (state.phase === 'running' && silentMs >= state.settings.jobTimeoutMs && !state.silenceRecorded) {
      state.silenceRecorded = true;
      const seconds = Math.round(silentMs / 1000);
      const waiting = state.activity === null && state.way?.workers.length === 0;
      this.fault(waiting ? 'no worker' : nameOf(this.state), waiting
        ? { code: 'NO_WORKER', message: `${state.way!.reason}, for ${seconds} s; the run goes on when one comes`, context: {} }
        : { code: 'TIMEOUT', message: `nothing was heard of ${nameOf(this.state)} for ${seconds} s; the run waits on`, context: {} });
    }
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

  // --- Taking a run up -----------------------------------------------------------------------------------------------

  /**
   * A job of the current epoch from before this orchestrator: it becomes the activity, as if it had just been added. What has
   * not ended and cannot be taken up is given up: a flow, since nobody knows which of its workers still live (what it published
   * is found again), a comparison of digests, and what does not fit the version.
   */
  private adopt({ job, data, processedAtMs, finished, progress, related }: Extract<MachineEvent, { type: 'adopt' }>): void {
    const { state } = this;
    const parts = parseJobId(job.id);
    this.rollBackIfDue();
    if (this.over() || parts === null || parts.run !== state.settings.run || parts.name === 'shard') return;
    // A worker that started after the job was taken is not the one that took it.
    const view = state.workers.find((worker) => worker.id === job.worker);
    const gone = view === undefined || (processedAtMs !== null && view.startedAtMs > processedAtMs);
    const holder = { id: job.worker ?? '', incarnation: gone ? '' : view.incarnation };
    if (parts.name === 'checkpoint') state.saves = Math.max(state.saves, parts.part + 1);
    if (parts.name === 'checkpoint' && !finished && results.checkpointProgress.safeParse(progress).success) return this.adoptSaving(job, data, holder);
    if (parts.epoch !== state.epoch) return;
    const ofBranch = rollbacksIn(data) === state.rollbacks.length;
    const activity = ofBranch ? adoptable(state, parts.name, job, data, holder, related) : null;
    if (activity !== null && (finished || activity.kind !== 'flow')) {
      state.activity = activity;
      if (activity.kind === 'steps') state.version = activity.fromStep;
    } else if (!finished || !ofBranch) {
      this.effects.push({ type: 'remove', jobs: [job, ...related] });
      this.giveUp();
    }
  }

  /** A checkpoint that was copied goes on whatever its epoch. One that the run knows as complete, or not as its own, is left to end. */
  private adoptSaving(job: JobAddress, data: unknown, holder: Holder): void {
    const { step: at, directory, rollbacks } = parseMessage('checkpoint', data);
    const { saving, checkpoints, step: counted } = this.state;
    if (at > counted || branchOf(rollbacks, at) !== this.branchAt(at) || at <= Math.max(checkpoints.at(-1)?.step ?? 0, saving?.step ?? 0)) return;
    this.state.saving = { job, holder, step: at, directory, unwanted: false, checkedAtMs: this.atMs };
  }

  private begin(): void {
    const state = this.state;
    state.ready = true;
    state.lastNewsMs = this.atMs;
    if (state.activity === null && state.home === null) {
      const { run } = state.settings;
      const holder = state.workers.find((worker) => worker.heldBy === run && standsAtVersion(state, worker));
      if (holder !== undefined) state.home = { id: holder.id, incarnation: holder.incarnation };
    }
    const fromStep = state.activity === null && state.home === null ? Math.min(state.version, state.sharedVersion) : state.version;
    state.shown = { ...state.shown, attempts: beginAttempt(state.shown.attempts, { fromStep, atMs: this.atMs }) };
    if (state.phase === 'queued') {
      state.shown = { ...state.shown, startedAtMs: state.shown.startedAtMs ?? this.atMs };
      this.enter('running');
    }
    // Deaths of long ago were counted by whoever drove the run then.
    const old = state.workers.filter((worker) => killOf(worker, state.settings.run, state.step)?.epoch !== state.epoch);
    this.told(old.map(({ incarnation }) => incarnation));
    this.rollBackIfDue();
    if (!this.over()) this.hearWorkers(state.workers);
  }

  /** Control, claims and jobs may be older than we know. A new epoch makes whatever came back of them void. */
  private hearRestarted(): void {
    const state = this.state;
    if (!state.ready) return;
    const message = 'Redis was started anew and may have lost its last writes; what was under way is planned again';
    this.fault('Redis', { code: 'REDIS_LOST', message, context: {} });
    state.claims = state.workers.filter((worker) => worker.heldBy === state.settings.run).map((worker) => worker.id);
    // A worker that nobody knows to be ours may be another run's by now.
    if (state.home !== null && !state.claims.includes(state.home.id)) state.home = null;
    // Its job may have come back as one that nobody does.
    if (state.saving !== null) this.effects.push({ type: 'remove', jobs: [state.saving.job] });
    state.saving = null;
    this.giveUp();
    this.decide();
  }

  // --- Workers come, die, and are told apart -------------------------------------------------------------------------

  private hearWorkers(workers: readonly WorkerView[]): void {
    const state = this.state;
    state.workers = workers;
    if (!state.ready) {
      state.claims = workers.filter((worker) => worker.heldBy === state.settings.run).map((worker) => worker.id);
      return;
    }
    this.hearKills();
    if (this.over()) return;
    if (state.home !== null && !this.lives(state.home)) state.home = null;
    if (state.activity?.kind === 'flow' && state.activity.parent.worker === null) state.activity = this.withJoiners(state.activity);
    if (state.saving !== null && !this.lives(state.saving.holder)) this.savingFailed(state.saving, this.lost(state.saving.holder));
    if (this.over()) return;
    const dead = holdersOf(this.state.activity).find((holder) => !this.lives(holder));
    if (dead !== undefined) {
      const error = this.lost(dead);
      this.fault(nameOf(this.state), error);
      return this.replan(error);
    }
    if (state.activity?.kind === 'steps' && state.command === 'run' && state.phase === 'running') this.yieldIfBetter(state.activity);
    this.decide();
  }

  /** Counts the deaths that workers tell of by the work that was in hand; work that killed too often fails the run. */
  private hearKills(): void {
    const { state } = this;
    const { run, maxKills } = state.settings;
    for (const worker of state.workers) {
      if (state.toldBy.includes(worker.incarnation)) continue;
      const kill = killOf(worker, run, state.step);
      if (kill === null) continue;
      this.told([worker.incarnation]);
      state.kills = [...state.kills, kill];
      const fatal = tooMany(state.kills, kill, maxKills);
      if (fatal !== null) return this.fail(fatalJob(fatal));
    }
  }

  private told(incarnations: readonly string[]): void {
    this.state.toldBy = [...this.state.toldBy, ...incarnations].slice(-TOLD_KEPT);
  }

  /** A worker's end as an error, with its successor's evidence if there is any. */
  private lost({ id }: Holder): ErrorRecord {
    const exit = this.state.workers.find((worker) => worker.id === id)?.lastExit ?? null;
    const how = exit === null ? '' : `, ${exit.signal === null ? `with exit code ${exit.code}` : `by ${exit.signal}`}`;
    const context = { worker: id, ...(exit === null ? {} : { signal: exit.signal, exitCode: exit.code }) };
    return { code: 'WORKER_LOST', message: `worker ${id} ended while it held a job of this run${how}`, context };
  }

  /** Whoever lives may take jobs from the shared queue, so all of them are watched. */
  private withJoiners(activity: Of<'flow'>): Activity {
    const joiners = this.state.workers.filter((worker) => !activity.holders.some((holder) => holder.id === worker.id));
    if (joiners.length === 0) return activity;
    return { ...activity, holders: [...activity.holders, ...joiners.map(({ id, incarnation }) => ({ id, incarnation }))] };
  }

  /** A local job is under way: asks it to end at the next step boundary if the way has changed, or its worker is another run's to use. */
  private yieldIfBetter(activity: Of<'steps'>): void {
    const [way, { share }] = [this.wanted(), this.state];
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

  // --- Results of jobs -----------------------------------------------------------------------------------------------

  private hearProgress(id: string, data: unknown): void {
    const { activity } = this.state;
    if (activity?.kind === 'checkpoint' && activity.job.id === id) return this.guarded(`progress of ${id}`, () => this.checkpointCopied(activity, data));
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
    const { activity, saving } = this.state;
    this.noteShard(id, value);
    if (this.over()) return;
    if (saving?.job.id === id) return this.saved(saving, parseResult('checkpoint', value));
    switch (activity?.kind) {
      case 'steps': return activity.job.id === id ? this.stepsCompleted(activity, parseResult('steps', value)) : undefined;
      case 'flow': return activity.parent.id === id ? this.flowCompleted(activity, parseResult('reduce', value)) : undefined;
      case 'checkpoint': return activity.job.id === id ? this.checkpointCompleted(activity, parseResult('checkpoint', value)) : undefined;
      case 'eval': return activity.job.id === id ? this.evalCompleted(activity, parseResult('eval', value)) : undefined;
      case 'digest': return activity.jobs.some((job) => job.id === id) ? this.digestCompleted(activity, id, parseResult('digest', value)) : undefined;
      case 'claim': case 'findCheckpoints': case undefined: return;
    }
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

  private stepsCompleted(activity: Of<'steps'>, result: Result<'steps'>): void {
    const { settings } = this.state;
    for (const report of result.reports) {
      this.count(report, alone(result.worker));
      if (this.state.activity !== activity) return;
    }
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

  private flowCompleted(activity: Of<'flow'>, result: Result<'reduce'>): void {
    if (result.report.step !== activity.step) return this.badResult(`${activity.parent.id} tells of step ${result.report.step}`);
    this.measureExchange(result.bytes * (activity.children.length + 1), result.timings.exchangeMs);
    const holder = this.holderOf(result.worker);
    if (this.state.sharedVersion === activity.step - 1) this.state.sharedVersion = activity.step;
    this.reach(activity.step, holder);
    this.count(result.report, { way: 'flow', worker: result.worker, digest: result.digest, shards: result.shards });
    if (this.state.activity !== activity) return;
    this.idle();
    this.decide();
  }

  private evalCompleted(activity: Of<'eval'>, result: Result<'eval'>): void {
    const { shown } = this.state;
    this.idle();
    this.state.replans = 0;
    this.state.lastEvalStep = activity.step;
    this.state.kills = forgive(this.state.kills, ['eval'], activity.step);
    this.state.shown = {
      ...shown,
      validation: result.loss === null ? shown.validation : { step: activity.step, loss: result.loss },
      validationBefore: activity.step === 0 ? result.loss : shown.validationBefore,
    };
    const branch = this.branchAt(activity.step);
    this.effects.push({ type: 'metrics', line: { type: 'eval', atMs: this.atMs, step: activity.step, loss: result.loss, ...(branch === 0 ? {} : { branch }) } });
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
    this.state.kills = forgive(this.state.kills, ['digest'], activity.step);
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
        if (state.saving?.holder.id === holder.id) state.saving = { ...state.saving, unwanted: true };
      }
    }
    if (most !== null) return this.decide();
    if (state.saving !== null) state.saving = { ...state.saving, unwanted: true };
    this.distrustLog();
    this.replan({ code: 'REPLICA_DIVERGED', message: 'replicas differ and no majority says which is right', context: {} });
  }

  // --- Checkpoints ---------------------------------------------------------------------------------------------------

  private checkpointCopied(activity: Of<'checkpoint'>, data: unknown): void {
    const { step: at } = parseResult('checkpointProgress', data);
    if (at !== activity.step) return this.badResult(`${activity.job.id} tells of step ${at}`);
    const { job, holder, step: version, directory } = activity;
    this.idle();
    this.state.saving = { job, holder, step: version, directory, unwanted: false, checkedAtMs: this.atMs };
    this.decide();
  }

  private checkpointCompleted(activity: Of<'checkpoint'>, result: Result<'checkpoint'>): void {
    if (result.step !== activity.step) return this.badResult(`${activity.job.id} tells of step ${result.step}`);
    this.idle();
    this.complete(activity, result.worker);
  }

  private saved(saving: Saving, result: Result<'checkpoint'>): void {
    if (result.step !== saving.step) return this.badResult(`${saving.job.id} tells of step ${result.step}`);
    this.state.saving = null;
    if (this.state.activity === null) this.state.lastNewsMs = this.atMs;
    if (!saving.unwanted) return this.complete(saving, result.worker);
    this.effects.push({ type: 'deleteCheckpoints', directories: [saving.directory] });
    this.decide();
  }

  /** A checkpoint is complete on the disk: from here on the run may rest on it. */
  private complete({ step: at, directory }: RunState['checkpoints'][number], worker: string): void {
    const state = this.state;
    state.replans = 0;
    state.saveFailures = 0;
    state.kills = forgive(state.kills, ['checkpoint'], at);
    state.checkpoints = [...state.checkpoints.filter((each) => each.step !== at), { directory, step: at }].sort((a, b) => a.step - b.step);
    state.sharedVersion = Math.max(state.sharedVersion, at);
    this.note({ type: 'checkpoint', step: at, worker });
    this.publish({ type: 'checkpoint', step: at, directory, atMs: this.atMs });
    this.decide();
  }

  /**
   * A checkpoint was not written to its end. What else is under way is not disturbed; the version is kept by the checkpoint of the
   * next boundary, or at once if the run still stands where this one was due.
   */
  private savingFailed(saving: Saving, error: ErrorRecord): void {
    const { settings } = this.state;
    this.state.saving = null;
    this.fault(`checkpoint of step ${saving.step} (${saving.job.id})`, error);
    this.effects.push({ type: 'remove', jobs: [saving.job] });
    if (isFatal(error)) return this.fail(error);
    if (error.code === 'DISK_FULL') return this.pauseOnFullDisk();
    const failures = ++this.state.saveFailures;
    if (failures > settings.maxReplans) return this.fail({ ...error, message: `${failures} checkpoints in a row failed; the last failure: ${error.message}` });
    if (failures > 1) this.state.saveNotBeforeMs = this.atMs + backoff(settings, failures);
  }

  // --- Failures of jobs ----------------------------------------------------------------------------------------------

  private hearFailed(id: string, error: ErrorRecord): void {
    const { activity, phase, saving } = this.state;
    if (saving?.job.id === id) {
      this.savingFailed(saving, error);
      return this.over() ? undefined : this.decide();
    }
    if (!jobsOf(this.state.activity).some((job) => job.id === id)) return;
    if (phase === 'pausing' && error.code === 'CANCELLED') {
      this.leaveUnfinished();
      this.idle();
      this.raiseEpoch();
      return this.decide();
    }
    this.fault(`${nameOf(this.state)} (${id})`, error, jobsOf(this.state.activity).find((job) => job.id === id)!.worker);
    if (this.blamesOwnCheckpoint(error)) {
      this.giveUp();
      this.state.home = null;
      this.state.activity = { kind: 'findCheckpoints' };
      this.effects.push({ type: 'findCheckpoints' });
      return;
    }
    if (error.code === 'DISK_FULL' && activity?.kind === 'checkpoint') {
      this.giveUp();
      this.pauseOnFullDisk();
      return this.decide();
    }
    if (isFatal(error)) return this.fail(error);
    // What a local job lacks to begin, nobody has any more.
    if (error.code === 'GRADIENT_LOST' && (activity?.kind === 'steps' || ++this.state.losses > 1)) this.distrustLog();
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
    const { saving } = this.state;
    const error: ErrorRecord = { code: 'TIMEOUT', message: `${id} is no longer in Redis; it is planned anew`, context: {} };
    if (saving?.job.id === id) {
      this.savingFailed(saving, error);
      return this.over() ? undefined : this.decide();
    }
    if (!jobsOf(this.state.activity).some((job) => job.id === id)) return;
    this.fault(nameOf(this.state), error);
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
}

const alone = (worker: string): StepSource => ({ way: 'local', worker, digest: null, shards: null });
/** Whether no attempt cures it. */
const isFatal = ({ code }: ErrorRecord): boolean => code === 'BUG' || (ERROR_KINDS[code].recovery === 'never' && code !== 'CANCELLED');
