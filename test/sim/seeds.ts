/**
 * One seed after another: runs its world and holds the end to what was promised. Called by run-machine.test.ts, directly and in
 * worker threads of which this file is the program, since ten thousand worlds are too many for one core.
 */
import { isMainThread, parentPort } from 'node:worker_threads';
import { expect } from 'chai';
import { branchOf, checkpointName } from '../../config/branches.ts';
import { checkHistory } from '../support/history.ts';
import { weightsDigest as digestOfWeights } from './chain.ts';
import { outcomeOf } from './reference.ts';
import { MAX_KILLS, World } from './world.ts';

/** Seeds from `first` to `last`. */
export interface Seeds {
  readonly first: number;
  readonly last: number;
}

/** What became of some seeds; `failure`: of the first that broke a promise, after which none was tried. */
export interface Ends {
  readonly completed: number;
  readonly cancelled: number;
  readonly failed: number;
  readonly faults: number;
  readonly epochs: number;
  readonly rollbacks: number;
  /** Runs whose work ended too many processes. */
  readonly fatal: number;
  readonly failure: string | null;
}

export const NO_ENDS: Ends = { completed: 0, cancelled: 0, failed: 0, faults: 0, epochs: 0, rollbacks: 0, fatal: 0, failure: null };

export function addEnds(a: Ends, b: Ends): Ends {
  const sum = (key: Exclude<keyof Ends, 'failure'>): number => a[key] + b[key];
  return {
    completed: sum('completed'), cancelled: sum('cancelled'), failed: sum('failed'), faults: sum('faults'), epochs: sum('epochs'), rollbacks: sum('rollbacks'),
    fatal: sum('fatal'), failure: a.failure ?? b.failure,
  };
}

/** Runs one world to its end. Throws an error that names the seed, with the world's log if it was to keep one. */
export function simulate(seed: number, log = false): World {
  const world = new World(seed, { log });
  try {
    world.run();
    expectOutcome(world);
    expectHistory(world);
    return world;
  } catch (error) {
    throw new Error([`seed ${seed} (replay with NN_SIM_SEED=${seed}): ${(error as Error).message}`, ...world.log].join('\n'), { cause: error });
  }
}

/** The end of the undisturbed run of the same spec, unless it was cancelled. */
export function expectOutcome({ finished, metrics, spec, rollbacks, curse, struck }: World): void {
  const { phase, error, step, weightsDigest, checkpoint } = finished!;
  if (phase === 'cancelled') return;
  if (error?.code === 'JOB_FATAL') {
    expect(struck, 'the same work ended so many processes').to.be.at.least(MAX_KILLS);
    expect(Number(error.context['step']), error.message).to.be.at.most(curse!.step);
    return;
  }
  const wanted = outcomeOf(spec);
  expect({ phase, step, counted: metrics.length }).to.deep.equal({ phase: wanted.phase, step: wanted.step, counted: wanted.step });
  expect(rollbacks.map(({ fromStep, toStep }) => ({ fromStep, toStep }))).to.deep.equal(wanted.rollbacks);
  expect(finished!.rollbacks).to.deep.equal(rollbacks);
  if (phase === 'failed') expect(error).to.include({ code: 'LOSS_SPIKE' });
  else {
    expect(weightsDigest).to.equal(digestOfWeights(wanted.state));
    expect(checkpoint?.step).to.equal(spec.steps);
    expect(checkpoint?.directory).to.equal(`runs/sim.1/checkpoints/${checkpointName(spec.steps, branchOf(rollbacks, spec.steps))}`);
  }
}

function expectHistory({ spec, history, metrics, rollbacks }: World): void {
  const context = { steps: spec.steps, shards: spec.batch.shards, metrics: metrics.map(({ step }) => step), rollbacks };
  expect(checkHistory(history, context).violations.join('; ')).to.equal('');
}

/** Runs these seeds until one fails. */
export function simulateAll({ first, last }: Seeds): Ends {
  let ends = NO_ENDS;
  for (let seed = first; seed <= last && ends.failure === null; seed++) {
    try {
      const { phase, faults, epoch, rollbacks, error } = simulate(seed).finished!;
      ends = addEnds(ends, { ...NO_ENDS, [phase]: 1, faults: faults.length, epochs: epoch, rollbacks: rollbacks.length, fatal: error?.code === 'JOB_FATAL' ? 1 : 0 });
    } catch (error) {
      ends = { ...ends, failure: (error as Error).message };
    }
  }
  return ends;
}

if (!isMainThread) parentPort!.on('message', (seeds: Seeds) => parentPort!.postMessage(simulateAll(seeds), []));
