/**
 * A worker: the process of one island, forked by the supervisor (main.ts). Its main thread is the BullMQ side: it takes jobs
 * from the shared queues and from its own, one at a time, checks them, hands them to the compute thread, follows the control
 * channel, and says with a heartbeat what it holds. Locks are renewed here while the compute thread computes. The only file of
 * workers/ that imports bullmq; it never touches a tensor.
 *
 *   job of a shared queue, device busy for patienceMs -> given back to the queue, which is left alone until the device is idle
 *   error `never` -> failed for good | `retry` -> failed, BullMQ tries again | `restart` -> failed, then this process exits
 */
import { randomUUID } from 'node:crypto';
import { hostname } from 'node:os';
import { fileURLToPath } from 'node:url';
import { DelayedError, UnrecoverableError, WaitingError, Worker } from 'bullmq';
import type { Job } from 'bullmq';
import { ERROR_KINDS, NnError, fromErrorRecord, toErrorRecord } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import { keys, workerQueue } from '../config/keys.ts';
import { PROTOCOL, parseMessage, protocolOf } from '../config/messages.ts';
import type { Message, Origin, QueueName, Result, StepReport, TrainJobName, WorkerRecord } from '../config/messages.ts';
import { checkRedis, openRedis, redisAddresses } from '../config/redis.ts';
import type { Redis } from '../config/redis.ts';
import type { Config } from '../config/schema.ts';
import type { DeviceDescription } from '../cuda/device.ts';
import { BackgroundWriter } from './background.ts';
import { ControlWatcher, stronger } from './control.ts';
import { Gate } from './gate.ts';
import type { Leave } from './gate.ts';
import { EXIT } from './ipc.ts';
import type { LogLevel, StartMessage, WorkerMessage } from './ipc.ts';
import { ComputePool } from './pool.ts';
import type { Command } from './signals.ts';
import { Store } from './store.ts';
import type { DeviceChoice, JobTask, Outcome, TaskOf } from './tasks.ts';

type ServedQueue = Exclude<QueueName, 'runs'>;

/** The jobs of each queue. */
const JOBS: Readonly<Record<ServedQueue, readonly JobTask[]>> = {
  train: ['steps', 'shard', 'reduce', 'checkpoint', 'digest'] satisfies TrainJobName[],
  eval: ['eval'],
  generate: ['generate'],
};

/** Most seconds that a look into an empty queue waits there for a job before it is begun anew. */
const DRAIN_DELAY_SECONDS = 5;

/** Runs remembered whose clearing away was put off; the gradients of more would stay in the exchange. */
const UNCLEARED_MOST = 64;

/** Jobs that end early, or not at all, at the word of the control. A checkpoint is what a pause may wait for: it heeds only `drop`. */
const STOPPABLE: readonly JobTask[] = ['steps', 'shard', 'reduce', 'digest', 'eval'];

/**
 * The shared queues that a worker of these precisions serves: queues are split by capability, so that no worker takes a job that
 * it cannot do. The queues without a suffix are for fp32, which every device computes; another precision adds its own
 * (`train-bf16`) here and where jobs are put (orchestrator/queues.ts).
 */
export function sharedQueues(_precisions: WorkerRecord['precisions']): ServedQueue[] {
  return ['train', 'eval', 'generate'];
}

/** What a device computes. */
export const precisionsOf = (device: Pick<DeviceDescription, 'kind'>): WorkerRecord['precisions'] => (device.kind === 'cuda' ? ['fp32', 'bf16'] : ['fp32']);

export interface IslandOptions {
  readonly id: string;
  readonly config: Config;
  readonly device: DeviceChoice;
  readonly log: (level: LogLevel, message: string, error?: unknown) => void;
  /** How the process before this one ended. */
  readonly lastExit: WorkerRecord['lastExit'];
  /** The job at hand is another one, or none. */
  readonly onHold: (job: string | null) => void;
  /** Something that only a new process cures; the job that met it is reported already. Called once. */
  readonly onFault: (error: ErrorRecord, job: string) => void;
}

