/**
 * What several tables share: the matrix product in float64 with a bound on float32's error, and suites that run on each instruction
 * set of this CPU. Used by the *.test.ts beside it; knows no kernel.
 */
import { Device } from '../../cuda/device.ts';
import type { Case, Tolerance } from './harness.ts';
import { checkCase } from './harness.ts';
import type { Numbers } from './reference.ts';

/** A row-major matrix, its rows perhaps picked by an index and the whole perhaps transposed. */
export interface Operand {
  readonly values: Numbers;
  readonly columns: number;
  readonly rows?: (row: number) => number;
  readonly transposed?: boolean;
}

const at = ({ values, columns, rows, transposed }: Operand, i: number, j: number): number => {
  const [row, column] = transposed === true ? [j, i] : [i, j];
  return values[(rows === undefined ? row : rows(row)) * columns + column]!;
};

/** [m, n]: op(A) op(B) in float64; with `absolute` the same of the absolute values, which bounds the rounding. */
export function product(a: Operand, b: Operand, m: number, n: number, k: number, absolute = false): Float64Array {
  const c = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let p = 0; p < k; p++) {
      const left = at(a, i, p);
      for (let j = 0; j < n; j++) {
        const term = left * at(b, p, j);
        c[i * n + j]! += absolute ? Math.abs(term) : term;
      }
    }
  }
  return c;
}

/** Float32 sums in one chain: an error of a few units in the last place of the sum of absolute terms, here 2e-6 of the largest. */
export const sumTolerance = (absoluteSums: Numbers, relative = 0): Tolerance => ({
  absolute: 2e-6 * Array.from(absoluteSums).reduce((largest, value) => Math.max(largest, value), 1e-30),
  relative,
  why: '2e-6 of the largest sum of absolute terms: a chain of up to 2000 float32 roundings',
});

export type InstructionSet = 'plain' | 'avx2' | 'avx512';

/** A suite for each instruction set, skipped where the CPU lacks it. `devices` has 1, 2 and 3 threads and is filled when the tests run. */
export function forEachInstructionSet(title: string, sets: readonly InstructionSet[], body: (devices: readonly Device[]) => void): void {
  for (const isa of sets) {
    describe(`${title} with ${isa} instructions`, () => {
      const before_ = process.env['CUDA_NN_ISA'];
      const devices: Device[] = [];
      before(function () {
        process.env['CUDA_NN_ISA'] = isa;
        devices.push(...[1, 2, 3].map((threads) => Device.open({ library: 'cpu', index: 0, threads })));
        if (devices[0]!.description.isa !== isa) this.skip();
      });
      after(() => {
        if (before_ === undefined) delete process.env['CUDA_NN_ISA'];
        else process.env['CUDA_NN_ISA'] = before_;
        for (const device of devices) device.close();
      });
      body(devices);
    });
  }
}

/** Each case on the instruction sets below AVX-512. */
export function describeInstructionSets(title: string, cases: readonly Case[]): void {
  forEachInstructionSet(title, ['plain', 'avx2'], (devices) => {
    for (const one of cases) it(`${one.kernel} ${one.sizes}`, () => checkCase(devices, one));
  });
}
