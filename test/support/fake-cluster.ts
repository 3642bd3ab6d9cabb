/**
 * An orchestrator on a real Redis with fake workers, in a directory of its own: what the tests of the driver, the client and
 * the server stand on. Times are short, so that a death is noticed within a second.
 */
import { fork } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { openRedis } from '../../config/redis.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { Client } from '../../orchestrator/client.ts';
import { startOrchestrator } from '../../orchestrator/main.ts';
import type { Orchestrator } from '../../orchestrator/main.ts';
import { startFakeWorker } from './fake-worker.ts';
import type { FakeWorker, FakeWorkerOptions } from './fake-worker.ts';
import { startTestRedis } from './redis.ts';
import type { TestRedis } from './redis.ts';
import { writeTokenFile } from './tiny-runs.ts';

export class FakeCluster {
  readonly directory = mkdtempSync(join(tmpdir(), 'nn-fake-'));
  redis!: TestRedis;
  config!: Config;
  client!: Client;
  readonly workers: FakeWorker[] = [];
  readonly orchestrators: Orchestrator[] = [];
  readonly #children: ChildProcess[] = [];

  static async start(settings: Record<string, object> = {}): Promise<FakeCluster> {
    const cluster = new FakeCluster();
    cluster.redis = await startTestRedis();
    cluster.config = loadConfig({
      home: join(cluster.directory, 'home'),
      runs: join(cluster.directory, 'runs'),
      redis: { url: cluster.redis.url, exchangeUrl: cluster.redis.exchangeUrl },
      queue: { lockDurationMs: 1_500, stalledIntervalMs: 500, backoffMs: 20 },
      worker: { heartbeatMs: 100, deadAfterMs: 600 },
      orchestrator: { watchMs: 50, lookupMs: 500, requestTimeoutMs: 2_000, ...settings['orchestrator'] },
      server: { port: 0 },
    });
    for (const [name, count] of [['train', 4_000], ['validation', 2_000]] as const) {
      writeTokenFile(cluster.tokens(name), Int32Array.from({ length: count }, (_, index) => 4 + ((index * 7) % 12)), 16);
    }
    cluster.client = new Client({ config: cluster.config });
    return cluster;
  }

  tokens(name: string): string {
    return join(this.directory, `${name}.tokens`);
  }

  /** A very small model over 4 shards; `changes` replace whole keys. */
  spec(name: string, changes: Partial<RunSpecInput> = {}): RunSpecInput {
    return {
      name,
      model: { vocabSize: 16, hiddenSize: 8, layers: 1, queryHeads: 2, experts: 2, expertsPerToken: 1, ffnSize: 8 },
      data: { train: this.tokens('train'), validation: this.tokens('validation') },
      steps: 20,
      batch: { shards: 4, microBatches: 1, sequences: 1, sequenceLength: 8 },
      evaluation: { every: 8, sequences: 4 },
      checkpoint: { every: 10 },
      ...changes,
    };
  }

  checked(name: string, changes: Partial<RunSpecInput> = {}): RunSpec {
    return parseRunSpec(this.spec(name, changes));
  }

  async orchestrate(): Promise<Orchestrator> {
    const orchestrator = await startOrchestrator({ config: this.config, logger: pino({ level: process.env['NN_TEST_LOG'] ?? 'silent' }, process.stderr) });
    this.orchestrators.push(orchestrator);
    return orchestrator;
  }

  /** An orchestrator that can be killed: SIGKILL, and nothing of it runs on. */
  async orchestrateApart(): Promise<{ kill(): Promise<void> }> {
    const child = fork(new URL('orchestrator-process.js', import.meta.url), [JSON.stringify(this.config)], { stdio: 'ignore' });
    this.#children.push(child);
    await new Promise((resolve, reject) => child.once('message', resolve).once('exit', () => reject(new Error('the orchestrator ended'))));
    return { kill: () => killed(child) };
  }

  async work(id: string, options: Partial<FakeWorkerOptions> = {}): Promise<FakeWorker> {
    const worker = await startFakeWorker({ config: this.config, id, ...options });
    this.workers.push(worker);
    return worker;
  }

  /** Every key in the Redis of the queues and in that of the exchange. */
  async keys(): Promise<string[]> {
    const lists = [this.redis.url, this.redis.exchangeUrl].map(async (url) => {
      const redis = openRedis(url, this.config, 'command');
      const found = await redis.keys('*');
      redis.disconnect();
      return found;
    });
    return (await Promise.all(lists)).flat().sort();
  }

  async stop(): Promise<void> {
    await this.client.close();
    await Promise.all(this.orchestrators.map((orchestrator) => orchestrator.stop()));
    await Promise.all(this.#children.map(killed));
    await Promise.all(this.workers.map((worker) => worker.crash()));
    await this.redis.stop();
    rmSync(this.directory, { recursive: true, force: true });
  }
}

async function killed(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const gone = new Promise((resolve) => child.once('exit', resolve));
  child.kill('SIGKILL');
  await gone;
}
