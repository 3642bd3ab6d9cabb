/**
 * A world for one run machine: queue, exchange, checkpoints, workers, users and an orchestrator that crashes, all driven by
 * one seed and a clock of its own. Messages are dropped, delayed, doubled and reordered; jobs are taken twice; workers die,
 * return under their old names, are thought dead while they live, join and drain; other runs want them; Redis loses its last
 * second. Used by run-machine.test.ts.
 *
 * A replica's state is a chain, state(t) = mix(state(t-1), data of t), and a report's loss is its state before the step: a step
 * computed on a wrong version shows in the metrics. In some worlds losses above 1.2 to 2 times the median roll the run back: of
 * numbers as random as these that is every few steps.
 */
import assert from 'node:assert/strict';
import { branchOf, dataStep, parseCheckpointName, replicaAt } from '../../config/branches.ts';
import type { Return } from '../../config/branches.ts';
import type { ErrorRecord } from '../../config/errors.ts';
import type { Control } from '../../config/keys.ts';
import { TERMINAL_PHASES } from '../../config/messages.ts';
import type { ExitRecord, Result, Rollback, RunRecord, StepReport } from '../../config/messages.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import type { HistoryLine } from '../../orchestrator/history.ts';
import { countLines, presentBranch } from '../../orchestrator/metrics.ts';
import type { EvalLine, RollbackLine, RunLine } from '../../orchestrator/metrics.ts';
import type { CheckpointPlace, WorkerView } from '../../orchestrator/plan.ts';
import { believe } from '../../orchestrator/recovery.ts';
import { step as applyEvent } from '../../orchestrator/run-machine.ts';
import { initialState, parseJobId, queuedRecord, recordOf } from '../../orchestrator/run-state.ts';
import type { Effect, JobAddress, MachineEvent, NewJob, RunSettings, RunState } from '../../orchestrator/run-state.ts';
import type { Share } from '../../orchestrator/share.ts';
import { Agenda } from './agenda.ts';
import { chooseCurse, chooseFaults, generator } from './faults.ts';
import type { Curse, Faults } from './faults.ts';

const mix = (state: number, step: number): number => (Math.imul(state ^ step, 0x9e3779b1) + step) >>> 0;
const chain: number[] = [1];
/** Version `version` of the branch that these rollbacks led to. */
export const chainAt = (version: number, rollbacks: readonly Return[] = []): number => {
  if (rollbacks.length === 0) {
    for (let step = chain.length; step <= version; step++) chain.push(mix(chain[step - 1]!, step));
    return chain[version]!;
  }
  let state = 1;
  for (let step = 1; step <= version; step++) state = mix(state, dataStep(rollbacks, step));
  return state;
};
const hex = (state: number, salt: number): string => mix(state, salt).toString(16).padStart(8, '0').repeat(4);

interface SimWorker {
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

interface SimJob extends NewJob {
  state: 'waiting' | 'active' | 'completed' | 'failed';
  processedAtMs: number | null;
  attempts: number;
  result: unknown;
  error: ErrorRecord | null;
  readonly progress: unknown[];
  copied: boolean;
  readonly parent: string | null;
  /** Keys of the jobs that it waits for. */
  readonly children: readonly string[];
  /** Of its last taking: whoever took it before can change nothing of it. */
  token: number;
}

const hasEnded = ({ state }: SimJob): boolean => state === 'completed' || state === 'failed';
const keyOf = ({ worker, id }: JobAddress): string => `${worker ?? ''}/${id}`;

interface SimOrigin {
  readonly epoch: number;
  readonly step: number;
  readonly checkpoint: CheckpointPlace | null;
  readonly rollbacks?: readonly Return[];
}

/** The fields of every message; each job has some of them. */
interface AnyMessage extends SimOrigin {
  readonly fromStep: number;
  readonly stepCount: number;
  readonly shard: number;
  readonly shardCount: number;
  readonly directory: string;
  readonly replica?: SimOrigin;
  readonly spec: RunSpec;
}

/** From a generator of its own, so that other worlds stay as they are. */
function chooseSpikes(seed: number): RunSpecInput['lossSpike'] {
  const random = generator(seed ^ 0x5eed);
  const pick = (below: number): number => Math.floor(random() * below);
  return random() < 0.6 ? {} : { factor: 1.2 + 0.8 * random(), window: 1 + pick(6), patience: 1 + pick(3), maxRollbacks: pick(7) };
}

/** What the specs of all worlds have in common; read once, since there are thousands. */
const BASE = parseRunSpec({
  name: 'sim.1',
  model: { vocabSize: 16, hiddenSize: 8, layers: 1, queryHeads: 2, experts: 2, expertsPerToken: 1, ffnSize: 8 },
  data: { train: 'train' },
  steps: 1,
  batch: { shards: 1, sequences: 1, sequenceLength: 4 },
});
export const MAX_KILLS = 3;
const STEP_MS = 20;
/** As long as the lock of a job that its worker left lasts: the run must not wait for it. */
const STALL_MS = 30_000;
/** Undisturbed, with a worker to be had, a run may be without news no longer. */
const RECOVERY_MS = 6_000;
/** Faults end some time before this, so that every run can end; often early, so that what they broke is not hidden by the next. */
const FAULTS_END_MS = 20_000;
const GIVE_UP_MS = 200_000;

export class World {
  readonly #random: () => number;
  #faults: Faults;
  readonly #faultsEndMs: number;
  readonly spec: RunSpec;
  readonly #settings: RunSettings;
  now = 0;
  readonly #agenda = new Agenda();
  readonly workers: SimWorker[] = [];
  #claims = new Map<string, string>();
  /** By queue and id, as BullMQ has them. */
  #jobs = new Map<string, SimJob>();
  #taken = 0;
  /** Those that wait for a worker, in the order in which they came. */
  readonly #waiting = new Set<SimJob>();
  #shards = new Map<string, { digest: string; from: number; worker: string; epoch: number }>();
  /** By branch and step: the state that it leads from, and that it leads to. */
  #sums = new Map<string, { from: number; to: number }>();
  #checkpoints: (CheckpointPlace & { readonly state: number })[] = [];
  readonly #damaged = new Set<string>();
  #control: Control | null = null;
  #record: RunRecord;
  /** What record.json holds; it does not go the way of Redis. */
  #recordFile: RunRecord | null = null;
  #epochOnDisk = -1;
  /** Redis lost its last second, and no orchestrator has heard of it yet. */
  #redisLost = false;
  /** The newest epoch that any control or job ever told, whatever Redis holds now. */
  #epochTold = -1;
  /** What each job that was ever added told its worker, by key. */
  readonly #told = new Map<string, string>();
  /** What metrics.jsonl holds, and what of it counts. */
  readonly #lines: RunLine[] = [];
  readonly metrics: StepReport[] = [];
  rollbacks: readonly Rollback[] = [];
  /** What history.jsonl holds. */
  readonly history: HistoryLine[] = [];
  readonly #evals: EvalLine[] = [];
  #state: RunState | null = null;
  /** What is this run's to use; null: all that there is. */
  #share: Share | null = null;
  #generation = 0;
  /** Each is another object, so that the same wish twice is two wishes. */
  #wish: { readonly wish: 'pause' | 'resume' | 'cancel' } | null = null;
  /** What happened, in words, when that is asked for. */
  readonly log: string[] = [];
  readonly #logs: boolean;
  finished: RunRecord | null = null;
  readonly curse: Curse | null;
  /** Processes that it ended. */
  struck = 0;
  /** When something last went wrong, changed, or was put right. */
  #disturbedMs = 0;
  /** When the orchestrator last heard of work done in the current epoch. */
  #newsMs = 0;

