/**
 * The two forms of master weights on every library: whatever is drawn, written or stepped, the halves hold the same float32 bits as the
 * float32 buffer, and their high halves are what is computed with. The staging memory is small, so that everything takes several pieces.
 */
import { expect } from 'chai';
import { Device, slice } from '../../cuda/device.ts';
import type { Tensor } from '../../cuda/device.ts';
import { Arena } from '../../workers/model/arena.ts';
import { layOut } from '../../workers/model/plan.ts';
import type { Request } from '../../workers/model/plan.ts';
import { masterWeights } from '../../workers/model/weights.ts';
import type { MasterWeights } from '../../workers/model/weights.ts';
import { forEachLibrary, numbers } from './harness.ts';
import * as reference from './reference.ts';

const FLAT = 64 * 50;
const STAGED = 64 * 3;
const bitsOf = (values: Float32Array): Uint32Array => new Uint32Array(values.buffer);

forEachLibrary('master weights', 4, (library) => {
  let device: Device;
  let arenas: Arena[];
  let whole: MasterWeights;
  let halves: MasterWeights;

  before(() => {
    device = Device.open({ library, index: 0, threads: 2 });
  });
  after(() => device.close());
  beforeEach(() => {
    const lasting = (name: string, dtype: Request['dtype'], length: number): Request => ({ name, kind: 'weights', dtype, length, from: 0, to: Infinity });
    const staging: Request = { name: 'passing', kind: 'activations', dtype: 'f32', length: STAGED, from: 0, to: 0 };
    const rest = [lasting('digest', 'u64', 2), lasting('m', 'f32', FLAT), lasting('v', 'f32', FLAT), lasting('gradient', 'f32', FLAT), lasting('scalars', 'f64', 5)];
    const plans = [[lasting('master', 'f32', FLAT)], [lasting('compute', 'bf16', FLAT), lasting('residue', 'u16', FLAT)]];
    arenas = plans.map((weights) => new Arena(device, layOut([...weights, ...rest], [staging]), ''));
    [whole, halves] = [masterWeights(device, arenas[0]!, 'fp32'), masterWeights(device, arenas[1]!, 'bf16')];
    for (const [at, weights] of [whole, halves].entries()) {
      // What was in the memory before must not matter.
      weights.write(0, new Float32Array(FLAT).fill(at + 0.3));
      weights.clear();
    }
  });
  afterEach(() => {
    for (const arena of arenas) arena.free();
  });

  const digestOf = (at: 0 | 1): bigint[] => {
    const words = new BigUint64Array(2);
    const digest = arenas[at]!.tensor('digest');
    [whole, halves][at]!.digest(digest);
    device.download(words, digest);
    return [...words];
  };
  const read = (weights: MasterWeights, offset = 0, length = FLAT): Uint32Array => {
    const values = new Float32Array(length);
    weights.read(offset, values);
    return bitsOf(values);
  };
  /** Both forms hold these bits, by read and by digest, and the halves compute with their rounding. */
  const expectBoth = (bits: Uint32Array): void => {
    for (const weights of [whole, halves]) expect(read(weights)).to.deep.equal(bits);
    expect(digestOf(1)).to.deep.equal(digestOf(0));
    const rounded = new Uint16Array(FLAT);
    device.download(rounded, halves.compute);
    expect(rounded).to.deep.equal(Uint16Array.from(bits, (word) => reference.halves(word).high));
  };

  it('begin at zero once cleared', () => {
    expectBoth(new Uint32Array(FLAT));
  });

  it('are drawn to the same bits, each element by its place in the whole range', () => {
    const range = { offset: 7, length: 1001 };
    for (const weights of [whole, halves]) weights.draw(range, 42, 7, 0.02);
    const bits = read(whole);
    expect(new Set(bits.subarray(7, 1008)).size).to.be.above(990);
    expect([...bits.subarray(0, 7), ...bits.subarray(1008)].every((word) => word === 0)).to.equal(true);
    expectBoth(bits);
  });

  it('come back as they were written, at any place', () => {
    const all = new Float32Array(FLAT);
    for (const [offset, length] of [[0, FLAT], [64, STAGED], [1, 2 * STAGED + 1], [FLAT - 5, 5], [9, 0]] as const) {
      const values = numbers(length, offset + 1);
      // Ties, the largest number, subnormals, a negative zero, infinities.
      bitsOf(values).set([0x3f808000, 0xbf818000, 0x7f7fffff, 0x8000, 0x80000001, 0x80000000, 0xff800000].slice(0, length));
      all.set(values, offset);
      for (const weights of [whole, halves]) {
        weights.write(offset, values);
        expect(read(weights, offset, length)).to.deep.equal(bitsOf(values));
      }
    }
    expectBoth(bitsOf(all));
  });

  it('take the same steps of AdamW', () => {
    for (const [at, weights] of [whole, halves].entries()) {
      const arena = arenas[at]!;
      weights.draw({ offset: 0, length: FLAT }, 1, 2, 1);
      const [m, v, gradient, scalars] = ['m', 'v', 'gradient', 'scalars'].map((name) => arena.tensor(name)) as [Tensor, Tensor, Tensor, Tensor];
      for (const tensor of [m, v]) device.kernels.zeroGrad(tensor, FLAT);
      const [control, schedule] = [slice(scalars, 0, 3), slice(scalars, 3, 2)];
      for (let step = 1; step <= 5; step++) {
        device.upload(gradient, numbers(FLAT, step, 0.1));
        device.upload(scalars, Float64Array.of(1, 0.7, 0, 3e-3, step));
        const { parameter, residue } = weights.range({ offset: 64, length: FLAT - 128 });
        const [first, second, given] = [m, v, gradient].map((tensor) => slice(tensor, 64, FLAT - 128)) as [Tensor, Tensor, Tensor];
        device.kernels.adamwStep(parameter, residue, first, second, given, control, schedule, FLAT - 128, 0.9, 0.95, 1e-8, 0.1, 'f32', at === 0 ? 'f32' : 'bf16');
      }
    }
    expectBoth(read(whole));
  });
});
