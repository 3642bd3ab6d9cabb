/**
 * Drives one run: hears what happens (jobs, workers, wishes, the clock), tells the run machine, and does what it asks. All
 * effects of a run pass through here, in order; what others only read (record, events, metrics) is not waited for. Made by
 * main.ts for each job of `runs`; decides nothing itself.
 *
 *   recover: record, metrics, checkpoints, log of the exchange, jobs in Redis  ->  machine  ->  effects  ->  events ...  ->  finish
 */
import { randomUUID } from 'node:crypto';
import { join, resolve } from 'node:path';
import type { Logger } from 'pino';
import { NnError, toErrorRecord } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import type { Control } from '../config/keys.ts';
import { PROTOCOL, TERMINAL_PHASES } from '../config/messages.ts';
import type { RunEvent, RunFault, RunRecord, StepReport } from '../config/messages.ts';
import { parseRunSpec } from '../config/run-spec.ts';
import type { RunSpec } from '../config/run-spec.ts';
import type { Config } from '../config/schema.ts';
import { failedRecord } from './attempts.ts';
import { deleteAbandoned, deleteCheckpoint, findCheckpoints } from './checkpoints.ts';
import type { ExchangeKeys } from './exchange-keys.ts';
import { History } from './history.ts';
import { FaultLog } from './fault-log.ts';
import { UNWATCHED } from './loss-spike.ts';
import { RunMetrics } from './metrics.ts';
import { gradientBytes } from './plan.ts';
import type { JobEvent, Queues } from './queues.ts';
import { believe } from './recovery.ts';
import { claimDirectory, readRecordFile, writeRecordFile } from './run-directory.ts';
import { step } from './run-machine.ts';
import { initialState, parseJobId, recordOf } from './run-state.ts';
import type { Effect, JobAddress, MachineEvent, RunState } from './run-state.ts';
import { Fenced } from './run-store.ts';
import type { RunStore } from './run-store.ts';
import { Sharing } from './sharing.ts';
import { isTransient } from './transient.ts';
import type { WorkerWatch } from './worker-watch.ts';

/** What all drivers of an orchestrator share. */
export interface DriverContext {
  readonly config: Config;
  readonly logger: Logger;
  readonly queues: Queues;
  readonly store: RunStore;
  readonly watch: WorkerWatch;
  readonly exchange: ExchangeKeys;
  /** Calls back when the wish of the run may have changed; returns how to stop that. */
  readonly onWish: (run: string, heard: () => void) => () => void;
  /** Names the process of Redis that answers; the empty string when it does not say. */
  readonly server: () => string;
  /** Calls back when another process of Redis answers than before: it may have lost the last writes. */
  readonly onRestart: (heard: () => void) => () => void;
  /** Calls with what goes wrong around all runs, now and later; returns how to stop that. */
  readonly onTrouble: (heard: (what: string, error: ErrorRecord) => void) => () => void;
  /** Whether this orchestrator drives other runs. */
  readonly othersActive: (run: string) => boolean;
}

/** Pause between two writes of a record: readers need it seldom, and steps may take a millisecond. */
const RECORD_PAUSE_MS = 50;
/** First pause before an effect that Redis refused is tried again; doubled up to the configured maximum. */
const RETRY_MS = 100;
/** How long the end of a completed run waits for workers to let go of jobs that were given up long before. */
const ERASE_WAIT_MS = 2_000;

type Inner = MachineEvent extends infer Event ? (Event extends MachineEvent ? Omit<Event, 'atMs'> : never) : never;