  constructor(seed: number, { faults, log = false }: { faults?: Faults; log?: boolean } = {}) {
    this.#logs = log;
    this.#random = generator(seed);
    this.#faults = faults ?? chooseFaults(this.#random);
    this.#faultsEndMs = 200 + this.#random() ** 2 * FAULTS_END_MS;
    const shards = 1 + this.#pick(4);
    this.spec = {
      ...BASE,
      data: { ...BASE.data, ...(this.#random() < 0.5 ? { validation: 'validation' } : {}) },
      steps: 1 + this.#pick(30),
      batch: { ...BASE.batch, shards },
      parallelism: this.#random() < 0.3 ? 'auto' : 1 + this.#pick(4),
      checkpoint: { ...BASE.checkpoint, every: this.#pick(3) === 0 ? 0 : 1 + this.#pick(10), keep: 1 + this.#pick(3) },
      evaluation: { ...BASE.evaluation, every: this.#pick(8) },
      compareDigestsEvery: this.#pick(6),
      lossSpike: { ...BASE.lossSpike, ...chooseSpikes(seed) },
    };
    this.curse = faults === undefined ? chooseCurse(seed, this.spec.steps) : null;
    if (this.curse !== null) this.#faults = { ...this.#faults, crash: 0 };
    this.#settings = {
      run: 'sim.1', spec: this.spec, checkpointRoot: 'runs/sim.1/checkpoints', logSteps: 1 + this.#pick(12), maxReplans: 10_000,
      maxKills: this.curse === null ? 10_000 : MAX_KILLS, stepsPerJob: 1 + this.#pick(20),
      lookupMs: 300, jobTimeoutMs: 2_000, backoffMs: 20, backoffMaximumMs: 500,
    };
    this.#record = queuedRecord('sim.1', this.spec, 0);
    const count = 1 + this.#pick(4);
    for (let index = 0; index < count; index++) this.#join(`w${index}`);
  }

  #pick(below: number): number {
    return Math.floor(this.#random() * below);
  }

  #chance(probability: number): boolean {
    return this.now < this.#faultsEndMs && this.#random() < probability;
  }

  #at(delayMs: number, act: () => void): void {
    this.#agenda.put(this.now + Math.max(0, delayMs), act);
  }

  /** After a disturbance the run has RECOVERY_MS for its next news. */
  #disturb(): void {
    this.#disturbedMs = this.now;
  }

