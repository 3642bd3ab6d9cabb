/**
 * A worker without a device: serves every job of the protocol over real BullMQ and Redis, with results that are a pure
 * function of (seed, step, shard), so that a step computed on the wrong version, or counted wrongly, shows in its loss.
 * Used by the orchestrator's tests and by `bench queue`. Its replica is a chain of hashes: state t = hash(state t-1, t).
 */
import { createHash, randomUUID } from 'node:crypto';
import { UnrecoverableError, Worker } from 'bullmq';
import type { Job } from 'bullmq';
import { NnError, encodeFailure, errorCode } from '../../config/errors.ts';
import { keys, workerQueue } from '../../config/keys.ts';
import type { Control } from '../../config/keys.ts';
import { parseMessage } from '../../config/messages.ts';
import type { Message, Origin, Result, StepReport, WorkerRecord } from '../../config/messages.ts';
import { openRedis, redisAddresses } from '../../config/redis.ts';
import type { Redis } from '../../config/redis.ts';
import type { RunSpec } from '../../config/run-spec.ts';
import type { Config } from '../../config/schema.ts';
import { CheckpointReader, writeCheckpoint } from '../../data/checkpoint-files.ts';

const md5 = (text: string): string => createHash('md5').update(text).digest('hex');
const fraction = (text: string): number => Number.parseInt(md5(text).slice(0, 8), 16) / 0x1_0000_0000;

export const stateAt = (seed: number, version: number): string => {
  let state = md5(`seed ${seed}`);
  for (let step = 1; step <= version; step++) state = md5(`${state} ${step}`);
  return state;
};

/** What every undisturbed run of this seed reports for a step, but for the time. */
export function expectedReport(spec: RunSpec, step: number, stateBefore = stateAt(spec.seed, step - 1)): StepReport {
  const { layers, experts } = spec.model;
  return {
    step,
    loss: 8 * Math.exp(-step / 50) + 0.01 * fraction(`${stateBefore} loss`),
    auxLoss: Array.from({ length: layers }, () => 1),
    expertLoad: Array.from({ length: layers }, () => Array.from({ length: experts }, () => 1)),
    targetTokens: spec.batch.shards * spec.batch.microBatches * spec.batch.sequences * spec.batch.sequenceLength,
    gradientNorm: fraction(`${stateBefore} norm`),
    clipScale: 1,
    learningRate: 1e-3,
    skipped: false,
    nonFinite: null,
    milliseconds: 1,
  };
}

export interface FakeWorkerOptions {
  readonly config: Config;
  readonly id: string;
  /** Milliseconds that a shard takes; 0: none at all. */
  readonly shardMs?: number;
  /** Called before a job is done; what it throws is how the job fails. */
  readonly before?: (job: Job) => Promise<void> | void;
  /** Gradients of these steps are not finite. */
  readonly skips?: (step: number) => boolean;
}

export interface FakeWorker {
  readonly id: string;
  readonly incarnation: string;
  /** Jobs done, by name. */
  readonly done: Map<string, number>;
  /** As SIGKILL: heartbeats and locks are no longer renewed, jobs at hand bring no result. */
  crash(): Promise<void>;
  /** As SIGTERM: the job at hand ends at a step boundary, then the worker signs off. */
  stop(): Promise<void>;
}

const sleep = (milliseconds: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, milliseconds));

export async function startFakeWorker(options: FakeWorkerOptions): Promise<FakeWorker> {
  const worker = new Fake(options);
  await worker.start();
  return worker;
}

class Fake implements FakeWorker {
  readonly id: string;
  readonly incarnation = randomUUID();
  readonly done = new Map<string, number>();
  readonly #options: FakeWorkerOptions;
  readonly #config: Config;
  readonly #names: ReturnType<typeof keys>;
  readonly #redis: Redis;
  readonly #exchange: Redis;
  readonly #connection: Redis;
  readonly #subscriber: Redis;
  readonly #workers: Worker[] = [];
  readonly #startedAtMs = Date.now();
  #heartbeat: NodeJS.Timeout | undefined;
  #replica: { run: string; step: number; state: string } | null = null;
  #busy: Promise<unknown> = Promise.resolve();
  #jobs = 0;
  #control = new Map<string, Control | null>();
  #draining = false;
  #dead = false;

