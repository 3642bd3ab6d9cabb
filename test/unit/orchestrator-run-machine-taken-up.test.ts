/**
 * A run that is taken up: by the next orchestrator, which finds jobs and replicas that the one before left, and by the same when its
 * Redis was started anew and may have forgotten (the part of orchestrator/run-machine.ts that has to do with it).
 */
import { expect } from 'chai';
import { jobId } from '../../orchestrator/run-state.ts';
import type { JobAddress } from '../../orchestrator/run-state.ts';
import { Table, report, worker } from '../support/machine-table.ts';

describe('run machine: what an orchestrator before left', () => {
  it('a flow of an orchestrator that died is given up unless it ended; a job of a process that died is not waited for', () => {
    const before = new Table({}, ['a', 'b']);
    const recovered = (table: Table, startedAtMs: number): Table => {
      const after = new Table({ parallelism: table.state.settings.spec.parallelism }, ['a', 'b'], {}, { epoch: 0, command: 'run' });
      after.workers = ['a', 'b'].map((id) => worker(id, { heldBy: 'r', startedAtMs }));
      return after.see(...after.workers);
    };
    const flow = before.last('reduce');
    const adopted = recovered(before, 0).adopt(flow).tell({ type: 'ready' });
    expect(adopted.state.epoch).to.equal(1);
    expect(adopted.last('reduce').data).to.include({ step: 1, epoch: 1 });
    expect(adopted.all('remove').flatMap(({ jobs }) => jobs.map(({ id }) => id))).to.deep.equal([flow.id]);
    const ended = recovered(before, 0).adopt(flow, { finished: true }).completeReduce('a', flow).tell({ type: 'ready' });
    expect(ended.state).to.include({ step: 1, epoch: 0 });
    const comparison: JobAddress & { data: object } = { queue: 'train', worker: 'a', id: jobId('r', 0, 'digest', 0, 0), data: {} };
    for (const [finished, epoch] of [[true, 0], [false, 1]] as const) {
      const table = recovered(before, 0).adopt(comparison, { finished });
      expect(table.state.epoch).to.equal(epoch);
    }
    const alone = new Table({ parallelism: 1 }, ['a', 'b']);
    const job = alone.last('steps');
    for (const [startedAtMs, epoch] of [[3, 0], [5, 0], [7, 1]] as const) {
      const table = recovered(alone, startedAtMs).adopt(job).tell({ type: 'ready' });
      expect(table.state.epoch, `worker started at ${startedAtMs}, job was taken at 5`).to.equal(epoch);
    }
  });

  it('a job is taken up only where the run could have it: of this run, this epoch, and over the step that was counted last', () => {
    const found = (changes: Partial<JobAddress>, data: object, more: { control?: number; counted?: number } = {}): Table => {
      const table = new Table({ parallelism: 1, data: { train: 't', validation: 'v' } }, ['a'], {}, { epoch: more.control ?? 0, command: 'run' }, more.counted ?? 0);
      return table.see(worker('a', { heldBy: 'r' })).adopt({ ...new Table({ parallelism: 1 }, ['a']).last('steps'), ...changes, data });
    };
    const { data } = new Table({ parallelism: 1 }, ['a']).last('steps');
    const steps = (fromStep: number, stepCount: number, counted: number): Table => found({}, { ...data, fromStep, stepCount }, { counted });
    for (const [fromStep, stepCount] of [[2, 3], [3, 3], [0, 3]] as const) {
      const table = steps(fromStep, stepCount, 3);
      expect(table.state.activity).to.include({ kind: 'steps', fromStep });
      // Nobody knows how far it has come: its replica stands at least where it began.
      expect(table.tell({ type: 'ready' }).state.shown.attempts.at(-1)).to.include({ fromStep });
    }
    for (const [fromStep, stepCount] of [[4, 3], [0, 2]] as const) expect(steps(fromStep, stepCount, 3).state).to.include({ activity: null, epoch: 1 });
    expect(found({ id: jobId('other', 0, 'steps', 0, 0) }, data).state).to.include({ activity: null, epoch: 0 });
    expect(found({}, data, { control: 2 }).state).to.include({ activity: null, epoch: 2 });
    const { fromStep: _, stepCount: __, ...origin } = data as Record<string, unknown>;
    const evaluation = (step: number): object => ({ replica: { ...origin, step }, checkpoint: null, data: 'v', sequences: 1, sequenceLength: 4 });
    const evalOf = (step: number): Table => found({ queue: 'eval', id: jobId('r', 0, 'eval', step, 0) }, evaluation(step), { counted: 3 });
    expect(evalOf(3).state.activity).to.include({ kind: 'eval', step: 3 });
    expect(evalOf(2).state).to.include({ activity: null, epoch: 1 });
    const again = new Table({ parallelism: 1, data: { train: 't', validation: 'v' } }, ['a'], {}, { epoch: 0, command: 'run' }, 0, {
      counted: { step: 3, lastReport: report(3), skippedInARow: 0, lastEvalStep: 3 },
    }).adopt({ queue: 'eval', worker: 'a', id: jobId('r', 0, 'eval', 3, 0), data: evaluation(3) });
    expect(again.state).to.include({ activity: null, epoch: 1 });
    const checkpoint = (step: number): Table => found({ id: jobId('r', 0, 'checkpoint', step, 0) }, { ...origin, step, directory: `c/step-${step}` }, { counted: 3 });
    expect(checkpoint(3).state.activity).to.include({ kind: 'checkpoint', step: 3 });
    expect(checkpoint(2).state).to.include({ activity: null, epoch: 1 });
    // One that lies on the disk already: its orchestrator died before it heard of it.
    const known = new Table({ parallelism: 1 }, ['a'], {}, { epoch: 0, command: 'run' }, 3, { checkpoints: [{ directory: 'c/step-3', step: 3 }] });
    known.adopt({ queue: 'train', worker: 'a', id: jobId('r', 0, 'checkpoint', 3, 0), data: { ...origin, step: 3, directory: 'c/step-3' } });
    expect(known.state).to.include({ activity: null, epoch: 1 });
  });

  it('a flow that ended is heard if it is of the next step, and brings what is shared no further than it was without a gap', () => {
    const ended = (step: number): Table => {
      const { data } = new Table({}, ['a', 'b']).last('reduce');
      const job = { queue: 'train', worker: null, id: jobId('r', 0, 'reduce', step, 0), name: 'reduce', data: { ...data, step }, priority: 0 } as const;
      const table = new Table({}, ['a', 'b'], {}, { epoch: 0, command: 'run' }, 3).see(worker('a', { heldBy: 'r' }), worker('b', { heldBy: 'r' }));
      return table.adopt(job, { finished: true }).completeReduce('a', job);
    };
    expect(ended(4).state).to.include({ step: 4, version: 4, sharedVersion: 0 });
    expect(ended(5).state).to.include({ step: 3, version: 3, sharedVersion: 0 });
  });

  it('who holds a replica at the version is home when the run is taken up, if it is the run\'s; else the attempt begins at what is shared', () => {
    for (const [heldBy, step, fromStep] of [['r', 3, 3], ['other', 3, 0], ['r', 2, 0]] as const) {
      const table = new Table({ parallelism: 1 }, ['a', 'b'], {}, { epoch: 0, command: 'run' }, 3);
      table.see(worker('a', { heldBy, replica: { run: 'r', step } }), worker('b', { heldBy: 'r' })).tell({ type: 'ready' });
      expect(table.last('steps').data, `held by ${heldBy} at ${step}`).to.include({ fromStep });
      expect(table.state.shown.attempts.at(-1)).to.include({ fromStep });
    }
  });
});

