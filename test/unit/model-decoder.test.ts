/**
 * The decoder on the CPU: cached decoding equals the whole forward pass, in pieces and in batches, and a token depends on its seed
 * and position alone. Bad prompts are refused.
 */
import { expect } from 'chai';
import { errorCode } from '../../config/errors.ts';
import { PRESETS } from '../../config/presets.ts';
import type { ModelConfig } from '../../config/presets.ts';
import { Device } from '../../cuda/device.ts';
import { Decoder, decoderPlan } from '../../workers/model/decoder.ts';
import type { GenerateOptions } from '../../workers/model/decoder.ts';
import { Trainer } from '../../workers/model/trainer.ts';
import type { WeightSource } from '../../workers/model/trainer.ts';

const model: ModelConfig = { ...PRESETS.tiny, vocabSize: 67, hiddenSize: 48, queryHeads: 6, kvHeads: 2, headSize: 8, experts: 5, expertsPerToken: 2, ffnSize: 40 };
const text = Array.from({ length: 24 }, (_, at) => (at * 13 + 5) % 67);

describe('decoder', () => {
  let device: Device;
  let trainer: Trainer;
  let source: WeightSource;
  let decoder: Decoder;

  before(() => {
    device = Device.open({ library: 'cpu', index: 0, threads: 2 });
    trainer = new Trainer(device, {
      model, precision: 'fp32', recompute: 'none', sequences: 1, sequenceLength: 24, totalSteps: 30, separateShards: false,
      optimizer: {
        learningRate: 3e-3, minLearningRateRatio: 0.1, warmupSteps: 2, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1,
        auxLossWeight: 0.01, stateDtype: 'fp32',
      },
    });
    trainer.initialise(3);
    // A little training, so that the distribution is not flat.
    for (let step = 1; step <= 30; step++) {
      trainer.beginStep();
      trainer.accumulate({ inputs: Int32Array.from(text), targets: Int32Array.from([...text.slice(1), 0]) }, { loss: 1 / 24, aux: 0.01 });
      trainer.applyStep(step);
    }
    source = {
      model,
      has: () => true,
      read: (name, into) => trainer.readState('weight', trainer.parameters.find((parameter) => parameter.name === name)!, into),
    };
    decoder = new Decoder(device, { model, precision: 'fp32', capacity: 40, batch: 3, prefillTokens: 12 });
    decoder.loadWeights(source);
  });
  after(() => {
    decoder.close();
    trainer.close();
    device.close();
  });

  const generate = (change: Partial<GenerateOptions> = {}): number[][] =>
    decoder.generate({ prompts: [text.slice(0, 5)], maxTokens: 10, method: 'greedy', ...change });

  for (const pieceLength of [1, 5, 12]) {
    it(`gives the logits of the full forward within 1e-4, fed ${pieceLength} token(s) at a time`, () => {
      const whole = trainer.logits(Int32Array.from(text));
      const pieces = decoder.logits(text, pieceLength);
      let largest = 0;
      for (let i = 0; i < whole.length; i++) largest = Math.max(largest, Math.abs(whole[i]! - pieces[i]!));
      expect(largest).to.be.below(1e-4);
      expect(Math.max(...whole) - Math.min(...whole)).to.be.above(1);
    });
  }

  it('is greedy: each token is the largest logit of what came before', () => {
    const [tokens] = generate();
    const sequence = [...text.slice(0, 5), ...tokens!];
    const logits = decoder.logits(sequence, 12);
    for (let at = 4; at < sequence.length - 1; at++) {
      const row = [...logits.subarray(at * 67, (at + 1) * 67)];
      expect(row.indexOf(Math.max(...row))).to.equal(sequence[at + 1]);
    }
  });

  it('gives prompts of different lengths, side by side and in groups, what each gets alone', () => {
    const prompts = [text.slice(0, 3), text.slice(2, 19), text.slice(4, 5), text.slice(1, 10), text.slice(0, 12)];
    const alone = prompts.map((prompt) => generate({ prompts: [prompt] })[0]);
    expect(generate({ prompts })).to.deep.equal(alone);
  });

  it('samples the same tokens from the same seed, others from another, and the best ones when there is but one candidate', () => {
    const greedy = generate();
    for (const method of ['sample', 'top-k', 'top-p'] as const) {
      const hot = { method, temperature: 3, topP: 0.99 };
      const draws = Array.from({ length: 6 }, (_, seed) => generate({ ...hot, seed }));
      expect(generate({ ...hot, seed: 0 })).to.deep.equal(draws[0]);
      expect(new Set(draws.map((tokens) => JSON.stringify(tokens))).size, method).to.be.above(3);
      for (const token of draws.flat(2)) expect(token).to.be.within(0, 66);
    }
    expect(generate({ method: 'top-k', topK: 1, seed: 5 })).to.deep.equal(greedy);
    expect(generate({ method: 'top-p', topP: 1e-6, seed: 5 })).to.deep.equal(greedy);
    expect(generate({ method: 'sample', temperature: 1e-3, seed: 5 })).to.deep.equal(greedy);
    expect(() => generate({ method: 'top-k', topK: 1000 })).to.not.throw();
  });

  it('draws other random numbers for the same prompt in another place', () => {
    const prompts = Array.from({ length: 5 }, () => text.slice(0, 5));
    const tokens = generate({ prompts, method: 'sample', temperature: 5 });
    expect(new Set(tokens.map((each) => JSON.stringify(each))).size).to.equal(5);
  });

  it('ends a sequence at eos, which is not part of it, and lets the others go on', () => {
    const [whole] = generate();
    const eos = whole![3]!;
    const prompts = [text.slice(0, 5), text.slice(7, 9)];
    const [first, second] = generate({ prompts, eos });
    expect(first).to.deep.equal(whole!.slice(0, whole!.indexOf(eos)));
    const other = generate({ prompts: [prompts[1]!] })[0]!;
    expect(second).to.deep.equal(other.includes(eos) ? other.slice(0, other.indexOf(eos)) : other);
  });

  it('tells each token as it comes, and stops when it is asked to', () => {
    const seen: [number, number][] = [];
    const outputs = generate({ prompts: [text.slice(0, 2), text.slice(3, 9)], onToken: (prompt, token) => seen.push([prompt, token]), shouldStop: () => seen.length >= 6 });
    expect(seen).to.have.length(6);
    expect(outputs).to.deep.equal([0, 1].map((prompt) => seen.filter(([of]) => of === prompt).map(([, token]) => token)));
    expect(generate({ prompts: Array.from({ length: 7 }, () => [1]), shouldStop: () => true }).map(({ length }) => length)).to.deep.equal([1, 1, 1, 0, 0, 0, 0]);
    expect(generate({ maxTokens: 0 })).to.deep.equal([[]]);
    expect(generate({ prompts: [] })).to.deep.equal([]);
  });

  it('gives the same tokens however seldom they are read', () => {
    const seldom = new Decoder(device, { model, precision: 'fp32', capacity: 40, batch: 3, prefillTokens: 12, stepsPerRead: 8 });
    seldom.loadWeights(source);
    const prompts = [text.slice(0, 5), text.slice(3, 9), text.slice(7, 8), text.slice(2, 17)];
    const [whole] = generate();
    for (const change of [{}, { maxTokens: 1 }, { maxTokens: 2 }, { maxTokens: 25 }, { eos: whole![5]! }, { method: 'sample', temperature: 2, seed: 4 }] as const) {
      const told: [number, number][][] = [[], []];
      const tokens = [decoder, seldom].map((each, at) =>
        each.generate({ prompts, maxTokens: 13, method: 'greedy', ...change, onToken: (prompt, token) => told[at]!.push([prompt, token]) }),
      );
      expect(tokens[1]).to.deep.equal(tokens[0]);
      expect(told[1]).to.deep.equal(told[0]);
    }
    let count = 0;
    const stopped = seldom.generate({ prompts: prompts.slice(0, 2), maxTokens: 20, method: 'greedy', onToken: () => count++, shouldStop: () => count >= 6 });
    expect(stopped).to.deep.equal(generate({ prompts: prompts.slice(0, 2), maxTokens: 3 }));
    seldom.close();
  });

  it('plans 2 GB of cache for 262,144 positions of 6.9b in bf16, and 16 GB in all', () => {
    const options = { model: PRESETS['6.9b'], precision: 'bf16', capacity: 262_144, batch: 1, prefillTokens: 4096, stepsPerRead: 32 } as const;
    const plan = decoderPlan(options, 1e8);
    expect(plan.bytes.cache).to.equal(30 * 2 * 262_144 * 64 * 2);
    expect(plan.bytes.weights).to.be.within(13.76e9, 13.77e9);
    expect(plan.totalBytes).to.be.below(16.5e9);
    // Batch 64 at 1,024 positions is half as much cache.
    expect(decoderPlan({ ...options, capacity: 1024, batch: 64 }).bytes.cache).to.equal(plan.bytes.cache / 4);
  });

  it('fills its capacity to the last position, and refuses what is beyond', () => {
    expect(generate({ prompts: [text.slice(0, 20)], maxTokens: 21 })[0]).to.have.length(21);
    const refused = (change: Partial<GenerateOptions>): string => {
      try {
        generate(change);
      } catch (error) {
        return `${errorCode(error)}: ${(error as Error).message}`;
      }
      return 'nothing thrown';
    };
    expect(refused({ prompts: [text.slice(0, 20)], maxTokens: 22 })).to.match(/^DATA_INVALID: prompt 0 of 20 tokens and 22 new ones take 41 positions, but there are 40$/);
    expect(refused({ prompts: [[1], []] })).to.match(/^DATA_INVALID: prompt 1 is empty/);
    expect(refused({ prompts: [[1, 67]] })).to.match(/^DATA_INVALID: prompt 0 has the token 67, but the model's vocabulary has 67$/);
  });

  it('takes another NTK alpha for one generation, and the model’s own again for the next', () => {
    const before = decoder.logits(text, 12);
    const scaled = decoder.logits(text, 12, 8);
    let largest = 0;
    for (let i = 0; i < before.length; i++) largest = Math.max(largest, Math.abs(before[i]! - scaled[i]!));
    expect(largest).to.be.above(1e-3);
    expect(decoder.logits(text, 12)).to.deep.equal(before);
    const long = new Trainer(device, { ...evaluation, model: { ...model, ntkAlpha: 8 } });
    long.loadWeights(source);
    const whole = long.logits(Int32Array.from(text));
    long.close();
    for (let i = 0; i < whole.length; i++) expect(scaled[i]).to.be.closeTo(whole[i]!, 1e-4);
  });

  const evaluation = {
    model, precision: 'fp32', recompute: 'none', sequences: 1, sequenceLength: 24, totalSteps: 1, separateShards: false, evaluateOnly: true,
    optimizer: {
      learningRate: 1e-3, minLearningRateRatio: 0.1, warmupSteps: 0, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1, auxLossWeight: 0.01,
      stateDtype: 'fp32',
    },
  } as const;

  it('draws the weights of a run’s first version, and times its steps', () => {
    const options = { model, precision: 'fp32', capacity: 40, batch: 1 } as const;
    const [fresh, other] = [0, 1].map(() => new Decoder(device, { ...options, stepsPerRead: 8 })) as [Decoder, Decoder];
    fresh.initialise(9);
    trainer.initialise(9);
    other.loadWeights(source);
    expect(fresh.logits(text, 24)).to.deep.equal(other.logits(text, 24));
    // 1 token of the prompt, 4 steps of warm-up and those that are timed: 8 of them fit into the history, which is a ring.
    const [wanted] = fresh.generate({ prompts: [text], maxTokens: 14, method: 'greedy' });
    for (const count of [2, 3, 9]) {
      const { stepMs, prefillMs, tokens, isFinite, plannedBytes } = fresh.measure([text], count);
      expect(stepMs).to.be.within(1e-4, 1000);
      expect(prefillMs).to.be.within(1e-4, 1000);
      expect(tokens).to.deep.equal([wanted!.slice(Math.max(0, 5 + count - 8), 5 + count)]);
      expect(isFinite).to.equal(true);
      expect(plannedBytes).to.be.above(decoderPlan({ ...options, prefillTokens: 512, stepsPerRead: 8 }).bytes.weights);
    }
    expect(() => fresh.measure([text], 16)).to.throw('positions');
    expect(() => fresh.measure([text, text], 1)).to.throw('2 prompts');
    fresh.close();
    other.close();
  });

  it('is refused before anything is allocated when its cache does not fit', () => {
    let caught: unknown;
    try {
      void new Decoder(device, { model, precision: 'fp32', capacity: 1 << 30, batch: 64 });
    } catch (error) {
      caught = error;
    }
    expect(errorCode(caught)).to.equal('DEVICE_MEMORY');
    expect((caught as Error).message).to.match(/cache \d+\.\d GB/);
  });
});
