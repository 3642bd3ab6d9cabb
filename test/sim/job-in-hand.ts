/**
 * One job in the hands of one simulated worker, from its taking to its end: the replica is brought to the job's version, what the job
 * asks for is computed, and the result is sent; unless the process ends, the job becomes another's, or the run's control stops it.
 * Which worker takes which job is workers.ts's, the only caller.
 */
import assert from 'node:assert/strict';
import { branchOf } from '../../config/branches.ts';
import type { ErrorRecord } from '../../config/errors.ts';
import type { ExitRecord, Result, StepReport } from '../../config/messages.ts';
import type { NewJob } from '../../orchestrator/run-state.ts';
import { report } from '../support/machine-table.ts';
import { chainAt, replicaDigest, shardDigest, stepFrom, sumDigest, weightsDigest } from './chain.ts';
import type { Ground } from './ground.ts';
import { keyOf, sumKey } from './storage.ts';
import type { AnyMessage, SimDisk, SimJob, SimOrigin, SimRedis } from './storage.ts';

const STEP_MS = 20;
const TIMINGS = { computeMs: STEP_MS, exchangeMs: 0.001, waitMs: 0 };

export interface SimWorker {
  readonly id: string;
  incarnation: number;
  alive: boolean;
  /** The orchestrator does not see its heartbeat, though it works on. */
  hidden: boolean;
  startedAtMs: number;
  replica: { step: number; state: number; branch: number } | null;
  /** The job on its compute thread, and the checkpoint whose files it writes beside it. */
  job: string | null;
  saving: string | null;
  /** Of the jobs in its hands. */
  readonly tokens: Set<number>;
  draining: boolean;
  /** Whether it has the memory to copy a checkpoint's state. */
  copies: boolean;
  lastExit: ExitRecord | null;
}

/** What a worker tells the orchestrator of a job. */
export interface Word {
  readonly type: 'progress' | 'completed' | 'failed';
  readonly id: string;
  readonly data?: unknown;
  readonly result?: unknown;
  readonly error?: ErrorRecord;
}

/** What a worker works with. */
export interface Workplace {
  readonly ground: Ground;
  readonly redis: SimRedis;
  readonly disk: SimDisk;
  /** Of the run. */
  readonly steps: number;
  readonly send: (word: Word) => void;
  /** Whether this work ends the worker that begins it, which then is done. */
  strikes(worker: SimWorker, name: NewJob['name'], step: number, shard?: number): boolean;
}

export class JobInHand {
  readonly #place: Workplace;
  readonly #worker: SimWorker;
  readonly #incarnation: number;
  readonly #job: SimJob;
  readonly #key: string;
  readonly #token: number;
  readonly #data: AnyMessage;
  readonly #origin: SimOrigin;

  /** The worker has just taken the job. */
  constructor(place: Workplace, worker: SimWorker, job: SimJob) {
    this.#place = place;
    this.#worker = worker;
    this.#incarnation = worker.incarnation;
    this.#job = job;
    this.#key = keyOf(job);
    this.#token = job.token;
    this.#data = job.data as AnyMessage;
    this.#origin = this.#data.replica ?? this.#data;
  }

