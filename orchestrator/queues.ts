/**
 * BullMQ, and the only file of the orchestrator that imports it: typed adding, flows, looking up, removing, the stream of
 * job events, and the worker of `runs`. Every option of BullMQ is passed, none assumed. It knows jobs and their ids, and
 * nothing of what a run does next (run-machine.ts). Used by driver.ts, main.ts, client.ts and the server.
 */
import { FlowProducer, Queue, QueueEvents, WaitingError, Worker } from 'bullmq';
import type { ConnectionOptions, FlowJob, Job, JobsOptions } from 'bullmq';
import { decodeFailure } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import { workerQueue } from '../config/keys.ts';
import { PROTOCOL } from '../config/messages.ts';
import type { Redis } from '../config/redis.ts';
import type { Config } from '../config/schema.ts';
import { parseJobId } from './run-state.ts';
import type { JobAddress, NewJob, QueueAddress } from './run-state.ts';

/** Ended jobs that a queue keeps, so that an orchestrator that was away finds their results. The end of a run removes its own. */
const ENDED_KEPT = 1_000;
/** A run survives any number of orchestrators, so losing one is no reason to fail its job. */
const RUNS_MAX_STALLED = 1_000_000;
const EVENTS_KEPT = 10_000;
/** The events of `runs` have no reader. */
const RUNS_EVENTS_KEPT = 10;
/** Most milliseconds that a blocked read of events lasts before it is begun anew. */
const EVENTS_BLOCK_MS = 10_000;

export type JobEvent =
  | { readonly type: 'progress'; readonly id: string; readonly data: unknown }
  | { readonly type: 'completed'; readonly id: string; readonly result: unknown }
  | { readonly type: 'failed'; readonly id: string; readonly error: ErrorRecord };

export type JobStatus = { readonly state: 'pending' | 'missing' } | { readonly state: 'completed'; readonly result: unknown } | { readonly state: 'failed'; readonly error: ErrorRecord };

export interface FoundJob extends JobAddress {
  readonly data: unknown;
  readonly processedAtMs: number | null;
  /** The last progress that it reported; null: none. */
  readonly progress: unknown;
  readonly status: JobStatus;
}

export interface QueueCounts {
  readonly waiting: number;
  readonly active: number;
  readonly delayed: number;
  readonly failed: number;
  readonly completed: number;
}

const nameOf = ({ queue, worker }: QueueAddress): string => (worker === null ? queue : workerQueue(queue, worker));
const runJobId = (run: string): string => `run.${run}`;

export class Queues {
  readonly #config: Config;
  readonly #redis: Redis;
  readonly #connection: ConnectionOptions;
  readonly #onError: (error: Error) => void;
  readonly #queues = new Map<string, Queue>();
  readonly #events = new Map<string, Promise<QueueEvents>>();
  readonly #listeners = new Map<string, (event: JobEvent) => void>();
  #flows: FlowProducer | null = null;

  /** `redis`: a connection that waits for Redis as long as it takes (purpose `blocking`); it is shared, and closed by its owner. */
  constructor(config: Config, redis: Redis, onError: (error: Error) => void) {
    this.#config = config;
    this.#redis = redis;
    this.#connection = redis;
    this.#onError = onError;
  }

  /** The queue of that name; made at its first use. */
  queue(name: string): Queue {
    const known = this.#queues.get(name);
    if (known !== undefined) return known;
    const queue = new Queue(name, {
      connection: this.#connection,
      prefix: this.#config.redis.prefix,
      skipVersionCheck: true,
      streams: { events: { maxLen: name === 'runs' ? RUNS_EVENTS_KEPT : EVENTS_KEPT } },
    });
    queue.on('error', this.#onError);
    this.#queues.set(name, queue);
    return queue;
  }

  #options(id: string): JobsOptions {
    const { attempts, backoffMs } = this.#config.queue;
    return {
      jobId: id,
      attempts,
      backoff: { type: 'exponential', delay: backoffMs },
      removeOnComplete: { count: ENDED_KEPT },
      removeOnFail: { count: ENDED_KEPT },
      stackTraceLimit: 1,
    };
  }

