/**
 * The trainer on the CPU: the same bits for every recomputation mode, thread count and way to sum shards; ignored targets; state
 * that is read out and written back; what does not fit is refused.
 */
import { createHash } from 'node:crypto';
import { expect } from 'chai';
import { errorCode } from '../../config/errors.ts';
import { PRESETS } from '../../config/presets.ts';
import type { ModelConfig } from '../../config/presets.ts';
import { Device } from '../../cuda/device.ts';
import { Trainer, memoryPlan } from '../../workers/model/trainer.ts';
import type { TrainerOptions } from '../../workers/model/trainer.ts';
import { expectSameState } from '../support/same-state.ts';

/** Odd sizes, and more experts than a token's choices reach in a short batch. */
const odd: ModelConfig = { ...PRESETS.tiny, vocabSize: 61, hiddenSize: 36, queryHeads: 6, kvHeads: 2, headSize: 6, layers: 3, experts: 5, expertsPerToken: 3, ffnSize: 20 };

const optimizer: TrainerOptions['optimizer'] = {
  learningRate: 3e-3, minLearningRateRatio: 0.1, warmupSteps: 2, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1, auxLossWeight: 0.01,
  stateDtype: 'fp32',
};
const options: TrainerOptions = {
  model: odd, precision: 'fp32', recompute: 'none', sequences: 2, sequenceLength: 19, optimizer, totalSteps: 10, separateShards: false,
};

/** A batch that is a function of its number; every seventh target is ignored where `ignore`. */
function batchOf(number: number, ignore = false, { model, sequences, sequenceLength }: TrainerOptions = options): { inputs: Int32Array; targets: Int32Array } {
  const token = (at: number): number => (at * 7919 + number * 104_729 + ((at * at) % 31)) % model.vocabSize;
  const length = sequences * sequenceLength;
  const inputs = Int32Array.from({ length }, (_, at) => token(at));
  return { inputs, targets: Int32Array.from({ length }, (_, at) => (ignore && at % 7 === 0 ? -100 : token(at + 1))) };
}

const scale = { loss: 1 / 38, aux: 0.01 };

