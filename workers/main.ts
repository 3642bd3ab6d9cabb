/**
 * The supervisor: forks one worker process for each island, hands it its settings, restarts it when it dies, and stops them
 * all. It knows neither Redis nor devices; it only keeps processes alive, and tells each how the one before it ended. Called by the
 * command line (`cuda-nn worker`, `up`).
 *
 *            fork                 ready
 *   (start) ------> starting ------------> serving        exit, not asked for: wait (backoff with jitter), then fork again
 *                      |                      |            exit with EXIT.refused before it ever served: given up
 *                      +------- exit ---------+            stop(): SIGTERM, and SIGKILL after drainMs
 */
import { fork } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';
import { NnError, fromErrorRecord } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import type { ExitRecord } from '../config/messages.ts';
import { childEnvironment } from '../config/schema.ts';
import type { Config } from '../config/schema.ts';
import type { DeviceDescription } from '../cuda/device.ts';
import { EXIT } from './ipc.ts';
import type { LogLevel, StartMessage, WorkerMessage } from './ipc.ts';
import type { DeviceChoice } from './tasks.ts';

/** Bytes that are kept of what a worker printed last: a native crash says there what it was. */
const STDERR_BYTES = 4096;
/** Milliseconds that the last words of a process which has ended may take to arrive. */
const LAST_WORDS_MS = 1_000;
/** Milliseconds that a drained worker has to close its connections before it is killed. */
const CLOSING_MS = 3_000;
/**
 * MiB of each half of V8's young generation in a worker. Its threads make little garbage, so that a larger one is only memory that
 * is touched once and never given back: with the default of 16, RSS grew from 127 to 171 MB in 3,000 short steps, with 1 from 111 to 120.
 */
const SEMI_SPACE_MIB = 1;
/** MiB of the old one, of which a worker needs a tenth: V8 collects the sooner the less it may take. 1,000 steps then add 2% instead of 5%. */
const OLD_SPACE_MIB = 512;

export type SupervisorEvent =
  | { readonly type: 'started'; readonly id: string; readonly pid: number }
  | { readonly type: 'ready'; readonly id: string; readonly pid: number; readonly device: DeviceDescription }
  | { readonly type: 'log'; readonly id: string; readonly level: LogLevel; readonly message: string; readonly error?: ErrorRecord }
  /** restartInMs is null when it is not started again: it was told to stop, or was given up. */
  | {
      readonly type: 'exited';
      readonly id: string;
      readonly pid: number;
      readonly code: number | null;
      readonly signal: NodeJS.Signals | null;
      readonly error: ErrorRecord | null;
      readonly restartInMs: number | null;
    };

export interface SupervisorOptions {
  readonly config: Config;
  /** Which native library, and which of its devices; worker i gets indices[i % indices.length]. */
  readonly device: { readonly library: 'auto' | 'cpu' | 'cuda'; readonly indices: readonly number[] | 'cpu' };
  /** Worker processes. */
  readonly count: number;
  /** Worker i is called <idPrefix>-<i>: the same after a restart. Must be unique among all supervisors of one Redis. */
  readonly idPrefix: string;
  readonly onEvent?: (event: SupervisorEvent) => void;
}

export interface Supervisor {
  /** The workers that have a process now. */
  workers(): { readonly id: string; readonly pid: number }[];
  /** When every worker serves; rejects with the error of the first that was given up before it served. */
  readonly ready: Promise<void>;
  /** When no worker is left and none will be restarted; rejects if all were given up, with the error of the last. */
  readonly ended: Promise<void>;
  /** Stops all: SIGTERM, and after drainMs SIGKILL. Calling it again waits for the same end. */
  stop(): Promise<void>;
}

/** The pause before restart number `failures` (from 1) in a row: doubled each time up to a bound, and jittered by a half. Pure. */
export function restartPauseMs(failures: number, random: number, { restartBackoffMs, restartMaximumMs }: Config['worker']): number {
  const pause = Math.min(restartMaximumMs, restartBackoffMs * 2 ** Math.min(failures - 1, 30));
  return Math.round(pause * (0.5 + random / 2));
}