/** The island's side of Redis and BullMQ; the process around it is `runProcess`. */
export class Island {
  readonly #options: IslandOptions;
  readonly #config: Config;
  readonly #names: ReturnType<typeof keys>;
  readonly #gate: Gate;
  readonly #queues: Worker[] = [];
  readonly #waitingForIdle = new Set<Worker>();
  readonly #startedAtMs = Date.now();
  readonly #incarnation = randomUUID();
  #pool!: ComputePool;
  /** Null where the orchestrator's file system is this machine's too. */
  #store: Store | null = null;
  /** Ends what the job at hand fetches. */
  #transfers: AbortController | null = null;
  /** Ends the delivery of the checkpoint that was written beside it. */
  #delivery: AbortController | null = null;
  #control!: ControlWatcher;
  #background!: BackgroundWriter;
  #connection!: Redis;
  #commands!: Redis;
  #device!: DeviceDescription;
  #heartbeat: NodeJS.Timeout | undefined;
  #beating = false;
  #draining = false;
  /** Jobs at hand that lost their locks: whoever has them now will do them. A checkpoint's copy is written all the same. */
  readonly #lost = new Set<string>();
  #faulted = false;
  /** The drain took too long: nothing is finished any more. */
  #givenUp = false;
  /** What is being cleared away of a run that is over. */
  #cleaning: Promise<void> = Promise.resolve();
  /** Whether a run is being cleared away now, and whether a job waits for that. */
  #clearing = false;
  #awaited = false;
  /** Runs that are over, and whose clearing away was put off for a job. */
  readonly #uncleared = new Set<string>();
  /** The command of this process itself, beside that of the control. */
  #localCommand: Command = 'run';
  #controlCommand: Command = 'run';
  #job: { readonly id: string; readonly kind: JobTask } | null = null;
  /** Id of the checkpoint that is being written beside it. */
  #saving: string | null = null;

  constructor(options: IslandOptions) {
    this.#options = options;
    this.#config = options.config;
    this.#names = keys(options.config.redis.prefix);
    this.#gate = new Gate(() => this.#onIdle());
  }

  get device(): DeviceDescription {
    return this.#device;
  }

