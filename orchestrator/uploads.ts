/**
 * Checkpoints on their way in from workers that do not share this file system. What arrives lies beside the checkpoints,
 * each file under its sha-256, and can be carried on where it stood, by the same worker or another, also after a restart of
 * this process. When all is there it is verified, synced and renamed: complete or absent. Knows no HTTP. Called by
 * server/store.ts.
 *
 *   runs/<run>/checkpoints/.<checkpoint>.<id>.upload/<sha256>      id: of the manifest's contents
 *   begin -> open    append ..., finish -> verifying -> complete
 *     \-> verifying (the checkpoint is there already) -> complete, or open when it is damaged
 */
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, rmSync, statSync } from 'node:fs';
import { copyFile, mkdir, open, rename, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import type { Readable } from 'node:stream';
import { parseCheckpointName } from '../config/branches.ts';
import type { CheckpointName } from '../config/branches.ts';
import { NnError, errorCode } from '../config/errors.ts';
import type { UploadState } from '../config/store.ts';
import { CheckpointReader, placeCheckpoint, verifyCheckpoint } from '../data/checkpoint-files.ts';
import { fileError, forgetTemporary, onFile, removeAbandoned, syncDirectory, temporaryName } from '../data/files.ts';
import { sha256File } from '../data/listing.ts';
import { MANIFEST, encodeJson, readManifest, writeSmall } from '../data/manifest.ts';
import type { Manifest } from '../data/manifest.ts';

/** Deliveries under way at once, of all runs. */
const MOST = 64;

/** Codes of a connection that ended before its time. */
const BROKEN = new Set(['ECONNRESET', 'EPIPE', 'ERR_STREAM_PREMATURE_CLOSE', 'ABORT_ERR']);

interface Upload {
  readonly id: string;
  readonly directory: string;
  /** Where the checkpoint shall be. */
  readonly target: string;
  readonly step: number;
  readonly manifest: Manifest;
  /** sha-256 -> bytes, of the files that are sent. */
  readonly wanted: ReadonlyMap<string, number>;
  readonly writers: Map<string, { readonly source: Readable; readonly ended: Promise<unknown> }>;
  state: UploadState;
  failure: unknown;
}

export class Uploads {
  readonly #runs: string;
  readonly #expireMs: number;
  readonly #uploads = new Map<string, Upload>();

  constructor(runs: string, { expireMs }: { expireMs: number }) {
    this.#runs = runs;
    this.#expireMs = expireMs;
  }

  /** Begins or joins a delivery. Throws DISK_FULL, FILE_NOT_FOUND, STORE_UNAVAILABLE when there are too many. */
  begin(run: string, name: CheckpointName, manifest: Manifest): { upload: string; state: UploadState } {
    const text = encodeJson(manifest);
    const id = createHash('sha256').update(text).digest('hex').slice(0, 32);
    const target = join(this.#runs, run, 'checkpoints', name);
    const key = keyOf(run, name, id);
    const known = this.#uploads.get(key);
    if (known !== undefined) return this.#stateOf(key, known);
    this.#expire(dirname(target));
    if (this.#uploads.size >= MOST) this.#forgetOne();
    const directory = join(dirname(target), `.${name}.${id}.upload`);
    const wanted = new Map(Object.entries(manifest.files).map(([, { sha256, bytes }]) => [sha256, bytes]));
    const { step } = parseCheckpointName(name)!;
    const upload: Upload = { id, directory, target, step, manifest, wanted, writers: new Map(), state: 'open', failure: null };
    onFile(directory, () => mkdirSync(directory, { recursive: true }));
    this.#uploads.set(key, upload);
    if (isSame(target, manifest)) this.#verify(upload, async () => {
      const { step: found } = await verifyCheckpoint(target);
      if (found !== step) throw new NnError('CHECKPOINT_INVALID', `${target}: holds step ${found}`, { path: target });
    }, false);
    return { upload: id, state: upload.state };
  }

  /** The oldest delivery that nobody works on is forgotten; what has come of it stays, and its sender begins it again. Throws STORE_UNAVAILABLE. */
  #forgetOne(): void {
    const idle = [...this.#uploads].find(([, { writers, state }]) => writers.size === 0 && state !== 'verifying');
    if (idle === undefined) throw new NnError('STORE_UNAVAILABLE', `${MOST} checkpoints are being delivered already; try again later`);
    this.#uploads.delete(idle[0]);
  }

  /** Bytes of a file that are here. Throws STORE_UNAVAILABLE for a delivery that was not begun here. */
  offset(run: string, name: CheckpointName, id: string, sha256: string): number {
    const { directory } = this.#file(run, name, id, sha256);
    return statSync(join(directory, sha256), { throwIfNoEntry: false })?.size ?? 0;
  }

  /**
   * Appends bytes from `offset` on, which must be where the file ends; returns where it ends then, which is less than was
   * sent when the connection broke. A newer sender of a file ends the one before. Throws STORE_UNAVAILABLE, DISK_FULL.
   */
  async append(run: string, name: CheckpointName, id: string, sha256: string, offset: number, source: Readable, onBytes: (count: number) => void): Promise<number> {
    const upload = this.#file(run, name, id, sha256);
    const before = upload.writers.get(sha256);
    before?.source.destroy();
    await before?.ended;
    const ended = this.#write(upload, sha256, offset, source, onBytes);
    const writer = { source, ended: ended.catch(() => undefined) };
    upload.writers.set(sha256, writer);
    try {
      return await ended;
    } finally {
      if (upload.writers.get(sha256) === writer) upload.writers.delete(sha256);
    }
  }

  async #write({ directory, wanted }: Upload, sha256: string, offset: number, source: Readable, onBytes: (count: number) => void): Promise<number> {
    const path = join(directory, sha256);
    let at = 0;
    try {
      const file = await open(path, 'a');
      try {
        at = (await file.stat()).size;
        if (at !== offset) throw new NnError('STORE_UNAVAILABLE', `${sha256}: ${at} bytes are here, so that none can be taken from ${offset} on`, { offset: at });
        for await (const bytes of source as AsyncIterable<Buffer>) {
          if (at + bytes.length > wanted.get(sha256)!) throw new NnError('CHECKPOINT_INVALID', `${sha256}: more bytes were sent than its manifest names`, { path });
          await file.writeFile(bytes);
          at += bytes.length;
          onBytes(bytes.length);
        }
        return at;
      } finally {
        await file.close();
      }
    } catch (error) {
      if (BROKEN.has((error as NodeJS.ErrnoException).code ?? '')) return at;
      throw fileError(error, path);
    }
  }

  /** Verifies and names the checkpoint once all is here; asked again while that lasts. Throws CHECKPOINT_INVALID for damage: send that again. */
  finish(run: string, name: CheckpointName, id: string): { upload: string; state: UploadState } {
    const key = keyOf(run, name, id);
    const upload = this.#known(run, name, id);
    if (upload.state === 'open' && upload.failure === null) this.#verify(upload, () => this.#complete(upload), true);
    return this.#stateOf(key, upload);
  }

  #stateOf(key: string, upload: Upload): { upload: string; state: UploadState } {
    const { failure } = upload;
    upload.failure = null;
    if (failure !== null) throw failure as Error;
    // A checkpoint may be deleted by its run's retention later on: what is complete is looked at anew next time.
    if (upload.state === 'complete') this.#uploads.delete(key);
    return { upload: upload.id, state: upload.state };
  }

  /** Runs `work` apart from the request, since a large checkpoint takes minutes; the next one is told of its failure, if `told`. */
  #verify(upload: Upload, work: () => Promise<void>, told: boolean): void {
    upload.state = 'verifying';
    work().then(
      () => {
        upload.state = 'complete';
        rmSync(upload.directory, { recursive: true, force: true });
      },
      (error: unknown) => {
        upload.state = 'open';
        // A damaged checkpoint that is there already gives way to the one that is sent now.
        upload.failure = told || errorCode(error) !== 'CHECKPOINT_INVALID' ? error : null;
      },
    );
  }

  async #complete({ directory, target, step, manifest, wanted }: Upload): Promise<void> {
    for (const [sha256, bytes] of wanted) await verifyObject(join(directory, sha256), sha256, bytes);
    const temporary = temporaryName(target);
    try {
      removeAbandoned(dirname(target));
      await mkdir(join(temporary, 'training'), { recursive: true });
      const placed = new Map<string, string>();
      for (const [name, { sha256 }] of Object.entries(manifest.files)) {
        const twin = placed.get(sha256);
        if (twin === undefined) await rename(join(directory, sha256), join(temporary, name));
        else await copySynced(twin, join(temporary, name));
        placed.set(sha256, join(temporary, name));
      }
      syncDirectory(join(temporary, 'training'));
      writeSmall(join(temporary, MANIFEST), encodeJson(manifest));
      syncDirectory(temporary);
      const reader = CheckpointReader.open(temporary, { verify: false });
      reader.close();
      if (reader.step !== step) throw new NnError('CHECKPOINT_INVALID', `${target}: what was delivered is of step ${reader.step}, not ${step}`, { path: target });
      await placeCheckpoint(temporary, target);
    } catch (error) {
      await rm(temporary, { recursive: true, force: true });
      throw fileError(error, target);
    } finally {
      forgetTemporary(temporary);
    }
  }

  /** Throws STORE_UNAVAILABLE: the sender begins the delivery again, which joins what is here. */
  #known(run: string, name: CheckpointName, id: string): Upload {
    const upload = this.#uploads.get(keyOf(run, name, id));
    if (upload === undefined) throw new NnError('STORE_UNAVAILABLE', `no delivery ${id} of ${name} of run ${run} is under way here; begin it again`, { begin: true });
    return upload;
  }

  #file(run: string, name: CheckpointName, id: string, sha256: string): Upload {
    const upload = this.#known(run, name, id);
    if (!upload.wanted.has(sha256)) throw new NnError('CHECKPOINT_INVALID', `the manifest of this delivery names no file of sha-256 ${sha256}`, { path: upload.target });
    if (upload.state !== 'open') throw new NnError('STORE_UNAVAILABLE', `${name} of run ${run} is being verified`);
    return upload;
  }

  /** Removes what nobody carried on for too long. */
  #expire(directory: string): void {
    const now = Date.now();
    let names: string[];
    try {
      names = readdirSync(directory).filter((name) => /^\.step-\d+(-branch-\d+)?\.[0-9a-f]{32}\.upload$/.test(name));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return;
      throw fileError(error, directory);
    }
    for (const name of names) {
      const path = join(directory, name);
      const newest = Math.max(...[path, ...readdirSync(path).map((file) => join(path, file))].map((each) => statSync(each).mtimeMs));
      if (now - newest < this.#expireMs) continue;
      for (const [key, upload] of this.#uploads) if (upload.directory === path) this.#uploads.delete(key);
      rmSync(path, { recursive: true, force: true });
    }
  }
}

