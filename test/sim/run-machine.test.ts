/**
 * The run machine under thousands of seeded worlds (world.ts): whatever goes wrong, each step is counted once, in order, with
 * the loss of the undisturbed run, and the run reaches its end. `NN_SIM_SEED=n` replays one seed with its log; `NN_SIM_SEEDS`
 * sets how many are tried.
 */
import { expect } from 'chai';
import { checkHistory } from '../support/history.ts';
import { CALM, World, chainAt } from './world.ts';

const SEEDS = Number(process.env['NN_SIM_SEEDS'] ?? 1_500);
const ONLY = process.env['NN_SIM_SEED'];

function simulate(seed: number): World {
  const world = new World(seed);
  try {
    world.run();
    expect(world.finished!.phase).to.be.oneOf(['completed', 'cancelled']);
    if (world.finished!.phase === 'completed') {
      expect(world.metrics.length).to.equal(world.spec.steps);
      expect(world.finished!.step).to.equal(world.spec.steps);
      expect(world.finished!.weightsDigest).to.equal(digestOfLast(world));
      expect(world.finished!.checkpoint?.step).to.equal(world.spec.steps);
    }
    const { spec, history, metrics } = world;
    const context = { steps: spec.steps, shards: spec.batch.shards, metrics: metrics.map(({ step }) => step) };
    expect(checkHistory(history, context).violations.join('; ')).to.equal('');
    return world;
  } catch (error) {
    const log = ONLY === undefined ? '' : `\n${world.log.join('\n')}`;
    throw new Error(`seed ${seed} (replay with NN_SIM_SEED=${seed}): ${(error as Error).message}${log}`, { cause: error });
  }
}

/** What a calm world of the same length ends with. */
function digestOfLast(world: World): string {
  const state = chainAt(world.spec.steps);
  return ((Math.imul(state ^ 8, 0x9e3779b1) + 8) >>> 0).toString(16).padStart(8, '0').repeat(4);
}

describe('sim: the run machine keeps its promises', function () {
  this.timeout(Math.max(120_000, 20 * SEEDS));

  it('in a calm world', () => {
    for (let seed = 1; seed <= 50; seed++) {
      const world = new World(seed, CALM);
      world.run();
      expect(world.finished!.phase).to.equal('completed');
      expect(world.finished!.faults, `seed ${seed}`).to.deep.equal([]);
    }
  });

  it(`under ${ONLY === undefined ? `${SEEDS} seeds of` : `seed ${ONLY} of`} drop, delay, double, reorder, crash, join and leave`, () => {
    if (ONLY !== undefined) {
      simulate(Number(ONLY));
      return;
    }
    const ends = { completed: 0, cancelled: 0, faults: 0, epochs: 0 };
    for (let seed = 1; seed <= SEEDS; seed++) {
      const { finished } = simulate(seed);
      ends[finished!.phase as 'completed' | 'cancelled']++;
      ends.faults += finished!.faults.length;
      ends.epochs += finished!.epoch;
    }
    // The worlds were in fact disturbed.
    expect(ends.completed).to.be.above(SEEDS / 2);
    expect(ends.faults).to.be.above(SEEDS / 4);
    expect(ends.epochs).to.be.above(SEEDS / 2);
  });
});
