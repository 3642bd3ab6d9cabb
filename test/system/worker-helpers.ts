/**
 * What the system tests of workers share: a config for the test Redis, a small token file, run specs of preset `tiny`, and the
 * orchestrator's part of the protocol done by hand (control keys, jobs). Used by test/system/worker-*.test.ts.
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
import { TokenFileWriter } from '../../data/token-file.ts';
import { startTestRedis } from '../support/redis.ts';
import type { TestRedis } from '../support/redis.ts';

/** Waits until `probe` gives something, looking every few milliseconds; throws after `limitMs`, naming `what`. */
export async function eventually<Value>(what: string, probe: () => Value | undefined | Promise<Value | undefined>, limitMs = 20_000): Promise<Value> {
  const until = Date.now() + limitMs;
  for (;;) {
    const value = await probe();
    if (value !== undefined) return value;
    if (Date.now() > until) throw new Error(`${what}: not within ${limitMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** One directory, both Redis servers, and a config that points there. */
export class World {
  readonly directory = mkdtempSync(join(tmpdir(), 'nn-worker-'));
  readonly config: Config;
  /** The Redis of the queues, and that of the exchange. */
  readonly redis: Redis;
  readonly exchange: Redis;
  readonly names: ReturnType<typeof keys>;
  readonly #servers: TestRedis;
  readonly #queues: { close(): Promise<void> }[] = [];
  readonly #connections: Redis[] = [];

  static async start(overrides: Record<string, object> = {}): Promise<World> {
    return new World(await startTestRedis(), overrides);
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
    this.tokenFile();
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

  async control(run: string, control: Control): Promise<void> {
    await this.redis.set(this.names.control(run), JSON.stringify(control));
    await this.redis.publish(this.names.controlChannel, run);
  }

  async stop(): Promise<void> {
    await Promise.all(this.#queues.map((each) => each.close()));
    for (const redis of this.#connections) redis.disconnect();
    await this.#servers.stop();
    rmSync(this.directory, { recursive: true, force: true });
  }

  /** A token file of `count` tokens below 512 in a fixed order that has something to learn. */
  tokenFile(name = 'tokens.bin', count = 20_000): string {
    const path = join(this.directory, name);
    const writer = new TokenFileWriter(path, { vocabSize: 512, tokenizerDigest: null });
    let state = 12345;
    writer.append(
      Array.from({ length: count }, (_, index) => {
        state = (Math.imul(state, 1103515245) + 12345) >>> 0;
        return 4 + ((index * 7 + (state >>> 28)) % 500);
      }),
    );
    writer.finish();
    return path;
  }

  spec(name: string, more: Partial<RunSpecInput> = {}): RunSpec {
    return parseRunSpec({
      name,
      model: 'tiny',
      data: { train: join(this.directory, 'tokens.bin') },
      seed: 7,
      steps: 12,
      batch: { shards: 4, microBatches: 1, sequences: 2, sequenceLength: 32 },
      ...more,
    });
  }
}

/** What every job of a run says of where it comes from. */
export const originOf = (spec: RunSpec, epoch = 0, checkpoint: Origin['checkpoint'] = null): Origin => ({
  run: spec.name,
  epoch,
  checkpoint,
  spec: JSON.parse(JSON.stringify(spec)) as Record<string, unknown>,
});
