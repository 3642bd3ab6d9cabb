/**
 * The library that scripts import as `cuda-nn`: start runs, follow, pause, resume, cancel and retry them, evaluate and sample
 * checkpoints. The command line and the HTTP API are written on it. It talks to Redis only; the work is done elsewhere.
 */
import { randomUUID } from 'node:crypto';
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { NnError, errorCode, fromErrorRecord } from '../config/errors.ts';
import { keys, workerQueue } from '../config/keys.ts';
import { PROTOCOL, QUEUES, TERMINAL_PHASES, parseMessage, parseResult, protocolOf } from '../config/messages.ts';
import type { QueueName, Result, RunEvent, RunRecord, WorkerRecord } from '../config/messages.ts';
import { openRedis, redisAddresses } from '../config/redis.ts';
import type { Redis } from '../config/redis.ts';
import { parseRunSpec } from '../config/run-spec.ts';
import type { RunSpec, RunSpecInput } from '../config/run-spec.ts';
import { loadConfig } from '../config/schema.ts';
import type { Config } from '../config/schema.ts';
import { TokenFile } from '../data/token-file.ts';
import { Queues } from './queues.ts';
import type { QueueCounts } from './queues.ts';
import { restoreRuns } from './restore.ts';
import type { Restored } from './restore.ts';
import { queuedRecord } from './run-state.ts';
import { RunStore } from './run-store.ts';
import type { Wish } from './run-store.ts';

export { NnError } from '../config/errors.ts';
export type { ErrorCode } from '../config/errors.ts';
export type { Result, RunAttempt, RunEvent, RunFault, RunPhase, RunRecord, StepReport, WorkerRecord } from '../config/messages.ts';
export type { RunSpec, RunSpecInput } from '../config/run-spec.ts';
export { loadConfig } from '../config/schema.ts';
export type { Config } from '../config/schema.ts';
export type { QueueCounts } from './queues.ts';
export type { Restored } from './restore.ts';

export interface EvalRequest {
  /** Checkpoint directory: of a run, or any Mixtral of Hugging Face. */
  readonly checkpoint: string;
  /** Token file. */
  readonly data: string;
  /** Sequences to read, from the start of the file. */
  readonly sequences?: number;
  /** Tokens in a sequence; as the checkpoint was trained when left out. */
  readonly sequenceLength?: number;
  /** Deadline of the whole, milliseconds. */
  readonly timeoutMs?: number;
}

export interface GenerateRequest {
  readonly checkpoint: string;
  readonly prompts: readonly string[];
  readonly maxTokens: number;
  readonly method?: 'greedy' | 'sample' | 'top-k' | 'top-p';
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly seed?: number;
  readonly ntkAlpha?: number;
  readonly timeoutMs?: number;
}

const REQUEST_TIMEOUT_MS = 3_600_000;
/** How often a request's job and the workers are looked at: the first pause, and the longest. */
const POLL_FIRST_MS = 10;
const POLL_MOST_MS = 250;
/** How long one blocked read of a run's events lasts; between two the record is looked at. */
const EVENTS_BLOCK_MS = 1_000;

export class Client {
  readonly #config: Config;
  readonly #url: string;
  readonly #redis: Redis;
  readonly #queues: Queues;
  readonly #store: RunStore;
  readonly #names: ReturnType<typeof keys>;
  readonly #readers = new Set<Redis>();

  /** Connects at the first call. Throws REDIS_UNAVAILABLE when no address is configured and nothing runs here. */
  constructor({ config = loadConfig() }: { config?: Config } = {}) {
    this.#config = config;
    this.#url = redisAddresses(config).url;
    this.#redis = openRedis(this.#url, config, 'command');
    this.#queues = new Queues(config, this.#redis, () => undefined);
    this.#store = new RunStore(this.#redis, config);
    this.#names = keys(config.redis.prefix);
  }