/** Starts supervising. Throws USAGE for an id that cannot be part of a queue's name; all else is told by events. */
export function startSupervisor(options: SupervisorOptions): Supervisor {
  const { config, count, idPrefix, onEvent = () => undefined } = options;
  if (!/^[A-Za-z0-9._-]+$/.test(idPrefix)) throw new NnError('USAGE', `worker name ${JSON.stringify(idPrefix)}: use letters, digits, . _ and - only`);
  const islands = Array.from(
    { length: count },
    (_, number) => new SupervisedWorker(`${idPrefix}-${number}`, deviceOf(options, number), config, onEvent),
  );
  for (const island of islands) island.start();
  const ready = Promise.all(islands.map((island) => island.ready)).then(() => undefined);
  const ended = Promise.all(islands.map((island) => island.ended)).then((errors) => {
    const last = errors.at(-1);
    if (last !== undefined && last !== null && errors.every((error) => error !== null)) throw fromErrorRecord(last);
  });
  // Whoever waits for them hears of a rejection; nobody has to.
  ready.catch(() => undefined);
  ended.catch(() => undefined);
  return {
    workers: () => islands.flatMap(({ id, pid }) => (pid === undefined ? [] : [{ id, pid }])),
    ready,
    ended,
    stop: async () => {
      await Promise.all(islands.map((island) => island.stop()));
    },
  };
}

/** CPU workers that are told to use all cores share them out, so that they do not fight for them. */
function deviceOf({ config, device, count }: SupervisorOptions, number: number): DeviceChoice {
  const { threads } = config.worker;
  if (device.indices !== 'cpu') return { library: device.library, index: device.indices[number % device.indices.length] ?? 0, threads };
  return { library: 'cpu', index: 0, threads: threads === 0 && count > 1 ? Math.max(1, Math.floor(availableParallelism() / count)) : threads };
}

class SupervisedWorker {
  readonly id: string;
  readonly ready: Promise<void>;
  /** Null after stop(), else why it was given up. */
  readonly ended: Promise<ErrorRecord | null>;
  readonly #device: DeviceChoice;
  readonly #config: Config;
  readonly #onEvent: (event: SupervisorEvent) => void;
  #resolveReady!: () => void;
  #rejectReady!: (error: Error) => void;
  #resolveEnded!: (error: ErrorRecord | null) => void;
  #child: ChildProcess | null = null;
  #fault: ErrorRecord | null = null;
  /** Id of the job that the process holds. */
  #held: string | null = null;
  /** Its settings were good once: what is refused later (a password that is not known yet, a GPU that is gone) may be cured. */
  #served = false;
  #stderr: Buffer = Buffer.alloc(0);
  #lastExit: ExitRecord | null = null;
  #failures = 0;
  #stopping = false;
  #restart: NodeJS.Timeout | undefined;

  constructor(id: string, device: DeviceChoice, config: Config, onEvent: (event: SupervisorEvent) => void) {
    this.id = id;
    this.#device = device;
    this.#config = config;
    this.#onEvent = onEvent;
    this.ready = new Promise((resolve, reject) => {
      this.#resolveReady = resolve;
      this.#rejectReady = reject;
    });
    this.ready.catch(() => undefined);
    this.ended = new Promise((resolve) => {
      this.#resolveEnded = resolve;
    });
  }

  get pid(): number | undefined {
    return this.#child?.pid;
  }