describe('trainer', () => {
  let device: Device;
  const trainers: Trainer[] = [];
  const make = (change: Partial<TrainerOptions> = {}, on = device): Trainer => {
    const trainer = new Trainer(on, { ...options, ...change });
    trainers.push(trainer);
    trainer.initialise(7);
    return trainer;
  };
  /** Three steps of two shards; what they leave, bit for bit. */
  const train = (trainer: Trainer, microBatches = 1): string[] => {
    const digests: string[] = [];
    for (let step = 1; step <= 3; step++) {
      trainer.beginStep();
      for (let shard = 0; shard < 2; shard++) {
        trainer.beginShard();
        for (let micro = 0; micro < microBatches; micro++) trainer.accumulate(batchOf(step * 100 + shard * 10 + micro, true), { loss: scale.loss / 2 / microBatches, aux: 0.005 / microBatches });
        trainer.endShard();
      }
      digests.push(trainer.gradientDigest());
      trainer.applyStep(step);
    }
    return [...digests, trainer.stateDigest()];
  };

  before(() => {
    device = Device.open({ library: 'cpu', index: 0, threads: 2 });
  });
  afterEach(() => {
    for (const trainer of trainers.splice(0)) trainer.close();
  });
  after(() => device.close());

  it('draws the same weights from the same seed, others from another, and ones for norms', () => {
    const trainer = make();
    const first = trainer.stateDigest();
    const norm = trainer.parameters.find(({ name }) => name === 'model.norm.weight')!;
    const head = trainer.parameters.at(-1)!;
    const [ones, values] = [new Float32Array(norm.length), new Float32Array(head.length)];
    trainer.readState('weight', norm, ones);
    trainer.readState('weight', head, values);
    expect([...ones]).to.deep.equal([...ones].map(() => 1));
    const deviation = Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
    expect(deviation).to.be.within(0.019, 0.021);
    train(trainer);
    expect(trainer.stateDigest()).to.not.equal(first);
    trainer.initialise(7);
    expect(trainer.stateDigest()).to.equal(first);
    trainer.initialise(8);
    expect(trainer.stateDigest()).to.not.equal(first);
  });

  it('learns: the loss of a batch that is repeated falls', () => {
    const trainer = make();
    const batch = batchOf(1);
    const losses: number[] = [];
    for (let step = 1; step <= 10; step++) {
      trainer.beginStep();
      losses.push(trainer.accumulate(batch, scale).lossSum / 38);
      expect(trainer.applyStep(step)).to.include({ skipped: false, nonFinite: null });
    }
    expect(losses[0]).to.be.within(3.9, 4.4);
    expect(losses.at(-1)).to.be.below(losses[0]! - 0.5);
    const { lossSum, targetTokens } = trainer.evaluate(batch);
    expect(lossSum / targetTokens).to.be.below(losses.at(-1)!);
  });

  it('gives the same bits whatever the backward computes again', () => {
    const [none, swiglu, layer] = (['none', 'swiglu', 'layer'] as const).map((recompute) => train(make({ recompute })));
    expect(swiglu).to.deep.equal(none);
    expect(layer).to.deep.equal(none);
  });

  it('gives the same bits whatever layer mode keeps', () => {
    const nothing = train(make({ recompute: 'layer', keep: { attention: 0, gateUp: 0, h: 0 } }), 2);
    const kept = [[2, 0, 0], [3, 2, 0], [3, 3, 0], [0, 2, 0], [3, 3, 2], [3, 3, 3]] as const;
    for (const keep of kept.map(([attention, gateUp, h]) => ({ attention, gateUp, h }))) {
      expect(train(make({ recompute: 'layer', keep }), 2)).to.deep.equal(nothing);
    }
    expect(make({ recompute: 'layer' }).keep).to.deep.equal({ attention: 1, gateUp: 1, h: 1 });
  });

  it('gives the same bits on 1 and on 3 threads', () => {
    const one = train(make());
    const three = Device.open({ library: 'cpu', index: 0, threads: 3 });
    const trainer = new Trainer(three, options);
    trainer.initialise(7);
    expect(train(trainer)).to.deep.equal(one);
    trainer.close();
    three.close();
  });

  for (const microBatches of [1, 2]) {
    it(`gives shards of ${microBatches} microbatch(es) the same bits here as computed apart and added in order`, () => {
      const separateShards = microBatches > 1;
      const together = make({ separateShards });
      const apart = make({ separateShards });
      const sum = make({ separateShards });
      sum.beginStep();
      together.beginStep();
      const gradient = new Float32Array(apart.flatLength);
      for (let shard = 0; shard < 3; shard++) {
        apart.beginStep();
        for (const trainer of [together, apart]) {
          trainer.beginShard();
          for (let micro = 0; micro < microBatches; micro++) trainer.accumulate(batchOf(shard * 10 + micro), scale);
          trainer.endShard();
        }
        apart.readGradient(0, gradient);
        // In two pieces, as the exchange's chunks come.
        sum.addGradient(0, gradient.subarray(0, 1000));
        sum.addGradient(1000, gradient.subarray(1000));
      }
      expect(sum.gradientDigest()).to.equal(together.gradientDigest());
      apart.writeGradient(0, gradient.fill(0));
      sum.readGradient(0, gradient);
      apart.writeGradient(0, gradient);
      expect(apart.gradientDigest()).to.equal(sum.gradientDigest());
      expect(apart.applyStep(1)).to.deep.equal(together.applyStep(1));
      expect(apart.stateDigest()).to.equal(together.stateDigest());
    });
  }

  it('ignores targets of -100: no loss, no gradient, not counted', () => {
    const trainer = make();
    const batch = batchOf(3, true);
    trainer.beginStep();
    const report = trainer.accumulate(batch, { loss: 1, aux: 0 });
    expect(report.targetTokens).to.equal([...batch.targets].filter((target) => target !== -100).length).and.below(38);
    const nothing = { inputs: batch.inputs, targets: new Int32Array(38).fill(-100) };
    trainer.beginStep();
    const empty = trainer.accumulate(nothing, { loss: 1, aux: 0 });
    expect(empty).to.include({ lossSum: 0, targetTokens: 0 });
    const gradient = new Float32Array(trainer.flatLength);
    trainer.readGradient(0, gradient);
    expect(gradient.every((value) => value === 0)).to.equal(true);
    expect(trainer.evaluate(batch)).to.deep.equal({ lossSum: report.lossSum, targetTokens: report.targetTokens });
  });

  it('reports the expert load and the aux loss of each layer', () => {
    const report = make().accumulate(batchOf(1), scale);
    expect(report.expertLoad.map((load) => load.reduce((sum, count) => sum + count, 0))).to.deep.equal([114, 114, 114]);
    for (const aux of report.aux) expect(aux).to.be.within(0.9, 1.5);
  });

  it('agrees with finite differences of its own loss', () => {
    const trainer = make();
    const batch = batchOf(5);
    const auxWeight = 0.5;
    const loss = (): number => {
      const { lossSum, aux } = trainer.accumulate(batch, { loss: 1 / 38, aux: auxWeight });
      return lossSum / 38 + auxWeight * aux.reduce((sum, each) => sum + each, 0);
    };
    trainer.beginStep();
    loss();
    const experts = ['model.layers.0.block_sparse_moe.experts.2.w1.weight', 'model.layers.2.block_sparse_moe.experts.1.w2.weight'];
    for (const name of ['model.embed_tokens.weight', 'model.layers.1.self_attn.k_proj.weight', ...experts, 'lm_head.weight']) {
      const parameter = trainer.parameters.find((each) => each.name === name)!;
      const [weight, gradient] = [new Float32Array(parameter.length), new Float32Array(parameter.length)];
      trainer.readState('weight', parameter, weight);
      trainer.beginStep();
      loss();
      trainer.readGradient(parameter.offset, gradient);
      // Along the gradient itself the change is largest, so that float32's rounding of the loss matters least.
      const norm = Math.sqrt(gradient.reduce((sum, value) => sum + value * value, 0));
      const step = 0.02 / norm;
      const at = (sign: number): number => {
        trainer.writeState('weight', parameter, weight.map((value, i) => value + sign * step * gradient[i]! / 2));
        return loss();
      };
      const slope = (at(1) - at(-1)) / step;
      at(0);
      expect(slope / norm ** 2, name).to.be.within(0.97, 1.03);
    }
  });

  it('skips a step whose gradient is not finite, and changes nothing', () => {
    const trainer = make();
    train(trainer);
    const before = trainer.stateDigest();
    trainer.beginStep();
    trainer.accumulate(batchOf(1), scale);
    const at = (name: string): number => trainer.parameters.find((parameter) => parameter.name === name)!.offset;
    trainer.addGradient(at('lm_head.weight') + 7, Float32Array.of(NaN));
    trainer.addGradient(at('model.layers.1.self_attn.k_proj.weight') + 3, Float32Array.of(-Infinity));
    trainer.addGradient(at('model.layers.1.post_attention_layernorm.weight'), Float32Array.of(NaN));
    const outcome = trainer.applyStep(4);
    expect(outcome.skipped).to.equal(true);
    expect(outcome.gradientNorm).to.satisfy(Number.isNaN);
    expect(outcome.nonFinite).to.equal('model.layers.1.self_attn.k_proj.weight');
    expect(trainer.stateDigest()).to.equal(before);
  });

  for (const stateDtype of ['fp32', 'bf16'] as const) {
    it(`carries on to the same bits from a state that was read and written, m and v in ${stateDtype}`, () => {
      const change = { optimizer: { ...optimizer, stateDtype } };
      const [from, to] = [make(change), make(change)];
      try {
        train(from);
      } catch (error) {
        // A library may lack states in bf16; then it must say so.
        expect(stateDtype).to.equal('bf16');
        expect(errorCode(error)).to.equal('DEVICE_UNSUPPORTED');
        return;
      }
      to.initialise(1);
      for (const parameter of from.parameters) {
        for (const kind of ['weight', 'm', 'v'] as const) {
          const values = new Float32Array(parameter.length);
          from.readState(kind, parameter, values);
          to.writeState(kind, parameter, values);
        }
      }
      expect(to.stateDigest()).to.equal(from.stateDigest());
      expect(to.weightsDigest()).to.equal(from.weightsDigest());
      expect(train(to)).to.deep.equal(train(from));
    });
  }

  for (const stateDtype of ['fp32', 'bf16'] as const) {
    it(`holds in bf16 the same float32 weights from the same gradients, and gives and takes them to the bit, m and v in ${stateDtype}`, () => {
      // The CPU computes nothing in bf16, but has all that the state of such a trainer needs once the workspace is asked for in float32.
      const lending = Device.open({ library: 'cpu', index: 0, threads: 2 });
      lending.workspaceBytes = (sizes) => device.workspaceBytes(sizes, 'f32');
      const change = { optimizer: { ...optimizer, stateDtype } };
      const [whole, halves, other] = (['fp32', 'bf16', 'bf16'] as const).map((precision) => new Trainer(lending, { ...options, ...change, precision })) as [Trainer, Trainer, Trainer];
      try {
        for (const trainer of [whole, halves]) trainer.initialise(7);
        other.initialise(8);
        expectSameState([whole, halves, other], (at, step) => Math.sin(at * step) * 1e-2, { offset: 1003, length: 5000 });
        expect(() => halves.readFlat('weight', 0, new Uint16Array(2))).to.throw('float32');
      } finally {
        for (const trainer of [whole, halves, other]) trainer.close();
        lending.close();
      }
    });
  }

  it('digests weights as sha-256 over the tensors in their order, without padding', () => {
    const trainer = make();
    const hash = createHash('sha256');
    for (const parameter of trainer.parameters) {
      const values = new Float32Array(parameter.length);
      trainer.readState('weight', parameter, values);
      hash.update(new Uint8Array(values.buffer));
    }
    expect(trainer.weightsDigest()).to.equal(hash.digest('hex'));
  });

  it('evaluates with less memory, in part batches and in shorter sequences', () => {
    const trainer = make();
    const forward = make({ evaluateOnly: true });
    const batch = batchOf(2);
    const whole = trainer.evaluate(batch);
    expect(forward.evaluate(batch)).to.deep.equal(whole);
    const cut = (from: number, to: number): ReturnType<typeof batchOf> => ({ inputs: batch.inputs.slice(from, to), targets: batch.targets.slice(from, to) });
    const halves = forward.evaluate(cut(0, 19)).lossSum + forward.evaluate(cut(19, 38)).lossSum;
    expect(halves).to.be.closeTo(whole.lossSum, 1e-4);
    // In sequences of 5 tokens less context is seen, so the loss differs; four of them end before token 20.
    expect(forward.evaluate(cut(0, 20), 5).targetTokens).to.equal(20);
    expect(forward.evaluate(batch)).to.deep.equal(whole);
    expect(() => forward.evaluate(cut(0, 20))).to.throw('does not fit the plan');
    expect(() => forward.accumulate(batch, scale)).to.throw('no memory for gradients');
  });

  it('takes weights from a source', () => {
    const [from, to] = [make(), make()];
    train(from);
    to.loadWeights({
      model: odd,
      has: () => true,
      read: (name, into) => from.readState('weight', from.parameters.find((parameter) => parameter.name === name)!, into),
    });
    expect(to.stateDigest()).to.equal(from.stateDigest());
  });

  it('is refused before anything is allocated when it does not fit', () => {
    const large = { ...options, model: PRESETS['6.9b'], sequences: 64, sequenceLength: 4096 };
    let caught: unknown;
    try {
      make(large);
    } catch (error) {
      caught = error;
    }
    expect(errorCode(caught)).to.equal('DEVICE_MEMORY');
    const { message, context } = caught as { message: string; context: { neededBytes: number; freeBytes: number } };
    expect(context.neededBytes).to.be.at.least(memoryPlan(large).totalBytes);
    expect(context.freeBytes).to.be.within(1, context.neededBytes);
    expect(message).to.match(/^\d+\.\d GB are needed \(weights 27\.5 GB, .*, but .* has .* free; take smaller/);
  });
});
