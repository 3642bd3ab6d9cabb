/**
 * Two hosts on one machine: two network namespaces with an address each and a link between them that can be cut and slowed
 * down, and nothing else. The first has Redis and the orchestrator, the second workers whose view of the disk lacks the
 * first's directory. Needs root and iproute2; `whyNot` says what is missing. Used by test/system/two-hosts.test.ts.
 */
import { execFileSync, spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { Client } from '../../orchestrator/client.ts';

const MAIN = fileURLToPath(new URL('../../cli/main.js', import.meta.url));
export const FIRST = '10.77.0.1';
const SECOND = '10.77.0.2';
const REDIS_PORT = 6379;
const API_PORT = 7077;
/** Milliseconds that a process has to stop in before it is killed. */
const STOP_MS = 10_000;
const PASSWORD = 'two-hosts-redis-password';
const TOKEN = 'two-hosts-api-token-0123456789';
export const STORE_TOKEN = 'two-hosts-store-token-0123456789';

const ip = (...args: string[]): string => execFileSync('ip', args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });

/** Why two hosts cannot be played here, or null. */
export function whyNot(): string | null {
  if (process.platform !== 'linux') return 'network namespaces are Linux';
  if (process.getuid?.() !== 0) return 'root is needed for network namespaces';
  const name = `nnprobe${process.pid}`;
  try {
    execFileSync('unshare', ['-m', 'true'], { stdio: 'pipe' });
    ip('netns', 'add', name);
    ip('-n', name, 'link', 'add', 'probe0', 'type', 'veth', 'peer', 'name', 'probe1');
    execFileSync('tc', ['-n', name, 'qdisc', 'add', 'dev', 'probe0', 'root', 'tbf', 'rate', '8mbit', 'burst', '64kb', 'latency', '100ms'], { stdio: 'pipe' });
    ip('netns', 'del', name);
    return null;
  } catch (error) {
    const text = (error as { stderr?: Buffer }).stderr?.toString() ?? '';
    return `network namespaces cannot be made here (iproute2 and root are needed): ${(text === '' ? (error as Error).message : text).trim().split('\n')[0]}`;
  }
}

/** A process of one host, and all that it has said. */
export interface Part {
  readonly child: ChildProcess;
  output(): string;
  /** Once its output holds `pattern`; rejects when it ends first, or after `limitMs`. */
  saw(pattern: RegExp, limitMs?: number): Promise<RegExpExecArray>;
  stop(signal?: NodeJS.Signals): Promise<void>;
}

function started(command: string, args: readonly string[], env: NodeJS.ProcessEnv, cwd: string): Part {
  const child = spawn(command, args, { cwd, env, stdio: ['ignore', 'pipe', 'pipe'] });
  let output = '';
  const listeners = new Set<() => void>();
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text;
      for (const look of listeners) look();
    });
  }
  const ended = new Promise<void>((resolve) => child.once('close', () => resolve()));
  return {
    child,
    output: () => output,
    saw: (pattern, limitMs = 60_000) =>
      new Promise((resolve, reject) => {
        const timer = setTimeout(() => reject(new Error(`no ${pattern} within ${limitMs} ms:\n${output}`)), limitMs);
        const look = (): void => {
          const match = new RegExp(pattern.source, pattern.flags).exec(output);
          if (match === null) return;
          listeners.delete(look);
          clearTimeout(timer);
          resolve(match);
        };
        listeners.add(look);
        void ended.then(() => {
          clearTimeout(timer);
          reject(new Error(`ended before ${pattern}:\n${output}`));
        });
        look();
      }),
    stop: async (signal = 'SIGTERM') => {
      if (child.exitCode === null && child.signalCode === null) child.kill(signal);
      const killer = setTimeout(() => child.kill('SIGKILL'), STOP_MS);
      await ended;
      clearTimeout(killer);
    },
  };
}

