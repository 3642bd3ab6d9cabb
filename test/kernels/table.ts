/**
 * The table of cases of every kernel of nn.h but the products, the experts and the fused head, which have tables of their own: sizes 0,
 * 1, primes, one around each block of the implementations, and large ones. harness.ts runs them, reference.ts says what is right.
 */
import { EXACT, accumulate, define, inout, input, integers, numbers, output } from './harness.ts';
import type { Case, Tolerance } from './harness.ts';
import { attentionCases } from './table-attention.ts';
import { decodeCases } from './table-decode.ts';
import { optimizerCases } from './table-optimizer.ts';
import { stepCases } from './table-step.ts';
import * as reference from './reference.ts';
import type { Numbers } from './reference.ts';
import { digest, normal } from './generator-reference.ts';

/** Around vectors of 4, 8, 16 and lanes of 64, around chunks of 4096 and 16384, and a large prime. */
const LENGTHS = [0, 1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 4095, 4096, 4097, 16383, 16384, 16385, 100003];
const SHORT_LENGTHS = [0, 1, 13, 31, 4097, 16385];
/** Rows by columns. */
const MATRICES = [
  [0, 5], [5, 0], [1, 1], [3, 7], [2, 15], [5, 16], [7, 17], [16, 64], [17, 63], [64, 65], [65, 257], [1025, 96], [3, 4099],
] as const;

const fround = Math.fround;
const largest = (values: Numbers): number => Array.from(values).reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const each = (values: Numbers, f: (value: number, i: number) => number): Float64Array => Float64Array.from(values, f);
/** Tolerance in units of float32's rounding, 6e-8. */
const rounding = (relativeUnits: number, absolute: number, why: string): Tolerance => ({ relative: relativeUnits * 6e-8, absolute, why });

const elementwise = LENGTHS.flatMap((n): Case[] => {
  const [a, b] = [numbers(n, n + 1, 2), numbers(n, n + 2, 2)];
  const sizes = `n=${n}`;
  return [
    define({
      kernel: 'silu_forward', sizes, buffers: { y: output('f32', n), x: input(a) },
      run: (k, t) => k.siluForward(t.y, t.x, n, 'f32'),
      expected: ({ x }) => ({ y: each(x, reference.silu) }),
      tolerance: rounding(8, 1e-35, 'exp within 1.01 ulp, then three roundings; below exp(-87) nothing is left'), aliases: [['y', 'x']],
    }),
    define({
      kernel: 'silu_backward', sizes, buffers: { dx: output('f32', n), dy: input(a), x: input(b) },
      run: (k, t) => k.siluBackward(t.dx, t.dy, t.x, n, 'f32'),
      expected: ({ dy, x }) => ({ dx: each(dy, (d, i) => d * reference.siluSlope(x[i]!)) }),
      tolerance: rounding(16, 1e-6 * largest(a), 'the slope is a difference of terms of about 1 near its zero'), aliases: [['dx', 'dy']],
    }),
    define({
      kernel: 'add', sizes, buffers: { y: output('f32', n), a: input(a), b: input(b) },
      run: (k, t) => k.add(t.y, t.a, t.b, n, 'f32'),
      expected: (v) => ({ y: each(v.a, (value, i) => fround(value + v.b[i]!)) }),
      tolerance: EXACT, aliases: [['y', 'a'], ['y', 'b']],
    }),
    define({
      kernel: 'mul', sizes, buffers: { y: output('f32', n), a: input(a), b: input(b) },
      run: (k, t) => k.mul(t.y, t.a, t.b, n, 'f32'),
      expected: (v) => ({ y: each(v.a, (value, i) => fround(value * v.b[i]!)) }),
      tolerance: EXACT, aliases: [['y', 'a'], ['y', 'b']],
    }),
    define({
      kernel: 'scale', sizes, buffers: { y: output('f32', n), x: input(a) },
      run: (k, t) => k.scale(t.y, t.x, n, 0.1, 'f32'),
      expected: ({ x }) => ({ y: each(x, (value) => fround(value * fround(0.1))) }),
      tolerance: EXACT, aliases: [['y', 'x']],
    }),
    define({
      kernel: 'sum', sizes, buffers: { out: output('f64', 1), x: input(a) },
      run: (k, t) => k.sum(t.out, t.x, n),
      expected: ({ x }) => ({ out: [reference.orderedSum(x)] }),
      tolerance: EXACT,
    }),
    define({
      kernel: 'grad_norm', sizes, buffers: { sum: output('f64', 1), gradient: input(a) },
      run: (k, t) => k.gradNorm(t.sum, t.gradient, n),
      expected: ({ gradient }) => ({ sum: [reference.orderedSum(each(gradient, (g) => g * g))] }),
      tolerance: EXACT,
    }),
    define({
      kernel: 'zero_grad', sizes, buffers: { gradient: output('f32', n) },
      run: (k, t) => k.zeroGrad(t.gradient, n),
      expected: () => ({ gradient: new Float32Array(n) }),
      tolerance: EXACT,
    }),
    define({
      kernel: 'random_normal', sizes, buffers: { x: output('f32', n) },
      run: (k, t) => k.randomNormal(t.x, n, 42, 7, 3, 0.02),
      expected: () => ({ x: Float32Array.from({ length: n }, (_, i) => fround(0.02) * normal(42n, 7n, BigInt(3 + i))) }),
      tolerance: EXACT,
    }),
  ];
});

