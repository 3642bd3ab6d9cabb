/**
 * A whole system for a test: a real Redis, an orchestrator in this process and supervised worker processes, in a directory of
 * its own, with random token files to train on. Everything is stopped by stop(). Used by test/system and bench.
 */
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { TokenFileWriter } from '../../data/token-file.ts';
import { Client } from '../../orchestrator/client.ts';
import { startOrchestrator } from '../../orchestrator/main.ts';
import type { Orchestrator } from '../../orchestrator/main.ts';
import { startSupervisor } from '../../workers/main.ts';
import type { Supervisor, SupervisorEvent } from '../../workers/main.ts';
import { startTestRedis } from './redis.ts';
import type { TestRedis } from './redis.ts';

export interface ClusterOptions {
  readonly workers: number;
  /** CPU threads of each worker. */
  readonly threads?: number;
  readonly settings?: Record<string, object>;
}

export interface Cluster {
  readonly config: Config;
  readonly directory: string;
  readonly redis: TestRedis;
  readonly client: Client;
  readonly supervisor: Supervisor;
  readonly events: SupervisorEvent[];
  /** Adds `count` supervised workers, of one more supervisor. */
  join(count: number): Promise<Supervisor>;
  stopOrchestrator(): Promise<void>;
  startOrchestrator(): Promise<void>;
  stop(): Promise<void>;
}

/** A spec of preset tiny over token files that writeTokens made; `changes` replace whole keys. */
export function tinySpec(cluster: Cluster, name: string, changes: Partial<RunSpecInput> = {}): RunSpecInput {
  return {
    name,
    model: 'tiny',
    data: { train: join(cluster.directory, 'train.tokens'), validation: join(cluster.directory, 'validation.tokens') },
    steps: 24,
    batch: { shards: 4, microBatches: 1, sequences: 2, sequenceLength: 32 },
    optimizer: { learningRate: 3e-3, warmupSteps: 4 },
    evaluation: { every: 8, sequences: 8 },
    checkpoint: { every: 8, keep: 2 },
    ...changes,
  };
}

/** A token file of `count` ids in which each follows from the one before often enough that there is something to learn. */
export function writeTokens(path: string, count: number, seed: number, vocabSize = 512): void {
  const tokens = new Int32Array(count);
  let state = seed;
  const random = (): number => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  for (let index = 0; index < count; index++) {
    const predicted = 4 + (((tokens[index - 1] ?? 0) * 7) % 64);
    tokens[index] = random() < 0.8 ? predicted : 4 + Math.floor(random() * (vocabSize - 4));
  }
  const writer = new TokenFileWriter(path, { vocabSize, tokenizerDigest: null });
  writer.append(tokens);
  writer.finish();
}

export async function startCluster({ workers, threads = 1, settings = {} }: ClusterOptions): Promise<Cluster> {
  const directory = mkdtempSync(join(tmpdir(), 'nn-cluster-'));
  mkdirSync(join(directory, 'home'));
  const redis = await startTestRedis();
  const config = loadConfig({
    home: join(directory, 'home'),
    runs: join(directory, 'runs'),
    logLevel: 'silent',
    ...settings,
    redis: { url: redis.url, exchangeUrl: redis.exchangeUrl, ...settings['redis'] },
    worker: { threads, library: 'cpu', heartbeatMs: 200, ...settings['worker'] },
  });
  writeTokens(join(directory, 'train.tokens'), 20_000, 1);
  writeTokens(join(directory, 'validation.tokens'), 2_000, 2);
  const logger = pino({ level: 'silent' });
  let orchestrator: Orchestrator | undefined = await startOrchestrator({ config, logger });
  const events: SupervisorEvent[] = [];
  const supervisors: Supervisor[] = [];
  const start = async (count: number): Promise<Supervisor> => {
    const supervisor = startSupervisor({
      config, count, device: { library: 'cpu', indices: 'cpu' }, idPrefix: `w${supervisors.length}`, onEvent: (event) => events.push(event),
    });
    supervisors.push(supervisor);
    await supervisor.ready;
    return supervisor;
  };
  const supervisor = await start(workers);
  const client = new Client({ config });
  return {
    config, directory, redis, client, supervisor, events,
    join: start,
    stopOrchestrator: async () => {
      await orchestrator?.stop();
      orchestrator = undefined;
    },
    startOrchestrator: async () => {
      orchestrator = await startOrchestrator({ config, logger });
    },
    stop: async () => {
      await client.close();
      await Promise.all(supervisors.map((each) => each.stop()));
      await orchestrator?.stop();
      await redis.stop();
      rmSync(directory, { recursive: true, force: true });
    },
  };
}
