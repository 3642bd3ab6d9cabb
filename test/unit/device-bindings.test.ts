/**
 * The generated bindings: that they are fresh, and that they refuse tensors of the wrong type or length before any kernel runs.
 * The native library is replaced by a recorder here, so that only the generated code is tested.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import { packageRoot } from '../../config/schema.ts';
import { Kernels } from '../../cuda/bindings.generated.ts';
import type { Native } from '../../cuda/bindings.generated.ts';
import { generateBindings } from '../../cuda/generate-bindings.ts';
import { reinterpret, slice } from '../../cuda/tensor.ts';
import type { Tensor } from '../../cuda/tensor.ts';

const header = readFileSync(join(packageRoot(), 'cuda', 'include', 'nn.h'), 'utf8');

describe('generated bindings', () => {
  it('are fresh: what the generator makes of nn.h is what is committed', () => {
    const committed = readFileSync(join(packageRoot(), 'cuda', 'bindings.generated.ts'), 'utf8');
    expect(committed === generateBindings(header), 'cuda/bindings.generated.ts is stale: run `npm run generate`').to.equal(true);
  });

  const faulty = (declaration: string): string => `#define NN_ABI_VERSION 1\nNN_API nn_status nn_f(\n    nn_context *context,\n${declaration});\n`;

  it('refuse a header whose comments leave a tensor unchecked', () => {
    const cases: [string, RegExp][] = [
      ['    void *y,\n    int64_t n, nn_dtype dtype', /'y' has the type void\* and no comment/],
      ['    void *y, // out dtype [m]\n    int64_t n, nn_dtype dtype', /no argument m/],
      ['    void *y, // out dtype\n    int64_t n, nn_dtype dtype', /does not follow the grammar/],
      ['    float *y, // out f64 [n]\n    int64_t n', /points to float, but its comment says f64/],
      ['    void *y, // out out_dtype [n]\n    int64_t n, nn_dtype dtype', /no argument out_dtype/],
      ['    void *y, // gives dtype [n]\n    int64_t n, nn_dtype dtype', /does not follow the grammar/],
    ];
    for (const [declaration, message] of cases) expect(() => generateBindings(faulty(declaration)), declaration).to.throw(message);
    expect(() => generateBindings(header.replace('#define NN_ABI_VERSION', '#define NN_OTHER'))).to.throw(/NN_ABI_VERSION/);
  });

  describe('check tensors before they call', () => {
    const calls: unknown[][] = [];
    const native = new Proxy({}, { get: (_, name) => (...values: unknown[]) => (calls.push([name, ...values]), 0) }) as Native;
    const kernels = new Kernels(native, 7, () => {
      throw new Error('no call fails here');
    });
    const f32 = (length: number, address = 256): Tensor => ({ address, dtype: 'f32', length });

    beforeEach(() => calls.splice(0));

    it('pass addresses, sizes and type codes in the order of nn.h', () => {
      kernels.gemm(f32(6, 1), f32(8, 2), f32(12, 3), 2, 3, 4, 0, 1, 'f32', 'f32');
      kernels.moeCombine(f32(6, 1), null, f32(12, 2), null, { address: 3, dtype: 'i32', length: 4 }, 2, 3, 2, 'f32');
      expect(calls).to.deep.equal([
        ['nn_gemm', 7, 1, 2, 3, 2, 3, 4, 0, 1, 0, 0],
        ['nn_moe_combine', 7, 1, 0, 2, 0, 3, 2, 3, 2, 0],
      ]);
    });

    it('refuse another type, a short tensor, host memory, NaN sizes and unknown types', () => {
      const host = new Float32Array(64) as unknown as Tensor;
      const bad: [() => void, RegExp][] = [
        [() => kernels.add(f32(4), f32(4), { ...f32(4), dtype: 'f64' }, 4, 'f32'), /^add: b must be f32 \[4\], but is f64 \[4\]$/],
        [() => kernels.add(f32(3), f32(4), f32(4), 4, 'f32'), /^add: y must be f32 \[4\], but is f32 \[3\]$/],
        [() => kernels.add(f32(4), f32(4), f32(4), 4, 'bf16'), /^add: y must be bf16/],
        [() => kernels.add(f32(4), host, f32(4), 4, 'f32'), /but is host memory, Float32Array \[64\]/],
        [() => kernels.add(f32(4), f32(4), f32(4), NaN, 'f32'), /^add: y must be f32 \[NaN\]/],
        [() => kernels.digest({ ...f32(2), dtype: 'u64' }, host, 4), /^digest: x must be u8/],
        [() => kernels.digest({ ...f32(2), dtype: 'u64' }, f32(3), 4), /^digest: x must be u8 \[16\]/],
        [() => kernels.copyToDevice(f32(4), f32(4) as never, 16), /^copy_to_device: source must be host/],
        [() => kernels.softmaxForward({ ...f32(4), dtype: 'f64' }, { ...f32(4), dtype: 'f64' }, 1, 4, 'f64' as never), /no type that kernels compute in/],
      ];
      for (const [call, message] of bad) expect(call).to.throw(Error, message);
      expect(calls).to.deep.equal([]);
    });

    it('turn a status into the error of the caller', () => {
      const failing = new Kernels(new Proxy({}, { get: () => () => 3 }) as Native, 7, (kernel, status) => {
        throw new Error(`${kernel} ${status}`);
      });
      expect(() => failing.zeroGrad(f32(4), 4)).to.throw('nn_zero_grad 3');
    });
  });
});

describe('tensors', () => {
  it('slice and reinterpret within their bytes', () => {
    const tensor: Tensor = { address: 1024, dtype: 'f32', length: 10 };
    expect(slice(tensor, 4, 6)).to.deep.equal({ address: 1040, dtype: 'f32', length: 6 });
    expect(reinterpret(tensor, 'f64')).to.deep.equal({ address: 1024, dtype: 'f64', length: 5 });
    for (const [offset, length] of [[-1, 2], [5, 6], [0, 1.5], [NaN, 1]] as const) expect(() => slice(tensor, offset, length)).to.throw(RangeError);
  });
});
