/**
 * The workers of a simulated world: they join, take jobs, drain, crash with what they had in their hands, and return under their old
 * names. What a worker does with a job is job-in-hand.ts's; what the orchestrator makes of it is not known here. Used by world.ts
 * and orchestrator.ts.
 */
import { replicaAt } from '../../config/branches.ts';
import type { WorkerView } from '../../orchestrator/plan.ts';
import type { NewJob } from '../../orchestrator/run-state.ts';
import type { Curse } from './faults.ts';
import type { Ground } from './ground.ts';
import { JobInHand } from './job-in-hand.ts';
import type { SimWorker, Word, Workplace } from './job-in-hand.ts';
import { RUN, keyOf } from './storage.ts';
import type { SimDisk, SimRedis } from './storage.ts';

export interface WorkersOptions {
  readonly ground: Ground;
  readonly redis: SimRedis;
  readonly disk: SimDisk;
  readonly steps: number;
  readonly curse: Curse | null;
  readonly send: (word: Word) => void;
}

export class SimWorkers implements Workplace {
  readonly ground: Ground;
  readonly redis: SimRedis;
  readonly disk: SimDisk;
  readonly steps: number;
  readonly send: (word: Word) => void;
  readonly curse: Curse | null;
  readonly all: SimWorker[] = [];
  /** Processes that the curse ended. */
  struck = 0;

  constructor({ ground, redis, disk, steps, curse, send }: WorkersOptions) {
    this.ground = ground;
    this.redis = redis;
    this.disk = disk;
    this.steps = steps;
    this.curse = curse;
    this.send = send;
  }

  join(): SimWorker {
    const worker: SimWorker = {
      id: `w${this.all.length}`, incarnation: 0, alive: true, hidden: false, startedAtMs: this.ground.now, replica: null, job: null, saving: null, tokens: new Set(), draining: false,
      copies: this.ground.random() < 0.8, lastExit: null,
    };
    this.all.push(worker);
    return worker;
  }

  /** Whoever has nothing to do takes what waits. */
  work(): void {
    const { redis } = this;
    if (redis.waiting.size === 0) return;
    for (const worker of this.all) {
      if (!worker.alive || worker.job !== null || worker.draining) continue;
      for (const job of redis.waiting) {
        if ((job.worker !== null && job.worker !== worker.id) || !redis.ripe(job)) continue;
        if (job.name === 'checkpoint' && worker.saving !== null) continue;
        worker.tokens.add(redis.take(job));
        worker.job = keyOf(job);
        new JobInHand(this, worker, job).begin();
        break;
      }
    }
  }

  strikes(worker: SimWorker, name: NewJob['name'], step: number, shard = 0): boolean {
    const { curse } = this;
    if (curse === null || curse.name !== name || curse.step !== step || this.struck >= curse.times || (name === 'shard' && curse.shard !== shard)) return false;
    this.struck++;
    this.crash(worker);
    return true;
  }

  /** Not seen for a while, though it works on. */
  hide(worker: SimWorker): void {
    const { ground } = this;
    worker.hidden = true;
    ground.note(`${worker.id} is not seen`);
    ground.disturb();
    ground.at(200 + ground.pick(3_000), () => {
      worker.hidden = false;
      ground.disturb();
    });
  }

  /** SIGTERM: takes no more jobs, ends what is at hand, and another process comes in its place. */
  drain(worker: SimWorker): void {
    const { ground } = this;
    ground.note(`${worker.id} drains`);
    ground.disturb();
    worker.draining = true;
    const { incarnation } = worker;
    const leave = (): void => {
      if (!worker.alive || worker.incarnation !== incarnation) return;
      if (worker.job !== null || worker.saving !== null) return ground.at(20, leave);
      worker.alive = false;
      worker.lastExit = null;
      this.#return(worker);
    };
    ground.at(20, leave);
  }

  crash(worker: SimWorker): void {
    const { ground, redis } = this;
    ground.note(`${worker.id} crashes`);
    ground.disturb();
    worker.alive = false;
    const held = [worker.job, worker.saving].flatMap((key) => (key === null ? [] : (redis.jobs.get(key) ?? [])));
    worker.lastExit = { job: held[0]?.id ?? null, code: null, signal: 'SIGKILL', error: null, atMs: ground.now };
    worker.job = null;
    worker.saving = null;
    worker.tokens.clear();
    for (const job of held) redis.stall(job);
    this.#return(worker);
  }

  crashIfAlive(worker: SimWorker): void {
    if (worker.alive) this.crash(worker);
  }

  /** The next process under this name. */
  #return(worker: SimWorker): void {
    this.ground.at(50 + this.ground.random() ** 3 * 4_000, () => {
      worker.alive = true;
      worker.hidden = false;
      worker.draining = false;
      worker.incarnation++;
      this.ground.disturb();
      worker.startedAtMs = this.ground.now;
      worker.replica = null;
    });
  }

  /** Whether a worker still has the job of that token in its hands. */
  isHeld(token: number): boolean {
    return this.all.some(({ tokens }) => tokens.has(token));
  }

  /** As the orchestrator sees them. */
  views(): WorkerView[] {
    return this.all
      .filter((worker) => worker.alive && !worker.hidden)
      .map(({ id, incarnation, startedAtMs, replica, job, draining, lastExit }) => ({
        id, incarnation: `${id}-${incarnation}`, precisions: ['fp32'], state: draining ? 'draining' : job === null ? 'idle' : 'busy', startedAtMs, lastExit,
        replica: replica === null ? null : replicaAt(RUN, replica.step, replica.branch), heldBy: this.redis.claims.get(id) ?? null,
      }));
  }
}
