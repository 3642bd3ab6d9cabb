/**
 * What is stopped while Redis is away ends all the same, soon, and nothing is lost: whoever comes when Redis is back goes on to the
 * weights of the undisturbed run.
 */
import { expect } from 'chai';
import { startCluster } from '../support/cluster.ts';
import type { Cluster } from '../support/cluster.ts';
import { QUICK } from '../support/stack.ts';
import { tinySpec } from '../support/tiny-runs.ts';
import { until } from '../support/wait.ts';

/** Milliseconds until the locks of runs are over; an orchestrator waits no longer for a Redis that is silent. */
const RUN_LOCK_MS = 1_500;
/** What a busy machine may add to that. */
const MARGIN_MS = 10_000;

describe('stopping while Redis is away', function () {
  this.timeout(60_000);
  let cluster: Cluster;
  const settings = { ...QUICK, worker: { ...QUICK['worker'], drainMs: 1_000 }, orchestrator: { ...QUICK['orchestrator'], runLockMs: RUN_LOCK_MS } };

  beforeEach(async () => {
    cluster = await startCluster({ workers: 1, settings });
  });
  afterEach(() => cluster.stop());

  const milliseconds = async (work: () => Promise<unknown>): Promise<number> => {
    const begun = performance.now();
    await work();
    return performance.now() - begun;
  };

  it('an idle orchestrator ends, and so do idle workers', async () => {
    await cluster.redis.kill();
    await new Promise((resolve) => setTimeout(resolve, 500)); // now every connection waits to be opened anew
    expect(await milliseconds(() => Promise.all([cluster.stopOrchestrator(), cluster.supervisor.stop()]))).to.be.below(RUN_LOCK_MS + MARGIN_MS);
  });

  it('an orchestrator and workers that are stopped amid a run end; others finish it, to the same weights', async () => {
    const spec = { steps: 400, checkpoint: { every: 100, keep: 2 }, parallelism: 1 };
    await cluster.client.train(tinySpec(cluster, 'calm', spec));
    const calm = await cluster.client.run('calm').ended();
    expect(calm.phase).to.equal('completed');
    const run = await cluster.client.train(tinySpec(cluster, 'cut', spec));
    await until('step 5', async () => (await run.record()).step >= 5);
    await cluster.redis.kill();
    expect(await milliseconds(() => Promise.all([cluster.stopOrchestrator(), cluster.supervisor.stop()]))).to.be.below(RUN_LOCK_MS + MARGIN_MS);
    await cluster.redis.start();
    expect((await run.record()).phase).to.equal('running');
    await cluster.startOrchestrator();
    await cluster.join(1);
    const { phase, weightsDigest } = await run.ended();
    expect({ phase, weightsDigest }).to.deep.equal({ phase: 'completed', weightsDigest: calm.weightsDigest });
  });
});