  /** Adds a job once: an id that is there already is left as it is. */
  async add(job: NewJob): Promise<void> {
    await this.watch(job);
    const shared = job.worker === null ? { priority: job.priority } : {};
    await this.queue(nameOf(job)).add(job.name, { ...job.data, protocol: PROTOCOL }, { ...this.#options(job.id), ...shared });
  }

  /** Adds parent and children at once. A child that fails for good fails its parent, so that none waits for ever. */
  async addFlow(parent: NewJob, children: readonly NewJob[]): Promise<void> {
    for (const queue of new Set([parent, ...children].map(nameOf))) if (!this.#events.has(queue)) await this.#watch(queue);
    const { prefix } = this.#config.redis;
    this.#flows ??= this.#flowProducer();
    const flow: FlowJob = {
      name: parent.name,
      queueName: nameOf(parent),
      prefix,
      data: { ...parent.data, protocol: PROTOCOL },
      opts: this.#options(parent.id),
      children: children.map((child) => ({
        name: child.name,
        queueName: nameOf(child),
        prefix,
        data: { ...child.data, protocol: PROTOCOL },
        opts: { ...this.#options(child.id), ...(child.worker === null ? { priority: child.priority } : {}), failParentOnFailure: true },
      })),
    };
    await this.#flows.add(flow);
  }

  #flowProducer(): FlowProducer {
    const flows = new FlowProducer({ connection: this.#connection, prefix: this.#config.redis.prefix, skipVersionCheck: true });
    flows.on('error', this.#onError);
    return flows;
  }

  /** Hears the events of an address's queue from now on. Must come before a job is added there. */
  async watch(address: QueueAddress): Promise<void> {
    const name = nameOf(address);
    if (!this.#events.has(name)) await this.#watch(name);
    else await this.#events.get(name);
  }

  #watch(name: string): Promise<QueueEvents> {
    const opening = this.#openEvents(name);
    this.#events.set(name, opening);
    opening.catch(() => this.#events.delete(name));
    return opening;
  }

  async #openEvents(name: string): Promise<QueueEvents> {
    // Reads on from the last event there is now: '$' would mean from whenever the first read reaches Redis.
    const [last] = await this.#redis.xrevrange(this.queue(name).toKey('events'), '+', '-', 'COUNT', 1);
    const events = new QueueEvents(name, {
      connection: this.#connection,
      prefix: this.#config.redis.prefix,
      skipVersionCheck: true,
      autorun: true,
      lastEventId: last?.[0] ?? '0-0',
      blockingTimeout: Math.min(EVENTS_BLOCK_MS, this.#config.redis.silenceMs / 2),
    });
    events.on('error', this.#onError);
    events.on('progress', ({ jobId, data }) => this.#tell({ type: 'progress', id: jobId, data }));
    events.on('completed', ({ jobId, returnvalue }) => this.#tell({ type: 'completed', id: jobId, result: returnvalue }));
    events.on('failed', ({ jobId, failedReason }) => this.#tell({ type: 'failed', id: jobId, error: decodeFailure(failedReason) }));
    return events;
  }

  #tell(event: JobEvent): void {
    const run = parseJobId(event.id)?.run;
    if (run !== undefined) this.#listeners.get(run)?.(event);
  }

  /** `listener` hears of every job of the run, whatever its epoch. One listener a run. */
  listen(run: string, listener: (event: JobEvent) => void): void {
    this.#listeners.set(run, listener);
  }

  unlisten(run: string, listener: (event: JobEvent) => void): void {
    if (this.#listeners.get(run) === listener) this.#listeners.delete(run);
  }

  async lookup(address: JobAddress): Promise<JobStatus> {
    const job: Job | undefined = await this.queue(nameOf(address)).getJob(address.id);
    return job === undefined ? { state: 'missing' } : statusOf(job);
  }

  /** Every job of a run in the shared queues and those of `workers`, in order of step. */
  async jobsOf(run: string, workers: readonly string[]): Promise<FoundJob[]> {
    const addresses: QueueAddress[] = [null, ...workers].flatMap((worker) => [{ queue: 'train', worker } as const, { queue: 'eval', worker } as const]);
    const found: FoundJob[] = [];
    for (const address of addresses) {
      const jobs = (await this.queue(nameOf(address)).getJobs(['waiting', 'prioritized', 'delayed', 'active', 'waiting-children', 'completed', 'failed'], 0, ENDED_KEPT)) as (Job | undefined)[];
      for (const job of jobs) {
        if (job?.id === undefined || parseJobId(job.id)?.run !== run) continue;
        found.push({ ...address, id: job.id, data: job.data as unknown, processedAtMs: job.processedOn ?? null, progress: job.progress === 0 ? null : job.progress, status: statusOf(job) });
      }
    }
    return found.sort((a, b) => parseJobId(a.id)!.step - parseJobId(b.id)!.step);
  }

  /** The progress that a job reported so far, oldest first, as far as the queue's stream of events goes back. */
  async progressOf(address: JobAddress): Promise<unknown[]> {
    const entries = await this.#redis.xrange(this.queue(nameOf(address)).toKey('events'), '-', '+');
    const reports: unknown[] = [];
    for (const [, fields] of entries) {
      const entry: Record<string, string> = {};
      for (let index = 0; index + 1 < fields.length; index += 2) entry[fields[index]!] = fields[index + 1]!;
      if (entry['event'] === 'progress' && entry['jobId'] === address.id) reports.push(JSON.parse(entry['data']!));
    }
    return reports;
  }

  /** Removes those that no worker holds; the others end by themselves, since their epoch is over. Flows: name the parent first. */
  async remove(jobs: readonly JobAddress[]): Promise<void> {
    await Promise.all(jobs.map((job) => this.queue(nameOf(job)).remove(job.id, { removeChildren: false })));
  }

  /**
   * Removes every job of a run up to an epoch, wherever: those held by a worker once it lets go, or after `waitMs` at the
   * latest. Jobs of later epochs are those of another attempt.
   */
  async erase(run: string, throughEpoch: number, waitMs: number): Promise<void> {
    const deadline = Date.now() + waitMs;
    for (;;) {
      const jobs = await this.#keysOf(run, throughEpoch);
      const ids = [...jobs.values()];
      if (ids.length === 0) return;
      const force = Date.now() >= deadline;
      for (const { name, id } of ids) {
        if (force) await this.#redis.del(`${this.queue(name).toKey(id)}:lock`);
        await this.queue(name).remove(id, { removeChildren: false });
      }
      if ((await this.#keysOf(run, throughEpoch)).size === 0) return;
      if (force) {
        await this.#redis.unlink([...(await this.#keysOf(run, throughEpoch)).keys()]);
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, 25));
    }
  }

  /** Redis keys of the run's jobs -> queue and id. */
  async #keysOf(run: string, throughEpoch: number): Promise<Map<string, { name: string; id: string }>> {
    const { prefix } = this.#config.redis;
    const found = new Map<string, { name: string; id: string }>();
    let cursor = '0';
    do {
      const [next, page] = await this.#redis.scan(cursor, 'MATCH', `${prefix}:*:${run}.*`, 'COUNT', 1000);
      cursor = next;
      for (const key of page) {
        const [name, id] = key.slice(prefix.length + 1).split(':', 2) as [string, string];
        const parts = parseJobId(id);
        if (parts?.run === run && parts.epoch <= throughEpoch) found.set(key, { name, id });
      }
    } while (cursor !== '0');
    return found;
  }

  /** Empties the event streams of the queues, which otherwise keep the last events of runs long gone. */
  async trimEvents(): Promise<void> {
    await Promise.all([...this.#queues.values()].map((queue) => queue.trimEvents(0)));
  }

  /** Puts a run where an orchestrator takes it; once, however often it is called. */
  async addRun(run: string, priority: number): Promise<void> {
    await this.queue('runs').add('run', { run }, { jobId: runJobId(run), attempts: 1, priority, removeOnComplete: true, removeOnFail: true, stackTraceLimit: 1 });
  }

  /** Whether the run's job is still in `runs`. */
  async hasRun(run: string): Promise<boolean> {
    return (await this.#redis.exists(this.queue('runs').toKey(runJobId(run)))) === 1;
  }

  /** A client's job on a shared queue. Returns its id. */
  async request(queue: 'eval' | 'generate', id: string, data: object): Promise<void> {
    await this.queue(queue).add(queue, { ...data, protocol: PROTOCOL }, { ...this.#options(id), removeOnComplete: { age: 600, count: ENDED_KEPT }, removeOnFail: { age: 600, count: ENDED_KEPT } });
  }

  async requestStatus(queue: 'eval' | 'generate', id: string): Promise<JobStatus> {
    return this.lookup({ queue: queue as 'eval', worker: null, id });
  }

  async removeRequest(queue: 'eval' | 'generate', id: string): Promise<void> {
    await this.queue(queue).remove(id, { removeChildren: false });
  }

  async counts(name: string): Promise<QueueCounts> {
    const counts = await this.queue(name).getJobCounts('waiting', 'prioritized', 'active', 'delayed', 'waiting-children', 'failed', 'completed');
    const of = (state: string): number => counts[state] ?? 0;
    return { waiting: of('waiting') + of('prioritized') + of('waiting-children'), active: of('active'), delayed: of('delayed'), failed: of('failed'), completed: of('completed') };
  }

  /**
   * Takes runs and drives each with `drive` until it returns: `done`, or `handover` to give the run back for another
   * orchestrator. The signal fires when the run is lost to another (the lock was not renewed in time) or on `stop`. `onGone`
   * is called when the job of a run has left the queue, so that another may be added.
   */
  serveRuns(drive: (run: string, signal: AbortSignal) => Promise<'done' | 'handover'>, onGone: (run: string) => void): { stop(): Promise<void> } {
    const { queue, orchestrator, redis } = this.#config;
    // Nothing heavy runs beside it, so that its lock may be shorter than that of a job that computes.
    const lockMs = Math.min(orchestrator.runLockMs, queue.lockDurationMs);
    const driving = new Map<string, AbortController>();
    let stopping = false;
    const worker = new Worker(
      'runs',
      async (job: Job, token?: string) => {
        const controller = new AbortController();
        driving.set(job.id!, controller);
        if (stopping) controller.abort('stop');
        const outcome = await drive((job.data as { run: string }).run, controller.signal).finally(() => driving.delete(job.id!));
        if (outcome === 'done') return;
        if (controller.signal.reason !== 'lost') await job.moveToWait(token);
        throw new WaitingError();
      },
      {
        connection: this.#connection,
        prefix: redis.prefix,
        skipVersionCheck: true,
        concurrency: orchestrator.concurrency,
        lockDuration: lockMs,
        lockRenewTime: Math.floor(lockMs / 3),
        stalledInterval: Math.min(queue.stalledIntervalMs, Math.ceil(lockMs / 4)),
        maxStalledCount: RUNS_MAX_STALLED,
        drainDelay: 1,
        runRetryDelay: redis.retryMaximumMs,
        autorun: true,
        removeOnComplete: { count: 0 },
        removeOnFail: { count: 0 },
      },
    );
    worker.on('error', this.#onError);
    worker.on('completed', (job: Job) => onGone((job.data as { run: string }).run));
    worker.on('lockRenewalFailed', (ids) => {
      for (const id of ids) driving.get(id)?.abort('lost');
    });
    return {
      stop: async () => {
        stopping = true;
        await worker.pause(true);
        for (const controller of driving.values()) controller.abort('stop');
        await worker.close();
      },
    };
  }

  async close(): Promise<void> {
    const events = await Promise.allSettled(this.#events.values());
    await Promise.allSettled([
      ...events.flatMap((each) => (each.status === 'fulfilled' ? [each.value.close()] : [])),
      ...[...this.#queues.values()].map((queue) => queue.close()),
      ...(this.#flows === null ? [] : [this.#flows.close()]),
    ]);
  }
}

function statusOf(job: Job): JobStatus {
  if (job.finishedOn === undefined) return { state: 'pending' };
  if (job.failedReason !== undefined && job.failedReason !== '') return { state: 'failed', error: decodeFailure(job.failedReason) };
  return { state: 'completed', result: job.returnvalue as unknown };
}
