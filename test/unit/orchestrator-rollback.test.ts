/**
 * A run that is rolled back, by hand: what is done about it and in which order, and that an orchestrator which dies anywhere between the
 * decision and the first job of the new branch leaves the next one nothing to decide otherwise.
 */
import { expect } from 'chai';
import type { Control } from '../../config/keys.ts';
import type { RunRecord, StepReport } from '../../config/messages.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { countLines, isRollback, presentBranch } from '../../orchestrator/metrics.ts';
import type { RunLine } from '../../orchestrator/metrics.ts';
import type { CheckpointPlace, WorkerView } from '../../orchestrator/plan.ts';
import { isAbandoned } from '../../orchestrator/rollback.ts';
import { step } from '../../orchestrator/run-machine.ts';
import { initialState, parseJobId, queuedRecord, recordOf } from '../../orchestrator/run-state.ts';
import type { Effect, NewJob, RunState } from '../../orchestrator/run-state.ts';
import { SETTINGS, TIMINGS, hex, report, worker } from '../support/machine-table.ts';
import type { Told } from '../support/machine-table.ts';

/** The loss of step 6 is above twice the median of the two before; with every 4 the run goes back to version 4. */
const LOSSES = [1, 1, 1, 1, 1, 9, 9, 9];
const lossReport = (at: number, loss: number): StepReport => report(at, { loss });

/** What outlives an orchestrator: the metrics, the checkpoints, and in Redis control, record and jobs. */
class Ground {
  readonly lines: RunLine[] = [];
  checkpoints: CheckpointPlace[] = [];
  control: Control | null = null;
  record: RunRecord;
  readonly jobs: { readonly job: NewJob; result: unknown }[] = [];

  constructor(record: RunRecord) {
    this.record = record;
  }

  take(effect: Effect): void {
    if (effect.type === 'control') this.control = effect.control;
    else if (effect.type === 'add') this.jobs.push({ job: effect.job, result: null });
    else if (effect.type === 'flow') for (const job of [effect.parent, ...effect.children]) this.jobs.push({ job, result: null });
    else if (effect.type === 'deleteCheckpoints') this.checkpoints = this.checkpoints.filter(({ directory }) => !effect.directories.includes(directory));
    else if (effect.type === 'metrics' && effect.line.type === 'step') this.lines.push({ ...effect.line.report, tokensPerSecond: 1, epoch: effect.line.epoch, atMs: effect.line.atMs });
    else if (effect.type === 'metrics' && effect.line.type === 'rollback') this.lines.push(effect.line);
  }
}

/** An orchestrator's machine over a ground. */
class Driver {
  readonly ground: Ground;
  state: RunState;
  workers: WorkerView[];
  /** All it asked for; of the last event those that were not taken, if it died there. */
  readonly effects: Effect[] = [];
  /** Effects that it lives for. */
  life = Infinity;

  constructor(ground: Ground, spec: Partial<RunSpecInput> = {}, ids = ['a'], replica: WorkerView['replica'] = null) {
    this.ground = ground;
    const checked = parseRunSpec({
      name: 'r', model: 'tiny', data: { train: 't' }, steps: 12, batch: { shards: 2, sequences: 1, sequenceLength: 4 }, parallelism: ids.length,
      checkpoint: { every: 4, keep: 1 }, lossSpike: { factor: 2, window: 2, patience: 1, maxRollbacks: 2 }, ...spec,
    });
    const taken = ground.lines.length > 0;
    this.workers = ids.map((id) => worker(id, { replica, heldBy: taken ? 'r' : null }));
    this.state = initialState(
      { spec: checked, ...SETTINGS },
      {
        record: ground.record, control: ground.control, faults: null, checkpoints: ground.checkpoints, logThrough: ground.checkpoints.at(-1)?.step ?? 0,
        counted: taken ? countLines(ground.lines, presentBranch(ground.lines, []), checked) : null,
      },
    );
  }

