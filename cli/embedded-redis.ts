/**
 * Runs redis-server (or valkey-server) as children of this process: one for the queues (append-only file, synced every
 * second) and one for the tensors of the exchange (nothing kept). Both refuse to evict, listen on a unix socket that only
 * this user may open, and want a random password, which travels in files of mode 0600 and never in an argument.
 * Knows nothing of queues or runs. Called by stack.ts; others find the servers through <home>/redis.json.
 *
 *   <home>/redis.json           addresses with passwords, 0600; written last, removed first
 *   <home>/redis/queues.conf    configuration, 0600; queues.log, queues/ (append-only file: survives restarts)
 *   <home>/redis/exchange.conf  the same of the exchange
 *   <home>/redis/processes.json what a crashed `up` left running: the next one ends it
 *
 * The servers live in sessions of their own, so that Ctrl-C reaches only us and they stop last. One that dies is launched
 * again. If we are killed, a watchdog (a shell that reads a pipe from us until its end) stops them.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { accessSync, constants, lstatSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join, resolve } from 'node:path';
import { NnError } from '../config/errors.ts';
import { addressFile, openRedis } from '../config/redis.ts';
import type { RedisAddresses } from '../config/redis.ts';
import { childEnvironment } from '../config/schema.ts';
import type { Config } from '../config/schema.ts';
import { isAlive, processName, takeHome } from './home-lock.ts';
import type { ProcessName } from './home-lock.ts';

/** sun_path of a unix socket holds 108 bytes on Linux and 104 on macOS, with a final zero. */
const SOCKET_PATH_BYTES = 103;
const START_TIMEOUT_MS = 15_000;
const STOP_TIMEOUT_MS = 10_000;
const POLL_MS = 25;
/** A server that dies is launched again, at most so often within the window, after a pause that doubles. */
const RESTARTS = 5;
const RESTART_WINDOW_MS = 60_000;
const RESTART_PAUSE_MS = 100;
const PROGRAMS = ['redis-server', 'valkey-server'] as const;
const ROLES = ['queues', 'exchange'] as const;
type Role = (typeof ROLES)[number];

export interface EmbeddedRedis {
  readonly addresses: RedisAddresses;
  readonly program: string;
  /** Resolves with a reason if a server keeps dying although nobody asked it to. */
  readonly failed: Promise<string>;
  /** Shuts both servers down and removes what describes them; the queues' data stays. */
  stop(): Promise<void>;
}

function executable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return statSync(path).isFile();
  } catch (error) {
    if (['ENOENT', 'EACCES', 'ENOTDIR'].includes((error as NodeJS.ErrnoException).code ?? '')) return false;
    throw error;
  }
}

/** The server program: the configured one, else the first on the PATH. Throws REDIS_UNAVAILABLE. */
export function findRedisServer(config: Config, path = process.env['PATH'] ?? ''): string {
  const wanted = config.redis.server === '' ? PROGRAMS : [config.redis.server];
  for (const program of wanted) {
    if (program.includes('/')) {
      if (executable(program)) return program;
      continue;
    }
    const found = path.split(delimiter).map((directory) => join(directory, program)).find(executable);
    if (found !== undefined) return found;
  }
  throw new NnError(
    'REDIS_UNAVAILABLE',
    `no Redis: CUDA_NN_REDIS_URL is not set and there is no ${wanted.join(' or ')} on the PATH; install it (Debian: apt-get install redis-server)`,
  );
}

/** Where the sockets lie: in the home, or, if that path is too long or odd for a socket, under the temporary directory. */
export function socketDirectory(home: string): string {
  const inside = join(resolve(home), 'redis');
  if (Buffer.byteLength(join(inside, 'exchange.sock')) <= SOCKET_PATH_BYTES && /^[\w./-]+$/.test(inside)) return inside;
  return join(tmpdir(), `cuda-nn-${createHash('sha256').update(resolve(home)).digest('hex').slice(0, 16)}`);
}

function makePrivateDirectory(path: string): void {
  mkdirSync(path, { recursive: true, mode: 0o700 });
  const found = lstatSync(path);
  if (!found.isDirectory() || (process.getuid !== undefined && found.uid !== process.getuid())) {
    throw new NnError('REDIS_UNAVAILABLE', `${path} belongs to somebody else; remove it, or name another home with CUDA_NN_HOME`, { path });
  }
}

const quote = (text: string): string => `"${text.replace(/["\\]/g, '\\$&')}"`;

/** The configuration file of one server. */
export function redisConfiguration(role: Role, directory: string, socket: string, password: string): string {
  const persistence = role === 'queues' ? ['appendonly yes', 'appendfsync everysec', 'auto-aof-rewrite-min-size 16mb'] : ['appendonly no'];
  return [
    'port 0',
    `unixsocket ${quote(socket)}`,
    'unixsocketperm 700',
    `requirepass ${password}`,
    'daemonize no',
    'databases 1',
    'save ""',
    ...persistence,
    'maxmemory-policy noeviction',
    'loglevel notice',
    `logfile ${quote(join(directory, `${role}.log`))}`,
    `dir ${quote(join(directory, role))}`,
    'timeout 0',
    '',
  ].join('\n');
}