describe('run machine: a Redis that was started anew', () => {
  it('makes what was under way void, by a new epoch, and plans it again; a pause stays one', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const { epoch } = table.state;
    const old = table.last('steps');
    table.tell({ type: 'restarted' });
    expect(table.faults).to.deep.equal(['REDIS_LOST']);
    expect(table.state.epoch).to.equal(epoch + 1);
    expect(table.last('steps').id).not.to.equal(old.id);
    table.progress(1, {}, old).tell({ type: 'completed', id: old.id, result: {} });
    expect(table.counted).to.deep.equal([]);
    expect(table.state.phase).to.equal('running');
    table.completeSteps(2).wish('pause');
    table.tell({ type: 'restarted' });
    expect(table.state.phase).to.equal('pausing');
    expect(table.last('checkpoint').data).to.include({ step: 2, epoch: table.state.epoch });
    expect(table.saved().state.phase).to.equal('paused');
    expect(table.all('control').map(({ control }) => control).at(-1)!.epoch).to.equal(table.state.epoch);
  });

  it('a claim that it forgot is made again before any job is added', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    table.workers = [worker('a')];
    const before = table.effects.length;
    table.see(...table.workers).tell({ type: 'restarted' });
    const after = table.effects.slice(before).map(({ type }) => type);
    expect(after.indexOf('claim')).to.be.above(-1).and.to.be.below(after.indexOf('add'));
  });

  it('asks nothing of a home that is another run\'s by now: the run falls back', () => {
    const table = new Table({ parallelism: 1 }, ['a', 'b'], { stepsPerJob: 1 }).completeSteps(1);
    table.see(worker('a', { heldBy: 'other' }), worker('b')).tell({ type: 'restarted' });
    expect(table.last('steps')).to.include({ worker: 'b' });
    expect(table.last('steps').data).to.include({ fromStep: 0 });
    expect(table.added.map(({ name }) => name)).not.to.include('checkpoint');
  });

  it('is nothing to a run that is only being taken up', () => {
    const table = new Table({ parallelism: 1 }, ['a'], {}, { epoch: 4, command: 'run' }).tell({ type: 'restarted' });
    expect(table.state).to.include({ epoch: 4 });
    expect(table.effects).to.deep.equal([]);
  });
});
