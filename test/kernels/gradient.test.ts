/**
 * The float64 reference's backward functions against central finite differences of its forward functions: what the kernels are held
 * to is itself right. For a random direction dy, d(sum of dy * f(x))/dx is taken element by element.
 */
import { expect } from 'chai';
import { generator } from './harness.ts';
import * as reference from './reference.ts';
import type { Numbers } from './reference.ts';

/** Step of the differences; the truncation error is its square, the rounding error 1e-16 over it. */
const STEP = 1e-5;
const TOLERANCE = 1e-8;

function random(length: number, seed: number): Float64Array {
  const next = generator(seed);
  return Float64Array.from({ length }, () => next() * 2 - 1);
}

const dot = (a: Numbers, b: Numbers): number => Array.from(a).reduce((sum, value, i) => sum + value * b[i]!, 0);

/** Checks that `gradient` is the derivative of `value` at x. */
function check(what: string, x: Float64Array, value: (x: Float64Array) => number, gradient: Numbers): void {
  expect(gradient.length).to.equal(x.length);
  for (let i = 0; i < x.length; i++) {
    const moved = Float64Array.from(x);
    moved[i] = x[i]! + STEP;
    const above = value(moved);
    moved[i] = x[i]! - STEP;
    const difference = (above - value(moved)) / (2 * STEP);
    expect(gradient[i], `${what}[${i}]`).to.be.closeTo(difference, TOLERANCE * (1 + Math.abs(difference)));
  }
}

describe('the reference backward is the derivative of the reference forward', () => {
  it('silu', () => {
    const x = random(40, 1).map((value) => value * 6);
    check('dx', x, (at) => at.reduce((sum, value) => sum + reference.silu(value), 0), x.map(reference.siluSlope));
  });

  it('swiglu', () => {
    const [rows, F] = [3, 5];
    const [x, dh] = [random(2 * rows * F, 2), random(rows * F, 3)];
    check('dgate_up', x, (at) => dot(dh, reference.swigluForward(at, rows, F)), reference.swigluBackward(dh, x, rows, F));
  });

  it('softmax', () => {
    const [x, dy] = [random(21, 4), random(21, 5)];
    const y = reference.softmaxForward(x, 3, 7);
    check('dx', x, (at) => dot(dy, reference.softmaxForward(at, 3, 7)), reference.softmaxBackward(dy, y, 3, 7));
  });

  it('the router, through the renormalised weights and the aux loss', () => {
    const [T, E, K] = [4, 6, 3];
    const [x, dweight] = [random(T * E, 6), random(T * K, 7)];
    const { probability, weight, index } = reference.softmaxTopkForward(x, T, E, K);
    const load = new Int32Array(E);
    for (const i of index) load[i]!++;
    const auxScale = 0.7;
    const value = (at: Float64Array): number => {
      const routing = reference.softmaxTopkForward(at, T, E, K);
      return dot(dweight, routing.weight) + auxScale * reference.auxLoss(routing.probability, load, T, E, K);
    };
    check('dlogits', x, value, reference.softmaxTopkBackward(dweight, probability, weight, index, load, T, E, K, auxScale));
  });

  it('rmsnorm, for x and for the weight', () => {
    const [T, H] = [3, 8];
    const [x, weight, dy] = [random(T * H, 8), random(H, 9), random(T * H, 10)];
    const { reciprocal } = reference.rmsnormForward(x, weight, T, H, 1e-5);
    const { dx, dweight } = reference.rmsnormBackward(dy, x, reciprocal, weight, T, H);
    check('dx', x, (at) => dot(dy, reference.rmsnormForward(at, weight, T, H, 1e-5).y), dx);
    check('dweight', weight, (at) => dot(dy, reference.rmsnormForward(x, at, T, H, 1e-5).y), dweight);
  });

  it('rope: the inverse rotation is the derivative', () => {
    const [T, heads, D] = [4, 2, 6];
    const { cosine, sine } = reference.ropeFreqs(9, D, 1e4, 1);
    const position = Int32Array.from([3, 0, 8, 5]);
    const [x, dy] = [random(T * heads * D, 11), random(T * heads * D, 12)];
    const rotate = (at: Numbers, direction: number): Float64Array =>
      reference.rope(at, position, cosine, sine, T, heads, heads * D, D, direction);
    check('dx', x, (at) => dot(dy, rotate(at, 1)), rotate(dy, -1));
  });

  for (const shape of [{ B: 2, S: 5, Q: 4, G: 2, D: 4 }, { B: 1, S: 6, Q: 3, G: 1, D: 2 }]) {
    it(`attention with ${shape.Q} query and ${shape.G} key heads`, () => {
      const { B, S, Q, G, D } = shape;
      const [qkv, dout] = [random(B * S * (Q + 2 * G) * D, 13), random(B * S * Q * D, 14)];
      check('dqkv', qkv, (at) => dot(dout, reference.attention(at, shape).out), reference.attentionBackward(dout, qkv, shape));
    });
  }

  it('cross-entropy, with ignored targets', () => {
    const [T, V] = [4, 7];
    const x = random(T * V, 15);
    const target = Int32Array.from([2, reference.IGNORED, 0, 6]);
    const value = (at: Float64Array): number => 0.3 * reference.crossEntropyForward(at, target, T, V).reduce((a, b) => a + b, 0);
    check('dlogits', x, value, reference.crossEntropyBackward(x, target, T, V, 0.3));
  });

  it('embedding: scatter_add is the derivative', () => {
    const [T, H, V] = [6, 3, 4];
    const token = Int32Array.from([1, 3, 1, 0, 3, 3]);
    const [table, dy] = [random(V * H, 16), random(T * H, 17)];
    const gradient = reference.scatterAdd(new Float64Array(V * H), dy, token, T, H, V);
    check('dtable', table, (at) => dot(dy, reference.embeddingForward(token, at, T, H, V)), gradient);
  });
});