  #checkRecovery(): void {
    const state = this.#state;
    const ours = ({ id }: SimWorker): boolean => (this.#share?.workers.includes(id) ?? true) && (this.#claims.get(id) ?? 'sim.1') === 'sim.1';
    const usable = this.workers.some((worker) => worker.alive && !worker.hidden && !worker.draining && ours(worker));
    if (state === null || state.phase !== 'running' || !usable) return this.#disturb();
    const sinceMs = this.now - Math.max(this.#disturbedMs, this.#newsMs);
    if (sinceMs >= RECOVERY_MS) assert.fail(`nothing was done for ${sinceMs} ms: ${JSON.stringify({ activity: state.activity, epoch: state.epoch, version: state.version })}`);
  }

  #note(text: string): void {
    if (this.#logs && this.log.length < 5_000) this.log.push(`${this.now.toFixed(0)} ${text}`);
  }

  /** Runs the world until the run is over; throws when it is not, or when a promise is broken. */
  run(): void {
    this.#at(0, () => this.#startOrchestrator());
    this.#at(0, () => this.#meddle());
    while (this.finished === null) {
      const next = this.#agenda.take();
      this.now = next.at;
      if (this.now >= GIVE_UP_MS) assert.fail(`the run does not end: ${JSON.stringify({ ...this.#state, settings: undefined, workers: undefined, shown: undefined })}`);
      next.act();
      this.#work();
    }
  }

  // --- Faults and users -----------------------------------------------------------------------------------------------

  #meddle(): void {
    const { crash, orchestratorCrash, hide, wishes, cancel, loseGradient, loseSecond, drain, share } = this.#faults;
    for (const worker of this.workers) {
      if (worker.alive && this.#chance(crash)) this.#crash(worker);
      else if (worker.alive && !worker.draining && this.#chance(drain)) this.#drain(worker);
      else if (worker.alive && this.#chance(hide)) {
        worker.hidden = true;
        this.#note(`${worker.id} is not seen`);
        this.#disturb();
        this.#at(200 + this.#pick(3_000), () => {
          worker.hidden = false;
          this.#disturb();
        });
      }
    }
    if (this.#state !== null && this.#chance(orchestratorCrash)) this.#crashOrchestrator();
    if (this.#chance(0.02) && this.workers.length < 6) {
      const joiner = this.#join(`w${this.workers.length}`);
      if (this.#chance(5 * crash)) this.#at(this.#pick(100), () => joiner.alive && this.#crash(joiner));
    }
    if (this.#chance(loseGradient)) this.#lose(this.#shards);
    if (this.#chance(loseGradient / 4)) this.#lose(this.#sums);
    if (this.#chance(0.02)) this.#otherRun();
    if (this.#chance(loseSecond)) this.#loseSecond();
    if (this.#chance(share)) this.#otherShare();
    if (wishes && this.#chance(0.03)) {
      this.#wish = { wish: 'pause' };
      this.#at(this.#pick(2_000), () => void (this.#wish = { wish: 'resume' }));
    }
    if (cancel && this.#chance(0.02)) this.#wish = { wish: 'cancel' };
    this.#at(50, () => this.#meddle());
  }

  #lose(gradients: { clear(): void }): void {
    gradients.clear();
    this.#disturb();
  }

  /** Another run takes a free worker for a while, and the replica on it. */
  #otherRun(): void {
    const worker = this.workers[this.#pick(this.workers.length)]!;
    if (this.#claims.has(worker.id)) return;
    this.#claims.set(worker.id, 'other');
    if (worker.job === null) worker.replica = null;
    this.#at(this.#pick(3_000), () => this.#claims.get(worker.id) === 'other' && this.#claims.delete(worker.id));
  }

  /** SIGTERM: takes no more jobs, ends what is at hand, and another process comes in its place. */
  #drain(worker: SimWorker): void {
    this.#note(`${worker.id} drains`);
    this.#disturb();
    worker.draining = true;
    const { incarnation } = worker;
    const leave = (): void => {
      if (!worker.alive || worker.incarnation !== incarnation) return;
      if (worker.job !== null || worker.saving !== null) return this.#at(20, leave);
      worker.alive = false;
      worker.lastExit = null;
      this.#return(worker);
    };
    this.#at(20, leave);
  }

  /** What is this run's to use becomes some of the workers, or none, for a while. */
  #otherShare(): void {
    const workers = this.workers.filter(() => this.#random() < 0.6).map(({ id }) => id).sort();
    this.#note(`the share is ${workers.join(' ')}`);
    this.#disturb();
    this.#share = { workers, reason: 'another run' };
    this.#at(this.#pick(2_000), () => {
      this.#share = null;
      this.#disturb();
    });
  }

  /** Remembers what Redis holds, and up to a second later puts it back, whoever has seen what came since. */
  #loseSecond(): void {
    const jobs = [...this.#jobs].map(([key, job]): [string, SimJob] => [key, { ...job, progress: [...job.progress] }]);
    const [control, record, wish] = [this.#control, this.#record, this.#wish];
    const [claims, shards, sums] = [new Map(this.#claims), new Map(this.#shards), new Map(this.#sums)];
    this.#at(this.#pick(1_000), () => {
      this.#note(`Redis loses what came since ${this.now.toFixed(0)}`);
      this.#disturb();
      this.#control = control;
      this.#record = record;
      this.#wish = wish;
      this.#claims = claims;
      for (const [id, run] of claims) if (run === 'other') this.#at(this.#pick(1_000), () => this.#claims.get(id) === 'other' && this.#claims.delete(id));
      this.#jobs = new Map(jobs);
      this.#waiting.clear();
      for (const job of this.#jobs.values()) {
        if (job.state === 'waiting') this.#waiting.add(job);
        else if (job.state === 'active' && this.workers.every(({ tokens }) => !tokens.has(job.token))) this.#stall(job);
      }
      // The exchange may be another server, which was not killed, or which keeps nothing.
      const fate = this.#pick(3);
      if (fate === 0) [this.#shards, this.#sums] = [shards, sums];
      if (fate === 1) [this.#shards, this.#sums] = [new Map(), new Map()];
      // Whoever wished something and does not see it come about wishes again.
      this.#at(2_000, () => void (this.#wish = { wish: 'resume' }));
      this.#redisLost = true;
      if (this.#random() < 0.5) return this.#state === null ? undefined : this.#crashOrchestrator();
      this.#at(this.#pick(100), () => {
        if (this.#state === null) return;
        this.#hearWorkers();
        this.#redisLost = false;
        this.#hear({ type: 'restarted' });
      });
    });
  }

  #join(id: string): SimWorker {
    const worker: SimWorker = {
      id, incarnation: 0, alive: true, hidden: false, startedAtMs: this.now, replica: null, job: null, saving: null, tokens: new Set(), draining: false,
      copies: this.#random() < 0.8, lastExit: null,
    };
    this.workers.push(worker);
    return worker;
  }

  #crash(worker: SimWorker): void {
    this.#note(`${worker.id} crashes`);
    this.#disturb();
    worker.alive = false;
    const held = [worker.job, worker.saving].flatMap((key) => (key === null ? [] : (this.#jobs.get(key) ?? [])));
    worker.lastExit = { job: held[0]?.id ?? null, code: null, signal: 'SIGKILL', error: null, atMs: this.now };
    worker.job = null;
    worker.saving = null;
    worker.tokens.clear();
    for (const job of held) this.#stall(job);
    this.#return(worker);
  }

  /** The next process under this name. */
  #return(worker: SimWorker): void {
    this.#at(50 + this.#random() ** 3 * 4_000, () => {
      worker.alive = true;
      worker.hidden = false;
      worker.draining = false;
      worker.incarnation++;
      this.#disturb();
      worker.startedAtMs = this.now;
      worker.replica = null;
    });
  }

  #crashOrchestrator(): void {
    this.#note('the orchestrator crashes');
    // A host takes all that runs on it along, and what restarts first finds the others gone, or new.
    if (this.curse === null) for (const worker of this.workers) if (worker.alive && this.#chance(0.2)) this.#at(this.#pick(2) * this.#pick(300), () => worker.alive && this.#crash(worker));
    this.#state = null;
    this.#generation++;
    this.#at(this.#random() ** 3 * 3_000, () => this.#startOrchestrator());
  }

  // --- Workers --------------------------------------------------------------------------------------------------------

  #work(): void {
    if (this.#waiting.size === 0) return;
    for (const worker of this.workers) {
      if (!worker.alive || worker.job !== null || worker.draining) continue;
      for (const job of this.#waiting) {
        if ((job.worker !== null && job.worker !== worker.id) || !this.#ripe(job)) continue;
        if (job.name === 'checkpoint' && worker.saving !== null) continue;
        this.#waiting.delete(job);
        job.state = 'active';
        job.token = ++this.#taken;
        worker.tokens.add(job.token);
        job.processedAtMs = this.now;
        worker.job = keyOf(job);
        this.#begin(worker, job);
        break;
      }
    }
  }

  /** Whether this work ends the worker that begins it, which then is done. */
  #strikes(worker: SimWorker, name: NewJob['name'], step: number, shard = 0): boolean {
    const { curse } = this;
    if (curse === null || curse.name !== name || curse.step !== step || this.struck >= curse.times || (name === 'shard' && curse.shard !== shard)) return false;
    this.struck++;
    this.#crash(worker);
    return true;
  }

  /** Nobody renews the lock of this job: it waits again when that is over. */
  #stall(job: SimJob): void {
    const { token } = job;
    this.#at(STALL_MS, () => {
      const now = this.#jobs.get(keyOf(job));
      if (now?.state === 'active' && now.token === token) this.#wait(now);
    });
  }

  #wait(job: SimJob): void {
    job.state = 'waiting';
    if (this.#jobs.get(keyOf(job)) === job) this.#waiting.add(job);
  }

  /** A reduce job waits for its children. */
  #ripe(job: SimJob): boolean {
    return job.children.every((child) => !this.#jobs.has(child) || this.#jobs.get(child)!.state === 'completed');
  }

  #begin(worker: SimWorker, job: SimJob): void {
    const { incarnation } = worker;
    const key = keyOf(job);
    const { token } = job;
    /** The job as Redis has it, while it is this worker's. */
    const mine = (): SimJob | null => {
      const now = this.#jobs.get(key);
      return now?.state === 'active' && now.token === token ? now : null;
    };
    const present = (act: () => void) => (): void => {
      if (worker.alive && worker.incarnation === incarnation && worker.job === key) act();
    };
    const leave = (): void => {
      if (worker.job === key) worker.job = null;
    };
    const end = (result: unknown): void => {
      leave();
      worker.tokens.delete(token);
      const job = mine();
      if (job === null) return;
      job.state = 'completed';
      job.result = result;
      this.#send({ type: 'completed', id: job.id, result });
    };
    const fail = (error: ErrorRecord): void => {
      leave();
      worker.tokens.delete(token);
      const job = mine();
      if (job === null) return;
      if (error.code === 'GRADIENT_LOST' && ++job.attempts < 3) {
        return this.#wait(job);
      }
      job.state = 'failed';
      job.error = error;
      this.#send({ type: 'failed', id: job.id, error });
    };
    const data = job.data as AnyMessage;
    const origin = data.replica ?? data;
    const cancelled = (): boolean => this.#control === null || this.#control.epoch > origin.epoch;
    const bring = (version: number): ErrorRecord | null => {
      if (cancelled()) return { code: 'CANCELLED', message: 'old epoch', context: {} };
      const branch = (step: number): number => branchOf(origin.rollbacks, step);
      const held = worker.replica;
      let replica = held !== null && held.step <= version && held.branch === branch(held.step) ? held : null;
      if (replica === null || (origin.checkpoint !== null && origin.checkpoint.step > replica.step)) {
        if (origin.checkpoint === null) replica = { step: 0, state: chainAt(0), branch: 0 };
        else if (this.#damaged.has(origin.checkpoint.directory)) return { code: 'CHECKPOINT_INVALID', message: origin.checkpoint.directory, context: {} };
        else {
          const { directory, step } = origin.checkpoint;
          const there = this.#checkpoints.find((each) => each.directory === directory);
          if (there === undefined) return { code: 'CHECKPOINT_INVALID', message: 'gone', context: {} };
          replica = { step, state: there.state, branch: branch(step) };
        }
      }
      for (let step = replica.step + 1; step <= version; step++) {
        const sum = this.#sums.get(`${branch(step)}:${step}`);
        if (sum === undefined) return { code: 'GRADIENT_LOST', message: `sum of ${step}`, context: {} };
        assert.equal(sum.from, replica.state, `the sum of step ${step} belongs to another branch`);
        replica = { step, state: sum.to, branch: branch(step) };
      }
      worker.replica = replica;
      return null;
    };
    const atVersion = (version: number, milliseconds: number, act: (state: number) => void): void => {
      this.#at(1 + this.#pick(5), present(() => {
        const problem = bring(version);
        if (problem !== null) return fail(problem);
        this.#at(milliseconds, present(() => act(worker.replica!.state)));
      }));
    };
    if (job.name !== 'steps' && this.#strikes(worker, job.name, origin.step, data.shard)) return;
    const timings = { computeMs: STEP_MS, exchangeMs: 0.001, waitMs: 0 };
    const after = (state: number, step: number): SimWorker['replica'] => ({ step, state: mix(state, dataStep(origin.rollbacks, step)), branch: branchOf(origin.rollbacks, step) });
    const exchanged = `${branchOf(origin.rollbacks, data.step)}:${data.step}`;
    switch (job.name) {
      case 'steps': {
        const reports: StepReport[] = [];
        const loop = (): void => {
          if (cancelled()) return fail({ code: 'CANCELLED', message: 'old epoch', context: {} });
          if (reports.length === data.stepCount || this.#control!.command !== 'run' || worker.draining) {
            return end({ worker: worker.id, epoch: data.epoch, fromStep: data.fromStep, stepsDone: reports.length, reports, timings });
          }
          if (this.#strikes(worker, 'steps', data.fromStep + reports.length + 1)) return;
          this.#at(STEP_MS / 2 + this.#pick(STEP_MS), present(() => {
            const report = this.#report(data.fromStep + reports.length + 1, worker.replica!.state);
            worker.replica = after(worker.replica!.state, report.step);
            reports.push(report);
            const progress = { worker: worker.id, epoch: data.epoch, report };
            mine()?.progress.push(progress);
            this.#send({ type: 'progress', id: job.id, data: progress });
            loop();
          }));
        };
        return atVersion(data.fromStep, 0, loop);
      }
      case 'shard': {
        const name = `${exchanged}:${data.shard}`;
        const result = (digest: string): unknown => ({
          worker: worker.id, epoch: data.epoch, step: data.step, shard: data.shard, lossSum: 1, auxLossSum: [1], expertLoad: [[1]], targetTokens: 1, digest, key: name, bytes: 10, timings,
        });
        const there = this.#shards.get(name);
        if (there !== undefined) return this.#at(1, present(() => end(result(there.digest))));
        return atVersion(data.step - 1, STEP_MS / 2 + this.#pick(STEP_MS), (state) => {
          const digest = hex(state, data.shard);
          // Between the look at the control and the publication time passes: a late one still publishes the same bits.
          if (cancelled() && this.#random() < 0.7) return fail({ code: 'CANCELLED', message: 'old epoch', context: {} });
          this.#shards.set(name, { digest, from: state, worker: worker.id, epoch: data.epoch });
          end(result(digest));
        });
      }
      case 'reduce':
        return atVersion(data.step - 1, 2 + this.#pick(5), (state) => {
          const shards: Result<'reduce'>['shards'] = [];
          for (let shard = 0; shard < data.shardCount; shard++) {
            const gradient = this.#shards.get(`${exchanged}:${shard}`);
            if (gradient === undefined) return fail({ code: 'GRADIENT_LOST', message: `shard ${shard}`, context: {} });
            assert.equal(gradient.from, state, 'a shard was computed on another version');
            shards.push({ shard, worker: gradient.worker, epoch: gradient.epoch, digest: gradient.digest });
          }
          if (cancelled() && this.#random() < 0.7) return fail({ code: 'CANCELLED', message: 'old epoch', context: {} });
          this.#sums.set(exchanged, { from: state, to: after(state, data.step)!.state });
          for (let shard = 0; shard < data.shardCount; shard++) this.#shards.delete(`${exchanged}:${shard}`);
          worker.replica = after(state, data.step);
          end({ worker: worker.id, epoch: data.epoch, digest: hex(state, 99), key: `sum:${data.step}`, bytes: 10, report: this.#report(data.step, state), timings, shards });
        });
      case 'checkpoint': {
        const there = this.#checkpoints.find((each) => each.directory === data.directory);
        if (there !== undefined && !this.#damaged.has(there.directory) && worker.replica?.step !== data.step) {
          return this.#at(1, present(() => end({ worker: worker.id, epoch: data.epoch, step: data.step, directory: data.directory, bytes: 1, milliseconds: 1 })));
        }
        return atVersion(data.step, 10, (state) => {
          assert.equal(state, chainAt(data.step, data.rollbacks));
          const written = (finish: typeof end): void => {
            if (this.#chance(this.#faults.diskFull)) return fail({ code: 'DISK_FULL', message: 'disk full', context: {} });
            this.#checkpoints = [...this.#checkpoints.filter((each) => each.directory !== data.directory), { directory: data.directory, step: data.step, state }].sort((a, b) => a.step - b.step);
            this.#damaged.delete(data.directory);
            if (this.#chance(this.#faults.damageCheckpoint)) this.#damaged.add(data.directory);
            finish({ worker: worker.id, epoch: data.epoch, step: data.step, directory: data.directory, bytes: 1, milliseconds: 1 });
          };
          const milliseconds = this.#random() ** 2 * this.#faults.slowestDiskMs;
          if (!worker.copies) return this.#at(milliseconds, present(() => written(end)));
          // Copied: it goes on to its end whatever the control says, unless the run is over.
          worker.job = null;
          worker.saving = key;
          const now = mine();
          if (now !== null) now.copied = true;
          this.#send({ type: 'progress', id: job.id, data: { worker: worker.id, epoch: data.epoch, step: data.step, copied: true } });
          this.#at(milliseconds, () => {
            if (!worker.alive || worker.incarnation !== incarnation || worker.saving !== key) return;
            worker.saving = null;
            written(end);
          });
        });
      }
      case 'eval':
        return atVersion(data.replica!.step, 5, (state) => {
          assert.equal(state, chainAt(data.replica!.step, origin.rollbacks));
          end({ worker: worker.id, step: data.replica!.step, loss: 1 + state / 2 ** 32, targetTokens: 1, milliseconds: 1 });
        });
      case 'digest':
        return atVersion(data.step, 5, (state) =>
          end({ worker: worker.id, epoch: data.epoch, step: data.step, digest: hex(state, 7), weightsDigest: data.step === this.spec.steps ? hex(state, 8) : null }),
        );
    }
  }

  #report(step: number, state: number): StepReport {
    return { step, loss: state, auxLoss: [1], expertLoad: [[1]], targetTokens: 4, gradientNorm: 1, clipScale: 1, learningRate: 1, skipped: false, nonFinite: null, milliseconds: STEP_MS };
  }

