/**
 * What of the reports counts: each step once and in order, gradients that differ, steps that are skipped, and how fast it goes
 * (orchestrator/machine-counting.ts). Rollbacks, which a counted loss brings about, are in orchestrator-rollback.test.ts.
 */
import { expect } from 'chai';
import type { NewJob } from '../../orchestrator/run-state.ts';
import { Table, dataOf, hex } from '../support/machine-table.ts';

describe('run machine: exactly once', () => {
  it('late, doubled and old reports change nothing', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const job = table.last('steps');
    for (const at of [1, 2, 2, 1, 4, 3, 3]) table.progress(at);
    expect(table.counted).to.deep.equal([1, 2, 3, 4]);
    for (const id of ['r.99.steps.0.0', 'other.0.steps.0.0']) table.progress(5, {}, { ...job, id });
    expect(table.counted).to.deep.equal([1, 2, 3, 4]);
    table.fail(table.last('steps'), 'TIMEOUT');
    table.progress(5, {}, job).tell({ type: 'completed', id: job.id, result: {} });
    expect(table.counted).to.deep.equal([1, 2, 3, 4]);
    expect(table.state.phase).to.equal('running');
    expect(table.state.epoch).to.be.above(dataOf(job).epoch);
  });

  it('a second gradient of a shard that differs raises an alarm that names both workers', () => {
    const table = new Table({}, ['a', 'b']);
    const old = table.added.find((job) => job.name === 'shard')!;
    table.completeShard(0, hex('1'), 'a').completeShard(0, hex('1'), 'b');
    expect(table.faults).to.deep.equal([]);
    table.fail(table.last('reduce'), 'GRADIENT_LOST');
    table.completeShard(0, hex('2'), 'b');
    expect(table.faults).to.deep.equal(['GRADIENT_LOST', 'REPLICA_DIVERGED']);
    expect(table.state.shown.faults.at(-1)!.error.context).to.include({ step: 1, shard: 0, first: 'a', second: 'b' });
    table.completeReduce().completeShard(0, hex('3'), 'a', old);
    expect(table.faults).to.deep.equal(['GRADIENT_LOST', 'REPLICA_DIVERGED', 'REPLICA_DIVERGED']);
    expect(table.counted).to.deep.equal([1]);
  });

  it('a report that comes again is held against what was counted', () => {
    const table = new Table({ parallelism: 1 }, ['a']).progress(1).progress(2).progress(1, { loss: 3 });
    expect(table.counted).to.deep.equal([1, 2]);
    expect(table.all('recount').map(({ report: again }) => [again.step, again.loss])).to.deep.equal([[1, 3]]);
    // The replica has not gone back for it.
    expect(table.state.version).to.equal(2);
  });

  it('what came early counts when the steps before it have, and then nobody is ahead any more', () => {
    const table = new Table({ parallelism: 1 }, ['a']).progress(3).progress(2).progress(1);
    expect(table.counted).to.deep.equal([1, 2, 3]);
    expect(table.fail(table.last('steps'), 'TIMEOUT').last('steps').data).to.include({ fromStep: 3 });
  });

  it('what came early does not count when a step before it ends the run', () => {
    const table = new Table({ parallelism: 1, maxNonFiniteSteps: 2 }, ['a']).progress(3).progress(2, { skipped: true }).progress(1, { skipped: true });
    expect(table.state.phase).to.equal('failed');
    expect(table.counted).to.deep.equal([1, 2]);
  });

  it('a local job tells of its own steps only', () => {
    const table = new Table({ parallelism: 1 }, ['a'], { stepsPerJob: 3 }).completeSteps(3).progress(3).progress(7);
    expect(table.all('recount')).to.deep.equal([]);
    expect(table.state.early.size).to.equal(0);
    expect(table.progress(6).progress(5).progress(4).counted).to.deep.equal([1, 2, 3, 4, 5, 6]);
  });
});

