/**
 * device.ts against the real CPU library: memory, copies, errors with their codes, devices in several threads, and libraries that
 * are missing, foreign, of another ABI version, or lack a function.
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { expect } from 'chai';
import { errorCode } from '../../config/errors.ts';
import { ABI_VERSION, PROTOTYPES } from '../../cuda/bindings.generated.ts';
import { Device, describeDevices, hostFreeBytes, libraryPath, loadLibrary, slice } from '../../cuda/device.ts';

/** The error of `call` as "CODE: message". */
function failure(call: () => unknown): string {
  try {
    call();
  } catch (error) {
    return `${errorCode(error) ?? 'BUG'}: ${(error as Error).message}`;
  }
  return 'nothing thrown';
}

const cpu = { library: 'cpu', index: 0, threads: 1 } as const;

/** One token a sequence from the same logits, by a CPU device of so many threads with just the workspace that it asks for. */
function sampled(threads: number, B: number, V: number): number[] {
  const device = Device.open({ ...cpu, threads });
  try {
    const bytes = device.workspaceBytes({ T: B, S: 1, H: 8, F: 8, E: 1, K: 1, V, Q: 1, G: 1, D: 8 }, 'f32');
    device.setWorkspace(device.allocate('u8', bytes));
    const [logits, counter, token] = [device.allocate('f32', B * V), device.allocate('i32', B), device.allocate('i32', B)];
    device.kernels.randomNormal(logits, B * V, 1, 2, 0, 3);
    device.upload(counter, Int32Array.from({ length: B }, (_, b) => b));
    device.kernels.sample(token, logits, counter, B, V, 1, 7, 'f32');
    const tokens = new Int32Array(B);
    device.download(tokens, token);
    return [...tokens];
  } finally {
    device.close();
  }
}

describe('device', () => {
  let device: Device;
  before(() => {
    device = Device.open(cpu);
  });
  after(() => device.close());

  it('has workspace to sample with more threads than sequences, and with fewer', () => {
    for (const [B, V] of [[1, 32_000], [2, 32_000], [50, 3000]] as const) expect(sampled(24, B, V)).to.deep.equal(sampled(1, B, V));
  });

  it('says what it is', () => {
    const { library, kind, index, memoryBytes, isa } = device.description;
    expect({ library, kind, index }).to.deep.equal({ library: 'cpu', kind: 'cpu', index: 0 });
    expect(memoryBytes).to.be.above(1e8);
    expect(device.freeBytes()).to.be.within(1, memoryBytes);
    expect(hostFreeBytes()).to.be.within(1, memoryBytes);
    expect(['avx512', 'avx2', 'plain']).to.include(isa);
    expect(describeDevices('cpu')).to.have.length(1);
  });

  it('takes host memory there and back, slices included', () => {
    const tensor = device.allocate('f32', 8);
    device.upload(tensor, Float32Array.from({ length: 8 }, (_, i) => i));
    device.upload(slice(tensor, 2, 2), Float32Array.of(20, 30));
    const back = new Float32Array(5);
    device.download(back, slice(tensor, 1, 5));
    expect([...back]).to.deep.equal([1, 20, 30, 4, 5]);
    device.kernels.add(tensor, tensor, tensor, 8, 'f32');
    device.synchronize();
    device.download(back, tensor);
    expect([...back]).to.deep.equal([0, 2, 40, 60, 8]);
    device.free(tensor);
  });

  it('times what it does, also when that fails', () => {
    const tensor = device.allocate('f32', 1 << 20);
    const add = (): void => device.kernels.add(tensor, tensor, tensor, tensor.length, 'f32');
    device.kernels.zeroGrad(tensor, tensor.length);
    const before = performance.now();
    const elapsed = device.time(add);
    expect(elapsed).to.be.above(0).and.at.most(performance.now() - before);
    expect(failure(() => device.time(() => device.kernels.add(tensor, tensor, tensor, 2 ** 21, 'f32')))).to.match(/^BUG: /);
    expect(device.time(() => undefined)).to.be.below(elapsed + 1000);
    device.free(tensor);
  });

  it('says that the CPU records no graphs', () => {
    expect(device.recordsGraphs).to.equal(false);
    expect(failure(() => device.record(() => undefined))).to.match(/^DEVICE_UNSUPPORTED: nn_graph_begin: .*CPU/);
    expect(failure(() => device.launch({ handle: 1 }))).to.match(/^BUG: launch: /);
    expect(failure(() => device.discard({ handle: 1 }))).to.match(/^BUG: discard: /);
  });

  it('refuses host memory of another type, and more of it than there is room for', () => {
    const tensor = device.allocate('f32', 4);
    expect(failure(() => device.upload(tensor, new Float64Array(2)))).to.match(/^BUG: upload: .*host f32.*Float64Array/);
    expect(failure(() => device.upload(tensor, new Float32Array(5)))).to.match(/^BUG: upload: the device side must be f32 \[5\], but is f32 \[4\]/);
    expect(failure(() => device.download(new Uint8Array(4), tensor))).to.match(/^BUG: download: /);
    expect(failure(() => device.download(tensor as never, tensor))).to.match(/^BUG: download: /);
    expect(failure(() => device.allocate('f32', 1.5))).to.match(/^BUG: allocate/);
    expect(failure(() => device.free(slice(tensor, 1, 2)))).to.match(/^BUG: free/);
    device.free(tensor);
    expect(failure(() => device.free(tensor))).to.match(/^BUG: free/);
  });

  it('refuses an impossible argument with what the library says', () => {
    const tensor = device.allocate('f32', 4);
    expect(failure(() => device.kernels.add(tensor, tensor, tensor, -1, 'f32'))).to.match(/^BUG: nn_add: impossible argument: ./);
    device.free(tensor);
  });

  it('names memory that is not there, and a type that it has no kernel for', () => {
    expect(failure(() => device.allocate('f32', 2 ** 50))).to.match(/^DEVICE_MEMORY: nn_allocate: ./);
    const tensor = device.allocate('bf16', 4);
    expect(failure(() => device.kernels.add(tensor, tensor, tensor, 4, 'bf16'))).to.match(/^(DEVICE_UNSUPPORTED: nn_add: .|nothing thrown)/);
    device.free(tensor);
  });

  it('refuses a device that is not there', () => {
    expect(failure(() => Device.open({ ...cpu, index: 1 }))).to.match(/^DEVICE_UNAVAILABLE: cpu device 1 is not there: there is 1/);
    expect(failure(() => Device.open({ ...cpu, index: -1 }))).to.match(/^DEVICE_UNAVAILABLE/);
  });

  it('takes CUDA when it is asked for or there, and the CPU otherwise', () => {
    const asked = failure(() => Device.open({ ...cpu, library: 'cuda' }).close());
    expect(asked).to.match(/^(LIBRARY_INVALID: .*libnn_cuda.*|DEVICE_UNAVAILABLE: cuda device 0 is not there: there is none|nothing thrown)/);
    const [chosen] = describeDevices('auto');
    expect(chosen!.kind).to.equal(asked === 'nothing thrown' ? 'cuda' : 'cpu');
    // A library that is there but cannot be used is not passed over in silence.
    if (asked.includes('cannot be loaded')) expect(chosen!.note).to.match(/libnn_cuda.* cannot be loaded/);
  });

  it('closes with memory still allocated, and twice', () => {
    const other = Device.open(cpu);
    other.allocate('u8', 1000);
    other.close();
    other.close();
  });

  it('works in another thread while this one is open, and outlives it', async () => {
    const module = new URL('../../cuda/device.js', import.meta.url).href;
    const source = `import(${JSON.stringify(module)}).then(({ Device }) => {
      const device = Device.open({ library: 'cpu', index: 0, threads: 2 });
      const tensor = device.allocate('f32', 100000);
      device.kernels.zeroGrad(tensor, 100000);
      device.close();
      require('node:worker_threads').parentPort.postMessage('done');
    })`;
    for (let round = 0; round < 3; round++) {
      const worker = new Worker(source, { eval: true });
      const exit = new Promise((resolve) => worker.once('exit', resolve));
      expect(await new Promise((resolve, reject) => worker.once('message', resolve).once('error', reject))).to.equal('done');
      expect(await exit).to.equal(0);
      expect(device.freeBytes()).to.be.above(0);
    }
  });
});

