/**
 * Every knob of a process: type, unit, bound, default and environment variable, in one convict schema. What decides a
 * run's bits is not here but in the run spec. Loaded once by each process's entry point and handed down; nothing else
 * reads process.env. docs/operations.md prints this table (a test compares the two).
 */
import { existsSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import convict from 'convict';
import { NnError } from './errors.ts';

const within = (low: number, high: number, integer = true) => (value: unknown): void => {
  if (typeof value !== 'number' || !Number.isFinite(value) || value < low || value > high || (integer && !Number.isInteger(value))) {
    throw new Error(`must be ${integer ? 'a whole number' : 'a number'} from ${low} to ${high}`);
  }
};

/** One knob; `low`..`high` are its bounds. */
const knob = (doc: string, env: string, value: number, low: number, high: number) => ({ doc, env, default: value, format: within(low, high) });
const text = (doc: string, env: string, value: string) => ({ doc, env, default: value, format: String });

const schema = {
  home: text('Directory of runtime state: the embedded Redis, its password, the socket', 'CUDA_NN_HOME', '.cuda-nn'),
  runs: text('Directory of runs: specs, metrics, checkpoints', 'CUDA_NN_RUNS', 'runs'),
  logLevel: { doc: 'Log level on stderr', env: 'CUDA_NN_LOG', default: 'info', format: ['trace', 'debug', 'info', 'warn', 'error', 'silent'] },
  redis: {
    url: { ...text('Redis of the queues: redis://, rediss:// or unix socket; empty: the embedded one', 'CUDA_NN_REDIS_URL', ''), sensitive: true },
    exchangeUrl: { ...text('Redis of the tensors (no persistence needed); empty: the same, or the second embedded one', 'CUDA_NN_EXCHANGE_URL', ''), sensitive: true },
    caFile: text('PEM file of the authority whose certificates a rediss:// server may have; empty: those that Node trusts', 'CUDA_NN_REDIS_CA', ''),
    certificateFile: text('PEM file of the certificate to show to a rediss:// server that asks for one', 'CUDA_NN_REDIS_CERTIFICATE', ''),
    keyFile: text('PEM file of its private key', 'CUDA_NN_REDIS_KEY', ''),
    prefix: text('Prefix of every key', 'CUDA_NN_REDIS_PREFIX', 'nn'),
    server: text('Program to embed; empty: redis-server or valkey-server on the PATH', 'CUDA_NN_REDIS_SERVER', ''),
    connectTimeoutMs: knob('Milliseconds until a first connection is given up', 'CUDA_NN_REDIS_CONNECT_TIMEOUT_MS', 10_000, 100, 600_000),
    silenceMs: knob('A connection on which a command waits for so long without a byte is given up and opened anew, milliseconds', 'CUDA_NN_REDIS_SILENCE_MS', 20_000, 1_000, 3_600_000),
    retryMaximumMs: knob('Longest pause between reconnections, milliseconds', 'CUDA_NN_REDIS_RETRY_MAXIMUM_MS', 2_000, 10, 60_000),
  },
  queue: {
    lockDurationMs: knob('A job whose lock was not renewed for so long is given to another, milliseconds', 'CUDA_NN_LOCK_DURATION_MS', 30_000, 1_000, 3_600_000),
    stalledIntervalMs: knob('Milliseconds between searches for jobs with lost locks', 'CUDA_NN_STALLED_INTERVAL_MS', 5_000, 500, 600_000),
    maxStalledCount: knob('Times a job may lose its worker before it fails', 'CUDA_NN_MAX_STALLED', 3, 0, 100),
    attempts: knob('Attempts at a job whose error may be retried', 'CUDA_NN_ATTEMPTS', 5, 1, 100),
    backoffMs: knob('First pause before a retry, doubled each time, milliseconds', 'CUDA_NN_BACKOFF_MS', 200, 1, 600_000),
  },
  exchange: {
    chunkBytes: knob('Bytes of a chunk of a tensor', 'CUDA_NN_EXCHANGE_CHUNK_BYTES', 4 << 20, 4096, 256 << 20),
    concurrency: knob('Chunks under way at once', 'CUDA_NN_EXCHANGE_CONCURRENCY', 4, 1, 64),
    logBytes: knob('Bytes of reduced gradients kept for replicas that lag; a checkpoint is brought forward past it', 'CUDA_NN_EXCHANGE_LOG_BYTES', 1 << 30, 0, Number.MAX_SAFE_INTEGER),
    timeoutMs: knob('Deadline of one transfer of a chunk, milliseconds', 'CUDA_NN_EXCHANGE_TIMEOUT_MS', 30_000, 100, 3_600_000),
    outageMs: knob('Longest outage of the exchange that a job waits for, milliseconds', 'CUDA_NN_EXCHANGE_OUTAGE_MS', 3_600_000, 100, 86_400_000),
  },
  worker: {
    heartbeatMs: knob('Milliseconds between heartbeats', 'CUDA_NN_HEARTBEAT_MS', 1_000, 50, 60_000),
    deadAfterMs: knob('A worker unheard of for so long is taken for dead, milliseconds', 'CUDA_NN_DEAD_AFTER_MS', 5_000, 200, 3_600_000),
    threads: knob('CPU threads of a worker; 0: all cores', 'CUDA_NN_THREADS', 0, 0, 1024),
    restartBackoffMs: knob('First pause before a dead worker is restarted, doubled each time, milliseconds', 'CUDA_NN_RESTART_BACKOFF_MS', 200, 1, 600_000),
    restartMaximumMs: knob('Longest such pause, milliseconds', 'CUDA_NN_RESTART_MAXIMUM_MS', 10_000, 1, 3_600_000),
    healthyMs: knob('A worker that lived so long is restarted with the first pause again, milliseconds', 'CUDA_NN_HEALTHY_MS', 60_000, 1, 3_600_000),
    drainMs: knob('Grace for the job at hand on SIGTERM, milliseconds', 'CUDA_NN_DRAIN_MS', 20_000, 0, 3_600_000),
    callTimeoutMs: knob('A compute thread without any sign of life for so long is taken for hung, milliseconds', 'CUDA_NN_CALL_TIMEOUT_MS', 900_000, 1_000, 86_400_000),
    controlPollMs: knob('Milliseconds between looks at the control key, should its message be lost', 'CUDA_NN_CONTROL_POLL_MS', 1_000, 50, 60_000),
    checkpointCopyPercent: knob('Most of the host’s free memory for a copy of the state while its checkpoint is written, percent; 0: training waits', 'CUDA_NN_CHECKPOINT_COPY_PERCENT', 50, 0, 100),
    patienceMs: knob('A job of a shared queue waits so long for a busy device before it is given back to others, milliseconds', 'CUDA_NN_PATIENCE_MS', 250, 0, 60_000),
    startMs: knob('Deadline of a worker’s start, milliseconds', 'CUDA_NN_WORKER_START_MS', 60_000, 1_000, 3_600_000),
    library: { doc: 'Native library: auto, cpu or cuda', env: 'CUDA_NN_LIBRARY', default: 'auto', format: ['auto', 'cpu', 'cuda'] },
  },
  store: {
    url: text('Store of the orchestrator (http:// or https://) that gives this worker its files and takes its checkpoints; empty: the same file system', 'CUDA_NN_STORE_URL', ''),
    token: { ...text('Bearer token that opens the store and nothing else; empty: that of the HTTP API', 'CUDA_NN_STORE_TOKEN', ''), sensitive: true },
    cacheBytes: knob('Bytes of a worker machine’s cache of files from the store (home/cache); what is in use stays beyond it', 'CUDA_NN_STORE_CACHE_BYTES', 64 * 2 ** 30, 0, Number.MAX_SAFE_INTEGER),
    pieceBytes: knob('Bytes of one request of an upload', 'CUDA_NN_STORE_PIECE_BYTES', 16 << 20, 4096, 1 << 30),
    concurrency: knob('Files that one worker fetches or delivers at once', 'CUDA_NN_STORE_CONCURRENCY', 4, 1, 64),
    transfers: knob('Files that the store sends or receives at once; others wait', 'CUDA_NN_STORE_TRANSFERS', 64, 1, 4096),
    timeoutMs: knob('A transfer of which no byte moved for so long is begun anew where it stood, milliseconds', 'CUDA_NN_STORE_TIMEOUT_MS', 30_000, 100, 3_600_000),
    outageMs: knob('Longest outage of the store that a job waits for, milliseconds', 'CUDA_NN_STORE_OUTAGE_MS', 3_600_000, 100, 86_400_000),
    expireMs: knob('An upload or download that nobody carried on for so long is removed, milliseconds', 'CUDA_NN_STORE_EXPIRE_MS', 86_400_000, 1_000, 31 * 86_400_000),
  },
  orchestrator: {
    concurrency: knob('Runs driven at once', 'CUDA_NN_RUN_CONCURRENCY', 16, 1, 1024),
    runLockMs: knob('A run whose orchestrator was not heard of for so long is given to another, milliseconds', 'CUDA_NN_RUN_LOCK_MS', 10_000, 500, 3_600_000),
    jobTimeoutMs: knob('A run with work queued and no worker or report for so long records NO_WORKER and waits on, milliseconds', 'CUDA_NN_JOB_TIMEOUT_MS', 60_000, 1_000, 86_400_000),
    maxReplans: knob('Times in a row that a run may give up its jobs and plan anew without a new step, before it fails', 'CUDA_NN_MAX_REPLANS', 20, 1, 10_000),
    maxKills: knob('Times that the same work may end its worker’s process before the run fails', 'CUDA_NN_MAX_KILLS', 3, 1, 1_000),
    stepsPerJob: knob('Most steps of one job of the local way', 'CUDA_NN_STEPS_PER_JOB', 200, 1, 10_000),
    watchMs: knob('Milliseconds between looks at the workers, the wishes and the clock', 'CUDA_NN_WATCH_MS', 500, 20, 60_000),
    lookupMs: knob('A job unheard of for so long is looked up in Redis, milliseconds', 'CUDA_NN_LOOKUP_MS', 3_000, 50, 600_000),
    timeSliceMs: knob('Turn of a run where runs of one priority outnumber the workers, milliseconds; 0: whoever has a worker keeps it to its end', 'CUDA_NN_TIME_SLICE_MS', 600_000, 0, 86_400_000),
    requestTimeoutMs: knob('Deadline of a request of a client: eval and generate without a worker, answers of Redis, milliseconds', 'CUDA_NN_REQUEST_TIMEOUT_MS', 10_000, 100, 3_600_000),
    eventsKept: knob('Events of a run kept in Redis for late readers', 'CUDA_NN_EVENTS_KEPT', 10_000, 10, 10_000_000),
    eventsExpireSeconds: knob('Seconds that a finished run’s events stay', 'CUDA_NN_EVENTS_EXPIRE_SECONDS', 10, 1, 86_400),
  },
  server: {
    host: text('Address of the HTTP API and dashboard; off loopback a token is required', 'CUDA_NN_HOST', '127.0.0.1'),
    port: knob('Port of the HTTP API and dashboard; 0: any free one', 'CUDA_NN_PORT', 7077, 0, 65535),
    token: { ...text('Bearer token of the HTTP API', 'CUDA_NN_TOKEN', ''), sensitive: true },
  },
};

export type Config = ReturnType<typeof read>;

const read = (overrides: object) => {
  const config = convict(schema);
  // One set() for each value: load() would let the environment win over them.
  const apply = (node: object, prefix: string): void => {
    for (const [key, value] of Object.entries(node)) {
      if (typeof value === 'object' && value !== null) apply(value as object, `${prefix}${key}.`);
      else config.set(prefix + key, value);
    }
  };
  apply(overrides, '');
  config.validate({ allowed: 'strict' });
  return config.getProperties();
};

/** One row for each knob, for `doctor` and the docs. */
export interface Knob {
  readonly name: string;
  readonly doc: string;
  readonly env: string;
  readonly defaultValue: string | number;
  /** A secret, or an address that holds one. */
  readonly sensitive: boolean;
}

export function knobs(): Knob[] {
  const rows: Knob[] = [];
  const walk = (node: Record<string, unknown>, prefix: string): void => {
    for (const [key, value] of Object.entries(node)) {
      const entry = value as { doc?: string; env?: string; default?: string | number; sensitive?: boolean };
      if (typeof entry.doc === 'string') rows.push({ name: prefix + key, doc: entry.doc, env: entry.env!, defaultValue: entry.default!, sensitive: entry.sensitive === true });
      else walk(value as Record<string, unknown>, `${prefix}${key}.`);
    }
  };
  walk(schema, '');
  return rows;
}

/** The environment for a child process: this one's without secrets, which children are told over a pipe or in a file of their own. */
export function childEnvironment(environment: NodeJS.ProcessEnv = process.env): NodeJS.ProcessEnv {
  const secrets = new Set(knobs().flatMap(({ env, sensitive }) => (sensitive ? [env] : [])));
  return Object.fromEntries(Object.entries(environment).filter(([name]) => !secrets.has(name)));
}

/** Reads the environment over the defaults, and `overrides` over both. Throws USAGE naming the knob. */
export function loadConfig(overrides: object = {}): Config {
  try {
    return read(overrides);
  } catch (error) {
    const message = (error as Error).message.split('\n')[0]!;
    throw new NnError('USAGE', `settings: ${message} (see docs/operations.md for every knob)`, {}, error);
  }
}

/** The package's root: the nearest directory above this file that holds package.json. dist/ lies in it. */
export function packageRoot(): string {
  let directory = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(directory, 'package.json'))) {
    const parent = resolve(directory, '..');
    if (parent === directory) throw new Error('package.json not found above ' + fileURLToPath(import.meta.url));
    directory = parent;
  }
  return directory;
}
