/**
 * The disk cache of files from the store, shared by all workers of a machine: directories named by the sha-256 of what they
 * hold, so that one that is there is right. Bounded in bytes: what was used longest ago goes first, what any process has in
 * use never. Unfinished downloads outlive their process and are carried on by the next. Tens of gigabytes take seconds to remove, so
 * that is never done on the thread. Knows no network. Called by store.ts.
 *
 *   <home>/cache/<address>/...                               a set of files; its mtime is its last use
 *   <home>/cache/.<address>.<host>.<process>.<random>.partial  one on its way
 *   <home>/cache/<address>.rest                               what has come of one that nobody is fetching now
 *   <home>/cache/.<address>.<host>.<process>.<random>.used     an empty mark: that process uses it
 *   <home>/cache/.run.<host>.<process>.<random>.work         checkpoints being written by that process
 */
import { closeSync, lstatSync, mkdirSync, openSync, readdirSync, renameSync, rmSync, statSync, utimesSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { NnError } from '../config/errors.ts';
import type { ListedFiles } from '../config/store.ts';
import { bytesIn } from '../data/listing.ts';
import { fileError, forgetTemporary, onFile, systemCode, temporaryAt, temporaryName } from '../data/files.ts';

/** Milliseconds between looks at a download that another process of this machine has under way. */
const LOOK_MS = 200;

const ADDRESS = /^[0-9a-f]{64}$/;
const REST = /^[0-9a-f]{64}\.rest$/;

export class Cache {
  readonly #directory: string;
  readonly #capacityBytes: number;
  readonly #expireMs: number;
  readonly #marks = new Map<string, { readonly path: string; holders: number }>();
  #work: string | null = null;

  constructor(directory: string, { cacheBytes, expireMs }: { cacheBytes: number; expireMs: number }) {
    this.#directory = directory;
    this.#capacityBytes = cacheBytes;
    this.#expireMs = expireMs;
  }

  /** Makes the directory, and removes what processes that are gone left and nobody can use. Throws DISK_FULL, FILE_NOT_FOUND. */
  async open(): Promise<void> {
    onFile(this.#directory, () => mkdirSync(this.#directory, { recursive: true, mode: 0o700 }));
    for (const name of this.#names()) {
      const path = join(this.#directory, name);
      const temporary = temporaryAt(path);
      const carriedOn = REST.test(name) || temporary?.ending === 'partial';
      if (!REST.test(name) && temporary?.owner !== 'gone') continue;
      if (!carriedOn || Date.now() - mtimeOf(path) > this.#expireMs) await removeAll(path);
    }
  }

  /** A directory of this process to write checkpoints in. */
  work(): string {
    if (this.#work === null) {
      this.#work = temporaryName(join(this.#directory, 'run'), 'work');
      onFile(this.#work, () => mkdirSync(this.#work!, { recursive: true }));
    }
    return this.#work;
  }

  /** Keeps what has this address, now or once it comes, until `release`; calls add up. */
  hold(address: string): void {
    const mark = this.#marks.get(address);
    if (mark !== undefined) {
      mark.holders++;
      touch(mark.path); // a mark that nobody touched for a day is a dead one
      return;
    }
    const path = temporaryName(join(this.#directory, address), 'used');
    onFile(path, () => closeSync(openSync(path, 'w')));
    this.#marks.set(address, { path, holders: 1 });
  }

  release(address: string): void {
    const mark = this.#marks.get(address);
    if (mark === undefined || --mark.holders > 0) return;
    this.#marks.delete(address);
    rmSync(mark.path, { force: true });
    forgetTemporary(mark.path);
  }

  /** The directory that has this address, or null. It counts as used now; it stays only while it is held. */
  find(address: string): string | null {
    const path = join(this.#directory, address);
    return touch(path) ? path : null;
  }

  /**
   * The directory of this address, made by `fill` if it is not there: in a directory that may hold part of it already. One
   * process of a machine fills it, the others wait. The address must be held. Throws what `fill` throws, CANCELLED.
   */
  async get(address: string, files: ListedFiles, fill: (directory: string) => Promise<void>, signal?: AbortSignal): Promise<string> {
    for (;;) {
      const found = this.find(address);
      if (found !== null) return found;
      const partial = this.#takePartial(address);
      if (partial !== null) {
        try {
          await this.makeRoom(bytesIn(files));
          await fill(partial);
          return await this.publish(address, partial);
        } catch (error) {
          await this.#leave(address, partial);
          throw error;
        } finally {
          forgetTemporary(partial);
        }
      }
      await pause(LOOK_MS, undefined, signal === undefined ? {} : { signal }).catch((error: unknown) => {
        throw new NnError('CANCELLED', 'the transfer was given up, because its job is', {}, error);
      });
    }
  }

  /** Gives a complete and verified directory its address; returns where it is. */
  async publish(address: string, complete: string): Promise<string> {
    const path = join(this.#directory, address);
    try {
      renameSync(complete, path);
    } catch (error) {
      if (!['ENOTEMPTY', 'EEXIST'].includes(systemCode(error) ?? '')) throw fileError(error, path);
      await removeAll(complete);
    }
    this.find(address);
    return path;
  }

  /** Removes what has this address: it is damaged. */
  async drop(address: string): Promise<void> {
    await this.#remove([join(this.#directory, address)]);
  }

  /** Removes what was used longest ago until `bytes` more fit into the bound, or nothing is left that may go. */
  async makeRoom(bytes: number): Promise<void> {
    const names = this.#names();
    const used = new Set(names.flatMap((name) => {
      const temporary = temporaryAt(join(this.#directory, name));
      return temporary?.ending === 'used' && temporary.owner !== 'gone' ? [temporary.name] : [];
    }));
    for (const address of this.#marks.keys()) used.add(address);
    const entries = names.map((name) => join(this.#directory, name)).map((path) => ({ path, bytes: bytesAt(path), usedMs: mtimeOf(path) }));
    let total = entries.reduce((sum, entry) => sum + entry.bytes, 0);
    const mayGo = entries.filter(({ path }) => {
      const temporary = temporaryAt(path);
      if (temporary !== null) return temporary.ending === 'partial' && temporary.owner === 'gone';
      return REST.test(basename(path)) || (ADDRESS.test(basename(path)) && !used.has(basename(path)));
    });
    const going: string[] = [];
    for (const entry of mayGo.sort((a, b) => a.usedMs - b.usedMs)) {
      if (total + bytes <= this.#capacityBytes) break;
      going.push(entry.path);
      total -= entry.bytes;
    }
    await this.#remove(going);
  }

  /** This process is done: its marks and its unfinished checkpoints go. */
  close(): void {
    for (const { path } of this.#marks.values()) rmSync(path, { force: true });
    this.#marks.clear();
    if (this.#work !== null) rmSync(this.#work, { recursive: true, force: true });
  }

  /** A directory to fill: one that a process left behind, or a new one; null while another process of this machine fills one. */
  #takePartial(address: string): string | null {
    const paths = this.#names().map((name) => join(this.#directory, name)).filter((path) => {
      const temporary = temporaryAt(path);
      return temporary?.ending === 'partial' && temporary.name === address;
    });
    if (paths.some((path) => temporaryAt(path)!.owner === 'active')) return null;
    const own = temporaryName(join(this.#directory, address));
    for (const path of [this.#restOf(address), ...paths.filter((each) => temporaryAt(each)!.owner === 'gone')]) {
      try {
        renameSync(path, own);
        return own;
      } catch (error) {
        if (systemCode(error) !== 'ENOENT') throw fileError(error, path); // another process was faster
      }
    }
    onFile(own, () => mkdirSync(own));
    return own;
  }

  /** What has come of a download that ends here stays for whoever carries it on; its name must not tell of this process, which lives on. */
  async #leave(address: string, partial: string): Promise<void> {
    try {
      renameSync(partial, this.#restOf(address));
    } catch (error) {
      if (!['ENOTEMPTY', 'EEXIST', 'ENOENT'].includes(systemCode(error) ?? '')) throw fileError(error, partial);
      await removeAll(partial);
    }
  }

  #restOf(address: string): string {
    return join(this.#directory, `${address}.rest`);
  }

  /** Renames first, at once: whoever looks for one meanwhile finds all of it or nothing, and nobody begins to use what is going. */
  async #remove(paths: readonly string[]): Promise<void> {
    const aways = paths.map((path) => {
      const away = temporaryName(join(this.#directory, 'removed'), 'replaced');
      try {
        renameSync(path, away);
      } catch (error) {
        if (systemCode(error) !== 'ENOENT') throw error;
      }
      return away;
    });
    for (const away of aways) {
      await removeAll(away);
      forgetTemporary(away);
    }
  }

  #names(): string[] {
    return onFile(this.#directory, () => readdirSync(this.#directory));
  }
}

const removeAll = (path: string): Promise<void> => rm(path, { recursive: true, force: true });

/** Says that a path was used now; false when it is not there. */
function touch(path: string): boolean {
  try {
    const now = new Date();
    utimesSync(path, now, now);
    return true;
  } catch (error) {
    if (systemCode(error) === 'ENOENT') return false;
    throw error;
  }
}

const mtimeOf = (path: string): number => lstatSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;

/** Bytes of all files below a directory; one that goes away meanwhile has none. */
function bytesAt(path: string): number {
  const found = statSync(path, { throwIfNoEntry: false });
  if (found === undefined || !found.isDirectory()) return 0;
  const entries = readdirSync(path, { recursive: true, encoding: 'utf8' }).map((name) => statSync(join(path, name), { throwIfNoEntry: false }));
  return entries.reduce((sum, entry) => sum + (entry?.isFile() === true ? entry.size : 0), 0);
}
