/** The moe section of nn.h (all but the router): sorting, the grouped products with their epilogues, and the sum per token. */
import type { Case } from './harness.ts';
import { EXACT, accumulate, define, describeKernels, generator, input, integers, numbers, output, withTinyColumns } from './harness.ts';
import { describeInstructionSets, product, sumTolerance } from './products.ts';
import type { Numbers } from './reference.ts';

/** T tokens, H hidden, F ffn, E experts, K experts per token; N = T*K slots. */
interface Shape {
  readonly T: number;
  readonly H: number;
  readonly F: number;
  readonly E: number;
  readonly K: number;
  /** Which experts tokens go to; the rest stay empty. */
  readonly used: readonly number[];
}

interface Routing {
  readonly index: Int32Array;
  readonly weight: Float32Array;
  readonly offsets: Int32Array;
  readonly load: Int32Array;
  readonly slotToken: Int32Array;
  readonly slotWeight: Float32Array;
  readonly slotOf: Int32Array;
}

/** nn_moe_permute once more: a stable sort of the slots by expert. */
function route({ T, E, K, used }: Shape): Routing {
  const N = T * K;
  const index = integers(N, 11, used.length).map((i) => used[i]!);
  const weight = numbers(N, 12, 0.5);
  const order = Array.from(index.keys()).sort((a, b) => index[a]! - index[b]! || a - b);
  const load = new Int32Array(E);
  for (const expert of index) load[expert]!++;
  const offsets = new Int32Array(E + 1);
  for (let e = 0; e < E; e++) offsets[e + 1] = offsets[e]! + load[e]!;
  const slotOf = new Int32Array(N);
  for (const [slot, pair] of order.entries()) slotOf[pair] = slot;
  return {
    index, weight, offsets, load, slotOf,
    slotToken: Int32Array.from(order, (pair) => Math.floor(pair / K)),
    slotWeight: Float32Array.from(order, (pair) => weight[pair]!),
  };
}

const name = ({ T, H, F, E, K, used }: Shape): string => `T ${T}, H ${H}, F ${F}, E ${E} (${used.length} used), K ${K}`;
const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
const silu = (x: number): number => x * sigmoid(x);

/** For each expert op(A) op(B), one below the other; and the tolerance of the whole. */
function grouped(
  { E }: Shape, { offsets }: Routing, of: (expert: number, first: number, count: number) => Parameters<typeof product>,
): { exact: Float64Array; tolerance: ReturnType<typeof sumTolerance> } {
  const parts = Array.from({ length: E }, (_, e) => of(e, offsets[e]!, offsets[e + 1]! - offsets[e]!));
  const join = (absolute: boolean): Float64Array => Float64Array.from(parts.flatMap(([a, b, m, n, k]) => Array.from(product(a, b, m, n, k, absolute))));
  return { exact: join(false), tolerance: sumTolerance(join(true), 4e-6) };
}

function permute(shape: Shape): Case {
  const { T, E, K } = shape;
  const { index, weight, ...sorted } = route(shape);
  return define({
    kernel: 'moe_permute', sizes: name(shape),
    buffers: {
      offsets: output('i32', E + 1), load: output('i32', E), slotToken: output('i32', T * K), slotWeight: output('f32', T * K),
      slotOf: output('i32', T * K), index: input(index), weight: input(weight),
    },
    run: (kernels, t) => kernels.moePermute(t.offsets, t.load, t.slotToken, t.slotWeight, t.slotOf, t.index, t.weight, T, E, K),
    expected: () => sorted,
    tolerance: EXACT,
  });
}

function upForward(shape: Shape, keep: boolean): Case {
  const { T, H, F, E, K } = shape;
  const N = T * K;
  const routing = route(shape);
  const x = numbers(T * H, 21);
  const weights = numbers(E * 2 * F * H, 22, 1 / Math.sqrt(H));
  const { exact, tolerance } = grouped(shape, routing, (e, first, count) => [
    { values: x, columns: H, rows: (row) => routing.slotToken[first + row]! },
    { values: weights.subarray(e * 2 * F * H, (e + 1) * 2 * F * H), columns: H, transposed: true }, count, 2 * F, H,
  ]);
  const gate = (s: number, j: number): number => exact[s * 2 * F + j]!;
  const h = Float64Array.from({ length: N * F }, (_, i) => silu(gate(Math.floor(i / F), i % F)) * gate(Math.floor(i / F), F + (i % F)));
  const largest = exact.reduce((most, value) => Math.max(most, Math.abs(value)), 1);
  const buffers = { h: output('f32', N * F), x: input(x), slotToken: input(routing.slotToken), offsets: input(routing.offsets), weights: input(weights) };
  // An error d of gate or up becomes at most 1.1 * |other| * d in h.
  const loose = { ...tolerance, absolute: tolerance.absolute * 2.2 * largest };
  return keep
    ? define({
        kernel: 'moe_up_forward', sizes: `${name(shape)}, gate and up kept`, buffers: { ...buffers, gateUp: output('f32', N * 2 * F) },
        run: (kernels, t) => kernels.moeUpForward(t.h, t.gateUp, t.x, t.slotToken, t.offsets, t.weights, T, H, F, E, K, 'f32'),
        expected: () => ({ h, gateUp: exact }), tolerance: loose,
      })
    : define({
        kernel: 'moe_up_forward', sizes: name(shape), buffers,
        run: (kernels, t) => kernels.moeUpForward(t.h, null, t.x, t.slotToken, t.offsets, t.weights, T, H, F, E, K, 'f32'),
        expected: () => ({ h }), tolerance: loose,
      });
}