/** Settings with which a cut is noticed within seconds. */
const QUICK = {
  CUDA_NN_HEARTBEAT_MS: '200', CUDA_NN_DEAD_AFTER_MS: '2000', CUDA_NN_STORE_TIMEOUT_MS: '1500', CUDA_NN_LOOKUP_MS: '500', CUDA_NN_DRAIN_MS: '3000',
  CUDA_NN_RESTART_BACKOFF_MS: '50', CUDA_NN_THREADS: '1', CUDA_NN_LIBRARY: 'cpu', CUDA_NN_LOCK_DURATION_MS: '4000', CUDA_NN_STALLED_INTERVAL_MS: '500',
};

export class TwoHosts {
  readonly directory = mkdtempSync(join(tmpdir(), 'nn-two-hosts-'));
  /** What only the first host has: data, runs, home, Redis. */
  readonly first = join(this.directory, 'first');
  readonly second = join(this.directory, 'second');
  readonly config: Config;
  readonly client: Client;
  readonly #a = `nna${process.pid}`;
  readonly #b = `nnb${process.pid}`;
  readonly #socket = join(this.directory, 'redis.sock');
  readonly #parts: Part[] = [];
  #redis: Part | undefined;

  constructor(settings: Record<string, object> = {}) {
    for (const path of [this.first, join(this.first, 'redis'), join(this.first, 'runs'), this.second]) mkdirSync(path);
    this.config = loadConfig({ home: join(this.first, 'home'), runs: join(this.first, 'runs'), ...settings, redis: { url: `unix://${this.#socket}?password=${PASSWORD}`, ...settings['redis'] } });
    this.client = new Client({ config: this.config });
  }

  /** Namespaces, link, Redis, orchestrator. */
  async start(): Promise<void> {
    const [a, b] = [this.#a, this.#b];
    for (const name of [a, b]) {
      ip('netns', 'add', name);
      ip('-n', name, 'link', 'set', 'lo', 'up');
    }
    ip('-n', a, 'link', 'add', 'here', 'type', 'veth', 'peer', 'name', 'there', 'netns', b);
    ip('-n', a, 'addr', 'add', `${FIRST}/24`, 'dev', 'here');
    ip('-n', b, 'addr', 'add', `${SECOND}/24`, 'dev', 'there');
    ip('-n', a, 'link', 'set', 'here', 'up');
    ip('-n', b, 'link', 'set', 'there', 'up');
    const conf = join(this.first, 'redis', 'redis.conf');
    writeFileSync(conf, [`bind ${FIRST}`, `port ${REDIS_PORT}`, `unixsocket ${this.#socket}`, `requirepass ${PASSWORD}`, `dir ${join(this.first, 'redis')}`,
      'appendonly yes', 'save ""', 'maxmemory-policy noeviction', 'daemonize no', ''].join('\n'), { mode: 0o600 });
    this.#redis = this.#start(a, 'redis-server', [conf], {}, this.first);
    await this.#redis.saw(/Ready to accept connections/i);
    const orchestrator = this.#start(a, process.execPath, [MAIN, 'orchestrator', '--host', FIRST, '--port', String(API_PORT)],
      { CUDA_NN_HOME: join(this.first, 'home'), CUDA_NN_RUNS: join(this.first, 'runs') }, this.first);
    await orchestrator.saw(/orchestrator {2}ready/);
  }

  /** Workers on the first host, which read and write its disk. */
  async workHere(count: number): Promise<Part> {
    const places = { CUDA_NN_HOME: join(this.first, 'home'), CUDA_NN_RUNS: join(this.first, 'runs') };
    const part = this.#start(this.#a, process.execPath, [MAIN, 'worker', '--gpus', 'none', '--count', String(count)], places, this.first);
    await this.#serving(part, count);
    return part;
  }

