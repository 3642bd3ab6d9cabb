/**
 * Runs that share workers, over real Redis with fake workers: equal parts, strict priority, turns. Whatever a run has to give
 * up, and however often, it ends with the bits of an undisturbed run.
 */
import { join } from 'node:path';
import { expect } from 'chai';
import type { RunRecord } from '../../config/messages.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import type { Run } from '../../orchestrator/client.ts';
import type { StepLine } from '../../orchestrator/metrics.ts';
import type { Demand } from '../../orchestrator/share.ts';
import { FakeCluster } from '../support/fake-cluster.ts';
import { stateAt } from '../support/fake-worker.ts';
import { checkRun, readLines } from '../support/history.ts';
import { until } from '../support/wait.ts';

describe('orchestrator: runs that share workers', function () {
  this.timeout(120_000);
  let cluster: FakeCluster;
  const start = async (settings: Record<string, object> = {}): Promise<void> => {
    cluster = await FakeCluster.start(settings);
    await cluster.orchestrate();
  };
  afterEach(() => cluster.stop());

  const stepReached = (run: Run, step: number): Promise<void> => until(`step ${step} of ${run.id}`, async () => (await run.record()).step >= step, 40_000);
  const linesOf = (name: string): StepLine[] => readLines<StepLine>(join(cluster.config.runs, name, 'metrics.jsonl'));
  const quiet: Partial<RunSpecInput> = { evaluation: { every: 0, sequences: 1 }, checkpoint: { every: 0 } };
  const train = (name: string, changes: Partial<RunSpecInput>): Promise<Run> => cluster.client.train(cluster.spec(name, { ...quiet, ...changes }));

  const expectUndisturbed = async (run: Run): Promise<RunRecord> => {
    const record = await run.wait();
    const { seed, steps } = cluster.checked(run.id, { steps: record.steps });
    const state = stateAt(seed, steps);
    expect(record.weightsDigest).to.equal(state + state);
    expect(checkRun(join(cluster.config.runs, run.id), state + state).violations).to.deep.equal([]);
    expect(record.faults).to.deep.equal([]);
    return record;
  };
  const expectNothingLeft = async (): Promise<void> => {
    expect((await cluster.keys()).filter((key) => key === 'nn:claims' || key === 'nn:demands')).to.deep.equal([]);
  };

  it('two runs and two workers: one each, then both for the one that is left', async () => {
    await start();
    await Promise.all(['w1', 'w2'].map((id) => cluster.work(id, { shardMs: 4 })));
    const first = await train('first', { steps: 90, parallelism: 2 });
    await until('both workers', async () => (await first.record()).way?.workers === 2);
    const second = await train('second', { steps: 40, parallelism: 2 });
    await until('one each', async () => (await first.record()).way?.workers === 1 && (await second.record()).way?.workers === 1);
    for (const run of [first, second]) expect((await run.record()).way!.reason).to.match(/shares 2 workers with 1 other run/);
    const [atFirst, atSecond] = [(await first.record()).step, (await second.record()).step];
    await stepReached(second, atSecond + 8);
    expect((await first.record()).step).to.be.above(atFirst);
    await expectUndisturbed(second);
    const record = await expectUndisturbed(first);
    expect(record.way).to.include({ exchange: 'redis', workers: 2 });
    await expectNothingLeft();
  });

  for (const workers of [1, 2]) {
    it(`a run of priority 1 takes over within a step, and the first goes on after it (${workers} workers)`, async () => {
      await start();
      await Promise.all(['w1', 'w2'].slice(0, workers).map((id) => cluster.work(id, { shardMs: 8 })));
      const low = await train('low', { steps: 60, parallelism: workers });
      await stepReached(low, 10);
      const high = await train('high', { steps: 25, parallelism: workers, priority: 1 });
      await stepReached(high, 1);
      await until('low waits', async () => (await low.record()).way?.workers === 0);
      expect((await low.record()).way!.reason).to.match(/^waiting: .* of higher priority$/);
      await expectUndisturbed(high);
      await expectUndisturbed(low);
      const [first, last] = [linesOf('high')[0]!.atMs, linesOf('high').at(-1)!.atMs];
      // A step takes 32 ms: the first run ended the one at hand, and did no other until the second was through.
      const between = linesOf('low').filter(({ atMs }) => atMs > first && atMs < last);
      expect(between.length).to.be.at.most(1);
      await expectNothingLeft();
    });
  }

  it('one worker and three runs: they take turns, and each ends as if it were alone', async () => {
    await start({ orchestrator: { timeSliceMs: 400 } });
    await cluster.work('w1', { shardMs: 5 });
    const runs: Run[] = [];
    for (const name of ['one', 'two', 'three']) runs.push(await train(name, { steps: 60 }));
    await until('a reason', async () => (await Promise.all(runs.map((run) => run.record()))).some(({ way }) => way?.reason === 'waiting: 3 runs take turns on 1 worker'));
    for (const run of runs) await expectUndisturbed(run);
    const turns = runs.flatMap(({ id }) => linesOf(id).map(({ atMs }) => ({ id, atMs }))).sort((a, b) => a.atMs - b.atMs);
    const changes = turns.filter(({ id }, index) => index > 0 && id !== turns[index - 1]!.id).length;
    // 60 steps of 20 ms each are three turns or more.
    expect(changes).to.be.within(6, 30);
    await expectNothingLeft();
  });

  it('without time slices the second waits for the first to end', async () => {
    await start({ orchestrator: { timeSliceMs: 0 } });
    await cluster.work('w1', { shardMs: 3 });
    const [first, second] = [await train('first', { steps: 40 }), await train('second', { steps: 40 })];
    await expectUndisturbed(first);
    await expectUndisturbed(second);
    const ended = linesOf('first').at(-1)!.atMs;
    const other = linesOf('second');
    expect(other[0]!.atMs > ended || other.at(-1)!.atMs < linesOf('first')[0]!.atMs).to.equal(true);
  });

  it('runs of two orchestrators share alike, also when one of them is killed', async () => {
    await start();
    const other = await cluster.orchestrateApart();
    await Promise.all(['w1', 'w2'].map((id) => cluster.work(id, { shardMs: 5 })));
    const runs: Run[] = [];
    for (const name of ['one', 'two', 'three', 'four']) runs.push(await train(name, { steps: 40, parallelism: 2 }));
    await stepReached(runs[0]!, 5);
    await other.kill();
    for (const run of runs) expect(await run.wait()).to.include({ phase: 'completed', step: 40 });
    for (const run of runs) expect(checkRun(join(cluster.config.runs, run.id)).violations).to.deep.equal([]);
    await expectNothingLeft();
  });

  it('a demand and a claim that nobody drives any more keep nobody waiting', async () => {
    cluster = await FakeCluster.start();
    await cluster.work('w1');
    const ghost: Demand = {
      run: 'ghost', priority: 1, precision: 'fp32', most: 9, createdAtMs: 0, servedSinceMs: 0, waitingSinceMs: null, wasServed: true, home: 'w1', excluded: [],
    };
    await cluster.redis.queues.call('HSET', 'nn:demands', 'ghost', JSON.stringify(ghost));
    await cluster.redis.queues.call('HSET', 'nn:claims', 'w1', 'ghost');
    const run = await train('alive', { steps: 10 });
    await cluster.orchestrate();
    await expectUndisturbed(run);
    await expectNothingLeft();
  });
});
