/** The plan's arithmetic: ways, boundaries, what is due, which checkpoints stay. */
import { expect } from 'chai';
import { property, assert as check, integer } from 'fast-check';
import { parseRunSpec } from '../../config/run-spec.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import { checkpointsToDelete, chooseWay, evalDue, gradientBytes, mostWorkers, nextBoundary, stepEstimateMs } from '../../orchestrator/plan.ts';
import type { WayInput } from '../../orchestrator/plan.ts';
import { worker } from '../support/machine-table.ts';

const spec = (changes: Partial<RunSpecInput> = {}): RunSpec =>
  parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't', validation: 'v' }, steps: 100, batch: { shards: 4, sequences: 1, sequenceLength: 8 }, ...changes });
const way = (changes: Partial<WayInput> = {}): ReturnType<typeof chooseWay> =>
  chooseWay({
    run: 'r', spec: spec(), workers: [worker('a'), worker('b'), worker('c')], excluded: [], home: null, current: null, share: null,
    measurements: { shardComputeMs: null, exchangeBytesPerMs: null }, ...changes,
  });

describe('plan: the way of a step', () => {
  it('waits, and says for what', () => {
    expect(way({ workers: [] })).to.deep.include({ workers: [], reason: 'waiting: no live worker' });
    expect(way({ workers: [worker('a', { state: 'draining' })] }).reason).to.match(/draining/);
    expect(way({ spec: spec({ precision: 'bf16' }) }).reason).to.match(/bf16/);
    expect(way({ workers: [worker('a', { heldBy: 'other' })] }).reason).to.match(/another run \(other\)/);
    expect(way({ workers: [worker('a')], excluded: ['a/a-1'] }).reason).to.match(/differed/);
  });

  it('takes only what is its share, says why that is less, and demands what it could use', () => {
    const three = spec({ parallelism: 3 });
    expect(way({ spec: three, share: { workers: ['b', 'c'], reason: 'shares 3 workers with 1 other run' } })).to.deep.include({
      workers: ['b', 'c'], reason: 'parallelism is 3, but 2 workers are free; shares 3 workers with 1 other run',
    });
    expect(way({ share: { workers: [], reason: '2 runs take turns on 1 worker' } }).reason).to.equal('waiting: 2 runs take turns on 1 worker');
    const input = { run: 'r', spec: three, excluded: [], home: null, current: null, measurements: { shardComputeMs: null, exchangeBytesPerMs: null } };
    expect(mostWorkers({ ...input, workers: ['a', 'b', 'c', 'd'].map((id) => worker(id, { heldBy: 'other' })) })).to.equal(3);
    expect(mostWorkers({ ...input, workers: [] })).to.equal(1);
  });

  it('is local for one shard, one worker, parallelism 1, or while nothing was measured', () => {
    for (const changes of [
      { spec: spec({ batch: { shards: 1, sequences: 1, sequenceLength: 8 } }) }, { workers: [worker('a')] }, { spec: spec({ parallelism: 1 }) }, {},
    ] as Partial<WayInput>[]) {
      expect(way(changes)).to.include({ exchange: 'local' });
      expect(way(changes).workers.length).to.equal(1);
    }
  });

  it('takes the workers asked for, or those there are; the shared queue only if nobody else is there', () => {
    expect(way({ spec: spec({ parallelism: 2 }) })).to.deep.include({ exchange: 'redis', workers: ['a', 'b'], shared: false });
    expect(way({ spec: spec({ parallelism: 3 }) })).to.deep.include({ workers: ['a', 'b', 'c'], shared: true });
    expect(way({ spec: spec({ parallelism: 8 }) })).to.deep.include({ workers: ['a', 'b', 'c'], reason: 'parallelism is 8, but 3 workers are free' });
  });

  it('prefers home, then those in use, then holders of the replica', () => {
    const workers = [worker('a'), worker('b', { replica: { run: 'r', step: 3 } }), worker('c')];
    expect(way({ spec: spec({ parallelism: 1 }), workers }).workers).to.deep.equal(['b']);
    expect(way({ spec: spec({ parallelism: 1 }), workers, home: 'c' }).workers).to.deep.equal(['c']);
  });

  it('auto shares a step when that shortens it, and says why', () => {
    const fast = { shardComputeMs: 100, exchangeBytesPerMs: gradientBytes(spec()) };
    expect(way({ measurements: fast })).to.include({ exchange: 'redis' });
    expect(way({ measurements: fast }).reason).to.match(/measured/);
    expect(way({ measurements: { ...fast, exchangeBytesPerMs: gradientBytes(spec()) / 1_000 } })).to.include({ exchange: 'local' });
    expect(stepEstimateMs(spec(), 1, fast)).to.equal(400);
    expect(stepEstimateMs(spec(), 4, fast)).to.equal(101 + 6);
  });

  it('auto does not swing between ways of about one length', () => {
    const measurements = { shardComputeMs: 10, exchangeBytesPerMs: gradientBytes(spec()) / 2.4 };
    const alone = way({ measurements });
    expect(alone.exchange).to.equal('local');
    expect(way({ measurements, current: { exchange: 'redis', workers: ['a', 'b'], shared: false, reason: '' } }).exchange).to.equal('redis');
  });
});

describe('plan: boundaries and what is due', () => {
  it('a local job ends where something is due, always makes progress, and never passes the end', () => {
    const whole = (min: number, max: number) => integer({ min, max });
    check(property(whole(1, 200), whole(0, 20), whole(0, 20), whole(1, 50), whole(0, 199), (steps, saves, evals, limit, at) => {
      const version = Math.min(at, steps - 1);
      const each = spec({ steps, checkpoint: { every: saves }, evaluation: { every: evals } });
      const end = nextBoundary(each, version, limit);
      expect(end).to.be.within(version + 1, Math.min(steps, version + limit));
      for (let step = version + 1; step < end; step++) {
        if (saves > 0) expect(step % saves).not.to.equal(0);
        if (evals > 0) expect(step % evals).not.to.equal(0);
      }
    }));
  });

  it('evals come before the first step, every N and at the end, and only with validation data', () => {
    const each = spec({ evaluation: { every: 30 } });
    expect([0, 1, 30, 99, 100].map((version) => evalDue(each, version))).to.deep.equal([true, false, true, false, true]);
    expect(evalDue(spec({ data: { train: 't' } }), 0)).to.equal(false);
  });

  it('keeps the newest checkpoints and those of every Nth step', () => {
    const at = (...steps: number[]) => steps.map((step) => ({ directory: `d${step}`, step }));
    expect(checkpointsToDelete(spec({ checkpoint: { every: 10, keep: 2, keepEvery: 20 } }), at(10, 20, 30, 40, 50))).to.deep.equal(at(10, 30));
    expect(checkpointsToDelete(spec({ checkpoint: { every: 10, keep: 1 } }), at(10))).to.deep.equal([]);
  });
});
