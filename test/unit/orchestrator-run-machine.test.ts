/**
 * What each event means to a run: workers that come, die and are told apart, results and failures of jobs, a Redis that forgot, silence,
 * the user's wishes, and a run that is taken up (orchestrator/run-machine.ts). Each drives the machine by hand over the fewest steps that
 * show the rule; what has to do with checkpoints is in orchestrator-run-machine-checkpoints.test.ts.
 */
import { expect } from 'chai';
import type { JobAddress } from '../../orchestrator/run-state.ts';
import { jobId, parseJobId } from '../../orchestrator/run-state.ts';
import { Table, hex, worker } from '../support/machine-table.ts';

describe('run machine: who holds what', () => {
  it('whoever joins during a step may take its jobs, so its death is noticed too', () => {
    const table = new Table({}, ['a', 'b']);
    expect(table.last('reduce').worker).to.equal(null);
    const [a, b] = table.workers;
    table.see(a!, b!, worker('c'));
    expect(table.state.epoch).to.equal(0);
    table.see(a!, b!);
    expect(table.faults).to.deep.equal(['WORKER_LOST']);
    expect(table.last('reduce').data).to.include({ step: 1, epoch: 1 });
  });

  it('a worker of another run that reduced a step is no place for this run\'s checkpoint', () => {
    const table = new Table({ checkpoint: { every: 1 } }, ['a', 'b']);
    const [a, b] = table.workers;
    table.see(a!, b!, worker('c', { heldBy: 'other' })).completeReduce('c');
    expect(table.state.home).to.equal(null);
    expect(table.last('checkpoint').worker).to.equal('a');
  });

  it('a worker that is ahead of what was counted is no home: the run goes back to what is shared', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    for (const at of [1, 2, 4]) table.progress(at);
    table.fail(table.last('steps'), 'TIMEOUT');
    expect(table.state.home).to.equal(null);
    expect(table.last('steps').data).to.include({ fromStep: 0 });
    table.completeSteps(9);
    expect(table.counted).to.deep.equal([1, 2, 3, 4, 5, 6, 7, 8, 9]);
  });

  it('its only replica lost, the run falls back, and nothing of before has effect', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a', 'b']);
    table.completeSteps(3);
    const old = table.last('checkpoint');
    table.see(table.workers[1]!);
    expect(table.last('steps')).to.include({ worker: 'b' });
    expect(table.last('steps').data).to.include({ fromStep: 0 });
    expect(parseJobId(table.last('steps').id)!.epoch).to.be.above(parseJobId(old.id)!.epoch);
  });

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
    const comparison: JobAddress & { data: object } = { queue: 'train', worker: 'a', id: jobId('r', 0, 'digest', 0, 0), data: {} };
    for (const [finished, epoch] of [[true, 0], [false, 1]] as const) {
      const table = recovered(before, 0).adopt(comparison, { finished });
      expect(table.state.epoch).to.equal(epoch);
    }
    const alone = new Table({ parallelism: 1 }, ['a', 'b']);
    const job = alone.last('steps');
    for (const [startedAtMs, epoch] of [[3, 0], [7, 1]] as const) {
      const table = recovered(alone, startedAtMs).adopt(job).tell({ type: 'ready' });
      expect(table.state.epoch, `worker started at ${startedAtMs}, job was taken at 5`).to.equal(epoch);
    }
  });
});

describe('run machine: failures', () => {
  it('what no attempt cures, a bug, and a message that is none, fail the run at once', () => {
    for (const code of ['DEVICE_MEMORY', 'TOKEN_FILE_INVALID'] as const) {
      const refused = new Table({ parallelism: 1 }, ['a']);
      refused.fail(refused.last('steps'), code);
      expect(refused.state.phase).to.equal('failed');
      expect(refused.state.shown.error).to.have.property('code', code);
    }
    const table = new Table({ parallelism: 1 }, ['a']);
    table.tell({ type: 'completed', id: table.last('steps').id, result: { nonsense: true } });
    expect(table.state.shown.error).to.have.property('code', 'MESSAGE_INVALID');
  });

  it('a gradient that stays lost sends the run back to its checkpoint', () => {
    const table = new Table({}, ['a', 'b']);
    table.completeReduce().completeReduce();
    expect(table.last('reduce').data).to.include({ step: 3 });
    table.fail(table.last('shard'), 'GRADIENT_LOST');
    expect(table.last('reduce').data).to.include({ step: 3 });
    table.fail(table.last('shard'), 'GRADIENT_LOST').wait(20);
    expect(table.last('reduce').data).to.include({ step: 1 });
    expect(table.state.step).to.equal(2);
    for (let at = 1; at <= 3; at++) table.completeReduce();
    expect(table.counted).to.deep.equal([1, 2, 3]);
  });
});

