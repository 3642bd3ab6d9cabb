/**
 * The second layer of the run machine: what a run does next when nothing is under way, and how it gives up what is under way, fails
 * and ends. PURE. It hears nothing and counts nothing: run-machine.ts and machine-counting.ts, the layers above, call it once they
 * have taken down what happened; plan.ts has the arithmetic that it decides by.
 *
 * `decide`, when nothing is under way (the activity is null), takes the first of these that applies:
 *   1. pausing: a checkpoint if `version` is only at home; else paused.        5. version 0, N, 2N, ...: eval.
 *   2. no fitting worker: wait, and say why.                                   6. several replicas: compare digests.
 *      A worker that is another run's to use (share.ts) fits no more: a local job there is asked to yield.
 *   3. workers not yet claimed: claim them.                                    7. the last version: weights digest, then completed.
 *   4. the way leaves home, or a checkpoint is due: checkpoint at home;        8. local: a `steps` job; several workers: a flow.
 *      home is lost: fall back to the newest version anybody can reach.
 *
 * A checkpoint is the activity until its state is copied; then it moves to `saving`, and the next thing is decided while its files
 * are written. Whatever needs it complete waits for it: another checkpoint, leaving home, a pause, the end, and a log that is full.
 */
import type { ErrorRecord } from '../config/errors.ts';
import { jobsOf } from './activities.ts';
import { endAttempt } from './attempts.ts';
import { oldestTarget } from './loss-spike.ts';
import { MachineDraft } from './machine-draft.ts';
import { checkpointDue, checkpointsToDelete, chooseWay, comparisonDue, evalDue } from './plan.ts';
import type { Way } from './plan.ts';
import { listed } from './rollback.ts';
import type { Holder, RunState } from './run-state.ts';

/** A draft that knows how the run goes on. Lives for one call of `step`. */
export class MachineDecisions extends MachineDraft {
  // --- What is done next ---------------------------------------------------------------------------------------------

  /** The table above. Does nothing while an activity is under way, recovery has not told everything, or a pause after failures lasts. */
  protected decide(): void {
    const state = this.state;
    if (this.over() || !state.ready || state.activity !== null || this.atMs < state.notBeforeMs) return;
    this.tidy();
    if (state.phase === 'pausing') return this.decidePausing();
    if (state.phase !== 'running') return;
    this.catchUp();
    if (this.targetIsBeingWritten()) return;
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
    const { spec } = state.settings;
    const { version } = state;
    const at = this.holderOf(state.home !== null && way.workers.includes(state.home.id) ? state.home.id : way.workers[0]!);
    if (!this.mayGoOn(way, at)) return;
    if (evalDue(spec, version) && version > state.lastEvalStep) return this.addEval(at);
    if (way.exchange === 'redis' && comparisonDue(spec, version) && version > state.lastComparisonStep && version < spec.steps) {
      return this.addDigests(way.workers.map((id) => this.holderOf(id)), false);
    }
    if (version >= spec.steps) return state.saving === null ? this.addDigests([at], true) : undefined;
    if (way.exchange === 'local') this.addSteps(at);
    else this.addFlow(way);
  }

  /** A checkpoint that was written while the run had fallen back saves computing the steps up to it again. */
  private catchUp(): void {
    const state = this.state;
    const newest = state.checkpoints.at(-1)?.step ?? 0;
    if (newest <= state.version) return;
    state.version = newest;
    state.home = null;
  }

  /** The version that the run was rolled back to is sooner on the disk than it is computed again. */
  private targetIsBeingWritten(): boolean {
    const { saving, version, rollbacks } = this.state;
    return saving !== null && !saving.unwanted && saving.step > version && saving.step === rollbacks.at(-1)?.toStep;
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
    if (state.saving === null) this.addCheckpoint(state.home);
    return false;
  }

  /** Whether nothing is to be checkpointed before the next thing: else a checkpoint is begun, or the one being written is waited for. */
  private mayGoOn(way: Way, at: Holder): boolean {
    const { settings: { spec, logSteps }, version, saving, diskFull, checkpoints } = this.state;
    const newest = checkpoints.at(-1)?.step ?? 0;
    if (version <= newest) {
      this.state.diskFull = false;
      return true;
    }
    const written = saving !== null && saving.step === version && !saving.unwanted;
    const logged = way.exchange === 'redis' ? version - newest : 0;
    // Begun when some room is left, so that the steps go on in it while the files are written.
    const overflow = logged >= logSteps - Math.floor(logSteps / 4) && (saving === null || logged >= logSteps);
    if (written) return logged < logSteps;
    if (!checkpointDue(spec, version) && !overflow && !diskFull) return true;
    if (saving === null) this.addCheckpoint(at);
    return false;
  }

  /** What was computed is kept if anybody has it; then the run fails. */
  private decideEnding(error: ErrorRecord): void {
    const { version, sharedVersion, checkpoints, claims, workers, saving } = this.state;
    if (saving !== null) return;
    const other = version <= sharedVersion ? workers.find((worker) => claims.includes(worker.id)) : undefined;
    const at = this.ownHome() ?? other ?? null;
    if (at !== null && version > (checkpoints.at(-1)?.step ?? 0)) return this.addCheckpoint({ id: at.id, incarnation: at.incarnation });
    this.fail(error);
  }

