/**
 * The orchestrator as a process part: connects to Redis, watches the workers, takes runs from the queue and gives each a
 * driver. Started by the command line (`up`, `orchestrator`, `demo`) and by tests; it holds nothing that Redis and the runs'
 * directories do not hold too, so it may be killed at any time.
 */
import type { Logger } from 'pino';
import { toErrorRecord } from '../config/errors.ts';
import { keys } from '../config/keys.ts';
import { TERMINAL_PHASES } from '../config/messages.ts';
import { checkRedis, openRedis, redisAddresses } from '../config/redis.ts';
import type { Config } from '../config/schema.ts';
import { Driver } from './driver.ts';
import type { DriverContext } from './driver.ts';
import { ExchangeKeys } from './exchange-keys.ts';
import { Queues } from './queues.ts';
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
    othersActive: (run) => [...active].some((other) => other !== run),
  };
  const server = queues.serveRuns(async (run, signal) => {
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
      for (const { run, phase } of await store.records()) {
        if (TERMINAL_PHASES.includes(phase) || active.has(run) || (await queues.hasRun(run))) continue;
        await queues.addRun(run, (await store.read(run)).spec.priority);
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
      await server.stop();
      watch.stop();
      await queues.close();
      for (const connection of new Set([subscriber, exchangeRedis, redis])) connection.disconnect();
    },
  };
}
