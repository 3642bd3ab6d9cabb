/**
 * The draft of a run's next state, and the small verbs by which the rules of run-machine.ts change it: each keeps what must hold
 * together (an epoch and its control, a fault and its count, a phase and its event) and decides nothing. PURE.
 */
import type { ErrorRecord } from '../config/errors.ts';
import { TERMINAL_PHASES } from '../config/messages.ts';
import type { RunEvent, RunFault, RunPhase } from '../config/messages.ts';
import { holdersOf } from './activities.ts';
import type { Of } from './activities.ts';
import { FAULTS_KEPT, jobId } from './run-state.ts';
import type { Effect, HistoryEntry, Holder, NewJob, RunState } from './run-state.ts';

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

  protected origin(): { run: string; epoch: number; checkpoint: RunState['checkpoints'][number] | null; spec: RunState['settings']['spec'] } {
    const { settings, epoch, checkpoints, version } = this.state;
    return { run: settings.run, epoch, checkpoint: checkpoints.filter((each) => each.step <= version).at(-1) ?? null, spec: settings.spec };
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
    this.state.shown = { ...shown, faultCounts, faults: [...shown.faults, fault].slice(-FAULTS_KEPT) };
    this.note({ type: 'fault', what, code: error.code });
    this.publish({ type: 'fault', ...fault });
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
