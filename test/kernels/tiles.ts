/**
 * bf16 at the borders of what the tensor-core kernels are cut into: product tiles of 128 x 256 x 64 and 128 x 192 x 64, experts whose rows
 * end in a tile's first or second half, attention tiles of 64, 128 and 192 rows, sequences that end inside of one, chunks of the loss;
 * and the kernels of a decoding step, which are bf16's only. The reference is the CPU (bf16.ts), so that sizes may be what would take
 * JavaScript minutes. Used by tiles.test.ts on a GPU.
 */
import type { Case, CaseBuffer } from './harness.ts';
import { accumulate, define, inout, input, integers, numbers, output, withTinyColumns } from './harness.ts';

const never = (): never => {
  throw new Error('these cases are compared with the CPU');
};
const tolerance = { absolute: 0, relative: 0, why: 'not used: bf16.ts has its own' };

const productsOf = (sizes: readonly (readonly [number, number, number])[], transposes: readonly (readonly [number, number])[]): Case[] => sizes.flatMap(([m, n, k]) =>
  transposes.flatMap(([ta, tb]): Case[] => [
    define({
      kernel: 'gemm', sizes: `${m}x${n}x${k}, transposes ${ta}${tb}`, buffers: { c: output('f32', m * n), a: input(numbers(m * k, 1)), b: input(numbers(n * k, 2)) },
      run: (kernels, t) => kernels.gemm(t.c, t.a, t.b, m, n, k, ta, tb, 'f32', 'f32'), expected: never, tolerance,
    }),
    define({
      kernel: 'gemm_beta', sizes: `${m}x${n}x${k}, transposes ${ta}${tb}, accumulating`,
      buffers: { c: accumulate(numbers(m * n, 3)), a: input(numbers(m * k, 1)), b: input(numbers(n * k, 2)) },
      run: (kernels, t) => kernels.gemmBeta(t.c, t.a, t.b, m, n, k, ta, tb, 1, 1, 'f32', 'f32'), expected: never, tolerance,
    }),
  ]),
);

const ALL = [[0, 0], [0, 1], [1, 0], [1, 1]] as const;

/**
 * Few tiles, which are of 192 columns but for M-major operands; tiles of 192 and of 256 columns that are more than a chip has multiprocessors
 * (132); depths in more than 8 splits, and with rows whose sums lie on no 16 bytes; products that have a kernel of their own because one side
 * is at most 16: many rows on few columns, and few depths.
 */
const products = (): Case[] => [
  ...productsOf([[127, 256, 64], [128, 264, 128], [129, 512, 192], [257, 320, 1088], [1, 768, 768], [300, 896, 768], [1025, 64, 72]], ALL),
  ...productsOf([[8577, 576, 72], [8577, 256, 64]], [[0, 0], [0, 1]]),
  ...productsOf([[24, 72, 4104]], ALL),
  ...productsOf([[257, 321, 1088]], [[0, 1]]),
  ...productsOf([[512, 16, 768], [777, 1, 72], [515, 9, 1032], [1000, 8, 8]], [[0, 1]]),
  ...productsOf([[17, 256, 16], [130, 264, 8], [200, 72, 16], [64, 768, 16]], [[0, 0], [0, 1]]),
];

/** Slots of T tokens with K different experts of the first `used`, sorted. */
function routed(T: number, E: number, K: number, used: number) {
  const first = integers(T, 5, used);
  const index = Int32Array.from({ length: T * K }, (_, i) => (first[Math.floor(i / K)]! + (i % K)) % used);
  const order = Array.from(index.keys()).sort((a, b) => index[a]! - index[b]! || a - b);
  const offsets = new Int32Array(E + 1);
  for (const expert of index) offsets[expert + 1]!++;
  for (let e = 0; e < E; e++) offsets[e + 1]! += offsets[e]!;
  const weight = numbers(T * K, 6, 0.3);
  const slotOf = new Int32Array(T * K);
  for (const [slot, pair] of order.entries()) slotOf[pair] = slot;
  return {
    offsets: input(offsets), slotToken: input(Int32Array.from(order, (pair) => Math.floor(pair / K))), slotOf: input(slotOf),
    slotWeight: input(Float32Array.from(order, (pair) => weight[pair]!)),
  };
}