function downForward(shape: Shape): Case {
  const { T, H, F, E, K } = shape;
  const routing = route(shape);
  const h = numbers(T * K * F, 31);
  const weights = numbers(E * H * F, 32);
  const { exact, tolerance } = grouped(shape, routing, (e, first, count) => [
    { values: h.subarray(first * F), columns: F }, { values: weights.subarray(e * H * F), columns: F, transposed: true }, count, H, F,
  ]);
  return define({
    kernel: 'moe_down_forward', sizes: name(shape),
    buffers: { y: output('f32', T * K * H), h: input(h), offsets: input(routing.offsets), weights: input(weights) },
    run: (kernels, t) => kernels.moeDownForward(t.y, t.h, t.offsets, t.weights, T, H, F, E, K, 'f32'),
    expected: () => ({ y: exact }), tolerance,
  });
}

function combine(shape: Shape, plain: boolean): Case {
  const { T, H, K } = shape;
  const { slotOf } = route(shape);
  const weight = numbers(T * K, 41);
  const y = numbers(T * K * H, 42);
  const base = numbers(T * H, 43);
  const sum = (each: (t: number, k: number) => number, start: (i: number) => number, of: Numbers): Float64Array =>
    Float64Array.from({ length: T * H }, (_, i) => {
      const t = Math.floor(i / H);
      let total = start(i);
      for (let k = 0; k < K; k++) total += each(t, k) * of[slotOf[t * K + k]! * H + (i % H)]!;
      return total;
    });
  const one = (t: number, k: number): number => (plain ? 1 : weight[t * K + k]!);
  const exact = sum(one, (i) => (plain ? 0 : base[i]!), y);
  const absolute = sum((t, k) => Math.abs(one(t, k)), (i) => (plain ? 0 : Math.abs(base[i]!)), y.map(Math.abs));
  const tolerance = sumTolerance(absolute, 1e-6);
  const buffers = { out: output('f32', T * H), y: input(y), slotOf: input(slotOf) };
  return plain
    ? define({
        kernel: 'moe_combine', sizes: `${name(shape)}, neither weight nor base`, buffers,
        run: (kernels, t) => kernels.moeCombine(t.out, null, t.y, null, t.slotOf, T, H, K, 'f32'),
        expected: () => ({ out: exact }), tolerance,
      })
    : define({
        kernel: 'moe_combine', sizes: name(shape), buffers: { ...buffers, base: input(base), weight: input(weight) },
        run: (kernels, t) => kernels.moeCombine(t.out, t.base, t.y, t.weight, t.slotOf, T, H, K, 'f32'),
        expected: () => ({ out: exact }), tolerance, aliases: [['out', 'base']],
      });
}