  private decidePausing(): void {
    const { version, checkpoints, saving, diskFull } = this.state;
    const home = this.ownHome();
    if (saving !== null) return;
    // Nothing is released: the version lies nowhere but in its worker, and `resume` tries a checkpoint again there.
    if (diskFull) return this.enter('paused');
    if (home !== null && version > (checkpoints.at(-1)?.step ?? 0)) return this.addCheckpoint(home);
    this.pauseNow();
  }

  private pauseNow(): void {
    this.idle();
    this.enter('paused');
    this.state.home = null;
    this.state.version = Math.min(this.state.version, this.state.sharedVersion);
    this.release([]);
  }

  /** At the step boundary: the step at hand is finished first. */
  protected pauseOnFullDisk(): void {
    if (this.state.ending !== null) return this.fail(this.state.ending);
    this.state.diskFull = true;
    if (this.state.phase === 'running') this.enter('pausing');
    if (this.state.activity?.kind === 'steps') this.control('yield');
  }

  /** Home, unless it was released: then others can reach its version too. */
  private ownHome(): Holder | null {
    const { home, claims } = this.state;
    return home !== null && claims.includes(home.id) ? home : null;
  }

  protected wanted(): Way {
    const { settings, workers, excluded, home, way, measurements, share } = this.state;
    return chooseWay({ run: settings.run, spec: settings.spec, workers, excluded, home: home?.id ?? null, current: way, measurements, share });
  }

  private setWay(way: Way): void {
    const before = this.state.way;
    this.state.way = way;
    if (before !== null && before.exchange === way.exchange && before.workers.length === way.workers.length && (way.workers.length > 0 || before.reason === way.reason)) return;
    this.publish({ type: 'way', exchange: way.exchange, workers: way.workers.length, reason: way.reason, atMs: this.atMs });
  }

  /** Between two activities, when no job rests on them: deletes old checkpoints, and the reduced gradients that the newest covers. */
  private tidy(): void {
    const state = this.state;
    const { spec } = state.settings;
    const old = checkpointsToDelete(spec, state.checkpoints, oldestTarget(spec, state.lossWatch, state.step));
    if (old.length > 0) {
      state.checkpoints = state.checkpoints.filter((each) => !old.includes(each));
      this.effects.push({ type: 'deleteCheckpoints', directories: old.map(({ directory }) => directory) });
    }
    const newest = state.checkpoints.at(-1)?.step ?? 0;
    if (newest <= state.trimmedThrough) return;
    this.effects.push({ type: 'trim', from: state.trimmedThrough, through: newest, ...listed(state.rollbacks) });
    state.trimmedThrough = newest;
  }

  // --- Giving up, and the end ----------------------------------------------------------------------------------------

  /** The activity at hand is void from here on: no job of this epoch has effect any more. */
  protected giveUp(): void {
    const jobs = jobsOf(this.state.activity);
    this.leaveUnfinished();
    this.idle();
    this.state.command = this.state.phase === 'running' ? 'run' : 'stop';
    this.raiseEpoch();
    if (jobs.length > 0) this.effects.push({ type: 'remove', jobs });
  }

  /** A local job ended without its result: if reports are missing, its worker is ahead of what was counted. */
  protected leaveUnfinished(): void {
    if (this.state.early.size > 0) {
      this.state.early = new Map();
      this.state.home = null;
    }
    if (this.state.version > this.state.step) this.state.version = this.state.sharedVersion;
  }

  protected replan(error: ErrorRecord): void {
    const { settings } = this.state;
    this.giveUp();
    const replans = ++this.state.replans;
    if (replans > settings.maxReplans) {
      const message = `no step succeeded in ${replans} plans in a row; the last failure: ${error.message}`;
      return this.fail({ ...error, message });
    }
    if (replans > 1) this.state.notBeforeMs = this.atMs + backoff(settings, replans);
    this.decide();
  }

  /** What the exchange holds is not believed any more: from the newest checkpoint on everything is computed again. */
  protected distrustLog(): void {
    this.state.losses = 0;
    this.state.home = null;
    this.state.sharedVersion = this.state.checkpoints.at(-1)?.step ?? 0;
    this.state.version = this.state.sharedVersion;
  }

  protected fail(error: ErrorRecord): void {
    this.finish('failed', error);
  }

  protected badResult(message: string): void {
    this.fail({ code: 'MESSAGE_INVALID', message, context: {} });
  }

  protected finish(phase: 'completed' | 'failed' | 'cancelled', error: ErrorRecord | null): void {
    const jobs = [...jobsOf(this.state.activity), ...(this.state.saving === null ? [] : [this.state.saving.job])];
    const { shown, step } = this.state;
    const attempts = endAttempt(shown.attempts, { phase, toStep: step, atMs: this.atMs, error });
    this.state.shown = { ...shown, attempts, error, finishedAtMs: this.atMs };
    if (phase !== 'completed') this.state.epoch++;
    this.control('stop');
    if (jobs.length > 0) this.effects.push({ type: 'remove', jobs });
    this.state.activity = null;
    this.state.saving = null;
    this.release([]);
    this.enter(phase);
    this.effects.push({ type: 'finish' });
  }
}

/** Pause before the next attempt, after `failures` (2 or more) in a row. */
export const backoff = ({ backoffMs, backoffMaximumMs }: RunState['settings'], failures: number): number => Math.min(backoffMaximumMs, backoffMs * 2 ** Math.min(failures - 2, 20));