const EXPERTS = [
  [700, 128, 192, 5, 4, 5], [700, 128, 200, 5, 4, 5], [500, 128, 192, 5, 4, 5], [513, 64, 320, 8, 4, 4], [1100, 192, 64, 3, 2, 3], [130, 256, 768, 4, 2, 3],
] as const;
const experts = (): Case[] => EXPERTS.flatMap(
  ([T, H, F, E, K, used]): Case[] => {
    const N = T * K;
    const { offsets, slotToken, slotOf, slotWeight } = routed(T, E, K, used);
    const [x, h, gateUp] = [input(numbers(T * H, 11)), input(numbers(N * F, 12)), input(numbers(N * 2 * F, 13))];
    const tiny = (seed: number, columns: number, rows: number): CaseBuffer => input(withTinyColumns(numbers(rows * columns, seed), columns));
    const [tinyX, tinyH, tinyGateUp] = [tiny(11, H, T), tiny(12, F, N), tiny(13, 2 * F, N)];
    const [up, down] = [input(numbers(E * 2 * F * H, 14, H ** -0.5)), input(numbers(E * H * F, 15, F ** -0.5))];
    const common = { sizes: `T ${T}, H ${H}, F ${F}, E ${E} (${used} used), K ${K}`, expected: never, tolerance, workspace: { T, S: T, H, F, E, K } };
    return [
      define({
        ...common, kernel: 'moe_up_forward', buffers: { h: output('f32', N * F), gateUp: output('f32', N * 2 * F), x, slotToken, offsets, up },
        run: (k, t) => k.moeUpForward(t.h, t.gateUp, t.x, t.slotToken, t.offsets, t.up, T, H, F, E, K, 'f32'),
      }),
      define({
        ...common, kernel: 'moe_down_forward', buffers: { y: output('f32', N * H), h, offsets, down },
        run: (k, t) => k.moeDownForward(t.y, t.h, t.offsets, t.down, T, H, F, E, K, 'f32'),
      }),
      define({
        ...common, kernel: 'moe_down_backward',
        buffers: { dgateUp: output('f32', N * 2 * F), h: output('f32', N * F), dweight: output('f32', N), dout: x, gateUp, slotToken, slotWeight, slotOf, offsets, down },
        run: (k, t) => k.moeDownBackward(t.dgateUp, t.h, t.dweight, t.dout, t.gateUp, t.slotToken, t.slotWeight, t.slotOf, t.offsets, t.down, T, H, F, E, K, 'f32'),
      }),
      define({
        ...common, kernel: 'moe_down_weight_gradient', same: [['stored', 'dw']],
        buffers: { dw: accumulate(numbers(E * H * F, 16)), stored: output('f32', E * H * F), dout: tinyX, h: tinyH, slotToken, slotWeight, offsets },
        run: (k, t) => {
          for (const [out, add] of [[t.dw, 1], [t.stored, 0]] as const) k.moeDownWeightGradient(out, t.dout, t.h, t.slotToken, t.slotWeight, t.offsets, T, H, F, E, K, add, 'f32');
        },
      }),
      define({
        ...common, kernel: 'moe_up_backward', buffers: { dx: output('f32', N * H), gateUp, offsets, up },
        run: (k, t) => k.moeUpBackward(t.dx, t.gateUp, t.offsets, t.up, T, H, F, E, K, 'f32'),
      }),
      define({
        ...common, kernel: 'moe_up_weight_gradient', same: [['stored', 'dw']],
        buffers: { dw: accumulate(numbers(E * 2 * F * H, 17)), stored: output('f32', E * 2 * F * H), gateUp: tinyGateUp, x: tinyX, slotToken, offsets },
        run: (k, t) => {
          for (const [out, add] of [[t.dw, 1], [t.stored, 0]] as const) k.moeUpWeightGradient(out, t.gateUp, t.x, t.slotToken, t.offsets, T, H, F, E, K, add, 'f32');
        },
      }),
    ];
  },
);

/** The backward gets any rows as the forward's output: what is compared is the function, which takes them as they are. */
const ATTENTION = [
  [1, 128, 12, 1, 64], [2, 191, 12, 1, 64], [1, 193, 4, 2, 64], [3, 260, 6, 3, 64], [1, 385, 12, 1, 64], [2, 516, 12, 1, 64], [1, 1029, 12, 1, 64],
  [1, 260, 3, 1, 128], [2, 200, 4, 1, 32],
] as const;
const attention = (): Case[] => ATTENTION.flatMap(
  ([B, S, Q, G, D]): Case[] => {
    const width = (Q + 2 * G) * D;
    const qkv = input(numbers(B * S * width, S, 0.6).map((value) => Math.max(-4, Math.min(4, value))));
    const common = { sizes: `B=${B} S=${S} Q=${Q} G=${G} D=${D}`, expected: never, tolerance, workspace: { T: B * S, S, Q, G, D } };
    return [
      define({
        ...common, kernel: 'flash_attention_forward', buffers: { out: output('f32', B * S * Q * D), logSumExp: output('f32', B * Q * S), qkv },
        run: (k, t) => k.flashAttentionForward(t.out, t.logSumExp, t.qkv, B, S, Q, G, D, 'f32'),
      }),
      define({
        ...common, kernel: 'flash_attention_backward',
        buffers: { dqkv: output('f32', B * S * width), dout: input(numbers(B * S * Q * D, 3)), out: input(numbers(B * S * Q * D, 4, 0.2)), logSumExp: input(new Float32Array(B * Q * S).fill(6)), qkv },
        run: (k, t) => k.flashAttentionBackward(t.dqkv, t.dout, t.out, t.logSumExp, t.qkv, B, S, Q, G, D, 'f32'),
      }),
    ];
  },
);

