/**
 * The files of jobs on a machine that does not share the orchestrator's file system: before a task goes to the compute thread,
 * what it names is brought into the cache; the checkpoint that it writes is delivered before its job completes. Jobs keep the
 * orchestrator's paths throughout; only the compute thread is told where they lie here (places.ts). Called by worker.ts.
 */
import { statSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join, resolve } from 'node:path';
import { branchOf, checkpointName } from '../config/branches.ts';
import { NnError } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import type { Message, Origin } from '../config/messages.ts';
import { parseRunSpec } from '../config/run-spec.ts';
import type { RunSpec } from '../config/run-spec.ts';
import type { Config } from '../config/schema.ts';
import { SINGLE, isListedName, roleOf } from '../config/store.ts';
import type { Listing, Role } from '../config/store.ts';
import { addressOf, bytesIn, sha256File } from '../data/listing.ts';
import { MANIFEST, readManifest } from '../data/manifest.ts';
import { Cache } from './cache.ts';
import { StoreClient } from './store-client.ts';
import type { JobTask, ReplicaState, TaskOf } from './tasks.ts';

/** A file or directory that a task needs: its path as the job names it, and what it is to the run. */
interface Need {
  readonly path: string;
  readonly run: string;
  readonly role: Role;
}

/** What is local for one task. */
export interface Prepared {
  /** Path as the job names it -> path here. */
  readonly local: Readonly<Record<string, string>>;
  /** Path as the job names it -> what the cache holds it under. */
  readonly held: ReadonlyMap<string, { readonly address: string; readonly listing: Listing }>;
}

export interface StoreOptions {
  readonly config: Config;
  readonly log: (level: 'debug' | 'info' | 'warn', message: string) => void;
}

export class Store {
  readonly #client: StoreClient;
  readonly #cache: Cache;
  readonly #log: StoreOptions['log'];
  /** What the last task needed stays held: its replica is here, and the run's next job needs most of it again. */
  #kept: readonly string[] = [];
  /** What the checkpoint that is being written needs stays held until the next one. */
  #forWriter: readonly string[] = [];
  /** What the roles of the last job's run hold, so that the next job asks for nothing. A run is told by its name and spec. */
  #known = { run: '', listings: new Map<Role, Listing>() };

  /** Throws USAGE for an address that is none. */
  constructor({ config, log }: StoreOptions) {
    this.#client = new StoreClient(config, (message) => log('info', `store: ${message}`));
    this.#cache = new Cache(join(resolve(config.home), 'cache'), config.store);
    this.#log = log;
  }

  /** Throws STORE_UNAVAILABLE, STORE_AUTH, DISK_FULL. */
  async open(): Promise<void> {
    await this.#client.check();
    await this.#cache.open();
  }

  close(): void {
    this.#cache.close();
  }

