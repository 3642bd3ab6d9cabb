/**
 * The table of cases of the optimizer: weights in two halves and back, their digest, clipping, and AdamW on either form of weights. Part
 * of the table in table.ts.
 */
import { slice } from '../../cuda/device.ts';
import type { Tensor } from '../../cuda/device.ts';
import { digest } from './generator-reference.ts';
import { EXACT, define, generator, inout, input, numbers, output, words16 } from './harness.ts';
import type { Case } from './harness.ts';
import * as reference from './reference.ts';

const LENGTHS = [0, 1, 13, 31, 4097, 16385];

/** The bits of float32 numbers, and their halves. */
const bitsOf = (values: Float32Array): Uint32Array => new Uint32Array(values.buffer, values.byteOffset, values.length);
function halvesOf(bits: Uint32Array): { high: Uint16Array; low: Uint16Array } {
  const both = Array.from(bits, reference.halves);
  return { high: Uint16Array.from(both, ({ high }) => high), low: Uint16Array.from(both, ({ low }) => low) };
}

/** Every sign, exponent and upper fraction, with lower halves around the tie. */
const everyUpperHalf = Uint32Array.from([0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].flatMap((low) => Array.from({ length: 65536 }, (_, top) => top * 65536 + low)));
const drawnBits = (n: number): Uint32Array => {
  const bits = bitsOf(numbers(n, n + 4));
  bits.set(reference.SPECIAL_BITS.subarray(0, n));
  return bits;
};
const splits = [...LENGTHS.map((n) => [`n=${n}`, drawnBits(n)] as const), ['every upper half of 16 bits', everyUpperHalf] as const].flatMap(([sizes, bits]): Case[] => {
  const n = bits.length;
  const { high, low } = halvesOf(bits);
  const joined = Float32Array.from(bits, (_, i) => new Float32Array(Uint32Array.of((bits[i]! & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits[i]!).buffer)[0]!);
  return [
    define({
      kernel: 'split', sizes, buffers: { high: output('bf16', n), low: output('u16', n), x: input(new Float32Array(bits.buffer)) },
      run: (k, t) => k.split(t.high, t.low, t.x, n),
      expected: () => ({ high, low }), tolerance: EXACT,
    }),
    define({
      // Split again, because numbers alone tell neither zeros nor NaNs apart.
      kernel: 'join', sizes,
      buffers: { x: output('f32', n), highAgain: output('bf16', n), lowAgain: output('u16', n), high: input(high), low: words16('in', low) },
      run: (k, t) => {
        k.join(t.x, t.high, t.low, n);
        k.split(t.highAgain, t.lowAgain, t.x, n);
      },
      expected: () => ({ x: joined, highAgain: high, lowAgain: low }), tolerance: EXACT,
    }),
  ];
});

const digestsOfHalves = LENGTHS.map((n) => {
  const bits = drawnBits(n).map((word) => ((word & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : word));
  const { high, low } = halvesOf(bits);
  return define({
    kernel: 'digest_halves', sizes: `n=${n}`, buffers: { digest: output('u64', 2), high: input(high), low: words16('in', low) },
    run: (k, t) => k.digestHalves(t.digest, t.high, t.low, n),
    expected: () => ({ digest: digest(bits) }), tolerance: EXACT,
  });
});

const clips = [0, 0.25, 4, 1e30, Infinity, NaN].map((sum) => {
  const norm = Math.sqrt(sum);
  return define({
    kernel: 'grad_clip', sizes: `sum of squares ${sum}`, buffers: { control: output('f64', 3), sum: input(Float64Array.from([sum])) },
    run: (k, t) => k.gradClip(t.control, t.sum, 1),
    expected: () => ({ control: [norm, norm < 1 ? 1 : Number.isNaN(norm) ? 1 : 1 / (norm + 1e-6), Number.isFinite(norm) ? 0 : 1] }),
    tolerance: EXACT,
  });
});

const SCALARS: reference.AdamwScalars = { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, decay: 0.1, rate: 2e-3, step: 3, clip: 0.37 };
/** `from` 1: the slices begin at element 1, where no access of several elements is aligned. */
const adamw = ([[0, 0], [1, 0], [17, 0], [4099, 0], [4099, 1], [16385, 0]] as const).flatMap(([n, from]): Case[] =>
  (['f32', 'bf16'] as const).flatMap((state): Case[] =>
    (['f32', 'bf16'] as const).flatMap((weights) =>
      [0, 1].map((skip) => {
        const random = generator(n);
        const [p, g] = [numbers(n, n + 20), numbers(n, n + 21, 0.1)];
        const rounded = (value: number): number => (state === 'f32' ? value : reference.bf16Value(reference.bf16Bits(value)));
        const m = numbers(n, n + 22, 0.1).map(rounded);
        const v = Float32Array.from({ length: n }, () => random() * 0.01).map(rounded);
        const stored = (values: Float32Array): Float32Array | Uint16Array =>
          state === 'f32' ? values : Uint16Array.from(values, reference.bf16Bits);
        const step = Number(n !== 17) * 2 + 1; // 1 and 3
        const scalars = { ...SCALARS, step, decay: n === 4099 ? 0 : SCALARS.decay };
        const after = Array.from(p, (value, i) =>
          skip || i < from ? { p: value, m: m[i]!, v: v[i]! } : reference.adamw(value, m[i]!, v[i]!, g[i]!, scalars),
        );
        const next = Float32Array.from(after, (one) => one.p);
        const states = { m: stored(Float32Array.from(after, (one) => one.m)), v: stored(Float32Array.from(after, (one) => one.v)) };
        const base = {
          m: inout(stored(m)), v: inout(stored(v)), gradient: input(g),
          control: input(Float64Array.from([1, scalars.clip, skip])), schedule: input(Float64Array.from([scalars.rate, scalars.step])),
        };
        const [before, split] = [halvesOf(bitsOf(p)), halvesOf(bitsOf(next))];
        const asHalves = { parameter: inout(before.high), residue: words16('inout', before.low), ...base };
        return define({
          kernel: 'adamw_step', buffers: weights === 'f32' ? { parameter: inout(p), ...base } : asHalves,
          sizes: `n=${n} ${from === 0 ? '' : `from element ${from} `}weights ${weights}, states ${state}${skip ? ', skipped' : ''}`,
          run: (k, t) => {
            const { beta1, beta2, epsilon, decay } = scalars;
            const cut = (tensor: Tensor): Tensor => slice(tensor, from, n - from);
            const residue = 'residue' in t ? cut(t.residue) : null;
            const [parameter, first, second, gradient] = [t.parameter, t.m, t.v, t.gradient].map(cut) as [Tensor, Tensor, Tensor, Tensor];
            k.adamwStep(parameter, residue, first, second, gradient, t.control, t.schedule, n - from, beta1, beta2, epsilon, decay, state, weights);
          },
          expected: () => (weights === 'f32' ? { parameter: next, ...states } : { parameter: split.high, residue: split.low, ...states }),
          tolerance: EXACT,
        });
      }),
    ),
  ),
);

export const optimizerCases: readonly Case[] = [...splits, ...digestsOfHalves, ...clips, ...adamw];
