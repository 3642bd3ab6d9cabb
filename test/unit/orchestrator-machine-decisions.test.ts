/**
 * What a run does next when nothing is under way: what is due and in which order, whose workers it uses, and what must be written down
 * first (orchestrator/machine-decisions.ts). How it gives up, pauses, fails and ends is in orchestrator-machine-decisions-end.test.ts;
 * the arithmetic that it decides by in orchestrator-plan.test.ts.
 */
import { expect } from 'chai';
import type { Effect } from '../../orchestrator/run-state.ts';
import { TIMINGS, Table, dataOf, hex, report, worker } from '../support/machine-table.ts';

describe('run machine: the order of what is due', () => {
  it('nothing is decided before recovery has told everything', () => {
    const table = new Table({ parallelism: 1 }, ['a'], {}, { epoch: 0, command: 'run' }).see(worker('a', { heldBy: 'r' }));
    const job = new Table({ parallelism: 1 }, ['a']).last('steps');
    const result = { worker: 'a', epoch: 0, fromStep: 0, stepsDone: 2, reports: [report(1), report(2)], timings: TIMINGS };
    table.adopt(job, { finished: true }).tell({ type: 'completed', id: job.id, result }).tell({ type: 'tick' });
    expect(table.counted).to.deep.equal([1, 2]);
    expect(table.added).to.deep.equal([]);
    expect(table.tell({ type: 'ready' }).last('steps').data).to.include({ fromStep: 2 });
  });

  it('an eval comes before the first step and every N; each once, and none of what it tells is lost', () => {
    const table = new Table({ parallelism: 1, data: { train: 't', validation: 'v' }, evaluation: { every: 4 } }, ['a']);
    expect(table.added.map(({ name }) => name)).to.deep.equal(['eval']);
    table.completeEval(5);
    expect(table.last('steps').data).to.include({ fromStep: 0, stepCount: 4 });
    table.completeSteps(4).completeEval(null).completeSteps(4);
    expect(table.state.shown).to.deep.include({ validation: { step: 0, loss: 5 }, validationBefore: 5 });
    table.completeEval(3);
    expect(table.state.shown).to.deep.include({ validation: { step: 8, loss: 3 }, validationBefore: 5 });
    expect(table.added.map(({ name }) => name)).to.deep.equal(['eval', 'steps', 'eval', 'steps', 'eval', 'steps']);
    expect(table.all('metrics').flatMap(({ line }) => (line.type === 'eval' ? [[line.step, line.loss]] : []))).to.deep.equal([[0, 5], [4, null], [8, 3]]);
    expect(table.all('publish').flatMap(({ event }) => (event.type === 'eval' ? [event.step] : []))).to.deep.equal([0, 8]);
  });

  it('replicas are compared where there are several, and not at the end, whose digest is the run\'s', () => {
    const table = new Table({ parallelism: 2, steps: 2, compareDigestsEvery: 1 }, ['a', 'b']).completeReduce();
    const compared = table.added.filter(({ name }) => name === 'digest');
    expect(compared.map((job) => [job.worker, dataOf(job).step])).to.deep.equal([['a', 1], ['b', 1]]);
    for (const job of compared) table.completeDigest(job, hex('1'));
    table.completeReduce().saved();
    expect(table.added.filter(({ name }) => name === 'digest').map((job) => dataOf(job).step)).to.deep.equal([1, 1, 2]);
    const alone = new Table({ parallelism: 1, compareDigestsEvery: 1 }, ['a'], { stepsPerJob: 3 }).completeSteps(3);
    expect(alone.added.map(({ name }) => name)).to.deep.equal(['steps', 'steps']);
  });

  it('a run whose steps are done ends with the digest of its weights; one without it is no end', () => {
    const done = (): Table => new Table({ parallelism: 1 }, ['a']).completeSteps(9).saved();
    const table = done();
    table.completeDigest(table.last('digest'), hex('1'), hex('2'));
    expect(table.state).to.include({ phase: 'completed', epoch: 0, command: 'stop' });
    expect(table.state.shown).to.include({ weightsDigest: hex('2'), error: null });
    expect(table.state.shown.attempts.at(-1)).to.deep.include({ phase: 'completed', toStep: 9 });
    expect(table.released).to.deep.equal(['a']);
    expect(table.effects.at(-1)).to.deep.equal({ type: 'finish' });
    const without = done();
    without.completeDigest(without.last('digest'), hex('1'));
    expect(without.state.shown.error).to.have.property('code', 'MESSAGE_INVALID');
  });

  it('a version that only one worker has is written down before others join', () => {
    const table = new Table({ parallelism: 2 }, ['a']).progress(1);
    table.see(...table.workers, worker('b'));
    expect(table.commands).to.deep.equal(['run', 'yield']);
    table.completeSteps(2);
    expect(table.last('checkpoint')).to.include({ worker: 'a' });
    table.saved();
    expect(table.last('reduce').data).to.include({ step: 3 });
  });

  it('the way is published when it changes, and while the run waits also when its reason does', () => {
    const table = new Table({ parallelism: 2 }, []).wait(1);
    const reasons = (): string[] => table.all('publish').flatMap(({ event }) => (event.type === 'way' ? [event.reason] : []));
    table.see(worker('a', { state: 'draining' })).wait(1).see(worker('a')).completeSteps(0).give('a').completeSteps(1);
    expect(reasons()).to.deep.equal(['waiting: no live worker', 'waiting: every live worker is draining', 'parallelism is 2, but one worker is free']);
    expect(table.state.way!.reason).to.equal('parallelism is 2, but one worker is free; shares with another');
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

describe('run machine: the log of reduced gradients', () => {
  it('is bounded: a checkpoint is brought forward, and what it covers is deleted', () => {
    const table = new Table({}, ['a', 'b'], { logSteps: 2 });
    table.completeReduce().completeReduce();
    expect(table.last('checkpoint').data).to.include({ step: 2 });
    table.saved();
    expect(table.effects).to.deep.include({ type: 'trim', from: 0, through: 2 });
    expect(table.last('reduce').data).to.include({ step: 3 });
    table.completeReduce().completeReduce().saved();
    expect(table.all('trim')).to.deep.equal([{ type: 'trim', from: 0, through: 2 }, { type: 'trim', from: 2, through: 4 }]);
  });

  it('that is full waits for the checkpoint, which is begun while a quarter of it is free', () => {
    const full = new Table({}, ['a', 'b'], { logSteps: 2 }).completeReduce().completeReduce().copied();
    expect(full.state).to.include({ version: 2, activity: null });
    const table = new Table({}, ['a', 'b'], { logSteps: 4 }).completeReduce().completeReduce();
    expect(table.last('reduce').data).to.include({ step: 3 });
    table.completeReduce();
    expect(table.last('checkpoint').data).to.include({ step: 3 });
    table.copied();
    expect(table.last('reduce').data).to.include({ step: 4 });
    table.completeReduce();
    expect(table.state).to.include({ version: 4, activity: null });
    table.saved();
    expect(table.last('reduce').data).to.include({ step: 5 });
  });

  it('is none of a run that computes alone', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 0 } }, ['a'], { logSteps: 2, stepsPerJob: 1 });
    for (let at = 1; at <= 5; at++) table.completeSteps(1);
    expect(table.added.map(({ name }) => name)).not.to.include('checkpoint');
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
