/**
 * What a run leaves on disk beside its checkpoints: metrics.jsonl (one line a step, each step once, in order:
 * its StepReport and speed), evals.jsonl and TensorBoard events. Appends are ordinary writes, which outlive this process; fsync follows within a second and
 * before a checkpoint is asked for. Called by driver.ts; knows nothing of Redis.
 */
import { join } from 'node:path';
import type { StepReport } from '../config/messages.ts';
import { LineFile } from './line-file.ts';
import type { MetricsLine, Recovered } from './run-state.ts';
import { TensorBoardWriter } from './tensorboard.ts';

/** A line of metrics.jsonl. */
export type StepLine = StepReport & { readonly tokensPerSecond: number; readonly epoch: number; readonly atMs: number };
/** A line of evals.jsonl. */
export interface EvalLine {
  readonly step: number;
  readonly loss: number | null;
  readonly atMs: number;
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
  constructor(directory: string, atMs: number) {
    this.#steps = new LineFile(join(directory, 'metrics.jsonl'), true);
    this.#evals = new LineFile(join(directory, 'evals.jsonl'), true);
    const steps = this.#steps.takeLines();
    this.counted = steps === null ? null : countLines(steps as StepLine[], (this.#evals.takeLines() ?? []) as EvalLine[]);
    for (const line of ((steps ?? []) as StepLine[]).slice(-REMEMBERED)) this.#fingerprints.set(line.step, fingerprint(line));
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
    } else {
      if (line.step <= this.#lastEvalStep) return;
      this.#lastEvalStep = line.step;
      this.#board.append(line);
      this.#evals.append({ step: line.step, loss: line.loss, atMs: line.atMs } satisfies EvalLine);
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

function countLines(steps: readonly StepLine[], evals: readonly EvalLine[]): NonNullable<Recovered['counted']> {
  let step = (steps[0]?.step ?? 1) - 1;
  let skippedInARow = 0;
  let lastReport: StepReport | null = null;
  for (const { tokensPerSecond: _speed, epoch: _epoch, atMs: _at, ...report } of steps) {
    if (report.step !== step + 1) continue;
    step++;
    lastReport = report;
    skippedInARow = report.skipped ? skippedInARow + 1 : 0;
  }
  return { step, lastReport, skippedInARow, lastEvalStep: Math.max(-1, ...evals.map((each) => each.step)) };
}
