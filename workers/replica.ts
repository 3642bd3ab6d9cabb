/**
 * A replica: one run's weights, optimizer state and version on one device, as a state machine whose log is the sequence of
 * reduced gradients. It brings itself to a version, computes steps and shards, sums shards, writes checkpoints. What it
 * computes depends on (spec, version, shard) alone, so that both ways of a step give the same bits:
 *
 *   local   beginStep, for each shard (beginShard, microbatches, endShard), applyStep
 *   flow    shard:  beginStep, beginShard, microbatches, endShard, publish
 *           reduce: beginStep, addGradient of shard 0, 1, ..., publish, applyStep; others: writeGradient of the sum, applyStep
 *
 * Knows no queue, no orchestrator and no other replica. Called by thread.ts, one call at a time.
 */
import { setImmediate as turn } from 'node:timers/promises';
import type { Config } from '../config/schema.ts';
import { branchOf, dataStep, replicaAt } from '../config/branches.ts';
import { NnError, errorCode } from '../config/errors.ts';
import { parseResult } from '../config/messages.ts';
import type { Message, Origin, Result, ShardReport, StepReport } from '../config/messages.ts';
import { keys } from '../config/keys.ts';
import type { Control } from '../config/keys.ts';
import type { RunSpec } from '../config/run-spec.ts';
import { hostFreeBytes } from '../cuda/device.ts';
import type { Device } from '../cuda/device.ts';
import { CheckpointReader, writeCheckpoint } from '../data/checkpoint-files.ts';
import { readManifest } from '../data/manifest.ts';
import { evaluationBatches, stepTargetTokens, trainingBatch } from '../data/sampler.ts';
import { TokenFile, requireVocabulary } from '../data/token-file.ts';
import { commandFor } from './control.ts';
import type { Exchange } from './exchange/contract.ts';
import { Trainer } from './model/trainer.ts';
import type { Places } from './places.ts';
import { finite, flowMilliseconds, logLength, sumMicrobatches, sumShards } from './reports.ts';
import type { MicrobatchNumbers } from './reports.ts';
import type { Signals } from './signals.ts';
import { allocateCopy, copyBytes, copyState } from './state-copy.ts';
import type { CopyMemory } from './state-copy.ts';
import type { CheckpointOutcome, ReplicaState } from './tasks.ts';

/** Times that a reduction is begun anew because a shard turned out to be lost. */
const REDUCE_ROUNDS = 3;

export interface ReplicaOptions {
  readonly device: Device;
  readonly exchange: Exchange;
  readonly signals: Signals;
  readonly places: Places;
  /** The control of a run as it is now, null when the run is over; waits for a Redis that is away. */
  readonly control: (run: string) => Promise<Control | null>;
  readonly config: Config;
  /** Id of the worker, for results. */
  readonly worker: string;
  readonly run: string;
  readonly spec: RunSpec;
}

/** Where the time of a job goes. */
class Stopwatch {
  readonly timings = { computeMs: 0, exchangeMs: 0, waitMs: 0 };
  #since = performance.now();

  /** Books the time since the last booking. */
  book(kind: 'computeMs' | 'exchangeMs' | 'waitMs'): void {
    const now = performance.now();
    this.timings[kind] += now - this.#since;
    this.#since = now;
  }

  get totalMs(): number {
    return this.timings.computeMs + this.timings.exchangeMs + this.timings.waitMs;
  }
}

export class Replica {
  readonly run: string;
  readonly spec: RunSpec;
  readonly #exchange: Exchange;
  readonly #signals: Signals;
  readonly #places: Places;
  readonly #control: ReplicaOptions['control'];
  readonly #config: Config;
  readonly #worker: string;
  readonly #names: ReturnType<typeof keys>;
  readonly #trainer: Trainer;
  readonly #train: TokenFile;
  /** The version on the device; null while it is being changed, or when a change failed half-way. */
  #step: number | null = null;
  /** The branch that it was computed on. */
  #branch = 0;
  /** What the job at hand knows of rollbacks. */
  #rollbacks: Origin['rollbacks'] = undefined;
  /** Where the state is copied for checkpoints, once that was done. */
  #memory: CopyMemory | null = null;
  /** Reports of the steps that the newest `steps` job did here, by step, should the job be delivered twice. */
  readonly #reports = new Map<number, StepReport>();

