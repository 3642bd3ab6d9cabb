/**
 * A whole system for a test: a real Redis, an orchestrator in this process and supervised worker processes, in a directory of
 * its own, with random token files to train on. Everything is stopped by stop(). Used by test/system and bench.
 */
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { Client } from '../../orchestrator/client.ts';
import { startOrchestrator } from '../../orchestrator/main.ts';
import type { Orchestrator } from '../../orchestrator/main.ts';
import { startSupervisor } from '../../workers/main.ts';
import type { Supervisor, SupervisorEvent } from '../../workers/main.ts';
import { startTestRedis } from './redis.ts';
import type { TestRedis } from './redis.ts';
import { writeTinyData } from './tiny-runs.ts';

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
  writeTinyData({ directory });
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
