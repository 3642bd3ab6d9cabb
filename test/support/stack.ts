/**
 * A whole system that can be broken: real Redis servers, orchestrators and workers in processes of their own, if wanted with a
 * network between them that can be disturbed; and the undisturbed run that all others are held to. In one directory, and
 * nothing of it is left by `stop`. Used by the fault tests (test/system/faults-*) and chaos (test/chaos).
 */
import { fork } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { TERMINAL_PHASES } from '../../config/messages.ts';
import type { RunRecord } from '../../config/messages.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { Client } from '../../orchestrator/client.ts';
import type { Run } from '../../orchestrator/client.ts';
import { startSupervisor } from '../../workers/main.ts';
import type { Supervisor, SupervisorEvent } from '../../workers/main.ts';
import { checkRun } from './history.ts';
import type { HistoryVerdict } from './history.ts';
import { Proxy } from './proxy.ts';
import { PASSWORD, startTestRedis } from './redis.ts';
import type { TestRedis } from './redis.ts';
import { tinySpec, writeTinyData } from './tiny-runs.ts';
import { until } from './wait.ts';

export interface StackOptions {
  /** Where everything lies, to be removed by whoever gave it; else a temporary directory. */
  readonly directory?: string;
  /** Hears of every process that is started, so that none is forgotten. */
  readonly onProcess?: (pid: number) => void;
  readonly settings?: Record<string, object>;
  /** Whether workers and orchestrators reach Redis through proxies. */
  readonly proxied?: boolean;
}

/** Times so short that a death is noticed within a second. */
export const QUICK: Record<string, object> = {
  redis: { retryMaximumMs: 200, silenceMs: 2_000 },
  queue: { lockDurationMs: 1_500, stalledIntervalMs: 500, backoffMs: 20 },
  worker: { heartbeatMs: 100, deadAfterMs: 800, restartBackoffMs: 50, healthyMs: 1_000, drainMs: 5_000, controlPollMs: 200 },
  orchestrator: { watchMs: 50, lookupMs: 500, requestTimeoutMs: 10_000 },
};

/** One side's way to both Redis servers. */
export interface Network {
  readonly queues: Proxy;
  readonly exchange: Proxy;
}

/** A process that can be killed and stopped. */
export interface Victim {
  readonly pid: number;
  readonly alive: boolean;
  kill(): Promise<void>;
  pause(): void;
  resume(): void;
}

export class Stack {
  readonly directory: string;
  readonly redis: TestRedis;
  readonly config: Config;
  readonly client: Client;
  readonly workersNetwork: Network | null;
  readonly orchestratorsNetwork: Network | null;
  readonly orchestrators: Victim[] = [];
  readonly supervisors: (Supervisor & { readonly prefix: string })[] = [];
  readonly events: SupervisorEvent[] = [];
  readonly #settings: Record<string, object>;
  readonly #onProcess: (pid: number) => void;
  readonly #removes: boolean;
  #names = 0;

  private constructor(directory: string, redis: TestRedis, options: StackOptions, networks: { workers: Network; orchestrators: Network } | null) {
    this.directory = directory;
    this.redis = redis;
    this.#settings = options.settings ?? QUICK;
    this.#onProcess = options.onProcess ?? (() => undefined);
    this.#removes = options.directory === undefined;
    this.workersNetwork = networks?.workers ?? null;
    this.orchestratorsNetwork = networks?.orchestrators ?? null;
    this.config = this.#configOf(null);
    this.client = new Client({ config: this.config });
  }

  static async start(options: StackOptions = {}): Promise<Stack> {
    const { directory = mkdtempSync(join(tmpdir(), 'nn-stack-')), proxied = false, onProcess } = options;
    for (const name of ['home', 'runs']) mkdirSync(join(directory, name), { recursive: true });
    writeTinyData({ directory });
    const redis = await startTestRedis(join(directory, 'redis'), onProcess);
    const network = async (): Promise<Network> => ({ queues: await Proxy.listen(redis.queues.socket), exchange: await Proxy.listen(redis.exchange.socket) });
    return new Stack(directory, redis, options, proxied ? { workers: await network(), orchestrators: await network() } : null);
  }

