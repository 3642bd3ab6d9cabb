/**
 * What a run leaves on disk beside its checkpoints: metrics.jsonl (one line a step, each step once on its branch, in order: its
 * StepReport and speed; and one for each rollback), evals.jsonl and TensorBoard events. Appends are ordinary writes, which outlive
 * this process; fsync follows within a second and before a checkpoint is asked for. Called by driver.ts; the readers of these files
 * use `presentBranch`. Knows nothing of Redis.
 */
import { join } from 'node:path';
import { branchOf } from '../config/branches.ts';
import type { Rollback, StepReport } from '../config/messages.ts';
import type { RunSpec } from '../config/run-spec.ts';
import { LineFile } from './line-file.ts';
import { UNWATCHED, afterRollback, watchLoss } from './loss-spike.ts';
import type { MetricsLine, Recovered } from './run-state.ts';
import { TensorBoardWriter } from './tensorboard.ts';

/** A line of metrics.jsonl that tells of a step. */
export type StepLine = StepReport & { readonly tokensPerSecond: number; readonly epoch: number; readonly atMs: number };
/** A line of metrics.jsonl after which the steps beyond `toStep` above it are void; those that follow are of the next branch. */
export type RollbackLine = { readonly type: 'rollback' } & Rollback;
export type RunLine = StepLine | RollbackLine;
/** A line of evals.jsonl. */
export interface EvalLine {
  readonly step: number;
  readonly loss: number | null;
  readonly atMs: number;
  /** The branch of the version (config/branches.ts); absent: 0. */
  readonly branch?: number;
}

export const isRollback = (line: RunLine): line is RollbackLine => 'type' in line;

/** What the files say of the branch that a run is on: its steps without a gap, up to `step`, its evals, and how it came about. */
export interface PresentBranch {
  readonly step: number;
  readonly steps: readonly StepLine[];
  readonly rollbacks: readonly Rollback[];
  readonly evals: readonly EvalLine[];
}

/** The version that the first line was computed on: 0, unless the file was taken away at some time. */
const before = (lines: readonly RunLine[]): number => (lines[0] === undefined || isRollback(lines[0]) ? 0 : lines[0].step - 1);

export function presentBranch(lines: readonly RunLine[], evals: readonly EvalLine[]): PresentBranch {
  const steps: StepLine[] = [];
  const rollbacks: Rollback[] = [];
  let step = before(lines);
  for (const line of lines) {
    if (!isRollback(line)) {
      if (line.step !== step + 1) continue;
      steps.push(line);
      step++;
    } else {
      const { type: _type, ...rollback } = line;
      rollbacks.push(rollback);
      step = rollback.toStep;
      while (steps.length > 0 && steps.at(-1)!.step > step) steps.pop();
    }
  }
  return { step, steps, rollbacks, evals: evals.filter(({ step: at, branch = 0 }) => branchOf(rollbacks, at) === branch) };
}

/** Steps of which it is remembered what they reported, the newest. */
const REMEMBERED = 20_000;

export class RunMetrics {
  readonly #steps: LineFile;
  readonly #evals: LineFile;
  readonly #board: TensorBoardWriter;
  #lastStep: number;
  #lastEvalStep: number;
  readonly #fingerprints = new Map<number, string>();
  /** What the files held at the beginning; null: there were none. */
  readonly counted: Recovered['counted'];

