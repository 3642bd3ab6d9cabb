/**
 * The lowest layer of the run machine: a draft of the next state, and the small verbs by which the layers above it (run-machine.ts
 * lists them) change it: each keeps what must hold together (an epoch and its control, a job and its activity, a fault and its
 * count, a phase and its event) and decides nothing. PURE.
 */
import { branchOf, checkpointName } from '../config/branches.ts';
import type { ErrorRecord } from '../config/errors.ts';
import { TERMINAL_PHASES } from '../config/messages.ts';
import type { Origin, RunEvent, RunFault, RunPhase } from '../config/messages.ts';
import { holdersOf } from './activities.ts';
import type { Of } from './activities.ts';
import { nextBoundary } from './plan.ts';
import type { Way } from './plan.ts';
import { originRollbacks } from './rollback.ts';
import { jobId, newestFaults } from './run-state.ts';
import type { Effect, HistoryEntry, Holder, JobAddress, NewJob, RunState } from './run-state.ts';

type Draft = { -readonly [Key in keyof RunState]: RunState[Key] };

/** Weight of the newest in a smoothed measurement. */
export const SMOOTHING = 0.3;

/** One application of an event: a draft of the next state, and the effects so far. Lives for one call of `step`. */
export class MachineDraft {
  readonly state: Draft;
  readonly effects: Effect[] = [];
  readonly atMs: number;

  constructor(state: Draft, atMs: number) {
    this.state = state;
    this.atMs = atMs;
  }

  protected measureCompute(value: number): void {
    if (!(value > 0)) return;
    const { shardComputeMs } = this.state.measurements;
    this.state.measurements = { ...this.state.measurements, shardComputeMs: shardComputeMs === null ? value : shardComputeMs + SMOOTHING * (value - shardComputeMs) };
  }

  protected measureExchange(bytes: number, milliseconds: number): void {
    if (!(bytes > 0 && milliseconds > 0)) return;
    const { exchangeBytesPerMs } = this.state.measurements;
    const value = bytes / milliseconds;
    this.state.measurements = { ...this.state.measurements, exchangeBytesPerMs: exchangeBytesPerMs === null ? value : exchangeBytesPerMs + SMOOTHING * (value - exchangeBytesPerMs) };
  }

  protected origin(): Omit<Origin, 'spec'> & { spec: RunState['settings']['spec'] } {
    const { settings, epoch, checkpoints, version, rollbacks } = this.state;
    return { run: settings.run, epoch, checkpoint: checkpoints.filter((each) => each.step <= version).at(-1) ?? null, ...originRollbacks(rollbacks), spec: settings.spec };
  }

  protected job(name: NewJob['name'], at: number, part: number, worker: string | null, data: object): NewJob {
    const { settings, epoch } = this.state;
    return { queue: name === 'eval' ? 'eval' : 'train', worker, id: jobId(settings.run, epoch, name, at, part), name, data, priority: settings.spec.priority };
  }

  protected start(activity: Of<'steps' | 'flow' | 'checkpoint' | 'eval' | 'digest'>): void {
    this.state.activity = activity;
    const { version } = this.state;
    const through = activity.kind === 'steps' ? version + activity.stepCount : activity.step;
    this.note({ type: 'job', kind: activity.kind, from: version, through, workers: holdersOf(this.state.activity).map(({ id }) => id) });
    this.state.lastNewsMs = this.atMs;
    this.state.silenceRecorded = false;
  }

  protected addSteps(holder: Holder): void {
    const { settings, version } = this.state;
    const stepCount = nextBoundary(settings.spec, version, settings.stepsPerJob) - version;
    this.ensureRunning();
    const job = this.job('steps', version, 0, holder.id, { ...this.origin(), fromStep: version, stepCount });
    this.start({ kind: 'steps', job: address(job), holder, fromStep: version, stepCount });
    this.effects.push({ type: 'add', job });
  }