  /**
   * Brings what a task needs to this machine. `replica`: what the compute thread holds, which decides whether a checkpoint is
   * needed; `all`: it does not matter. Throws FILE_NOT_FOUND (in terms of the job's paths), STORE_*, DISK_FULL, CANCELLED.
   */
  async prepare(task: TaskOf<JobTask>, replica: ReplicaState, signal: AbortSignal, all = false): Promise<Prepared> {
    const needs = await this.#needs(task, replica, signal, all);
    const held = new Map<string, { address: string; listing: Listing }>();
    const local: Record<string, string> = {};
    const listings = this.#listingsOf(originOf(task));
    const settled = await Promise.allSettled(needs.map(async (need) => {
      const listing = listings.get(need.role) ?? (await this.#client.listing(need.run, need.role, signal));
      listings.set(need.role, listing);
      const address = addressOf(listing.files);
      this.#cache.hold(address);
      held.set(need.path, { address, listing });
      const directory = await this.#cache.get(address, listing.files, (into) => this.#fill(need, listing, into, signal), signal);
      local[need.path] = listing.files[SINGLE] === undefined ? directory : join(directory, SINGLE);
    }));
    for (const address of this.#kept) this.#cache.release(address);
    this.#kept = [...held.values()].map(({ address }) => address);
    for (const each of settled) if (each.status === 'rejected') throw named(each.reason, needs);
    if (task.kind === 'checkpoint') {
      for (const address of this.#kept) this.#cache.hold(address);
      for (const address of this.#forWriter) this.#cache.release(address);
      this.#forWriter = this.#kept;
      local[task.message.directory] = this.written(task.message);
    }
    return { local, held };
  }

  /** Whether a failure of the task was the cache's: something in it is damaged, which is removed, or was needed and not there. Prepare again then. */
  async isToBlame(record: ErrorRecord, { local, held }: Prepared): Promise<boolean> {
    if (!['FILE_NOT_FOUND', 'CHECKPOINT_INVALID', 'TOKEN_FILE_INVALID', 'TOKENIZER_INVALID'].includes(record.code)) return false;
    let blamed = false;
    for (const [path, { address, listing }] of held) {
      if (await this.#isWhole(local[path], listing)) continue;
      this.#log('warn', `store: what the cache held of ${path} is damaged; it is fetched again`);
      await this.#cache.drop(address);
      this.#known.listings.clear();
      blamed = true;
    }
    const path = record.context['path'];
    return blamed || (record.code === 'FILE_NOT_FOUND' && typeof path === 'string' && !Object.values(local).some((each) => path.startsWith(each)));
  }

  /** Delivers the checkpoint that the task wrote here; it is complete on the orchestrator's disk when this returns. Throws STORE_*, DISK_FULL, CANCELLED. */
  async deliver(message: Message<'checkpoint'>, signal: AbortSignal): Promise<void> {
    const { run, step, epoch, rollbacks } = message;
    const name = checkpointName(step, branchOf(rollbacks, step));
    const directory = this.written(message);
    const manifest = readManifest(directory);
    if (manifest === null) throw new NnError('CHECKPOINT_INVALID', `${directory}: manifest.json is missing: the checkpoint is incomplete`, { path: directory });
    const { sentBytes } = await this.#client.deliver(run, name, epoch, directory, manifest, signal).catch(async (error: unknown) => {
      // Whoever gets the job next writes it again, in less time than it takes to send.
      await rm(directory, { recursive: true, force: true });
      throw error;
    });
    this.#log('info', `store: checkpoint ${name} of run ${run} delivered, ${sentBytes} of ${bytesIn(manifest.files)} bytes sent`);
    // What was written here need not be fetched should it be needed.
    const path = join(directory, MANIFEST);
    const own = { bytes: statSync(path).size, sha256: await sha256File(path) };
    await this.#cache.publish(addressOf({ ...manifest.files, [MANIFEST]: own }), directory);
    await this.#cache.makeRoom(0);
  }

  /** The record with the paths that the job names in place of those here; a disk that is full is the one here. */
  inTermsOfTheJob(record: ErrorRecord, local: Prepared['local']): ErrorRecord {
    if (record.code === 'DISK_FULL') return { ...record, message: `${hostname()}: ${record.message}` };
    const replace = (text: string): string => Object.entries(local).reduce((all, [path, here]) => all.replaceAll(here, path), text);
    const context = Object.fromEntries(Object.entries(record.context).map(([key, value]) => [key, typeof value === 'string' ? replace(value) : value]));
    return { ...record, message: replace(record.message), context };
  }

  /** Where a checkpoint is written here before it is delivered. */
  written({ run, step, rollbacks }: Pick<Message<'checkpoint'>, 'run' | 'step' | 'rollbacks'>): string {
    return join(this.#cache.work(), run, checkpointName(step, branchOf(rollbacks, step)));
  }

  async #needs(task: TaskOf<JobTask>, replica: ReplicaState, signal: AbortSignal, all: boolean): Promise<Need[]> {
    if (task.kind === 'generate') return [await this.#checkpointNeed(task.message.checkpoint, signal)];
    if (task.kind === 'eval' && task.message.replica === null) {
      if (task.message.checkpoint === null) return [];
      const checkpoint = await this.#checkpointNeed(task.message.checkpoint, signal);
      return [checkpoint, await this.#dataNeed(task.message.data, checkpoint.run, signal)];
    }
    const origin: Origin = task.kind === 'eval' ? task.message.replica! : task.message;
    const spec = parseRunSpec(origin.spec, `spec of run ${origin.run}`);
    const { run } = origin;
    const needs: Need[] = [{ run, role: 'train', path: spec.data.train }];
    if (task.kind === 'eval') needs.push(evalNeed(run, spec, task.message.data));
    if (task.kind === 'checkpoint' && spec.data.tokenizer !== undefined) needs.push({ run, role: 'tokenizer', path: spec.data.tokenizer });
    const version = versionOf(task);
    const near = !all && replica !== null && replica.run === run && replica.step <= version && (replica.branch ?? 0) === branchOf(origin.rollbacks, replica.step);
    const saved = origin.checkpoint !== null && origin.checkpoint.step <= version ? origin.checkpoint : null;
    if (saved !== null && !(near && replica.step >= saved.step)) needs.push({ run, role: checkpointName(saved.step, branchOf(origin.rollbacks, saved.step)), path: saved.directory });
    if (saved === null && !near && spec.initialCheckpoint !== undefined) needs.push({ run, role: 'initial', path: spec.initialCheckpoint });
    return needs.filter((need, index) => needs.findIndex(({ path }) => path === need.path) === index);
  }

  /** A checkpoint that a request names by its path on the orchestrator's host: only one of a run can be had. */
  async #checkpointNeed(path: string, signal: AbortSignal): Promise<Need> {
    const match = /\/([a-z0-9][a-z0-9._-]{0,63})\/checkpoints\/(step-\d+(?:-branch-\d+)?)\/?$/.exec(path);
    const role = roleOf(match?.[2] ?? '');
    if (match === null || role === null) throw outOfReach(path);
    const { checkpoints } = await this.#client.paths(match[1]!, signal);
    if (join(checkpoints, role) !== path.replace(/\/$/, '')) throw outOfReach(path);
    return { run: match[1]!, role, path };
  }

  async #dataNeed(path: string, run: string, signal: AbortSignal): Promise<Need> {
    const { paths } = await this.#client.paths(run, signal);
    const role = (['validation', 'train'] as const).find((each) => paths[each] === path);
    if (role === undefined) throw outOfReach(path);
    return { run, role, path };
  }

  async #fill(need: Need, { files }: Listing, into: string, signal: AbortSignal): Promise<void> {
    const startedAt = performance.now();
    const listed = Object.entries(files).filter(([name]) => isListedName(name));
    const settled = await Promise.allSettled(listed.map(([name, file]) => this.#client.download(need.run, need.role, file, join(into, name), signal)));
    // Not before the last has ended: the directory is another's from then on.
    for (const each of settled) if (each.status === 'rejected') throw each.reason;
    const bytes = settled.reduce((sum, each) => sum + (each.status === 'fulfilled' ? each.value : 0), 0);
    this.#log('info', `store: ${need.role} of run ${need.run} fetched, ${bytes} of ${bytesIn(files)} bytes, in ${Math.round(performance.now() - startedAt)} ms`);
  }

  async #isWhole(path: string | undefined, { files }: Listing): Promise<boolean> {
    for (const [name, { sha256 }] of Object.entries(files)) {
      if (path === undefined) return false;
      const file = name === SINGLE ? path : join(path, name);
      if ((await sha256File(file).catch(() => null)) !== sha256) return false;
    }
    return true;
  }

  #listingsOf(origin: Origin | null): Map<Role, Listing> {
    const run = origin === null ? '' : `${origin.run} ${JSON.stringify(origin.spec)}`;
    if (run === '' || this.#known.run !== run) this.#known = { run, listings: new Map() };
    return this.#known.listings;
  }
}

/** The version that a task begins on. */
function versionOf(task: TaskOf<Exclude<JobTask, 'generate'>>): number {
  switch (task.kind) {
    case 'steps':
      return task.message.fromStep;
    case 'shard':
    case 'reduce':
      return task.message.step - 1;
    case 'checkpoint':
    case 'digest':
      return task.message.step;
    case 'eval':
      return task.message.replica?.step ?? 0;
  }
}

function evalNeed(run: string, { data }: RunSpec, path: string): Need {
  const role = path === data.validation ? 'validation' : path === data.train ? 'train' : null;
  if (role === null) throw outOfReach(path);
  return { run, role, path };
}

function originOf(task: TaskOf<JobTask>): Origin | null {
  if (task.kind === 'generate') return null;
  return task.kind === 'eval' ? task.message.replica : task.message;
}

const outOfReach = (path: string): NnError =>
  new NnError(
    'FILE_NOT_FOUND',
    `${path} is out of reach of the worker on ${hostname()}, which has no file system in common with the orchestrator (CUDA_NN_STORE_URL): there ` +
      'only checkpoints of runs can be used (RUNS/<run>/checkpoints/step-<n>), with the train or validation file of the same run',
    { path },
  );

/** What the store says of a missing checkpoint names the path that the job does. */
function named(reason: unknown, needs: readonly Need[]): unknown {
  const path = (reason as NnError).context?.['path'];
  const need = needs.find((each) => typeof path === 'string' && path.startsWith(each.path));
  if (!(reason instanceof NnError) || need === undefined) return reason;
  return new NnError(reason.code, reason.message, { ...reason.context, path: need.path }, reason);
}
