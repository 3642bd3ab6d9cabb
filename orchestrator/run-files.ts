/**
 * The files that belong to runs, for the store: finds what a role of a run is on this disk, and lists each file's size and
 * sha-256. Paths come from the run's spec and this orchestrator's directory of runs, never from a request. Knows no HTTP.
 * Called by server/store.ts.
 */
import { readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { NnError, errorCode } from '../config/errors.ts';
import type { RunSpec } from '../config/run-spec.ts';
import { SINGLE, isCheckpoint, isListedName } from '../config/store.ts';
import type { ListedFiles, Listing, Role, RunPaths } from '../config/store.ts';
import { onFile } from '../data/files.ts';
import { sha256File } from '../data/listing.ts';
import { MANIFEST, checkSizes, readManifest } from '../data/manifest.ts';

/** Digests kept of files that are as they were. */
const DIGESTS = 4_096;

interface Digest {
  /** Size, times and inode: while they are the same, so are the contents. */
  readonly identity: string;
  readonly value: Promise<string>;
}

export class RunFiles {
  readonly #runs: string;
  readonly #digests = new Map<string, Digest>();
  /** One file is hashed at a time: the disk is the bound, and this thread has other work. */
  #hashing: Promise<unknown> = Promise.resolve();

  /** `runs`: the absolute directory of runs. */
  constructor(runs: string) {
    this.#runs = runs;
  }

  /** Where the roles of a run lie, as its spec says. */
  paths(run: string, spec: RunSpec): RunPaths {
    const { train, validation, tokenizer } = spec.data;
    const named = { train, validation, tokenizer, initial: spec.initialCheckpoint };
    return { paths: Object.fromEntries(Object.entries(named).filter(([, path]) => path !== undefined)) as Record<string, string>, checkpoints: join(this.#runs, run, 'checkpoints') };
  }

  /** Throws FILE_NOT_FOUND when the run has no such role. */
  pathOf(run: string, spec: RunSpec, role: Role): string {
    const path = isCheckpoint(role) ? join(this.#runs, run, 'checkpoints', role) : this.paths(run, spec).paths[role];
    if (path === undefined) throw new NnError('FILE_NOT_FOUND', `run ${run} has no ${role} file`, { run, role });
    return path;
  }

  /** All files of a role with their digests, which takes as long as hashing them the first time. Throws FILE_NOT_FOUND, CHECKPOINT_INVALID. */
  async listing(run: string, spec: RunSpec, role: Role): Promise<Listing> {
    const path = this.pathOf(run, spec, role);
    const files = role === 'initial' || isCheckpoint(role) ? await this.#directory(path) : { [SINGLE]: await this.#file(path) };
    return { path, files };
  }

  /** Path and size of the file of a role that has this digest. Throws FILE_NOT_FOUND. */
  async find(run: string, spec: RunSpec, role: Role, sha256: string): Promise<{ path: string; bytes: number }> {
    const { path, files } = await this.listing(run, spec, role);
    const found = Object.entries(files).find(([, file]) => file.sha256 === sha256);
    if (found === undefined) throw new NnError('FILE_NOT_FOUND', `${path}: nothing here has the sha-256 ${sha256} any more`, { path });
    return { path: found[0] === SINGLE && role !== 'initial' && !isCheckpoint(role) ? path : join(path, found[0]), bytes: found[1].bytes };
  }

  /** A manifest has the digests already; a directory without one is hashed. */
  async #directory(path: string): Promise<ListedFiles> {
    const found = statSync(path, { throwIfNoEntry: false });
    if (found === undefined || !found.isDirectory()) throw new NnError('FILE_NOT_FOUND', `${path}: no such directory`, { path });
    const manifest = readManifest(path);
    const files: ListedFiles = {};
    if (manifest !== null) {
      checkSizes(path, manifest);
      for (const [name, file] of Object.entries(manifest.files)) if (isListedName(name)) files[name] = file;
      files[MANIFEST] = await this.#file(join(path, MANIFEST));
      return files;
    }
    for (const name of onFile(path, () => readdirSync(path)).sort()) if (isListedName(name)) files[name] = await this.#file(join(path, name));
    return files;
  }

  /** Size and digest of one file; the digest is computed once for as long as the file stays as it is. */
  async #file(path: string): Promise<{ bytes: number; sha256: string }> {
    const found = onFile(path, () => statSync(path));
    if (!found.isFile()) throw new NnError('FILE_NOT_FOUND', `${path}: is no file`, { path });
    const identity = `${found.size} ${found.mtimeMs} ${found.ctimeMs} ${found.ino} ${found.dev}`;
    let known = this.#digests.get(path);
    if (known?.identity !== identity) {
      const value = this.#hashing.then(() => sha256File(path));
      this.#hashing = value.catch((error: unknown) => {
        if (this.#digests.get(path) === known) this.#digests.delete(path);
        return errorCode(error);
      });
      known = { identity, value };
      this.#digests.set(path, known);
      if (this.#digests.size > DIGESTS) this.#digests.delete(this.#digests.keys().next().value!);
    }
    return { bytes: found.size, sha256: await known.value };
  }
}
