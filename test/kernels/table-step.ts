/** The cases of the kernels of a decoding step: each half of a layer against the formulas that it is made of, one after the other. */
import { define, inout, input, integers, numbers, output } from './harness.ts';
import type { Case, Tolerance } from './harness.ts';
import { product } from './products.ts';
import * as reference from './reference.ts';

const EPSILON = 1e-5;
const close: Tolerance = { absolute: 2e-4, relative: 2e-5, why: 'several float32 products in a row, values up to 30, exp in between' };

/** [B, C, H, Q, G, D] */
const ATTENTION = [[0, 4, 8, 2, 1, 4], [1, 1, 4, 1, 1, 2], [1, 9, 64, 4, 1, 16], [3, 130, 24, 6, 2, 10], [17, 40, 128, 2, 1, 64], [64, 5, 16, 4, 4, 8]] as const;

const attention = ATTENTION.map(([B, C, H, Q, G, D]): Case => {
  const P = (Q + 2 * G) * D;
  const cache = numbers(2 * B * C * G * D, C, 0.6);
  const { cosine, sine } = reference.ropeFreqs(C, D, 10_000, 1);
  const start = integers(B, C, C);
  if (B > 1) start.set([0, C - 1]);
  return define({
    kernel: 'decode_attention', sizes: `B=${B} C=${C} H=${H} Q=${Q} G=${G} D=${D}`, workspace: { T: B, S: 1, H, Q, G, D },
    buffers: {
      out: output('f32', B * H), keys: inout(cache.slice(0, B * C * G * D)), values: inout(cache.slice(B * C * G * D)), x: input(numbers(B * H, 1)), start: input(start),
      cosine: input(Float32Array.from(cosine)), sine: input(Float32Array.from(sine)), norm: input(numbers(H, 2, 0.5)),
      qkv: input(numbers(P * H, 3, 1 / Math.sqrt(H))), output: input(numbers(H * Q * D, 4, 1 / Math.sqrt(Q * D))),
    },
    run: (k, t) => k.decodeAttention(t.out, t.keys, t.values, t.x, t.start, t.cosine, t.sine, t.norm, t.qkv, t.output, B, C, H, Q, G, D, C, EPSILON, 'f32'),
    expected: (v) => {
      const { y } = reference.rmsnormForward(v.x, v.norm, B, H, EPSILON);
      const qkv = reference.rope(product({ values: y, columns: H }, { values: v.qkv, columns: H, transposed: true }, B, P, H), v.start, v.cosine, v.sine, B, Q + G, P, D, 1);
      const [keys, values] = [Float64Array.from(v.keys), Float64Array.from(v.values)];
      for (let b = 0; b < B; b++) {
        for (let i = 0; i < G * D; i++) {
          keys[(b * C + v.start[b]!) * G * D + i] = qkv[b * P + Q * D + i]!;
          values[(b * C + v.start[b]!) * G * D + i] = qkv[b * P + (Q + G) * D + i]!;
        }
      }
      const heads = reference.attentionCached(qkv, keys, values, v.start, { B, S: 1, Q, G, D }, C);
      const delta = product({ values: heads, columns: Q * D }, { values: v.output, columns: Q * D, transposed: true }, B, H, Q * D);
      return { out: delta.map((value, i) => value + v.x[i]!), keys, values };
    },
    tolerance: close,
  });
});

/** [T, H, F, E, K] */
const MOE = [[0, 8, 8, 4, 2], [1, 4, 6, 1, 1], [1, 64, 64, 4, 2], [5, 64, 128, 8, 4], [16, 24, 40, 10, 3], [64, 64, 72, 6, 2]] as const;

const moe = MOE.map(([T, H, F, E, K]): Case =>
  define({
    kernel: 'decode_moe', sizes: `T=${T} H=${H} F=${F} E=${E} K=${K}`, workspace: { T, H, F, E, K },
    buffers: {
      out: output('f32', T * H), x: input(numbers(T * H, 1)), norm: input(numbers(H, 2, 0.5)), router: input(numbers(E * H, 3, 1 / Math.sqrt(H))),
      gateUp: input(numbers(E * 2 * F * H, 4, 1 / Math.sqrt(H))), down: input(numbers(E * H * F, 5, 1 / Math.sqrt(F))),
    },
    run: (k, t) => k.decodeMoe(t.out, t.x, t.norm, t.router, t.gateUp, t.down, T, H, F, E, K, EPSILON, 'f32'),
    expected: (v) => {
      const { y } = reference.rmsnormForward(v.x, v.norm, T, H, EPSILON);
      const { weight, index } = reference.softmaxTopkForward(product({ values: y, columns: H }, { values: v.router, columns: H, transposed: true }, T, E, H), T, E, K);
      const out = Float64Array.from(v.x);
      for (let t = 0; t < T; t++) {
        for (let k = t * K; k < (t + 1) * K; k++) {
          const e = index[k]!;
          const gateUp = product({ values: y.slice(t * H, (t + 1) * H), columns: H }, { values: v.gateUp, columns: H, rows: (row) => e * 2 * F + row, transposed: true }, 1, 2 * F, H);
          const h = reference.swigluForward(gateUp, 1, F);
          const down = product({ values: h, columns: F }, { values: v.down, columns: F, rows: (row) => e * H + row, transposed: true }, 1, H, F);
          for (let i = 0; i < H; i++) out[t * H + i]! += weight[k]! * down[i]!;
        }
      }
      return { out };
    },
    tolerance: close,
  }));

export const stepCases: readonly Case[] = [...attention, ...moe];
