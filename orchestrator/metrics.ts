/**
 * What a run leaves on disk beside its checkpoints: spec.json, metrics.jsonl (one line a step or eval, each step once, in
 * order) and TensorBoard events. Appends are ordinary writes, which outlive this process; fsync follows within a second and
 * before a checkpoint is asked for. Called by driver.ts; knows nothing of Redis.
 */
import { closeSync, existsSync, fdatasync, fdatasyncSync, fstatSync, ftruncateSync, mkdirSync, openSync, readFileSync, renameSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { NnError } from '../config/errors.ts';
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

export class RunMetrics {
  readonly #path: string;
  readonly #descriptor: number;
  readonly #board: TensorBoardWriter;
  #bytes: number;
  #pending: Buffer[] = [];
  #pendingBytes = 0;
  #syncing = false;
  #syncTimer: NodeJS.Timeout | undefined;
  #lastStep = 0;
  readonly counted: Recovered['counted'];

  /** Opens the run's metrics; cuts off a last line that was not written whole, and reads what was counted. */
  constructor(directory: string, atMs: number) {
    this.#path = join(directory, 'metrics.jsonl');
    const before = existsSync(this.#path) ? readFileSync(this.#path) : null;
    this.#bytes = before === null ? 0 : before.lastIndexOf(0x0a) + 1;
    this.counted = before === null ? null : countLines(before.subarray(0, this.#bytes).toString('utf8'));
    this.#lastStep = this.counted?.step ?? 0;
    this.#descriptor = openSync(this.#path, 'a+');
    if (fstatSync(this.#descriptor).size > this.#bytes) ftruncateSync(this.#descriptor, this.#bytes);
    this.#board = new TensorBoardWriter(directory, atMs);
  }

  /** Appends a line; a step that was appended before is left out. Throws DISK_FULL, and then keeps the line for the next append. */
  append(line: MetricsLine): void {
    if (line.type === 'step') {
      if (line.report.step <= this.#lastStep) return;
      this.#lastStep = line.report.step;
    }
    const text = Buffer.from(`${JSON.stringify(line)}\n`);
    this.#pending.push(text);
    this.#pendingBytes += text.length;
    this.#flush();
    this.#board.append(line);
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
    this.#syncTimer ??= setTimeout(() => this.#syncSoon(), SYNC_AFTER_MS);
  }

  #syncSoon(): void {
    this.#syncTimer = undefined;
    if (this.#syncing) return;
    this.#syncing = true;
    fdatasync(this.#descriptor, () => {
      // An error here shows again, as an exception, at the next `sync`.
      this.#syncing = false;
    });
  }

  /** Everything appended is on the disk when this returns. */
  sync(): void {
    if (this.#pending.length > 0) this.#flush();
    clearTimeout(this.#syncTimer);
    this.#syncTimer = undefined;
    fdatasyncSync(this.#descriptor);
  }

  close(): void {
    clearTimeout(this.#syncTimer);
    closeSync(this.#descriptor);
    this.#board.close();
  }
}

function countLines(text: string): NonNullable<Recovered['counted']> {
  const counted = { step: 0, lastReport: null as NonNullable<Recovered['counted']>['lastReport'], skippedInARow: 0, lastEvalStep: -1 };
  for (const line of text.split('\n')) {
    if (line === '') continue;
    const entry = JSON.parse(line) as MetricsLine;
    if (entry.type === 'eval') counted.lastEvalStep = Math.max(counted.lastEvalStep, entry.step);
    else if (entry.report.step === counted.step + 1) {
      counted.step++;
      counted.lastReport = entry.report;
      counted.skippedInARow = entry.report.skipped ? counted.skippedInARow + 1 : 0;
    }
  }
  return counted;
}