describe('run machine: replicas that differ', () => {
  const differing = (...digests: string[]): Table => {
    const batch = { shards: 3, sequences: 1, sequenceLength: 4 };
    const table = new Table({ batch, compareDigestsEvery: 1 }, ['a', 'b', 'c'].slice(0, digests.length));
    table.completeReduce();
    const jobs = table.added.filter((job) => job.name === 'digest');
    expect(jobs.map((job) => job.worker)).to.have.members(table.workers.map(({ id }) => id));
    for (const [index, job] of jobs.entries()) table.completeDigest(job, digests[index]!);
    return table;
  };

  it('agree: the next step', () => {
    const table = differing(hex('1'), hex('1'), hex('1'));
    expect(table.faults).to.deep.equal([]);
    expect(table.last('reduce').data).to.include({ step: 2 });
  });

  it('a minority is named, and its process not used again', () => {
    const table = differing(hex('1'), hex('2'), hex('1'));
    expect(table.faults).to.deep.equal(['REPLICA_DIVERGED']);
    expect(table.state.shown.faults[0]!.error.message).to.include('worker b');
    expect(table.last('reduce').data).to.include({ step: 2 });
    expect(table.state.way!.workers).to.have.members(['a', 'c']);
    table.workers = table.workers.map((each) => (each.id === 'b' ? worker('b', { incarnation: 'b-2' }) : each));
    table.see(...table.workers).completeReduce();
    expect(table.state.way!.workers).to.have.members(['a', 'b', 'c']);
  });

  it('without a majority all begin again at the checkpoint, here the beginning', () => {
    const table = differing(hex('1'), hex('2'));
    expect(table.faults).to.deep.equal(['REPLICA_DIVERGED', 'REPLICA_DIVERGED']);
    expect(table.last('reduce').data).to.include({ step: 1 });
    expect(table.state.epoch).to.equal(1);
  });
});

describe('run machine: what was given up', () => {
  it('a sum of an epoch that was given up does not count, though its step is the one at hand', () => {
    const table = new Table({}, ['a', 'b']);
    const old = table.last('reduce');
    table.workers = [table.workers[0]!, worker('b', { incarnation: 'b-2', heldBy: 'r' })];
    table.see(...table.workers);
    expect(table.last('reduce').data).to.include({ step: 1, epoch: table.state.epoch });
    expect(table.last('reduce').id).not.to.equal(old.id);
    expect(table.completeReduce('a', old).counted).to.deep.equal([]);
    expect(table.completeReduce().counted).to.deep.equal([1]);
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
    table.tell({ type: 'completed', id: old.id, result: {} });
    expect(table.counted).to.deep.equal([]);
    table.completeSteps(2).wish('pause');
    table.tell({ type: 'restarted' });
    expect(table.state.phase).to.be.oneOf(['pausing', 'paused']);
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
});

describe('run machine: silence', () => {
  it('a job unheard of is looked up; a long silence is recorded once, and waited through', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    table.wait(200);
    expect(table.effects.some((effect) => effect.type === 'lookup')).to.equal(false);
    table.wait(200);
    expect(table.effects.at(-1)).to.deep.equal({ type: 'lookup', jobs: [{ queue: 'train', worker: 'a', id: table.last('steps').id }] });
    table.wait(2_000).wait(2_000);
    expect(table.faults).to.deep.equal(['TIMEOUT']);
    expect(table.state.phase).to.equal('running');
  });

  it('a job that Redis lost is planned again', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const { id } = table.last('steps');
    table.tell({ type: 'missing', id });
    expect(table.last('steps').id).not.to.equal(id);
  });

  it('no worker is recorded once, with the reason', () => {
    const table = new Table({ parallelism: 1 }, []);
    table.wait(3_000).wait(3_000);
    expect(table.faults).to.deep.equal(['NO_WORKER']);
    expect(table.state.way!.reason).to.equal('waiting: no live worker');
  });

  it('a run that is over hears nothing any more', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const job = table.last('steps');
    table.wish('cancel');
    const { length } = table.effects;
    table.wait(5_000).fail(job, 'TIMEOUT').wish('resume');
    expect(table.state.phase).to.equal('cancelled');
    expect(table.effects.length).to.equal(length);
  });
});