  static begin(spec: Partial<RunSpecInput> = {}, ids = ['a']): Driver {
    const checked = parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't' }, steps: 12, batch: { shards: 2, sequences: 1, sequenceLength: 4 } });
    const driver = new Driver(new Ground(queuedRecord('r', checked, 0)), spec, ids);
    return driver.tell({ type: 'workers', workers: driver.workers }).tell({ type: 'ready' });
  }

  /** As driver.ts takes a run up. */
  recover(): this {
    this.tell({ type: 'workers', workers: this.workers });
    const { control, jobs } = this.ground;
    if (control !== null) {
      for (const { job, result } of jobs.filter(({ job: { id } }) => parseJobId(id)!.epoch === this.state.epoch)) {
        this.tell({ type: 'adopt', job, data: job.data, processedAtMs: 0, finished: result !== null, progress: null, related: [] });
        if (result !== null) this.tell({ type: 'completed', id: job.id, result });
      }
    }
    return this.tell({ type: 'ready' });
  }

  tell(event: Told): this {
    const next = step(this.state, { ...event, atMs: 1 });
    this.state = next.state;
    for (const effect of next.effects) {
      this.effects.push(effect);
      if (this.life-- <= 0) continue;
      this.ground.take(effect);
      if (effect.type !== 'claim') continue;
      this.workers = this.workers.map((each) => (effect.workers.includes(each.id) ? { ...each, heldBy: 'r' } : each));
      this.tell({ type: 'claimed', workers: this.workers });
    }
    return this;
  }

  last(name: NewJob['name']): NewJob {
    return this.ground.jobs.findLast(({ job }) => job.name === name)!.job;
  }

  complete(job: NewJob, result: object): this {
    this.ground.jobs.find((each) => each.job === job)!.result = result;
    return this.tell({ type: 'completed', id: job.id, result });
  }

  steps(losses: readonly number[]): this {
    const job = this.last('steps');
    const { epoch, fromStep } = job.data as { epoch: number; fromStep: number };
    const reports = losses.map((loss, index) => lossReport(fromStep + 1 + index, loss));
    return this.complete(job, { worker: 'a', epoch, fromStep, stepsDone: reports.length, reports, timings: TIMINGS });
  }

  saved(): this {
    const job = this.last('checkpoint');
    const { epoch, step: at, directory } = job.data as { epoch: number; step: number; directory: string };
    this.ground.checkpoints = [...this.ground.checkpoints, { directory, step: at }];
    return this.complete(job, { worker: 'a', epoch, step: at, directory, bytes: 1, milliseconds: 1 });
  }

  copied(): this {
    const job = this.last('checkpoint');
    const { epoch, step: at } = job.data as { epoch: number; step: number };
    return this.tell({ type: 'progress', id: job.id, data: { worker: 'a', epoch, step: at, copied: true } });
  }

  get codes(): string[] {
    return this.state.shown.faults.map(({ error }) => error.code);
  }
}

/** Up to the job in which the spike is. */
const beforeSpike = (spec: Partial<RunSpecInput> = {}): Driver => Driver.begin(spec).steps(LOSSES.slice(0, 4)).saved();
const linesOf = ({ lines }: Ground): (number | string)[] => lines.map((line) => (isRollback(line) ? `${line.fromStep} to ${line.toStep}` : line.step));

function expectNewBranch(driver: Driver): void {
  expect(linesOf(driver.ground)).to.deep.equal([1, 2, 3, 4, 5, 6, '6 to 4']);
  expect(driver.state).to.include({ phase: 'running', step: 4, version: 4 });
  const job = driver.last('steps');
  expect(job.data).to.deep.include({ fromStep: 4, stepCount: 4, checkpoint: { directory: 'c/step-4', step: 4 }, rollbacks: [{ fromStep: 6, toStep: 4 }] });
  // Workers that still compute on the branch before are told, before there is a job of the new one.
  expect(driver.ground.control).to.deep.equal({ epoch: parseJobId(job.id)!.epoch, command: 'run' });
  expect(parseJobId(job.id)!.epoch).to.be.at.least(1);
  expect(recordOf(driver.state).rollbacks.map(({ branch, fromStep, toStep, loss, threshold }) => ({ branch, fromStep, toStep, loss, threshold }))).to.deep.equal([
    { branch: 1, fromStep: 6, toStep: 4, loss: 9, threshold: 2 },
  ]);
}

