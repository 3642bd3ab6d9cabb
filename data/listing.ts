/**
 * Hashes files as they lie on the disk, in slices that leave the thread free, and names a set of files by its contents: the
 * address under which a worker caches it. Knows no network. Called by the store's two ends.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import type { ListedFiles } from '../config/store.ts';
import { fileError } from './files.ts';

/** Bytes hashed between two chances for other work on the same thread: under a millisecond. */
const SLICE_BYTES = 1 << 20;

/** The sha-256 of a file, in hex. `onBytes` hears how far it is. Throws FILE_NOT_FOUND. */
export async function sha256File(path: string, onBytes: (bytes: number) => void = () => undefined): Promise<string> {
  const hash = createHash('sha256');
  let bytes = 0;
  try {
    for await (const slice of createReadStream(path, { highWaterMark: SLICE_BYTES })) {
      hash.update(slice as Buffer);
      onBytes((bytes += (slice as Buffer).length));
    }
  } catch (error) {
    throw fileError(error, path);
  }
  return hash.digest('hex');
}

/** The address of a set of files: the sha-256 of their sorted names, sizes and digests. Pure. */
export function addressOf(files: ListedFiles): string {
  const sorted = Object.entries(files).sort(([a], [b]) => (a < b ? -1 : 1));
  return createHash('sha256').update(JSON.stringify(sorted.map(([name, { bytes, sha256 }]) => [name, bytes, sha256]))).digest('hex');
}

export const bytesIn = (files: ListedFiles): number => Object.values(files).reduce((sum, { bytes }) => sum + bytes, 0);
