/**
 * How a run gives up what is under way and plans it again, pauses, fails and ends (orchestrator/machine-decisions.ts): failures in a row,
 * a full disk, the user's wishes, the limit of time.
 */
import { expect } from 'chai';
import type { RunSpecInput } from '../../config/run-spec.ts';
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

  it('waits from the second failure in a row on, twice as long each time, up to a bound', () => {
    const table = new Table({ parallelism: 1 }, ['a'], { maxReplans: 9, backoffMs: 100, backoffMaximumMs: 300 });
    const planned = (): number => table.added.length;
    expect(table.fail(table.last('steps'), 'TIMEOUT').added.length).to.equal(2);
    for (const pauseMs of [100, 200, 300, 300]) {
      const before = planned();
      table.fail(table.last('steps'), 'TIMEOUT').wait(pauseMs - 1);
      expect(planned()).to.equal(before);
      table.wait(1);
      expect(planned(), `${pauseMs} ms later`).to.equal(before + 1);
    }
  });

  it('voids what was under way: its jobs are removed, after the workers have heard of the new epoch', () => {
    const table = new Table({}, ['a', 'b']);
    const ids = table.added.map(({ id }) => id);
    const from = table.effects.length;
    table.fail(table.last('reduce'), 'TIMEOUT');
    const kinds = table.effects.slice(from).map(({ type }) => type);
    expect(table.all('remove').flatMap(({ jobs }) => jobs.map(({ id }) => id))).to.deep.equal(ids);
    expect(kinds.filter((type) => type === 'control' || type === 'remove' || type === 'flow')).to.deep.equal(['control', 'remove', 'flow']);
  });
});

describe('run machine: a pause, and the end', () => {
  const phases = (table: Table): string[] => table.all('publish').flatMap(({ event }) => (event.type === 'phase' ? [event.phase] : []));

  it('a local job is asked to stop, what it did is written down, and then nobody is held', () => {
    const table = new Table({ parallelism: 1 }, ['a']).wish('pause').wish('pause');
    expect(table.commands).to.deep.equal(['run', 'stop']);
    expect(table.state).to.include({ phase: 'pausing', epoch: 0 });
    table.completeSteps(2);
    expect(table.last('checkpoint').data).to.include({ step: 2 });
    expect(table.saved().state).to.deep.include({ phase: 'paused', version: 2, home: null, claims: [] });
    expect(table.released).to.deep.equal(['a']);
    expect(phases(table)).to.deep.equal(['running', 'pausing', 'paused']);
    const before = table.effects.length;
    expect(table.wish('pause').wait(60_000).effects.length).to.equal(before);
    // What was left behind is void, and what failed before is forgotten.
    table.wish('resume');
    expect(table.all('control').at(-1)).to.deep.include({ control: { epoch: 1, command: 'run' } });
    expect(table.last('steps').data).to.deep.include({ fromStep: 2, epoch: 1 });
  });

  it('a flow is given up at once', () => {
    const table = new Table({}, ['a', 'b']).completeReduce();
    const flow = table.last('reduce');
    table.wish('pause');
    expect(table.all('control').map(({ control }) => control)).to.deep.equal([{ epoch: 0, command: 'run' }, { epoch: 1, command: 'stop' }, { epoch: 1, command: 'run' }]);
    expect(table.all('remove').flatMap(({ jobs }) => jobs.map(({ id }) => id))).to.include(flow.id);
    expect(table.last('checkpoint').data).to.include({ step: 1 });
    expect(table.saved().state.phase).to.equal('paused');
    expect(table.completeReduce('a', flow).counted).to.deep.equal([1]);
  });

  it('whose only replica is lost meanwhile stands where others can begin', () => {
    const table = new Table({ parallelism: 1 }, ['a']).progress(1).progress(2).wish('pause').see();
    expect(table.state).to.include({ phase: 'paused', step: 2, version: 0 });
  });

  it('that is taken back goes on with the job at hand; nothing else can be resumed', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const before = table.effects.length;
    expect(table.wish('resume').effects.length).to.equal(before);
    table.wish('pause').wish('resume').completeSteps(2);
    expect(table.state).to.include({ phase: 'running', epoch: 0, command: 'run' });
    expect(table.last('steps').data).to.include({ fromStep: 2 });
  });

  it('in which a job was told that it is cancelled is no failure', () => {
    const table = new Table({ parallelism: 1 }, ['a']).wish('pause');
    table.fail(table.last('steps'), 'CANCELLED');
    expect(table.faults).to.deep.equal([]);
    expect(table.state).to.include({ phase: 'paused', epoch: 1 });
    const running = new Table({ parallelism: 1 }, ['a']);
    running.fail(running.last('steps'), 'CANCELLED');
    expect(running.faults).to.deep.equal(['CANCELLED']);
    expect(running.state.phase).to.equal('running');
    expect(running.added.length).to.equal(2);
  });

  it('forgets the failures before it', () => {
    const table = new Table({ parallelism: 1 }, ['a'], { maxReplans: 1 });
    table.fail(table.last('steps'), 'TIMEOUT').wish('pause').completeSteps(0).wish('resume').fail(table.last('steps'), 'TIMEOUT');
    expect(table.state.phase).to.equal('running');
  });

  it('what was cancelled leaves no job, no worker and no epoch that anybody serves', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a']).completeSteps(3).copied();
    const jobs = [table.last('steps').id, table.last('checkpoint').id];
    table.wait(7).wish('cancel');
    expect(table.all('remove').flatMap(({ jobs: removed }) => removed.map(({ id }) => id))).to.deep.equal(jobs);
    expect(table.all('control').at(-1)).to.deep.include({ control: { epoch: 1, command: 'stop' } });
    expect(table.released).to.deep.equal(['a']);
    expect(table.state).to.deep.include({ phase: 'cancelled', activity: null, saving: null });
    expect(table.state.shown.finishedAtMs).to.equal(7);
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

  it('while the run is pausing anyhow is told once', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a']).completeSteps(3).copied().wish('pause');
    table.fail(table.last('checkpoint'), 'DISK_FULL').completeSteps(0);
    const phases = table.all('publish').flatMap(({ event }) => (event.type === 'phase' ? [event.phase] : []));
    expect(phases).to.deep.equal(['running', 'pausing', 'paused']);
    expect(table.state).to.deep.include({ phase: 'paused', claims: ['a'] });
  });

  it('of another job than a checkpoint is a failure like others', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    table.fail(table.last('steps'), 'DISK_FULL');
    expect(table.state).to.include({ phase: 'running', epoch: 1, diskFull: false });
    expect(table.added.length).to.equal(2);
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
    table.see(worker('0'), ...table.workers).completeReduce('stranger');
    expect(table.last('checkpoint')).to.include({ worker: 'a' });
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

  it('waits for a checkpoint that is being written, and asks a job only once', () => {
    const table = limited({ checkpoint: { every: 3 } }).completeSteps(3).copied().give().wait(10_000).wait(1);
    expect(table.commands).to.deep.equal(['run', 'yield']);
    const first = table.last('checkpoint');
    table.completeSteps(1);
    expect(table.last('checkpoint')).to.equal(first);
    expect(table.saved().last('checkpoint').data).to.include({ step: 4 });
    expect(table.saved().state.phase).to.equal('failed');
  });
});
