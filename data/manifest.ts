/**
 * The manifest of a directory: the size and sha-256 of each of its files, written last, so that a directory that has one
 * is complete, and damage in any file is noticed and named. Knows nothing of what the files hold. Called by
 * checkpoint-files.ts and checkpoint-reader.ts.
 *
 *   {"version": 1, "files": {"config.json": {"bytes": 612, "sha256": "..."}, "training/m.safetensors": ...}}
 */
import { createHash } from 'node:crypto';
import { closeSync, fsyncSync, openSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { z } from 'zod';
import { NnError } from '../config/errors.ts';
import { onFile, readAt, systemCode, writeAll } from './files.ts';

export const MANIFEST = 'manifest.json';

/** Bytes hashed between two chances for other work on the same thread: about 3 ms. */
const HASH_BYTES = 4 << 20;

/** A path inside the directory: no root, no `..`. */
const relativePath = z.string().regex(/^(?!\/)(?!.*(^|\/)\.\.?(\/|$))[^\\\0]+$/);
const schema = z.strictObject({
  version: z.literal(1),
  files: z.record(relativePath, z.strictObject({ bytes: z.int().nonnegative(), sha256: z.string().regex(/^[0-9a-f]{64}$/) })),
});

export type Manifest = z.output<typeof schema>;

/** A manifest under construction: what was written is hashed on its way to the disk, not read again. */
export class ManifestBuilder {
  readonly #files: Record<string, { bytes: number; sha256: string }> = {};

  /** Starts a file: feed its bytes in order to `update`, then call `end`. */
  file(path: string): { update(bytes: Uint8Array): void; end(): void } {
    const hash = createHash('sha256');
    let length = 0;
    return {
      update: (bytes) => {
        hash.update(bytes);
        length += bytes.length;
      },
      end: () => {
        this.#files[path] = { bytes: length, sha256: hash.digest('hex') };
      },
    };
  }

  /** Bytes of all files so far. */
  get bytes(): number {
    return Object.values(this.#files).reduce((sum, { bytes }) => sum + bytes, 0);
  }

  manifest(): Manifest {
    return { version: 1, files: Object.fromEntries(Object.entries(this.#files).sort(([a], [b]) => (a < b ? -1 : 1))) };
  }
}

/** Writes a small new file and syncs it. Throws DISK_FULL. */
export function writeSmall(path: string, contents: Uint8Array): void {
  onFile(path, () => {
    const descriptor = openSync(path, 'wx');
    try {
      writeAll(descriptor, contents);
      fsyncSync(descriptor);
    } finally {
      closeSync(descriptor);
    }
  });
}

/** A value as a small JSON file. */
export const encodeJson = (value: unknown): Uint8Array => Buffer.from(`${JSON.stringify(value, null, 2)}\n`);

const damaged = (directory: string, file: string, problem: string): NnError =>
  new NnError('CHECKPOINT_INVALID', `${directory}: ${file} ${problem}`, { path: directory, file });

/** The manifest of `directory`, or null when it has none. Throws CHECKPOINT_INVALID when it is damaged. */
export function readManifest(directory: string): Manifest | null {
  let text: string;
  try {
    text = readFileSync(join(directory, MANIFEST), 'utf8');
  } catch (error) {
    if (systemCode(error) === 'ENOENT') return null;
    throw error;
  }
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new NnError('CHECKPOINT_INVALID', `${directory}: ${MANIFEST} is no JSON: it is damaged`, { path: directory, file: MANIFEST }, error);
  }
  const result = schema.safeParse(json);
  if (!result.success) throw damaged(directory, MANIFEST, 'is not of the form that it should have: it is damaged');
  return result.data;
}

/** Throws CHECKPOINT_INVALID unless each file of the manifest is there with its size. Reads no content. */
export function checkSizes(directory: string, manifest: Manifest): void {
  for (const [file, { bytes }] of Object.entries(manifest.files)) {
    const found = statSync(join(directory, file), { throwIfNoEntry: false });
    if (found === undefined || !found.isFile()) throw damaged(directory, file, 'is missing');
    if (found.size !== bytes) throw damaged(directory, file, `has ${found.size} bytes instead of ${bytes}: it is truncated or damaged`);
  }
}

/** Checks sizes and contents; yields now and then, so that the caller may let other work run. */
function* verifying(directory: string, manifest: Manifest): Generator<void> {
  checkSizes(directory, manifest);
  const buffer = new Uint8Array(HASH_BYTES);
  for (const [file, { sha256 }] of Object.entries(manifest.files)) {
    const hash = createHash('sha256');
    const descriptor = openSync(join(directory, file), 'r');
    try {
      for (let at = 0, read = -1; read !== 0; at += read) {
        read = readAt(descriptor, buffer, at);
        hash.update(buffer.subarray(0, read));
        yield;
      }
    } finally {
      closeSync(descriptor);
    }
    if (hash.digest('hex') !== sha256) throw damaged(directory, file, 'is damaged: its sha-256 differs from the manifest');
  }
}

/**
 * Hashes every file and compares; blocks the thread meanwhile. `check` is called every few milliseconds and may throw. Throws
 * CHECKPOINT_INVALID naming the file.
 */
export function verifyManifestNow(directory: string, manifest: Manifest, check: () => void = () => undefined): void {
  for (const _ of verifying(directory, manifest)) check();
}

/** Directories that a thread remembers as undamaged. */
const KNOWN_DIRECTORIES = 8;
/** A file that changed so shortly before it was looked at may change again within the resolution of its times: milliseconds. */
const SETTLED_MS = 2_000;

/**
 * Directories that this thread has verified, by what the system says of each of their files. One whose files have the same
 * inodes, sizes and times as then is not read again: whatever writes to a file, or puts another in its place, changes one of them.
 */
const known = new Map<string, string>();

/** The same as verifyManifestNow, once for a directory that stays as it is. Not for what a run goes on from. */
export function verifyManifestOnce(directory: string, manifest: Manifest, check?: () => void): void {
  const before = identityOf(directory, manifest);
  if (before !== null && known.get(directory) === before) return;
  known.delete(directory);
  verifyManifestNow(directory, manifest, check);
  if (before === null || before !== identityOf(directory, manifest)) return;
  known.set(directory, before);
  for (const oldest of known.keys()) if (known.size > KNOWN_DIRECTORIES) known.delete(oldest);
}

/** Inode, size and times of each file; null when one is missing, or was changed just now. */
function identityOf(directory: string, manifest: Manifest): string | null {
  const parts: string[] = [JSON.stringify(manifest)];
  for (const file of [MANIFEST, ...Object.keys(manifest.files)]) {
    const found = statSync(join(directory, file), { bigint: true, throwIfNoEntry: false });
    if (found === undefined || Date.now() - Number(found.ctimeMs) < SETTLED_MS) return null;
    parts.push([found.dev, found.ino, found.size, found.mtimeNs, found.ctimeNs].join(' '));
  }
  return parts.join('\n');
}

/** The same in slices of a few milliseconds, for a thread that has other work. */
export async function verifyManifest(directory: string, manifest: Manifest): Promise<void> {
  for (const _ of verifying(directory, manifest)) await setImmediate();
}
