/**
 * The pure side of the model: where parameters lie, what the memory plan says for every preset, and the learning rate's schedule.
 */
import { expect } from 'chai';
import * as fc from 'fast-check';
import { PRESETS, elementCount, parameterCount, parameterShapes } from '../../config/presets.ts';
import type { ModelConfig } from '../../config/presets.ts';
import type { Recompute } from '../../config/run-spec.ts';
import { layoutParameters, viewsOf } from '../../workers/model/parameters.ts';
import { keptOf, memoryPlan, place, planWithin } from '../../workers/model/plan.ts';
import type { PlanOptions } from '../../workers/model/plan.ts';
import { learningRate } from '../../workers/model/schedule.ts';

const options = (model: ModelConfig, change: Partial<PlanOptions> = {}): PlanOptions => ({
  model, precision: 'fp32', recompute: 'swiglu', sequences: 2, sequenceLength: 16, optimizer: { stateDtype: 'fp32' }, separateShards: false, ...change,
});

describe('parameter layout', () => {
  it('counts 6,882,678,528 parameters for 6.9b, 15.3 million for demo', () => {
    expect(parameterCount(PRESETS['6.9b'])).to.equal(6_882_678_528);
    expect(Math.round(parameterCount(PRESETS.demo) / 1e5)).to.equal(153);
    const { parameters } = layoutParameters(PRESETS['6.9b']);
    expect(parameters.reduce((sum, { length }) => sum + length, 0)).to.equal(6_882_678_528);
  });

  // Odd sizes, so that nothing is aligned by luck.
  const odd: ModelConfig = { ...PRESETS.tiny, vocabSize: 97, hiddenSize: 30, queryHeads: 3, headSize: 10, experts: 3, ffnSize: 7 };

  it('starts each group at 64 elements and pads nothing inside a group', () => {
    const layout = layoutParameters(odd);
    const at = new Map(layout.parameters.map((parameter) => [parameter.name, parameter]));
    const end = (name: string): number => at.get(name)!.offset + at.get(name)!.length;
    const layer = 'model.layers.1.';
    for (const name of ['model.embed_tokens.weight', `${layer}input_layernorm.weight`, `${layer}self_attn.q_proj.weight`, `${layer}self_attn.o_proj.weight`,
      `${layer}block_sparse_moe.gate.weight`, `${layer}block_sparse_moe.experts.0.w1.weight`, `${layer}block_sparse_moe.experts.0.w2.weight`, 'lm_head.weight']) {
      expect(at.get(name)!.offset % 64, name).to.equal(0);
    }
    expect(at.get(`${layer}self_attn.k_proj.weight`)!.offset).to.equal(end(`${layer}self_attn.q_proj.weight`));
    expect(at.get(`${layer}self_attn.v_proj.weight`)!.offset).to.equal(end(`${layer}self_attn.k_proj.weight`));
    const expert = `${layer}block_sparse_moe.experts.`;
    expect(at.get(`${expert}0.w3.weight`)!.offset).to.equal(end(`${expert}0.w1.weight`));
    expect(at.get(`${expert}1.w1.weight`)!.offset).to.equal(end(`${expert}0.w3.weight`));
    expect(at.get(`${expert}2.w2.weight`)!.offset).to.equal(end(`${expert}1.w2.weight`));
    expect(layout.parameters.map(({ name }) => name)).to.deep.equal(parameterShapes(odd).map(({ name }) => name));
  });

  it('covers the flat buffer with ranges of like decay: none for norms', () => {
    for (const model of [odd, ...Object.values(PRESETS)]) {
      const { parameters, ranges, flatLength } = layoutParameters(model);
      let end = 0;
      for (const { offset, length } of ranges) {
        expect(offset).to.equal(end);
        end += length;
      }
      expect(end).to.equal(flatLength);
      for (const { offset, length, shape, name } of parameters) {
        const range = ranges.find((each) => offset >= each.offset && offset + length <= each.offset + each.length);
        expect(range?.decay, name).to.equal(shape.length > 1);
      }
    }
  });

  it('gives the kernels whole matrices', () => {
    const layout = layoutParameters(odd);
    const views = viewsOf(odd, layout, { address: 4096, dtype: 'f32', length: layout.flatLength });
    expect(views.layers[1]!.qkv.length).to.equal((3 + 2) * 10 * 30);
    expect(views.layers[1]!.gateUp.length).to.equal(3 * 2 * 7 * 30);
    expect(views.layers[1]!.down.length).to.equal(3 * 7 * 30);
    expect(views.head.address).to.equal(4096 + 4 * layout.parameters.at(-1)!.offset);
    expect(elementCount(layout.parameters.at(-1)!.shape)).to.equal(views.head.length);
  });
});