  protected addFlow(way: Way): void {
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

  protected addCheckpoint(holder: Holder): void {
    const { settings, version } = this.state;
    if (this.atMs < this.state.saveNotBeforeMs) return;
    this.state.diskFull = false;
    const directory = `${settings.checkpointRoot}/${checkpointName(version, this.branchAt(version))}`;
    this.ensureRunning();
    const job = this.job('checkpoint', version, this.state.saves++, holder.id, { ...this.origin(), step: version, directory });
    this.start({ kind: 'checkpoint', job: address(job), holder, step: version, directory });
    this.effects.push({ type: 'add', job });
  }

  protected addEval(holder: Holder): void {
    const { settings, version } = this.state;
    this.ensureRunning();
    const { data: { validation }, evaluation: { sequences }, batch: { sequenceLength } } = settings.spec;
    const data = { replica: { ...this.origin(), step: version }, checkpoint: null, data: validation!, sequences, sequenceLength };
    const job = this.job('eval', version, 0, holder.id, data);
    this.start({ kind: 'eval', job: address(job), holder, step: version });
    this.effects.push({ type: 'add', job });
  }

  protected addDigests(holders: readonly Holder[], final: boolean): void {
    const { version } = this.state;
    this.ensureRunning();
    const jobs = holders.map((holder, part) => ({ holder, job: this.job('digest', version, part, holder.id, { ...this.origin(), step: version }) }));
    this.start({ kind: 'digest', final, step: version, jobs: jobs.map(({ job, holder }) => ({ ...address(job), holder })), results: [] });
    for (const { job } of jobs) this.effects.push({ type: 'add', job });
  }

  protected idle(): void {
    this.state.activity = null;
    this.state.lastNewsMs = this.atMs;
  }

  protected ensureRunning(): void {
    if (this.state.command !== 'run') this.control('run');
  }

  /** From here on no job of an earlier epoch has effect. Ids of jobs differ too, so what is done again is not taken for done. */
  protected raiseEpoch(): void {
    this.state.epoch++;
    this.control(this.state.command);
    this.note({ type: 'epoch' });
  }

  protected control(command: RunState['command']): void {
    this.state.command = command;
    this.effects.push({ type: 'control', control: { epoch: this.state.epoch, command } });
  }

  protected release(kept: readonly string[]): void {
    const gone = this.state.claims.filter((id) => !kept.includes(id));
    if (gone.length === 0) return;
    this.state.claims = this.state.claims.filter((id) => kept.includes(id));
    this.effects.push({ type: 'release', workers: gone });
  }

  protected enter(phase: RunPhase): void {
    this.state.phase = phase;
    this.note({ type: 'phase', phase, weightsDigest: this.state.shown.weightsDigest });
    this.publish({ type: 'phase', phase, atMs: this.atMs });
  }

  /** A line of the history. What it tells of comes before it, so that a crash in between leaves a gap and never a claim. */
  protected note(entry: HistoryEntry): void {
    this.effects.push({ type: 'history', event: { atMs: this.atMs, epoch: this.state.epoch, ...entry } });
  }

  protected publish(event: RunEvent): void {
    this.effects.push({ type: 'publish', event });
  }

  /** `by`: the worker that had the job, if the error itself names none. */
  protected fault(what: string, error: ErrorRecord, by: string | null = null): void {
    const { shown } = this.state;
    const named = error.context['worker'];
    const fault: RunFault = { atMs: this.atMs, what, worker: typeof named === 'string' ? named : by, error };
    const faultCounts = { ...shown.faultCounts, [error.code]: (shown.faultCounts[error.code] ?? 0) + 1 };
    this.state.shown = { ...shown, faultCounts, faults: newestFaults([...shown.faults, fault]) };
    this.note({ type: 'fault', what, code: error.code });
    this.publish({ type: 'fault', ...fault });
  }

  /** The branch of a version that the run has, or had. */
  protected branchAt(version: number): number {
    return branchOf(this.state.rollbacks, version);
  }

  protected over(): boolean {
    return TERMINAL_PHASES.includes(this.state.phase);
  }

  protected lives(holder: Holder): boolean {
    return this.state.workers.some((worker) => worker.id === holder.id && worker.incarnation === holder.incarnation);
  }

  protected holderOf(id: string): Holder {
    return { id, incarnation: this.state.workers.find((worker) => worker.id === id)?.incarnation ?? '' };
  }
}

const address = ({ queue, worker, id }: NewJob): JobAddress => ({ queue, worker, id });
