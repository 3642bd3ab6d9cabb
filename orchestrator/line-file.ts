/**
 * An append-only file of JSON lines with one writer at a time: metrics, evals and the history of a run. It survives a crash
 * in the middle of a line, a disk that is full for a while, and a writer that was stopped, replaced and continued. Used by
 * metrics.ts and history.ts; knows nothing of what the lines mean.
 *
 * Opening is taking over: what is there is copied to a new file that takes the name. A process that had the file open before
 * (an orchestrator that was stopped, taken for dead, and wakes) goes on writing to the old one, which nobody reads.
 */
import { closeSync, existsSync, fdatasync, fdatasyncSync, fstatSync, ftruncateSync, openSync, readFileSync, rmSync, statSync, writeSync } from 'node:fs';
import { NnError } from '../config/errors.ts';
import { forgetTemporary, publish, temporaryName, writeAll } from '../data/files.ts';

const SYNC_AFTER_MS = 1_000;
/** Bytes kept in memory while the disk is full. */
const PENDING_BYTES = 64 << 20;

const isFull = (error: unknown): boolean => ['ENOSPC', 'EDQUOT'].includes((error as NodeJS.ErrnoException).code ?? '');

export class LineFile {
  readonly path: string;
  #descriptor: number;
  #bytes: number;
  #before: Buffer | null;
  #pending: Buffer[] = [];
  #pendingBytes = 0;
  #syncTimer: NodeJS.Timeout | undefined;

  /** Takes the file over; a last line that was not written whole is cut off. `keep`: `takeLines` will be called. Throws DISK_FULL. */
  constructor(path: string, keep: boolean) {
    this.path = path;
    const bytes = existsSync(path) ? readFileSync(path) : null;
    const whole = bytes === null ? null : bytes.subarray(0, bytes.lastIndexOf(0x0a) + 1);
    this.#before = keep ? whole : null;
    this.#bytes = whole?.length ?? 0;
    this.#descriptor = takeOver(path, whole ?? new Uint8Array(0));
  }

  /** Bytes of the file. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Whether the path still leads to what this writer writes. */
  get owned(): boolean {
    return existsSync(this.path) && statSync(this.path).ino === fstatSync(this.#descriptor).ino;
  }

  /** What the file held when it was opened, line by line; null: there was no file. Once: they are not kept. Throws RUN_STATE. */
  takeLines(): unknown[] | null {
    const bytes = this.#before;
    this.#before = null;
    return bytes === null ? null : linesOf(this.path, bytes.toString('utf8'));
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
      if (!isFull(error)) throw error;
      if (this.#pendingBytes > PENDING_BYTES) throw new NnError('DISK_FULL', `${this.path}: the disk has been full for too long`, { fatal: true }, error);
      throw new NnError('DISK_FULL', `${this.path}: the disk is full; lines wait in memory until there is room`, { path: this.path }, error);
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

/** A descriptor that appends to a new file of that name and content. */
function takeOver(path: string, content: Uint8Array): number {
  const temporary = temporaryName(path);
  let descriptor: number | undefined;
  try {
    descriptor = openSync(temporary, 'ax');
    writeAll(descriptor, content);
    fdatasyncSync(descriptor);
    publish(temporary, path);
    return descriptor;
  } catch (error) {
    if (descriptor !== undefined) closeSync(descriptor);
    rmSync(temporary, { force: true });
    forgetTemporary(temporary);
    if (!isFull(error)) throw error;
    return takeAsItIs(path, content.length);
  }
}

/** Without room for a copy: whoever had the file open cannot write either. */
function takeAsItIs(path: string, bytes: number): number {
  try {
    const descriptor = openSync(path, 'a');
    ftruncateSync(descriptor, bytes);
    return descriptor;
  } catch (error) {
    if (!isFull(error)) throw error;
    throw new NnError('DISK_FULL', `${path}: the disk is full; make room`, { path }, error);
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