const keyOf = (run: string, name: CheckpointName, id: string): string => `${run}/${name}/${id}`;

/** Whether a checkpoint with that manifest is there; what its files hold is another question. */
function isSame(directory: string, manifest: Manifest): boolean {
  try {
    return JSON.stringify(readManifest(directory)) === JSON.stringify(manifest);
  } catch (error) {
    if (errorCode(error) === 'CHECKPOINT_INVALID') return false;
    throw error;
  }
}

/** Throws CHECKPOINT_INVALID unless the file is what its name says; a damaged one is removed, so that it is sent anew. */
async function verifyObject(path: string, sha256: string, bytes: number): Promise<void> {
  const size = statSync(path, { throwIfNoEntry: false })?.size ?? 0;
  if (size < bytes) {
    if (bytes > 0) throw new NnError('CHECKPOINT_INVALID', `${path}: only ${size} of ${bytes} bytes have arrived`, { path, resend: true });
    await (await open(path, 'a')).close();
  }
  if ((await sha256File(path)) !== sha256) {
    await rm(path, { force: true });
    throw new NnError('CHECKPOINT_INVALID', `${path}: what has arrived is not what was sent`, { path, resend: true });
  }
  const file = await open(path, 'r+');
  await file.sync();
  await file.close();
}

async function copySynced(from: string, to: string): Promise<void> {
  await copyFile(from, to);
  const file = await open(to, 'r+');
  await file.sync();
  await file.close();
}
