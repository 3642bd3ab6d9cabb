/** The oracle: golden models computed in float64 by another implementation, reproduced with every instruction set of the CPU. */
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { errorCode } from '../../config/errors.ts';
import { packageRoot } from '../../config/schema.ts';
import { Device, describeDevices } from '../../cuda/device.ts';
import { whyNoGpu } from '../support/gpu.ts';
import { checkGolden } from '../../workers/model/golden.ts';

const directory = join(packageRoot(), 'test', 'golden');
const cpu = { library: 'cpu', index: 0, threads: 2 } as const;

/** Runs `body` with an environment variable, which the native library reads when a device is opened. */
function withIsa(isa: string, body: () => void): void {
  const before = process.env['CUDA_NN_ISA'];
  process.env['CUDA_NN_ISA'] = isa;
  try {
    body();
  } finally {
    if (before === undefined) delete process.env['CUDA_NN_ISA'];
    else process.env['CUDA_NN_ISA'] = before;
  }
}

describe('golden models', () => {
  const sets = ['plain', 'avx2', 'avx512'] as const;
  const best = describeDevices('cpu')[0]!.isa!;

  for (const isa of sets) {
    for (const name of ['mqa-top2', 'spec-shaped']) {
      it(`${name} is reproduced with ${isa} instructions`, function () {
        if (sets.indexOf(isa) > sets.indexOf(best)) {
          process.stderr.write(`    skipped: this CPU has only ${best} instructions, not ${isa}\n`);
          this.skip();
        }
        withIsa(isa, () => {
          const device = Device.open(cpu);
          expect(device.description.isa).to.equal(isa);
          device.close();
          const report = checkGolden(join(directory, `${name}.safetensors`), cpu);
          expect(report.rows.filter(({ passed }) => !passed)).to.deep.equal([]);
          expect(report.passed).to.equal(true);
          const { layers, experts, vocabSize } = report.model;
          const counts = Object.fromEntries(report.rows.map(({ what, count }) => [what, count]));
          expect(counts['expert load']).to.equal(layers * experts);
          expect(counts['gradients']).to.equal(3 + layers * (7 + 3 * experts));
          expect(counts['greedy tokens']).to.equal(20);
          expect(counts['logits']! % vocabSize).to.equal(0);
        });
      });
    }
  }

  it('bf16 is for devices that compute in it, which a CPU says that it does not', () => {
    const check = (): unknown => checkGolden(join(directory, 'mqa-top2.safetensors'), cpu, 'bf16');
    expect(check).to.throw().and.satisfy((error: unknown) => errorCode(error) === 'DEVICE_UNSUPPORTED');
  });

  for (const name of ['mqa-top2', 'spec-shaped']) {
    for (const precision of ['fp32', 'bf16'] as const) {
      it(`${name} is reproduced by a CUDA device in ${precision}`, function () {
        const reason = whyNoGpu();
        if (reason !== undefined) {
          process.stderr.write(`    skipped: ${reason}\n`);
          this.skip();
        }
        const report = checkGolden(join(directory, `${name}.safetensors`), { library: 'cuda', index: 0, threads: 0 }, precision);
        expect(report.precision).to.equal(precision);
        expect(report.rows.filter(({ passed }) => !passed)).to.deep.equal([]);
      });
    }
  }
});

describe('a golden file that is not right', () => {
  let scratch = '';
  const path = (): string => join(scratch, 'model.safetensors');
  const code = (): string | undefined => {
    try {
      checkGolden(path(), cpu);
    } catch (error) {
      expect((error as Error).message).to.not.include('\n');
      return `${errorCode(error)}: ${(error as Error).message}`;
    }
    return undefined;
  };
  const edit = (change: (json: Record<string, never> & { config: Record<string, unknown>; train: { history: unknown[] } }) => void): void => {
    const json = JSON.parse(readFileSync(join(directory, 'mqa-top2.json'), 'utf8')) as never;
    change(json);
    writeFileSync(join(scratch, 'model.json'), JSON.stringify(json));
  };

  beforeEach(() => {
    scratch = mkdtempSync(join(tmpdir(), 'golden-'));
    cpSync(join(directory, 'mqa-top2.safetensors'), path());
    edit(() => undefined);
  });
  afterEach(() => rmSync(scratch, { recursive: true }));

  it('is refused in one line that names what is missing or does not fit', () => {
    edit(({ config }) => (config['ffnSize'] = 81));
    expect(code()).to.match(/^CHECKPOINT_INVALID: .*w1\.weight' has the shape \[80, 48\], but \[81, 48\] is wanted$/);
    edit(({ config }) => (config['hiddenSize'] = 50));
    expect(code()).to.match(/^CHECKPOINT_INVALID: .*divisible by config\.queryHeads = 3$/);
    edit(({ config }) => (config['expertsPerToken'] = 9));
    expect(code()).to.match(/^CHECKPOINT_INVALID: .*only 4 experts$/);
    edit(({ config }) => delete config['layers']);
    expect(code()).to.match(/^CHECKPOINT_INVALID: .*config\.layers/);
    edit(({ config }) => (config['layers'] = 3));
    expect(code()).to.match(/^CHECKPOINT_INVALID: .*model\.layers\.2\..*is missing$/);
    edit(({ train }) => train.history.pop());
    expect(code()).to.match(/^CHECKPOINT_INVALID: .*after9\..*is missing$/);
    writeFileSync(join(scratch, 'model.json'), '{');
    expect(code()).to.match(/^CHECKPOINT_INVALID: .*is no JSON$/);
    rmSync(join(scratch, 'model.json'));
    expect(code()).to.match(/^FILE_NOT_FOUND: .*model\.json/);
    rmSync(path());
    edit(() => undefined);
    expect(code()).to.match(/^FILE_NOT_FOUND: .*model\.safetensors/);
  });

  it('is refused when it is cut short', () => {
    const bytes = readFileSync(path());
    writeFileSync(path(), bytes.subarray(0, bytes.length - 100));
    expect(code()).to.match(/^CHECKPOINT_INVALID: /);
  });

  it('is reported when its numbers are others: each check by itself', () => {
    edit(({ config }) => (config['rmsNormEps'] = 0.01));
    const report = checkGolden(path(), cpu);
    expect(report.passed).to.equal(false);
    const failed = report.rows.filter(({ passed }) => !passed).map(({ what }) => what);
    expect(failed).to.include.members(['loss', 'logits', 'gradients']);
    expect(failed).to.not.include('history: learning rate');
    // A number that is not finite in the file is a mismatch, not a pass.
    const bytes = readFileSync(path());
    bytes.writeUInt32LE(0x7fc00000, bytes.length - 4);
    bytes.writeUInt32LE(0x7fc00000, 8 + Number(bytes.readBigUInt64LE(0)));
    writeFileSync(path(), bytes);
    edit(() => undefined);
    expect(checkGolden(path(), cpu).passed).to.equal(false);
  });
});
