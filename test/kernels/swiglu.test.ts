/**
 * SwiGLU is in two places of the CPU library: kernels of its own, and the epilogues of the experts' products. Both must be the same
 * function, bit for bit, and neither may make a NaN of finite numbers.
 */
import { expect } from 'chai';
import type { Device, Tensor, TypedArray } from '../../cuda/device.ts';
import { numbers } from './harness.ts';
import { forEachInstructionSet } from './products.ts';

/** Gates where exp overflows, underflows or is nothing, nearly the largest there are, and a sweep between. */
const GATES = Float32Array.from([
  0, -0, 1e-45, -1e-45, 87.33654, -87.33654, -87.3366, 88.37, -88.37, 88.73, -88.73, -104, 1e4, -1e4, 1e30, -1e30, 1e38, -1e38, 3.4e38, -3.4e38,
  ...Array.from({ length: 500 }, (_, i) => (i - 250) * 0.43),
]);

/** One expert, one choice: slot t is token t. */
function oneExpert(device: Device, T: number, slotWeight: number) {
  const place = (values: TypedArray): Tensor => {
    const tensor = device.allocate(values instanceof Int32Array ? 'i32' : 'f32', values.length);
    device.upload(tensor, values);
    return tensor;
  };
  const fetch = (tensor: Tensor): Float32Array => {
    const values = new Float32Array(tensor.length);
    device.download(values, tensor);
    return values;
  };
  const identity = place(Int32Array.from({ length: T }, (_, t) => t));
  return { place, fetch, identity, offsets: place(Int32Array.of(0, T)), slotWeight: place(new Float32Array(T).fill(slotWeight)), make: (length: number) => device.allocate('f32', length) };
}

/** The bits, with one word for every NaN. */
const bitsOf = (values: Float32Array): number[] => Array.from(values, (value, i) => (Number.isNaN(value) ? -1 : new Uint32Array(values.buffer)[i]!));

forEachInstructionSet('SwiGLU', ['plain', 'avx2', 'avx512'], (devices) => {
  for (const [what, H, F, x] of [
    ['numbers with outliers', 37, 61, numbers(50 * 37, 1, 3)], ['every kind of gate', 1, 19, GATES], ['infinities and NaN', 1, 33, Float32Array.of(Infinity, -Infinity, NaN)],
  ] as const) {
    it(`has the bits of swiglu_forward in moe_up_forward: ${what}`, () => {
      const device = devices[1]!;
      const { k, T } = { k: device.kernels, T: x.length / H };
      const { place, fetch, identity, offsets, make } = oneExpert(device, T, 1);
      const weights = H === 1 ? new Float32Array(2 * F).fill(1, 0, F).fill(-0.5, F) : numbers(2 * F * H, 2);
      const [h, gateUp, alone] = [make(T * F), make(T * 2 * F), make(T * F)];
      k.moeUpForward(h, gateUp, place(x), identity, offsets, place(weights), T, H, F, 1, 1, 'f32');
      k.swigluForward(alone, gateUp, T, F, 'f32');
      const got = fetch(h);
      expect(bitsOf(got)).to.deep.equal(bitsOf(fetch(alone)));
      if (!x.every(Number.isFinite)) return;
      expect(got.some(Number.isNaN), 'a NaN of finite numbers').to.equal(false);
      for (const [t, gate] of x.entries()) {
        if (H === 1 && gate < -104) expect(Math.abs(got[t * F]!), `gate ${gate}`).to.equal(0);
      }
    });
  }

  for (const stored of [true, false]) {
    it(`has the bits of swiglu_backward in moe_down_backward${stored ? ', and stores h' : ''}`, () => {
      const device = devices[1]!;
      const { k, H, F, T } = { k: device.kernels, H: 23, F: 45, T: GATES.length };
      const { place, fetch, identity, offsets, slotWeight, make } = oneExpert(device, T, 0.5);
      const gates = Float32Array.from({ length: T * 2 * F }, (_, i) => (i % (2 * F) < F ? GATES[Math.floor(i / (2 * F))]! : 0.3 + (i % 7)));
      const [gateUp, dout, weights] = [place(gates), place(numbers(T * H, 3)), place(numbers(H * F, 4))];
      const [h, dgateUp, again, dweight] = [make(T * F), make(T * 2 * F), make(T * F), make(T)];
      const workspace = device.allocate('u8', 1 << 20);
      device.setWorkspace(workspace);
      k.swigluForward(h, gateUp, T, F, 'f32');
      k.moeDownBackward(dgateUp, stored ? again : null, dweight, dout, gateUp, identity, slotWeight, identity, offsets, weights, T, H, F, 1, 1, 'f32');
      device.setWorkspace(null);
      const [dh, alone] = [make(T * F), make(T * 2 * F)];
      k.gemm(dh, dout, weights, T, F, H, 0, 0, 'f32', 'f32');
      k.scale(dh, dh, T * F, 0.5, 'f32');
      k.swigluBackward(alone, dh, gateUp, T, F, 'f32');
      const got = fetch(dgateUp);
      expect(bitsOf(got)).to.deep.equal(bitsOf(fetch(alone)));
      if (stored) expect(bitsOf(fetch(again))).to.deep.equal(bitsOf(fetch(h)));
      expect(got.some(Number.isNaN), 'a NaN of finite numbers').to.equal(false);
    });
  }
});