/** Where exp overflows, underflows, is exact or is no number, and a sweep between. */
const specials = Float32Array.from([
  0, -0, 1, -1, Infinity, -Infinity, NaN, 1e30, -1e30, 1e38, -1e38, 3.4e38, -3.4e38, 1e-45, -1e-45, 88.72283, -88.72283, 88.7229, -88.7229, 87.33654, -87.33654,
  87.3366, -87.3366,
  ...Array.from({ length: 4000 }, (_, i) => (i - 2000) * 0.0467),
]);
const special = [
  define({
    kernel: 'silu_forward', sizes: 'from the smallest to the largest exponent, infinities and NaN',
    buffers: { y: output('f32', specials.length), x: input(specials) },
    run: (k, t) => k.siluForward(t.y, t.x, specials.length, 'f32'),
    expected: ({ x }) => ({ y: each(x, reference.silu) }),
    tolerance: rounding(5, 1e-35, 'exp within 1.01 ulp, then three roundings'),
  }),
  define({
    kernel: 'silu_backward', sizes: 'from the smallest to the largest exponent, infinities and NaN',
    buffers: { dx: output('f32', specials.length), dy: input(specials.map(() => 1)), x: input(specials) },
    run: (k, t) => k.siluBackward(t.dx, t.dy, t.x, specials.length, 'f32'),
    expected: ({ x }) => ({ dx: each(x, reference.siluSlope) }),
    tolerance: rounding(16, 1e-6, 'the slope is a difference of terms of about 1 near its zero'),
  }),
  define({
    kernel: 'swiglu_forward', sizes: 'from the smallest to the largest gate, infinities and NaN',
    buffers: { h: output('f32', specials.length), gateUp: input(Float32Array.of(...specials, ...specials.map(() => 1))) },
    run: (k, t) => k.swigluForward(t.h, t.gateUp, 1, specials.length, 'f32'),
    expected: () => ({ h: each(specials, reference.silu) }),
    tolerance: rounding(5, 1e-35, 'exp within 1.01 ulp, then three roundings'),
  }),
  define({
    kernel: 'softmax_forward', sizes: 'with infinities and NaN',
    buffers: {
      y: output('f32', 20),
      x: input(Float32Array.from([1, NaN, 2, 3, 4, -Infinity, 0, 0, 5, 5, 1, 2, Infinity, 3, 4, -1e30, 1e30, 1e30, 0, -5])),
    },
    run: (k, t) => k.softmaxForward(t.y, t.x, 4, 5, 'f32'),
    expected: ({ x }) => ({ y: reference.softmaxForward(x, 4, 5).map((value, i) => (i >= 10 && i < 15 ? NaN : value)) }), // inf - inf
    tolerance: rounding(10, 1e-30, 'as softmax'),
  }),
];

