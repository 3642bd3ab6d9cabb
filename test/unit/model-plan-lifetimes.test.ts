/**
 * The memory plan against what the network does: the kernels of a microbatch are listened to, on no device at all, and every buffer that
 * one of them is given must be alive, by the plan, at a time at which all the others of that call are, and no earlier than the call
 * before. So no buffer can have been given to another that is still needed, even where today's sizes would not make them meet.
 */
import { expect } from 'chai';
import { PRESETS } from '../../config/presets.ts';
import type { ModelConfig } from '../../config/presets.ts';
import { elementBytes } from '../../cuda/tensor.ts';
import type { Device, Kernels, Tensor } from '../../cuda/device.ts';
import type { Arena } from '../../workers/model/arena.ts';
import { Network } from '../../workers/model/network.ts';
import { layoutParameters, viewsOf } from '../../workers/model/parameters.ts';
import { keptOf, memoryPlan } from '../../workers/model/plan.ts';
import type { PlanOptions, PlannedBuffer } from '../../workers/model/plan.ts';
import { sizesOf } from '../../workers/model/sizes.ts';

const model: ModelConfig = { ...PRESETS.tiny, layers: 4 };
const SEQUENCES = 2;
const LENGTH = 16;
/** Further apart than any buffer is long: here none shares bytes with another, so that an address names its buffer. */
const APART = 2 ** 36;

interface Call {
  readonly kernel: string;
  /** Of the activations that it is given. */
  readonly buffers: readonly PlannedBuffer[];
}

/** What the kernels of a microbatch are given, in their order. `evaluate`: forward and loss only. */
function callsOf(options: PlanOptions): { calls: Call[]; activations: PlannedBuffer[] } {
  const buffers = [...memoryPlan(options).buffers.values()];
  const addressOf = new Map(buffers.map(({ name }, index) => [name, (index + 1) * APART]));
  const arena = {
    has: (name: string): boolean => addressOf.has(name),
    tensor: (name: string): Tensor => {
      const buffer = buffers.find((one) => one.name === name);
      if (buffer === undefined) throw new Error(`the memory plan has no buffer ${name}`);
      return { address: addressOf.get(name)!, dtype: buffer.dtype, length: buffer.length };
    },
  } as unknown as Arena;
  const calls: Call[] = [];
  const kernels = new Proxy({}, {
    get: (_, kernel) => (...values: unknown[]): void => {
      const given = values.flatMap((value) => {
        if (typeof value !== 'object' || value === null) return [];
        const { address, dtype, length } = value as Tensor;
        const buffer = buffers[Math.floor(address / APART) - 1]!;
        const end = (address % APART) + length * elementBytes(dtype);
        expect(end, `${String(kernel)} of ${buffer.name}`).to.be.at.most(buffer.length * elementBytes(buffer.dtype));
        return buffer.kind === 'activations' ? [buffer] : [];
      });
      calls.push({ kernel: String(kernel), buffers: given });
    },
  }) as Kernels;
  const nothing = (): void => undefined;
  const device = { kernels, recordsGraphs: false, upload: nothing, download: nothing } as unknown as Device;
  const layout = layoutParameters(model);
  const training = options.evaluateOnly !== true;
  const weights = arena.tensor(options.precision === 'bf16' ? 'compute' : 'master');
  const network = new Network(device, arena, {
    sizes: sizesOf(model, options.precision), sequenceLength: LENGTH, maximumTokens: SEQUENCES * LENGTH,
    kept: Array.from({ length: model.layers }, (_, layer) => keptOf(options, layer)), graph: false, ropeTheta: 10_000, ntkAlpha: 1,
    weights: viewsOf(model, layout, weights), gradients: training ? viewsOf(model, layout, arena.tensor('gradient')) : null,
  });
  const batch = { inputs: new Int32Array(SEQUENCES * LENGTH), targets: new Int32Array(SEQUENCES * LENGTH) };
  if (training) network.forwardAndBackward(batch, { loss: 1, aux: 1 }, true);
  else network.evaluate(batch, LENGTH);
  return { calls, activations: buffers.filter(({ kind }) => kind === 'activations') };
}

/** The first call that is given a buffer after its end, said in words; undefined when there is none. */
function firstLate(calls: readonly Call[]): string | undefined {
  let tick = 0;
  let latest = 'the start';
  for (const { kernel, buffers } of calls) {
    for (const { name, from } of buffers) {
      if (from > tick) [tick, latest] = [from, name];
    }
    const late = buffers.find(({ to }) => to < tick);
    if (late !== undefined) return `${kernel} is given ${late.name}, which ends at tick ${late.to}, after ${latest} began at ${tick}`;
  }
  return undefined;
}

const KEEPS = [undefined, ...[[0, 0, 0], [2, 0, 0], [3, 2, 0], [4, 4, 0], [4, 4, 2], [4, 4, 4], [0, 2, 1]].map(([attention, gateUp, h]) => ({ attention: attention!, gateUp: gateUp!, h: h! }))];

describe('memory plan and network', () => {
  for (const precision of ['fp32', 'bf16'] as const) {
    for (const recompute of ['none', 'swiglu', 'layer'] as const) {
      it(`no kernel of a microbatch in ${precision} is given what the plan has ended (recompute ${recompute}), and no buffer is planned for nothing`, () => {
        for (const keep of recompute === 'layer' ? KEEPS : [undefined]) {
          const { calls, activations } = callsOf({
            model, precision, recompute, keep, sequences: SEQUENCES, sequenceLength: LENGTH, optimizer: { stateDtype: 'fp32' }, separateShards: false,
          });
          expect(calls).to.have.length.above(model.layers * 30);
          expect(firstLate(calls), JSON.stringify(keep)).to.equal(undefined);
          const used = new Set(calls.flatMap(({ buffers }) => buffers.map(({ name }) => name)));
          expect(activations.map(({ name }) => name).filter((name) => !used.has(name)), JSON.stringify(keep)).to.deep.equal([]);
        }
      });
    }
  }

  it('the same of an evaluation', () => {
    const { calls } = callsOf({
      model, precision: 'bf16', recompute: 'none', sequences: SEQUENCES, sequenceLength: LENGTH, optimizer: { stateDtype: 'fp32' }, separateShards: false, evaluateOnly: true,
    });
    expect(firstLate(calls)).to.equal(undefined);
  });

  it('a buffer that ended too early would be noticed', () => {
    const buffer = (name: string, from: number, to: number): PlannedBuffer => ({ name, kind: 'activations', dtype: 'f32', length: 1, offset: 0, from, to });
    const [a, b] = [buffer('a', 0, 1), buffer('b', 2, 3)];
    expect(firstLate([{ kernel: 'one', buffers: [a] }, { kernel: 'two', buffers: [b] }, { kernel: 'three', buffers: [a, b] }])).to.equal(
      'three is given a, which ends at tick 1, after b began at 2',
    );
  });
});
