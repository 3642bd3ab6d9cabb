/**
 * The orchestrator of a simulated world: the run machine under test, driven as driver.ts drives it. It takes the run up from what Redis
 * and the disk hold, hears what reaches it, does what the machine asks, and crashes in between; and holds every state and every
 * effect to what was promised. What goes wrong around it is world.ts's, its only caller.
 */
import assert from 'node:assert/strict';
import { TERMINAL_PHASES } from '../../config/messages.ts';
import type { Rollback, RunRecord, StepReport } from '../../config/messages.ts';
import type { HistoryLine } from '../../orchestrator/history.ts';
import { countLines, presentBranch } from '../../orchestrator/metrics.ts';
import type { EvalLine, RollbackLine, RunLine } from '../../orchestrator/metrics.ts';
import { believe } from '../../orchestrator/recovery.ts';
import { step as applyEvent } from '../../orchestrator/run-machine.ts';
import { initialState, parseJobId, recordOf } from '../../orchestrator/run-state.ts';
import type { Effect, JobAddress, NewJob, RunSettings, RunState } from '../../orchestrator/run-state.ts';
import type { Told } from '../support/machine-table.ts';
import { chainAt } from './chain.ts';
import type { Ground } from './ground.ts';
import type { Outside } from './outside.ts';
import { RUN, hasEnded, keyOf, sumKey } from './storage.ts';
import type { AnyMessage, SimDisk, SimJob, SimRedis } from './storage.ts';
import type { SimWorkers } from './workers.ts';

/** Undisturbed, with a worker to be had, a run may be without news no longer. */
const RECOVERY_MS = 6_000;

export interface OrchestratorOptions {
  readonly ground: Ground;
  readonly redis: SimRedis;
  readonly disk: SimDisk;
  readonly workers: SimWorkers;
  readonly outside: Outside;
  readonly settings: RunSettings;
}

export class SimOrchestrator {
  readonly #ground: Ground;
  readonly #redis: SimRedis;
  readonly #disk: SimDisk;
  readonly #workers: SimWorkers;
  readonly #outside: Outside;
  readonly #settings: RunSettings;
  /** Null between a crash and the next start. */
  #state: RunState | null = null;
  /** Of the process: what belongs to one before changes nothing. */
  #generation = 0;
  /** What record.json holds; it does not go the way of Redis. */
  #recordFile: RunRecord | null = null;
  #epochOnDisk = -1;
  /** The newest epoch that any control or job ever told, whatever Redis holds now. */
  #epochTold = -1;
  /** What each job that was ever added told its worker, by key. */
  readonly #told = new Map<string, string>();
  /** What metrics.jsonl holds, and what of it counts. */
  readonly #lines: RunLine[] = [];
  readonly #evals: EvalLine[] = [];
  readonly metrics: StepReport[] = [];
  rollbacks: readonly Rollback[] = [];
  /** What history.jsonl holds. */
  readonly history: HistoryLine[] = [];
  finished: RunRecord | null = null;
  /** When it last heard of work done in the current epoch. */
  #newsMs = 0;

  constructor({ ground, redis, disk, workers, outside, settings }: OrchestratorOptions) {
    this.#ground = ground;
    this.#redis = redis;
    this.#disk = disk;
    this.#workers = workers;
    this.#outside = outside;
    this.#settings = settings;
  }

  get state(): RunState | null {
    return this.#state;
  }

  // --- Its life ---------------------------------------------------------------------------------------------------------

