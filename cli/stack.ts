/**
 * Starts the parts that make a place where runs can happen: Redis (embedded, unless one is configured), the orchestrator,
 * workers, the HTTP server; each is stopped, newest first, by the command's lifetime. Knows nothing of what the runs are.
 * Called by the service commands, by `demo`, and by `eval` and `generate` when nothing is up.
 *
 * What stands on BullMQ or serves HTTP is imported where it is used: loading that takes longer than most commands do.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { availableParallelism, hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { NnError, errorCode } from '../config/errors.ts';
import { checkRedis, redisAddresses } from '../config/redis.ts';
import type { Config } from '../config/schema.ts';
import { describeDevices, whyNoDevice } from '../cuda/device.ts';
import type { Client } from '../orchestrator/client.ts';
import { startSupervisor } from '../workers/main.ts';
import { StoreClient } from '../workers/store-client.ts';
import type { Supervisor, SupervisorEvent } from '../workers/main.ts';
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

/** Throws STORE_UNAVAILABLE or STORE_AUTH unless the store, if one is configured, is there and takes the token. */
export async function checkConfiguredStore(config: Config): Promise<void> {
  if (config.store.url !== '') await new StoreClient(config, () => undefined).check();
}

/** The settings of workers beside their orchestrator: they share its file system. */
export const withoutStore = (config: Config): Config => ({ ...config, store: { ...config.store, url: '' } });

/** Whether a set of services can be found from here: a configured Redis, or a live `up` in the home. */
export const isUp = (config: Config): boolean => config.redis.url !== '' || homeOwner(config.home) !== undefined;

/** A client of the services that are up. Throws REDIS_UNAVAILABLE, REDIS_AUTH or REDIS_POLICY if there are none. */
export async function connect(life: Lifetime, config: Config): Promise<Client> {
  if (!isUp(config)) {
    throw new NnError('REDIS_UNAVAILABLE', `nothing runs here (no \`cuda-nn up\` in ${config.home}); start one, or set CUDA_NN_REDIS_URL`);
  }
  await checkRedis(redisAddresses(config).url, config);
  return openClient(life, config);
}

/** A client that the command's end closes. */
export async function openClient(life: Lifetime, config: Config): Promise<Client> {
  const { Client } = await import('../orchestrator/client.ts');
  const client = new Client({ config });
  life.defer('client', () => client.close());
  return client;
}

export async function runOrchestrator(life: Lifetime, config: Config): Promise<void> {
  const { startOrchestrator } = await import('../orchestrator/main.ts');
  const orchestrator = await startOrchestrator({ config, logger: createLogger(config) });
  life.defer('orchestrator', () => orchestrator.stop());
}

/** Throws PORT_IN_USE. */
export async function runServer(life: Lifetime, config: Config, client: Client): Promise<{ readonly url: string }> {
  const { startServer } = await import('../orchestrator/server/server.ts');
  const server = await startServer({ config, client, logger: createLogger(config) });
  life.defer('server', () => server.stop());
  return server;
}

export interface WantedWorkers {
  /** One worker for each of these GPUs (findGpus); if there are none, on the CPU. */
  readonly gpus: readonly number[];
  /** CPU workers; undefined: one. */
  readonly count?: number | undefined;
  /** CPU threads of each; 0: the cores, shared out. */
  readonly threads: number;
}

/** The GPUs of this machine that are wanted; none where there is no CUDA library. Throws DEVICE_UNAVAILABLE for one that is not there. */
export function findGpus(gpus: Gpus): readonly number[] {
  if (gpus === 'none') return [];
  let there: number[];
  try {
    there = describeDevices('cuda').map(({ index }) => index);
  } catch (error) {
    if (gpus !== 'all' || !['LIBRARY_INVALID', 'DEVICE_UNAVAILABLE'].includes(errorCode(error) ?? '')) throw error;
    return [];
  }
  if (gpus === 'all') return there;
  const missing = gpus.find((index) => !there.includes(index));
  if (missing !== undefined) {
    const why = there.length === 0 ? whyNoDevice('cuda') : '';
    throw new NnError('DEVICE_UNAVAILABLE', `there is no GPU ${missing} here (there: ${there.join(', ') || 'none'}${why === '' ? '' : `; ${why}`})`);
  }
  return gpus;
}

/** One line for what happens to a worker, or undefined for what nobody needs to see. */
function workerLine(event: SupervisorEvent, level: string): string | undefined {
  switch (event.type) {
    case 'started':
      return undefined;
    case 'ready':
      return `worker        ${event.id} (process ${event.pid}) on ${event.device.name}`;
    case 'log':
      return LEVELS.indexOf(event.level) < LEVELS.indexOf(level) ? undefined : `worker        ${event.id}: ${event.message}`;
    case 'exited': {
      if (event.restartInMs === null && event.error === null) return undefined;
      const why = event.error === null ? (event.signal ?? `exit ${event.code}`) : `${event.error.code}: ${event.error.message}`;
      const next = event.restartInMs === null ? 'given up' : `started again in ${event.restartInMs} ms`;
      return `worker        ${event.id} (process ${event.pid}) ended, ${why}; ${next}`;
    }
  }
}

const LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'silent'];

/** A name that no other supervisor on the same Redis has, fit for a queue's name. */
const supervisorName = (): string => `${hostname().replace(/[^A-Za-z0-9._-]/g, '-').slice(0, 40)}-${process.pid}`;

/** Starts supervised workers and waits until each serves. Throws what the first of them that gave up says. */
export async function runWorkers(life: Lifetime, config: Config, wanted: WantedWorkers): Promise<Supervisor> {
  const { gpus } = wanted;
  const count = gpus.length > 0 ? gpus.length : (wanted.count ?? 1);
  const threads = wanted.threads === 0 ? threadsEach(count) : wanted.threads;
  const supervisor = startSupervisor({
    config: { ...config, worker: { ...config.worker, threads } },
    device: gpus.length > 0 ? { library: 'cuda', indices: gpus } : { library: 'cpu', indices: 'cpu' },
    count,
    idPrefix: supervisorName(),
    onEvent: (event) => {
      const line = workerLine(event, config.logLevel);
      if (line !== undefined) note(line);
    },
  });
  life.defer('workers', () => supervisor.stop());
  await life.until(supervisor.ready);
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
  const own: Config = { ...withoutStore(config), home, runs: join(home, 'runs') };
  await life.until(provideRedis(life, own, () => undefined));
  await life.until(runWorkers(life, own, { gpus: findGpus('all'), threads: config.worker.threads }));
  return openClient(life, own);
}