  /** Opens the run's metrics, cuts off a last line that was not written whole, and reads what was counted. Throws RUN_STATE. */
  constructor(directory: string, atMs: number, spec: RunSpec | null = null) {
    this.#steps = new LineFile(join(directory, 'metrics.jsonl'), true);
    this.#evals = new LineFile(join(directory, 'evals.jsonl'), true);
    const steps = this.#steps.takeLines();
    const present = presentBranch((steps ?? []) as RunLine[], (this.#evals.takeLines() ?? []) as EvalLine[]);
    this.counted = steps === null ? null : countLines(steps as RunLine[], present, spec);
    for (const line of present.steps.slice(-REMEMBERED)) this.#fingerprints.set(line.step, fingerprint(line));
    this.#lastStep = this.counted?.step ?? 0;
    this.#lastEvalStep = this.counted?.lastEvalStep ?? -1;
    this.#board = new TensorBoardWriter(directory, atMs);
  }

  /** Appends a line; what was appended before is left out. Throws DISK_FULL, and then keeps the line for the next append. */
  append(line: MetricsLine): void {
    if (line.type === 'step') {
      const { report, tokensPerSecond, epoch, atMs } = line;
      if (report.step <= this.#lastStep) return;
      this.#lastStep = report.step;
      this.#fingerprints.set(report.step, fingerprint(report));
      this.#fingerprints.delete(report.step - REMEMBERED);
      this.#board.append(line);
      this.#steps.append({ ...report, tokensPerSecond, epoch, atMs } satisfies StepLine);
    } else if (line.type === 'rollback') {
      for (let step = line.toStep + 1; step <= this.#lastStep; step++) this.#fingerprints.delete(step);
      this.#lastStep = line.toStep;
      this.#lastEvalStep = Math.min(this.#lastEvalStep, line.toStep);
      this.#board.append(line);
      this.#steps.append(line satisfies RollbackLine);
    } else {
      const { step, loss, atMs, branch = 0 } = line;
      if (step <= this.#lastEvalStep) return;
      this.#lastEvalStep = step;
      this.#board.append(line);
      this.#evals.append({ step, loss, atMs, ...(branch === 0 ? {} : { branch }) } satisfies EvalLine);
    }
  }

  /** How the report of a step that was computed again differs from the one before; null: it does not, as far as is remembered. */
  difference(report: StepReport): string | null {
    const counted = this.#fingerprints.get(report.step);
    const again = fingerprint(report);
    if (counted === undefined || counted === again) return null;
    // Told once: the same report comes as progress, and in the result.
    this.#fingerprints.set(report.step, again);
    return `before ${counted}, now ${again}`;
  }

  /** Everything appended is on the disk when this returns. Throws DISK_FULL. */
  sync(): void {
    this.#steps.sync();
    this.#evals.sync();
  }

  close(): void {
    this.#steps.close();
    this.#evals.close();
    this.#board.close();
  }
}

/** The numbers of a step that follow from its bits. */
const fingerprint = ({ loss, gradientNorm, skipped }: StepReport): string => `loss ${loss}, norm ${gradientNorm}${skipped ? ', skipped' : ''}`;

/** What was counted, as both files tell it. `spec`: its rule about losses is applied as it was then; null: nobody asks. Pure. */
export function countLines(lines: readonly RunLine[], present: PresentBranch, spec: RunSpec | null): NonNullable<Recovered['counted']> {
  let skippedInARow = 0;
  let lossWatch = UNWATCHED;
  let step = before(lines);
  for (const line of lines) {
    if (isRollback(line)) {
      skippedInARow = 0;
      lossWatch = afterRollback(lossWatch);
      step = line.toStep;
    } else if (line.step === step + 1) {
      skippedInARow = line.skipped ? skippedInARow + 1 : 0;
      if (spec !== null) lossWatch = watchLoss(spec, lossWatch, line);
      step++;
    }
  }
  const last = present.steps.at(-1);
  const watched = spec !== null && spec.lossSpike.factor > 0;
  return {
    step: present.step,
    lastReport: last === undefined ? null : reportOf(last),
    skippedInARow,
    lastEvalStep: Math.max(-1, ...present.evals.map((each) => each.step)),
    ...(watched || present.rollbacks.length > 0 ? { branch: { rollbacks: present.rollbacks, lossWatch } } : {}),
  };
}

export function reportOf({ tokensPerSecond: _speed, epoch: _epoch, atMs: _at, ...report }: StepLine): StepReport {
  return report;
}