function downBackward(shape: Shape, stores: boolean): Case {
  const { T, H, F, E, K } = shape;
  const N = T * K;
  const routing = route(shape);
  const { slotToken, slotWeight, slotOf, offsets } = routing;
  const dout = numbers(T * H, 51);
  const gateUp = numbers(N * 2 * F, 52, 0.7);
  const weights = numbers(E * H * F, 53, 1 / Math.sqrt(H));
  const { exact: dh, tolerance } = grouped(shape, routing, (e, first, count) => [
    { values: dout, columns: H, rows: (row) => slotToken[first + row]! }, { values: weights.subarray(e * H * F), columns: F }, count, F, H,
  ]);
  const h = Float32Array.from({ length: N * F }, (_, i) => {
    const row = Math.floor(i / F) * 2 * F;
    return silu(gateUp[row + (i % F)]!) * gateUp[row + F + (i % F)]!;
  });
  const dgateUp = Float64Array.from({ length: N * 2 * F }, (_, i) => {
    const [slot, j] = [Math.floor(i / (2 * F)), i % (2 * F)];
    const [gate, up] = [gateUp[slot * 2 * F + (j % F)]!, gateUp[slot * 2 * F + F + (j % F)]!];
    const slope = j < F ? up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))) : silu(gate);
    return slotWeight[slot]! * dh[slot * F + (j % F)]! * slope;
  });
  const dweight = Float64Array.from(slotOf, (slot) => {
    let dot = 0;
    for (let j = 0; j < F; j++) dot += dh[slot * F + j]! * h[slot * F + j]!;
    return dot;
  });
  const slope = Math.max(...gateUp.map(Math.abs), 1) * Math.max(...slotWeight.map(Math.abs), 1) * 1.1;
  const dots = Array.from(slotOf, (slot) => h.subarray(slot * F, (slot + 1) * F).reduce((sum, value) => sum + Math.abs(value), 0));
  const loose = { ...tolerance, absolute: tolerance.absolute * Math.max(slope, ...dots), relative: 4e-6 };
  const buffers = {
    dgateUp: output('f32', N * 2 * F), dweight: output('f32', N), dout: input(dout), gateUp: input(gateUp),
    slotToken: input(slotToken), slotWeight: input(slotWeight), slotOf: input(slotOf), offsets: input(offsets), weights: input(weights),
  };
  const workspace = { T, H, F, E, K };
  return stores
    ? define({
        kernel: 'moe_down_backward', sizes: `${name(shape)}, h stored again`, buffers: { ...buffers, h: output('f32', N * F) },
        run: (kernels, t) =>
          kernels.moeDownBackward(t.dgateUp, t.h, t.dweight, t.dout, t.gateUp, t.slotToken, t.slotWeight, t.slotOf, t.offsets, t.weights, T, H, F, E, K, 'f32'),
        expected: () => ({ dgateUp, h, dweight }), tolerance: loose, workspace, aliases: [['dgateUp', 'gateUp']],
      })
    : define({
        kernel: 'moe_down_backward', sizes: name(shape), buffers,
        run: (kernels, t) =>
          kernels.moeDownBackward(t.dgateUp, null, t.dweight, t.dout, t.gateUp, t.slotToken, t.slotWeight, t.slotOf, t.offsets, t.weights, T, H, F, E, K, 'f32'),
        expected: () => ({ dgateUp, dweight }), tolerance: loose, workspace, aliases: [['dgateUp', 'gateUp']],
      });
}

function downWeightGradient(shape: Shape): Case {
  const { T, H, F, E, K } = shape;
  const routing = route(shape);
  const dout = withTinyColumns(numbers(T * H, 61), H);
  const h = withTinyColumns(numbers(T * K * F, 62), F);
  const { slotToken, slotWeight, offsets } = routing;
  const weighted = Float64Array.from({ length: T * K * H }, (_, i) => slotWeight[Math.floor(i / H)]! * dout[slotToken[Math.floor(i / H)]! * H + (i % H)]!);
  const { exact, tolerance } = grouped(shape, routing, (_, first, count) => [
    { values: weighted.subarray(first * H), columns: H, transposed: true }, { values: h.subarray(first * F), columns: F }, H, F, count,
  ]);
  return define({
    kernel: 'moe_down_weight_gradient', sizes: name(shape),
    buffers: {
      gradient: accumulate(numbers(E * H * F, 63)), stored: output('f32', E * H * F), dout: input(dout), h: input(h), slotToken: input(slotToken),
      slotWeight: input(slotWeight), offsets: input(offsets),
    },
    run: (kernels, t) => {
      for (const [out, add] of [[t.gradient, 1], [t.stored, 0]] as const) {
        kernels.moeDownWeightGradient(out, t.dout, t.h, t.slotToken, t.slotWeight, t.offsets, T, H, F, E, K, add, 'f32');
      }
    },
    expected: () => ({ gradient: exact, stored: exact }), tolerance, workspace: { T, H, F, E, K }, same: [['stored', 'gradient']],
  });
}

function upBackward(shape: Shape): Case {
  const { T, H, F, E, K } = shape;
  const routing = route(shape);
  const dgateUp = numbers(T * K * 2 * F, 71);
  const weights = numbers(E * 2 * F * H, 72);
  const { exact, tolerance } = grouped(shape, routing, (e, first, count) => [
    { values: dgateUp.subarray(first * 2 * F), columns: 2 * F }, { values: weights.subarray(e * 2 * F * H), columns: H }, count, H, 2 * F,
  ]);
  return define({
    kernel: 'moe_up_backward', sizes: name(shape),
    buffers: { dx: output('f32', T * K * H), dgateUp: input(dgateUp), offsets: input(routing.offsets), weights: input(weights) },
    run: (kernels, t) => kernels.moeUpBackward(t.dx, t.dgateUp, t.offsets, t.weights, T, H, F, E, K, 'f32'),
    expected: () => ({ dx: exact }), tolerance,
  });
}