const cast = [0, 1, 17, 4099, 16385].flatMap((n): Case[] => {
  const values = numbers(n, n + 3, 3);
  values.set(new Float32Array(reference.SPECIAL_BITS.buffer).subarray(0, n));
  const halves = Uint16Array.from({ length: n }, (_, i) => (i * 40503) & 0xffff);
  const bits = (v: Numbers): Uint16Array => Uint16Array.from(v, reference.bf16Bits);
  return [
    define({
      kernel: 'cast', sizes: `f32 to bf16, n=${n}`, buffers: { y: output('bf16', n), x: input(values) },
      run: (k, t) => k.cast(t.y, t.x, n, 'bf16', 'f32'),
      expected: () => ({ y: bits(values) }), tolerance: EXACT, libraries: ['cpu'], // which NaN is the CPU's choice
    }),
    define({
      kernel: 'cast', sizes: `bf16 to f32, n=${n}`, buffers: { y: output('f32', n), x: input(halves) },
      run: (k, t) => k.cast(t.y, t.x, n, 'f32', 'bf16'),
      expected: ({ x }) => ({ y: Float32Array.from(x, reference.bf16Value) }), tolerance: EXACT,
    }),
    define({
      kernel: 'cast', sizes: `f32 to f32, n=${n}`, buffers: { y: output('f32', n), x: input(values) },
      run: (k, t) => k.cast(t.y, t.x, n, 'f32', 'f32'),
      expected: ({ x }) => ({ y: x }), tolerance: EXACT,
    }),
  ];
});

const digests = SHORT_LENGTHS.map((n) => {
  const words = Uint32Array.from(integers(n, n, 2 ** 32));
  return define({
    kernel: 'digest', sizes: `words=${n}`, buffers: { digest: output('u64', 2), x: input(new Uint8Array(words.buffer)) },
    run: (k, t) => k.digest(t.digest, t.x, n),
    expected: () => ({ digest: digest(words) }), tolerance: EXACT,
  });
});

const rowwise = MATRICES.flatMap(([rows, columns]): Case[] => {
  const n = rows * columns;
  const [x, dy] = [numbers(n, n + 5), numbers(n, n + 6)];
  const y = Float32Array.from(reference.softmaxForward(x, rows, columns));
  const [gateUp, dh] = [numbers(2 * n, n + 7, 2), numbers(n, n + 8)];
  const sizes = `${rows}x${columns}`;
  const product = largest(dh) * largest(gateUp);
  return [
    define({
      kernel: 'softmax_forward', sizes, buffers: { y: output('f32', n), x: input(x) },
      run: (k, t) => k.softmaxForward(t.y, t.x, rows, columns, 'f32'),
      expected: (v) => ({ y: reference.softmaxForward(v.x, rows, columns) }),
      tolerance: rounding(40, 1e-7, 'x - max is rounded before exp, the sum is in float32'), aliases: [['y', 'x']],
    }),
    define({
      kernel: 'softmax_backward', sizes, buffers: { dx: output('f32', n), dy: input(dy), y: input(y) },
      run: (k, t) => k.softmaxBackward(t.dx, t.dy, t.y, rows, columns, 'f32'),
      expected: (v) => ({ dx: reference.softmaxBackward(v.dy, v.y, rows, columns) }),
      tolerance: rounding(16, 1e-6 * largest(dy), 'dy minus a float32 sum of terms up to dy'), aliases: [['dx', 'dy']],
    }),
    define({
      kernel: 'swiglu_forward', sizes, buffers: { h: output('f32', n), gateUp: input(gateUp) },
      run: (k, t) => k.swigluForward(t.h, t.gateUp, rows, columns, 'f32'),
      expected: (v) => ({ h: reference.swigluForward(v.gateUp, rows, columns) }),
      tolerance: rounding(10, 1e-33, 'silu and one product'),
    }),
    define({
      kernel: 'swiglu_backward', sizes, buffers: { dgateUp: output('f32', 2 * n), dh: input(dh), gateUp: input(gateUp) },
      run: (k, t) => k.swigluBackward(t.dgateUp, t.dh, t.gateUp, rows, columns, 'f32'),
      expected: (v) => ({ dgateUp: reference.swigluBackward(v.dh, v.gateUp, rows, columns) }),
      tolerance: rounding(20, 1e-6 * product, 'the slope of silu near its zero'), aliases: [['dgateUp', 'gateUp']],
    }),
  ];
});