describe('run machine: reports of shards', () => {
  /** After `counted` steps, and the first step's jobs. */
  const after = (counted: number): { table: Table; first: (shard: number) => NewJob } => {
    const table = new Table({}, ['a', 'b']);
    const jobs = [table.shardJob(0), table.shardJob(1)];
    for (let at = 0; at < counted; at++) table.completeReduce();
    return { table, first: (shard) => jobs[shard]! };
  };

  it('are held against each other until four more steps have counted', () => {
    for (const [underWay, faults] of [[5, ['REPLICA_DIVERGED']], [6, []]] as const) {
      const { table, first } = after(underWay - 1);
      table.completeShard(0, hex('1'), 'a', first(0)).completeShard(0, hex('2'), 'b', first(0));
      expect(table.faults, `step 1, while step ${underWay} is under way`).to.deep.equal(faults);
    }
    // What is remembered is bounded: as a report of a new step comes, those of an old one go.
    const { table } = after(0);
    table.completeShard(0, hex('1'), 'a');
    for (let at = 1; at <= 5; at++) table.completeReduce();
    table.completeShard(0, hex('1'), 'a');
    expect([...table.state.digests.keys()]).to.deep.equal([6]);
  });

  it('are in the history once, and again when another worker tells the same', () => {
    const { table, first } = after(0);
    for (const by of ['a', 'a', 'b']) table.completeShard(0, hex('1'), by, first(0));
    expect(table.all('history').flatMap(({ event }) => (event.type === 'shard' ? [event.worker] : []))).to.deep.equal(['a', 'b']);
  });

  it('of another run are nothing; in no form they fail the run, unless their epoch was given up', () => {
    const { table, first } = after(0);
    const { id } = first(0);
    table.completeShard(0, hex('1'), 'a').completeShard(0, hex('2'), 'b', { ...first(0), id: id.replace('r.', 'other.') });
    expect(table.faults).to.deep.equal([]);
    table.fail(table.last('reduce'), 'TIMEOUT').tell({ type: 'completed', id, result: { nonsense: true } });
    expect(table.state.phase).to.equal('running');
    table.tell({ type: 'completed', id: table.shardJob(0).id, result: { nonsense: true } });
    expect(table.state.shown.error).to.have.property('code', 'MESSAGE_INVALID');
  });

  it('are news, but not of an epoch that was given up', () => {
    const { table, first } = after(0);
    table.wait(200).completeShard(0, hex('1'), 'a').wait(200);
    expect(table.all('lookup')).to.deep.equal([]);
    table.fail(table.last('reduce'), 'TIMEOUT').wait(200).completeShard(1, hex('1'), 'a', first(1)).wait(200);
    expect(table.all('lookup').length).to.equal(1);
  });
});

describe('run machine: a step that counts', () => {
  it('a new step forgives what was before it', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    for (let plan = 0; plan < 10; plan++) {
      const job = table.last('steps');
      if (plan < 8) table.progress(dataOf(job).fromStep + 1);
      table.fail(job, 'TIMEOUT').wait(20);
    }
    expect(table.state.phase).to.equal('running');
  });

  it('forgives checkpoints that failed beside it, and a gradient that was lost', () => {
    const saving = new Table({ parallelism: 1, checkpoint: { every: 1 } }, ['a'], { maxReplans: 1 });
    for (let at = 1; at <= 4; at++) saving.completeSteps(1).copied().fail(saving.last('checkpoint'), 'TIMEOUT');
    expect(saving.state).to.include({ phase: 'running', step: 4 });
    const losing = new Table({}, ['a', 'b']);
    for (let at = 1; at <= 3; at++) {
      losing.fail(losing.last('shard'), 'GRADIENT_LOST').completeReduce();
      expect(losing.last('reduce').data).to.include({ step: at + 1 });
    }
  });

  it('is shown with the first loss, what was skipped, and the smoothed speed of its own time alone, of the time between two in a flow', () => {
    // A step has eight tokens.
    const alone = new Table({ parallelism: 1 }, ['a']).progress(1, { loss: 5, milliseconds: 2 }).wait(50);
    expect(alone.state.shown.tokensPerSecond).to.equal(4_000);
    alone.progress(2, { loss: 4, milliseconds: 8, skipped: true });
    expect(alone.state.shown.tokensPerSecond).to.be.closeTo(3_100, 1e-9);
    expect(alone.state.shown).to.include({ firstLoss: 5, skippedSteps: 1 });
    expect(alone.state.shown.lastReport).to.include({ step: 2, loss: 4 });
    const flow = new Table({}, ['a', 'b']).wait(100).completeReduce();
    expect(flow.state.shown.tokensPerSecond).to.equal(8_000);
    expect(flow.wait(4).completeReduce().state.shown.tokensPerSecond).to.be.closeTo(6_200, 1e-9);
    expect(flow.wait(4).completeReduce().state.shown.tokensPerSecond).to.be.closeTo(4_940, 1e-9);
  });
});

describe('run machine: gradients that are not finite', () => {
  const skip = (table: Table, at: number): Table => table.progress(at, { skipped: true, nonFinite: 'model.layers.2.self_attn.q_proj.weight' });

  it('skip the step on record, and too many in a row end the run, naming step, layer and tensor', () => {
    const table = new Table({ parallelism: 1, maxNonFiniteSteps: 2 }, ['a']);
    skip(table, 1);
    expect(table.faults).to.deep.equal(['NON_FINITE']);
    expect(table.state).to.include({ phase: 'running', step: 1 });
    skip(skip(table.progress(2), 3), 4);
    expect(table.state.phase).to.equal('failed');
    expect(table.state.shown.error).to.deep.include({ code: 'NON_FINITE', context: { step: 4, tensor: 'model.layers.2.self_attn.q_proj.weight', layer: 2 } });
  });
});
