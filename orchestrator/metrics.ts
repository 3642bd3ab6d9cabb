/**
 * What a run leaves on disk beside its checkpoints: spec.json, metrics.jsonl (one line a step, each step once, in order:
 * its StepReport and speed), evals.jsonl and TensorBoard events. Appends are ordinary writes, which outlive this process; fsync follows within a second and
 * before a checkpoint is asked for. Called by driver.ts; knows nothing of Redis.
 */
import { closeSync, existsSync, fdatasync, fdatasyncSync, fstatSync, ftruncateSync, mkdirSync, openSync, readFileSync, renameSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { NnError } from '../config/errors.ts';
import type { StepReport } from '../config/messages.ts';
import type { RunSpec } from '../config/run-spec.ts';
import type { MetricsLine, Recovered } from './run-state.ts';
import { TensorBoardWriter } from './tensorboard.ts';

const SYNC_AFTER_MS = 1_000;
/** Bytes kept in memory while the disk is full. */
const PENDING_BYTES = 64 << 20;

/** Writes spec.json, or checks the one that is there. Throws RUN_EXISTS when the directory belongs to another spec. */
export function claimDirectory(directory: string, spec: RunSpec): void {
  mkdirSync(directory, { recursive: true });
  const path = join(directory, 'spec.json');
  const text = `${JSON.stringify(spec, null, 2)}\n`;
  if (existsSync(path)) {
    if (readFileSync(path, 'utf8') === text) return;
    throw new NnError('RUN_EXISTS', `${directory} holds a run of another spec; choose another name, or move the directory away`, { path: directory });
  }
  writeFileSync(`${path}.partial`, text);
  renameSync(`${path}.partial`, path);
}

/** An append-only file of JSON lines that survives a crash in the middle of a line, and a disk that is full for a while. */
class LineFile {
  readonly #path: string;
  readonly #descriptor: number;
  #bytes: number;
  #pending: Buffer[] = [];
  #pendingBytes = 0;
  #syncTimer: NodeJS.Timeout | undefined;
  /** What the file held when it was opened, line by line; null: there was no file. */
  readonly before: readonly unknown[] | null;

  constructor(path: string) {
    this.#path = path;
    const bytes = existsSync(path) ? readFileSync(path) : null;
    this.#bytes = bytes === null ? 0 : bytes.lastIndexOf(0x0a) + 1;
    this.before = bytes === null ? null : linesOf(path, bytes.subarray(0, this.#bytes).toString('utf8'));
    this.#descriptor = openSync(path, 'a+');
    if (fstatSync(this.#descriptor).size > this.#bytes) ftruncateSync(this.#descriptor, this.#bytes);
  }

  /** Throws DISK_FULL, and then keeps the line for the next append. */
  append(line: object): void {
    const text = Buffer.from(`${JSON.stringify(line)}\n`);
    this.#pending.push(text);
    this.#pendingBytes += text.length;
    this.#flush();
  }

  #flush(): void {
    const bytes = this.#pending.length === 1 ? this.#pending[0]! : Buffer.concat(this.#pending);
    try {
      for (let written = 0; written < bytes.length; ) written += writeSync(this.#descriptor, bytes, written);
    } catch (error) {
      ftruncateSync(this.#descriptor, this.#bytes);
      const code = (error as NodeJS.ErrnoException).code;
      if (code !== 'ENOSPC' && code !== 'EDQUOT') throw error;
      if (this.#pendingBytes > PENDING_BYTES) throw new NnError('DISK_FULL', `${this.#path}: the disk has been full for too long`, { fatal: true }, error);
      throw new NnError('DISK_FULL', `${this.#path}: the disk is full; metrics wait in memory until there is room`, { path: this.#path }, error);
    }
    this.#bytes += bytes.length;
    this.#pending = [];
    this.#pendingBytes = 0;
    // An error of this early sync shows again, as an exception, in `sync`.
    this.#syncTimer ??= setTimeout(() => {
      this.#syncTimer = undefined;
      fdatasync(this.#descriptor, () => undefined);
    }, SYNC_AFTER_MS);
  }

  sync(): void {
    if (this.#pending.length > 0) this.#flush();
    clearTimeout(this.#syncTimer);
    this.#syncTimer = undefined;
    fdatasyncSync(this.#descriptor);
  }

  close(): void {
    clearTimeout(this.#syncTimer);
    closeSync(this.#descriptor);
  }
}

function linesOf(path: string, text: string): unknown[] {
  const lines = text.split('\n').filter((line) => line !== '');
  return lines.map((line, index) => {
    try {
      return JSON.parse(line) as unknown;
    } catch (error) {
      throw new NnError('RUN_STATE', `${path}: line ${index + 1} is damaged; restore the file, or delete it to count the steps from the record`, { path, line: index + 1 }, error);
    }
  });
}

/** A line of metrics.jsonl. */
export type StepLine = StepReport & { readonly tokensPerSecond: number; readonly epoch: number; readonly atMs: number };
/** A line of evals.jsonl. */
export interface EvalLine {
  readonly step: number;
  readonly loss: number | null;
  readonly atMs: number;
}

export class RunMetrics {
  readonly #steps: LineFile;
  readonly #evals: LineFile;
  readonly #board: TensorBoardWriter;
  #lastStep: number;
  #lastEvalStep: number;
  /** What the files held at the beginning; null: there were none. */
  readonly counted: Recovered['counted'];

  /** Opens the run's metrics, cuts off a last line that was not written whole, and reads what was counted. Throws RUN_STATE. */
  constructor(directory: string, atMs: number) {
    this.#steps = new LineFile(join(directory, 'metrics.jsonl'));
    this.#evals = new LineFile(join(directory, 'evals.jsonl'));
    this.counted = this.#steps.before === null ? null : countLines(this.#steps.before as StepLine[], (this.#evals.before ?? []) as EvalLine[]);
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
      this.#board.append(line);
      this.#steps.append({ ...report, tokensPerSecond, epoch, atMs } satisfies StepLine);
    } else {
      if (line.step <= this.#lastEvalStep) return;
      this.#lastEvalStep = line.step;
      this.#board.append(line);
      this.#evals.append({ step: line.step, loss: line.loss, atMs: line.atMs } satisfies EvalLine);
    }
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

function countLines(steps: readonly StepLine[], evals: readonly EvalLine[]): NonNullable<Recovered['counted']> {
  let step = 0;
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
