/** The sampler: a pure function of (seed, step, shard, microbatch) that reads every window once an epoch. */
import { expect } from 'chai';
import * as fc from 'fast-check';
import { IGNORED, evaluationBatches, permute, sequenceStart, stepTargetTokens, trainingBatch, windowsOf } from '../../data/sampler.ts';
import type { TokenSource } from '../../data/sampler.ts';
import { expectError } from './data-helpers.ts';

/** Token at position i is i + 1, so that what was read tells where; multiples of `padEvery` are <pad>. */
const counting = (count: number, padEvery = 0): TokenSource => {
  const token = (at: number): number => (padEvery > 0 && at % padEvery === 0 ? 0 : at + 1);
  return {
    path: 'counting.tokens',
    count,
    padCount: padEvery > 0 ? Math.ceil(count / padEvery) : 0,
    read: (start, into) => {
      if (start < 0 || start + into.length > count) throw new Error(`read ${start}..${start + into.length} of ${count}`);
      for (let index = 0; index < into.length; index++) into[index] = token(start + index);
    },
  };
};

const seeds = fc.nat(0xffffffff);

describe('data: sampler', () => {
  it('permutes: every index goes to a different place, whatever the size, seed and epoch', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 700 }), seeds, fc.nat(2 ** 40), (size, seed, epoch) => {
        const places = new Set(Array.from({ length: size }, (_, index) => permute(index, size, seed, epoch)));
        expect(places.size).to.equal(size);
        for (const place of places) expect(place).to.be.within(0, size - 1);
      }),
    );
    expect(permute(2 ** 52 - 1, 2 ** 52, 1, 1)).to.be.within(0, 2 ** 52 - 1);
    for (const size of [2 ** 31, 2 ** 33 + 5, 2 ** 45 - 7]) {
      const places = Array.from({ length: 500 }, (_, index) => permute(size - 1 - index, size, 3, 9));
      expect(new Set(places).size).to.equal(500);
      for (const place of places) expect(Number.isInteger(place) && place >= 0 && place < size).to.equal(true);
    }
  });

  it('looks random: neighbours are scattered, and places are hit evenly', () => {
    const size = 1000;
    let near = 0;
    for (let index = 1; index < size; index++) if (Math.abs(permute(index, size, 5, 0) - permute(index - 1, size, 5, 0)) <= 10) near++;
    expect(near).to.be.below(50); // about 20 are expected
    const firsts = Array.from({ length: 10 }, () => 0);
    for (let epoch = 0; epoch < 2000; epoch++) firsts[permute(0, 10, 7, epoch)]!++;
    for (const hits of firsts) expect(hits).to.be.within(130, 270); // 200 expected, sigma 13
  });

  it('reads each window once an epoch, inside the file', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 40 }), fc.integer({ min: 1, max: 3000 }), seeds, fc.nat(5), (sequenceLength, extra, seed, epoch) => {
        const source = counting(sequenceLength + extra);
        const { windows } = windowsOf(source, sequenceLength);
        const starts = Array.from({ length: windows }, (_, index) => sequenceStart(source, seed, sequenceLength, epoch * windows + index)).sort((a, b) => a - b);
        const shift = starts[0]!;
        expect(shift).to.be.within(0, sequenceLength - 1);
        expect(starts).to.deep.equal(starts.map((_, index) => shift + index * sequenceLength));
        expect(starts.at(-1)! + sequenceLength + 1).to.be.at.most(source.count);
        // What an epoch leaves out at both ends is less than two windows.
        expect(source.count - windows * sequenceLength).to.be.at.most(2 * sequenceLength);
      }),
    );
  });

  it('is pure, and other seeds and epochs give another order', () => {
    const source = counting(5000);
    const batch = { shards: 2, microBatches: 2, sequences: 3, sequenceLength: 16 };
    const read = (seed: number, step: number): number[] => [...trainingBatch(source, { seed, batch }, step, 1, 0).inputs];
    expect(read(1, 9)).to.deep.equal(read(1, 9));
    expect(read(1, 9)).to.not.deep.equal(read(2, 9));
    const { windows } = windowsOf(source, 16);
    const epoch = (seed: number, each: number): number[] => Array.from({ length: windows }, (_, index) => sequenceStart(source, seed, 16, each * windows + index));
    expect(epoch(1, 0)).to.not.deep.equal(epoch(1, 1));
    expect(epoch(1, 0)).to.not.deep.equal(epoch(2, 0));
    expect(new Set(Array.from({ length: 40 }, (_, each) => epoch(1, each)[0]! % 16)).size).to.be.above(5);
  });

  it('reads the same tokens in a step however it is cut into shards and microbatches', () => {
    const source = counting(9000);
    const step = (shards: number, microBatches: number, sequences: number): number[] => {
      const batch = { shards, microBatches, sequences, sequenceLength: 8 };
      const inputs: number[] = [];
      for (let shard = 0; shard < shards; shard++) {
        for (let micro = 0; micro < microBatches; micro++) inputs.push(...trainingBatch(source, { seed: 4, batch }, 6, shard, micro).inputs);
      }
      return inputs;
    };
    expect(step(4, 3, 2)).to.deep.equal(step(1, 1, 24));
    expect(step(2, 2, 6)).to.deep.equal(step(1, 1, 24));
  });

  it('gives targets that follow the inputs, and -100 for <pad>, and counts them', () => {
    const source = counting(4000, 7);
    const batch = { shards: 2, microBatches: 2, sequences: 4, sequenceLength: 32 };
    for (const step of [1, 2, 31]) {
      let counted = 0;
      for (const [shard, micro] of [[0, 0], [0, 1], [1, 0], [1, 1]] as const) {
        const { inputs, targets } = trainingBatch(source, { seed: 0, batch }, step, shard, micro);
        for (let index = 0; index + 1 < inputs.length; index++) {
          if ((index + 1) % 32 === 0) continue;
          expect(targets[index]).to.equal(inputs[index + 1] === 0 ? IGNORED : inputs[index + 1]);
        }
        counted += targets.filter((target) => target !== IGNORED).length;
      }
      expect(stepTargetTokens(source, { seed: 0, batch }, step)).to.equal(counted);
    }
    expect(stepTargetTokens(counting(4000), { seed: 0, batch }, 1)).to.equal(2 * 2 * 4 * 32);
  });

  it('evaluates the first windows in order, all rows of one shape', () => {
    const batches = [...evaluationBatches(counting(101), { sequences: 7, sequenceLength: 10, perBatch: 3 })];
    expect(batches.map(({ inputs }) => inputs.length)).to.deep.equal([30, 30, 30]);
    expect(batches.flatMap(({ targets }) => [...targets])).to.deep.equal([
      ...Array.from({ length: 70 }, (_, index) => index + 2),
      ...Array.from({ length: 20 }, () => IGNORED),
    ]);
    const all = [...evaluationBatches(counting(101), { sequences: 1000, sequenceLength: 10, perBatch: 10 })];
    expect(all).to.have.length(1);
    expect(all[0]!.targets.at(-1)).to.equal(101);
  });

  it('refuses a file that is too short for one sequence', () => {
    const batch = { shards: 1, microBatches: 1, sequences: 1, sequenceLength: 64 };
    const wanted = ['counting.tokens', 'has 64 tokens', 'sequenceLength + 1 = 65'];
    expectError(() => trainingBatch(counting(64), { seed: 0, batch }, 1, 0, 0), 'DATA_INVALID', ...wanted);
    expectError(() => stepTargetTokens(counting(64), { seed: 0, batch }, 1), 'DATA_INVALID', ...wanted);
    expectError(() => [...evaluationBatches(counting(64), { sequences: 1, sequenceLength: 64, perBatch: 1 })], 'DATA_INVALID', ...wanted);
    expect(trainingBatch(counting(65), { seed: 0, batch }, 1, 0, 0).targets[63]).to.equal(65);
  });
});