/** Stops servers that an earlier process left behind, known by id, start time and program. */
async function endLeftovers(file: string): Promise<void> {
  let leftovers: ProcessName[];
  try {
    leftovers = JSON.parse(readFileSync(file, 'utf8')) as ProcessName[];
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT' || error instanceof SyntaxError) return;
    throw error;
  }
  for (const each of leftovers.filter((leftover) => leftover.startedAt !== null && isAlive(leftover))) await endProcess(each);
  rmSync(file, { force: true });
}

async function endProcess(name: ProcessName): Promise<void> {
  process.kill(name.pid, 'SIGTERM');
  await until(() => !isAlive(name), STOP_TIMEOUT_MS);
  if (isAlive(name)) process.kill(name.pid, 'SIGKILL');
}

/** Polls until `done` or the deadline; says which. */
async function until(done: () => boolean | Promise<boolean>, timeoutMs: number): Promise<boolean> {
  const deadline = performance.now() + timeoutMs;
  while (!(await done())) {
    if (performance.now() > deadline) return false;
    await new Promise((wake) => setTimeout(wake, POLL_MS));
  }
  return true;
}

const lastLine = (file: string): string => {
  try {
    return readFileSync(file, 'utf8').trimEnd().split('\n').at(-1)!;
  } catch (error) {
    return `no log: ${(error as Error).message}`;
  }
};

interface Server {
  readonly role: Role;
  readonly url: string;
  readonly socket: string;
  readonly log: string;
  /** Starts the program; on the same socket and password every time. */
  launch(): void;
  pid(): number | undefined;
  isRunning(): boolean;
  /** Resolves with the reason when the process launched last ends. */
  ended(): Promise<string>;
  end(signal: 'SIGTERM' | 'SIGKILL'): void;
}

/** One server: writes its configuration, and knows its process, of which there may be several one after the other. */
function configureServer(role: Role, program: string, directory: string, sockets: string): Server {
  const password = randomBytes(24).toString('hex');
  const socket = join(sockets, `${role}.sock`);
  const configuration = join(directory, `${role}.conf`);
  const log = join(directory, `${role}.log`);
  mkdirSync(join(directory, role), { recursive: true, mode: 0o700 });
  for (const file of [log, configuration]) rmSync(file, { force: true }); // so that the mode below applies
  writeFileSync(configuration, redisConfiguration(role, directory, socket, password), { mode: 0o600 });
  let child: ChildProcess | undefined;
  let end: Promise<string> = Promise.resolve('not started');
  return {
    role,
    url: `unix://${encodeURI(socket)}?password=${password}`,
    socket,
    log,
    launch: () => {
      rmSync(socket, { force: true });
      const launched = spawn(program, [configuration], { stdio: 'ignore', detached: true, env: childEnvironment() });
      end = new Promise((settle) => {
        launched.once('error', (error) => settle(error.message));
        launched.once('exit', (status, signal) => settle(`the server of the ${role} ended (${signal ?? `exit ${status}`}): ${lastLine(log)}`));
      });
      child = launched;
    },
    pid: () => child?.pid,
    isRunning: () => child?.pid !== undefined && child.exitCode === null && child.signalCode === null,
    ended: () => end,
    end: (signal) => void child?.kill(signal),
  };
}

/** Waits until the server answers PING with its password; it answers an error while it still loads its file. */
async function ready(server: Server, program: string, config: Config): Promise<void> {
  const answers = async (): Promise<boolean> => {
    if (!server.isRunning()) throw new NnError('REDIS_UNAVAILABLE', `${program} does not start: ${await server.ended()}`);
    const redis = openRedis(server.url, { ...config, redis: { ...config.redis, connectTimeoutMs: 1000 } }, 'command');
    try {
      await Promise.race([redis.connect(), server.ended()]);
      return (await redis.ping()) === 'PONG';
    } catch (error) {
      if (/WRONGPASS|NOAUTH/.test((error as Error).message)) throw error;
      return false; // not listening yet: the next look tells
    } finally {
      redis.disconnect();
    }
  };
  const { log } = server;
  const socketThere = (): boolean => !server.isRunning() || existsSocket(server.socket);
  if ((await until(socketThere, START_TIMEOUT_MS)) && (await until(answers, START_TIMEOUT_MS))) return;
  throw new NnError('REDIS_UNAVAILABLE', `${program} does not answer within ${START_TIMEOUT_MS / 1000} s: ${lastLine(log)}`);
}