function upWeightGradient(shape: Shape): Case {
  const { T, H, F, E, K } = shape;
  const routing = route(shape);
  const dgateUp = withTinyColumns(numbers(T * K * 2 * F, 81), 2 * F);
  const x = withTinyColumns(numbers(T * H, 82), H);
  const { exact, tolerance } = grouped(shape, routing, (_, first, count) => [
    { values: dgateUp.subarray(first * 2 * F), columns: 2 * F, transposed: true },
    { values: x, columns: H, rows: (row) => routing.slotToken[first + row]! }, 2 * F, H, count,
  ]);
  return define({
    kernel: 'moe_up_weight_gradient', sizes: name(shape),
    buffers: {
      gradient: accumulate(numbers(E * 2 * F * H, 83)), stored: output('f32', E * 2 * F * H), dgateUp: input(dgateUp), x: input(x), slotToken: input(routing.slotToken),
      offsets: input(routing.offsets),
    },
    run: (kernels, t) => {
      for (const [out, add] of [[t.gradient, 1], [t.stored, 0]] as const) kernels.moeUpWeightGradient(out, t.dgateUp, t.x, t.slotToken, t.offsets, T, H, F, E, K, add, 'f32');
    },
    expected: () => ({ gradient: exact, stored: exact }), tolerance, same: [['stored', 'gradient']],
  });
}

/** linear_cross_entropy runs through the same products: chunks of 1024 tokens, targets ignored and not. */
function linearCrossEntropy(T: number, H: number, V: number): Case {
  const x = numbers(T * H, 91);
  const weights = numbers(V * H, 92, 1 / Math.sqrt(H));
  const random = generator(93);
  const target = Int32Array.from({ length: T }, () => (random() < 0.1 ? -100 : Math.floor(random() * V)));
  const scale = 0.5 / Math.max(T, 1);
  const logits = product({ values: x, columns: H }, { values: weights, columns: H, transposed: true }, T, V, H);
  const loss = new Float64Array(T);
  const dlogits = new Float64Array(T * V);
  for (let t = 0; t < T; t++) {
    if (target[t] === -100) continue;
    const row = logits.subarray(t * V, (t + 1) * V);
    const top = row.reduce((most, value) => Math.max(most, value), -Infinity);
    const sum = row.reduce((total, value) => total + Math.exp(value - top), 0);
    loss[t] = Math.log(sum) + top - row[target[t]!]!;
    for (let v = 0; v < V; v++) dlogits[t * V + v] = scale * (Math.exp(row[v]! - top) / sum - (v === target[t] ? 1 : 0));
  }
  return define({
    kernel: 'linear_cross_entropy', sizes: `T ${T}, H ${H}, V ${V}`,
    buffers: {
      loss: output('f32', T), dx: output('f32', T * H), dweight: accumulate(numbers(V * H, 94, 0.01)), x: input(x), target: input(target), weights: input(weights),
    },
    run: (kernels, t) => kernels.linearCrossEntropy(t.loss, t.dx, t.dweight, t.x, t.target, t.weights, T, H, V, scale, 'f32'),
    expected: () => ({
      loss,
      dx: product({ values: dlogits, columns: V }, { values: weights, columns: H }, T, H, V),
      dweight: product({ values: dlogits, columns: V, transposed: true }, { values: x, columns: H }, V, H, T),
    }),
    tolerance: { absolute: 1e-5, relative: 2e-5, why: 'logits of up to 60 carry 1e-5, which is their error in the softmax' },
    workspace: { T, H, V },
  });
}

const every = (used: number): number[] => Array.from({ length: used }, (_, i) => i);
const shapes: Shape[] = [
  { T: 0, H: 8, F: 8, E: 2, K: 1, used: every(2) },
  { T: 1, H: 7, F: 5, E: 3, K: 2, used: every(3) },
  { T: 37, H: 1, F: 1, E: 3, K: 2, used: every(3) },
  { T: 64, H: 32, F: 48, E: 4, K: 2, used: every(4) },
  { T: 97, H: 33, F: 41, E: 5, K: 3, used: every(5) },
  { T: 130, H: 31, F: 17, E: 4, K: 4, used: [3] },
  { T: 150, H: 16, F: 8, E: 6, K: 2, used: [0, 5] },
  { T: 40, H: 37, F: 545, E: 2, K: 2, used: every(2) },
];
const cases: Case[] = shapes.flatMap((shape) => [
  permute(shape), upForward(shape, true), upForward(shape, false), downForward(shape), combine(shape, false), combine(shape, true),
  downBackward(shape, true), downBackward(shape, false), downWeightGradient(shape), upBackward(shape), upWeightGradient(shape),
]);
cases.push(linearCrossEntropy(0, 3, 5), linearCrossEntropy(1, 5, 1), linearCrossEntropy(33, 24, 67), linearCrossEntropy(1100, 9, 61));

describeKernels('mixture of experts', cases);
describeInstructionSets('mixture of experts', cases);