describe('native library', () => {
  let scratch = '';
  before(() => {
    scratch = mkdtempSync(join(tmpdir(), 'library-'));
  });
  after(() => rmSync(scratch, { recursive: true }));

  /** Builds a library from C text. */
  const build = (name: string, source: string): string => {
    const path = join(scratch, `${name}.so`);
    writeFileSync(join(scratch, `${name}.c`), source);
    execFileSync(process.env['CC'] ?? 'cc', ['-shared', '-fPIC', '-o', path, join(scratch, `${name}.c`)]);
    return path;
  };

  it('is refused, with what to do, when it is missing, no library, of another ABI, or lacks a function', () => {
    expect(failure(() => loadLibrary(join(scratch, 'none.so')))).to.match(/^LIBRARY_INVALID: .*none\.so is missing; build it with: npm run build$/);
    writeFileSync(join(scratch, 'text.so'), 'this is no library');
    expect(failure(() => loadLibrary(join(scratch, 'text.so')))).to.match(/^LIBRARY_INVALID: .*cannot be loaded.*npm run build$/);
    const old = build('old', 'int nn_abi_version(void) { return 0; }');
    expect(failure(() => loadLibrary(old))).to.match(new RegExp(`^LIBRARY_INVALID: .*has ABI version 0, but this build needs ${ABI_VERSION}; build it with: npm run build$`));
    const foreign = build('foreign', 'int something(void) { return 0; }');
    expect(failure(() => loadLibrary(foreign))).to.match(/^LIBRARY_INVALID: .*lacks the function nn_abi_version/);
    const names = Object.keys(PROTOTYPES).filter((name) => name !== 'nn_abi_version' && name !== 'nn_gemm');
    const partial = build('partial', `int nn_abi_version(void) { return ${ABI_VERSION}; }\n${names.map((name) => `int ${name}(void) { return 0; }`).join('\n')}`);
    expect(failure(() => loadLibrary(partial))).to.match(/^LIBRARY_INVALID: .*lacks the function nn_gemm;/);
  });

  it('is bound once for each path', () => {
    expect(loadLibrary(libraryPath('cpu'))).to.equal(loadLibrary(libraryPath('cpu')));
  });
});
