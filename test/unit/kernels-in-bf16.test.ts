/** How a case of the kernel tables becomes one in bf16: which of its tensors change their type, what is asked of the kernel, what fails. */
import { expect } from 'chai';
import { Kernels } from '../../cuda/bindings.generated.ts';
import type { Native } from '../../cuda/bindings.generated.ts';
import { BF16_TOLERANCE, compareHalf, inBf16, signatures } from '../kernels/bf16.ts';
import { cases } from '../kernels/table.ts';
import { TILE_TESTS, tileCases } from '../kernels/tiles.ts';
import { accumulate, define, input, output } from '../kernels/harness.ts';
import type { Case } from '../kernels/harness.ts';

const known = signatures();
const caseOf = (kernel: string, sizes: RegExp) => cases.find((one) => one.kernel === kernel && sizes.test(one.sizes))!;
const product = define({
  kernel: 'gemm', sizes: '2x2x2', buffers: { c: output('f32', 4), a: input(Float32Array.of(1.001, 2, 3, 4)), b: input(Float32Array.of(1, 0, 0, 1)) },
  run: (kernels, t) => kernels.gemm(t.c, t.a, t.b, 2, 2, 2, 0, 0, 'f32', 'f32'), expected: () => ({}), tolerance: { absolute: 0, relative: 0, why: '' },
});

/** The types that a case asks its kernel for, and those of its tensors. */
function askedBy(one: Case): { values: unknown[]; dtypes: Record<string, string> } {
  let values: unknown[] = [];
  const kernels = new Proxy({}, { get: () => (...given: unknown[]) => (values = given) }) as Kernels;
  const tensors = Object.fromEntries(Object.entries(one.buffers).map(([name, { dtype }]) => [name, { dtype, length: 0, address: 0 }]));
  one.run(kernels, tensors);
  return { values: values.filter((value) => typeof value === 'string'), dtypes: Object.fromEntries(Object.entries(one.buffers).map(([name, { dtype }]) => [name, dtype])) };
}

describe('kernel cases in bf16', () => {
  it('know from nn.h which tensors have the type that a kernel is told', () => {
    expect(known.get('gemm')).to.deep.equal({ dtype: 9, outDtype: 8, half: [1, 2], out: [0] });
    expect(known.get('rmsnormBackward')).to.deep.include({ half: [0, 2, 3, 5], out: [] });
    expect(known.get('moeDownBackward')!.half).to.deep.equal([0, 1, 3, 4, 9]);
    expect([...known.keys()]).to.include.members(['flashAttentionBackward', 'linearCrossEntropy', 'argmax']).and.not.include('softmaxTopkForward');
  });

  it('round inputs for both sides, and ask the kernel for bf16', () => {
    const half = inBf16(product, known, false)!;
    expect(askedBy(half.half)).to.deep.equal({ values: ['bf16', 'bf16'], dtypes: { c: 'bf16', a: 'bf16', b: 'bf16' } });
    expect([...(half.plain.buffers['a']!.values as Float32Array)]).to.deep.equal([1, 2, 3, 4]);
    expect([...(half.half.buffers['a']!.values as Uint16Array)]).to.deep.equal([0x3f80, 0x4000, 0x4040, 0x4080]);
    const wide = inBf16(product, known, true)!;
    expect(askedBy(wide.half)).to.deep.equal({ values: ['f32', 'bf16'], dtypes: { c: 'f32', a: 'bf16', b: 'bf16' } });
  });

  it('leave alone what has no type, spells it out, or has numbers that bf16 has another way', () => {
    expect(inBf16(caseOf('adamw_step', /n=17 /), known, false)).to.equal(undefined);
    expect(inBf16(caseOf('softmax_topk_forward', /T=7/), known, false)).to.equal(undefined);
    expect(inBf16(caseOf('silu_forward', /infinities/), known, false)).to.equal(undefined);
    expect(inBf16(caseOf('silu_forward', /n=17/), known, true), 'a kernel without out_dtype').to.equal(undefined);
    const adding: Case = { ...product, buffers: { ...product.buffers, c: accumulate(new Float32Array(4)) } };
    expect(inBf16(adding, known, false), 'a sum is float32').to.equal(undefined);
    expect([...inBf16(adding, known, true)!.names]).to.deep.equal(['a', 'b']);
    expect(cases.filter((one) => inBf16(one, known, false) !== undefined)).to.have.length.above(250);
    const norm = inBf16(caseOf('rmsnorm_backward', /T=17/), known, false)!;
    expect([...norm.names].sort()).to.deep.equal(Object.entries(norm.half.buffers).flatMap(([name, { dtype }]) => (dtype === 'bf16' ? [name] : [])).sort());
    expect(norm.half.buffers['dweight']!.dtype).to.equal('f32');
  });

  it('of tensor-core tiles fit the kernels that they call', () => {
    const native = new Proxy({}, { get: () => () => 0 }) as Native;
    const kernels = new Kernels(native, 1, (kernel) => {
      throw new Error(kernel);
    });
    let count = 0;
    for (const one of tileCases()) {
      for (const wide of [false, true]) {
        const half = inBf16(one, known, wide);
        if (half === undefined) continue;
        count++;
        for (const { run, buffers } of [half.half, half.plain]) {
          run(kernels, Object.fromEntries(Object.entries(buffers).map(([name, { dtype, values }], at) => [name, { dtype, length: values.length, address: 256 * (at + 1) }])));
        }
      }
    }
    expect(count).to.equal(TILE_TESTS);
  });

  it('fail for a value far off, one that is not finite, and another integer', () => {
    const half = inBf16(product, known, true)!;
    const want = { c: Float32Array.of(1, 2, 3, 4) };
    const check = (...values: number[]) => () => compareHalf(half, { c: Float32Array.of(...values) }, want);
    expect(check(1, 2, 3, 4 * (1 + BF16_TOLERANCE))).to.not.throw();
    expect(check(1, 2, 3, 4.2)).to.throw(/c is off by 3\.\d+e-2 of its norm/);
    expect(check(1, NaN, 3, 4)).to.throw(/c\[1\] is NaN/);
    const token = inBf16(caseOf('argmax', /B=17/), known, false)!;
    const right = new Int32Array(17).fill(2);
    expect(() => compareHalf(token, { token: right.with(3, 1) }, { token: right })).to.throw('token[3] is 1, must be 2');
  });
});
