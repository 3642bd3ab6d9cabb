/**
 * The world of a worker under test, without the worker: both Redis servers, a config that points there, tokens, and the
 * orchestrator's part of the protocol to be done by hand (control keys, queues, what a job says of its run). It starts no worker:
 * worker-processes.ts does. Used by test/system/worker-*.test.ts.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Queue, QueueEvents } from 'bullmq';
import { keys } from '../../config/keys.ts';
import type { Control } from '../../config/keys.ts';
import type { Origin } from '../../config/messages.ts';
import { openRedis } from '../../config/redis.ts';
import type { Redis } from '../../config/redis.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { startTestRedis } from './redis.ts';
import type { TestRedis } from './redis.ts';
import { tinySpec, writeTinyData } from './tiny-runs.ts';

/** One directory, both Redis servers, and a config that points there. */
export class WorkerWorld {
  readonly directory = mkdtempSync(join(tmpdir(), 'nn-worker-'));
  readonly config: Config;
  /** The Redis of the queues, and that of the exchange. */
  readonly redis: Redis;
  readonly exchange: Redis;
  readonly names: ReturnType<typeof keys>;
  readonly #servers: TestRedis;
  readonly #queues: { close(): Promise<void> }[] = [];
  readonly #connections: Redis[] = [];
  #runs = 0;

  static async start(overrides: Record<string, object> = {}): Promise<WorkerWorld> {
    return new WorkerWorld(await startTestRedis(), overrides);
  }

  private constructor(servers: TestRedis, overrides: Record<string, object>) {
    this.#servers = servers;
    const { url, exchangeUrl } = servers;
    this.config = loadConfig({
      home: this.directory,
      runs: join(this.directory, 'runs'),
      redis: { url, exchangeUrl, retryMaximumMs: 100, ...overrides['redis'] },
      exchange: { chunkBytes: 1 << 18, ...overrides['exchange'] },
      worker: { threads: 1, restartBackoffMs: 50, controlPollMs: 100, heartbeatMs: 100, library: 'cpu', ...overrides['worker'] },
      queue: { stalledIntervalMs: 500, lockDurationMs: 2_000, ...overrides['queue'] },
    });
    this.names = keys(this.config.redis.prefix);
    this.redis = this.connect();
    this.exchange = this.connect(exchangeUrl);
    writeTinyData(this);
  }

  connect(url = this.#servers.url): Redis {
    const redis = openRedis(url, this.config, 'blocking');
    this.#connections.push(redis);
    return redis;
  }

  startRedis(): Promise<void> {
    return this.#servers.start();
  }

  /** SIGKILL: the queues come back with what their disk holds, the exchange empty. */
  killRedis(): Promise<void> {
    return this.#servers.kill();
  }

  /** Deletes everything in both. */
  async clear(): Promise<void> {
    await this.redis.flushall();
    await this.exchange.flushall();
  }

  /** A BullMQ queue and its events, closed at the end. */
  async queue(name: string): Promise<{ queue: Queue; events: QueueEvents }> {
    const options = { connection: this.connect(), prefix: this.config.redis.prefix };
    const queue = new Queue(name, options);
    const events = new QueueEvents(name, options);
    queue.on('error', () => undefined);
    events.on('error', () => undefined);
    this.#queues.push(queue, events);
    await events.waitUntilReady();
    return { queue, events };
  }

  /** What the run is told, or (null) that it is over. A worker must see it by itself too when no message is `published`. */
  async control(run: string, control: Control | null, published = true): Promise<void> {
    if (control === null) await this.redis.del(this.names.control(run));
    else await this.redis.set(this.names.control(run), JSON.stringify(control));
    if (published) await this.redis.publish(this.names.controlChannel, run);
  }

  async stop(): Promise<void> {
    await Promise.all(this.#queues.map((each) => each.close()));
    for (const redis of this.#connections) redis.disconnect();
    await this.#servers.stop();
    rmSync(this.directory, { recursive: true, force: true });
  }

  spec(name: string, changes: Partial<RunSpecInput> = {}): RunSpec {
    return parseRunSpec(tinySpec(this, name, { seed: 7, ...changes }));
  }

  /** The spec of a run that no other has the name of, and that workers are told to run. */
  async newRun(changes: Partial<RunSpecInput> = {}): Promise<RunSpec> {
    const spec = this.spec(`run-${this.#runs++}`, changes);
    await this.control(spec.name, { epoch: 0, command: 'run' });
    return spec;
  }
}

/** What every job of a run says of where it comes from. */
export const originOf = (spec: RunSpec, epoch = 0, checkpoint: Origin['checkpoint'] = null): Origin => ({
  run: spec.name,
  epoch,
  checkpoint,
  spec: JSON.parse(JSON.stringify(spec)) as Record<string, unknown>,
});
