/**
 * A real Redis for one test: redis-server on unix sockets in a temporary directory, with a password, append-only as in
 * production, and a second one without persistence for the exchange. Used by the tests of orchestrator, workers and cli.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Redis } from 'ioredis';

export interface TestRedis {
  readonly url: string;
  readonly exchangeUrl: string;
  /** Stops both servers and deletes their directory. */
  stop(): Promise<void>;
  /** SIGKILL to both. `start` brings them back with what their disks hold. */
  kill(): Promise<void>;
  start(): Promise<void>;
}

const PASSWORD = 'test-password';
const START_TIMEOUT_MS = 10_000;

/** Starts both servers; throws when redis-server is not on the PATH. */
export async function startTestRedis(): Promise<TestRedis> {
  const directory = mkdtempSync(join(tmpdir(), 'nn-redis-'));
  const socketOf = (name: string): string => join(directory, `${name}.sock`);
  const urlOf = (name: string): string => `unix://${socketOf(name)}?password=${PASSWORD}`;
  let children: ChildProcess[] = [];
  const start = async (): Promise<void> => {
    children = [serve(directory, 'queues', socketOf('queues'), true), serve(directory, 'exchange', socketOf('exchange'), false)];
    await Promise.all(['queues', 'exchange'].map((name) => waitUntilUp(socketOf(name))));
  };
  const end = async (signal: NodeJS.Signals): Promise<void> => {
    await Promise.all(children.map((child) => ended(child, signal)));
  };
  await start();
  return {
    url: urlOf('queues'),
    exchangeUrl: urlOf('exchange'),
    start,
    kill: () => end('SIGKILL'),
    stop: async () => {
      await end('SIGKILL');
      rmSync(directory, { recursive: true, force: true });
    },
  };
}

function serve(directory: string, name: string, socket: string, persistent: boolean): ChildProcess {
  const options = {
    port: '0', unixsocket: socket, unixsocketperm: '700', dir: directory, requirepass: PASSWORD, save: '', appendonly: persistent ? 'yes' : 'no',
    appendfsync: 'everysec', appenddirname: `${name}-aof`, 'maxmemory-policy': 'noeviction', daemonize: 'no', loglevel: 'warning',
  };
  return spawn('redis-server', Object.entries(options).flatMap(([key, value]) => [`--${key}`, value]), { stdio: 'ignore' });
}

async function ended(child: ChildProcess, signal: NodeJS.Signals): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const gone = new Promise((resolve) => child.once('exit', resolve));
  child.kill(signal);
  await gone;
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
