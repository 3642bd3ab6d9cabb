/**
 * The orchestrator as a process part: connects to Redis, watches the workers, takes runs from the queue and gives each a
 * driver. Started by the command line (`up`, `orchestrator`, `demo`) and by tests; it holds nothing that Redis and the runs'
 * directories do not hold too, so it may be killed at any time.
 */
import { join, resolve } from 'node:path';
import type { Logger } from 'pino';
import { toErrorRecord } from '../config/errors.ts';
import { keys } from '../config/keys.ts';
import { TERMINAL_PHASES } from '../config/messages.ts';
import type { RunRecord } from '../config/messages.ts';
import { checkRedis, openRedis, redisAddresses } from '../config/redis.ts';
import type { Redis } from '../config/redis.ts';
import { parseRunSpec } from '../config/run-spec.ts';
import type { RunSpec } from '../config/run-spec.ts';
import type { Config } from '../config/schema.ts';
import { Driver } from './driver.ts';
import type { DriverContext } from './driver.ts';
import { ExchangeKeys } from './exchange-keys.ts';
import { Policies } from './policies.ts';
import { Queues } from './queues.ts';
import { claimDirectory, readRecordFile, writeRecordFile } from './run-directory.ts';
import { RunStore } from './run-store.ts';
import { WorkerWatch } from './worker-watch.ts';

export interface Orchestrator {
  /** Gives its runs back to the queue, for another orchestrator or its own next start, and closes everything. */
  stop(): Promise<void>;
}

/** Milliseconds between searches for runs that have a record but no job: their client died, or Redis lost it. */
const JANITOR_MS = 10_000;

/** Throws REDIS_UNAVAILABLE, REDIS_AUTH or REDIS_POLICY. */
export async function startOrchestrator({ config, logger }: { config: Config; logger: Logger }): Promise<Orchestrator> {
  const { url, exchangeUrl } = redisAddresses(config);
  await checkRedis(url, config);
  if (exchangeUrl !== url) await checkRedis(exchangeUrl, config);
  const names = keys(config.redis.prefix);
  const onError = (error: Error): void => logger.debug(toErrorRecord(error), 'Redis');
  const redis = openRedis(url, config, 'blocking', onError);
  const subscriber = openRedis(url, config, 'blocking', onError);
  const exchangeRedis = exchangeUrl === url ? redis : openRedis(exchangeUrl, config, 'blocking', onError);
  const queues = new Queues(config, redis, onError);
  const store = new RunStore(redis, config);
  const watch = new WorkerWatch(redis, config, onError);
  await watch.start();

  const wishes = new Map<string, () => void>();
  subscriber.on('message', (_channel: string, run: string) => wishes.get(run)?.());
  await subscriber.subscribe(names.wishChannel);

  const restarts = new Set<() => void>();
  let server = await serverOf(redis);
  redis.on('ready', () => {
    serverOf(redis).then(async (now) => {
      if (now === server) return;
      server = now;
      logger.warn('Redis was started anew, or another took its place; what it may have lost is planned again');
      await watch.look();
      for (const heard of restarts) heard();
    }).catch(onError);
  });
  const policies = new Policies(new Map([[url, redis], [exchangeUrl, exchangeRedis]]), logger);
  const policyTimer = setInterval(() => void policies.look(), config.orchestrator.lookupMs);

  const active = new Set<string>();
  const context: DriverContext = {
    config,
    logger,
    queues,
    store,
    watch,
    exchange: new ExchangeKeys(exchangeRedis, config),
    onWish: (run, heard) => {
      wishes.set(run, heard);
      return () => {
        if (wishes.get(run) === heard) wishes.delete(run);
      };
    },
    server: () => server,
    onRestart: (heard) => {
      restarts.add(heard);
      return () => restarts.delete(heard);
    },
    onTrouble: (heard) => policies.listen(heard),
    othersActive: (run) => [...active].some((other) => other !== run),
  };
  const serving = queues.serveRuns(async (run, signal) => {
    active.add(run);
    try {
      return await new Driver(context, run, signal).drive();
    } finally {
      active.delete(run);
    }
  }, (run) => void requeue(run));

  /** A run that was put back to `queued` while its last attempt was being cleared away has lost its job by that. */
  const requeue = async (run: string): Promise<void> => {
    try {
      const { record, spec } = await store.read(run);
      if (!TERMINAL_PHASES.includes(record.phase)) await queues.addRun(run, spec.priority);
    } catch (error) {
      onError(error as Error);
    }
  };

  const janitor = async (): Promise<void> => {
    try {
      for (const record of await store.records()) {
        const { run, phase } = record;
        if (phase === 'queued') keepQueued(join(resolve(config.runs), run), record, (await store.read(run)).spec);
        if (TERMINAL_PHASES.includes(phase) || active.has(run) || (await queues.hasRun(run))) continue;
        await queues.addRun(run, (await store.read(run)).spec.priority);
      }
      for (const run of new Set([...watch.demands.keys(), ...watch.holders])) {
        if (!active.has(run) && !(await queues.hasRun(run))) await store.forget(run);
      }
    } catch (error) {
      onError(error as Error);
    }
  };
  void janitor();
  const timer = setInterval(() => void janitor(), JANITOR_MS);

  return {
    stop: async () => {
      clearInterval(timer);
      clearInterval(policyTimer);
      const disconnect = (): void => {
        for (const connection of new Set([subscriber, exchangeRedis, redis])) connection.disconnect();
      };
      const stopped = serving.stop();
      if (await silent(redis, config.orchestrator.runLockMs, stopped)) {
        logger.warn('Redis does not answer: runs are not given back, another orchestrator takes them when their locks are over');
        disconnect();
      }
      await stopped;
      watch.stop();
      await queues.close();
      disconnect();
    },
  };
}

/** Whether Redis answers nothing for `milliseconds` before `over` settles. */
function silent(redis: Redis, milliseconds: number, over: Promise<unknown>): Promise<boolean> {
  return new Promise((resolve) => {
    let heardAtMs = performance.now();
    const timer = setInterval(() => {
      if (performance.now() - heardAtMs > milliseconds) end(true);
      else redis.ping().then(() => (heardAtMs = performance.now()), () => undefined);
    }, milliseconds / 8);
    const end = (unheard: boolean): void => {
      clearInterval(timer);
      resolve(unheard);
    };
    over.then(() => end(false), () => end(false));
  });
}

/** Names the process of Redis that answers; the empty string when it does not say. */
async function serverOf(redis: Redis): Promise<string> {
  return /run_id:(\w+)/.exec(await redis.info('server'))?.[1] ?? '';
}

/** A run that waits for its turn has a directory too, so that `restore` finds it. Throws RUN_EXISTS, DISK_FULL. */
function keepQueued(directory: string, record: RunRecord, spec: RunSpec): void {
  const kept = readRecordFile(directory);
  if (kept !== null && kept.epoch >= record.epoch) return;
  claimDirectory(directory, parseRunSpec(spec));
  writeRecordFile(directory, record);
}
