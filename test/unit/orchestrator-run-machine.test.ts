/**
 * What each event means to a run: workers that come, die and are told apart, results and failures of jobs, and silence
 * (orchestrator/run-machine.ts). Each drives the machine by hand over the fewest steps that show the rule. What has to do with checkpoints
 * is in orchestrator-run-machine-checkpoints.test.ts, a run that is taken up in orchestrator-run-machine-taken-up.test.ts, the user's wishes
 * in orchestrator-machine-decisions-end.test.ts.
 */
import { expect } from 'chai';
import { parseJobId } from '../../orchestrator/run-state.ts';
import { Table, hex, report, worker } from '../support/machine-table.ts';

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
    expect(table.state.early.size).to.equal(0);
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

  it('a local job moves to a better place at the step boundary, but not away from the last worker', () => {
    const table = new Table({ parallelism: 1 }, ['a', 'b']);
    table.see({ ...table.workers[0]!, state: 'draining' }, table.workers[1]!);
    expect(table.commands).to.deep.equal(['run', 'yield']);
    const last = new Table({ parallelism: 1 }, ['a']);
    last.see({ ...last.workers[0]!, state: 'draining' }).give('a');
    expect(last.commands).to.deep.equal(['run']);
    const pausing = new Table({ parallelism: 1 }, ['a', 'b']).wish('pause');
    pausing.see({ ...pausing.workers[0]!, state: 'draining' }, pausing.workers[1]!);
    expect(pausing.commands).to.deep.equal(['run', 'stop']);
  });

  it('only what was asked for is claimed, and only who is the run\'s counts as claimed', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    table.tell({ type: 'claimed', workers: [] });
    expect(table.state.claims).to.deep.equal(['a']);
    // Another run was faster.
    const late = new Table({ parallelism: 1 }, []);
    late.state = { ...late.state, activity: { kind: 'claim', workers: ['b'] } };
    late.tell({ type: 'claimed', workers: [worker('b', { heldBy: 'other' })] });
    expect(late.state.claims).to.deep.equal([]);
    expect(late.released).to.deep.equal([]);
    expect(late.state.way!.reason).to.equal('waiting: every fitting worker serves another run (other)');
  });

  it('a flow in its workers\' own queues does not mind who else comes and goes', () => {
    const table = new Table({ parallelism: 2, batch: { shards: 3, sequences: 1, sequenceLength: 4 } }, ['a', 'b', 'c']);
    const [a, b] = table.workers;
    table.see(a!, b!, worker('d'));
    table.see(a!, b!);
    expect(table.faults).to.deep.equal([]);
    expect(table.state.epoch).to.equal(0);
  });
});

