/** A run spec is checked as a whole, with one line that names the field; what is left out is filled in. */
import { expect } from 'chai';
import { errorCode } from '../../config/errors.ts';
import { PRESETS, activeParameterCount, elementCount, parameterCount, parameterShapes, validateModel } from '../../config/presets.ts';
import { parseRunSpec, tokensPerStep } from '../../config/run-spec.ts';

const minimal = { name: 'run', model: 'tiny', data: { train: 'a.tokens' }, steps: 10, batch: { sequences: 2, sequenceLength: 32 } };

const refusal = (input: unknown): Error => {
  try {
    parseRunSpec(input, 'spec.json');
  } catch (error) {
    expect(errorCode(error)).to.equal('SPEC_INVALID');
    return error as Error;
  }
  throw new Error('not refused');
};

describe('config: run spec', () => {
  it('fills in every default, and is a fixed point of itself', () => {
    const spec = parseRunSpec(minimal);
    expect(spec).to.deep.include({ seed: 0, precision: 'fp32', parallelism: 'auto', priority: 100, compareDigestsEvery: 50, maxNonFiniteSteps: 5 });
    expect(spec.batch).to.deep.equal({ shards: 1, microBatches: 1, sequences: 2, sequenceLength: 32 });
    expect(spec.model).to.deep.equal(PRESETS.tiny);
    expect(parseRunSpec(JSON.parse(JSON.stringify(spec)))).to.deep.equal(spec);
    expect(tokensPerStep(spec)).to.equal(64);
  });

  it('takes a preset with some sizes changed, and sizes alone', () => {
    expect(parseRunSpec({ ...minimal, model: { preset: 'tiny', layers: 3 } }).model).to.deep.equal({ ...PRESETS.tiny, layers: 3 });
    const { preset: _none, ...sizes } = { preset: undefined, vocabSize: 16, hiddenSize: 8, layers: 1, queryHeads: 2, experts: 2, expertsPerToken: 1, ffnSize: 8 };
    expect(parseRunSpec({ ...minimal, model: sizes }).model).to.include({ headSize: 4, kvHeads: 1, ropeTheta: 10000 });
  });

  for (const [what, change, words] of [
    ['an unknown key', { colour: 'blue' }, ['unknown key', 'colour']],
    ['an unknown key inside', { batch: { ...minimal.batch, size: 3 } }, ['unknown key', 'batch.size']],
    ['a wrong type', { steps: 'ten' }, ['steps']],
    ['a number out of bounds', { steps: 0 }, ['steps']],
    ['a missing key', { data: {} }, ['data.train']],
    ['an unknown preset', { model: 'huge' }, ['model']],
    ['a name that is no file name', { name: '../up' }, ['name']],
    ['hidden size not divisible by heads', { model: { preset: 'tiny', hiddenSize: 66 } }, ['model.hiddenSize', '66']],
    ['more experts per token than experts', { model: { preset: 'tiny', expertsPerToken: 5 } }, ['model.expertsPerToken', '5']],
    ['key-value heads that do not divide', { model: { preset: 'tiny', kvHeads: 3 } }, ['model.kvHeads']],
    ['sizes without one', { model: { vocabSize: 16 } }, ['model.hiddenSize']],
    ['more warm-up than steps', { optimizer: { warmupSteps: 11 } }, ['optimizer.warmupSteps', '11']],
  ] as const) {
    it(`refuses ${what} in one line`, () => {
      const { message } = refusal({ ...minimal, ...change });
      expect(message).to.match(/^spec\.json: [^\n]+$/);
      for (const word of words) expect(message).to.include(word);
    });
  }

  it('refuses what is no object', () => {
    for (const input of [null, 7, 'spec', []]) refusal(input);
  });
});

describe('config: presets', () => {
  it('have the parameters that the design states', () => {
    expect(parameterCount(PRESETS['6.9b'])).to.equal(6_882_678_528);
    expect(Math.round(parameterCount(PRESETS.demo) / 1e5) / 10).to.equal(15.3);
    expect(Math.round(parameterCount(PRESETS.tiny) / 1e5) / 10).to.equal(0.3);
    expect(Math.round(activeParameterCount(PRESETS['6.9b']) / 1e8) / 10).to.be.within(1.7, 1.9);
  });

  it('name every tensor once, with a positive size', () => {
    for (const model of Object.values(PRESETS)) {
      const shapes = parameterShapes(model);
      expect(new Set(shapes.map(({ name }) => name)).size).to.equal(shapes.length);
      expect(shapes.every(({ shape }) => elementCount(shape) > 0)).to.equal(true);
      expect(() => validateModel(model, 'preset')).not.to.throw();
    }
  });
});
