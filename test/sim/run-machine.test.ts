/**
 * The run machine under thousands of seeded worlds (world.ts): whatever goes wrong, each step is counted once, in order, with
 * the loss of the undisturbed run, and the run reaches its end. `NN_SIM_SEED=n` replays one seed with its log; `NN_SIM_SEEDS`
 * sets how many are tried.
 */
import { once } from 'node:events';
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';
import { expect } from 'chai';
import { CALM } from './faults.ts';
import { NO_ENDS, addEnds, expectOutcome, simulate } from './seeds.ts';
import type { Ends, Seeds } from './seeds.ts';
import { World } from './world.ts';

const SEEDS = Number(process.env['NN_SIM_SEEDS'] ?? 10_000);
const ONLY = process.env['NN_SIM_SEED'];
/** Seeds that a thread takes at a time: so few that the threads end together, and a failure is told soon. */
const PORTION = 200;

/** Runs the seeds 1 to `count` on all cores. */
async function simulateMany(count: number): Promise<Ends> {
  let ends = NO_ENDS;
  let first = 1;
  const next = (): Seeds | null => {
    if (first > count || ends.failure !== null) return null;
    const seeds = { first, last: Math.min(count, first + PORTION - 1) };
    first += PORTION;
    return seeds;
  };
  const serve = async (): Promise<void> => {
    const thread = new Worker(new URL('seeds.js', import.meta.url));
    try {
      for (let seeds = next(); seeds !== null; seeds = next()) {
        thread.postMessage(seeds, []);
        const [of] = (await once(thread, 'message')) as [Ends];
        ends = addEnds(ends, of);
      }
    } finally {
      await thread.terminate();
    }
  };
  await Promise.all(Array.from({ length: Math.min(4, availableParallelism(), Math.ceil(count / PORTION)) }, serve));
  return ends;
}

describe('sim: the run machine keeps its promises', function () {
  this.timeout(Math.max(300_000, 60 * SEEDS));

  it('in a calm world', () => {
    for (let seed = 1; seed <= 50; seed++) {
      const world = new World(seed, { faults: CALM });
      world.run();
      expectOutcome(world);
      expect(world.finished!.faults.filter(({ error }) => error.code !== 'LOSS_SPIKE'), `seed ${seed}`).to.deep.equal([]);
    }
  });

  it(`under ${ONLY === undefined ? `${SEEDS} seeds of` : `seed ${ONLY} of`} drop, delay, double, reorder, crash, join, leave, and a Redis that loses its last second`, async () => {
    if (ONLY !== undefined) {
      const { log } = simulate(Number(ONLY), true);
      console.log(log.join('\n'));
      return;
    }
    const ends = await simulateMany(SEEDS);
    if (ends.failure !== null) throw new Error(ends.failure);
    // The worlds were in fact disturbed.
    expect(ends.completed).to.be.above(SEEDS / 2);
    expect(ends.faults).to.be.above(SEEDS / 4);
    expect(ends.epochs).to.be.above(SEEDS / 2);
    expect(ends.rollbacks).to.be.above(SEEDS / 4);
    expect(ends.failed).to.be.above(SEEDS / 50);
    expect(ends.fatal).to.be.above(SEEDS / 200);
  });
});