const norms = MATRICES.flatMap(([T, H]): Case[] => {
  const n = T * H;
  const [x, dy, dsum, delta] = [numbers(n, n + 9), numbers(n, n + 10), numbers(n, n + 11), numbers(n, n + 12)];
  const weight = numbers(H, H + 13);
  const reciprocal = Float32Array.from(reference.rmsnormForward(x, weight, T, H, 1e-5).reciprocal);
  const sizes = `T=${T} H=${H}`;
  const forward = rounding(24, 1e-7, 'a float32 sum of squares, all of one sign');
  const scale = largest(dy) * Math.max(1, largest(weight)) * Math.max(1, largest(reciprocal)) * (1 + largest(x) ** 2);
  const backward = rounding(40, 3e-7 * scale + 1e-7 * Math.sqrt(T) * largest(dy) * largest(x), 'float32 sums over H and over T');
  const sum = Float32Array.from(x, (value, i) => value + delta[i]!);
  return [
    define({
      kernel: 'rmsnorm_forward', sizes, buffers: { y: output('f32', n), reciprocal: output('f32', T), x: input(x), weight: input(weight) },
      run: (k, t) => k.rmsnormForward(t.y, t.reciprocal, t.x, t.weight, T, H, 1e-5, 'f32'),
      expected: (v) => reference.rmsnormForward(v.x, v.weight, T, H, fround(1e-5)),
      tolerance: forward,
    }),
    define({
      kernel: 'rmsnorm_backward', sizes, workspace: { T, H },
      buffers: {
        dx: output('f32', n), dweight: accumulate(numbers(H, 14)), dy: input(dy), x: input(x), reciprocal: input(reciprocal),
        weight: input(weight),
      },
      run: (k, t) => k.rmsnormBackward(t.dx, t.dweight, t.dy, t.x, t.reciprocal, t.weight, T, H, 'f32'),
      expected: (v) => reference.rmsnormBackward(v.dy, v.x, v.reciprocal, v.weight, T, H),
      tolerance: backward, aliases: [['dx', 'dy']],
    }),
    define({
      kernel: 'rmsnorm_residual_forward', sizes,
      buffers: {
        sum: output('f32', n), y: output('f32', n), reciprocal: output('f32', T), x: input(x), delta: input(delta), weight: input(weight),
      },
      run: (k, t) => k.rmsnormResidualForward(t.sum, t.y, t.reciprocal, t.x, t.delta, t.weight, T, H, 1e-5, 'f32'),
      expected: (v) => ({ sum, ...reference.rmsnormForward(sum, v.weight, T, H, fround(1e-5)) }),
      tolerance: forward, aliases: [['sum', 'x']],
    }),
    define({
      kernel: 'rmsnorm_residual_backward', sizes, workspace: { T, H },
      buffers: {
        dx: output('f32', n), dweight: accumulate(numbers(H, 15)), dy: input(dy), dsum: input(dsum), sum: input(x),
        reciprocal: input(reciprocal), weight: input(weight),
      },
      run: (k, t) => k.rmsnormResidualBackward(t.dx, t.dweight, t.dy, t.dsum, t.sum, t.reciprocal, t.weight, T, H, 'f32'),
      expected: (v) => {
        const { dx, dweight } = reference.rmsnormBackward(v.dy, v.sum, v.reciprocal, v.weight, T, H);
        return { dx: dx.map((value, i) => value + v.dsum[i]!), dweight };
      },
      tolerance: backward, aliases: [['dx', 'dsum']],
    }),
  ];
});

