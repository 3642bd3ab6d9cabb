/**
 * What a run does next when nothing is under way, and how it gives up, pauses, fails and ends (orchestrator/machine-decisions.ts).
 * The arithmetic that it decides by is in orchestrator-plan.test.ts.
 */
import { expect } from 'chai';
import type { RunSpecInput } from '../../config/run-spec.ts';
import type { Effect } from '../../orchestrator/run-state.ts';
import { Table, worker } from '../support/machine-table.ts';

describe('run machine: planning again', () => {
  it('a retriable failure is planned again, later each time, and fails the run after maxReplans in a row', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    for (let plan = 0; plan < 3; plan++) {
      table.fail(table.last('steps'), 'TIMEOUT');
      expect(table.state.phase).to.equal('running');
      table.wait(20);
    }
    expect(table.added.filter((job) => job.name === 'steps').length).to.equal(4);
    table.fail(table.last('steps'), 'TIMEOUT');
    expect(table.state.phase).to.equal('failed');
    expect(table.state.shown.error).to.have.property('code', 'TIMEOUT');
    expect(table.effects.at(-1)).to.deep.equal({ type: 'finish' });
  });
});

describe('run machine: a full disk', () => {
  it('a full disk keeps the old checkpoint and the replica, and pauses the run; resume tries again', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a']);
    table.completeSteps(3).fail(table.last('checkpoint'), 'DISK_FULL');
    expect(table.state).to.include({ phase: 'paused' });
    expect(table.state.claims).to.deep.equal(['a']);
    expect(table.faults).to.deep.equal(['DISK_FULL']);
    const { id } = table.last('checkpoint');
    table.wish('resume');
    expect(table.state.phase).to.equal('running');
    expect(table.last('checkpoint')).to.deep.include({ worker: 'a', name: 'checkpoint' });
    expect(table.last('checkpoint').id).not.to.equal(id);
    expect(table.last('checkpoint').data).to.include({ step: 3 });
  });
});

describe('run machine: a share of the workers', () => {

  it('a worker that is another run\'s to use is given up at the step boundary, when what it has is written down', () => {
    const table = new Table({ parallelism: 1 }, ['a']).give();
    expect(table.commands.at(-1)).to.equal('yield');
    expect(table.give().commands.filter((command) => command === 'yield').length).to.equal(1);
    table.completeSteps(3);
    expect(table.last('checkpoint')).to.include({ worker: 'a' });
    expect(table.released).to.deep.equal([]);
    table.saved();
    expect(table.released).to.deep.equal(['a']);
    expect(table.state.way).to.deep.include({ workers: [], reason: 'waiting: shares with another' });
    expect(table.state.phase).to.equal('running');
    table.workers = [worker('a')];
    table.give('a').completeSteps(6);
    expect(table.counted).to.deep.equal([1, 2, 3, 4, 5, 6, 7, 8, 9]);
    expect(table.state.epoch).to.equal(0);
  });

  it('what is written down already is not written again', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    table.give().completeSteps(0);
    expect(table.added.map(({ name }) => name)).to.deep.equal(['steps']);
    expect(table.released).to.deep.equal(['a']);
  });

  it('a run that was paused without a worker asks nothing of the one that it gave up', () => {
    const table = new Table({ parallelism: 2 }, ['a', 'b']);
    table.give().completeReduce('a');
    expect(table.released).to.have.members(['a', 'b']);
    table.wish('pause');
    expect(table.state.phase).to.equal('paused');
    expect(table.added.map(({ name }) => name)).not.to.include('checkpoint');
  });

  it('a flow goes on with fewer from its next step on, and waits for who is not released yet', () => {
    const table = new Table({ parallelism: 2 }, ['a', 'b']).give('b');
    expect(table.released).to.deep.equal([]);
    table.completeReduce('a');
    expect(table.released).to.deep.equal(['a']);
    expect(table.state.way).to.deep.include({ exchange: 'local', workers: ['b'] });
    const other = new Table({ parallelism: 1 }, []);
    other.workers = [worker('c', { heldBy: 'other' })];
    expect(other.give('c').state.way!.reason).to.equal('waiting: other gives up a worker at its next step');
  });
});