  // --- The orchestrator -----------------------------------------------------------------------------------------------

  /** A message to the orchestrator: late, twice, or not at all. */
  #send(event: { type: 'progress' | 'completed' | 'failed'; id: string; data?: unknown; result?: unknown; error?: ErrorRecord }): void {
    const copies = this.#chance(this.#faults.drop) ? this.#dropped() : this.#chance(this.#faults.double) ? 2 : 1;
    const { slowest } = this.#faults;
    for (let copy = 0; copy < copies; copy++) {
      const delay = copy === 0 ? this.#random() ** 4 * slowest : this.#random() * 10 * slowest;
      this.#at(delay, () => this.#hear(event as unknown as Heard));
    }
  }

  #dropped(): 0 {
    this.#disturb();
    return 0;
  }

  #views(): WorkerView[] {
    return this.workers
      .filter((worker) => worker.alive && !worker.hidden)
      .map(({ id, incarnation, startedAtMs, replica, job, draining, lastExit }) => ({
        id, incarnation: `${id}-${incarnation}`, precisions: ['fp32'], state: draining ? 'draining' : job === null ? 'idle' : 'busy', startedAtMs, lastExit,
        replica: replica === null ? null : replicaAt('sim.1', replica.step, replica.branch), heldBy: this.#claims.get(id) ?? null,
      }));
  }

  #startOrchestrator(): void {
    this.#note('the orchestrator starts');
    this.#disturb();
    const generation = ++this.#generation;
    const good = this.#present(this.rollbacks).filter((each) => !this.#damaged.has(each.directory) && each.step <= this.metrics.length);
    let logThrough = good.at(-1)?.step ?? 0;
    while (logThrough < this.metrics.length && this.#sums.has(`${branchOf(this.rollbacks, logThrough + 1)}:${logThrough + 1}`)) logThrough++;
    const counted = this.#lines.length === 0 ? null : countLines(this.#lines, presentBranch(this.#lines, this.#evals), this.spec);
    const { record, control, lost } = believe({ record: this.#record, control: this.#control, kept: this.#recordFile, restarted: this.#redisLost });
    if (this.#redisLost) assert(record.epoch > this.#epochTold, 'no worker saw the epoch that follows a loss');
    this.#epochOnDisk = this.#recordFile?.epoch ?? -1;
    if (lost) {
      this.#record = record;
      this.#keepFile(record);
    }
    this.#redisLost = false;
    this.#state = initialState(this.#settings, { record, control, counted, faults: null, checkpoints: good, logThrough });
    const { phase, epoch, step } = this.#state;
    // It may have been paused without a word to anybody.
    if (phase === 'paused') this.#at(this.#pick(2_000), () => void (this.#wish = { wish: 'resume' }));
    this.history.push({ driver: `d${generation}`, type: 'taken', atMs: this.now, epoch, phase, step, checkpoint: good.at(-1)?.step ?? 0, branch: this.rollbacks.length });
    this.#hearWorkers();
    if (control !== null) this.#adopt();
    if (lost && this.#generation === generation) this.#hear({ type: 'fault', what: 'Redis', error: { code: 'REDIS_LOST', message: 'epoch', context: {} } });
    if (this.#generation === generation) this.#hear({ type: 'ready' });
    this.#look(generation, null);
  }

  #adopt(): void {
    const wanted = (job: SimJob): boolean => parseJobId(job.id)!.epoch === this.#state?.epoch || (job.name === 'checkpoint' && !hasEnded(job));
    const jobs = [...this.#jobs.values()].filter(wanted).sort((a, b) => parseJobId(a.id)!.step - parseJobId(b.id)!.step);
    for (const job of jobs) {
      const { queue, worker, id, name, data, processedAtMs, state, progress, result, error } = job;
      if (this.#state === null) return;
      const related = jobs.filter((job) => job.parent === id).map((job): JobAddress => ({ queue: job.queue, worker: job.worker, id: job.id }));
      this.#hear({ type: 'adopt', job: { queue, worker, id }, data, processedAtMs, finished: hasEnded(job), progress: this.#progressOf(job), related });
      if (name === 'steps') for (const each of progress) this.#hear({ type: 'progress', id, data: each });
      if (state === 'completed') this.#hear({ type: 'completed', id, result });
      if (state === 'failed') this.#hear({ type: 'failed', id, error: error! });
    }
  }

  #progressOf({ name, data, copied, progress }: SimJob): unknown {
    const { epoch, step } = data as AnyMessage;
    return name === 'checkpoint' ? (copied ? { worker: 'w', epoch, step, copied } : null) : (progress.at(-1) ?? null);
  }

  /** The orchestrator's timer: workers, wishes, clock. */
  #look(generation: number, before: { readonly wish: string } | null): void {
    if (this.#state === null || generation !== this.#generation) return;
    this.#hearWorkers();
    const wish = this.#wish;
    if (wish !== null && wish !== before) this.#hear({ type: 'wish', wish: wish.wish });
    this.#hear({ type: 'tick' });
    if (this.finished === null) this.#checkRecovery();
    if (this.#state !== null) this.#at(100, () => this.#look(generation, wish));
  }

  #hearWorkers(): void {
    this.#hear({ type: 'workers', workers: this.#views(), ...(this.#share === null ? {} : { share: this.#share }) });
  }

  #hear(event: Heard): void {
    if (this.#state === null || this.finished !== null) return;
    const before = this.#state;
    if ((event.type === 'progress' || event.type === 'completed') && parseJobId(event.id)!.epoch === before.epoch) this.#newsMs = this.now;
    const { state, effects } = applyEvent(before, { ...event, atMs: this.now });
    this.#state = state;
    this.#check(before, state);
    // Between the decision to roll back and what comes of it a crash is tried more often.
    const { orchestratorCrash } = this.#faults;
    const crash = state.rollbacks.length > before.rollbacks.length && orchestratorCrash > 0 ? 0.1 : orchestratorCrash / 20;
    for (const effect of effects) {
      if (this.#chance(crash)) return this.#crashOrchestrator();
      this.#perform(effect);
      if (this.#state === null) return;
    }
    // The record is written now and then; the metrics file and the control always.
    if (this.#random() < 0.5) this.#record = recordOf(state);
  }

  #check(before: RunState, after: RunState): void {
    const back = after.rollbacks.length > before.rollbacks.length ? after.rollbacks.at(-1)!.toStep : before.step;
    assert(after.step >= back, 'the count of steps falls at a rollback only');
    assert(after.epoch >= before.epoch, 'the epoch never falls');
    assert(after.sharedVersion <= after.step, 'what is shared was counted');
    assert(after.activity !== null || after.early.size === 0 || TERMINAL_PHASES.includes(after.phase), 'no report waits for an activity that is over');
    for (const { step, directory } of after.checkpoints) {
      assert(step <= after.step, 'no checkpoint is ahead of the count');
      assert(this.#checkpoints.some((each) => each.step === step && each.directory === directory), 'a checkpoint is listed, but not complete');
    }
    const complete = this.#checkpoints.at(-1)?.step ?? 0;
    assert(after.sharedVersion <= Math.max(before.sharedVersion + 1, complete), 'a version is taken for reachable that is not');
    if (TERMINAL_PHASES.includes(after.phase) || (after.phase === 'paused' && before.phase !== 'paused')) assert(after.saving === null, 'nothing is written any more');
  }

  #perform(effect: Effect): void {
    switch (effect.type) {
      case 'control':
        assert(effect.control.epoch >= this.#epochTold, 'no epoch is told that is below one told before');
        this.#epochTold = effect.control.epoch;
        // The end of a run deletes it.
        if (TERMINAL_PHASES.includes(this.#state!.phase)) this.#control = null;
        else {
          if (effect.control.epoch > this.#epochOnDisk) this.#keepRecord();
          this.#control = effect.control;
        }
        return;
      case 'add':
        return this.#add(effect.job, null);
      case 'flow':
        this.#add(effect.parent, null, effect.children.map(keyOf));
        for (const child of effect.children) this.#add(child, effect.parent.id);
        return;
      case 'remove':
        for (const each of effect.jobs) {
          const job = this.#jobs.get(keyOf(each));
          if (job === undefined || job.state === 'active') continue;
          this.#jobs.delete(keyOf(each));
          this.#waiting.delete(job);
        }
        return;
      case 'lookup':
        for (const job of effect.jobs) this.#at(1, () => this.#lookUp(job));
        return;
      case 'recount':
        assert.equal(effect.report.loss, this.metrics[effect.report.step - 1]!.loss, 'what is computed again is the same');
        return;
      case 'metrics':
        if (effect.line.type === 'eval') this.#evals.push(effect.line);
        else if (effect.line.type === 'rollback') this.#rollBack(effect.line);
        else {
          const { report } = effect.line;
          assert.equal(report.step, this.metrics.length + 1, 'each step is counted once, in order');
          assert.equal(report.loss, chainAt(report.step - 1, this.rollbacks), 'a step was computed on another version');
          this.metrics.push(report);
          this.#lines.push({ ...report, tokensPerSecond: 1, epoch: effect.line.epoch, atMs: effect.line.atMs });
        }
        return;
      case 'history':
        this.history.push({ driver: `d${this.#generation}`, ...effect.event });
        return;
      case 'claim':
        for (const id of effect.workers) if (!this.#claims.has(id)) this.#claims.set(id, 'sim.1');
        this.#at(1 + this.#pick(5), () => this.#hear({ type: 'claimed', workers: this.#views() }));
        return;
      case 'release':
        for (const id of effect.workers) if (this.#claims.get(id) === 'sim.1') this.#claims.delete(id);
        return;
      case 'trim':
        for (let step = effect.from + 1; step <= effect.through; step++) this.#sums.delete(`${branchOf(effect.rollbacks, step)}:${step}`);
        return;
      case 'deleteCheckpoints':
        this.#checkpoints = this.#checkpoints.filter((each) => !effect.directories.includes(each.directory));
        return;
      case 'findCheckpoints':
        this.#at(5, () => {
          const bad = this.#present(this.rollbacks).filter((each) => this.#damaged.has(each.directory));
          this.#checkpoints = this.#checkpoints.filter((each) => bad.every(({ directory }) => directory !== each.directory));
          const named = bad.map(({ directory }) => ({ directory, error: { code: 'CHECKPOINT_INVALID', message: directory, context: {} } as const }));
          this.#hear({ type: 'checkpoints', good: this.#present(this.rollbacks), bad: named });
        });
        return;
      case 'publish':
        if (effect.event.type === 'fault') {
          this.#note(`fault ${effect.event.what}: ${effect.event.error.code} ${effect.event.error.message}`);
          assert.notEqual(effect.event.error.code, 'REPLICA_DIVERGED', effect.event.error.message);
        } else if (effect.event.type === 'checkpoint') {
          this.#keepFile(recordOf(this.#state!));
        } else if (effect.event.type === 'phase') {
          this.#note(`phase ${effect.event.phase}`);
          if (!TERMINAL_PHASES.includes(effect.event.phase)) this.#keepRecord();
          // Somebody makes room, and sees to it that the run goes on.
          if (effect.event.phase === 'paused') this.#at(this.#pick(2_000), () => void (this.#wish = { wish: 'resume' }));
        }
        return;
      case 'finish':
        this.finished = recordOf(this.#state!);
    }
  }

  /** As the driver has it: in Redis and on the disk, if that has room. */
  #keepRecord(): void {
    this.#record = recordOf(this.#state!);
    this.#keepFile(this.#record);
  }

  /** A disk that stays full through one loss of Redis after another is beyond what recovery reckons with. */
  #keepFile(record: RunRecord): void {
    if (record.epoch - this.#epochOnDisk < 50 && this.#chance(this.#faults.diskFull)) return;
    this.#recordFile = record;
    this.#epochOnDisk = record.epoch;
  }

  /** The checkpoints that the names of these rollbacks' branch lead to. */
  #present(rollbacks: readonly Return[]): CheckpointPlace[] {
    const named = this.#checkpoints.map(({ directory }) => ({ directory, ...parseCheckpointName(directory.split('/').at(-1)!)! }));
    return named.filter(({ step, branch }) => branchOf(rollbacks, step) === branch).map(({ directory, step }) => ({ directory, step }));
  }

  #rollBack(line: RollbackLine): void {
    this.#note(`rollback ${line.branch} from ${line.fromStep} to ${line.toStep}`);
    assert.equal(line.fromStep, this.metrics.length, 'a rollback comes from the step that was counted last');
    assert.equal(line.branch, this.rollbacks.length + 1, 'each rollback is written down once');
    this.metrics.length = line.toStep;
    this.#lines.push(line);
    const { type: _type, ...rollback } = line;
    this.rollbacks = [...this.rollbacks, rollback];
  }

  #add(job: NewJob, parent: string | null, children: readonly string[] = []): void {
    if (this.#logs) this.#note(`add ${job.id} to ${job.worker ?? 'all'}`);
    assert.equal(parseJobId(job.id)!.epoch, this.#epochTold, 'a job is of the newest epoch that was told');
    // What is added between a loss and the news of it is void by the epoch that follows.
    if (!this.#redisLost) {
      assert.deepEqual({ ...this.#control }, { epoch: this.#epochTold, command: 'run' }, 'no job is added under a control that stops it');
      if (job.worker !== null) assert.equal(this.#claims.get(job.worker), 'sim.1', 'a job goes to a worker that this run holds');
    }
    const { checkpoint: _checkpoint, replica: _replica, spec: _spec, ...told } = job.data as AnyMessage;
    const text = JSON.stringify(told);
    assert.equal(this.#told.get(keyOf(job)) ?? text, text, 'one name of a job says one thing, whatever Redis forgot of it');
    this.#told.set(keyOf(job), text);
    if (this.#jobs.has(keyOf(job))) return;
    const added: SimJob = { ...job, state: 'waiting', processedAtMs: null, attempts: 0, result: null, error: null, progress: [], copied: false, parent, children, token: 0 };
    this.#jobs.set(keyOf(job), added);
    this.#wait(added);
  }

  #lookUp(address: JobAddress): void {
    const { id } = address;
    const job = this.#jobs.get(keyOf(address));
    if (job === undefined) this.#hear({ type: 'missing', id });
    else if (job.state === 'completed') this.#hear({ type: 'completed', id, result: job.result });
    else if (job.state === 'failed') this.#hear({ type: 'failed', id, error: job.error! });
  }
}

type Heard = MachineEvent extends infer Event ? (Event extends MachineEvent ? Omit<Event, 'atMs'> : never) : never;
