/** The cases of argmax and the three ways of sampling, whose token must be the very one that the stated rule gives, and of the loop's step. */
import { EXACT, define, inout, input, integers, numbers, output } from './harness.ts';
import type { Case } from './harness.ts';
import type { Numbers } from './reference.ts';
import { uniform } from './generator-reference.ts';

const SEED = 2 ** 40 + 99;
const SHAPES = [[0, 5], [1, 1], [3, 2], [17, 33], [5, 4099], [2, 32000]] as const;

interface Choice {
  most: number;
  share: number;
  temperature: number;
}

/** The rule of nn.h, followed naively: sort everything, cut, walk. NaN counts as -Infinity. */
function choose(logits: Numbers, b: number, V: number, counter: number, { most, share, temperature }: Choice): number {
  const row = Array.from({ length: V }, (_, i) => logits[b * V + i]!).map((value) => (Number.isNaN(value) ? -Infinity : value));
  const order = row.map((_, i) => i).sort((x, y) => (row[x] === row[y] ? x - y : row[y]! - row[x]!));
  const top = row[order[0]!]!;
  const weight = (i: number): number => (row[i] === top ? 1 : Math.exp((row[i]! - top) / Math.fround(temperature)));
  const all = row.reduce((sum, _, i) => sum + weight(i), 0);
  const candidates: number[] = [];
  let total = 0;
  for (const i of order) {
    if (candidates.length >= most || (candidates.length > 0 && total >= share * all)) break;
    candidates.push(i);
    total += weight(i);
  }
  const u = uniform(BigInt(SEED), BigInt(b), BigInt(counter));
  let cumulative = 0;
  for (const i of candidates) {
    cumulative += weight(i);
    if (cumulative > u * total) return i;
  }
  return candidates.at(-1)!;
}

const advanceCases = [[0, 3, 1], [1, 1, 0], [3, 5, 2], [3, 5, 4], [64, 32, 31], [257, 2, 0], [4, 3, 3], [4, 3, -1], [4, 0, 0]].map(([B, R, row]) => {
  const before = { history: integers(B! * R!, 1, 99), start: integers(B!, 2, 1 << 20), counter: integers(B!, 3, 99), step: Int32Array.of(row!) };
  const token = integers(B!, 4, 32000);
  const isInside = row! >= 0 && row! < R!;
  return define({
    kernel: 'advance', sizes: `B=${B} R=${R} step=${row}`, tolerance: EXACT,
    buffers: { history: inout(before.history), start: inout(before.start), counter: inout(before.counter), step: inout(before.step), token: input(token) },
    run: (k, t) => k.advance(t.history, t.start, t.counter, t.step, t.token, B!, R!),
    expected: () => ({
      history: before.history.map((value, at) => (isInside && Math.floor(at / B!) === row ? token[at % B!]! : value)),
      start: before.start.map((value) => value + Number(isInside)),
      counter: before.counter.map((value) => value + Number(isInside)),
      step: isInside ? [(row! + 1) % R!] : [row!],
    }),
  });
});

const choiceCases: readonly Case[] = SHAPES.flatMap(([B, V]): Case[] => {
  const logits = numbers(B * V, B + V, 0.8);
  if (V > 30) {
    logits.fill(NaN, 0, 3);
    logits.fill(7, V + 4, V + 20); // ties
    logits[B * V - 1] = Infinity;
  }
  const counter = integers(B, V, 1000);
  const buffers = { token: output('i32', B), logits: input(logits), counter: input(counter) };
  const tokens = (choice: Choice): number[] => Array.from({ length: B }, (_, b) => choose(logits, b, V, counter[b]!, choice));
  const sizes = `B=${B} V=${V}`;
  const K = Math.ceil(V / 7);
  const share = Math.fround(0.7);
  return [
    define({
      kernel: 'argmax', sizes, buffers, run: (k, t) => k.argmax(t.token, t.logits, B, V, 'f32'),
      expected: () => ({ token: tokens({ most: 1, share: 2, temperature: 1 }) }), tolerance: EXACT,
    }),
    define({
      kernel: 'sample', sizes, buffers, workspace: { V, T: B },
      run: (k, t) => k.sample(t.token, t.logits, t.counter, B, V, 0.7, SEED, 'f32'),
      expected: () => ({ token: tokens({ most: V, share: 2, temperature: 0.7 }) }), tolerance: EXACT,
    }),
    define({
      kernel: 'topk_sample', sizes: `${sizes} K=${K}`, buffers, workspace: { V, T: B },
      run: (k, t) => k.topkSample(t.token, t.logits, t.counter, B, V, K, 1.3, SEED, 'f32'),
      expected: () => ({ token: tokens({ most: K, share: 2, temperature: 1.3 }) }), tolerance: EXACT,
    }),
    define({
      kernel: 'topp_sample', sizes, buffers, workspace: { V, T: B },
      run: (k, t) => k.toppSample(t.token, t.logits, t.counter, B, V, 0.7, 0.9, SEED, 'f32'),
      expected: () => ({ token: tokens({ most: V, share, temperature: 0.9 }) }), tolerance: EXACT,
    }),
  ];
});

export const decodeCases: readonly Case[] = [...choiceCases, ...advanceCases];