  /**
   * Checks a spec and its data, and queues the run. Relative paths count from the working directory. Throws SPEC_INVALID,
   * FILE_NOT_FOUND, TOKEN_FILE_INVALID, DATA_INVALID, RUN_EXISTS, REDIS_UNAVAILABLE, TIMEOUT.
   */
  async train(input: RunSpecInput): Promise<Run> {
    const spec = withAbsolutePaths(parseRunSpec(input));
    checkData(spec);
    const directory = join(resolve(this.#config.runs), spec.name);
    if (existsSync(join(directory, 'metrics.jsonl')) && (await this.#within(this.#store.ids(), 'the list of runs')).every((id) => id !== spec.name)) {
      throw new NnError('RUN_EXISTS', `${directory} holds a run of that name already; choose another name, or move the directory away`, { run: spec.name });
    }
    const created = await this.#within(this.#store.create(spec.name, spec, queuedRecord(spec.name, spec, Date.now())), 'the new run');
    if (!created) throw new NnError('RUN_EXISTS', `there is a run named ${JSON.stringify(spec.name)} already; choose another name`, { run: spec.name });
    await this.#within(this.#queues.addRun(spec.name, spec.priority), 'the new run');
    return this.run(spec.name);
  }

  /** A handle to a run, whether or not it exists; its methods throw RUN_NOT_FOUND. */
  run(id: string): Run {
    return new Run(id, {
      store: this.#store,
      config: this.#config,
      within: (work, what) => this.#within(work, what),
      hasJob: (run) => this.#queues.hasRun(run),
      addJob: (run, priority) => this.#queues.addRun(run, priority),
      openReader: () => {
        const reader = openRedis(this.#url, this.#config, 'blocking');
        this.#readers.add(reader);
        return reader;
      },
      closeReader: (reader) => {
        this.#readers.delete(reader);
        reader.disconnect();
      },
    });
  }

  /** The records of all runs, newest first. */
  async runs(): Promise<RunRecord[]> {
    const records = await this.#within(this.#store.records(), 'the runs');
    return records.sort((a, b) => b.createdAtMs - a.createdAtMs || (a.run < b.run ? -1 : 1));
  }

  /**
   * Rebuilds runs on a Redis that does not know them from their directories: those of these names, or all there are. What
   * Redis knows is left alone. Tells what became of each; see restore.ts. Throws REDIS_UNAVAILABLE, TIMEOUT.
   */
  async restore(names: readonly string[] = []): Promise<Restored[]> {
    return restoreRuns({ runs: resolve(this.#config.runs), store: this.#store, addRun: (run, priority) => this.#queues.addRun(run, priority) }, names);
  }

  /** Workers whose heartbeat is fresh by this machine's clock. */
  async workers(): Promise<WorkerRecord[]> {
    const texts = Object.values(await this.#within(this.#redis.hgetall(this.#names.workers), 'the workers'));
    const alive = texts.map((text) => JSON.parse(text) as WorkerRecord).filter((worker) => Date.now() - worker.heartbeatAtMs < this.#config.worker.deadAfterMs);
    return alive.sort((a, b) => (a.id < b.id ? -1 : 1));
  }

  /** Jobs by state in the shared queues; `train` and `eval` with the workers' own queues added. */
  async queues(): Promise<Record<QueueName, QueueCounts>> {
    const workers = await this.workers();
    const entries = QUEUES.map(async (name) => {
      const own = name === 'runs' ? [] : workers.map(({ id }) => workerQueue(name, id));
      const counts = await this.#within(Promise.all([name, ...own].map((each) => this.#queues.counts(each))), 'the queues');
      return [name, counts.reduce(addCounts)] as const;
    });
    return Object.fromEntries(await Promise.all(entries)) as Record<QueueName, QueueCounts>;
  }

  /** The BullMQ queues for bull-board: the shared ones and those of the live workers. */
  async boardQueues(): Promise<unknown[]> {
    const own = (await this.workers()).flatMap(({ id }) => QUEUES.flatMap((name) => (name === 'runs' ? [] : [workerQueue(name, id)])));
    return [...QUEUES, ...own].map((name) => this.#queues.queue(name));
  }

  /** Loss of a checkpoint on a token file. Throws NO_WORKER, TIMEOUT, and what the worker threw (CHECKPOINT_INVALID, ...). */
  async eval({ timeoutMs = REQUEST_TIMEOUT_MS, ...request }: EvalRequest): Promise<Result<'eval'>> {
    const message = parseMessage('eval', {
      replica: null,
      checkpoint: resolve(request.checkpoint),
      data: resolve(request.data),
      sequences: request.sequences ?? 32,
      sequenceLength: request.sequenceLength ?? null,
    });
    return parseResult('eval', await this.#request('eval', message, timeoutMs));
  }

  /** Completions of prompts by a checkpoint. Throws NO_WORKER, TIMEOUT, and what the worker threw. */
  async generate({ timeoutMs = REQUEST_TIMEOUT_MS, ...request }: GenerateRequest): Promise<Result<'generate'>> {
    const message = parseMessage('generate', { method: 'greedy', ...request, checkpoint: resolve(request.checkpoint) });
    return parseResult('generate', await this.#request('generate', message, timeoutMs));
  }

  async close(): Promise<void> {
    for (const reader of this.#readers) reader.disconnect();
    await this.#queues.close();
    this.#redis.disconnect();
  }

  /** A job for any worker, followed until it ends. */
  async #request(queue: 'eval' | 'generate', message: object, timeoutMs: number): Promise<unknown> {
    const id = `request.${randomUUID()}`;
    const beganMs = performance.now();
    await this.#within(this.#queues.request(queue, id, message), `the ${queue} job`);
    let workerSeenMs = performance.now();
    try {
      for (let pause = POLL_FIRST_MS; ; pause = Math.min(POLL_MOST_MS, pause * 1.5)) {
        const status = await this.#within(this.#queues.requestStatus(queue, id), `the ${queue} job`);
        if (status.state === 'completed') return status.result;
        if (status.state === 'failed') throw fromErrorRecord(status.error);
        if (status.state === 'missing') throw new NnError('TIMEOUT', `the ${queue} job is no longer in Redis; ask again`);
        const nowMs = performance.now();
        const serving = (await this.workers()).filter((worker) => worker.state !== 'draining');
        if (serving.some((worker) => protocolOf(worker) === PROTOCOL)) workerSeenMs = nowMs;
        else if (nowMs - workerSeenMs > this.#config.orchestrator.requestTimeoutMs) {
          const others = serving.length === 0 ? 'start one with `cuda-nn worker`' : `those there speak another protocol than ${PROTOCOL}: upgrade what is older`;
          throw new NnError('NO_WORKER', `no live worker serves ${queue} jobs; ${others}`, { queue });
        }
        if (nowMs - beganMs > timeoutMs) throw new NnError('TIMEOUT', `the ${queue} job was not done within ${Math.round(timeoutMs / 1000)} s`, { queue });
        await sleep(pause);
      }
    } finally {
      await this.#within(this.#queues.removeRequest(queue, id), `the ${queue} job`);
    }
  }

  async #within<Value>(work: Promise<Value>, what: string): Promise<Value> {
    const milliseconds = this.#config.orchestrator.requestTimeoutMs;
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<never>((_, refuse) => {
      timer = setTimeout(() => refuse(new NnError('TIMEOUT', `Redis did not answer for ${what} within ${milliseconds} ms; is it running?`)), milliseconds);
    });
    try {
      return await Promise.race([work, late]);
    } finally {
      clearTimeout(timer);
    }
  }
}

interface RunContext {
  readonly store: RunStore;
  readonly config: Config;
  readonly within: <Value>(work: Promise<Value>, what: string) => Promise<Value>;
  readonly hasJob: (run: string) => Promise<boolean>;
  readonly addJob: (run: string, priority: number) => Promise<void>;
  readonly openReader: () => Redis;
  readonly closeReader: (reader: Redis) => void;
}

/** A handle to one run. */
export class Run {
  readonly id: string;
  readonly #context: RunContext;

  constructor(id: string, context: RunContext) {
    this.id = id;
    this.#context = context;
  }

  /** Throws RUN_NOT_FOUND, TIMEOUT. */
  async record(): Promise<RunRecord> {
    return (await this.#context.within(this.#context.store.read(this.id), `run ${this.id}`)).record;
  }

  /** Throws RUN_NOT_FOUND, TIMEOUT. */
  async spec(): Promise<RunSpec> {
    return (await this.#context.within(this.#context.store.read(this.id), `run ${this.id}`)).spec;
  }

  /**
   * What happened to the run as far back as Redis keeps it, and what happens, until the run is over: its last event is the
   * phase it ended in. Waits through an outage of Redis. Throws RUN_NOT_FOUND.
   */
  async *events(): AsyncGenerator<RunEvent, void, undefined> {
    await this.record();
    const { config, openReader, closeReader } = this.#context;
    const stream = keys(config.redis.prefix).events(this.id);
    const reader = openReader();
    let last = '0-0';
    let over: RunRecord | null = null;
    try {
      for (;;) {
        const replies = await reader.xread('COUNT', 500, 'BLOCK', over === null ? EVENTS_BLOCK_MS : 1, 'STREAMS', stream, last);
        for (const [id, fields] of replies?.[0]?.[1] ?? []) {
          last = id;
          const event = JSON.parse(fields[1]!) as RunEvent;
          yield event;
          if (event.type === 'phase' && TERMINAL_PHASES.includes(event.phase)) return;
        }
        if (replies !== null) continue;
        if (over !== null) {
          yield { type: 'phase', phase: over.phase, atMs: over.finishedAtMs ?? over.createdAtMs };
          return;
        }
        // Silence: if the run is over by now, one more look tells whether the stream still had its last event.
        over = await this.#recordIfOver();
      }
    } finally {
      closeReader(reader);
    }
  }

  /** The record if the run is over; null if it is not, or if Redis is away. Throws RUN_NOT_FOUND. */
  async #recordIfOver(): Promise<RunRecord | null> {
    try {
      const record = await this.record();
      return TERMINAL_PHASES.includes(record.phase) ? record : null;
    } catch (error) {
      if (errorCode(error) === 'RUN_NOT_FOUND') throw error;
      return null;
    }
  }

  /** The record of the run once it is over, however it ended. Throws RUN_NOT_FOUND. */
  async ended(): Promise<RunRecord> {
    for await (const event of this.events()) {
      if (event.type === 'phase' && TERMINAL_PHASES.includes(event.phase)) break;
    }
    // The run's job leaves the queue a moment after the last event.
    const deadline = performance.now() + this.#context.config.orchestrator.requestTimeoutMs;
    while (performance.now() < deadline && (await this.#context.within(this.#context.hasJob(this.id), `run ${this.id}`))) await sleep(POLL_FIRST_MS);
    return this.record();
  }

  /** The record of the completed run. Throws RUN_FAILED (its cause is what failed it), CANCELLED, RUN_NOT_FOUND. */
  async wait(): Promise<RunRecord> {
    const record = await this.ended();
    if (record.phase === 'cancelled') throw new NnError('CANCELLED', `run ${this.id} was cancelled at step ${record.step}`, { run: this.id });
    if (record.phase === 'failed') {
      const { error } = record;
      const why = error === null ? '' : `: ${error.code}: ${error.message}`;
      throw new NnError('RUN_FAILED', `run ${this.id} failed at step ${record.step}${why}`, { run: this.id }, error === null ? undefined : fromErrorRecord(error));
    }
    return record;
  }

  /** Asks for a pause; it takes effect within a step. Throws RUN_NOT_FOUND, RUN_STATE when the run is over. */
  pause(): Promise<void> {
    return this.#wish('pause');
  }

  resume(): Promise<void> {
    return this.#wish('resume');
  }

  cancel(): Promise<void> {
    return this.#wish('cancel');
  }

  /**
   * Tries a failed or cancelled run again, from its last checkpoint; what comes out are the bits of a run that never failed.
   * Returns the record of the run, queued. Throws RUN_NOT_FOUND, or RUN_STATE when the run is live or completed.
   */
  async retry(): Promise<RunRecord> {
    const { store, within, addJob } = this.#context;
    const record = await within(store.retry(this.id), `run ${this.id}`);
    // Where the job of the last attempt is still there, the orchestrator that has it adds the new one.
    await within(addJob(this.id, (await store.read(this.id)).spec.priority), `run ${this.id}`);
    return record;
  }

  async #wish(wish: Wish): Promise<void> {
    await this.#context.within(this.#context.store.wish(this.id, wish), `run ${this.id}`);
  }
}

const sleep = (milliseconds: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, milliseconds));

const addCounts = (a: QueueCounts, b: QueueCounts): QueueCounts => ({
  waiting: a.waiting + b.waiting,
  active: a.active + b.active,
  delayed: a.delayed + b.delayed,
  failed: a.failed + b.failed,
  completed: a.completed + b.completed,
});

/** Workers have other working directories: paths travel absolute. */
function withAbsolutePaths(spec: RunSpec): RunSpec {
  const { train, validation, tokenizer } = spec.data;
  return {
    ...spec,
    data: {
      train: resolve(train),
      ...(validation === undefined ? {} : { validation: resolve(validation) }),
      ...(tokenizer === undefined ? {} : { tokenizer: resolve(tokenizer) }),
    },
    ...(spec.initialCheckpoint === undefined ? {} : { initialCheckpoint: resolve(spec.initialCheckpoint) }),
  };
}

/** Throws FILE_NOT_FOUND, TOKEN_FILE_INVALID, or DATA_INVALID when data and model do not fit. */
function checkData(spec: RunSpec): void {
  const { model, data, batch } = spec;
  for (const path of [data.train, data.validation]) {
    if (path === undefined) continue;
    const file = TokenFile.open(path);
    try {
      if (file.vocabSize > model.vocabSize) {
        throw new NnError('DATA_INVALID', `${path} has a vocabulary of ${file.vocabSize}, but model.vocabSize is ${model.vocabSize}; make it at least as large`, { path });
      }
      if (file.count <= batch.sequenceLength) {
        throw new NnError('DATA_INVALID', `${path} has ${file.count} tokens, too few for a sequence of ${batch.sequenceLength} and its target`, { path });
      }
    } finally {
      file.close();
    }
  }
  for (const path of [data.tokenizer, spec.initialCheckpoint]) {
    if (path !== undefined && !existsSync(path)) throw new NnError('FILE_NOT_FOUND', `${path} is not there`, { path });
  }
}