  /** A process begins, and takes the run up. */
  start(): void {
    this.#ground.note('the orchestrator starts');
    this.#ground.disturb();
    const generation = ++this.#generation;
    const good = this.#disk.present(this.rollbacks).filter((each) => !this.#disk.damaged.has(each.directory) && each.step <= this.metrics.length);
    let logThrough = good.at(-1)?.step ?? 0;
    while (logThrough < this.metrics.length && this.#redis.sums.has(sumKey(this.rollbacks, logThrough + 1))) logThrough++;
    const counted = this.#lines.length === 0 ? null : countLines(this.#lines, presentBranch(this.#lines, this.#evals), this.#settings.spec);
    const { record, control, lost } = believe({ record: this.#redis.record, control: this.#redis.control, kept: this.#recordFile, restarted: this.#redis.lost });
    if (this.#redis.lost) assert(record.epoch > this.#epochTold, 'no worker saw the epoch that follows a loss');
    this.#epochOnDisk = this.#recordFile?.epoch ?? -1;
    if (lost) {
      this.#redis.record = record;
      this.#keepFile(record);
    }
    this.#redis.lost = false;
    this.#state = initialState(this.#settings, { record, control, counted, faults: null, checkpoints: good, logThrough });
    const { phase, epoch, step } = this.#state;
    // It may have been paused without a word to anybody.
    if (phase === 'paused') this.#outside.resumeLater(this.#ground.pick(2_000));
    this.history.push({ driver: `d${generation}`, type: 'taken', atMs: this.#ground.now, epoch, phase, step, checkpoint: good.at(-1)?.step ?? 0, branch: this.rollbacks.length });
    this.hearWorkers();
    if (control !== null) this.#adopt();
    if (lost && this.#generation === generation) this.hear({ type: 'fault', what: 'Redis', error: { code: 'REDIS_LOST', message: 'epoch', context: {} } });
    if (this.#generation === generation) this.hear({ type: 'ready' });
    this.#look(generation, null);
  }

  #adopt(): void {
    const wanted = (job: SimJob): boolean => parseJobId(job.id)!.epoch === this.#state?.epoch || (job.name === 'checkpoint' && !hasEnded(job));
    const jobs = [...this.#redis.jobs.values()].filter(wanted).sort((a, b) => parseJobId(a.id)!.step - parseJobId(b.id)!.step);
    for (const job of jobs) {
      const { queue, worker, id, name, data, processedAtMs, state, progress, result, error } = job;
      if (this.#state === null) return;
      const related = jobs.filter((job) => job.parent === id).map((job): JobAddress => ({ queue: job.queue, worker: job.worker, id: job.id }));
      this.hear({ type: 'adopt', job: { queue, worker, id }, data, processedAtMs, finished: hasEnded(job), progress: this.#progressOf(job), related });
      if (name === 'steps') for (const each of progress) this.hear({ type: 'progress', id, data: each });
      if (state === 'completed') this.hear({ type: 'completed', id, result });
      if (state === 'failed') this.hear({ type: 'failed', id, error: error! });
    }
  }

  #progressOf({ name, data, copied, progress }: SimJob): unknown {
    const { epoch, step } = data as AnyMessage;
    return name === 'checkpoint' ? (copied ? { worker: 'w', epoch, step, copied } : null) : (progress.at(-1) ?? null);
  }

  /** The process ends, with what it was at; another begins some time later. */
  crash(): void {
    this.#ground.note('the orchestrator crashes');
    // A host takes all that runs on it along, and what restarts first finds the others gone, or new.
    for (const worker of this.#workers.curse === null ? this.#workers.all : []) {
      if (worker.alive && this.#ground.chance(0.2)) this.#ground.at(this.#ground.pick(2) * this.#ground.pick(300), () => this.#workers.crashIfAlive(worker));
    }
    this.#state = null;
    this.#generation++;
    this.#ground.at(this.#ground.random() ** 3 * 3_000, () => this.start());
  }

  // --- What it hears ----------------------------------------------------------------------------------------------------

  /** The orchestrator's timer: workers, wishes, clock. */
  #look(generation: number, before: { readonly wish: string } | null): void {
    if (this.#state === null || generation !== this.#generation) return;
    this.hearWorkers();
    const wish = this.#outside.wish;
    if (wish !== null && wish !== before) this.hear({ type: 'wish', wish: wish.wish });
    this.hear({ type: 'tick' });
    if (this.finished === null) this.#checkRecovery();
    if (this.#state !== null) this.#ground.at(100, () => this.#look(generation, wish));
  }

  hearWorkers(): void {
    this.hear({ type: 'workers', workers: this.#workers.views(), ...(this.#outside.share === null ? {} : { share: this.#outside.share }) });
  }

  /** Nobody hears it while no process runs, or after the end of the run. */
  hear(event: Told): void {
    if (this.#state === null || this.finished !== null) return;
    const before = this.#state;
    if ((event.type === 'progress' || event.type === 'completed') && parseJobId(event.id)!.epoch === before.epoch) this.#newsMs = this.#ground.now;
    const { state, effects } = applyEvent(before, { ...event, atMs: this.#ground.now });
    this.#state = state;
    this.#check(before, state);
    // Between the decision to roll back and what comes of it a crash is tried more often.
    const { orchestratorCrash } = this.#ground.faults;
    const crash = state.rollbacks.length > before.rollbacks.length && orchestratorCrash > 0 ? 0.1 : orchestratorCrash / 20;
    for (const effect of effects) {
      if (this.#ground.chance(crash)) return this.crash();
      this.#perform(effect);
      if (this.#state === null) return;
    }
    // The record is written now and then; the metrics file and the control always.
    if (this.#ground.random() < 0.5) this.#redis.record = recordOf(state);
  }

  #lookUp(address: JobAddress): void {
    const { id } = address;
    const job = this.#redis.jobs.get(keyOf(address));
    if (job === undefined) this.hear({ type: 'missing', id });
    else if (job.state === 'completed') this.hear({ type: 'completed', id, result: job.result });
    else if (job.state === 'failed') this.hear({ type: 'failed', id, error: job.error! });
  }

  /** What holds between any two states. */
  #check(before: RunState, after: RunState): void {
    const back = after.rollbacks.length > before.rollbacks.length ? after.rollbacks.at(-1)!.toStep : before.step;
    assert(after.step >= back, 'the count of steps falls at a rollback only');
    assert(after.epoch >= before.epoch, 'the epoch never falls');
    assert(after.sharedVersion <= after.step, 'what is shared was counted');
    assert(after.activity !== null || after.early.size === 0 || TERMINAL_PHASES.includes(after.phase), 'no report waits for an activity that is over');
    for (const { step, directory } of after.checkpoints) {
      assert(step <= after.step, 'no checkpoint is ahead of the count');
      assert(this.#disk.checkpoints.some((each) => each.step === step && each.directory === directory), 'a checkpoint is listed, but not complete');
    }
    const complete = this.#disk.checkpoints.at(-1)?.step ?? 0;
    assert(after.sharedVersion <= Math.max(before.sharedVersion + 1, complete), 'a version is taken for reachable that is not');
    if (TERMINAL_PHASES.includes(after.phase) || (after.phase === 'paused' && before.phase !== 'paused')) assert(after.saving === null, 'nothing is written any more');
  }

  /** After a disturbance the run has RECOVERY_MS for its next news. */
  #checkRecovery(): void {
    const state = this.#state;
    const ours = (id: string): boolean => (this.#outside.share?.workers.includes(id) ?? true) && (this.#redis.claims.get(id) ?? RUN) === RUN;
    const usable = this.#workers.all.some((worker) => worker.alive && !worker.hidden && !worker.draining && ours(worker.id));
    if (state === null || state.phase !== 'running' || !usable) return this.#ground.disturb();
    const sinceMs = this.#ground.now - Math.max(this.#ground.disturbedMs, this.#newsMs);
    if (sinceMs >= RECOVERY_MS) assert.fail(`nothing was done for ${sinceMs} ms: ${JSON.stringify({ activity: state.activity, epoch: state.epoch, version: state.version })}`);
  }

  // --- What it does -----------------------------------------------------------------------------------------------------

  #perform(effect: Effect): void {
    switch (effect.type) {
      case 'control':
        assert(effect.control.epoch >= this.#epochTold, 'no epoch is told that is below one told before');
        this.#epochTold = effect.control.epoch;
        // The end of a run deletes it.
        if (TERMINAL_PHASES.includes(this.#state!.phase)) this.#redis.control = null;
        else {
          if (effect.control.epoch > this.#epochOnDisk) this.#keepRecord();
          this.#redis.control = effect.control;
        }
        return;
      case 'add':
        return this.#add(effect.job, null);
      case 'flow':
        this.#add(effect.parent, null, effect.children.map(keyOf));
        for (const child of effect.children) this.#add(child, effect.parent.id);
        return;
      case 'remove':
        this.#redis.remove(effect.jobs);
        return;
      case 'lookup':
        for (const job of effect.jobs) this.#ground.at(1, () => this.#lookUp(job));
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
        for (const id of effect.workers) if (!this.#redis.claims.has(id)) this.#redis.claims.set(id, RUN);
        this.#ground.at(1 + this.#ground.pick(5), () => this.hear({ type: 'claimed', workers: this.#workers.views() }));
        return;
      case 'release':
        for (const id of effect.workers) if (this.#redis.claims.get(id) === RUN) this.#redis.claims.delete(id);
        return;
      case 'trim':
        for (let step = effect.from + 1; step <= effect.through; step++) this.#redis.sums.delete(sumKey(effect.rollbacks, step));
        return;
      case 'deleteCheckpoints':
        this.#disk.delete(effect.directories);
        return;
      case 'findCheckpoints':
        this.#ground.at(5, () => {
          const bad = this.#disk.present(this.rollbacks).filter((each) => this.#disk.damaged.has(each.directory));
          this.#disk.delete(bad.map(({ directory }) => directory));
          const named = bad.map(({ directory }) => ({ directory, error: { code: 'CHECKPOINT_INVALID', message: directory, context: {} } as const }));
          this.hear({ type: 'checkpoints', good: this.#disk.present(this.rollbacks), bad: named });
        });
        return;
      case 'publish':
        if (effect.event.type === 'fault') {
          this.#ground.note(`fault ${effect.event.what}: ${effect.event.error.code} ${effect.event.error.message}`);
          assert.notEqual(effect.event.error.code, 'REPLICA_DIVERGED', effect.event.error.message);
        } else if (effect.event.type === 'checkpoint') {
          this.#keepFile(recordOf(this.#state!));
        } else if (effect.event.type === 'phase') {
          this.#ground.note(`phase ${effect.event.phase}`);
          if (!TERMINAL_PHASES.includes(effect.event.phase)) this.#keepRecord();
          // Somebody makes room, and sees to it that the run goes on.
          if (effect.event.phase === 'paused') this.#outside.resumeLater(this.#ground.pick(2_000));
        }
        return;
      case 'finish':
        this.finished = recordOf(this.#state!);
    }
  }

  #add(job: NewJob, parent: string | null, children: readonly string[] = []): void {
    if (this.#ground.logs) this.#ground.note(`add ${job.id} to ${job.worker ?? 'all'}`);
    assert.equal(parseJobId(job.id)!.epoch, this.#epochTold, 'a job is of the newest epoch that was told');
    // What is added between a loss and the news of it is void by the epoch that follows.
    if (!this.#redis.lost) {
      assert.deepEqual({ ...this.#redis.control }, { epoch: this.#epochTold, command: 'run' }, 'no job is added under a control that stops it');
      if (job.worker !== null) assert.equal(this.#redis.claims.get(job.worker), RUN, 'a job goes to a worker that this run holds');
    }
    const { checkpoint: _checkpoint, replica: _replica, spec: _spec, ...told } = job.data as AnyMessage;
    const text = JSON.stringify(told);
    assert.equal(this.#told.get(keyOf(job)) ?? text, text, 'one name of a job says one thing, whatever Redis forgot of it');
    this.#told.set(keyOf(job), text);
    this.#redis.add(job, parent, children);
  }

  #rollBack(line: RollbackLine): void {
    this.#ground.note(`rollback ${line.branch} from ${line.fromStep} to ${line.toStep}`);
    assert.equal(line.fromStep, this.metrics.length, 'a rollback comes from the step that was counted last');
    assert.equal(line.branch, this.rollbacks.length + 1, 'each rollback is written down once');
    this.metrics.length = line.toStep;
    this.#lines.push(line);
    const { type: _type, ...rollback } = line;
    this.rollbacks = [...this.rollbacks, rollback];
  }

  /** As the driver has it: in Redis and on the disk, if that has room. */
  #keepRecord(): void {
    this.#redis.record = recordOf(this.#state!);
    this.#keepFile(this.#redis.record);
  }

  /** A disk that stays full through one loss of Redis after another is beyond what recovery reckons with. */
  #keepFile(record: RunRecord): void {
    if (record.epoch - this.#epochOnDisk < 50 && this.#ground.chance(this.#ground.faults.diskFull)) return;
    this.#recordFile = record;
    this.#epochOnDisk = record.epoch;
  }
}
