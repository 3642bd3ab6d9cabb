/**
 * A world for one run machine: queue, exchange, checkpoints, workers, users and an orchestrator that crashes, all driven by
 * one seed and a clock of its own. Messages are dropped, delayed, doubled and reordered; jobs are taken twice; workers die,
 * return under their old names, are thought dead while they live, join and drain; other runs want them; Redis loses its last
 * second. This file chooses the run and does what goes wrong. Used by run-machine.test.ts.
 *
 *   ground.ts        chance, clock and log                       chain.ts         what a step computes
 *   storage.ts       Redis, which forgets, and the disk          workers.ts       workers' lives, and who takes which job
 *   outside.ts       wishes, and what other runs leave           job-in-hand.ts   a job from its taking to its end
 *   orchestrator.ts  the machine under test, and what holds it to its promises
 *
 * A report's loss is its replica's state before the step (chain.ts): a step computed on a wrong version shows in the metrics. In some
 * worlds losses above 1.2 to 2 times the median roll the run back: of numbers as random as these that is every few steps.
 */
import assert from 'node:assert/strict';
import type { Rollback, RunRecord, StepReport } from '../../config/messages.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import type { HistoryLine } from '../../orchestrator/history.ts';
import { queuedRecord } from '../../orchestrator/run-state.ts';
import type { RunSettings } from '../../orchestrator/run-state.ts';
import type { Told } from '../support/machine-table.ts';
import { chooseCurse, generator } from './faults.ts';
import type { Curse, Faults } from './faults.ts';
import { Ground } from './ground.ts';
import type { Word } from './job-in-hand.ts';
import { SimOrchestrator } from './orchestrator.ts';
import { Outside } from './outside.ts';
import { RUN, SimDisk, SimRedis } from './storage.ts';
import { SimWorkers } from './workers.ts';

/** What the specs of all worlds have in common; read once, since there are thousands. */
const BASE = parseRunSpec({
  name: RUN,
  model: { vocabSize: 16, hiddenSize: 8, layers: 1, queryHeads: 2, experts: 2, expertsPerToken: 1, ffnSize: 8 },
  data: { train: 'train' },
  steps: 1,
  batch: { shards: 1, sequences: 1, sequenceLength: 4 },
});
export const MAX_KILLS = 3;
const MOST_WORKERS = 6;
const GIVE_UP_MS = 200_000;

/** From a generator of its own, so that other worlds stay as they are. */
function chooseSpikes(seed: number): RunSpecInput['lossSpike'] {
  const random = generator(seed ^ 0x5eed);
  const pick = (below: number): number => Math.floor(random() * below);
  return random() < 0.6 ? {} : { factor: 1.2 + 0.8 * random(), window: 1 + pick(6), patience: 1 + pick(3), maxRollbacks: pick(7) };
}

function chooseSpec(ground: Ground, seed: number): RunSpec {
  const shards = 1 + ground.pick(4);
  return {
    ...BASE,
    data: { ...BASE.data, ...(ground.random() < 0.5 ? { validation: 'validation' } : {}) },
    steps: 1 + ground.pick(30),
    batch: { ...BASE.batch, shards },
    parallelism: ground.random() < 0.3 ? 'auto' : 1 + ground.pick(4),
    checkpoint: { ...BASE.checkpoint, every: ground.pick(3) === 0 ? 0 : 1 + ground.pick(10), keep: 1 + ground.pick(3) },
    evaluation: { ...BASE.evaluation, every: ground.pick(8) },
    compareDigestsEvery: ground.pick(6),
    lossSpike: { ...BASE.lossSpike, ...chooseSpikes(seed) },
  };
}

export class World {
  readonly #ground: Ground;
  readonly spec: RunSpec;
  readonly curse: Curse | null;
  readonly #redis: SimRedis;
  readonly #workers: SimWorkers;
  readonly #outside: Outside;
  readonly #orchestrator: SimOrchestrator;

