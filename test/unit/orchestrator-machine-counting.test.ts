/**
 * What of the reports counts: each step once and in order, gradients that differ, steps that are skipped, and how fast it goes
 * (orchestrator/machine-counting.ts). Rollbacks, which a counted loss brings about, are in orchestrator-rollback.test.ts.
 */
import { expect } from 'chai';
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
    expect(table.faults.at(-1)).to.equal('REPLICA_DIVERGED');
    expect(table.counted).to.deep.equal([1]);
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
