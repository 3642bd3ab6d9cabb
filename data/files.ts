/**
 * The few file operations that the formats of this folder share: positional reads that are complete or fail, writes that
 * turn a full disk into DISK_FULL, and the sync-then-rename that makes a file complete or absent. Knows no format. Called
 * by every reader and writer of data/.
 */
import { randomBytes } from 'node:crypto';
import { closeSync, fsyncSync, openSync, readSync, readdirSync, renameSync, rmSync, statSync, writeSync } from 'node:fs';
import { hostname } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { NnError } from '../config/errors.ts';

/** One system call moves at most this many bytes: Linux stops at 2 GiB - 4 KiB, Node at 2 GiB - 1. */
const TRANSFER_BYTES = 1 << 30;

/** The system's code of an error (`ENOENT`, ...), or undefined. */
export const systemCode = (error: unknown): string | undefined => {
  const code = (error as { code?: unknown } | null)?.code;
  return typeof code === 'string' ? code : undefined;
};

/**
 * An error of the file system as one of ours where it is an expected failure: a full disk or quota is DISK_FULL, a failing one
 * DISK_FAULT, a path that is missing or may not be used is FILE_NOT_FOUND. Anything else comes back as it is. `path` is named in the message.
 */
export function fileError(error: unknown, path: string): unknown {
  switch (systemCode(error)) {
    case 'ENOSPC':
    case 'EDQUOT':
      return new NnError('DISK_FULL', `${path}: the disk is full; nothing that was complete before is changed`, { path }, error);
    case 'ENOENT':
    case 'ENOTDIR':
      return new NnError('FILE_NOT_FOUND', `${path}: no such file or directory`, { path }, error);
    case 'EISDIR':
      return new NnError('FILE_NOT_FOUND', `${path}: is a directory, but a file is wanted`, { path }, error);
    case 'EACCES':
    case 'EPERM':
    case 'EROFS':
      return new NnError('FILE_NOT_FOUND', `${path}: permission denied`, { path }, error);
    case 'EIO':
    case 'ESTALE':
    case 'ENXIO':
    case 'ENODEV':
      return new NnError('DISK_FAULT', `${path}: the disk or its server failed (${systemCode(error)}); look at the system's log`, { path }, error);
    default:
      return error;
  }
}

/** Runs file operations on `path`; what they throw becomes `fileError`. */
export function onFile<Value>(path: string, work: () => Value): Value {
  try {
    return work();
  } catch (error) {
    throw fileError(error, path);
  }
}

/** The bytes of a typed array, not copied. */
export const bytesOf = (array: ArrayBufferView): Uint8Array => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

/** Fills `into` from byte `position` of an open file. Returns the bytes read: fewer than asked only at the file's end. */
export function readAt(descriptor: number, into: Uint8Array, position: number): number {
  let done = 0;
  while (done < into.length) {
    const length = Math.min(into.length - done, TRANSFER_BYTES);
    const read = readSync(descriptor, into, done, length, position + done);
    if (read === 0) break;
    done += read;
  }
  return done;
}

/** Writes all of `from` at byte `position`, or at the file's own position when that is null. */
export function writeAll(descriptor: number, from: Uint8Array, position: number | null = null): void {
  let done = 0;
  while (done < from.length) {
    const length = Math.min(from.length - done, TRANSFER_BYTES);
    done += writeSync(descriptor, from, done, length, position === null ? null : position + done);
  }
}

/** Makes a directory's entries durable: without it a rename may be lost with the power. */
export function syncDirectory(directory: string): void {
  const descriptor = openSync(directory, 'r');
  try {
    fsyncSync(descriptor);
  } finally {
    closeSync(descriptor);
  }
}

/** Temporary files and directories that this thread is writing. */
const active = new Set<string>();

/** What a temporary is for: something unfinished, something to be deleted, a mark that something is in use, or a directory to work in. */
const ENDINGS = ['partial', 'replaced', 'used', 'work'] as const;
export type TemporaryEnding = (typeof ENDINGS)[number];