const ROUTERS = [[0, 4, 2], [1, 1, 1], [5, 3, 0], [7, 4, 2], [67, 16, 4], [33, 17, 17], [2048, 8, 2], [9, 130, 6]] as const;
const router = ROUTERS.flatMap(([T, E, K]): Case[] => {
  // Multiples of 1/32, so that logits are equal or clearly apart: rounding cannot swap two experts.
  const logits = numbers(T * E, T + E, 2).map((value) => Math.round(value * 32) / 32);
  if (T > 6) logits.fill(0.5, E, 3 * E); // two rows of ties
  const { probability, weight, index } = reference.softmaxTopkForward(logits, T, E, K);
  const load = new Int32Array(E);
  for (const i of index) load[i]!++;
  const dweight = numbers(T * K, T + 5);
  const sizes = `T=${T} E=${E} K=${K}`;
  // Where the chosen probabilities have a tiny sum, dividing by it magnifies what was rounded before.
  const backward = rounding(200, 3e-6 * largest(dweight), 'differences of weights near 1, divided by the sum of the chosen');
  return [
    define({
      kernel: 'softmax_topk_forward', sizes,
      buffers: { probability: output('f32', T * E), weight: output('f32', T * K), index: output('i32', T * K), logits: input(logits) },
      run: (k, t) => k.softmaxTopkForward(t.probability, t.weight, t.index, t.logits, T, E, K),
      expected: () => ({ probability, weight, index }),
      tolerance: rounding(60, 1e-7, 'as softmax, and a sum and a division'),
    }),
    define({
      kernel: 'softmax_topk_backward', sizes,
      buffers: {
        dlogits: output('f32', T * E), dweight: input(dweight), probability: input(Float32Array.from(probability)),
        weight: input(Float32Array.from(weight)), index: input(index), load: input(load),
      },
      run: (k, t) => k.softmaxTopkBackward(t.dlogits, t.dweight, t.probability, t.weight, t.index, t.load, T, E, K, 0.01),
      expected: (v) => ({
        dlogits:
          K === 0
            ? new Float32Array(T * E)
            : reference.softmaxTopkBackward(v.dweight, v.probability, v.weight, v.index, v.load, T, E, K, fround(0.01)),
      }),
      tolerance: backward,
    }),
    define({
      kernel: 'aux_loss', sizes, buffers: { aux: output('f32', 1), probability: input(Float32Array.from(probability)), load: input(load) },
      run: (k, t) => k.auxLoss(t.aux, t.probability, t.load, T, E, K),
      expected: (v) => ({ aux: [K === 0 ? 0 : reference.auxLoss(v.probability, v.load, T, E, K)] }),
      tolerance: rounding(2, 0, 'summed in float64 or in many short float32 sums, rounded once'),
    }),
  ];
});

const nanRouter = define({
  kernel: 'softmax_topk_forward', sizes: 'with NaN logits: they come first and make NaN weights',
  buffers: {
    probability: output('f32', 8), weight: output('f32', 4), index: output('i32', 4),
    logits: input(Float32Array.from([1, NaN, 3, NaN, 1, 2, 3, NaN])),
  },
  run: (k, t) => k.softmaxTopkForward(t.probability, t.weight, t.index, t.logits, 2, 4, 2),
  expected: () => ({ probability: new Float32Array(8).fill(NaN), weight: new Float32Array(4).fill(NaN), index: [1, 3, 3, 2] }),
  tolerance: EXACT,
});

const FREQUENCIES = [[0, 8, 1e4, 1], [1, 2, 1e4, 1], [17, 6, 1e4, 1], [257, 64, 1e4, 1], [300, 64, 1e4, 8], [33, 128, 5e5, 2]] as const;
const ropes = [
  ...FREQUENCIES.map(([positions, D, base, alpha]) =>
    define({
      kernel: 'rope_freqs', sizes: `positions=${positions} D=${D} alpha=${alpha}`,
      buffers: { cosine: output('f32', (positions * D) / 2), sine: output('f32', (positions * D) / 2) },
      run: (k, t) => k.ropeFreqs(t.cosine, t.sine, positions, D, base, alpha),
      expected: () => reference.ropeFreqs(positions, D, base, alpha),
      tolerance: rounding(1.01, 1e-12, 'float64, rounded once'),
    }),
  ),
  ...([[0, 1, 8], [1, 1, 2], [7, 3, 6], [5, 2, 34], [33, 4, 64], [257, 5, 128]] as const).flatMap(([T, heads, D]): Case[] =>
    [1, -1].flatMap((direction): Case[] => {
      const positions = 50;
      const { cosine, sine } = reference.ropeFreqs(positions, D, 1e4, 1);
      const table = { cosine: input(Float32Array.from(cosine)), sine: input(Float32Array.from(sine)) };
      const position = input(integers(T, T, positions));
      const tolerance = rounding(4, 1e-5, 'two products and a sum, cancelling');
      const [G, Q] = [1, heads];
      const width = (Q + 2 * G) * D;
      return [
        define({
          kernel: 'rope_forward', sizes: `T=${T} heads=${heads} D=${D} direction=${direction}`,
          buffers: { y: output('f32', T * heads * D), x: input(numbers(T * heads * D, T)), position, ...table },
          run: (k, t) => k.ropeForward(t.y, t.x, t.position, t.cosine, t.sine, T, heads, D, positions, direction, 'f32'),
          expected: (v) => ({ y: reference.rope(v.x, v.position, v.cosine, v.sine, T, heads, heads * D, D, direction) }),
          tolerance, aliases: [['y', 'x']],
        }),
        define({
          kernel: 'rope_qk', sizes: `T=${T} Q=${Q} G=${G} D=${D} direction=${direction}`,
          buffers: { qkv: inout(numbers(T * width, T + 1)), position, ...table },
          run: (k, t) => k.ropeQk(t.qkv, t.position, t.cosine, t.sine, T, Q, G, D, positions, direction, 'f32'),
          expected: (v) => ({ qkv: reference.rope(v.qkv, v.position, v.cosine, v.sine, T, Q + G, width, D, direction) }),
          tolerance,
        }),
      ];
    }),
  ),
];

