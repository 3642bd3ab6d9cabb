/**
 * The commands that serve until they are stopped: `up` (all in one), `orchestrator`, `worker`. They start parts through
 * stack.ts and wait for a signal or for a part to fail. Called by main.ts.
 */
import type { Command } from 'commander';
import { NnError } from '../../config/errors.ts';
import { redactUrl, redisAddresses } from '../../config/redis.ts';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import type { Supervisor } from '../../workers/main.ts';
import { withLifetime } from '../lifetime.ts';
import type { Lifetime } from '../lifetime.ts';
import { note, printResult } from '../output.ts';
import { parseGpus, parseWhole } from '../options.ts';
import { checkConfiguredRedis, checkConfiguredStore, connect, findGpus, provideRedis, runOrchestrator, runServer, runWorkers, withoutStore } from '../stack.ts';

interface WorkerOptions {
  gpus?: string;
  count?: number;
  threads?: number;
}

interface ServerOptions {
  port?: number;
  host?: string;
}

const serverOverrides = ({ port, host }: ServerOptions): object => ({
  server: { ...(port === undefined ? {} : { port }), ...(host === undefined ? {} : { host }) },
});

const never = new Promise<never>(() => undefined);

/** Serves until a signal (a clean end), or until what it needs fails: Redis, or every worker. */
async function serve(life: Lifetime, redisFailure: Promise<string>, workers?: Supervisor): Promise<void> {
  const stopped = new Promise<undefined>((settle) => {
    if (life.signal.aborted) settle(undefined);
    else life.signal.addEventListener('abort', () => settle(undefined));
  });
  const workersEnded = workers === undefined ? never : workers.ended.then(() => undefined);
  const reason = await Promise.race([redisFailure, stopped, workersEnded]);
  if (reason !== undefined) throw new NnError('REDIS_UNAVAILABLE', reason);
}

const workersOf = (config: Config, { gpus, count, threads }: WorkerOptions) => ({
  gpus: findGpus(parseGpus(gpus ?? 'all')),
  count,
  threads: threads ?? config.worker.threads,
});

async function up(options: WorkerOptions & ServerOptions & { json?: boolean }): Promise<void> {
  const config = withoutStore(loadConfig(serverOverrides(options)));
  const wanted = workersOf(config, options);
  await withLifetime(async (life) => {
    let redisFailed: (reason: string) => void = () => undefined;
    const failure = new Promise<string>((settle) => {
      redisFailed = settle;
    });
    const redis = await life.until(provideRedis(life, config, redisFailed));
    const { url } = redisAddresses(config);
    const client = await connect(life, config);
    const server = await life.until(runServer(life, config, client)); // a port that is taken is found before anything is said
    note(`Redis         ${redactUrl(url)} (${redis})`);
    note(`dashboard     ${server.url}`);
    await life.until(runOrchestrator(life, config));
    note('orchestrator  ready');
    const supervisor = await life.until(runWorkers(life, config, wanted));
    note('ready: cuda-nn train SPEC (Ctrl-C stops everything)');
    if (options.json === true) {
      printResult(true, { redis: redactUrl(url), dashboard: server.url, home: config.home, workers: supervisor.workers().map(({ id }) => id) }, () => []);
    }
    await serve(life, failure, supervisor);
  });
}

async function orchestrator(options: ServerOptions & { server: boolean }): Promise<void> {
  const config = loadConfig(serverOverrides(options));
  await withLifetime(async (life) => {
    await life.until(checkConfiguredRedis(config));
    if (options.server) {
      const server = await life.until(runServer(life, config, await connect(life, config)));
      note(`dashboard     ${server.url}`);
    }
    await life.until(runOrchestrator(life, config));
    note('orchestrator  ready');
    await serve(life, never);
  });
}

async function worker(options: WorkerOptions): Promise<void> {
  const config = loadConfig();
  const wanted = workersOf(config, options);
  await withLifetime(async (life) => {
    await life.until(checkConfiguredRedis(config));
    await life.until(checkConfiguredStore(config));
    const supervisor = await life.until(runWorkers(life, config, wanted));
    await serve(life, never, supervisor);
  });
}

export function registerServiceCommands(program: Command): void {
  const withServer = (command: Command): Command =>
    command
      .option('--host <address>', 'address of the HTTP API and dashboard (off loopback CUDA_NN_TOKEN must be set)')
      .option('--port <number>', 'its port; 0: any free one', parseWhole('--port', 0, 65535));
  const withWorkers = (command: Command): Command =>
    command
      .option('--gpus <which>', 'GPUs that the workers drive: all, none (the CPU), or numbers such as 0,1; all means the CPU where there is none', 'all')
      .option('--count <number>', 'CPU workers on this machine', parseWhole('--count', 1, 1024))
      .option('--threads <number>', 'CPU threads of each worker (default: the cores, shared out)', parseWhole('--threads', 1, 1024));

  withWorkers(withServer(program.command('up')))
    .description('everything in one: embedded Redis, orchestrator, workers, dashboard; until Ctrl-C')
    .option('--json', 'one JSON object on stdout once all is ready')
    .action(up);
  withServer(program.command('orchestrator'))
    .description('drive runs, and serve the HTTP API and dashboard, on a Redis that is there')
    .option('--no-server', 'without HTTP API and dashboard')
    .action(orchestrator);
  withWorkers(program.command('worker')).description('serve jobs on this machine: one process for each GPU, or CPU workers').action(worker);
}