  begin(): void {
    const { name } = this.#job;
    if (name !== 'steps' && this.#place.strikes(this.#worker, name, this.#origin.step, this.#data.shard)) return;
    switch (name) {
      case 'steps': return this.#steps();
      case 'shard': return this.#shard();
      case 'reduce': return this.#reduce();
      case 'checkpoint': return this.#checkpoint();
      case 'eval': return this.#eval();
      case 'digest': return this.#digest();
    }
  }

  // --- The kinds of jobs ------------------------------------------------------------------------------------------------

  #steps(): void {
    const { ground, redis, send } = this.#place;
    const { epoch, fromStep, stepCount } = this.#data;
    const worker = this.#worker;
    const reports: StepReport[] = [];
    const loop = (): void => {
      if (this.#cancelled()) return this.#fail(CANCELLED);
      if (reports.length === stepCount || redis.control!.command !== 'run' || worker.draining) {
        return this.#end({ worker: worker.id, epoch, fromStep, stepsDone: reports.length, reports, timings: TIMINGS });
      }
      if (this.#place.strikes(worker, 'steps', fromStep + reports.length + 1)) return;
      ground.at(STEP_MS / 2 + ground.pick(STEP_MS), this.#present(() => {
        const report = reportOf(fromStep + reports.length + 1, worker.replica!.state);
        worker.replica = this.#after(worker.replica!.state, report.step);
        reports.push(report);
        const progress = { worker: worker.id, epoch, report };
        this.#mine()?.progress.push(progress);
        send({ type: 'progress', id: this.#job.id, data: progress });
        loop();
      }));
    };
    this.#atVersion(fromStep, 0, loop);
  }

  #shard(): void {
    const { ground, redis } = this.#place;
    const { id } = this.#worker;
    const { epoch, step, shard, rollbacks } = this.#data;
    const name = `${sumKey(rollbacks, step)}:${shard}`;
    const result = (digest: string): Result<'shard'> => ({
      worker: id, epoch, step, shard, lossSum: 1, auxLossSum: [1], expertLoad: [[1]], targetTokens: 1, digest, key: name, bytes: 10, timings: TIMINGS,
    });
    const there = redis.shards.get(name);
    if (there !== undefined) return ground.at(1, this.#present(() => this.#end(result(there.digest))));
    this.#atVersion(step - 1, STEP_MS / 2 + ground.pick(STEP_MS), (state) => {
      const digest = shardDigest(state, shard);
      if (this.#seenCancelled()) return this.#fail(CANCELLED);
      redis.shards.set(name, { digest, from: state, worker: id, epoch });
      this.#end(result(digest));
    });
  }

  #reduce(): void {
    const { ground, redis } = this.#place;
    const { epoch, step, shardCount, rollbacks } = this.#data;
    const worker = this.#worker;
    const sum = sumKey(rollbacks, step);
    this.#atVersion(step - 1, 2 + ground.pick(5), (state) => {
      const shards: Result<'reduce'>['shards'] = [];
      for (let shard = 0; shard < shardCount; shard++) {
        const gradient = redis.shards.get(`${sum}:${shard}`);
        if (gradient === undefined) return this.#fail({ code: 'GRADIENT_LOST', message: `shard ${shard}`, context: {} });
        assert.equal(gradient.from, state, 'a shard was computed on another version');
        shards.push({ shard, worker: gradient.worker, epoch: gradient.epoch, digest: gradient.digest });
      }
      if (this.#seenCancelled()) return this.#fail(CANCELLED);
      const replica = this.#after(state, step);
      redis.sums.set(sum, { from: state, to: replica.state });
      for (let shard = 0; shard < shardCount; shard++) redis.shards.delete(`${sum}:${shard}`);
      worker.replica = replica;
      this.#end({ worker: worker.id, epoch, digest: sumDigest(state), key: `sum:${step}`, bytes: 10, report: reportOf(step, state), timings: TIMINGS, shards });
    });
  }

  #checkpoint(): void {
    const { ground, disk, send } = this.#place;
    const { epoch, step, directory, rollbacks } = this.#data;
    const worker = this.#worker;
    const result = { worker: worker.id, epoch, step, directory, bytes: 1, milliseconds: 1 };
    const there = disk.find(directory);
    if (there !== undefined && !disk.damaged.has(directory) && worker.replica?.step !== step) return ground.at(1, this.#present(() => this.#end(result)));
    this.#atVersion(step, 10, (state) => {
      assert.equal(state, chainAt(step, rollbacks));
      const written = (): void => {
        if (ground.chance(ground.faults.diskFull)) return this.#fail({ code: 'DISK_FULL', message: 'disk full', context: {} });
        disk.write({ directory, step, state });
        if (ground.chance(ground.faults.damageCheckpoint)) disk.damaged.add(directory);
        this.#end(result);
      };
      const milliseconds = ground.random() ** 2 * ground.faults.slowestDiskMs;
      if (!worker.copies) return ground.at(milliseconds, this.#present(written));
      // Copied: it goes on to its end whatever the control says, unless the run is over.
      worker.job = null;
      worker.saving = this.#key;
      const now = this.#mine();
      if (now !== null) now.copied = true;
      send({ type: 'progress', id: this.#job.id, data: { worker: worker.id, epoch, step, copied: true } });
      ground.at(milliseconds, () => {
        if (!worker.alive || worker.incarnation !== this.#incarnation || worker.saving !== this.#key) return;
        worker.saving = null;
        written();
      });
    });
  }

  #eval(): void {
    const { step, rollbacks } = this.#origin;
    this.#atVersion(step, 5, (state) => {
      assert.equal(state, chainAt(step, rollbacks));
      this.#end({ worker: this.#worker.id, step, loss: 1 + state / 2 ** 32, targetTokens: 1, milliseconds: 1 });
    });
  }

  #digest(): void {
    const { epoch, step } = this.#data;
    this.#atVersion(step, 5, (state) =>
      this.#end({ worker: this.#worker.id, epoch, step, digest: replicaDigest(state), weightsDigest: step === this.#place.steps ? weightsDigest(state) : null }),
    );
  }

  // --- The replica ------------------------------------------------------------------------------------------------------

  /** Brings the replica to the version, and after so many milliseconds more goes on from its state. */
  #atVersion(version: number, milliseconds: number, act: (state: number) => void): void {
    const { ground } = this.#place;
    ground.at(1 + ground.pick(5), this.#present(() => {
      const problem = this.#bring(version);
      if (problem !== null) return this.#fail(problem);
      ground.at(milliseconds, this.#present(() => act(this.#worker.replica!.state)));
    }));
  }

  #bring(version: number): ErrorRecord | null {
    if (this.#cancelled()) return CANCELLED;
    const { redis, disk } = this.#place;
    const { checkpoint, rollbacks } = this.#origin;
    const branch = (step: number): number => branchOf(rollbacks, step);
    const held = this.#worker.replica;
    let replica = held !== null && held.step <= version && held.branch === branch(held.step) ? held : null;
    if (replica === null || (checkpoint !== null && checkpoint.step > replica.step)) {
      if (checkpoint === null) replica = { step: 0, state: chainAt(0), branch: 0 };
      else if (disk.damaged.has(checkpoint.directory)) return { code: 'CHECKPOINT_INVALID', message: checkpoint.directory, context: {} };
      else {
        const there = disk.find(checkpoint.directory);
        if (there === undefined) return { code: 'CHECKPOINT_INVALID', message: 'gone', context: {} };
        replica = { step: checkpoint.step, state: there.state, branch: branch(checkpoint.step) };
      }
    }
    for (let step = replica.step + 1; step <= version; step++) {
      const sum = redis.sums.get(sumKey(rollbacks, step));
      if (sum === undefined) return { code: 'GRADIENT_LOST', message: `sum of ${step}`, context: {} };
      assert.equal(sum.from, replica.state, `the sum of step ${step} belongs to another branch`);
      replica = { step, state: sum.to, branch: branch(step) };
    }
    this.#worker.replica = replica;
    return null;
  }

  #after(state: number, step: number): NonNullable<SimWorker['replica']> {
    const { rollbacks } = this.#origin;
    return { step, state: stepFrom(state, step, rollbacks), branch: branchOf(rollbacks, step) };
  }

  // --- Whose job it is, and its end -------------------------------------------------------------------------------------

  #cancelled(): boolean {
    const { control } = this.#place.redis;
    return control === null || control.epoch > this.#origin.epoch;
  }

  /** Between the look at the control and the publication time passes: a late one still publishes the same bits. */
  #seenCancelled(): boolean {
    return this.#cancelled() && this.#place.ground.random() < 0.7;
  }

  /** The job as Redis has it, while it is this worker's. */
  #mine(): SimJob | null {
    const now = this.#place.redis.jobs.get(this.#key);
    return now?.state === 'active' && now.token === this.#token ? now : null;
  }

  /** Does it only if the process is still there then, with this job. */
  #present(act: () => void): () => void {
    const worker = this.#worker;
    return () => {
      if (worker.alive && worker.incarnation === this.#incarnation && worker.job === this.#key) act();
    };
  }

  #leave(): SimJob | null {
    if (this.#worker.job === this.#key) this.#worker.job = null;
    this.#worker.tokens.delete(this.#token);
    return this.#mine();
  }

  #end(result: object): void {
    const job = this.#leave();
    if (job === null) return;
    job.state = 'completed';
    job.result = result;
    this.#place.send({ type: 'completed', id: job.id, result });
  }

  #fail(error: ErrorRecord): void {
    const job = this.#leave();
    if (job === null) return;
    if (error.code === 'GRADIENT_LOST' && ++job.attempts < 3) return this.#place.redis.wait(job);
    job.state = 'failed';
    job.error = error;
    this.#place.send({ type: 'failed', id: job.id, error });
  }
}

const CANCELLED: ErrorRecord = { code: 'CANCELLED', message: 'old epoch', context: {} };

const reportOf = (step: number, state: number): StepReport => report(step, { loss: state, milliseconds: STEP_MS });
