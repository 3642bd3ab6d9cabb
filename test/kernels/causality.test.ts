/**
 * A later token has no say in an earlier one, whatever it holds: NaN and infinity after a position leave every bit before it as it
 * was, in the attention kernels of the CPU, whose tiles hold several positions at once. The backward passes gradients the other way,
 * from a query to the keys before it, and is held to that.
 */
import { expect } from 'chai';
import type { Device, Kernels, Tensor, TypedArray } from '../../cuda/device.ts';
import { numbers } from './harness.ts';
import { forEachInstructionSet } from './products.ts';

/** Sizes as in nn.h: groups of 1, 3, 4 and 12 heads, in one tile of keys and in several. */
const SHAPES = [
  { B: 2, S: 21, Q: 2, G: 2, D: 24 }, { B: 1, S: 150, Q: 3, G: 1, D: 16 }, { B: 1, S: 135, Q: 4, G: 1, D: 64 }, { B: 2, S: 70, Q: 12, G: 1, D: 8 },
] as const;
type Shape = (typeof SHAPES)[number];
const POISONS = [NaN, Infinity];

/** Runs `call` on copies of the inputs and returns the output. */
function evaluate(device: Device, inputs: readonly TypedArray[], length: number, call: (kernels: Kernels, out: Tensor, inputs: Tensor[]) => void): Float32Array {
  const tensors = inputs.map((values) => {
    const tensor = device.allocate(values instanceof Int32Array ? 'i32' : 'f32', values.length);
    device.upload(tensor, values);
    return tensor;
  });
  const out = device.allocate('f32', length);
  try {
    call(device.kernels, out, tensors);
    const result = new Float32Array(length);
    device.download(result, out);
    return result;
  } finally {
    for (const tensor of [out, ...tensors]) device.free(tensor);
  }
}

/** A copy of `values`, rows of `width` in sequences of `rows`, in which `poison` fills the rows that are to be. */
const poisoned = (values: Float32Array, width: number, rows: number, poison: number, isPoisoned: (row: number, sequence: number) => boolean): Float32Array =>
  values.map((value, i) => (isPoisoned(Math.floor(i / width) % rows, Math.floor(i / width / rows)) ? poison : value));

/** Expects the same bits in the rows that are held to that, and that the poison reached some other row. */
function sameRows(got: Float32Array, want: Float32Array, width: number, isHeld: (row: number) => boolean, what: string): void {
  let reached = false;
  for (let row = 0; row < got.length / width; row++) {
    const bytes = (of: Float32Array): Buffer => Buffer.from(of.buffer, of.byteOffset + row * width * 4, width * 4);
    const isSame = bytes(got).equals(bytes(want));
    if (isHeld(row)) expect(isSame, `${what}, row ${row}`).to.equal(true);
    else reached ||= !isSame;
  }
  expect(reached, `${what}: the poison changed nothing at all`).to.equal(true);
}

/** Each shape with each poison after (or before) some positions. */
function forEachPoison(visit: (shape: Shape, position: number, poison: number) => void): void {
  for (const shape of SHAPES) {
    for (const position of [0, 5, 6, 7, 19, 63, 64, 127, 128].filter((at) => at < shape.S - 1)) {
      for (const poison of POISONS) visit(shape, position, poison);
    }
  }
}

const nameOf = ({ S, Q, G }: Shape, position: number, poison: number): string => `S=${S} Q=${Q} G=${G}, ${poison} from position ${position}`;