  #configOf(network: Network | null): Config {
    const url = (proxy: Proxy): string => `redis://:${PASSWORD}@127.0.0.1:${proxy.port}`;
    const addresses = network === null ? { url: this.redis.url, exchangeUrl: this.redis.exchangeUrl } : { url: url(network.queues), exchangeUrl: url(network.exchange) };
    return loadConfig({
      ...this.#settings,
      home: join(this.directory, 'home'),
      runs: join(this.directory, 'runs'),
      logLevel: 'silent',
      redis: { ...this.#settings['redis'], ...addresses },
      worker: { threads: 1, library: 'cpu', ...this.#settings['worker'] },
      server: { port: 0 },
    });
  }

  /** One more orchestrator. */
  async orchestrate(): Promise<Victim> {
    const config = this.#configOf(this.orchestratorsNetwork);
    const child = fork(new URL('orchestrator-process.js', import.meta.url), [JSON.stringify(config)], { stdio: ['ignore', 'ignore', 2, 'ipc'] });
    const victim = victimOf(child);
    this.#onProcess(victim.pid);
    this.orchestrators.push(victim);
    await new Promise<void>((resolve, reject) => {
      child.once('message', () => resolve()).once('exit', (code, signal) => reject(new Error(`the orchestrator ended with ${code ?? signal}`)));
    });
    return victim;
  }

  /** One more supervisor with `count` workers, named <prefix>-0 and so on. */
  async work(count: number, prefix = `w${this.#names++}`): Promise<Supervisor> {
    const supervisor = startSupervisor({
      config: this.#configOf(this.workersNetwork), count, device: { library: 'cpu', indices: 'cpu' }, idPrefix: prefix,
      onEvent: (event) => {
        this.events.push(event);
        if (event.type === 'started') this.#onProcess(event.pid);
      },
    });
    this.supervisors.push(Object.assign(supervisor, { prefix }));
    await supervisor.ready;
    return supervisor;
  }

  /** The workers of that prefix are drained, and gone. */
  async leave(prefix: string): Promise<void> {
    const leaving = this.supervisors.filter((supervisor) => supervisor.prefix === prefix);
    for (const supervisor of leaving) this.supervisors.splice(this.supervisors.indexOf(supervisor), 1);
    await Promise.all(leaving.map((supervisor) => supervisor.stop()));
  }

  /** Process ids of the workers there are now, by name. */
  get workers(): Map<string, number> {
    return new Map(this.supervisors.flatMap((supervisor) => supervisor.workers().map(({ id, pid }) => [id, pid])));
  }

  /** With checkpoints and comparisons so often that a fault meets one. */
  spec(name: string, changes: Partial<RunSpecInput> = {}): RunSpecInput {
    return tinySpec(this, name, { checkpoint: { every: 4, keep: 3 }, compareDigestsEvery: 6, ...changes });
  }

  runDirectory(run: string): string {
    return join(this.directory, 'runs', run);
  }

  train(name: string, changes: Partial<RunSpecInput> = {}): Promise<Run> {
    return this.client.train(this.spec(name, changes));
  }

  /** The record of a run that must complete within the deadline; else the error says where it stands. */
  async finish(name: string, deadlineMs = 60_000): Promise<RunRecord> {
    const run = this.client.run(name);
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<null>((resolve) => {
      timer = setTimeout(() => resolve(null), deadlineMs);
    });
    const record = await Promise.race([run.ended(), late]).finally(() => clearTimeout(timer));
    if (record?.phase === 'completed') return record;
    const { phase, step, epoch, way, error, faults } = record ?? (await run.record());
    throw new Error(`run ${name} is ${phase} after ${deadlineMs} ms: ${JSON.stringify({ step, epoch, way, error, faults: faults.slice(-5) })}`);
  }

  /** Finishes the run, and throws unless it ended with `weightsDigest` and its history is clean. */
  async prove(name: string, weightsDigest: string, deadlineMs = 60_000): Promise<{ record: RunRecord; verdict: HistoryVerdict }> {
    const record = await this.finish(name, deadlineMs);
    const verdict = checkRun(this.runDirectory(name), weightsDigest);
    if (record.weightsDigest !== weightsDigest) throw new Error(`run ${name} ended with ${record.weightsDigest}, undisturbed with ${weightsDigest}`);
    if (verdict.violations.length > 0) throw new Error(`run ${name}: ${verdict.violations.join('; ')}`);
    return { record, verdict };
  }

  /** Steps counted, from the run's files: Redis may be away. */
  counted(run: string): number {
    try {
      return readFileSync(join(this.runDirectory(run), 'metrics.jsonl'), 'latin1').split('\n').length - 1;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return 0;
      throw error;
    }
  }

  reached(run: string, step: number, deadlineMs = 30_000): Promise<void> {
    return until(`step ${step} of ${run}`, () => this.counted(run) >= step, deadlineMs);
  }

  /** After each test: what a failed one left under way is cancelled, so that it takes no worker from the next. */
  async settle(): Promise<void> {
    for (const { run, phase } of await this.client.runs()) {
      if (!TERMINAL_PHASES.includes(phase)) await this.client.run(run).cancel();
    }
  }

  async stop(): Promise<void> {
    for (const victim of this.orchestrators) victim.resume();
    for (const pid of this.workers.values()) signal(pid, 'SIGCONT');
    for (const server of [this.redis.queues, this.redis.exchange]) server.resume();
    await this.client.close();
    const proxies = [this.workersNetwork, this.orchestratorsNetwork].flatMap((network) => (network === null ? [] : [network.queues, network.exchange]));
    for (const proxy of proxies) proxy.heal();
    await Promise.all(this.orchestrators.map((victim) => victim.kill()));
    await Promise.all(this.supervisors.map((supervisor) => supervisor.stop()));
    await Promise.all(proxies.map((proxy) => proxy.close()));
    await this.redis.stop();
    if (this.#removes) rmSync(this.directory, { recursive: true, force: true });
  }
}

/** Sends a signal; a process that is gone does not mind. */
export function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

function victimOf(child: ChildProcess): Victim {
  return {
    pid: child.pid!,
    get alive() {
      return child.exitCode === null && child.signalCode === null;
    },
    kill: async () => {
      if (child.exitCode !== null || child.signalCode !== null) return;
      const gone = new Promise((resolve) => child.once('exit', resolve));
      child.kill('SIGKILL');
      await gone;
    },
    pause: () => void child.kill('SIGSTOP'),
    resume: () => void child.kill('SIGCONT'),
  };
}
