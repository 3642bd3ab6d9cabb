/**
 * The third layer of the run machine: what of the reports counts. PURE. It owns the step that a run has reached, and the rollback that
 * a counted loss brings about; which job a report came from, and whether anybody listens to that job, is run-machine.ts's to know,
 * the only caller.
 *
 * Exactly once: a report is appended when it is that of step + 1, and no other way. One that comes early waits; one that comes again
 * is compared. Of a shard's report only its digest is held against that of whoever computed the same.
 *
 * Rollbacks (loss-spike.ts) depend on the counted reports alone, and are decided as they are counted: who takes the run over and finds
 * a spike that nobody acted upon does what was left undone. The branch that is given up has names of its own for all that it left.
 */
import type { ErrorRecord } from '../config/errors.ts';
import { results } from '../config/messages.ts';
import type { Rollback, StepReport } from '../config/messages.ts';
import { tokensPerStep } from '../config/run-spec.ts';
import { forgive } from './kills.ts';
import { spikeOf, watchLoss } from './loss-spike.ts';
import type { Spike } from './loss-spike.ts';
import { MachineDecisions } from './machine-decisions.ts';
import { SMOOTHING } from './machine-draft.ts';
import { isAbandoned, listed, rolledBack, spikeError } from './rollback.ts';
import { parseJobId } from './run-state.ts';
import type { Holder, StepSource } from './run-state.ts';

/** Steps whose shard digests are remembered, for late reports. */
const DIGESTS_KEPT = 4;

/** A draft that knows what counts. Lives for one call of `step`. */
export class MachineCounting extends MachineDecisions {
  /** Appends the report if it is the next one, and those that waited for it; anything else changes nothing. */
  protected count(report: StepReport, source: StepSource): void {
    const state = this.state;
    if (report.step <= state.step) return void this.effects.push({ type: 'recount', report });
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
    state.saveFailures = 0;
    state.losses = 0;
    state.notBeforeMs = 0;
    state.kills = forgive(state.kills, ['steps', 'shard', 'reduce'], report.step);
    state.skippedInARow = report.skipped ? state.skippedInARow + 1 : 0;
    state.lossWatch = watchLoss(settings.spec, state.lossWatch, report);
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
    if (report.skipped) this.hearNonFinite(report);
    else this.rollBackIfDue();
  }

  /** A replica on `holder` stands at `version`. */
  protected reach(version: number, holder: Holder): void {
    if (version < this.state.version) return;
    this.state.version = version;
    // A worker of another run may have taken a job from the shared queue: its replica will not stay.
    this.state.home = this.lives(holder) && this.state.claims.includes(holder.id) ? holder : null;
    this.state.lastNewsMs = this.atMs;
    this.state.silenceRecorded = false;
  }

  /** Any shard's report, of whatever epoch: it counts for nothing but the comparison of digests and the timings. */
  protected noteShard(id: string, value: unknown): void {
    const parts = parseJobId(id);
    if (parts?.name !== 'shard' || parts.run !== this.state.settings.run) return;
    const current = parts.epoch === this.state.epoch;
    const read = results.shard.safeParse(value);
    if (!read.success) return current ? this.badResult(`result of ${id}: ${read.error.issues[0]!.message}`) : undefined;
    const result = read.data;
    if (current) this.state.lastNewsMs = this.atMs;
    this.measureCompute(result.timings.computeMs);
    this.measureExchange(result.bytes, result.timings.exchangeMs);
    if (isAbandoned(this.state.rollbacks, result.step, result.epoch)) return;
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

  /** What was counted last may complete a spike: the run goes back, or fails if it has done so too often. */
  protected rollBackIfDue(): void {
    const { settings: { spec }, lossWatch, step: at, rollbacks } = this.state;
    const spike = spikeOf(spec, lossWatch);
    if (spike === null) return;
    const error = spikeError(spec, spike, at, rollbacks.length);
    if (rollbacks.length >= spec.lossSpike.maxRollbacks) return this.fail(error);
    this.rollBack(spike, error);
  }

  /** The rollback is written down before anything else is done about it. */
  private rollBack({ loss, threshold, toStep }: Spike, error: ErrorRecord): void {
    const { step: fromStep, epoch, rollbacks, checkpoints, trimmedThrough, saving } = this.state;
    const rollback: Rollback = { atMs: this.atMs, branch: rollbacks.length + 1, fromStep, toStep, epoch: epoch + 1, loss, threshold };
    this.effects.push({ type: 'metrics', line: { type: 'rollback', ...rollback } });
    this.giveUp();
    Object.assign(this.state, rolledBack(this.state, rollback));
    this.note({ type: 'rollback', branch: rollback.branch, fromStep, toStep });
    this.fault('loss spike', error);
    this.publish({ type: 'rollback', ...rollback });
    if (saving !== null && saving.step > toStep) this.state.saving = { ...saving, unwanted: true };
    const abandoned = checkpoints.filter((each) => each.step > toStep).map(({ directory }) => directory);
    if (abandoned.length > 0) this.effects.push({ type: 'deleteCheckpoints', directories: abandoned });
    const from = Math.max(trimmedThrough, toStep);
    if (fromStep > from) this.effects.push({ type: 'trim', from, through: fromStep, ...listed(rollbacks) });
    this.decide();
  }

  /** A skipped step is a fault on record; too many in a row end the run. The tensor's name says the layer. */
  private hearNonFinite({ step: at, nonFinite: tensor }: StepReport): void {
    const { skippedInARow, settings: { spec } } = this.state;
    const where = tensor === null ? '' : `, first in ${tensor}`;
    const context = { step: at, tensor, layer: layerOf(tensor) };
    if (skippedInARow < spec.maxNonFiniteSteps) {
      return this.fault(`step ${at}`, { code: 'NON_FINITE', message: `the gradient has NaN or infinite elements${where}; the step was skipped`, context });
    }
    const message = `${skippedInARow} steps in a row, up to step ${at}, had NaN or infinite gradients${where}; lower the learning rate or look at the data`;
    this.fail({ code: 'NON_FINITE', message, context });
  }
}

/** The layer that a tensor's name names, or null. */
const layerOf = (tensor: string | null): number | null => {
  const layer = /\blayers\.(\d+)\./.exec(tensor ?? '')?.[1];
  return layer === undefined ? null : Number(layer);
};
