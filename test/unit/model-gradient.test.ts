/**
 * The gradient whose experts' part the first microbatch stores: whatever is done between beginStep and applyStep, in whatever order,
 * gives the bits of a gradient that was zeroed as a whole and only added to; nothing of an earlier step is ever seen, NaN least.
 */
import { expect } from 'chai';
import { PRESETS } from '../../config/presets.ts';
import type { ModelConfig } from '../../config/presets.ts';
import { Device } from '../../cuda/device.ts';
import { Gradient } from '../../workers/model/gradient.ts';
import { expertRanges, layoutParameters } from '../../workers/model/parameters.ts';
import { Trainer } from '../../workers/model/trainer.ts';
import type { TrainerOptions } from '../../workers/model/trainer.ts';

/** Sizes with padding between the matrices, and more experts than the 24 slots of a batch reach. */
const odd: ModelConfig = { ...PRESETS.tiny, vocabSize: 61, hiddenSize: 36, queryHeads: 6, kvHeads: 2, headSize: 6, layers: 3, experts: 19, expertsPerToken: 2, ffnSize: 13 };

const options: TrainerOptions = {
  model: odd, precision: 'fp32', recompute: 'none', sequences: 2, sequenceLength: 6, totalSteps: 10, separateShards: false,
  optimizer: {
    learningRate: 3e-3, minLearningRateRatio: 0.1, warmupSteps: 2, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1, auxLossWeight: 0.01,
    stateDtype: 'fp32',
  },
};
const flatLength = layoutParameters(odd).flatLength;
const scale = { loss: 1 / 24, aux: 0.005 };

function batchOf(number: number): { inputs: Int32Array; targets: Int32Array } {
  const token = (at: number): number => (at * 7919 + number * 104_729 + ((at * at) % 31)) % odd.vocabSize;
  return { inputs: Int32Array.from({ length: 12 }, (_, at) => token(at)), targets: Int32Array.from({ length: 12 }, (_, at) => token(at + 1)) };
}

const read = (trainer: Trainer): string => {
  const values = new Float32Array(flatLength);
  trainer.readGradient(0, values);
  return Buffer.from(values.buffer).toString('base64');
};
const some = (seed: number, length = flatLength): Float32Array => Float32Array.from({ length }, (_, i) => ((i * seed) % 17) - 8);

/** What a worker may do with a step's gradient, and what it sees of it. */
const uses: Readonly<Record<string, (trainer: Trainer) => unknown[]>> = {
  'one microbatch': (trainer) => [trainer.accumulate(batchOf(1), scale).expertLoad, trainer.gradientDigest()],
  'three microbatches': (trainer) => [1, 2, 3].map((number) => trainer.accumulate(batchOf(number), scale).lossSum),
  'no microbatch, digested': (trainer) => [trainer.gradientDigest()],
  'no microbatch, read': (trainer) => [read(trainer)],
  'no microbatch, read in part, then one': (trainer) => {
    const end = new Float32Array(1000);
    trainer.readGradient(flatLength - 1000, end);
    trainer.accumulate(batchOf(1), scale);
    return [[...end]];
  },
  'another worker\'s sum added, alone': (trainer) => [trainer.addGradient(0, some(3))],
  'another worker\'s sum added in part': (trainer) => [trainer.addGradient(flatLength >> 1, some(3, 500))],
  'another worker\'s sum added before a microbatch': (trainer) => [trainer.addGradient(0, some(3)), trainer.accumulate(batchOf(1), scale).lossSum],
  'another worker\'s sum added after a microbatch': (trainer) => [trainer.accumulate(batchOf(1), scale).lossSum, trainer.addGradient(0, some(5))],
  'another worker\'s sum written': (trainer) => [trainer.writeGradient(0, some(3))],
  'another worker\'s sum written in part': (trainer) => [trainer.writeGradient(7, some(3, 900))],
  'read between microbatches': (trainer) => [trainer.accumulate(batchOf(1), scale).lossSum, read(trainer), trainer.accumulate(batchOf(2), scale).lossSum],
  'a microbatch that is refused, then none': (trainer) => {
    expect(() => trainer.accumulate({ inputs: new Int32Array(5), targets: new Int32Array(5) }, scale)).to.throw('does not fit the plan');
    return [];
  },
  'a microbatch that is refused, then one': (trainer) => {
    expect(() => trainer.accumulate({ inputs: new Int32Array(5), targets: new Int32Array(5) }, scale)).to.throw('does not fit the plan');
    return [trainer.accumulate(batchOf(1), scale).lossSum];
  },
  'evaluated before a microbatch': (trainer) => [trainer.evaluate(batchOf(4)), trainer.accumulate(batchOf(1), scale).lossSum],
  'begun twice': (trainer) => [trainer.beginStep(), trainer.accumulate(batchOf(1), scale).lossSum],
  'begun again after a microbatch': (trainer) => [trainer.accumulate(batchOf(2), scale).lossSum, trainer.beginStep(), trainer.accumulate(batchOf(1), scale).lossSum],
};