describe('memory plan', () => {
  it('never lets two buffers that are alive at once share bytes, and keeps what is alive inside the arena', () => {
    const request = fc.record({ length: fc.nat(5000), from: fc.nat(40), life: fc.nat(15) });
    fc.assert(
      fc.property(fc.array(request, { maxLength: 60 }), (drawn) => {
        const requests = drawn.map(({ length, from, life }) => ({ dtype: 'f32' as const, length, from, to: from + life }));
        const { offsets, bytes } = place(requests);
        requests.forEach((a, i) => {
          expect(offsets[i]! % 256).to.equal(0);
          expect(offsets[i]! + 4 * a.length).to.be.at.most(bytes);
          for (let j = 0; j < i; j++) {
            const b = requests[j]!;
            const together = a.from <= b.to && b.from <= a.to && a.length > 0 && b.length > 0;
            const apart = offsets[i]! + 4 * a.length <= offsets[j]! || offsets[j]! + 4 * b.length <= offsets[i]!;
            expect(together && !apart).to.equal(false);
          }
        });
      }),
      { numRuns: 200 },
    );
  });

  it('needs less the more is computed again, and least for evaluation', () => {
    const bytes = (recompute: Recompute, evaluateOnly = false): number =>
      memoryPlan(options(PRESETS.demo, { recompute, evaluateOnly, sequences: 8, sequenceLength: 256 })).bytes.activations;
    expect(bytes('none')).to.be.above(bytes('swiglu'));
    expect(bytes('swiglu')).to.be.above(bytes('layer'));
    expect(bytes('layer')).to.be.above(bytes('layer', true));
    // A forward alone is the same whatever a backward would compute again.
    expect(bytes('none', true)).to.equal(bytes('layer', true));
  });

  it('states what 6.9b takes in bf16 at 16,384 tokens a microbatch', () => {
    const wanted = { precision: 'bf16', sequences: 8, sequenceLength: 2048 } as const;
    const plan = memoryPlan(options(PRESETS['6.9b'], { ...wanted, optimizer: { stateDtype: 'bf16' } }));
    const parameters = parameterCount(PRESETS['6.9b']);
    const near = (bytes: number, expected: number): void => {
      expect(bytes / expected).to.be.within(1, 1.0001);
    };
    near(plan.bytes.weights, 4 * parameters); // the two halves of float32
    expect(plan.buffers.get('compute')).to.include({ kind: 'weights', dtype: 'bf16' });
    expect(plan.buffers.get('residue')).to.include({ kind: 'weights', dtype: 'u16' });
    expect(plan.buffers.has('master')).to.equal(false);
    near(plan.bytes.gradients, 4 * parameters);
    near(plan.bytes.optimizer, 4 * parameters);
    near(memoryPlan(options(PRESETS['6.9b'], wanted)).bytes.optimizer, 8 * parameters);
    near(memoryPlan(options(PRESETS['6.9b'], { ...wanted, separateShards: true })).bytes.gradients, 8 * parameters);
    // gate and up of one layer: 16,384 tokens x 4 experts x 2 x 6144 x 2 bytes = 1.6 GB, kept for 30 layers.
    const gateUp = 16_384 * 4 * 2 * 6144 * 2;
    expect(plan.bytes.activations).to.be.within(30 * gateUp, 36 * gateUp);
    const whole = memoryPlan(options(PRESETS['6.9b'], { ...wanted, recompute: 'layer', optimizer: { stateDtype: 'bf16' } }));
    expect(whole.bytes.activations).to.be.below(5e9);
    expect(whole.totalBytes).to.be.below(141e9);
  });
});

