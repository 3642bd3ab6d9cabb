/** The gemm section of nn.h: all transposes, sizes around every block, and the sum that is added once. */
import { expect } from 'chai';
import { Device, slice } from '../../cuda/device.ts';
import type { Case } from './harness.ts';
import { accumulate, define, describeKernels, input, inout, numbers, output } from './harness.ts';
import { describeInstructionSets, product, sumTolerance } from './products.ts';

const operands = (m: number, n: number, k: number, transposeA: number, transposeB: number, seed: number) => {
  const a = numbers(m * k, seed);
  const b = numbers(k * n, seed + 1);
  const left = { values: a, columns: transposeA ? m : k, transposed: transposeA === 1 };
  const right = { values: b, columns: transposeB ? k : n, transposed: transposeB === 1 };
  return { a, b, exact: product(left, right, m, n, k), tolerance: sumTolerance(product(left, right, m, n, k, true), 2e-6) };
};

function gemm(m: number, n: number, k: number, transposeA: number, transposeB: number): Case {
  const { a, b, exact, tolerance } = operands(m, n, k, transposeA, transposeB, m + n + k);
  return define({
    kernel: 'gemm',
    sizes: `${m}x${n}x${k}, transposes ${transposeA}${transposeB}`,
    buffers: { c: output('f32', m * n), a: input(a), b: input(b) },
    run: (kernels, { c, a, b }) => kernels.gemm(c, a, b, m, n, k, transposeA, transposeB, 'f32', 'f32'),
    expected: () => ({ c: exact }),
    tolerance,
  });
}

/** beta 1 and alpha 1 is how weight gradients accumulate: checked as an `add` output. */
function gemmAdd(m: number, n: number, k: number, transposeA: number, transposeB: number): Case {
  const { a, b, exact, tolerance } = operands(m, n, k, transposeA, transposeB, m + 2 * n + k);
  return define({
    kernel: 'gemm_beta',
    sizes: `${m}x${n}x${k}, transposes ${transposeA}${transposeB}, accumulating`,
    buffers: { c: accumulate(numbers(m * n, 7, 30)), a: input(a), b: input(b) },
    run: (kernels, { c, a, b }) => kernels.gemmBeta(c, a, b, m, n, k, transposeA, transposeB, 1, 1, 'f32', 'f32'),
    expected: () => ({ c: exact }),
    tolerance,
  });
}

function gemmBeta(m: number, n: number, k: number, alpha: number, beta: number): Case {
  const { a, b, exact, tolerance } = operands(m, n, k, 0, 1, m + 3 * n + k);
  const before = numbers(m * n, 9);
  if (beta === 0) before.fill(NaN); // must not be read
  return define({
    kernel: 'gemm_beta',
    sizes: `${m}x${n}x${k}, alpha ${alpha}, beta ${beta}`,
    buffers: { c: inout(before), a: input(a), b: input(b) },
    run: (kernels, { c, a, b }) => kernels.gemmBeta(c, a, b, m, n, k, 0, 1, alpha, beta, 'f32', 'f32'),
    expected: () => ({ c: exact.map((value, i) => alpha * value + (beta === 0 ? 0 : beta * before[i]!)) }),
    tolerance,
  });
}

function gemmBatched(batch: number, m: number, n: number, k: number, transposeA: number, transposeB: number): Case {
  const each = Array.from({ length: batch }, (_, i) => operands(m, n, k, transposeA, transposeB, 100 + 10 * i));
  const joined = (part: 'a' | 'b'): Float32Array => Float32Array.from(each.flatMap((one) => Array.from(one[part])));
  return define({
    kernel: 'gemm_batched',
    sizes: `${batch} of ${m}x${n}x${k}, transposes ${transposeA}${transposeB}`,
    buffers: { c: output('f32', batch * m * n), a: input(joined('a')), b: input(joined('b')) },
    run: (kernels, { c, a, b }) => kernels.gemmBatched(c, a, b, batch, m, n, k, transposeA, transposeB, 'f32', 'f32'),
    expected: () => ({ c: each.flatMap((one) => Array.from(one.exact)) }),
    tolerance: each.reduce((most, { tolerance }) => (tolerance.absolute > most.absolute ? tolerance : most), sumTolerance([0], 2e-6)),
  });
}

const TRANSPOSES = [[0, 0], [0, 1], [1, 0], [1, 1]] as const;
// 0, 1, primes, and one less and more than micro tiles (6, 14 x 16, 32), column blocks (512), row blocks (280) and k blocks (512).
const SIZES = [
  [1, 1, 1], [13, 17, 7], [14, 32, 16], [15, 33, 17], [29, 31, 127], [97, 61, 53], [1, 300, 40], [300, 1, 40], [281, 66, 33],
  [20, 513, 19], [23, 35, 513], [30, 16, 1031],
] as const;

const cases: Case[] = [
  gemm(0, 5, 3, 0, 0), gemm(5, 0, 3, 0, 1), gemm(3, 4, 0, 1, 0), gemmAdd(3, 4, 0, 0, 0),
  ...TRANSPOSES.flatMap(([ta, tb]) => [gemm(15, 33, 17, ta, tb), gemm(97, 61, 53, ta, tb), gemmAdd(30, 50, 521, ta, tb)]),
  gemmBeta(19, 37, 23, 0.7, -0.3), gemmBeta(19, 37, 600, 1, 0.5), gemmBeta(19, 37, 23, -2, 0), gemmBeta(33, 7, 520, 0.5, 1),
  gemmBatched(0, 3, 3, 3, 0, 0), gemmBatched(7, 19, 35, 21, 1, 1), gemmBatched(3, 5, 70, 9, 0, 0),
  ...SIZES.map(([m, n, k], i) => gemm(m, n, k, i & 1, (i >> 1) & 1)), gemm(1130, 40, 530, 0, 1), gemmAdd(64, 90, 1100, 1, 0),
];

describeKernels('matrix products', cases);
describeInstructionSets('matrix products', cases);

describe('the order of a sum in a matrix product', () => {
  it('is that of k alone: a row has the same bits alone and among others, a column too', () => {
    const [m, n, k] = [301, 130, 700];
    const device = Device.open({ library: 'cpu', index: 0, threads: 2 });
    try {
      const place = (values: Float32Array) => {
        const tensor = device.allocate('f32', values.length);
        device.upload(tensor, values);
        return tensor;
      };
      const [a, b] = [place(numbers(m * k, 1)), place(numbers(k * n, 2))];
      const [whole, one] = [device.allocate('f32', m * n), device.allocate('f32', n)];
      const [all, row] = [new Float32Array(m * n), new Float32Array(n)];
      device.kernels.gemm(whole, a, b, m, n, k, 0, 0, 'f32', 'f32');
      device.download(all, whole);
      for (const i of [0, 13, 14, 279, 280, 300]) {
        device.kernels.gemm(one, slice(a, i * k, k), b, 1, n, k, 0, 0, 'f32', 'f32');
        device.download(row, one);
        expect(Buffer.from(row.buffer).equals(Buffer.from(all.buffer, i * n * 4, n * 4)), `row ${i}`).to.equal(true);
      }
    } finally {
      device.close();
    }
  });
});
