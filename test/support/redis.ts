/**
 * Real Redis servers for a test: on unix sockets in a directory of their own, with a password, one for the queues,
 * append-only and synced every second as in production, and one without persistence for the exchange. Each can be killed,
 * brought back with what its disk holds, and stopped for a while. Used by the tests of orchestrator, workers and cli.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, truncateSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Redis } from 'ioredis';

export interface TestRedis {
  readonly url: string;
  readonly exchangeUrl: string;
  readonly queues: RedisServer;
  readonly exchange: RedisServer;
  /** Stops both servers and deletes their directory. */
  stop(): Promise<void>;
  /** SIGKILL to both. `start` brings them back with what their disks hold. */
  kill(): Promise<void>;
  start(): Promise<void>;
}

export const PASSWORD = 'test-password';
const START_TIMEOUT_MS = 10_000;

/** One redis-server. */
export class RedisServer {
  readonly socket: string;
  readonly url: string;
  readonly #directory: string;
  readonly #name: string;
  readonly #persistent: boolean;
  readonly #onProcess: (pid: number) => void;
  #child: ChildProcess | null = null;

  constructor(directory: string, name: string, persistent: boolean, onProcess: (pid: number) => void) {
    this.socket = join(directory, `${name}.sock`);
    this.url = `unix://${this.socket}?password=${PASSWORD}`;
    this.#directory = directory;
    this.#name = name;
    this.#persistent = persistent;
    this.#onProcess = onProcess;
  }

  get pid(): number | undefined {
    return this.#child?.pid;
  }

  async start(): Promise<void> {
    const options = {
      port: '0', unixsocket: this.socket, unixsocketperm: '700', dir: this.#directory, requirepass: PASSWORD, save: '', appendonly: this.#persistent ? 'yes' : 'no',
      appendfsync: 'everysec', appenddirname: `${this.#name}-aof`, 'maxmemory-policy': 'noeviction', daemonize: 'no', loglevel: 'warning',
    };
    this.#child = spawn('redis-server', Object.entries(options).flatMap(([key, value]) => [`--${key}`, value]), { stdio: 'ignore' });
    if (this.#child.pid !== undefined) this.#onProcess(this.#child.pid);
    await waitUntilUp(this.socket);
  }

  /** SIGKILL, also to a server that stands still. */
  async kill(): Promise<void> {
    const child = this.#child;
    if (child === null || child.exitCode !== null || child.signalCode !== null) return;
    const gone = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await gone;
  }

  /** While killed: its disk is that of a server that never was. */
  empty(): void {
    rmSync(join(this.#directory, `${this.#name}-aof`), { recursive: true, force: true });
  }

  /** While killed: cuts the last bytes off what it wrote down, as when a machine loses its last second. Returns how many there were. */
  truncate(bytes: number): number {
    const files = join(this.#directory, `${this.#name}-aof`);
    const file = join(files, readdirSync(files).find((name) => name.endsWith('.incr.aof'))!);
    const { size } = statSync(file);
    truncateSync(file, Math.max(0, size - bytes));
    return size;
  }

  /** The server stands still: connections stay, nothing is answered. Takes effect before this returns. */
  pause(): void {
    this.#child?.kill('SIGSTOP');
  }

  resume(): void {
    this.#child?.kill('SIGCONT');
  }

  /** A connection that keeps trying. The caller disconnects it. */
  connect(): Redis {
    const redis = new Redis({ path: this.socket, password: PASSWORD, maxRetriesPerRequest: null, retryStrategy: () => 10 });
    redis.on('error', () => undefined);
    return redis;
  }

  /** One command on a connection of its own, with its answer. */
  async call(command: string, ...args: (string | number)[]): Promise<unknown> {
    const redis = this.connect();
    try {
      return await redis.call(command, ...args);
    } finally {
      redis.disconnect();
    }
  }
}

/** Starts both servers, in a temporary directory unless one is given; throws when redis-server is not on the PATH. */
export async function startTestRedis(place?: string, onProcess: (pid: number) => void = () => undefined): Promise<TestRedis> {
  const directory = place ?? mkdtempSync(join(tmpdir(), 'nn-redis-'));
  mkdirSync(directory, { recursive: true });
  const queues = new RedisServer(directory, 'queues', true, onProcess);
  const exchange = new RedisServer(directory, 'exchange', false, onProcess);
  const start = async (): Promise<void> => void (await Promise.all([queues.start(), exchange.start()]));
  const kill = async (): Promise<void> => void (await Promise.all([queues.kill(), exchange.kill()]));
  await start();
  return {
    url: queues.url,
    exchangeUrl: exchange.url,
    queues,
    exchange,
    start,
    kill,
    stop: async () => {
      await kill();
      rmSync(directory, { recursive: true, force: true });
    },
  };
}

async function waitUntilUp(socket: string): Promise<void> {
  const redis = new Redis({ path: socket, password: PASSWORD, lazyConnect: false, maxRetriesPerRequest: null, retryStrategy: () => 10 });
  redis.on('error', () => undefined);
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, refuse) => {
    timer = setTimeout(() => refuse(new Error(`redis-server did not come up on ${socket}`)), START_TIMEOUT_MS);
  });
  try {
    await Promise.race([redis.ping(), late]);
  } finally {
    clearTimeout(timer);
    redis.disconnect();
  }
}