describe('memory plan of 6.9b on a GPU with 139.8 GiB', () => {
  // What such a GPU has free for an arena once its context is made, less the trainer's spare 1.5 GB.
  const available = 150.1e9 - 2.1e9;
  const workspace = 1e9;
  const large = (sequences: number, sequenceLength: number, stateDtype: 'fp32' | 'bf16' = 'fp32'): PlanOptions =>
    options(PRESETS['6.9b'], { precision: 'bf16', recompute: 'layer', sequences, sequenceLength, optimizer: { stateDtype } });

  it('holds one sequence of 32,768, or eight of 4,096, beside float32 states', () => {
    for (const [sequences, sequenceLength] of [[1, 32_768], [8, 4096]] as const) {
      const plan = memoryPlan(large(sequences, sequenceLength), workspace);
      expect(plan.bytes.activations).to.be.within(6.8e9, 6.9e9);
      expect(plan.totalBytes).to.be.below(119e9);
    }
    expect(memoryPlan({ ...large(8, 4096), recompute: 'swiglu' }, workspace).totalBytes).to.be.above(available);
  });

  it('computes less again where memory is left: all attention is kept, gate and up of so many layers, and then h of so many', () => {
    const rows = [
      [1, 'fp32', 30, 30], [2, 'fp32', 30, 25], [4, 'fp32', 19, 1], [8, 'fp32', 7, 1], [2, 'bf16', 30, 30], [4, 'bf16', 30, 13], [8, 'bf16', 16, 1], [16, 'fp32', 2, 1],
    ] as const;
    for (const [sequences, stateDtype, gateUp, h] of rows) {
      const { plan, keep } = planWithin(large(sequences, 4096, stateDtype), workspace, available);
      expect(keep, `${sequences} sequences, ${stateDtype}`).to.deep.equal({ attention: 30, gateUp, h });
      expect(plan.totalBytes).to.be.at.most(available);
      const more = gateUp < 30 ? { attention: 30, gateUp: gateUp + 1, h } : { attention: 30, gateUp, h: h + 1 };
      if (h < 30) expect(memoryPlan({ ...large(sequences, 4096, stateDtype), keep: more }, workspace).totalBytes).to.be.above(available);
    }
  });

  it('keeps attention of fewer layers where less is left, and nothing where nothing is', () => {
    const { plan, keep } = planWithin(large(32, 4096), workspace, available);
    expect(keep.gateUp).to.equal(1);
    expect(keep.attention).to.be.within(2, 29);
    expect(plan.totalBytes).to.be.at.most(available);
    expect(planWithin(large(64, 4096), workspace, available).keep).to.deep.equal({ attention: 1, gateUp: 1, h: 1 });
    expect(planWithin({ ...large(1, 4096), recompute: 'swiglu' }, workspace, available).plan).to.deep.equal(memoryPlan({ ...large(1, 4096), recompute: 'swiglu' }, workspace));
  });

  it('never lets buffers of a plan that are alive at once share bytes, whatever is kept', () => {
    const small = options({ ...PRESETS.tiny, layers: 5 }, { recompute: 'layer' });
    for (const [attention, gateUp, h] of [[0, 0, 0], [3, 2, 0], [5, 4, 0], [2, 4, 0], [5, 5, 3], [2, 1, 4]] as const) {
      const keep = { attention, gateUp, h };
      const buffers = [...memoryPlan({ ...small, keep }).buffers.values()].filter(({ length }) => length > 0);
      const end = ({ offset, length, dtype }: (typeof buffers)[number]): number => offset + length * { f32: 4, i32: 4, u8: 1, f64: 8, u64: 8, i64: 8, u16: 2, bf16: 2 }[dtype];
      for (const [at, a] of buffers.entries()) {
        for (const b of buffers.slice(0, at)) {
          const together = a.from <= b.to && b.from <= a.to;
          if (together) expect(end(a) <= b.offset || end(b) <= a.offset, `${a.name} and ${b.name}`).to.equal(true);
        }
      }
      expect(keptOf({ ...small, keep }, 4)).to.equal('h');
    }
  });
});

describe('learning rate', () => {
  const schedule = { learningRate: 0.01, minLearningRateRatio: 0.1, warmupSteps: 3 };

  it('warms up linearly, then follows a cosine to the minimum', () => {
    const table = [
      [1, 0.0033333333333333335], [2, 0.006666666666666667], [3, 0.01], [4, 0.009554359905560885], [5, 0.008305704108364302],
      [6, 0.006501344202803416], [7, 0.0044986557971965855], [10, 0.001], [11, 0.001], [1000, 0.001],
    ] as const;
    for (const [step, rate] of table) expect(learningRate(schedule, 10, step)).to.be.closeTo(rate, 1e-15);
  });

  it('needs no warm-up, and stands at its base when warm-up is all there is', () => {
    expect(learningRate({ ...schedule, warmupSteps: 0 }, 10, 1)).to.be.within(0.0097, 0.01);
    expect(learningRate({ ...schedule, warmupSteps: 10 }, 10, 10)).to.equal(0.01);
    expect(() => learningRate(schedule, 10, 0)).to.throw(RangeError);
  });

  it('never rises after the warm-up nor falls below the minimum', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 500 }), fc.nat(100), fc.integer({ min: 1, max: 600 }), (total, warmupSteps, step) => {
        const of = (at: number): number => learningRate({ ...schedule, warmupSteps }, total, at);
        if (step > warmupSteps) expect(of(step + 1)).to.be.at.most(of(step));
        expect(of(step)).to.be.above(0).and.at.most(0.01);
      }),
    );
  });
});
