/** The cases of the attention kernels: around tiles of 64 and 128 keys and of 128 and 256 rows (query, head), which the CPU library has. */
import { define, inout, input, integers, numbers, output } from './harness.ts';
import type { Case, Tolerance } from './harness.ts';
import * as reference from './reference.ts';

const SHAPES = [
  [0, 3, 2, 1, 8], [2, 0, 2, 1, 8], [1, 1, 1, 1, 2], [2, 7, 4, 1, 16], [1, 31, 3, 3, 6], [1, 63, 4, 1, 64], [3, 64, 4, 1, 64],
  [1, 65, 4, 2, 40], [1, 127, 1, 1, 64], [1, 129, 6, 2, 64], [2, 85, 12, 1, 64], [1, 257, 4, 1, 128], [1, 300, 3, 1, 17],
] as const;

/** Queries and keys of moderate size, values and gradients with outliers. */
function rows(count: number, Q: number, G: number, D: number, seed: number): Float32Array {
  const width = (Q + 2 * G) * D;
  return numbers(count * width, seed, 0.6).map((value, i) => (i % width < (Q + G) * D ? Math.max(-4, Math.min(4, value)) : value));
}

const close = (absolute: number, why: string): Tolerance => ({ absolute, relative: 4e-6, why });

const whole = SHAPES.flatMap(([B, S, Q, G, D]): Case[] => {
  const shape = { B, S, Q, G, D };
  const width = (Q + 2 * G) * D;
  const qkv = rows(B * S, Q, G, D, S + D);
  const { out, logSumExp, probability } = reference.attention(qkv, shape);
  const dout = numbers(B * S * Q * D, S + 1);
  const sizes = `B=${B} S=${S} Q=${Q} G=${G} D=${D}`;
  return [
    define({
      kernel: 'attention_scores', sizes, buffers: { score: output('f32', B * Q * S * S), qkv: input(qkv) },
      run: (k, t) => k.attentionScores(t.score, t.qkv, B, S, Q, G, D, 'f32'),
      expected: (v) => ({ score: reference.attentionScores(v.qkv, shape) }),
      tolerance: close(1e-5, 'a float32 dot product of D terms up to 16'),
    }),
    define({
      kernel: 'attention_output', sizes,
      buffers: { out: output('f32', B * S * Q * D), probability: input(Float32Array.from(probability)), qkv: input(qkv) },
      run: (k, t) => k.attentionOutput(t.out, t.probability, t.qkv, B, S, Q, G, D, 'f32'),
      expected: (v) => ({ out: reference.attentionOutput(v.probability, v.qkv, shape) }),
      tolerance: close(1e-5, 'a float32 sum over S of values up to 30'),
    }),
    define({
      kernel: 'flash_attention_forward', sizes,
      buffers: { out: output('f32', B * S * Q * D), logSumExp: output('f32', B * Q * S), qkv: input(qkv) },
      run: (k, t) => k.flashAttentionForward(t.out, t.logSumExp, t.qkv, B, S, Q, G, D, 'f32'),
      expected: () => ({ out, logSumExp }), tolerance: close(3e-5, 'scores within 1e-5 go through exp, values up to 30 are averaged'),
    }),
    define({
      kernel: 'flash_attention_backward', sizes,
      buffers: {
        dqkv: output('f32', B * S * width), dout: input(dout), out: input(Float32Array.from(out)),
        logSumExp: input(Float32Array.from(logSumExp)), qkv: input(qkv),
      },
      run: (k, t) => k.flashAttentionBackward(t.dqkv, t.dout, t.out, t.logSumExp, t.qkv, B, S, Q, G, D, 'f32'),
      expected: (v) => ({ dqkv: reference.attentionBackward(v.dout, v.qkv, shape) }),
      tolerance: close(2e-3, 'dout . v - delta cancels, its terms reach 1e4, and up to Q*S of them are summed'),
    }),
  ];
});

/** [B, S, C, Q, G, D] */
const CACHES = [
  [1, 1, 1, 1, 1, 2], [3, 1, 200, 4, 1, 64], [2, 5, 33, 4, 2, 16], [1, 64, 300, 12, 1, 64], [2, 100, 257, 2, 1, 34], [0, 1, 4, 2, 1, 8],
] as const;

const cached = CACHES.flatMap(([B, S, C, Q, G, D]): Case[] => {
  const qkv = rows(B * S, Q, G, D, C);
  const cache = rows(B * C, 0, G, D, C + 1);
  const keys = cache.slice(0, B * C * G * D);
  const values = cache.slice(B * C * G * D);
  const start = integers(B, C, C - S + 1);
  if (B > 1) start.set([0, C - S]);
  const sizes = `B=${B} S=${S} C=${C} Q=${Q} G=${G} D=${D}`;
  const width = (Q + 2 * G) * D;
  return [
    define({
      kernel: 'cache_append', sizes, buffers: { keyCache: inout(keys), valueCache: inout(values), qkv: input(qkv), start: input(start) },
      run: (k, t) => k.cacheAppend(t.keyCache, t.valueCache, t.qkv, t.start, B, S, C, Q, G, D, 'f32'),
      expected: (v) => {
        const [keyCache, valueCache] = [Float32Array.from(v.keyCache), Float32Array.from(v.valueCache)];
        for (let t = 0; t < B * S; t++) {
          const to = (Math.floor(t / S) * C + v.start[Math.floor(t / S)]! + (t % S)) * G * D;
          for (let i = 0; i < G * D; i++) {
            keyCache[to + i] = v.qkv[t * width + Q * D + i]!;
            valueCache[to + i] = v.qkv[t * width + (Q + G) * D + i]!;
          }
        }
        return { keyCache, valueCache };
      },
      tolerance: { absolute: 0, relative: 0, why: 'a copy' },
    }),
    define({
      kernel: 'attention_cached', sizes,
      buffers: {
        out: output('f32', B * S * Q * D), qkv: input(qkv), keyCache: input(keys), valueCache: input(values), start: input(start),
      },
      run: (k, t) => k.attentionCached(t.out, t.qkv, t.keyCache, t.valueCache, t.start, B, S, C, Q, G, D, 'f32'),
      expected: (v) => ({ out: reference.attentionCached(v.qkv, v.keyCache, v.valueCache, v.start, { B, S, Q, G, D }, C) }),
      tolerance: close(3e-5, 'as flash_attention_forward'),
    }),
  ];
});

export const attentionCases: readonly Case[] = [...whole, ...cached];