const LOGITS = [[0, 8], [1, 1], [3, 2], [7, 17], [33, 512], [5, 4099], [300, 63]] as const;
const losses = LOGITS.flatMap(([T, V]): Case[] => {
  const logits = numbers(T * V, T + V, 2);
  const target = integers(T, T, V);
  if (T > 4) target.set([reference.IGNORED, V, -1, V - 1], 1);
  const sizes = `T=${T} V=${V}`;
  return [
    define({
      kernel: 'cross_entropy_forward', sizes, buffers: { loss: output('f32', T), logits: input(logits), target: input(target) },
      run: (k, t) => k.crossEntropyForward(t.loss, t.logits, t.target, T, V, 'f32'),
      expected: (v) => ({ loss: reference.crossEntropyForward(v.logits, v.target, T, V) }),
      tolerance: rounding(4, 2e-6, 'the sum of exponentials is in float32'),
    }),
    define({
      kernel: 'cross_entropy_backward', sizes, buffers: { dlogits: output('f32', T * V), logits: input(logits), target: input(target) },
      run: (k, t) => k.crossEntropyBackward(t.dlogits, t.logits, t.target, T, V, 0.25, 'f32'),
      expected: (v) => ({ dlogits: reference.crossEntropyBackward(v.logits, v.target, T, V, 0.25) }),
      tolerance: rounding(40, 1e-7, 'as softmax'), aliases: [['dlogits', 'logits']],
    }),
  ];
});

const TABLES = [[0, 8, 5], [5, 0, 3], [1, 1, 1], [7, 63, 11], [64, 64, 3], [333, 65, 50], [2048, 96, 4096]] as const;
const embeddings = TABLES.flatMap(([T, H, V]): Case[] => {
  const token = integers(T, T + 1, V);
  if (T > 10) token.set([-1, V, V - 1], 4);
  const table = numbers(V * H, V);
  const dy = numbers(T * H, T + 2);
  const sizes = `T=${T} H=${H} V=${V}`;
  return [
    define({
      kernel: 'embedding_forward', sizes, buffers: { y: output('f32', T * H), token: input(token), table: input(table) },
      run: (k, t) => k.embeddingForward(t.y, t.token, t.table, T, H, V, 'f32'),
      expected: (v) => ({ y: reference.embeddingForward(v.token, v.table, T, H, V) }), tolerance: EXACT,
    }),
    define({
      kernel: 'scatter_add', sizes, workspace: { T: T, H: H, V: V },
      buffers: { dtable: accumulate(table), dy: input(dy), token: input(token) },
      run: (k, t) => k.scatterAdd(t.dtable, t.dy, t.token, T, H, V, 'f32'),
      expected: (v) => ({ dtable: reference.scatterAdd(new Float32Array(V * H), v.dy, v.token, T, H, V) }),
      tolerance: rounding(2, 6e-8 * largest(dy) * Math.max(1, T / V) * 3, 'a float32 sum in rising order'),
    }),
  ];
});

export const cases: readonly Case[] = [
  ...elementwise, ...special, ...cast, ...digests, ...rowwise, ...norms, ...router, nanRouter, ...ropes, ...attentionCases, ...losses,
  ...embeddings, ...optimizerCases, ...decodeCases, ...stepCases,
];