  /** Throws DEVICE_MEMORY, FILE_NOT_FOUND, TOKEN_FILE_INVALID or DATA_INVALID. */
  constructor({ device, exchange, signals, places, control, config, worker, run, spec }: ReplicaOptions) {
    this.run = run;
    this.spec = spec;
    this.#exchange = exchange;
    this.#signals = signals;
    this.#places = places;
    this.#control = control;
    this.#config = config;
    this.#worker = worker;
    this.#names = keys(config.redis.prefix);
    this.#train = TokenFile.open(places.of(spec.data.train));
    try {
      requireVocabulary(spec.model, this.#train);
      const { shards, microBatches, sequences, sequenceLength } = spec.batch;
      this.#trainer = new Trainer(device, {
        model: spec.model,
        precision: spec.precision,
        recompute: spec.recompute,
        sequences,
        sequenceLength,
        optimizer: spec.optimizer,
        totalSteps: spec.steps,
        separateShards: shards > 1 && microBatches > 1,
      });
    } catch (error) {
      this.#train.close();
      throw error;
    }
  }

  get step(): number | null {
    return this.#step;
  }

  /** What the worker says of it. */
  get state(): ReplicaState {
    return this.#step === null ? null : replicaAt(this.run, this.#step, this.#branch);
  }

  close(): void {
    this.#step = null;
    this.#trainer.close();
    this.#train.close();
  }

  /**
   * Whole steps with the gradients staying on the device. Ends early at a step boundary on `yield`, and without the step at
   * hand on `stop`. Steps that this replica has done already (the job was delivered twice) are reported again, not computed.
   */
  async steps(message: Message<'steps'>, onReport: (report: StepReport) => void): Promise<Result<'steps'>> {
    const watch = new Stopwatch();
    const last = message.fromStep + message.stepCount;
    this.#enter(message);
    this.#require(last <= this.spec.steps, `has no step ${last}`);
    const reports = this.#doneAlready(message.fromStep, last);
    for (const report of reports) onReport(report);
    const result = (): Result<'steps'> => {
      const { fromStep, epoch } = message;
      return { worker: this.#worker, epoch, fromStep, stepsDone: reports.length, reports, timings: watch.timings };
    };
    try {
      await this.bringTo(message.fromStep + reports.length, message);
    } catch (error) {
      if (errorCode(error) !== 'CANCELLED' || this.#signals.command !== 'stop') throw error;
      return result();
    } finally {
      watch.book('exchangeMs');
    }
    while (message.fromStep + reports.length < last) {
      this.#signals.check();
      if (this.#signals.command !== 'run') break;
      const report = this.#localStep(message.fromStep + reports.length + 1);
      if (report === null) break;
      reports.push(report);
      this.#reports.set(report.step, report);
      onReport(report);
      // Lets this thread's sockets and timers live in a long job.
      await turn();
    }
    this.#signals.check();
    watch.book('computeMs');
    return result();
  }

  /** One shard's gradient, published; if it is published already, its result as it is. Throws CANCELLED on stop. */
  async shard(message: Message<'shard'>): Promise<Result<'shard'>> {
    const watch = new Stopwatch();
    const { run, step, shard, epoch } = message;
    this.#require(step <= this.spec.steps && shard < this.spec.batch.shards, `has no shard ${shard} of step ${step}`);
    this.#enter(message);
    const key = this.#names.shardGradient(run, step, shard, this.#branchOf(step));
    const length = this.#trainer.flatLength;
    const published = await this.#published('shard', key);
    if (published !== null && (await this.#exchange.complete(key, length))) return published;
    await this.bringTo(step - 1, message);
    watch.book('exchangeMs');
    this.#trainer.beginStep();
    const report = this.#accumulate(step, shard, this.#lossScale(step));
    if (report === null) throw new NnError('CANCELLED', `run ${run}: shard ${shard} of step ${step} was stopped`, { run, step, shard });
    const digest = this.#trainer.gradientDigest();
    watch.book('computeMs');
    if (published !== null && published.digest !== digest) throw this.#diverged(`shard ${shard} of step ${step}`, published, digest);
    await this.#exchange.upload(key, { length, digest, read: (offset, into) => this.#trainer.readGradient(offset, into) });
    this.#signals.checkStop();
    watch.book('exchangeMs');
    await this.#fence(message);
    const result: Result<'shard'> = {
      ...report,
      worker: this.#worker, epoch, step, shard, digest, key, bytes: length * 4, timings: watch.timings,
    };
    await this.#exchange.seal(key, JSON.stringify(result));
    return result;
  }

  /**
   * The sum of a step's shards, published and applied here. A shard that is lost or damaged is computed again on the spot.
   * If the sum is published already, its result as it is. Throws GRADIENT_LOST when shards keep getting lost.
   */
  async reduce(message: Message<'reduce'>): Promise<Result<'reduce'>> {
    const watch = new Stopwatch();
    const { run, step, shardCount, epoch } = message;
    this.#require(step <= this.spec.steps && shardCount === this.spec.batch.shards, `has no step ${step} of ${shardCount} shards`);
    this.#enter(message);
    const branch = this.#branchOf(step);
    const key = this.#names.reducedGradient(run, step, branch);
    const length = this.#trainer.flatLength;
    const shardKeys = Array.from({ length: shardCount }, (_, shard) => this.#names.shardGradient(run, step, shard, branch));
    const published = await this.#published('reduce', key);
    if (published !== null && (await this.#exchange.complete(key, length))) {
      await this.#exchange.remove(shardKeys, length);
      return published;
    }
    await this.bringTo(step - 1, message);
    const shards = await this.#sumShards(message, shardKeys);
    watch.book('exchangeMs');
    const digest = this.#trainer.gradientDigest();
    watch.book('computeMs');
    if (published !== null && published.digest !== digest) throw this.#diverged(`the sum of step ${step}`, published, digest);
    await this.#exchange.upload(key, { length, digest, read: (offset, into) => this.#trainer.readGradient(offset, into) });
    this.#signals.checkStop();
    watch.book('exchangeMs');
    await this.#fence(message);
    // From here on the sum is this replica's version: it is published, or lost with it.
    this.#signals.finishing = true;
    try {
      const outcome = this.#apply(step);
      watch.book('computeMs');
      const report = sumShards(step, shards, this.spec.batch.shards * this.spec.batch.microBatches, outcome, flowMilliseconds(shards, watch.totalMs));
      const summed = shards.map(({ shard, worker, epoch, digest }) => ({ shard, worker, epoch, digest }));
      const result: Result<'reduce'> = { worker: this.#worker, epoch, digest, key, bytes: length * 4, report, timings: watch.timings, shards: summed };
      await this.#exchange.seal(key, JSON.stringify(result));
      await this.#exchange.remove(shardKeys, length);
      await this.#trimLog(step, length);
      return result;
    } finally {
      this.#signals.finishing = false;
    }
  }

  /**
   * Version `step` as a checkpoint. With `copy`, and memory for it, the state is copied off the training buffers for the writer
   * thread; the copy stands until this is called again. Else the files are written here, and the device waits for the disk. A job
   * that comes again when the replica has gone on, because Redis lost its end, is answered by what lies on the disk.
   */
  async checkpoint(message: Message<'checkpoint'>, { copy = false } = {}): Promise<CheckpointOutcome> {
    const startedAt = performance.now();
    const { step, epoch, directory } = message;
    this.#enter(message);
    const there = this.#step === step ? null : this.#bytesOnDisk(message);
    if (there !== null) return { written: { worker: this.#worker, epoch, step, directory, bytes: there, milliseconds: performance.now() - startedAt } };
    await this.bringTo(step, message);
    const branch = this.#branch;
    const tokenizer = this.spec.data.tokenizer === undefined ? null : this.#places.of(this.spec.data.tokenizer);
    const about = { model: this.spec.model, step, precision: this.spec.precision, tokenizer, runInfo: { run: this.run, spec: this.spec, ...(branch === 0 ? {} : { branch }) } };
    const memory = copy ? this.#copyMemory() : null;
    if (memory !== null) {
      copyState(this.#trainer, memory, () => this.#signals.check());
      return { copied: { ...about, memory } };
    }
    const places = new Map(this.#trainer.parameters.map((parameter) => [parameter.name, parameter]));
    const { bytes } = await writeCheckpoint(this.#places.of(directory), {
      ...about,
      read: (kind, name, into) => {
        this.#signals.check();
        this.#trainer.readState(kind, places.get(name)!, into);
      },
    });
    return { written: { worker: this.#worker, epoch, step, directory, bytes, milliseconds: performance.now() - startedAt } };
  }

  /** Bytes of the checkpoint that a job asks for, where it lies there already, whole and of this run; else null. */
  #bytesOnDisk({ step, directory }: Message<'checkpoint'>): number | null {
    const place = this.#places.of(directory);
    try {
      const reader = CheckpointReader.open(place, { verify: true, check: () => this.#signals.check() });
      const { state, hasTraining } = reader;
      reader.close();
      const { run, branch = 0 } = state?.run ?? {};
      if (!hasTraining || state?.step !== step || run !== this.run || branch !== this.#branchOf(step)) return null;
      return Object.values(readManifest(place)!.files).reduce((sum, { bytes }) => sum + bytes, 0);
    } catch (error) {
      const code = errorCode(error);
      if (code === 'FILE_NOT_FOUND' || code === 'CHECKPOINT_INVALID') return null;
      throw error;
    }
  }

  /** Memory for a copy of the state: taken once; null while the host has not enough to spare. */
  #copyMemory(): CopyMemory | null {
    const share = this.#config.worker.checkpointCopyPercent / 100;
    if (this.#memory === null && copyBytes(this.#trainer) <= share * hostFreeBytes()) this.#memory = allocateCopy(this.#trainer);
    return this.#memory;
  }

  async digest(message: Message<'digest'>): Promise<Result<'digest'>> {
    const { step, epoch } = message;
    await this.bringTo(step, message);
    const weightsDigest = step === this.spec.steps ? this.#trainer.weightsDigest() : null;
    return { worker: this.#worker, epoch, step, digest: this.#trainer.stateDigest(), weightsDigest };
  }

  /** Loss of version `replica.step` on the first sequences of a token file, of the run's own sequence length. */
  async evaluate(message: Message<'eval'> & { replica: NonNullable<Message<'eval'>['replica']> }): Promise<Result<'eval'>> {
    const startedAt = performance.now();
    const { replica, data, sequences } = message;
    const { sequenceLength, sequences: perBatch } = this.spec.batch;
    this.#require(message.sequenceLength === null || message.sequenceLength === sequenceLength, `is evaluated on sequences of ${sequenceLength}`);
    await this.bringTo(replica.step, replica);
    const file = TokenFile.open(this.#places.of(data));
    try {
      requireVocabulary(this.spec.model, file);
      const { lossSum, targetTokens } = evaluateFile(this.#trainer, file, { sequences, sequenceLength, perBatch }, () => this.#signals.checkStop());
      const loss = finite(lossSum / targetTokens);
      return { worker: this.#worker, step: replica.step, loss, targetTokens, milliseconds: performance.now() - startedAt };
    } finally {
      file.close();
    }
  }

  /**
   * The last look before something is published: throws CANCELLED when the job's epoch is over. A process that was stopped and
   * goes on, or that was cut off, learns it here, whatever it knew before. What happens between this look and the publication
   * cannot be seen, because queues and exchange may be two servers; what is published then is the same bits as that of any other
   * attempt, under a key that no run but this one reads.
   */
  async #fence({ run, epoch }: Origin): Promise<void> {
    const control = await this.#control(run);
    if (commandFor(control, epoch) === 'drop') throw new NnError('CANCELLED', `run ${run}: the job's epoch ${epoch} is over, nothing is published`, { run, epoch });
  }

  /**
   * Brings the weights and the optimizer to `version`: from what is there, or the newest checkpoint, or the seed, whichever is
   * nearest, by applying the reduced gradients in between. Throws GRADIENT_LOST when one of these is gone, CHECKPOINT_INVALID, and
   * CANCELLED when the job is stopped; it begins anew then.
   */
  async bringTo(version: number, origin: Origin): Promise<void> {
    this.#enter(origin);
    if (this.#step === version) return;
    const own = this.#step !== null && this.#step < version ? this.#step : -1;
    const saved = origin.checkpoint !== null && origin.checkpoint.step <= version ? origin.checkpoint : null;
    const from = Math.max(own, saved?.step ?? 0);
    const sumKeys = Array.from({ length: version - from }, (_, index) => this.#names.reducedGradient(this.run, from + 1 + index, this.#branchOf(from + 1 + index)));
    const texts = sumKeys.length === 0 ? [] : await this.#exchange.texts(sumKeys);
    const missing = texts.indexOf(null);
    if (missing !== -1) {
      const step = from + 1 + missing;
      throw new NnError('GRADIENT_LOST', `run ${this.run}: version ${version} cannot be reached from ${from}: the reduced gradient of step ${step} is not kept`, {
        run: this.run, step, from, version,
      });
    }
    if (from !== own) this.#start(saved);
    for (const [index, text] of texts.entries()) await this.#applySum(from + 1 + index, sumKeys[index]!, text!);
  }

  /** Version 0 from the seed (or the spec's initial checkpoint), or a checkpoint's version. */
  #start(saved: NonNullable<Origin['checkpoint']> | null): void {
    this.#step = null;
    this.#reports.clear();
    if (saved !== null) this.#loadTraining(saved);
    else if (this.spec.initialCheckpoint !== undefined) this.#loadInitialWeights(this.spec.initialCheckpoint);
    else this.#trainer.initialise(this.spec.seed, () => this.#signals.checkStop());
    this.#stand(saved?.step ?? 0);
  }

  /** Each job begins with what it knows of rollbacks: a version of another branch than the job's is of no use any more. */
  #enter({ rollbacks }: Origin): void {
    this.#rollbacks = rollbacks;
    if (this.#step === null || this.#branch === this.#branchOf(this.#step)) return;
    this.#step = null;
    this.#reports.clear();
  }

  #branchOf(step: number): number {
    return branchOf(this.#rollbacks, step);
  }

  /** The device holds version `step` of the job's branch. */
  #stand(step: number): void {
    this.#step = step;
    this.#branch = this.#branchOf(step);
  }

  #loadTraining({ directory, step }: NonNullable<Origin['checkpoint']>): void {
    const reader = CheckpointReader.open(this.#places.of(directory), { verify: true, check: () => this.#signals.checkStop() });
    try {
      if (!reader.hasTraining) throw new NnError('CHECKPOINT_INVALID', `${directory}: has no optimizer state, so that a run cannot go on from it`, { directory });
      const branch = reader.state?.run['branch'] ?? 0;
      if (branch !== this.#branchOf(step)) {
        const message = `${directory}: is of branch ${JSON.stringify(branch)}, which was given up; version ${step} is of branch ${this.#branchOf(step)}`;
        throw new NnError('CHECKPOINT_INVALID', message, { directory, step });
      }
      if (reader.step !== step) throw new NnError('CHECKPOINT_INVALID', `${directory}: is of step ${reader.step}, not ${step}`, { directory, step });
      reader.requireModel(this.spec.model);
      for (const parameter of this.#trainer.parameters) {
        const values = new Float32Array(parameter.length);
        for (const kind of ['weight', 'm', 'v'] as const) {
          this.#signals.checkStop();
          reader.readTraining(kind, parameter.name, values);
          this.#trainer.writeState(kind, parameter, values);
        }
      }
    } finally {
      reader.close();
    }
  }

  #loadInitialWeights(directory: string): void {
    const reader = CheckpointReader.open(this.#places.of(directory), { verify: true, check: () => this.#signals.checkStop() });
    try {
      reader.requireModel(this.spec.model);
      this.#trainer.loadWeights(reader);
    } finally {
      reader.close();
    }
  }

  /** Applies a published sum. A damaged one is withdrawn, so that nobody else tries it. */
  async #applySum(step: number, key: string, text: string): Promise<void> {
    const length = this.#trainer.flatLength;
    try {
      const published = resultIn('reduce', text);
      if (published === null) throw new NnError('GRADIENT_LOST', `run ${this.run}: what is published as the reduced gradient of step ${step} is no result`, { run: this.run, step });
      const { digest } = published;
      this.#trainer.beginStep();
      await this.#exchange.download(key, { length, digest, write: (offset, from) => this.#trainer.writeGradient(offset, from) });
      if (this.#trainer.gradientDigest() !== digest) {
        throw new NnError('GRADIENT_LOST', `run ${this.run}: the reduced gradient of step ${step} is not the one that was published`, { run: this.run, step });
      }
    } catch (error) {
      if (errorCode(error) === 'GRADIENT_LOST') await this.#exchange.remove([key], length);
      throw error;
    }
    this.#apply(step);
  }

  /** The optimizer's step; until it is through, the version is unknown. */
  #apply(step: number): ReturnType<Trainer['applyStep']> {
    this.#step = null;
    const outcome = this.#trainer.applyStep(step);
    this.#stand(step);
    return outcome;
  }

  /** One whole step on this device, or null if it was stopped; the version is then as before. */
  #localStep(step: number): StepReport | null {
    const startedAt = performance.now();
    const scale = this.#lossScale(step);
    this.#trainer.beginStep();
    const shards: ShardReport[] = [];
    for (let shard = 0; shard < this.spec.batch.shards; shard++) {
      const report = this.#accumulate(step, shard, scale);
      if (report === null) return null;
      shards.push(report);
    }
    const outcome = this.#apply(step);
    return sumShards(step, shards, this.spec.batch.shards * this.spec.batch.microBatches, outcome, performance.now() - startedAt);
  }

  /** Scales of a microbatch's losses, so that the sum over the step is the mean over its target tokens and microbatches. */
  #lossScale(step: number): { loss: number; aux: number } {
    const { batch, optimizer } = this.spec;
    const targetTokens = stepTargetTokens(this.#train, this.spec, dataStep(this.#rollbacks, step));
    return { loss: targetTokens === 0 ? 0 : 1 / targetTokens, aux: optimizer.auxLossWeight / (batch.shards * batch.microBatches) };
  }

  /** Adds one shard to the gradient; null if told to stop before its end. */
  #accumulate(step: number, shard: number, scale: { loss: number; aux: number }): ShardReport | null {
    const numbers: MicrobatchNumbers[] = [];
    this.#trainer.beginShard();
    for (let microBatch = 0; microBatch < this.spec.batch.microBatches; microBatch++) {
      this.#signals.check();
      if (this.#signals.command === 'stop') return null;
      const batch = trainingBatch(this.#train, this.spec, dataStep(this.#rollbacks, step), shard, microBatch);
      numbers.push(this.#trainer.accumulate(batch, scale));
    }
    this.#trainer.endShard();
    return sumMicrobatches(numbers);
  }

  /**
   * Sums the published shards in order into the gradient, and returns their results. What is missing or damaged is computed
   * here, which takes the gradient buffer, so that the sum begins anew.
   */
  async #sumShards(message: Message<'reduce'>, shardKeys: readonly string[]): Promise<Result<'shard'>[]> {
    const length = this.#trainer.flatLength;
    const { shardCount: _, ...rest } = message;
    let lost: unknown;
    for (let round = 0; round < REDUCE_ROUNDS; round++) {
      const texts = await this.#exchange.texts(shardKeys);
      const shards: Result<'shard'>[] = [];
      for (const [shard, text] of texts.entries()) shards.push(resultIn('shard', text) ?? (await this.shard({ ...rest, shard })));
      try {
        this.#trainer.beginStep();
        for (const { key, digest, shard } of shards) await this.#addShard(key, digest, length, shard);
        return shards;
      } catch (error) {
        if (errorCode(error) !== 'GRADIENT_LOST') throw error;
        lost = error;
      }
    }
    throw lost;
  }

  async #addShard(key: string, digest: string, length: number, shard: number): Promise<void> {
    try {
      await this.#exchange.download(key, { length, digest, write: (offset, from) => this.#trainer.addGradient(offset, from) });
    } catch (error) {
      if (errorCode(error) !== 'GRADIENT_LOST') throw error;
      await this.#exchange.remove([key], length);
      throw new NnError('GRADIENT_LOST', `run ${this.run}, shard ${shard}: ${(error as Error).message}`, { run: this.run, shard }, error);
    }
  }

  /** What is published under a key, or null. */
  async #published<Name extends 'shard' | 'reduce'>(name: Name, key: string): Promise<Result<Name> | null> {
    const [text] = await this.#exchange.texts([key]);
    return resultIn(name, text ?? null);
  }

  /** Keeps the newest sums; <exchangeOf>log says how far back they go: {"first", "last"}. */
  async #trimLog(step: number, length: number): Promise<void> {
    const key = `${this.#names.exchangeOf(this.run)}log`;
    const [text] = await this.#exchange.texts([key]);
    const before = typeof text === 'string' ? (JSON.parse(text) as { first: number; last: number }) : { first: step, last: step };
    const first = Math.max(1, step - logLength(this.#config.exchange.logBytes, length * 4) + 1);
    const old: string[] = [];
    for (let each = before.first; each < first; each++) old.push(this.#names.reducedGradient(this.run, each, this.#branchOf(each)));
    if (old.length > 0) await this.#exchange.remove(old, length);
    const log = { first: Math.max(first, Math.min(before.first, step)), last: step };
    await this.#exchange.seal(key, JSON.stringify(log));
  }

  #doneAlready(fromStep: number, last: number): StepReport[] {
    // Whoever asks for the steps after fromStep has heard of those before.
    for (const step of this.#reports.keys()) if (step <= fromStep) this.#reports.delete(step);
    const reports: StepReport[] = [];
    if (this.#step === null || this.#step > last) return reports;
    for (let step = fromStep + 1; step <= this.#step; step++) {
      const report = this.#reports.get(step);
      if (report === undefined) return [];
      reports.push(report);
    }
    return reports;
  }

  #require(condition: boolean, what: string): void {
    if (!condition) throw new NnError('MESSAGE_INVALID', `run ${this.run} ${what}`, { run: this.run });
  }

  #diverged(what: string, published: { worker: string; digest: string }, digest: string): NnError {
    return new NnError('REPLICA_DIVERGED', `run ${this.run}: ${what} has digest ${digest} here, but ${published.worker} published ${published.digest}`, {
      run: this.run, worker: published.worker, published: published.digest, digest,
    });
  }
}

/** The result that a published text holds; null for none, and for text that is no result: it is computed again. Pure. */
function resultIn<Name extends 'shard' | 'reduce'>(name: Name, text: string | null): Result<Name> | null {
  if (text === null) return null;
  try {
    return parseResult(name, JSON.parse(text));
  } catch (error) {
    if (errorCode(error) === 'MESSAGE_INVALID' || error instanceof SyntaxError) return null;
    throw error;
  }
}

/** The loss of a trainer's weights on the first sequences of a file; `check` is called before each batch and may throw. */
export function evaluateFile(
  trainer: Pick<Trainer, 'evaluate'>,
  file: TokenFile,
  shape: { sequences: number; sequenceLength: number; perBatch: number },
  check: () => void,
): { lossSum: number; targetTokens: number } {
  const total = { lossSum: 0, targetTokens: 0 };
  for (const batch of evaluationBatches(file, shape)) {
    check();
    const { lossSum, targetTokens } = trainer.evaluate(batch);
    total.lossSum += lossSum;
    total.targetTokens += targetTokens;
  }
  return total;
}