describe('run machine: a limit of time', () => {
  const limited = (spec: Partial<RunSpecInput> = {}, workers = ['a']): Table => new Table({ parallelism: Math.max(1, workers.length), maxDurationSeconds: 10, ...spec }, workers);

  it('ends an attempt at the step boundary, after a checkpoint, with a code of its own', () => {
    const table = limited().wait(9_999);
    expect(table.commands).not.to.include('yield');
    table.wait(1);
    expect(table.commands.at(-1)).to.equal('yield');
    expect(table.state.phase).to.equal('running');
    table.completeSteps(4);
    expect(table.last('checkpoint').data).to.include({ step: 4 });
    table.saved();
    expect(table.state).to.include({ phase: 'failed', step: 4 });
    expect(table.state.shown.error).to.have.property('code', 'TIME_LIMIT');
    expect(table.state.shown.attempts.at(-1)).to.deep.include({ number: 1, fromStep: 0, toStep: 4, runningMs: 10_000, phase: 'failed' });
  });

  it('lets the step of a flow end; what is shared is written down by whoever is there', () => {
    const table = limited({}, ['a', 'b']).wait(12_000);
    expect(table.state.phase).to.equal('running');
    table.completeReduce('stranger');
    expect(table.last('checkpoint').data).to.include({ step: 1 });
    expect(table.saved().state.phase).to.equal('failed');
  });

  it('does not count time in a pause, nor time without an orchestrator', () => {
    const table = limited().wait(6_000).wish('pause').completeSteps(2);
    table.saved();
    expect(table.state.phase).to.equal('paused');
    table.wait(60_000).wish('resume').wait(3_999);
    expect(table.state.ending).to.equal(null);
    table.wait(2);
    expect(table.state.ending).to.have.property('code', 'TIME_LIMIT');
  });

  it('fails at once where nobody has anything, and on a disk that is full; a run whose steps are all done completes', () => {
    expect(limited({}, []).wait(10_000).state.shown.error).to.have.property('code', 'TIME_LIMIT');
    const full = limited().wait(10_000).completeSteps(1);
    expect(full.fail(full.last('checkpoint'), 'DISK_FULL').state.shown.error).to.have.property('code', 'TIME_LIMIT');
    const done = limited().completeSteps(9).wait(20_000);
    done.saved();
    expect(done.state.ending).to.equal(null);
    expect(done.last('digest').data).to.include({ step: 9 });
  });
});

describe('run machine: the log of reduced gradients', () => {
  it('is bounded: a checkpoint is brought forward, and what it covers is deleted', () => {
    const table = new Table({}, ['a', 'b'], { logSteps: 2 });
    table.completeReduce().completeReduce();
    expect(table.last('checkpoint').data).to.include({ step: 2 });
    table.saved();
    expect(table.effects).to.deep.include({ type: 'trim', from: 0, through: 2 });
    expect(table.last('reduce').data).to.include({ step: 3 });
  });
});

describe('run machine: what others rest on', () => {
  it('a checkpoint that is complete in the middle of a flow deletes nothing before its end', () => {
    const table = new Table({ checkpoint: { every: 2, keep: 1 } }, ['a', 'b']);
    const deletions = (): Effect[] => table.effects.filter(({ type }) => type === 'trim' || type === 'deleteCheckpoints');
    table.completeReduce().completeReduce().copied();
    expect(table.last('reduce').data).to.include({ step: 3 });
    expect(table.saved().state.checkpoints).to.have.length(1);
    expect(deletions()).to.deep.equal([]);
    table.completeReduce();
    expect(deletions()).to.deep.equal([{ type: 'trim', from: 0, through: 2 }]);
  });

  it('what is computed again, when home is lost while nothing is under way, has names of its own', () => {
    const table = new Table({ parallelism: 1, steps: 2 }, ['a', 'b']);
    const first = table.last('steps');
    table.completeSteps(2);
    for (let failures = 0; failures < 2; failures++) table.copied().fail(table.last('checkpoint'), 'TIMEOUT');
    expect(table.state).to.include({ activity: null, saving: null, epoch: 0 });
    table.workers = table.workers.filter(({ id }) => id !== first.worker);
    table.see(...table.workers);
    expect(table.last('steps').data).to.include({ fromStep: 0, epoch: table.state.epoch });
    expect(table.state.epoch).to.be.above(0);
    expect(table.counted).to.deep.equal([1, 2]);
  });
});
