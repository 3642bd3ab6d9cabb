/**
 * Starts the parts that make a place where runs can happen: Redis (embedded, unless one is configured), the orchestrator,
 * workers, the HTTP server; each is stopped, newest first, by the command's lifetime. Knows nothing of what the runs are.
 * Called by the service commands, by `demo`, and by `eval` and `generate` when nothing is up.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { NnError } from '../config/errors.ts';
import { checkRedis, redisAddresses } from '../config/redis.ts';
import type { Config } from '../config/schema.ts';
import { Client } from '../orchestrator/client.ts';
import { startOrchestrator } from '../orchestrator/main.ts';
import { startServer } from '../orchestrator/server/server.ts';
import { startSupervisor } from '../workers/main.ts';
import type { Supervisor } from '../workers/main.ts';
import { startEmbeddedRedis } from './embedded-redis.ts';
import { homeOwner } from './home-lock.ts';
import type { Lifetime } from './lifetime.ts';
import { createLogger } from './logger.ts';
import type { Gpus } from './options.ts';
import { note } from './output.ts';

/** CPU threads of each of `count` workers that share this machine. */
export const threadsEach = (count: number, cores = availableParallelism()): number => Math.max(1, Math.floor(cores / count));

/** Makes sure that there is a Redis that will do: the configured one, else an embedded one. */
export async function provideRedis(life: Lifetime, config: Config, onFailure: (reason: string) => void): Promise<'configured' | 'embedded'> {
  if (config.redis.url !== '') {
    await checkConfiguredRedis(config);
    return 'configured';
  }
  const redis = await startEmbeddedRedis(config, note);
  life.defer('Redis', () => redis.stop());
  void redis.failed.then(onFailure);
  return 'embedded';
}

/** Throws REDIS_UNAVAILABLE, REDIS_AUTH or REDIS_POLICY unless both servers will do. */
export async function checkConfiguredRedis(config: Config): Promise<void> {
  const { url, exchangeUrl } = redisAddresses(config);
  for (const each of new Set([url, exchangeUrl])) await checkRedis(each, config);
}

/** Whether a set of services can be found from here: a configured Redis, or a live `up` in the home. */
export const isUp = (config: Config): boolean => config.redis.url !== '' || homeOwner(config.home) !== undefined;

/** A client of the services that are up. Throws REDIS_UNAVAILABLE, REDIS_AUTH or REDIS_POLICY if there are none. */
export async function connect(life: Lifetime, config: Config): Promise<Client> {
  if (!isUp(config)) {
    throw new NnError('REDIS_UNAVAILABLE', `nothing runs here (no \`cuda-nn up\` in ${config.home}); start one, or set CUDA_NN_REDIS_URL`);
  }
  await checkRedis(redisAddresses(config).url, config);
  const client = new Client({ config });
  life.defer('client', () => client.close());
  return client;
}

export async function runOrchestrator(life: Lifetime, config: Config): Promise<void> {
  const orchestrator = await startOrchestrator({ config, logger: createLogger(config) });
  life.defer('orchestrator', () => orchestrator.stop());
}

/** Throws PORT_IN_USE. */
export async function runServer(life: Lifetime, config: Config, client: Client): Promise<{ readonly url: string }> {
  const server = await startServer({ config, client, logger: createLogger(config) });
  life.defer('server', () => server.stop());
  return server;
}

export interface WantedWorkers {
  readonly gpus: Gpus;
  /** CPU workers; undefined: one. */
  readonly count?: number | undefined;
  /** CPU threads of each; 0: the cores, shared out. */
  readonly threads: number;
}

export async function runWorkers(life: Lifetime, config: Config, wanted: WantedWorkers): Promise<Supervisor> {
  const count = wanted.count ?? 1;
  const threads = wanted.threads === 0 ? threadsEach(count) : wanted.threads;
  const supervisor = await startSupervisor({
    config: { ...config, worker: { ...config.worker, threads } },
    devices: wanted.gpus,
    count,
    onEvent: (event) => note(`worker        ${event.worker}: ${event.what}`),
  });
  life.defer('workers', () => supervisor.stop());
  return supervisor;
}

/**
 * A place for one command: what is up here if something is, else an embedded Redis and one worker in a temporary
 * directory, for as long as the command lives.
 */
export async function borrowWorker(life: Lifetime, config: Config): Promise<Client> {
  if (isUp(config)) return connect(life, config);
  const home = mkdtempSync(join(tmpdir(), 'cuda-nn-'));
  life.defer('temporary directory', () => rmSync(home, { recursive: true, force: true }));
  const own: Config = { ...config, home, runs: join(home, 'runs') };
  await life.until(provideRedis(life, own, () => undefined));
  await life.until(runWorkers(life, own, { gpus: 'all', threads: config.worker.threads }));
  const client = new Client({ config: own });
  life.defer('client', () => client.close());
  return client;
}