/** What may have been left in the buffers by what came before. */
const remains: Readonly<Record<string, (trainer: Trainer) => unknown>> = {
  'NaN everywhere': (trainer) => trainer.writeGradient(0, new Float32Array(flatLength).fill(NaN)),
  'an aborted step, of a NaN': (trainer) => [trainer.beginStep(), trainer.accumulate(batchOf(9), { loss: NaN, aux: NaN })],
  'an aborted step that had only begun, after NaN': (trainer) => [trainer.writeGradient(0, new Float32Array(flatLength).fill(NaN)), trainer.beginStep()],
};

describe('gradient', () => {
  let device: Device;
  const trainers: Trainer[] = [];
  const make = (change: Partial<TrainerOptions> = {}): Trainer => {
    const trainer = new Trainer(device, { ...options, ...change });
    trainers.push(trainer);
    trainer.initialise(7);
    return trainer;
  };
  /** Reading makes all of it zero at once, so that every microbatch after it adds. */
  const zeroAll = (trainer: Trainer): void => {
    trainer.beginStep();
    trainer.readGradient(0, new Float32Array(1));
  };

  before(() => {
    device = Device.open({ library: 'cpu', index: 0, threads: 2 });
  });
  afterEach(() => {
    for (const trainer of trainers.splice(0)) trainer.close();
  });
  after(() => device.close());

  for (const [left, leave] of Object.entries(remains)) {
    describe(`after ${left}`, () => {
      for (const [use, run] of Object.entries(uses)) {
        it(`${use}: the bits of a gradient that was zeroed as a whole`, () => {
          const [stored, zeroed] = [make(), make()];
          leave(stored);
          stored.beginStep();
          zeroAll(zeroed);
          expect(run(stored)).to.deep.equal(run(zeroed));
          // The second reads what the first leaves, without a digest in between.
          expect(stored.applyStep(1)).to.deep.equal(zeroed.applyStep(1)).and.include({ skipped: false, nonFinite: null });
          expect(read(stored)).to.equal(read(zeroed));
          expect(stored.gradientDigest()).to.equal(zeroed.gradientDigest());
          expect(stored.stateDigest()).to.equal(zeroed.stateDigest());
        });
      }
    });
  }

  it('leaves experts without a token a gradient of zero', () => {
    const trainer = make();
    trainer.writeGradient(0, new Float32Array(flatLength).fill(NaN));
    trainer.beginStep();
    const { expertLoad } = trainer.accumulate(batchOf(1), scale);
    const idle = expertLoad.flatMap((load, layer) => load.flatMap((count, expert) => (count === 0 ? [`model.layers.${layer}.block_sparse_moe.experts.${expert}.`] : [])));
    expect(idle).to.have.length.above(2);
    for (const { name, offset, length } of trainer.parameters) {
      if (!idle.some((prefix) => name.startsWith(prefix))) continue;
      const values = new Float32Array(length);
      trainer.readGradient(offset, values);
      expect(values.every((value) => Object.is(value, 0)), name).to.equal(true);
    }
  });

  it('lets nothing of a skipped step into the next', () => {
    const [skipping, zeroed] = [make(), make()];
    skipping.beginStep();
    skipping.accumulate(batchOf(1), { loss: NaN, aux: 0 });
    expect(skipping.applyStep(1)).to.include({ skipped: true, nonFinite: 'model.embed_tokens.weight' });
    skipping.beginStep();
    zeroAll(zeroed);
    for (const trainer of [skipping, zeroed]) trainer.accumulate(batchOf(2), scale);
    expect(skipping.applyStep(2)).to.deep.equal(zeroed.applyStep(2));
    expect(skipping.stateDigest()).to.equal(zeroed.stateDigest());
  });

  it('sums shards apart to the bits of shards that are read, added and zeroed as a whole, a shard without microbatches too', () => {
    const [apart, whole, sum] = [make({ separateShards: true }), make(), make()];
    apart.beginStep();
    apart.beginShard();
    apart.accumulate(batchOf(9), { loss: NaN, aux: NaN });
    apart.endShard();
    apart.beginStep();
    sum.beginStep();
    for (const numbers of [[1, 2], [], [3], []]) {
      apart.beginShard();
      zeroAll(whole);
      for (const number of numbers) for (const trainer of [apart, whole]) trainer.accumulate(batchOf(number), scale);
      apart.endShard();
      const values = new Float32Array(flatLength);
      whole.readGradient(0, values);
      sum.addGradient(0, values);
      expect(apart.gradientDigest()).to.equal(sum.gradientDigest());
    }
    expect(apart.applyStep(1)).to.deep.equal(sum.applyStep(1));
    expect(apart.stateDigest()).to.equal(sum.stateDigest());
  });

  it('stores what the experts have and nothing else', () => {
    const layout = layoutParameters(odd);
    const ranges = expertRanges(layout);
    const within = (at: number): boolean => ranges.some(({ offset, length }) => at >= offset && at < offset + length);
    for (const { name, offset, length } of layout.parameters) {
      expect([within(offset), within(offset + length - 1)], name).to.deep.equal(name.includes('.experts.') ? [true, true] : [false, false]);
    }
    const elements = layout.parameters.reduce((sum, { name, length }) => sum + (name.includes('.experts.') ? length : 0), 0);
    expect(ranges.reduce((sum, { length }) => sum + length, 0)).to.equal(elements);
    // One range a layer where nothing is padded.
    expect(expertRanges(layoutParameters(PRESETS['6.9b']))).to.have.length(PRESETS['6.9b'].layers);
  });

  it('zeroes the stored parts once, when something else than a microbatch asks for them', () => {
    const zeroed: [number, number][] = [];
    const kernels = { zeroGrad: ({ address }: { address: number }, length: number) => zeroed.push([address / 4, length]) } as unknown as ConstructorParameters<typeof Gradient>[0];
    const gradient = new Gradient(kernels, { address: 0, dtype: 'f32', length: 100 }, [{ offset: 0, length: 10 }, { offset: 10, length: 5 }, { offset: 40, length: 20 }]);
    const since = (): [number, number][] => zeroed.splice(0);
    const told = (): boolean => gradient.microbatch((accumulate) => accumulate);
    expect(since()).to.deep.equal([[0, 100]]);
    expect([told(), gradient.whole().length, since()]).to.deep.equal([true, 100, []]);
    gradient.clear();
    expect(since()).to.deep.equal([[15, 25], [60, 40]]);
    expect(() => gradient.microbatch(() => { throw new Error('no'); })).to.throw('no');
    expect([told(), told(), gradient.whole().length, told(), since()]).to.deep.equal([false, true, 100, true, []]);
    gradient.clear();
    since();
    gradient.whole();
    gradient.whole();
    expect([since(), told()]).to.deep.equal([[[0, 10], [10, 5], [40, 20]], true]);
  });
});