export class Driver {
  readonly #context: DriverContext;
  readonly #run: string;
  readonly #token = randomUUID();
  readonly #signal: AbortSignal;
  readonly #logger: Logger;
  readonly #directory: string;
  #spec!: RunSpec;
  #state!: RunState;
  #metrics!: RunMetrics;
  #history!: History;
  #faults!: FaultLog;
  #sharing!: Sharing;
  /** As the machine heard of it last, JSON. */
  #share = '';
  readonly #effects: Effect[] = [];
  #pumping = false;
  /** Id of the wish that was heard last. */
  #lastWish: string | null = null;
  #lastWord: RunEvent | null = null;
  #recordDirty = false;
  #recordWriting: Promise<void> | null = null;
  /** The process of Redis that the run was made right with, and the one that its record names. */
  #server = '';
  #serverNoted = '';
  /** Of record.json; no worker is told a later one before it lies there. */
  #epochOnDisk = -1;
  /** Files whose lines wait for room on the disk. */
  readonly #diskFull = new Set<string>();
  readonly #ended: Promise<'done' | 'handover'>;
  #end!: (outcome: 'done' | 'handover') => void;
  #over = false;
  readonly #hearJob = (event: JobEvent): void => this.#hear(event);

  constructor(context: DriverContext, run: string, signal: AbortSignal) {
    this.#context = context;
    this.#run = run;
    this.#signal = signal;
    this.#logger = context.logger.child({ run });
    this.#directory = join(resolve(context.config.runs), run);
    this.#ended = new Promise((resolve) => {
      this.#end = (outcome) => {
        this.#over = true;
        resolve(outcome);
      };
    });
  }

  /** Drives the run to its end, or until the signal takes it away. Never throws for what the run's record can tell. */
  async drive(): Promise<'done' | 'handover'> {
    const { store, watch, queues, onWish, onRestart, config } = this.#context;
    const stored = await store.read(this.#run).catch((error: unknown) => {
      this.#logger.warn(toErrorRecord(error), 'a job for a run without a record');
      return null;
    });
    if (stored === null) return 'done';
    const before = await store.own(this.#run, this.#token);
    if (TERMINAL_PHASES.includes(stored.record.phase)) {
      await this.#eraseWork(stored.record.epoch, 0);
      await store.sweep(this.#run, this.#token);
      return 'done';
    }
    // With the defaults of this version, should an older one have queued the run.
    this.#spec = parseRunSpec(stored.spec);
    const stops: (() => void)[] = [];
    try {
      if (await this.#endsAgain(stored.record)) return 'done';
      await this.#recover(before);
      stops.push(watch.listen(() => this.#hearWorkers()));
      stops.push(onWish(this.#run, () => void this.#readWish()));
      stops.push(onRestart(() => this.#hearRestarted()));
      const timer = setInterval(() => this.#tick(), config.orchestrator.watchMs);
      stops.push(() => clearInterval(timer));
      const aborted = (): void => this.#end('handover');
      this.#signal.addEventListener('abort', aborted, { once: true });
      stops.push(() => this.#signal.removeEventListener('abort', aborted));
      if (this.#signal.aborted) aborted();
      this.#hearWorkers();
      stops.push(this.#context.onTrouble((what, error) => this.#hear({ type: 'fault', what, error })));
      void this.#readWish();
      return await this.#ended;
    } catch (error) {
      if (error instanceof Fenced) return 'handover';
      if (this.#signal.aborted) return 'handover';
      await this.#failUnbegun(error);
      return 'done';
    } finally {
      for (const stop of stops) stop();
      queues.unlisten(this.#run, this.#hearJob);
      await this.#leave();
    }
  }

  // --- Beginning ----------------------------------------------------------------------------------------------------

  /** Whether the run is over by what its directory says, and Redis lost that: then its end is told again. A run that is queued was asked for anew. */
  async #endsAgain(record: RunRecord): Promise<boolean> {
    const { store } = this.#context;
    const kept = readRecordFile(this.#directory);
    if (kept === null || !TERMINAL_PHASES.includes(kept.phase) || record.phase === 'queued' || kept.epoch < record.epoch) return false;
    this.#logger.warn({ phase: kept.phase }, 'Redis had lost the end of the run');
    await store.deleteControl(this.#run, this.#token);
    await store.close(this.#run, this.#token, kept, { type: 'phase', phase: kept.phase, atMs: kept.finishedAtMs ?? Date.now() });
    await this.#eraseWork(kept.epoch, 0);
    await store.leave(this.#run, this.#token);
    return true;
  }

  /** `before`: what the driver before this one spoke, and to whom. */
  async #recover(before: { readonly protocol: number; readonly server: string }): Promise<void> {
    const { store, config, exchange, watch, queues } = this.#context;
    const server = this.#context.server();
    claimDirectory(this.#directory, this.#spec);
    const [stored, told] = await Promise.all([store.read(this.#run), store.readControl(this.#run)]);
    const kept = readRecordFile(this.#directory);
    const foreign = before.protocol !== PROTOCOL;
    const restarted = before.server !== '' && server !== '' && before.server !== server;
    const heard = { record: stored.record, control: told, kept };
    const { lost } = believe({ ...heard, restarted });
    // Jobs and gradients of another protocol are not believed either: the run goes on from its checkpoint.
    const { record, control } = believe({ ...heard, restarted: restarted || foreign });
    if (foreign) {
      await queues.erase(this.#run, record.epoch, ERASE_WAIT_MS);
      await exchange.erase(this.#run, () => store.owns(this.#run, this.#token));
      this.#logger.warn({ spoken: before.protocol, protocol: PROTOCOL }, 'the run was driven by a version of another protocol; it goes on from its checkpoint');
    }
    this.#epochOnDisk = kept?.epoch ?? -1;
    // Redis is believed again once the new epoch is written down: whoever dies before that leaves the doubt to the next.
    if (lost) {
      await store.writeRecord(this.#run, this.#token, record);
      this.#writeRecordFile(record);
    }
    this.#server = server;
    await this.#noteServer();
    this.#metrics = new RunMetrics(this.#directory, Date.now(), this.#spec);
    this.#history = new History(this.#directory, this.#token);
    this.#faults = new FaultLog(this.#directory);
    // Metrics that somebody took away are not steps that nobody counted.
    const empty = this.#metrics.counted?.step === 0 && (this.#metrics.counted.branch?.rollbacks ?? []).length === 0;
    const ofRecord = { step: record.step, lastReport: record.lastReport, branch: { rollbacks: record.rollbacks, lossWatch: UNWATCHED } };
    const counted = empty ? { ...this.#metrics.counted!, ...ofRecord } : this.#metrics.counted;
    const reached = counted?.step ?? record.step;
    const rollbacks = counted === null ? record.rollbacks : (counted.branch?.rollbacks ?? []);
    const found = await findCheckpoints(this.#directory, rollbacks);
    this.#background('abandoned checkpoints', deleteAbandoned(this.#directory, rollbacks));
    const checkpoints = found.good.filter((checkpoint) => checkpoint.step <= reached);
    const newest = checkpoints.at(-1)?.step ?? 0;
    const logThrough = await exchange.logThrough(this.#run, newest, reached, rollbacks);
    const { orchestrator, queue, redis } = config;
    this.#state = initialState(
      {
        run: this.#run,
        spec: this.#spec,
        checkpointRoot: join(this.#directory, 'checkpoints'),
        logSteps: Math.max(1, Math.floor(config.exchange.logBytes / gradientBytes(this.#spec))),
        maxReplans: orchestrator.maxReplans,
        maxKills: orchestrator.maxKills,
        stepsPerJob: orchestrator.stepsPerJob,
        lookupMs: orchestrator.lookupMs,
        jobTimeoutMs: orchestrator.jobTimeoutMs,
        backoffMs: queue.backoffMs,
        backoffMaximumMs: Math.max(queue.backoffMs, redis.retryMaximumMs),
      },
      { record, control, counted, faults: this.#faults.before, checkpoints, logThrough },
    );
    this.#logger.info({ phase: record.phase, step: this.#state.step, epoch: this.#state.epoch }, record.phase === 'queued' ? 'run begins' : 'run is taken up');
    const { phase, epoch, step: at } = this.#state;
    const branch = rollbacks.length === 0 ? {} : { branch: rollbacks.length };
    this.#append('history', () => this.#history.append({ type: 'taken', atMs: Date.now(), epoch, phase, step: at, checkpoint: newest, ...branch }));
    queues.listen(this.#run, this.#hearJob);
    await watch.look();
    this.#sharing = new Sharing({
      run: this.#run, token: this.#token, store, watch, timeSliceMs: orchestrator.timeSliceMs, onError: (error) => this.#logger.debug(toErrorRecord(error), 'demand not written'),
    });
    this.#hearWorkers();
    // What this run wants is known to others, and what they want to it, before it takes its first worker.
    await this.#sharing.settled();
    this.#hearWorkers();
    for (const { directory, error } of found.bad) this.#hear({ type: 'fault', what: `checkpoint ${directory}`, error });
    if (lost) {
      const how = restarted ? 'Redis was started anew and may have lost its last writes' : `Redis knows of epoch ${stored.record.epoch}, the run had come to ${kept!.epoch}`;
      const message = `${how}; what was under way is planned again`;
      this.#hear({ type: 'fault', what: 'Redis', error: { code: 'REDIS_LOST', message, context: {} } });
    }
    if (control !== null) await this.#adopt();
    this.#hear({ type: 'ready' });
  }

  /** Tells the machine of the jobs that an earlier driver of this run left in Redis, and of what became of them. */
  async #adopt(): Promise<void> {
    const { queues, watch } = this.#context;
    // A checkpoint outlives its epoch once its state is copied.
    const all = await queues.jobsOf(this.#run, watch.knownIds);
    const jobs = all.filter(({ id, status }) => parseJobId(id)!.epoch === this.#state.epoch || (parseJobId(id)!.name === 'checkpoint' && status.state === 'pending'));
    for (const job of jobs) await queues.watch(job);
    for (const job of jobs) {
      const { name, step: at } = parseJobId(job.id)!;
      const address: JobAddress = { queue: job.queue, worker: job.worker, id: job.id };
      const related = name === 'reduce' ? jobs.filter((other) => parseJobId(other.id)!.name === 'shard' && parseJobId(other.id)!.step === at) : [];
      // Its state may have changed since the listing; the events heard meanwhile were not for any activity.
      const status = job.status.state === 'pending' ? await queues.lookup(address) : job.status;
      this.#hear({ type: 'adopt', job: address, data: job.data, processedAtMs: job.processedAtMs, finished: status.state !== 'pending', progress: job.progress, related });
      if (name === 'steps') for (const data of await queues.progressOf(address)) this.#hear({ type: 'progress', id: job.id, data });
      if (status.state === 'completed') this.#hear({ type: 'completed', id: job.id, result: status.result });
      if (status.state === 'failed') this.#hear({ type: 'failed', id: job.id, error: status.error });
    }
  }

  /** The run could not even be taken up: its record says why. */
  async #failUnbegun(error: unknown): Promise<void> {
    const { store } = this.#context;
    this.#logger.error(toErrorRecord(error), 'run fails');
    const { record } = await store.read(this.#run);
    const atMs = Date.now();
    const failed = failedRecord(record, toErrorRecord(error), atMs);
    this.#writeRecordFile(failed);
    await store.close(this.#run, this.#token, failed, { type: 'phase', phase: 'failed', atMs });
    await this.#eraseWork(record.epoch, 0);
    await store.leave(this.#run, this.#token);
  }

  // --- Hearing ------------------------------------------------------------------------------------------------------

  #hear(event: Inner): void {
    if (this.#over) return;
    const next = step(this.#state, { ...event, atMs: Date.now() });
    this.#state = next.state;
    if (next.effects.length === 0) return;
    this.#effects.push(...next.effects);
    this.#recordDirty = true;
    if (!this.#pumping) void this.#pump();
    this.#writeRecord();
  }

  /** Who lives, and which of them are this run's to use. */
  #hearWorkers(): void {
    const share = this.#sharing.look(this.#state);
    this.#share = JSON.stringify(share);
    this.#hear({ type: 'workers', workers: this.#context.watch.views, ...(share === null ? {} : { share }) });
  }

  #tick(): void {
    // A share may change by nothing but time, and by what this run itself has become.
    if (JSON.stringify(this.#sharing.look(this.#state)) !== this.#share) this.#hearWorkers();
    this.#hear({ type: 'tick' });
    void this.#readWish();
  }

  #hearRestarted(): void {
    this.#hear({ type: 'restarted' });
    this.#server = this.#context.server();
  }

  /** A wish counts once: what was wished before does not undo, later, a pause that the machine chose itself. */
  async #readWish(): Promise<void> {
    try {
      const wish = await this.#context.store.readWish(this.#run);
      if (wish === null) return;
      if (wish.id !== this.#lastWish) {
        this.#lastWish = wish.id;
        this.#hear({ type: 'wish', wish: wish.wish });
      } else if (!this.#pumping && this.#effects.length === 0) {
        // A phase is in the record when its effects are done: whoever drives the run next need not hear of the wish.
        await this.#context.store.dropWish(this.#run, wish.id);
      }
    } catch (error) {
      this.#logger.debug(toErrorRecord(error), 'wish not read');
    }
  }

  // --- Doing --------------------------------------------------------------------------------------------------------

  /** Does the effects in order, one pump at a time. What Redis refuses is tried again until it succeeds or the run is taken away. */
  async #pump(): Promise<void> {
    this.#pumping = true;
    for (let effect = this.#effects.shift(); effect !== undefined && !this.#over; effect = this.#effects.shift()) {
      for (let attempt = 0; !this.#over; attempt++) {
        try {
          const waiting = this.#perform(effect);
          if (waiting !== null) await waiting;
          break;
        } catch (error) {
          if (!(await this.#mayRetry(error, effect, attempt))) break;
        }
      }
    }
    this.#pumping = false;
  }

  async #mayRetry(error: unknown, effect: Effect, attempt: number): Promise<boolean> {
    if (this.#over) return false;
    if (error instanceof Fenced) {
      this.#logger.warn('another orchestrator drives this run now');
      this.#end('handover');
      return false;
    }
    const record = toErrorRecord(error);
    if (!isTransient(error)) {
      this.#logger.error(record, `effect ${effect.type} failed`);
      if (effect.type === 'finish') {
        // Its job ends here; the janitor finds the record unfinished and has the end tried again.
        this.#end('done');
        return false;
      }
      this.#hear({ type: 'fatal', error: record });
      return false;
    }
    if (attempt === 0) {
      this.#logger.warn(record, `effect ${effect.type} is tried again`);
      this.#hear({ type: 'fault', what: `effect ${effect.type}`, error: { code: 'REDIS_UNAVAILABLE', message: record.message, context: {} } });
    }
    await new Promise((resolve) => setTimeout(resolve, Math.min(this.#context.config.redis.retryMaximumMs, RETRY_MS * 2 ** Math.min(attempt, 10))));
    return !this.#over;
  }

  /** Null: done, or on its way; else what must be waited for before the next effect. */
  #perform(effect: Effect): Promise<void> | null {
    const { queues, store, watch, exchange } = this.#context;
    switch (effect.type) {
      case 'flow':
        return queues.addFlow(effect.parent, effect.children);
      case 'add':
        // What the checkpoint rests on must not be younger on the disk than the checkpoint.
        if (effect.job.name === 'checkpoint') this.#syncFiles();
        return queues.add(effect.job);
      case 'control':
        // The end of a run deletes its control: that stops every job at once, and for good.
        if (TERMINAL_PHASES.includes(this.#state.phase)) return store.deleteControl(this.#run, this.#token);
        return this.#writeControl(effect.control);
      case 'metrics':
        this.#append('metrics', () => this.#metrics.append(effect.line));
        if (effect.line.type === 'rollback') this.#syncFiles();
        return null;
      case 'recount':
        this.#compare(effect.report);
        return null;
      case 'history':
        this.#append('history', () => this.#history.append(effect.event));
        return null;
      case 'publish':
        if (effect.event.type === 'phase') this.#logger.info(`run is ${effect.event.phase}`);
        if (effect.event.type === 'fault') this.#logger.warn(effect.event.error, `fault: ${effect.event.what}`);
        if (effect.event.type === 'phase') return this.#announce(effect.event);
        if (effect.event.type === 'checkpoint') this.#writeRecordFile(recordOf(this.#state));
        if (effect.event.type === 'fault') this.#logFault(effect.event);
        this.#background('event', store.publish(this.#run, this.#token, effect.event));
        return null;
      case 'claim':
        return watch.claim(this.#run, this.#token, effect.workers).then((workers) => this.#hear({ type: 'claimed', workers }));
      case 'release':
        return watch.release(this.#run, this.#token, effect.workers);
      case 'remove':
        return queues.remove(effect.jobs);
      case 'lookup':
        return this.#lookUp(effect.jobs);
      case 'trim':
        this.#background('trim', exchange.trim(this.#run, this.#spec, effect.from, effect.through, effect.rollbacks));
        return null;
      case 'deleteCheckpoints':
        for (const directory of effect.directories) this.#background('old checkpoint', deleteCheckpoint(directory));
        return null;
      case 'findCheckpoints':
        return findCheckpoints(this.#directory, this.#state.rollbacks).then(({ good, bad }) => this.#hear({ type: 'checkpoints', good, bad }));
      case 'finish':
        return this.#finish();
    }
  }

  /** Whoever hears of a phase finds it in the record: the record is written first. The last phase is told by `finish`. */
  #announce(event: Extract<RunEvent, { type: 'phase' }>): Promise<void> | null {
    const { store } = this.#context;
    if (TERMINAL_PHASES.includes(event.phase)) {
      this.#lastWord = event;
      return null;
    }
    return this.#keepRecord().then(() => store.publish(this.#run, this.#token, event));
  }

  /** The record in Redis, then, as it is ours to write, on the disk. Throws Fenced. */
  async #keepRecord(): Promise<void> {
    const record = recordOf(this.#state);
    await this.#context.store.writeRecord(this.#run, this.#token, record);
    if (!TERMINAL_PHASES.includes(record.phase)) this.#writeRecordFile(record);
  }

  /** A disk that is full is told of by the metrics; `restore` reckons with it. */
  #writeRecordFile(record: RunRecord): void {
    try {
      writeRecordFile(this.#directory, record);
      this.#epochOnDisk = record.epoch;
    } catch (error) {
      this.#logger.warn(toErrorRecord(error), 'record.json not written');
    }
  }

  async #writeControl(control: Control): Promise<void> {
    if (control.epoch > this.#epochOnDisk) await this.#keepRecord();
    await this.#context.store.writeControl(this.#run, this.#token, control);
    if (control.epoch === this.#state.epoch) await this.#noteServer();
  }

  /** Under the epoch at hand whatever this Redis brought back is void. */
  async #noteServer(): Promise<void> {
    if (this.#serverNoted === this.#server) return;
    const server = this.#server;
    await this.#context.store.noteServer(this.#run, this.#token, server);
    this.#serverNoted = server;
  }

  /** A disk that is full is a fault once; the lines wait in memory for room. */
  #append(what: 'metrics' | 'history', append: () => void): void {
    try {
      append();
      this.#diskFull.delete(what);
    } catch (error) {
      const full = (error as NnError).code === 'DISK_FULL';
      if (!full || (error as NnError).context['fatal'] === true) throw error;
      if (!this.#diskFull.has(what)) this.#hear({ type: 'fault', what, error: toErrorRecord(error) });
      this.#diskFull.add(what);
    }
  }

  #syncFiles(): void {
    try {
      this.#metrics.sync();
      this.#history.sync();
    } catch (error) {
      this.#hear({ type: 'fault', what: 'metrics', error: toErrorRecord(error) });
    }
  }

  /** A disk that is full is told of by the metrics: the line waits in memory for the next. */
  #logFault(fault: RunFault): void {
    const { epoch, step: at, shown } = this.#state;
    try {
      this.#faults.append(fault, { attempt: shown.attempts.at(-1)?.number ?? 0, epoch, step: at });
    } catch (error) {
      this.#logger.warn(toErrorRecord(error), 'fault not written down');
    }
  }

  /** The same step twice, with other numbers: one of the two was computed wrongly. */
  #compare(report: StepReport): void {
    const difference = this.#metrics.difference(report);
    if (difference === null) return;
    const message = `step ${report.step} is not what it was: ${difference}; a worker or its device has a fault`;
    this.#hear({ type: 'fault', what: `step ${report.step} computed again`, error: { code: 'REPLICA_DIVERGED', message, context: { step: report.step } } });
  }

  /** What may have ended without our hearing of it. The first of a flow is its parent. */
  async #lookUp(jobs: readonly JobAddress[]): Promise<void> {
    for (const job of jobs) {
      const status = await this.#context.queues.lookup(job);
      if (status.state === 'completed') this.#hear({ type: 'completed', id: job.id, result: status.result });
      if (status.state === 'failed') this.#hear({ type: 'failed', id: job.id, error: status.error });
      if (status.state === 'missing') this.#hear({ type: 'missing', id: job.id });
      if (job === jobs[0] && status.state !== 'pending' && parseJobId(job.id)?.name === 'reduce') return;
    }
  }

  /** Work that nobody waits for; its failure is logged. */
  #background(what: string, work: Promise<unknown>): void {
    work.catch((error: unknown) => this.#logger.warn(toErrorRecord(error), `${what} failed`));
  }

  /** Writes the record unless a write is under way, which then is followed by another. The last one is `finish`'s. */
  #writeRecord(): void {
    if (this.#recordWriting !== null || TERMINAL_PHASES.includes(this.#state.phase)) return;
    this.#recordWriting = (async () => {
      while (this.#recordDirty && !this.#over && !TERMINAL_PHASES.includes(this.#state.phase)) {
        this.#recordDirty = false;
        await this.#context.store.writeRecord(this.#run, this.#token, recordOf(this.#state));
        await new Promise((resolve) => setTimeout(resolve, RECORD_PAUSE_MS));
      }
    })()
      .catch((error: unknown) => {
        if (error instanceof Fenced) this.#end('handover');
        else this.#logger.warn(toErrorRecord(error), 'record not written');
      })
      .finally(() => {
        this.#recordWriting = null;
      });
  }

  // --- Ending -------------------------------------------------------------------------------------------------------

  /** A completed run is cleaned up before anybody is told; one that was stopped is told first, since its workers may take a while. */
  async #finish(): Promise<void> {
    const { store, config } = this.#context;
    const completed = this.#state.phase === 'completed';
    this.#syncFiles();
    await this.#recordWriting;
    const { epoch } = this.#state;
    if (completed) await this.#eraseWork(epoch, ERASE_WAIT_MS);
    const record = recordOf(this.#state);
    if (await store.owns(this.#run, this.#token)) this.#writeRecordFile(record);
    await store.close(this.#run, this.#token, record, this.#lastWord!);
    if (!completed) await this.#eraseWork(epoch, config.orchestrator.requestTimeoutMs);
    await deleteAbandoned(this.#directory, this.#state.rollbacks);
    await store.leave(this.#run, this.#token);
    this.#end('done');
  }

  /**
   * Jobs, gradients and claims of the run are deleted; jobs that a worker still holds after `waitMs` are torn from it. What
   * belongs to another attempt, which may have begun meanwhile, is not touched: its epoch is above, its owner another.
   */
  async #eraseWork(throughEpoch: number, waitMs: number): Promise<void> {
    const { queues, exchange, store, watch, othersActive } = this.#context;
    await queues.erase(this.#run, throughEpoch, waitMs);
    await exchange.erase(this.#run, () => store.owns(this.#run, this.#token));
    await watch.releaseAll(this.#run, this.#token);
    if (!othersActive(this.#run)) await queues.trimEvents();
  }

  /** On the way out, however: files are closed; a driver that gives the run back writes down how far it got. */
  async #leave(): Promise<void> {
    this.#over = true;
    await this.#recordWriting;
    if (this.#metrics === undefined) return;
    if (!TERMINAL_PHASES.includes(this.#state.phase) && this.#signal.reason === 'stop') {
      await this.#context.store.writeRecord(this.#run, this.#token, recordOf(this.#state)).catch((error: unknown) => this.#logger.warn(toErrorRecord(error), 'record not written'));
    }
    this.#metrics.close();
    this.#history?.close();
    this.#faults?.close();
  }
}
