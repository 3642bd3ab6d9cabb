/**
 * Real workers and the native library: Redis is replaced by an empty one in the middle of runs, `restore` brings them back,
 * and the weights are those of undisturbed runs, though no worker process was started again. Runs that share workers end so too.
 */
import { expect } from 'chai';
import type { Run } from '../../orchestrator/client.ts';
import { startCluster } from '../support/cluster.ts';
import type { Cluster } from '../support/cluster.ts';
import { tinySpec } from '../support/tiny-runs.ts';
import { until } from '../support/wait.ts';

describe('real workers: restore and sharing', function () {
  this.timeout(120_000);
  let cluster: Cluster;
  let weights: string | null;
  before(async () => {
    cluster = await startCluster({ workers: 2, settings: { orchestrator: { timeSliceMs: 500 } } });
    weights = (await (await cluster.client.train(tinySpec(cluster, 'alone', { steps: 60, parallelism: 1 }))).wait()).weightsDigest;
  });
  after(() => cluster.stop());

  const stepReached = (run: Run, step: number): Promise<void> => until(`step ${step} of ${run.id}`, async () => (await run.record()).step >= step, 60_000);

  for (const parallelism of [1, 2]) {
    it(`an empty Redis, restore: the same weights, by the same processes (parallelism ${parallelism})`, async () => {
      const name = `lost-${parallelism}`;
      const run = await cluster.client.train(tinySpec(cluster, name, { steps: 60, parallelism }));
      await stepReached(run, 20);
      const pids = cluster.supervisor.workers().map(({ pid }) => pid);
      await cluster.redis.kill();
      cluster.redis.queues.empty();
      await cluster.redis.start();
      const restored = await cluster.client.restore([name]);
      expect(restored).to.have.length(1);
      expect(restored[0]).to.deep.include({ run: name, outcome: 'queued', error: null });
      const record = await run.wait();
      expect(record.weightsDigest).to.equal(weights);
      expect(record.faultCounts['REPLICA_DIVERGED'] ?? 0).to.equal(0);
      expect(cluster.supervisor.workers().map(({ pid }) => pid)).to.deep.equal(pids);
    });
  }

  it('three runs on two workers, one of priority 1: turns, and the same weights', async () => {
    const runs: Run[] = [];
    for (const [name, priority] of [['one', 100], ['two', 100], ['three', 100]] as const) {
      runs.push(await cluster.client.train(tinySpec(cluster, name, { steps: 60, parallelism: 2, priority })));
    }
    await stepReached(runs[0]!, 5);
    runs.push(await cluster.client.train(tinySpec(cluster, 'first', { steps: 60, parallelism: 2, priority: 1 })));
    for (const run of runs.toReversed()) {
      const record = await run.wait();
      expect(record.weightsDigest, run.id).to.equal(weights);
      expect(record.faultCounts, run.id).to.deep.equal({});
    }
  });
});