  constructor(options: FakeWorkerOptions) {
    this.#options = options;
    this.id = options.id;
    this.#config = options.config;
    this.#names = keys(options.config.redis.prefix);
    const { url, exchangeUrl } = redisAddresses(options.config);
    this.#redis = openRedis(url, this.#config, 'blocking');
    this.#connection = openRedis(url, this.#config, 'blocking');
    this.#subscriber = openRedis(url, this.#config, 'blocking');
    this.#exchange = openRedis(exchangeUrl, this.#config, 'blocking');
  }

  async start(): Promise<void> {
    this.#subscriber.on('message', (_channel: string, run: string) => void this.#readControl(run));
    await this.#subscriber.subscribe(this.#names.controlChannel);
    await this.#beat();
    this.#heartbeat = setInterval(() => void this.#beat(), this.#config.worker.heartbeatMs);
    for (const queue of ['train', 'eval', 'generate'] as const) for (const name of [queue, workerQueue(queue, this.id)]) this.#serve(name);
    await Promise.all(this.#workers.map((worker) => worker.waitUntilReady()));
  }

  #serve(name: string): void {
    const { queue, redis } = this.#config;
    // Like a real worker: one job at a time over all queues.
    const worker = new Worker(name, (job: Job) => this.#inTurn(job), {
      connection: this.#connection,
      prefix: redis.prefix,
      skipVersionCheck: true,
      name: this.id,
      concurrency: 1,
      lockDuration: queue.lockDurationMs,
      lockRenewTime: queue.lockDurationMs / 3,
      stalledInterval: queue.stalledIntervalMs,
      maxStalledCount: queue.maxStalledCount,
      drainDelay: 1,
      runRetryDelay: Math.min(queue.stalledIntervalMs, redis.retryMaximumMs),
    });
    worker.on('error', () => undefined);
    this.#workers.push(worker);
  }

  async #beat(): Promise<void> {
    const record: WorkerRecord = {
      id: this.id,
      incarnation: this.incarnation,
      host: 'fake',
      processId: process.pid,
      device: { kind: 'cpu', name: 'fake', index: 0, memoryBytes: 0 },
      precisions: ['fp32'],
      state: this.#draining ? 'draining' : this.#jobs > 0 ? 'busy' : 'idle',
      replica: this.#replica === null ? null : { run: this.#replica.run, step: this.#replica.step },
      heartbeatAtMs: Date.now(),
      startedAtMs: this.#startedAtMs,
      lastExit: null,
    };
    await this.#redis.hset(this.#names.workers, this.id, JSON.stringify(record)).catch(() => undefined);
  }

  #inTurn(job: Job): Promise<unknown> {
    this.#jobs++;
    const turn = this.#busy.then(() => this.#take(job));
    this.#busy = turn.catch(() => undefined).finally(() => this.#jobs--);
    return turn;
  }

  async #take(job: Job): Promise<unknown> {
    try {
      await this.#options.before?.(job);
      if (this.#dead) return await new Promise(() => undefined);
      const result = await this.#perform(job);
      if (this.#dead) return await new Promise(() => undefined);
      this.done.set(job.name, (this.done.get(job.name) ?? 0) + 1);
      return result;
    } catch (error) {
      if (this.#dead) return new Promise(() => undefined);
      const text = encodeFailure(error);
      const never = errorCode(error) !== undefined && (error as NnError).recovery === 'never';
      throw never ? new UnrecoverableError(text) : new Error(text);
    }
  }

  async #readControl(run: string): Promise<Control | null> {
    const text = await this.#redis.get(this.#names.control(run));
    const control = text === null ? null : (JSON.parse(text) as Control);
    this.#control.set(run, control);
    return control;
  }

  #mustGoOn({ run, epoch }: Origin): void {
    const control = this.#control.get(run) ?? null;
    if (control === null || control.epoch > epoch) throw new NnError('CANCELLED', `a job of epoch ${epoch} of ${run} is over`);
  }

  async #perform(job: Job): Promise<unknown> {
    switch (job.name) {
      case 'steps': return this.#steps(job, parseMessage('steps', job.data));
      case 'shard': return this.#shard(parseMessage('shard', job.data));
      case 'reduce': return this.#reduce(parseMessage('reduce', job.data));
      case 'checkpoint': return this.#checkpoint(parseMessage('checkpoint', job.data));
      case 'digest': return this.#digest(parseMessage('digest', job.data));
      case 'eval': return this.#eval(parseMessage('eval', job.data));
      case 'generate': return { worker: this.id, completions: parseMessage('generate', job.data).prompts.map(() => ({ text: ' fake', tokens: [7] })), tokensPerSecond: 1 };
      default: throw new NnError('MESSAGE_INVALID', `no job named ${job.name}`);
    }
  }

  /** Brings the replica to `version`: it is there, or by the sums of the exchange, or from checkpoint or seed. */
  async #bring(origin: Origin, version: number): Promise<string> {
    const spec = origin.spec as unknown as RunSpec;
    await this.#readControl(origin.run);
    this.#mustGoOn(origin);
    let replica = this.#replica?.run === origin.run && this.#replica.step <= version ? this.#replica : null;
    const base = origin.checkpoint;
    if (replica === null || (base !== null && base.step > replica.step)) {
      if (base === null) replica = { run: origin.run, step: 0, state: stateAt(spec.seed, 0) };
      else replica = { run: origin.run, ...readFakeCheckpoint(base.directory) };
    }
    for (let step = replica.step + 1; step <= version; step++) {
      const sum = await this.#exchange.get(this.#names.reducedGradient(origin.run, step));
      if (sum === null) throw new NnError('GRADIENT_LOST', `${this.id} cannot get from version ${replica.step} to ${version} of ${origin.run}`, { step });
      replica = { run: origin.run, step, state: md5(`${replica.state} ${step}`) };
    }
    this.#replica = replica;
    return replica.state;
  }

  #report(spec: RunSpec, step: number, state: string, milliseconds: number): StepReport {
    const report = { ...expectedReport(spec, step, state), milliseconds };
    return this.#options.skips?.(step) === true ? { ...report, loss: null, gradientNorm: null, skipped: true, nonFinite: 'lm_head.weight' } : report;
  }

  async #compute(shards: number): Promise<void> {
    const { shardMs = 0 } = this.#options;
    if (shardMs > 0) await sleep(shards * shardMs);
  }

  async #steps(job: Job, message: Message<'steps'>): Promise<Result<'steps'>> {
    const spec = message.spec as unknown as RunSpec;
    let state = await this.#bring(message, message.fromStep);
    const reports: StepReport[] = [];
    const beganMs = performance.now();
    while (reports.length < message.stepCount) {
      this.#mustGoOn(message);
      if (this.#draining || this.#control.get(message.run)?.command !== 'run') break;
      const step = message.fromStep + reports.length + 1;
      const startMs = performance.now();
      await this.#compute(spec.batch.shards);
      if (this.#dead) break;
      const report = this.#report(spec, step, state, performance.now() - startMs);
      state = md5(`${state} ${step}`);
      this.#replica = { run: message.run, step, state };
      reports.push(report);
      await job.updateProgress({ worker: this.id, epoch: message.epoch, report });
    }
    const timings = { computeMs: performance.now() - beganMs, exchangeMs: 0, waitMs: 0 };
    return { worker: this.id, epoch: message.epoch, fromStep: message.fromStep, stepsDone: reports.length, reports, timings };
  }

  async #shard(message: Message<'shard'>): Promise<Result<'shard'>> {
    const spec = message.spec as unknown as RunSpec;
    const key = this.#names.shardGradient(message.run, message.step, message.shard);
    const before = await this.#exchange.get(key);
    if (before !== null) return JSON.parse(before) as Result<'shard'>;
    const state = await this.#bring(message, message.step - 1);
    const beganMs = performance.now();
    await this.#compute(1);
    const { loss, auxLoss, expertLoad, targetTokens } = expectedReport(spec, message.step, state);
    const result: Result<'shard'> = {
      worker: this.id, epoch: message.epoch, step: message.step, shard: message.shard, lossSum: loss, auxLossSum: auxLoss, expertLoad, targetTokens,
      digest: md5(`${state} shard ${message.shard}`), key, bytes: 1024, timings: { computeMs: performance.now() - beganMs, exchangeMs: 0.1, waitMs: 0 },
    };
    this.#mustGoOn(message);
    if (!this.#dead) await this.#exchange.set(key, JSON.stringify(result));
    return result;
  }

  async #reduce(message: Message<'reduce'>): Promise<Result<'reduce'>> {
    const spec = message.spec as unknown as RunSpec;
    const state = await this.#bring(message, message.step - 1);
    const shardKeys = Array.from({ length: message.shardCount }, (_, shard) => this.#names.shardGradient(message.run, message.step, shard));
    const texts = await this.#exchange.mget(shardKeys);
    const missing = texts.indexOf(null);
    if (missing !== -1) throw new NnError('GRADIENT_LOST', `shard ${missing} of step ${message.step} is not in the exchange`, { shard: missing });
    const next = md5(`${state} ${message.step}`);
    const key = this.#names.reducedGradient(message.run, message.step);
    const result: Result<'reduce'> = {
      worker: this.id, epoch: message.epoch, digest: next, key, bytes: 1024,
      report: this.#report(spec, message.step, state, 1), timings: { computeMs: 1, exchangeMs: 0.1, waitMs: 0 },
      shards: texts.map((text) => JSON.parse(text!) as Result<'shard'>).map(({ shard, worker, epoch, digest }) => ({ shard, worker, epoch, digest })),
    };
    this.#mustGoOn(message);
    if (this.#dead) return result;
    await this.#exchange.set(key, JSON.stringify(result));
    await this.#exchange.unlink(shardKeys);
    this.#replica = { run: message.run, step: message.step, state: next };
    return result;
  }

  async #checkpoint(message: Message<'checkpoint'>): Promise<Result<'checkpoint'>> {
    const state = await this.#bring(message, message.step);
    const bytes = await writeFakeCheckpoint(message.spec as unknown as RunSpec, message.directory, message.step, state);
    return { worker: this.id, epoch: message.epoch, step: message.step, directory: message.directory, bytes, milliseconds: 1 };
  }

  async #digest(message: Message<'digest'>): Promise<Result<'digest'>> {
    const state = await this.#bring(message, message.step);
    const last = message.step === (message.spec as unknown as RunSpec).steps;
    return { worker: this.id, epoch: message.epoch, step: message.step, digest: state, weightsDigest: last ? state + state : null };
  }

  async #eval({ replica }: Message<'eval'>): Promise<Result<'eval'>> {
    if (replica === null) return { worker: this.id, step: null, loss: 4.5, targetTokens: 1, milliseconds: 1 };
    const state = await this.#bring(replica, replica.step);
    return { worker: this.id, step: replica.step, loss: 8 * Math.exp(-replica.step / 50) + 0.01 * fraction(`${state} eval`), targetTokens: 1, milliseconds: 1 };
  }

  async crash(): Promise<void> {
    this.#dead = true;
    clearInterval(this.#heartbeat);
    await Promise.all(this.#workers.map((worker) => worker.close(true)));
    this.#disconnect();
  }

  async stop(): Promise<void> {
    this.#draining = true;
    clearInterval(this.#heartbeat);
    await this.#beat();
    await Promise.all(this.#workers.map((worker) => worker.close()));
    await this.#redis.hdel(this.#names.workers, this.id).catch(() => undefined);
    this.#disconnect();
  }

  #disconnect(): void {
    for (const redis of [this.#redis, this.#connection, this.#subscriber, this.#exchange]) redis.disconnect();
  }
}

/** A real checkpoint of zeros that carries the state of the chain. */
async function writeFakeCheckpoint(spec: RunSpec, directory: string, step: number, state: string): Promise<number> {
  const source = { model: spec.model, step, precision: spec.precision, tokenizer: null, read: (_kind: string, _name: string, into: Float32Array) => void into.fill(0), runInfo: { state } };
  return (await writeCheckpoint(directory, source)).bytes;
}

function readFakeCheckpoint(directory: string): { step: number; state: string } {
  const reader = CheckpointReader.open(directory, { verify: true });
  try {
    return { step: reader.step!, state: (reader.state!.run as { state: string }).state };
  } finally {
    reader.close();
  }
}