  /** Checks Redis, opens the device, and begins to serve. Throws REDIS_*, LIBRARY_INVALID, DEVICE_*. */
  async start(): Promise<void> {
    const { id, device, log } = this.#options;
    const { url, exchangeUrl } = redisAddresses(this.#config);
    await checkRedis(url, this.#config);
    if (exchangeUrl !== url) await checkRedis(exchangeUrl, this.#config);
    if (this.#config.store.url !== '') {
      this.#store = new Store({ config: this.#config, log });
      await this.#store.open();
    }
    this.#pool = new ComputePool({ config: this.#config, device, worker: id, queuesUrl: url, exchangeUrl });
    const opened = await this.#pool.run({ kind: 'open' });
    if (!opened.ok) throw fromErrorRecord(opened.error);
    this.#device = opened.value;
    const onError = (error: Error): void => log('debug', `Redis: ${error.message}`);
    this.#commands = openRedis(url, this.#config, 'command', onError);
    this.#connection = openRedis(url, this.#config, 'blocking', onError);
    this.#control = new ControlWatcher(url, this.#config, onError);
    this.#background = new BackgroundWriter(this.#config, this.#control);
    await this.#beat();
    this.#heartbeat = setInterval(() => void this.#beat(), this.#config.worker.heartbeatMs);
    for (const queue of ['train', 'eval', 'generate'] as const) this.#serve(queue, workerQueue(queue, id), true);
    for (const queue of sharedQueues(precisionsOf(this.#device))) this.#serve(queue, queue, false);
    await Promise.all(this.#queues.map((queue) => queue.waitUntilReady()));
  }

  /**
   * Takes no more jobs, lets those at hand end (`steps` at the step boundary, a checkpoint when it is written), signs off and closes
   * everything. After drainMs they are given up; nothing is lost by that, another worker does them again.
   */
  async drain(): Promise<void> {
    if (this.#draining) return;
    this.#draining = true;
    clearInterval(this.#heartbeat);
    this.#command('yield');
    this.#gate.close();
    this.#background.closeGate();
    const giveUp = setTimeout(() => {
      this.#givenUp = true;
      this.#command('drop');
      this.#background.drop();
      this.#delivery?.abort();
    }, this.#config.worker.drainMs);
    await this.#record().catch((error: Error) => this.#options.log('debug', `last heartbeat: ${error.message}`));
    await Promise.all(this.#queues.map((queue) => queue.close()));
    await this.#cleaning;
    clearTimeout(giveUp);
    await Promise.all([this.#pool.close(), this.#background.close()]);
    this.#store?.close();
    await this.#commands.hdel(this.#names.workers, this.#options.id).catch((error: Error) => this.#options.log('debug', `signing off: ${error.message}`));
    this.#control.close();
    this.#commands.disconnect();
    this.#connection.disconnect();
  }

  /** Listens to one queue. */
  #serve(queue: ServedQueue, name: string, own: boolean): void {
    const { queue: knobs, redis } = this.#config;
    const worker: Worker = new Worker(name, (job: Job, token?: string): Promise<unknown> => this.#take(worker, queue, own, job, token!), {
      connection: this.#connection,
      prefix: redis.prefix,
      name: this.#options.id,
      // A checkpoint that is being written stays active beside the job on the device; the gate keeps the device to one at a time.
      concurrency: own && queue === 'train' ? 2 : 1,
      drainDelay: Math.min(DRAIN_DELAY_SECONDS, redis.silenceMs / 2000),
      lockDuration: knobs.lockDurationMs,
      lockRenewTime: knobs.lockDurationMs / 2,
      stalledInterval: knobs.stalledIntervalMs,
      maxStalledCount: knobs.maxStalledCount,
      runRetryDelay: Math.min(knobs.stalledIntervalMs, redis.retryMaximumMs),
    });
    worker.on('error', (error) => this.#options.log('debug', `queue ${name}: ${error.message}`));
    worker.on('lockRenewalFailed', (ids: string[]) => {
      for (const id of ids) this.#lost.add(id);
      if (this.#saving !== null && this.#lost.has(this.#saving)) this.#delivery?.abort();
      if (this.#job === null || !this.#lost.has(this.#job.id)) return;
      this.#options.log('warn', `job ${this.#job.id} lost its lock and is given up`);
      this.#command('drop');
    });
    this.#queues.push(worker);
  }

  /** One job: waits for the device, or gives the job back; then does it. What it throws is what BullMQ records. */
  async #take(worker: Worker, queue: ServedQueue, own: boolean, job: Job, token: string): Promise<unknown> {
    if (protocolOf(job.data) !== PROTOCOL) return this.#leaveAlone(job, token);
    const startedAt = performance.now();
    let outcome: { readonly ok: true; readonly value: unknown } | { readonly ok: false; readonly error: ErrorRecord } | null;
    try {
      const task = this.#understood(queue, job);
      outcome = task.kind === 'checkpoint' ? await this.#save(own, job, task, startedAt) : await this.#inTurn(own, job, task);
    } catch (error) {
      outcome = { ok: false, error: toErrorRecord(error) };
    } finally {
      this.#lost.delete(job.id!);
    }
    if (outcome === null) return this.#giveBack(worker, job, token);
    if (outcome.ok) return outcome.value;
    throw this.#failure(worker, job, outcome.error);
  }

  /** The task of a job. Throws MESSAGE_INVALID, or DEVICE_UNSUPPORTED where this device cannot do it. */
  #understood(queue: ServedQueue, job: Job): TaskOf<JobTask> {
    const kind = job.name as JobTask;
    if (!JOBS[queue].includes(kind)) throw new NnError('MESSAGE_INVALID', `queue ${queue} has no jobs named ${JSON.stringify(job.name)}`, { queue });
    const task = { kind, message: parseMessage(kind, job.data) } as TaskOf<JobTask>;
    this.#requirePrecision(originOf(task));
    return task;
  }

  /** A task on the device, when its turn comes; null when it does not. */
  async #inTurn<Kind extends JobTask>(own: boolean, job: Job, task: TaskOf<Kind>): Promise<Outcome<Kind> | null> {
    this.#putOffClearing();
    const leave = await this.#gate.enter(own ? Number.POSITIVE_INFINITY : this.#config.worker.patienceMs);
    if (leave === null) return null;
    try {
      return (await this.#perform(job, task)) as Outcome<Kind>;
    } finally {
      this.#hold(null);
      const { kind, message } = task as TaskOf<JobTask>;
      if (kind === 'shard' || kind === 'reduce') this.#clean(message.run, leave);
      else leave();
    }
  }

  /** A checkpoint: the device is held while the state is copied, and free again while the files are written. */
  async #save(own: boolean, job: Job, task: TaskOf<'checkpoint'>, startedAt: number): Promise<{ ok: true; value: Result<'checkpoint'> } | { ok: false; error: ErrorRecord } | null> {
    const { message } = task;
    const leave = await this.#background.enter(message);
    if (leave === null) return null;
    try {
      let state = this.#background.copyOf(message);
      if (state === null) {
        const outcome = await this.#inTurn(own, job, task);
        if (outcome === null || !outcome.ok) return outcome;
        if ('written' in outcome.value) {
          await this.#deliver(job, message);
          return { ok: true, value: outcome.value.written };
        }
        state = outcome.value.copied;
      }
      const { step, epoch, directory } = message;
      const worker = this.#options.id;
      const copied: Result<'checkpointProgress'> = { worker, epoch, step, copied: true };
      job.updateProgress(copied).catch((error: Error) => this.#options.log('debug', `progress of job ${job.id}: ${error.message}`));
      this.#saving = job.id!;
      this.#hold(this.#job);
      const here = this.#store?.written(message) ?? directory;
      const written = await this.#background.write({ ...message, directory: here }, state);
      if (!written.ok) return { ok: false, error: this.#store?.inTermsOfTheJob(written.error, { [directory]: here }) ?? written.error };
      await this.#deliver(job, message);
      return { ok: true, value: { worker, epoch, step, directory, bytes: written.bytes, milliseconds: performance.now() - startedAt } };
    } finally {
      this.#saving = null;
      this.#hold(this.#job);
      leave();
    }
  }

  /** A checkpoint that was written here is brought to the orchestrator's disk, where that is elsewhere. Throws CANCELLED when its job is given up. */
  async #deliver(job: Job, message: Message<'checkpoint'>): Promise<void> {
    if (this.#store === null) return;
    const delivery = new AbortController();
    this.#delivery = delivery;
    if (this.#lost.has(job.id!)) delivery.abort();
    const watch = await this.#control.watch(message.run, message.epoch, (command) => {
      if (command === 'drop') delivery.abort();
    });
    try {
      await this.#store.deliver(message, delivery.signal);
    } finally {
      watch.stop();
      this.#delivery = null;
    }
  }

  /** The job on the device, before it is done, so that its evidence is with the supervisor. A checkpoint being written counts when there is none. */
  #hold(job: { readonly id: string; readonly kind: JobTask } | null): void {
    this.#job = job;
    this.#options.onHold(job?.id ?? this.#saving);
  }

  /** Puts a job back for others. The queue is left alone until this device is idle, or the same job would come at once. */
  async #giveBack(worker: Worker, job: Job, token: string): Promise<never> {
    if (!this.#draining) {
      await worker.pause(true);
      this.#waitingForIdle.add(worker);
    }
    await job.moveToWait(token);
    if (!this.#gate.busy) this.#onIdle();
    throw new WaitingError();
  }

  /** Puts a job of another protocol behind the others for a while, for workers that understand it. */
  async #leaveAlone(job: Job, token: string): Promise<never> {
    this.#options.log('warn', `job ${job.id} is of protocol ${protocolOf(job.data)}, this worker speaks ${PROTOCOL}: upgrade what is older`);
    await job.moveToDelayed(Date.now() + this.#config.queue.stalledIntervalMs, token);
    throw new DelayedError();
  }

  async #perform(job: Job, task: TaskOf<JobTask>): Promise<Outcome<JobTask>> {
    const { kind } = task;
    const origin = originOf(task);
    if (kind === 'checkpoint') this.#background.forget();
    this.#hold({ id: job.id!, kind });
    this.#controlCommand = 'run';
    this.#localCommand = this.#lost.has(job.id!) ? 'drop' : this.#draining ? 'yield' : 'run';
    this.#command(this.#localCommand);
    const watch = origin === null ? null : await this.#control.watch(origin.run, origin.epoch, (command) => this.#onControl(command));
    const progress = new Progress(job, this.#options, origin?.epoch ?? 0);
    try {
      if (this.#pool.signals.command === 'drop') throw new NnError('CANCELLED', `job ${job.id} is of an older epoch, or its run is over, or its lock is lost`, { job: job.id! });
      const outcome = await this.#withFiles(task, kind === 'steps' ? (report) => progress.report(report) : undefined);
      await progress.sent();
      return outcome;
    } finally {
      watch?.stop();
    }
  }

  /**
   * Does a task where its files are: without a store, that is here; with one they are fetched first. What turns out to be damaged
   * in the cache is fetched anew, once.
   */
  async #withFiles(task: TaskOf<JobTask>, onReport?: (report: StepReport) => void): Promise<Outcome<JobTask>> {
    const store = this.#store;
    if (store === null) return this.#pool.run(task, onReport);
    const transfers = new AbortController();
    this.#transfers = transfers;
    try {
      for (let again = false; ; again = true) {
        this.#command(this.#localCommand);
        const prepared = await store.prepare(task, this.#pool.replica, transfers.signal, again);
        const outcome: Outcome<JobTask> = await this.#pool.run({ ...task, local: prepared.local }, onReport);
        if (outcome.ok) return outcome;
        if (again || !(await store.isToBlame(outcome.error, prepared))) return { ...outcome, error: store.inTermsOfTheJob(outcome.error, prepared.local) };
      }
    } finally {
      this.#transfers = null;
    }
  }

  /** An error of the form that BullMQ records: its message is the ErrorRecord as JSON. A fault ends this process once it is recorded. */
  #failure(worker: Worker, job: Job, record: ErrorRecord): Error {
    const text = JSON.stringify(record);
    const recovery = record.code === 'BUG' ? 'retry' : ERROR_KINDS[record.code].recovery;
    const level = record.code === 'CANCELLED' ? 'debug' : recovery === 'retry' && record.code !== 'BUG' ? 'warn' : 'error';
    this.#options.log(level, `job ${job.name} ${job.id}: ${record.message}`, record);
    if (recovery === 'restart') this.#exitAfter(worker, job, record);
    const error = recovery === 'never' ? new UnrecoverableError(text) : new Error(text);
    if (record.stack !== undefined) error.stack = record.stack;
    return error;
  }

  /** Calls onFault when the failure of `job` is in Redis, or has not got there within the drain's grace. */
  #exitAfter(worker: Worker, job: Job, record: ErrorRecord): void {
    if (this.#faulted) return;
    this.#faulted = true;
    this.#gate.close();
    const timer = setTimeout(() => this.#options.onFault(record, job.id!), this.#config.worker.drainMs);
    worker.on('failed', (failed) => {
      if (failed?.id !== job.id) return;
      clearTimeout(timer);
      this.#options.onFault(record, job.id!);
    });
  }

  #requirePrecision(origin: Origin | null): void {
    const able = precisionsOf(this.#device);
    if (origin?.spec['precision'] !== 'bf16' || able.includes('bf16')) return;
    throw new NnError('DEVICE_UNSUPPORTED', `${this.#device.name} computes ${able.join(' and ')}, not bf16`, { precision: 'bf16' });
  }

  #onControl(command: Command): void {
    const stoppable = this.#job !== null && STOPPABLE.includes(this.#job.kind);
    this.#controlCommand = stoppable || command === 'drop' ? command : 'run';
    this.#command(this.#localCommand);
  }

  /** Sets this process's own command, and tells the compute thread the stronger of it and the control's. */
  #command(local: Command): void {
    this.#localCommand = stronger(this.#localCommand, local);
    const command = stronger(this.#localCommand, this.#controlCommand);
    this.#pool.signals.command = command;
    if (command === 'stop' || command === 'drop') this.#transfers?.abort();
  }

  /** The device is free: the queues that were left alone are listened to again. */
  #onIdle(): void {
    if (this.#draining || this.#faulted) return;
    for (const worker of this.#waitingForIdle) void worker.resume();
    this.#waitingForIdle.clear();
  }

  /** Ends a turn on the device. Nobody waits for what is cleared away first, neither the job nor the heartbeat: the exchange may be away. */
  #clean(run: string, leave: Leave): void {
    this.#clearing = true;
    this.#awaited = false;
    this.#cleaning = this.#forgetIfOver(run)
      .catch((error: Error) => this.#options.log('debug', `clearing away run ${run}: ${error.message}`))
      .finally(() => {
        this.#clearing = false;
        leave();
      });
  }

  /** A job needs the device, and must not wait for an exchange that is away where no control reaches it. */
  #putOffClearing(): void {
    if (!this.#clearing) return;
    this.#awaited = true;
    this.#pool.signals.command = 'drop';
  }

  /** Deletes what a job may have put into the exchange after its run had been cleared away, and frees the run's replica. */
  async #forgetIfOver(run: string): Promise<void> {
    this.#uncleared.delete(run);
    if ((await this.#control.read(run)) !== null) return;
    this.#background.forget();
    this.#pool.signals.command = this.#givenUp || this.#awaited ? 'drop' : 'run';
    const outcome = await this.#pool.run({ kind: 'forget', run });
    if (outcome.ok) return;
    this.#options.log(this.#awaited ? 'debug' : 'warn', `run ${run} could not be cleared away: ${outcome.error.message}`, outcome.error);
    if (this.#awaited && this.#uncleared.size < UNCLEARED_MOST) this.#uncleared.add(run);
  }

  /** One heartbeat; when the last one is still under way (Redis is away), none. */
  async #beat(): Promise<void> {
    if (this.#beating) return;
    this.#beating = true;
    try {
      await this.#record();
      await this.#releaseIfOver();
    } catch (error) {
      this.#options.log('debug', `heartbeat: ${(error as Error).message}`);
    } finally {
      this.#beating = false;
    }
  }

  async #record(): Promise<void> {
    const { kind, name, index, memoryBytes } = this.#device;
    const record: WorkerRecord = {
      id: this.#options.id,
      incarnation: this.#incarnation,
      protocol: PROTOCOL,
      host: hostname(),
      processId: process.pid,
      device: { kind, name, index, memoryBytes },
      precisions: precisionsOf(this.#device),
      state: this.#draining ? 'draining' : this.#gate.busy ? 'busy' : 'idle',
      replica: this.#pool.replica,
      heartbeatAtMs: Date.now(),
      startedAtMs: this.#startedAtMs,
      lastExit: this.#options.lastExit,
    };
    await this.#commands.hset(this.#names.workers, this.#options.id, JSON.stringify(record));
  }

  /** An idle worker frees the replica of a run that is over, and does what was put off. */
  async #releaseIfOver(): Promise<void> {
    const [putOff] = this.#uncleared;
    const run = putOff ?? this.#pool.replica?.run;
    if (run === undefined || this.#gate.busy || this.#draining) return;
    if (putOff === undefined && (await this.#control.read(run)) !== null) return;
    const leave = await this.#gate.enter(0);
    if (leave !== null) this.#clean(run, leave);
  }
}

/** The steps of one job on their way to Redis, in order. */
class Progress {
  #sent: Promise<void> = Promise.resolve();

  readonly #job: Job;
  readonly #options: IslandOptions;
  readonly #epoch: number;

  constructor(job: Job, options: IslandOptions, epoch: number) {
    this.#job = job;
    this.#options = options;
    this.#epoch = epoch;
  }

  report(report: StepReport): void {
    const progress = { worker: this.#options.id, epoch: this.#epoch, report };
    this.#sent = this.#sent
      .then(() => this.#job.updateProgress(progress))
      .catch((error: Error) => this.#options.log('debug', `progress of job ${this.#job.id}: ${error.message}`));
  }

  /** Until every report is in Redis, or has failed to get there: the result of the job holds them all again. */
  sent(): Promise<void> {
    return this.#sent;
  }
}

/** The run that a task belongs to, if any. */
function originOf(task: TaskOf<JobTask>): Origin | null {
  if (task.kind === 'generate') return null;
  return task.kind === 'eval' ? task.message.replica : task.message;
}

/** The process around an island: settings from the supervisor, drain on SIGTERM, and an end with the supervisor's. */
function runProcess(): void {
  let island: Island | null = null;
  let stopping = false;
  const send = (message: WorkerMessage, sent: () => void = () => undefined): void => {
    if (process.connected) process.send!(message, sent);
    else sent();
  };
  const log: IslandOptions['log'] = (level, message, error) => send({ type: 'log', level, message, ...(error === undefined ? {} : { error: toErrorRecord(error) }) });
  const end = (record: ErrorRecord, job: string | null = null): void => {
    stopping = true;
    const code = record.code !== 'BUG' && ERROR_KINDS[record.code].recovery === 'never' ? EXIT.refused : EXIT.restart;
    // exit() would wait for the compute thread, and a hung native call never returns.
    send({ type: 'fault', error: record, job }, () => (record.context['hung'] === true ? process.kill(process.pid, 'SIGKILL') : process.exit(code)));
  };
  const refuse = (error: unknown): void => end(toErrorRecord(error));
  const drain = (serving: Island): void => void serving.drain().then(() => process.exit(0), refuse);
  const stop = (): void => {
    if (stopping) return;
    stopping = true;
    if (island !== null) drain(island);
  };
  // Ctrl-C reaches the whole process group: the supervisor decides what it means.
  process.on('SIGINT', () => undefined);
  process.on('SIGTERM', stop);
  process.on('disconnect', () => process.kill(process.pid, 'SIGKILL'));
  process.on('uncaughtException', refuse);
  process.on('unhandledRejection', refuse);
  process.once('message', ({ id, config, device, lastExit }: StartMessage) => {
    process.title = `cuda-nn worker ${id}`;
    let held: string | null = null;
    const onHold = (job: string | null): void => {
      if (job !== held) send({ type: 'holds', job: (held = job) });
    };
    const starting = new Island({ id, config, device, lastExit, log, onHold, onFault: end });
    starting.start().then(() => {
      if (stopping) return drain(starting);
      island = starting;
      send({ type: 'ready', device: starting.device });
    }, refuse);
  });
}

if (process.send !== undefined && process.argv[1] === fileURLToPath(import.meta.url)) runProcess();
