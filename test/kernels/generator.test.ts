/** The generator of nn_random.h: known answers, its distribution, and that an element depends on its index alone. */
import { expect } from 'chai';
import type { Device } from '../../cuda/device.ts';
import { slice } from '../../cuda/device.ts';
import { forEachLibrary, openDevices } from './harness.ts';
import { normalQuantile, philox, uniform } from './generator-reference.ts';

const hex = (text: string): bigint[] => text.split(' ').map((word) => BigInt(`0x${word}`));

describe('the reference generator', () => {
  // The known answers that the Random123 library ships for philox4x32 with 10 rounds: counter, key, result.
  for (const [counter, key, result] of [
    ['00000000 00000000 00000000 00000000', '00000000 00000000', '6627e8d5 e169c58d bc57ac4c 9b00dbd8'],
    ['ffffffff ffffffff ffffffff ffffffff', 'ffffffff ffffffff', '408f276d 41c83b0e a20bc7c6 6d5451fd'],
    ['243f6a88 85a308d3 13198a2e 03707344', 'a4093822 299f31d0', 'd16cfe09 94fdcceb 5001e420 24126ea1'],
  ] as const) {
    it(`philox of ${counter} gives ${result}`, () => expect(philox(hex(counter), hex(key))).to.deep.equal(hex(result)));
  }

  it('the normal quantile has the values of the published test, and is odd', () => {
    // Wichura's check values, and a far tail.
    expect(normalQuantile(0.25)).to.be.closeTo(-0.6744897501960817, 1e-15);
    expect(normalQuantile(0.001)).to.be.closeTo(-3.090232306167813, 1e-14);
    expect(normalQuantile(1e-20)).to.be.closeTo(-9.262340089798409, 1e-13);
    for (const p of [0.5, 0.3, 0.07, 0.01, 2 ** -30]) expect(normalQuantile(1 - p)).to.be.closeTo(-normalQuantile(p), 1e-6);
  });

  it('uniform numbers fill [0, 1) evenly', () => {
    const bins = Array.from({ length: 16 }, () => 0);
    for (let i = 0n; i < 16000n; i++) bins[Math.floor(uniform(5n, 1n, i) * 16)]!++;
    const chiSquare = bins.reduce((sum, count) => sum + (count - 1000) ** 2 / 1000, 0);
    expect(chiSquare).to.be.below(37.7); // 15 degrees of freedom, 0.1%
  });
});

forEachLibrary('nn_random_normal', 3, (library) => {
  let devices: Device[] = [];
  before(() => {
    devices = openDevices(library);
  });
  after(() => {
    for (const device of devices) device.close();
  });

  function draw(device: Device, n: number, seed: number, stream: number, offset: number, deviation = 1): Float32Array {
    const x = device.allocate('f32', n);
    device.kernels.randomNormal(x, n, seed, stream, offset, deviation);
    const values = new Float32Array(n);
    device.download(values, x);
    device.free(x);
    return values;
  }

  it('has the moments of a normal distribution', () => {
    const n = 1_000_000;
    const x = draw(devices.at(-1)!, n, 1234, 5, 0);
    const moment = (power: number): number => x.reduce((sum, value) => sum + value ** power, 0) / n;
    // Five standard errors: 1, sqrt(2), sqrt(15), sqrt(96) over sqrt(n).
    expect(moment(1)).to.be.closeTo(0, 0.005);
    expect(moment(2)).to.be.closeTo(1, 0.0071);
    expect(moment(3)).to.be.closeTo(0, 0.0194);
    expect(moment(4)).to.be.closeTo(3, 0.049);
    const correlation = x.reduce((sum, value, i) => sum + value * (x[i + 1] ?? 0), 0) / n;
    expect(correlation).to.be.closeTo(0, 0.005);
    expect(x.reduce((most, value) => Math.max(most, Math.abs(value)), 0)).to.be.within(4, 6.5);
  });

  it('gives the same bits however the range is split', () => {
    const device = devices.at(-1)!;
    const n = 20011;
    const whole = draw(device, n, 7, 3, 0, 0.02);
    for (const cut of [1, 2, 4095, 10000, n - 1]) {
      const x = device.allocate('f32', n);
      device.kernels.randomNormal(slice(x, 0, cut), cut, 7, 3, 0, 0.02);
      device.kernels.randomNormal(slice(x, cut, n - cut), n - cut, 7, 3, cut, 0.02);
      const values = new Float32Array(n);
      device.download(values, x);
      device.free(x);
      expect(Buffer.from(values.buffer).equals(Buffer.from(whole.buffer)), `cut at ${cut}`).to.equal(true);
    }
  });

  it('another seed or stream gives other numbers, also where only high bits differ', () => {
    const device = devices[0]!;
    const first = draw(device, 64, 1, 1, 0);
    for (const [seed, stream, offset] of [[2, 1, 0], [1, 2, 0], [1 + 2 ** 32, 1, 0], [1, 1 + 2 ** 32, 0], [1, 1, 2 ** 33]] as const) {
      const other = draw(device, 64, seed, stream, offset);
      expect(other.filter((value, i) => value === first[i]).length, `${seed} ${stream} ${offset}`).to.be.below(2);
    }
  });
});