describe('run machine: failures', () => {
  it('what no attempt cures, a bug, and a message that is none, fail the run at once', () => {
    for (const code of ['DEVICE_MEMORY', 'TOKEN_FILE_INVALID', 'BUG'] as const) {
      const refused = new Table({ parallelism: 1 }, ['a']);
      refused.fail(refused.last('steps'), code);
      expect(refused.state.phase).to.equal('failed');
      expect(refused.state.shown.error).to.have.property('code', code);
    }
    const table = new Table({ parallelism: 1 }, ['a']);
    table.tell({ type: 'completed', id: table.last('steps').id, result: { nonsense: true } });
    expect(table.state.shown.error).to.have.property('code', 'MESSAGE_INVALID');
  });

  it('a result that does not tell of its own job fails the run, naming it', () => {
    const message = (table: Table): string => table.state.shown.error?.message ?? 'the run goes on';
    const local = new Table({ parallelism: 1 }, ['a']).completeSteps(2, { stepsDone: 3 });
    expect(message(local)).to.contain('tells of 3 steps, but not of each');
    const flow = new Table({}, ['a', 'b']);
    expect(message(flow.completeReduce('a', flow.last('reduce'), { report: report(2) }))).to.contain('tells of step 2');
    expect(flow.counted).to.deep.equal([]);
  });

  it('a failure of a job that is not under way is nobody\'s', () => {
    const table = new Table({ parallelism: 1 }, ['a'], { stepsPerJob: 3 });
    const old = table.last('steps');
    table.completeSteps(3).fail(old, 'DEVICE_MEMORY').tell({ type: 'missing', id: old.id });
    expect(table.state).to.include({ phase: 'running', epoch: 0 });
    expect(table.faults).to.deep.equal([]);
  });

  it('a job that is given back undone is planned again, with another name, and not for ever', () => {
    const table = new Table({ parallelism: 1 }, ['a'], { maxReplans: 1 });
    const { id } = table.last('steps');
    table.completeSteps(0);
    expect(table.last('steps').id).not.to.equal(id);
    expect(table.state.phase).to.equal('running');
    expect(table.completeSteps(0).state.shown.error).to.have.property('code', 'TIMEOUT');
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
    // The first replica at the version that was given up is nobody's home, and the losses are forgotten with it.
    expect(table.state.home).to.equal(null);
    table.completeReduce().fail(table.last('shard'), 'GRADIENT_LOST').wait(20);
    expect(table.last('reduce').data).to.include({ step: 2 });
    for (let at = 2; at <= 3; at++) table.completeReduce();
    expect(table.counted).to.deep.equal([1, 2, 3]);
  });

  it('a gradient that stays lost after a checkpoint costs no more than the steps since, and one that a local job lacks is not asked for twice', () => {
    const table = new Table({ checkpoint: { every: 2 } }, ['a', 'b']).completeReduce().completeReduce().saved().completeReduce();
    for (let loss = 0; loss < 2; loss++) table.fail(table.last('shard'), 'GRADIENT_LOST');
    expect(table.wait(20).last('reduce').data).to.include({ step: 3 });
    const local = new Table({ parallelism: 2 }, ['a', 'b']).completeReduce('b').completeReduce('b');
    local.see(local.workers[0]!);
    expect(local.last('steps').data).to.include({ fromStep: 2 });
    local.fail(local.last('steps'), 'GRADIENT_LOST').wait(20);
    expect(local.last('steps').data).to.include({ fromStep: 0 });
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

  it('a minority that is home is home no more', () => {
    const table = differing(hex('2'), hex('1'), hex('1'));
    expect(table.state.home).to.equal(null);
    expect(table.state.way!.workers).to.have.members(['b', 'c']);
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

describe('run machine: silence', () => {
  it('a job unheard of is looked up; a long silence is recorded once, and waited through', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    table.wait(299);
    expect(table.all('lookup')).to.deep.equal([]);
    table.wait(1);
    expect(table.effects.at(-1)).to.deep.equal({ type: 'lookup', jobs: [{ queue: 'train', worker: 'a', id: table.last('steps').id }] });
    table.wait(1_699);
    expect(table.faults).to.deep.equal([]);
    table.wait(1).wait(2_000);
    expect(table.faults).to.deep.equal(['TIMEOUT']);
    expect(table.state.phase).to.equal('running');
    // It is broken by every step, and by every job that begins.
    table.progress(1).wait(299);
    expect(table.all('lookup').length).to.equal(4);
    table.wait(1_701);
    expect(table.faults).to.deep.equal(['TIMEOUT', 'TIMEOUT']);
    const { length } = table.all('lookup');
    table.fail(table.last('steps'), 'TIMEOUT').wait(299);
    expect(table.all('lookup').length).to.equal(length);
    table.wait(1_701);
    expect(table.faults.length).to.equal(4);
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
    expect(table.all('lookup')).to.deep.equal([]);
    expect(table.state.way!.reason).to.equal('waiting: no live worker');
  });

  it('a run that is over hears nothing any more', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const job = table.last('steps');
    table.wish('cancel');
    const { length } = table.effects;
    table.wait(5_000).fail(job, 'TIMEOUT').wish('resume').wish('pause').wish('cancel').tell({ type: 'restarted' }).see().completeSteps(2);
    const error = { code: 'DISK_FULL', message: 'full', context: {} } as const;
    table.tell({ type: 'fault', what: 'a disk', error }).tell({ type: 'fatal', error });
    expect(table.state.phase).to.equal('cancelled');
    expect(table.state.shown).to.deep.include({ error: null, faults: [] });
    expect(table.effects.length).to.equal(length);
  });

  it('a run is silent when it waits for a checkpoint, not while it is paused, nor before anything can have been heard', () => {
    const paused = new Table({ parallelism: 1 }, ['a']).wish('pause').completeSteps(0).wait(60_000);
    expect(paused.faults).to.deep.equal([]);
    const waiting = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a']).completeSteps(3).copied().completeSteps(3).wait(2_000);
    // Nor is one whose pause is just over, whose worker was just lost, or that was just taken up.
    expect(paused.wish('resume').wait(1).faults).to.deep.equal([]);
    expect(new Table({ parallelism: 1 }, ['a']).wait(1_999).see().wait(1).faults).to.deep.equal(['WORKER_LOST']);
    const taken = new Table({ parallelism: 1 }, [], {}, { epoch: 0, command: 'run' });
    taken.now = 60_000;
    expect(taken.tell({ type: 'ready' }).wait(1).faults).to.deep.equal([]);
    expect(waiting.state.shown.faults.map(({ what, error: { code } }) => [what, code])).to.deep.equal([['checkpoint of step 3, which is being written', 'TIMEOUT']]);
  });

  it('a clock that is set back takes no time from anybody', () => {
    const table = new Table({ parallelism: 1 }, ['a']).wait(500).wait(-400);
    expect(table.state.shown.runningMs).to.equal(500);
    expect(table.wait(100).state.shown.runningMs).to.equal(600);
  });
});