  constructor(seed: number, { faults, log = false }: { faults?: Faults; log?: boolean } = {}) {
    const ground = new Ground(seed, faults, log);
    this.#ground = ground;
    this.spec = chooseSpec(ground, seed);
    this.curse = faults === undefined ? chooseCurse(seed, this.spec.steps) : null;
    if (this.curse !== null) ground.faults = { ...ground.faults, crash: 0 };
    const settings: RunSettings = {
      run: RUN, spec: this.spec, checkpointRoot: `runs/${RUN}/checkpoints`, logSteps: 1 + ground.pick(12), maxReplans: 10_000,
      maxKills: this.curse === null ? 10_000 : MAX_KILLS, stepsPerJob: 1 + ground.pick(20),
      lookupMs: 300, jobTimeoutMs: 2_000, backoffMs: 20, backoffMaximumMs: 500,
    };
    const redis = new SimRedis(ground, queuedRecord(RUN, this.spec, 0));
    const disk = new SimDisk();
    const workers = new SimWorkers({ ground, redis, disk, steps: this.spec.steps, curse: this.curse, send: (word) => this.#send(word) });
    this.#redis = redis;
    this.#workers = workers;
    this.#outside = new Outside(ground);
    this.#orchestrator = new SimOrchestrator({ ground, redis, disk, workers, outside: this.#outside, settings });
    const count = 1 + ground.pick(4);
    for (let index = 0; index < count; index++) workers.join();
  }

  /** The record at the end of the run; null: it goes on. */
  get finished(): RunRecord | null {
    return this.#orchestrator.finished;
  }

  /** Reports of the steps that count. */
  get metrics(): readonly StepReport[] {
    return this.#orchestrator.metrics;
  }

  get rollbacks(): readonly Rollback[] {
    return this.#orchestrator.rollbacks;
  }

  /** What history.jsonl holds. */
  get history(): readonly HistoryLine[] {
    return this.#orchestrator.history;
  }

  /** Processes that the curse ended. */
  get struck(): number {
    return this.#workers.struck;
  }

  /** What happened, in words, if that was asked for. */
  get log(): readonly string[] {
    return this.#ground.log;
  }

  /** Runs the world until the run is over; throws when it is not, or when a promise is broken. */
  run(): void {
    const ground = this.#ground;
    ground.at(0, () => this.#orchestrator.start());
    ground.at(0, () => this.#meddle());
    while (this.finished === null) {
      const act = ground.next();
      if (ground.now >= GIVE_UP_MS) assert.fail(`the run does not end: ${JSON.stringify({ ...this.#orchestrator.state, settings: undefined, workers: undefined, shown: undefined })}`);
      act();
      this.#workers.work();
    }
  }

  /** A message to the orchestrator: late, twice, or not at all. */
  #send(word: Word): void {
    const ground = this.#ground;
    const { drop, double, slowest } = ground.faults;
    const isDropped = ground.chance(drop);
    if (isDropped) return ground.disturb();
    const copies = ground.chance(double) ? 2 : 1;
    for (let copy = 0; copy < copies; copy++) {
      const delay = copy === 0 ? ground.random() ** 4 * slowest : ground.random() * 10 * slowest;
      ground.at(delay, () => this.#orchestrator.hear(word as unknown as Told));
    }
  }

  // --- What goes wrong, and what users do -------------------------------------------------------------------------------

  #meddle(): void {
    const ground = this.#ground;
    const workers = this.#workers;
    const { crash, orchestratorCrash, hide, wishes, cancel, loseGradient, loseSecond, drain, share } = ground.faults;
    for (const worker of workers.all) {
      if (worker.alive && ground.chance(crash)) workers.crash(worker);
      else if (worker.alive && !worker.draining && ground.chance(drain)) workers.drain(worker);
      else if (worker.alive && ground.chance(hide)) workers.hide(worker);
    }
    if (this.#orchestrator.state !== null && ground.chance(orchestratorCrash)) this.#orchestrator.crash();
    if (ground.chance(0.02) && workers.all.length < MOST_WORKERS) {
      const joiner = workers.join();
      if (ground.chance(5 * crash)) ground.at(ground.pick(100), () => workers.crashIfAlive(joiner));
    }
    if (ground.chance(loseGradient)) this.#lose(this.#redis.shards);
    if (ground.chance(loseGradient / 4)) this.#lose(this.#redis.sums);
    if (ground.chance(0.02)) this.#otherRun();
    if (ground.chance(loseSecond)) this.#loseSecond();
    if (ground.chance(share)) this.#otherShare();
    if (wishes && ground.chance(0.03)) {
      this.#outside.wish = { wish: 'pause' };
      this.#outside.resumeLater(ground.pick(2_000));
    }
    if (cancel && ground.chance(0.02)) this.#outside.wish = { wish: 'cancel' };
    ground.at(50, () => this.#meddle());
  }

  #lose(gradients: { clear(): void }): void {
    gradients.clear();
    this.#ground.disturb();
  }

  /** Another run takes a free worker for a while, and the replica on it. */
  #otherRun(): void {
    const redis = this.#redis;
    const worker = this.#workers.all[this.#ground.pick(this.#workers.all.length)]!;
    if (redis.claims.has(worker.id)) return;
    redis.claims.set(worker.id, 'other');
    if (worker.job === null) worker.replica = null;
    redis.releaseLater(worker.id, 3_000);
  }

  /** What is this run's to use becomes some of the workers, or none, for a while. */
  #otherShare(): void {
    const [ground, outside] = [this.#ground, this.#outside];
    const workers = this.#workers.all.filter(() => ground.random() < 0.6).map(({ id }) => id).sort();
    ground.note(`the share is ${workers.join(' ')}`);
    ground.disturb();
    outside.share = { workers, reason: 'another run' };
    ground.at(ground.pick(2_000), () => {
      outside.share = null;
      ground.disturb();
    });
  }

  /** Remembers what Redis holds, and up to a second later puts it back, whoever has seen what came since. */
  #loseSecond(): void {
    const [ground, redis, outside, orchestrator] = [this.#ground, this.#redis, this.#outside, this.#orchestrator];
    const restore = redis.remember();
    const { wish } = outside;
    ground.at(ground.pick(1_000), () => {
      ground.note(`Redis loses what came since ${ground.now.toFixed(0)}`);
      ground.disturb();
      outside.wish = wish;
      restore((token) => this.#workers.isHeld(token));
      // Whoever wished something and does not see it come about wishes again.
      outside.resumeLater(2_000);
      if (ground.random() < 0.5) return orchestrator.state === null ? undefined : orchestrator.crash();
      ground.at(ground.pick(100), () => {
        if (orchestrator.state === null) return;
        orchestrator.hearWorkers();
        redis.lost = false;
        orchestrator.hear({ type: 'restarted' });
      });
    });
  }
}