forEachInstructionSet('causality', ['plain', 'avx2', 'avx512'], (devices) => {
  it('flash_attention_forward: what comes later changes no bit', () => {
    forEachPoison((shape, position, poison) => {
      const { B, S, Q, G, D } = shape;
      const width = (Q + 2 * G) * D;
      const qkv = numbers(B * S * width, 1, 0.6);
      const later = poisoned(qkv, width, S, poison, (row) => row > position);
      const run = (input: Float32Array, want: 'out' | 'logSumExp'): Float32Array => {
        const device = devices[1]!;
        const other = device.allocate('f32', want === 'out' ? B * Q * S : B * S * Q * D);
        const length = want === 'out' ? B * S * Q * D : B * Q * S;
        const result = evaluate(device, [input], length, (k, out, [x]) =>
          want === 'out' ? k.flashAttentionForward(out, other, x!, B, S, Q, G, D, 'f32') : k.flashAttentionForward(other, out, x!, B, S, Q, G, D, 'f32'));
        device.free(other);
        return result;
      };
      const what = nameOf(shape, position, poison);
      sameRows(run(later, 'out'), run(qkv, 'out'), Q * D, (row) => row % S <= position, what);
      sameRows(run(later, 'logSumExp'), run(qkv, 'logSumExp'), 1, (row) => row % S <= position, what);
    });
  });

  it('attention_scores and attention_output: what comes later changes no bit', () => {
    forEachPoison((shape, position, poison) => {
      const { B, S, Q, G, D } = shape;
      const width = (Q + 2 * G) * D;
      const qkv = numbers(B * S * width, 2, 0.6);
      const later = poisoned(qkv, width, S, poison, (row) => row > position);
      const probability = numbers(B * Q * S * S, 3).map((value, i) => (i % S > Math.floor(i / S) % S ? 0 : value));
      const what = nameOf(shape, position, poison);
      const scores = (input: Float32Array): Float32Array =>
        evaluate(devices[1]!, [input], B * Q * S * S, (k, out, [x]) => k.attentionScores(out, x!, B, S, Q, G, D, 'f32'));
      sameRows(scores(later), scores(qkv), S, (row) => row % S <= position, what);
      const output = (input: Float32Array): Float32Array =>
        evaluate(devices[1]!, [probability, input], B * S * Q * D, (k, out, [p, x]) => k.attentionOutput(out, p!, x!, B, S, Q, G, D, 'f32'));
      sameRows(output(later), output(qkv), Q * D, (row) => row % S <= position, what);
    });
  });

  it('attention_cached: neither later queries nor what lies in the cache behind a query changes a bit', () => {
    forEachPoison((shape, position, poison) => {
      const { B, S, Q, G, D } = shape;
      const width = (Q + 2 * G) * D;
      const C = S + 9;
      const start = Int32Array.from({ length: B }, (_, b) => (b === 0 ? 5 : 0));
      const qkv = numbers(B * S * width, 4, 0.6);
      const [keys, values] = [numbers(B * C * G * D, 5, 0.6), numbers(B * C * G * D, 6)];
      const behind = (cache: Float32Array): Float32Array => poisoned(cache, G * D, C, poison, (row, b) => row > start[b]! + position);
      const run = (...inputs: Float32Array[]): Float32Array =>
        evaluate(devices[1]!, [...inputs, start], B * S * Q * D, (k, out, [x, key, value, first]) =>
          k.attentionCached(out, x!, key!, value!, first!, B, S, C, Q, G, D, 'f32'));
      const later = run(poisoned(qkv, width, S, poison, (row) => row > position), behind(keys), behind(values));
      sameRows(later, run(qkv, keys, values), Q * D, (row) => row % S <= position, nameOf(shape, position, poison));
    });
  });

  it('flash_attention_backward: later tokens leave dq, earlier queries leave dk and dv', () => {
    forEachPoison((shape, position, poison) => {
      const { B, S, Q, G, D } = shape;
      const width = (Q + 2 * G) * D;
      const qkv = numbers(B * S * width, 7, 0.6);
      const [dout, out, logSumExp] = [numbers(B * S * Q * D, 8), numbers(B * S * Q * D, 9), numbers(B * Q * S, 10).map((value) => Math.abs(value) + 8)];
      const where = (isPoisoned: (row: number) => boolean): Float32Array[] => [
        poisoned(dout, Q * D, S, poison, isPoisoned), poisoned(out, Q * D, S, poison, isPoisoned), poisoned(logSumExp, 1, S, poison, isPoisoned),
        poisoned(qkv, width, S, poison, isPoisoned),
      ];
      /** Columns begin .. end-1 of dqkv. */
      const run = (device: Device, inputs: readonly Float32Array[], begin: number, end: number): Float32Array => {
        const dqkv = evaluate(device, inputs, B * S * width, (k, to, [d, o, l, x]) => k.flashAttentionBackward(to, d!, o!, l!, x!, B, S, Q, G, D, 'f32'));
        return dqkv.filter((_, i) => i % width >= begin && i % width < end);
      };
      for (const device of devices.slice(0, 2)) { // one thread takes both gradients in one pass, two share them
        const what = `${nameOf(shape, position, poison)}, ${device === devices[0] ? 1 : 2} threads`;
        const clean = [dout, out, logSumExp, qkv];
        const queries = [0, Q * D] as const;
        const others = [Q * D, width] as const;
        sameRows(run(device, where((row) => row > position), ...queries), run(device, clean, ...queries), Q * D, (row) => row % S <= position, what);
        sameRows(run(device, where((row) => row <= position), ...others), run(device, clean, ...others), 2 * G * D, (row) => row % S > position, what);
      }
    });
  });
});