describe('run machine: a rollback', () => {
  it('is written down first, then told to the workers; what the branch before left does not count', () => {
    const driver = beforeSpike();
    const from = driver.effects.length;
    driver.steps(LOSSES.slice(4));
    expectNewBranch(driver);
    const kinds = driver.effects.slice(from).map((effect) => (effect.type === 'metrics' ? effect.line.type : effect.type));
    expect(kinds.filter((kind) => ['step', 'rollback', 'control', 'add'].includes(kind))).to.deep.equal(['step', 'step', 'rollback', 'control', 'add']);
    expect(driver.codes).to.deep.equal(['LOSS_SPIKE']);
    expect(driver.effects).to.deep.include({ type: 'trim', from: 4, through: 6 });
    // The new branch counts, and its checkpoint has a name of its own.
    driver.steps([1, 1, 1, 1]);
    expect(linesOf(driver.ground).slice(7)).to.deep.equal([5, 6, 7, 8]);
    expect(driver.last('checkpoint').data).to.include({ step: 8, directory: 'c/step-8-branch-1' });
  });

  it('comes to the same wherever the orchestrator dies', () => {
    const whole = beforeSpike();
    const from = whole.effects.length;
    whole.steps(LOSSES.slice(4));
    const count = whole.effects.length - from;
    expect(count).to.be.above(10);
    for (let life = 0; life <= count; life++) {
      for (const recorded of [false, true]) {
        const first = beforeSpike();
        first.ground.record = recordOf(first.state);
        first.life = life;
        first.steps(LOSSES.slice(4));
        if (recorded) first.ground.record = recordOf(first.state);
        // The next one dies too, as soon as it has read what there is.
        const second = new Driver(first.ground, {}, ['a'], { run: 'r', step: 8 });
        if (recorded) first.ground.record = recordOf(second.state);
        const third = new Driver(first.ground, {}, ['a'], { run: 'r', step: 8 }).recover();
        // A record that got ahead of the metrics hides the job's result: its steps are computed again.
        if (linesOf(third.ground).length < 6) third.steps(LOSSES.slice(4));
        expectNewBranch(third);
        expect(third.state.activity, `after ${life} of ${count} effects`).to.include({ kind: 'steps', fromStep: 4 });
      }
    }
  });

  it('is not undone by what the branch before left in Redis', () => {
    const driver = beforeSpike();
    const old = driver.last('steps');
    driver.steps(LOSSES.slice(4));
    const { epoch } = driver.state;
    driver.tell({ type: 'progress', id: old.id, data: { worker: 'a', epoch: 0, report: lossReport(5, 3) } });
    driver.tell({ type: 'completed', id: old.id, result: { worker: 'a', epoch: 0, fromStep: 4, stepsDone: 1, reports: [lossReport(5, 3)], timings: TIMINGS } });
    expect(driver.state).to.include({ step: 4, epoch });
    // A job of the present epoch that knows of other rollbacks: the metrics lost lines that Redis did not. It is not taken up, ended or not.
    for (const finished of [false, true]) {
      const next = new Driver(driver.ground);
      next.tell({ type: 'workers', workers: next.workers });
      const job = driver.last('steps');
      const data = { ...job.data, rollbacks: [{ fromStep: 6, toStep: 4 }, { fromStep: 8, toStep: 4 }] };
      next.tell({ type: 'adopt', job, data, processedAtMs: 0, finished, progress: null, related: [] });
      expect(next.state).to.include({ activity: null, epoch: epoch + 1 });
    }
  });

  it('has an epoch of its own as soon as it is written down, whatever Redis knows', () => {
    const driver = beforeSpike();
    const from = driver.effects.length;
    driver.steps(LOSSES.slice(4));
    const written = driver.effects.slice(from).findIndex((effect) => effect.type === 'metrics' && effect.line.type === 'rollback');
    const first = beforeSpike();
    first.life = written + 1;
    first.steps(LOSSES.slice(4));
    expect(linesOf(first.ground).at(-1)).to.equal('6 to 4');
    expect(first.ground.control).to.include({ epoch: 0 });
    expect(new Driver(first.ground).state).to.include({ epoch: 1, command: 'stop', step: 4 });
  });

  it('does not take a checkpoint of the branch before, which is still being written, for one of its own', () => {
    const driver = beforeSpike().steps(LOSSES.slice(4)).steps([1, 1, 1, 1]);
    const own = driver.last('checkpoint');
    const progress = { worker: 'a', epoch: 0, step: 8, copied: true };
    for (const rollbacks of [undefined, [{ fromStep: 6, toStep: 4 }]]) {
      const next = new Driver(driver.ground);
      next.tell({ type: 'workers', workers: next.workers });
      const { rollbacks: _, ...data } = own.data as Record<string, unknown>;
      const job = { queue: 'train', worker: 'a', id: 'r.0.checkpoint.8.0' } as const;
      next.tell({ type: 'adopt', job, data: { ...data, ...(rollbacks === undefined ? {} : { rollbacks }) }, processedAtMs: 0, finished: false, progress, related: [] });
      expect(next.state.saving?.step ?? null).to.equal(rollbacks === undefined ? null : 8);
    }
  });

  it('leaves no home to a replica of the branch before', () => {
    const driver = beforeSpike().steps(LOSSES.slice(4));
    driver.complete(driver.last('steps'), { worker: 'a', epoch: 1, fromStep: 4, stepsDone: 1, reports: [lossReport(5, 1)], timings: TIMINGS });
    for (const [branch, home] of [[undefined, null], [1, 'a']] as const) {
      const next = new Driver(driver.ground, {}, ['a'], { run: 'r', step: 5, ...(branch === undefined ? {} : { branch }) });
      next.ground.jobs.length = 0;
      next.recover();
      expect(next.state.home?.id ?? null).to.equal(home);
      expect(next.last('steps').data).to.include({ fromStep: home === null ? 4 : 5 });
    }
  });

  it('waits for its target while that is being written; what is written beyond it is deleted', () => {
    const waiting = Driver.begin().steps(LOSSES.slice(0, 4)).copied().steps(LOSSES.slice(4));
    expect(waiting.state).to.include({ step: 4, version: 0, activity: null });
    waiting.saved();
    expectNewBranch(waiting);

    const beyond = Driver.begin({ lossSpike: { factor: 2, window: 2, patience: 2 } }).steps([1, 1, 1, 1]).saved().steps([1, 1, 1, 9]).copied();
    expect(beyond.last('checkpoint').data).to.include({ step: 8 });
    beyond.steps([9]);
    expect(beyond.state).to.include({ step: 4, version: 4 });
    expect(beyond.state.saving).to.include({ step: 8, unwanted: true });
    beyond.saved();
    expect(beyond.effects).to.deep.include({ type: 'deleteCheckpoints', directories: ['c/step-8'] });
    expect(beyond.ground.checkpoints).to.deep.equal([{ directory: 'c/step-4', step: 4 }]);
  });

  it('keeps the checkpoint that it may need, and computes forward to its target when that is gone', () => {
    const driver = Driver.begin({ lossSpike: { factor: 2, window: 2, patience: 3 } }).steps([1, 1, 1, 1]).saved().steps([1, 1, 1, 9]).saved();
    // keep is 1, but the spike may yet lead back to step 4.
    expect(driver.ground.checkpoints.map(({ step: at }) => at)).to.deep.equal([4, 8]);
    driver.steps([9, 9]);
    expect(driver.state).to.include({ step: 4, version: 4 });
    expect(driver.ground.checkpoints.map(({ step: at }) => at)).to.deep.equal([4]);

    const { ground } = Driver.begin({ lossSpike: { factor: 2, window: 2, patience: 3 } }).steps([1, 1, 1, 1]).saved().steps([1, 1, 1, 1]).saved().steps([1, 9, 9]);
    expect(ground.checkpoints.map(({ step: at }) => at)).to.deep.equal([8]);
    ground.checkpoints = [];
    const next = new Driver(ground, { lossSpike: { factor: 2, window: 2, patience: 3 } });
    next.ground.jobs.length = 0;
    next.recover().steps([1, 1, 1, 1]);
    next.saved().steps([1, 1, 1, 1]).saved();
    next.steps([1, 9, 9, 9]);
    expect(next.state).to.include({ step: 8, version: 8 });
    expect(linesOf(ground)).to.deep.equal([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, '12 to 8']);
  });

  it('while the run is pausing leaves it paused, at a version that anybody can reach', () => {
    const driver = beforeSpike().tell({ type: 'wish', wish: 'pause' }).steps(LOSSES.slice(4));
    expect(driver.state).to.include({ phase: 'paused', step: 4, version: 4 });
    expect(driver.state.rollbacks.length).to.equal(1);
    driver.tell({ type: 'wish', wish: 'resume' });
    expect(driver.last('steps').data).to.deep.include({ fromStep: 4, rollbacks: [{ fromStep: 6, toStep: 4 }] });
  });

  it('compares digests of shards within a branch only', () => {
    const driver = Driver.begin({ lossSpike: { factor: 2, window: 1, patience: 1 }, checkpoint: { every: 0 } }, ['a', 'b']);
    const shard = (digit: string, epoch: number, by = 'a'): void => {
      const result = { worker: by, epoch, step: 1, shard: 0, lossSum: 1, auxLossSum: [1], expertLoad: [[1]], targetTokens: 4, digest: hex(digit), key: 'k', bytes: 4, timings: TIMINGS };
      driver.tell({ type: 'completed', id: `r.${epoch}.shard.1.0`, result });
    };
    const reduce = (at: number, loss: number): void => {
      const job = driver.last('reduce');
      const { epoch } = job.data as { epoch: number };
      driver.complete(job, { worker: 'a', epoch, digest: hex('0'), key: 'k', bytes: 4, report: lossReport(at, loss), timings: TIMINGS, shards: [] });
    };
    shard('1', 0);
    reduce(1, 1);
    reduce(2, 9);
    expect(driver.state).to.include({ step: 0, epoch: 1 });
    shard('2', 1);
    shard('1', 0, 'b');
    expect(driver.codes).to.deep.equal(['LOSS_SPIKE']);
    shard('3', 1, 'b');
    expect(driver.codes).to.deep.equal(['LOSS_SPIKE', 'REPLICA_DIVERGED']);
  });

  it('gives up what was reported of the steps beyond its target before it, and nothing else', () => {
    const rollbacks = [{ atMs: 0, branch: 1, fromStep: 6, toStep: 4, epoch: 2, loss: 9, threshold: 2 }];
    const cases = [[4, 1, false], [5, 1, true], [7, 1, true], [5, 2, false]] as const;
    for (const [at, epoch, abandoned] of cases) expect(isAbandoned(rollbacks, at, epoch), `step ${at} of epoch ${epoch}`).to.equal(abandoned);
  });

  it('comes no more often than the spec allows; then the run fails, also by the hand of the next orchestrator', () => {
    const spec = { lossSpike: { factor: 2, window: 2, patience: 1, maxRollbacks: 1 } };
    const driver = beforeSpike(spec).steps(LOSSES.slice(4));
    driver.ground.record = recordOf(driver.state);
    const spiked = driver.last('steps');
    driver.life = 1;
    driver.steps([9, 9, 9, 9]);
    expect(driver.state.shown.error).to.include({ code: 'LOSS_SPIKE' });
    expect(driver.state.shown.error!.context).to.deep.equal({ step: 5, toStep: 4, loss: 9, threshold: 2, rollbacks: 1 });
    expect(driver.state.shown.error!.message).to.contain('rolled back as often as lossSpike.maxRollbacks allows, 1 times');
    expect(driver.state.shown.faults[0]!.error.message).to.contain('the run goes back to step 4');
    expect(linesOf(driver.ground).slice(6)).to.deep.equal(['6 to 4', 5]);
    const next = new Driver(driver.ground, spec).recover();
    expect(next.state).to.include({ phase: 'failed', step: 5 });
    expect(next.state.shown.error).to.deep.equal(driver.state.shown.error);
    expect(next.effects.some((effect) => effect.type === 'finish')).to.equal(true);
    expect(next.last('steps')).to.equal(spiked);
  });
});