/** Two chunks of the loss and a rest. */
const losses = (): Case[] => ([[2100, 128, 1024]] as const).map(([T, H, V]) =>
  define({
    kernel: 'linear_cross_entropy', sizes: `T=${T} H=${H} V=${V}`, expected: never, tolerance, workspace: { T, H, V },
    buffers: {
      loss: output('f32', T), dx: output('f32', T * H), dw: accumulate(numbers(V * H, 1)), x: input(numbers(T * H, 2)), target: input(integers(T, 3, V)),
      w: input(numbers(V * H, 4, 0.1)),
    },
    run: (k, t) => k.linearCrossEntropy(t.loss, t.dx, t.dw, t.x, t.target, t.w, T, H, V, 1 / T, 'f32'),
  }),
);

/** Norm backwards that hold a row in registers: of 1 to 4 pieces a lane, with rests, in more blocks than one. */
const norms = (): Case[] => ([[700, 256], [131, 264], [2050, 768], [33, 1024]] as const).map(([T, H]) =>
  define({
    kernel: 'rmsnorm_residual_backward', sizes: `T=${T} H=${H}`, expected: never, tolerance, workspace: { T, H },
    buffers: {
      dx: output('f32', T * H), dweight: accumulate(numbers(H, 1)), dy: input(numbers(T * H, 2)), dsum: input(numbers(T * H, 3)), sum: input(numbers(T * H, 4)),
      reciprocal: input(new Float32Array(T).fill(0.9)), weight: input(numbers(H, 5)),
    },
    run: (k, t) => k.rmsnormResidualBackward(t.dx, t.dweight, t.dy, t.dsum, t.sum, t.reciprocal, t.weight, T, H, 'f32'),
  }),
);

/** The attention half of a decoding step: one tile of 16 sequences and four, splits merged late and by a kernel of their own. */
const STEPS = [
  [1, 70, 128, 4, 1, 32], [1, 1500, 64, 3, 1, 64], [1, 40_000, 64, 4, 1, 16], [2, 20_000, 64, 4, 2, 64], [16, 130, 256, 8, 2, 32], [17, 300, 192, 6, 1, 64], [64, 40, 64, 4, 1, 16],
] as const;
const stepAttention = (): Case[] => STEPS.map(
  ([B, C, H, Q, G, D]) => {
    const start = integers(B, C, C);
    start[0] = C - 1;
    const angles = Float64Array.from({ length: C * D / 2 }, (_, i) => i % 7);
    return define({
      kernel: 'decode_attention', sizes: `B=${B} C=${C} H=${H} Q=${Q} G=${G} D=${D}`, expected: never, tolerance, workspace: { T: B, S: 1, H, Q, G, D },
      buffers: {
        out: output('f32', B * H), keys: inout(numbers(B * C * G * D, 1, 0.6)), values: inout(numbers(B * C * G * D, 2, 0.6)), x: input(numbers(B * H, 3)), start: input(start),
        cosine: input(Float32Array.from(angles, Math.cos)), sine: input(Float32Array.from(angles, Math.sin)), norm: input(numbers(H, 4, 0.5)),
        qkv: input(numbers((Q + 2 * G) * D * H, 5, H ** -0.5)), output: input(numbers(H * Q * D, 6, (Q * D) ** -0.5)),
      },
      run: (k, t) => k.decodeAttention(t.out, t.keys, t.values, t.x, t.start, t.cosine, t.sine, t.norm, t.qkv, t.output, B, C, H, Q, G, D, C, 1e-5, 'f32'),
    });
  },
);

/** The experts' half: up to 8, 16 and 64 tokens. All experts are chosen where tokens are many: rounding decides between equal ones. */
const stepExperts = (): Case[] => ([[1, 64, 128, 4, 2], [8, 128, 192, 6, 3], [9, 192, 64, 4, 4], [16, 64, 320, 4, 4], [17, 128, 1600, 3, 3], [64, 256, 128, 4, 4]] as const).map(([T, H, F, E, K]) =>
  define({
    kernel: 'decode_moe', sizes: `T=${T} H=${H} F=${F} E=${E} K=${K}`, expected: never, tolerance, workspace: { T, H, F, E, K },
    buffers: {
      out: output('f32', T * H), x: input(numbers(T * H, 1)), norm: input(numbers(H, 2, 0.5)), router: input(numbers(E * H, 3, H ** -0.5)),
      gateUp: input(numbers(E * 2 * F * H, 4, H ** -0.5)), down: input(numbers(E * H * F, 5, F ** -0.5)),
    },
    run: (k, t) => k.decodeMoe(t.out, t.x, t.norm, t.router, t.gateUp, t.down, T, H, F, E, K, 1e-5, 'f32'),
  }),
);

/** How many tests they make (kernels-in-bf16.test.ts holds it): what is said where there is no GPU. */
export const TILE_TESTS = 219;

/** All of them; making them takes a second. */
export const tileCases = (): Case[] => [...products(), ...experts(), ...attention(), ...losses(), ...norms(), ...stepAttention(), ...stepExperts()];