  start(): void {
    const child = fork(fileURLToPath(new URL('./worker.js', import.meta.url)), [], {
      stdio: ['ignore', 2, 'pipe', 'ipc'],
      serialization: 'json',
      env: childEnvironment(),
      execArgv: [...process.execArgv, `--max-semi-space-size=${SEMI_SPACE_MIB}`, `--max-old-space-size=${OLD_SPACE_MIB}`],
    });
    this.#child = child;
    this.#fault = null;
    this.#held = null;
    this.#stderr = Buffer.alloc(0);
    const startedAt = performance.now();
    const starting = setTimeout(() => {
      this.#fault = { code: 'TIMEOUT', message: `worker ${this.id} did not start within ${this.#config.worker.startMs} ms`, context: { worker: this.id } };
      child.kill('SIGKILL');
    }, this.#config.worker.startMs);
    child.on('message', (message: WorkerMessage) => {
      if (message.type === 'ready') clearTimeout(starting);
      this.#heard(message, child.pid!);
    });
    let over = false;
    const onEnd = (code: number | null, signal: NodeJS.Signals | null): void => {
      if (over) return;
      over = true;
      clearTimeout(starting);
      this.#exited(child, code, signal, performance.now() - startedAt);
    };
    child.stderr?.on('data', (printed: Buffer) => {
      process.stderr.write(printed);
      this.#stderr = Buffer.concat([this.#stderr, printed]).subarray(-STDERR_BYTES);
    });
    // A process is gone before everything that it said is read.
    child.once('exit', (code, signal) => {
      const heard: Promise<unknown>[] = [];
      if (child.connected) heard.push(once(child, 'disconnect'));
      if (child.stderr?.closed === false) heard.push(once(child.stderr, 'close'));
      const late = setTimeout(() => onEnd(code, signal), LAST_WORDS_MS);
      void Promise.allSettled(heard).then(() => {
        clearTimeout(late);
        onEnd(code, signal);
      });
    });
    child.once('error', (error) => {
      this.#fault ??= { code: 'WORKER_LOST', message: `worker ${this.id} could not be started or reached: ${error.message}`, context: { worker: this.id } };
      if (child.pid === undefined) onEnd(null, null);
    });
    if (child.pid !== undefined) this.#onEvent({ type: 'started', id: this.id, pid: child.pid });
    // A child that is gone already is told of by its exit.
    child.send({ type: 'start', id: this.id, config: this.#config, device: this.#device, lastExit: this.#lastExit } satisfies StartMessage, () => undefined);
  }

  async stop(): Promise<void> {
    this.#stopping = true;
    clearTimeout(this.#restart);
    const child = this.#child;
    if (child === null) {
      this.#resolveEnded(null);
    } else {
      child.kill('SIGTERM');
      const killer = setTimeout(() => child.kill('SIGKILL'), this.#config.worker.drainMs + CLOSING_MS);
      await this.ended;
      clearTimeout(killer);
    }
    await this.ended;
  }

  #heard(message: WorkerMessage, pid: number): void {
    switch (message.type) {
      case 'ready':
        this.#served = true;
        this.#resolveReady();
        this.#onEvent({ type: 'ready', id: this.id, pid, device: message.device });
        return;
      case 'holds':
        this.#held = message.job;
        return;
      case 'fault':
        this.#fault = message.error;
        this.#held = message.job ?? this.#held;
        return;
      case 'log':
        this.#onEvent({ ...message, id: this.id });
    }
  }

  #exited(child: ChildProcess, code: number | null, signal: NodeJS.Signals | null, livedMs: number): void {
    this.#child = null;
    const error = this.#fault;
    const pid = child.pid ?? 0;
    if (this.#stopping || (code === EXIT.refused && !this.#served)) {
      this.#onEvent({ type: 'exited', id: this.id, pid, code, signal, error, restartInMs: null });
      const given = this.#stopping ? null : (error ?? { code: 'WORKER_LOST', message: `worker ${this.id} ended with code ${code}`, context: { worker: this.id } });
      if (given !== null) this.#rejectReady(fromErrorRecord(given));
      this.#resolveEnded(given);
      return;
    }
    this.#lastExit = code === 0 ? null : { job: this.#held, code, signal, error: this.#evidence(code, signal), atMs: Date.now() };
    this.#failures = livedMs >= this.#config.worker.healthyMs ? 1 : this.#failures + 1;
    const restartInMs = restartPauseMs(this.#failures, Math.random(), this.#config.worker);
    this.#onEvent({ type: 'exited', id: this.id, pid, code, signal, error, restartInMs });
    this.#restart = setTimeout(() => this.start(), restartInMs);
  }

  /** What the process said was wrong, else that it was lost; with the end of what it printed. */
  #evidence(code: number | null, signal: NodeJS.Signals | null): ErrorRecord {
    const how = signal === null ? `exited with code ${code}` : `was ended by ${signal}`;
    const error: ErrorRecord = this.#fault ?? { code: 'WORKER_LOST', message: `the process of worker ${this.id} ${how}`, context: { worker: this.id, code, signal } };
    const stderr = this.#stderr.toString().trim();
    return stderr === '' ? error : { ...error, context: { ...error.context, stderr } };
  }
}
