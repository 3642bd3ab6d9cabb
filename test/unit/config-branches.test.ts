/** Branches of a run that was rolled back: names, and the data that a step reads, are held to a model that plays the run step by step. */
import { expect } from 'chai';
import fc from 'fast-check';
import { branchOf, checkpointName, dataStep, parseCheckpointName, replicaAt } from '../../config/branches.ts';
import type { Return } from '../../config/branches.ts';
import { keys } from '../../config/keys.ts';

/** A run with rollbacks that go forward: each to the version of the one before or later, from beyond it. */
const returnsOf = fc.array(fc.tuple(fc.nat(8), fc.integer({ min: 1, max: 9 })), { maxLength: 5 }).map((jumps) => {
  let at = 0;
  return jumps.map(([on, back]): Return => ({ toStep: (at += on), fromStep: at + back }));
});

describe('branches', () => {
  it('each version is of the branch that computed it, and no step of a line reads data that an earlier one read', () => {
    fc.assert(fc.property(returnsOf, fc.integer({ min: 1, max: 12 }), (returns, more) => {
      // The model: data is read in order, and never again; a rollback forgets versions, but not the data that was read for them.
      const line: { branch: number; data: number }[] = [];
      let read = 0;
      const goTo = (step: number, branch: number): void => {
        while (line.length < step) line.push({ branch, data: ++read });
      };
      for (const [branch, { fromStep, toStep }] of returns.entries()) {
        goTo(fromStep, branch);
        line.length = toStep;
      }
      goTo(line.length + more, returns.length);
      for (const [index, { branch, data }] of line.entries()) {
        expect(branchOf(returns, index + 1)).to.equal(branch);
        expect(dataStep(returns, index + 1)).to.equal(data);
      }
    }));
  });

  it('a run that was never rolled back is as if there were no branches', () => {
    for (const returns of [undefined, []]) expect([branchOf(returns, 7), dataStep(returns, 7)]).to.deep.equal([0, 7]);
    expect(replicaAt('r', 7, 0)).to.deep.equal({ run: 'r', step: 7 });
    expect(replicaAt('r', 7, 2)).to.deep.equal({ run: 'r', step: 7, branch: 2 });
    const names = keys('p');
    expect(names.shardGradient('r', 7, 1, 0)).to.equal('p:x:r:shard:7:1');
    expect(names.reducedGradient('r', 7, 2)).to.equal('p:x:r:branch:2:sum:7');
    expect(names.shardGradient('r', 7, 1, 2).startsWith(names.exchangeOf('r'))).to.equal(true);
  });

  it('names of checkpoints tell step and branch, and nothing else is one', () => {
    fc.assert(fc.property(fc.nat(), fc.nat(100), (step, branch) => {
      expect(parseCheckpointName(checkpointName(step, branch))).to.deep.equal({ step, branch });
    }));
    expect(checkpointName(7, 0)).to.equal('step-7');
    for (const name of ['step-07', 'step-', 'step-1-branch-0', 'step-1-branch-01', 'step--1', 'step-1-branch-', '.step-1', 'step-1x']) expect(parseCheckpointName(name), name).to.equal(null);
  });
});