/**
 * A temporary name beside `path` that tells whose it is: `.<name>.<host>.<process>.<random>.<ending>`. It counts as in
 * use until `forgetTemporary` or the end of the process.
 */
export function temporaryName(path: string, ending: TemporaryEnding = 'partial'): string {
  const temporary = join(dirname(path), `.${basename(path)}.${hostname()}.${process.pid}.${randomBytes(4).toString('hex')}.${ending}`);
  active.add(temporary);
  return temporary;
}

/** Says that a temporary name is no longer in use: it was published or removed. */
export const forgetTemporary = (temporary: string): void => void active.delete(temporary);

/** A temporary that nobody wrote to for so long is nobody's, whichever host its name tells of; clocks of hosts differ by less. */
const ABANDONED_AFTER_MS = 24 * 3_600_000;

/** A temporary by its name: what it was made for, and whether its process is at work, gone, or on another host. */
export interface Temporary {
  readonly name: string;
  readonly ending: TemporaryEnding;
  readonly owner: 'active' | 'gone' | 'elsewhere';
}

/**
 * Reads the name of a temporary; null for any other path. Nobody is at work on it when its process of this host is gone, or is
 * this one and knows nothing of it; or, for processes of other hosts and numbers that were given to another process, when
 * nothing in it has changed for a day.
 */
export function temporaryAt(path: string): Temporary | null {
  const match = /^\.(.+)\.(\d+)\.[0-9a-f]{8}\.([a-z]+)$/.exec(basename(path));
  const ending = ENDINGS.find((each) => each === match?.[3]);
  if (match === null || ending === undefined) return null;
  const place = `.${hostname()}`;
  const here = match[1]!.endsWith(place);
  return { name: here ? match[1]!.slice(0, -place.length) : match[1]!, ending, owner: ownerOf(path, here, Number(match[2])) };
}

function ownerOf(path: string, here: boolean, processId: number): Temporary['owner'] {
  if (active.has(path)) return 'active';
  if (here && (processId === process.pid || !isAlive(processId))) return 'gone';
  if (Date.now() - lastChangeMs(path) > ABANDONED_AFTER_MS) return 'gone';
  return here ? 'active' : 'elsewhere';
}

function isAlive(processId: number): boolean {
  try {
    return process.kill(processId, 0);
  } catch (error) {
    return systemCode(error) !== 'ESRCH';
  }
}

/** When a file, or anything in a directory, was last written to. What vanishes meanwhile has just been changed. */
function lastChangeMs(path: string): number {
  const found = statSync(path, { throwIfNoEntry: false });
  if (found === undefined) return Date.now();
  if (!found.isDirectory()) return found.mtimeMs;
  return readdirSync(path).reduce((last, name) => Math.max(last, lastChangeMs(join(path, name))), found.mtimeMs);
}

/** Removes the temporaries in a directory that processes left which are gone. */
export function removeAbandoned(directory: string): void {
  for (const name of readdirSync(directory)) {
    const path = join(directory, name);
    if (temporaryAt(path)?.owner === 'gone') rmSync(path, { recursive: true, force: true });
  }
}

/** Gives a synced file its final name, atomically and durably. */
export function publish(temporary: string, path: string): void {
  renameSync(temporary, path);
  syncDirectory(dirname(path));
  forgetTemporary(temporary);
}

/** Writes a small file: complete or absent, synced before it has its name. Throws DISK_FULL, FILE_NOT_FOUND, DISK_FAULT. */
export function writeWhole(path: string, bytes: Uint8Array): void {
  const temporary = temporaryName(path);
  try {
    const descriptor = openSync(temporary, 'wx');
    try {
      writeAll(descriptor, bytes);
      fsyncSync(descriptor);
    } finally {
      closeSync(descriptor);
    }
    publish(temporary, path);
  } catch (error) {
    rmSync(temporary, { force: true });
    forgetTemporary(temporary);
    throw fileError(error, path);
  }
}

/** A name from a file, quoted and cut, so that whatever it holds an error stays one short line. */
export const quote = (name: string): string => JSON.stringify(name.length > 120 ? `${name.slice(0, 117)}...` : name);