function existsSocket(path: string): boolean {
  try {
    return lstatSync(path).isSocket();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw error;
  }
}

/** A shell that stops the servers when this process is gone, however it went: then its pipe ends. */
function startWatchdog(pids: readonly number[]): ChildProcess {
  const watchdog = spawn('/bin/sh', ['-c', 'cat >/dev/null; kill "$@" 2>/dev/null', 'cuda-nn-watchdog', ...pids.map(String)], {
    stdio: ['pipe', 'ignore', 'ignore'],
    detached: true,
    env: childEnvironment(),
  });
  watchdog.on('error', () => undefined); // without /bin/sh the next `up` cleans instead
  watchdog.stdin?.on('error', () => undefined); // it was killed: nothing to tell it
  return watchdog;
}

async function stopServer(server: Server): Promise<void> {
  if (!server.isRunning()) return;
  server.end('SIGTERM');
  if (!(await until(() => !server.isRunning(), STOP_TIMEOUT_MS))) server.end('SIGKILL');
  await server.ended();
}

/** Both servers of a home, kept running until `stop`: a server that dies is launched again, within bounds. */
class Keeper {
  readonly #servers: readonly Server[];
  readonly #processesFile: string;
  readonly #onEvent: (text: string) => void;
  #watchdog: ChildProcess | undefined;
  readonly #stopping = new AbortController();

  constructor(servers: readonly Server[], processesFile: string, onEvent: (text: string) => void) {
    this.#servers = servers;
    this.#processesFile = processesFile;
    this.#onEvent = onEvent;
  }

  launch(server: Server): void {
    server.launch();
    const pids = this.#servers.filter((each) => each.isRunning()).map((each) => each.pid()!);
    writeFileSync(this.#processesFile, JSON.stringify(pids.map(processName)), { mode: 0o600 });
    this.#watchdog?.kill('SIGKILL');
    this.#watchdog = startWatchdog(pids);
  }

  /** Resolves with the reason once a server dies more often than is allowed; never rejects. */
  async keep(server: Server): Promise<string> {
    const restarts: number[] = [];
    for (;;) {
      const reason = await server.ended();
      const since = performance.now() - RESTART_WINDOW_MS;
      while (restarts.length > 0 && restarts[0]! < since) restarts.shift();
      if (this.#stopping.signal.aborted) return new Promise(() => undefined);
      if (restarts.length >= RESTARTS) return `Redis: ${reason}`;
      const pauseMs = RESTART_PAUSE_MS * 2 ** restarts.length;
      this.#onEvent(`Redis: ${reason}; starting it again`);
      await new Promise((wake) => setTimeout(wake, pauseMs));
      if (this.#stopping.signal.aborted) return new Promise(() => undefined);
      restarts.push(performance.now());
      this.launch(server);
    }
  }

  async stop(): Promise<void> {
    this.#stopping.abort();
    this.#watchdog?.kill('SIGKILL');
    await Promise.all(this.#servers.map(stopServer));
    rmSync(this.#processesFile, { force: true });
  }
}

/**
 * Starts both servers in `config.home` and waits until they answer; `onEvent` hears of servers that died and came back.
 * Throws ALREADY_UP if another process has this home, REDIS_UNAVAILABLE if there is no server program or it fails.
 */
export async function startEmbeddedRedis(config: Config, onEvent: (text: string) => void = () => undefined): Promise<EmbeddedRedis> {
  const program = findRedisServer(config);
  const home = resolve(config.home);
  const lock = takeHome(home);
  const directory = join(home, 'redis');
  const sockets = socketDirectory(home);
  const processes = join(directory, 'processes.json');
  let keeper: Keeper | undefined;
  const stop = async (): Promise<void> => {
    rmSync(addressFile(config), { force: true });
    await keeper?.stop();
    for (const role of ROLES) for (const file of [join(sockets, `${role}.sock`), join(directory, `${role}.conf`)]) rmSync(file, { force: true });
    if (sockets !== directory) rmSync(sockets, { recursive: true, force: true });
    lock.release();
  };
  try {
    makePrivateDirectory(directory);
    makePrivateDirectory(sockets);
    await endLeftovers(processes);
    const servers = ROLES.map((role) => configureServer(role, program, directory, sockets));
    keeper = new Keeper(servers, processes, onEvent);
    for (const server of servers) keeper.launch(server);
    for (const server of servers) await ready(server, program, config);
    const failed = Promise.race(servers.map((server) => keeper!.keep(server)));
    const [queues, exchange] = servers as [Server, Server];
    const addresses: RedisAddresses = { url: queues.url, exchangeUrl: exchange.url };
    rmSync(addressFile(config), { force: true });
    writeFileSync(addressFile(config), `${JSON.stringify(addresses)}\n`, { mode: 0o600 });
    return { addresses, program, failed, stop };
  } catch (error) {
    await stop();
    throw error;
  }
}
