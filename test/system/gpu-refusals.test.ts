/**
 * What a user is told whose GPU will not do, shown without a GPU: an index that is not there, a GPU too old, too little memory, a
 * library of another ABI version (test/support/fake-gpu.ts pretends these), and the real library under a driver too old. One line each.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { expect } from 'chai';
import { ERROR_KINDS } from '../../config/errors.ts';
import type { ErrorCode } from '../../config/errors.ts';
import { packageRoot } from '../../config/schema.ts';
import { libraryPath } from '../../cuda/device.ts';
import { buildFakeGpuLibrary, buildOldDriver, packageWithLibrary, whyNoFakeGpu } from '../support/fake-gpu.ts';
import { Workplace } from './cli-harness.ts';

const reason = whyNoFakeGpu();
const golden = ['doctor', '--golden', join(packageRoot(), 'test', 'golden', 'mqa-top2.safetensors'), '--device'];

if (reason !== undefined) process.stderr.write(`skipped: what is said of a GPU that will not do: ${reason}\n`);

describe('a GPU that will not do', function () {
  this.timeout(180_000);
  const scratch = mkdtempSync(join(tmpdir(), 'fake-gpu-'));
  const places: Workplace[] = [];

  /** A directory in which commands run with that CUDA library. */
  const withLibrary = (name: string, library: string): Workplace => {
    const directory = join(scratch, name);
    mkdirSync(directory);
    const place = new Workplace(packageWithLibrary(directory, library));
    places.push(place);
    return place;
  };
  const refused = async (place: Workplace, args: readonly string[], env: NodeJS.ProcessEnv, code: ErrorCode, about: RegExp): Promise<void> => {
    const outcome = await place.run(args, { env });
    expect(outcome.stderr).to.match(/^cuda-nn: [A-Z_]+: [^\n]+\n$/);
    expect(outcome.stderr).to.match(about).and.to.contain(`cuda-nn: ${code}: `);
    expect(outcome.code).to.equal(ERROR_KINDS[code].exitCode);
    expect(outcome.stdout).to.equal('');
  };

  /** What doctor says of the GPUs; it must not fail for their sake. */
  const gpusOf = async (place: Workplace, env: NodeJS.ProcessEnv): Promise<string> => {
    const { checks } = await place.json<{ checks: { name: string; detail: string }[] }>(['doctor'], { env });
    return checks.find(({ name }) => name === 'GPUs')!.detail;
  };

  after(() => {
    for (const place of places) place.remove();
    rmSync(scratch, { recursive: true });
  });

  it('because its library is of another ABI version', async () => {
    const source = join(scratch, 'old.c');
    writeFileSync(source, 'int nn_abi_version(void) { return 7; }');
    execFileSync(process.env['CC'] ?? 'cc', ['-shared', '-fPIC', '-o', join(scratch, 'old.so'), source]);
    const place = withLibrary('abi', join(scratch, 'old.so'));
    await refused(place, [...golden, 'cuda:0'], {}, 'LIBRARY_INVALID', /libnn_cuda\.so has ABI version 7, but this build needs \d+; build it with: /);
    await refused(place, ['worker', '--gpus', '0'], {}, 'LIBRARY_INVALID', /has ABI version 7/);
    expect(await gpusOf(place, {})).to.match(/^none: .*has ABI version 7/);
  });

  it('because its driver is too old', async function () {
    if (!existsSync(libraryPath('cuda')) || process.platform !== 'linux' || process.arch !== 'x64') {
      process.stderr.write('    skipped: no CUDA library is built here\n');
      this.skip();
    }
    buildOldDriver(scratch);
    const place = new Workplace();
    places.push(place);
    const env = { LD_LIBRARY_PATH: scratch };
    await refused(place, [...golden, 'cuda:0'], env, 'DEVICE_UNAVAILABLE', /there is none \(no usable GPU: .*install a newer NVIDIA driver/);
    await refused(place, ['worker', '--gpus', '0'], env, 'DEVICE_UNAVAILABLE', /there is no GPU 0 here \(there: none; .*install a newer NVIDIA driver/);
    expect(await gpusOf(place, env)).to.match(/^none found: .*install a newer NVIDIA driver/);
  });

  (reason === undefined ? describe : describe.skip)(`pretended${reason === undefined ? '' : `, which takes what is not here: ${reason}`}`, () => {
    let place: Workplace;
    before(() => {
      const built = join(scratch, 'built');
      mkdirSync(built);
      place = withLibrary('package', buildFakeGpuLibrary(built));
    });

    it('is listed by doctor all the same', async () => {
      const detail = await gpusOf(place, { FAKE_GPU_COUNT: '2', FAKE_GPU_CAPABILITY: '75' });
      expect(detail).to.match(/^cuda:0 Pretended GPU, 4 cores, compute 7\.5, 8[^,]*, driver 13\.0; cuda:1 /);
    });

    it('because it is not there', async () => {
      const env = { FAKE_GPU_COUNT: '2' };
      await refused(place, [...golden, 'cuda:5'], env, 'DEVICE_UNAVAILABLE', /cuda device 5 is not there: there are 2, counted from 0/);
      await refused(place, ['worker', '--gpus', '5'], env, 'DEVICE_UNAVAILABLE', /there is no GPU 5 here \(there: 0, 1\)/);
      await refused(place, ['worker', '--gpus', '0'], { FAKE_GPU_COUNT: '0' }, 'DEVICE_UNAVAILABLE', /there is no GPU 0 here \(there: none; no usable GPU: cudaErrorNoDevice/);
    });

    it('because it is too old', () =>
      refused(place, [...golden, 'cuda:0'], { FAKE_GPU_CAPABILITY: '75' }, 'DEVICE_UNSUPPORTED', /Pretended GPU\) has compute capability 7\.5; this library needs 8\.0 or newer/));

    it('because it has too little memory, with the bytes needed and there', () =>
      refused(place, [...golden, 'cuda:0'], { FAKE_GPU_FREE: '100000' }, 'DEVICE_MEMORY', /[\d.]+ MB are needed \(weights .*Pretended GPU has 0\.1 MB free; take /));

    it('because a kernel before has broken it: only a new process cures that', () => {
      const device = pathToFileURL(join(scratch, 'package', 'dist', 'cuda', 'device.js')).href;
      const program = `const { Device } = await import(${JSON.stringify(device)});
        const device = Device.open({ library: 'cuda', index: 0, threads: 0 });
        try { device.synchronize(); } catch ({ code, recovery, message }) { console.log(code, recovery, message); }`;
      const { stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', program], { encoding: 'utf8', env: { ...process.env, FAKE_GPU_FAULT: '1' } });
      expect(stdout).to.match(/^DEVICE_FAULT restart nn_synchronize: .*cudaErrorIllegalAddress/);
    });
  });
});