  /** Workers on the second host: an empty directory lies where the first host's is. */
  async workThere(count: number): Promise<Part> {
    const script = `mount -t tmpfs -o size=1m,ro none ${this.first} && exec "$0" "$@"`;
    const part = this.#start(this.#b, 'unshare', ['-m', 'sh', '-c', script, process.execPath, MAIN, 'worker', '--gpus', 'none', '--count', String(count)], {
      CUDA_NN_HOME: join(this.second, 'home'), CUDA_NN_RUNS: join(this.second, 'runs'), CUDA_NN_STORE_URL: `http://${FIRST}:${API_PORT}`,
    }, this.second);
    await this.#serving(part, count);
    return part;
  }

  async #serving(part: Part, count: number): Promise<void> {
    await part.saw(new RegExp(`(worker +\\S+ \\(process \\d+\\) on [^\\n]*[\\s\\S]*){${count}}`));
  }

  /** The link goes down on the workers' side. */
  cut(): void {
    ip('-n', this.#b, 'link', 'set', 'there', 'down');
  }

  mend(): void {
    ip('-n', this.#b, 'link', 'set', 'there', 'up');
  }

  /** At most so many megabits a second towards a host; null: as fast as it goes. */
  slow(towards: 'first' | 'second', megabits: number | null): void {
    const place = towards === 'first' ? [this.#b, 'there'] : [this.#a, 'here'];
    const rule = megabits === null ? ['del', 'dev', place[1]!, 'root'] : ['replace', 'dev', place[1]!, 'root', 'tbf', 'rate', `${megabits}mbit`, 'burst', '64kb', 'latency', '200ms'];
    execFileSync('tc', ['-n', place[0]!, 'qdisc', ...rule], { stdio: 'pipe' });
  }

  /** Asks the API from within the first host. */
  get(path: string, token = TOKEN): Promise<{ status: number; text: string }> {
    const script = 'fetch(process.argv[1], { headers: { authorization: process.argv[2] } }).then(async (r) => console.log(JSON.stringify({ status: r.status, text: await r.text() })))';
    const args = ['netns', 'exec', this.#a, process.execPath, '-e', script, `http://${FIRST}:${API_PORT}${path}`, `Bearer ${token}`];
    return new Promise((resolve, reject) => {
      const child = spawn('ip', args, { stdio: ['ignore', 'pipe', 'inherit'] });
      let text = '';
      child.stdout.setEncoding('utf8').on('data', (part: string) => (text += part));
      child.once('close', () => (text === '' ? reject(new Error(`no answer to ${path}`)) : resolve(JSON.parse(text) as { status: number; text: string })));
    });
  }

  /** Bytes that the store has sent and received since it began. */
  async moved(): Promise<{ sent: number; received: number }> {
    const { text } = await this.get('/metrics');
    const of = (name: string): number => Number(new RegExp(`^${name} (\\d+)`, 'm').exec(text)![1]);
    return { sent: of('nn_store_sent_bytes'), received: of('nn_store_received_bytes') };
  }

  async stop(): Promise<void> {
    await this.client.close();
    // Whoever stops has words for Redis, which goes last.
    await Promise.all(this.#parts.filter((part) => part !== this.#redis).map((part) => part.stop()));
    await this.#redis?.stop('SIGKILL');
    for (const name of [this.#a, this.#b]) ip('netns', 'del', name);
    rmSync(this.directory, { recursive: true, force: true });
  }

  #start(namespace: string, command: string, args: readonly string[], env: NodeJS.ProcessEnv, cwd: string): Part {
    const clean = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('CUDA_NN_')));
    const settings = { ...QUICK, CUDA_NN_REDIS_URL: `redis://:${PASSWORD}@${FIRST}:${REDIS_PORT}`, CUDA_NN_TOKEN: namespace === this.#a ? TOKEN : '', CUDA_NN_STORE_TOKEN: STORE_TOKEN };
    const part = started('ip', ['netns', 'exec', namespace, command, ...args], { ...clean, ...settings, ...env, CUDA_NN_LOG: 'info' }, cwd);
    this.#parts.push(part);
    return part;
  }
}
