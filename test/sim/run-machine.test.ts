/**
 * The run machine under thousands of seeded worlds (world.ts): whatever goes wrong, each step is counted once, in order, with
 * the loss of the undisturbed run, and the run reaches its end. `NN_SIM_SEED=n` replays one seed with its log; `NN_SIM_SEEDS`
 * sets how many are tried.
 */
import { expect } from 'chai';
import { branchOf, checkpointName } from '../../config/branches.ts';
import { checkHistory } from '../support/history.ts';
import { outcomeOf } from './reference.ts';
import { CALM, World } from './world.ts';

const SEEDS = Number(process.env['NN_SIM_SEEDS'] ?? 1_500);
const ONLY = process.env['NN_SIM_SEED'];

function simulate(seed: number): World {
  const world = new World(seed);
  try {
    world.run();
    expectOutcome(world);
    const { spec, history, metrics } = world;
    const context = { steps: spec.steps, shards: spec.batch.shards, metrics: metrics.map(({ step }) => step), rollbacks: world.rollbacks };
    expect(checkHistory(history, context).violations.join('; ')).to.equal('');
    return world;
  } catch (error) {
    const log = ONLY === undefined ? '' : `\n${world.log.join('\n')}`;
    throw new Error(`seed ${seed} (replay with NN_SIM_SEED=${seed}): ${(error as Error).message}${log}`, { cause: error });
  }
}

/** The end of the undisturbed run of the same spec, unless it was cancelled. */
function expectOutcome({ finished, metrics, spec, rollbacks }: World): void {
  const { phase, error, step, weightsDigest, checkpoint } = finished!;
  if (phase === 'cancelled') return;
  const wanted = outcomeOf(spec);
  expect({ phase, step, counted: metrics.length }).to.deep.equal({ phase: wanted.phase, step: wanted.step, counted: wanted.step });
  expect(rollbacks.map(({ fromStep, toStep }) => ({ fromStep, toStep }))).to.deep.equal(wanted.rollbacks);
  expect(finished!.rollbacks).to.deep.equal(rollbacks);
  if (phase === 'failed') expect(error).to.include({ code: 'LOSS_SPIKE' });
  else {
    expect(weightsDigest).to.equal(digestOf(wanted.state));
    expect(checkpoint?.step).to.equal(spec.steps);
    expect(checkpoint?.directory).to.equal(`runs/sim.1/checkpoints/${checkpointName(spec.steps, branchOf(rollbacks, spec.steps))}`);
  }
}

/** The digest of a last version's weights, as the world has it. */
function digestOf(state: number): string {
  return ((Math.imul(state ^ 8, 0x9e3779b1) + 8) >>> 0).toString(16).padStart(8, '0').repeat(4);
}

describe('sim: the run machine keeps its promises', function () {
  this.timeout(Math.max(120_000, 20 * SEEDS));

  it('in a calm world', () => {
    for (let seed = 1; seed <= 50; seed++) {
      const world = new World(seed, CALM);
      world.run();
      expectOutcome(world);
      expect(world.finished!.faults.filter(({ error }) => error.code !== 'LOSS_SPIKE'), `seed ${seed}`).to.deep.equal([]);
    }
  });

  it(`under ${ONLY === undefined ? `${SEEDS} seeds of` : `seed ${ONLY} of`} drop, delay, double, reorder, crash, join and leave`, () => {
    if (ONLY !== undefined) {
      simulate(Number(ONLY));
      return;
    }
    const ends = { completed: 0, cancelled: 0, failed: 0, faults: 0, epochs: 0, rollbacks: 0 };
    for (let seed = 1; seed <= SEEDS; seed++) {
      const { finished } = simulate(seed);
      ends[finished!.phase as 'completed' | 'cancelled' | 'failed']++;
      ends.rollbacks += finished!.rollbacks.length;
      ends.faults += finished!.faults.length;
      ends.epochs += finished!.epoch;
    }
    // The worlds were in fact disturbed.
    expect(ends.completed).to.be.above(SEEDS / 2);
    expect(ends.faults).to.be.above(SEEDS / 4);
    expect(ends.epochs).to.be.above(SEEDS / 2);
    expect(ends.rollbacks).to.be.above(SEEDS / 4);
    expect(ends.failed).to.be.above(SEEDS / 50);
  });
});
