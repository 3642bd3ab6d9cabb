/**
 * The benchmarks at small sizes, so that they cannot rot: what `bench decode` says of a long prompt, and how a peer's figures are read
 * and matched. GPU benchmarks run in test/gpu.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { breakDown } from '../../bench/breakdown.ts';
import { benchDecode } from '../../bench/decode.ts';
import { peerFigures } from '../../bench/gpu.ts';
import { errorCode } from '../../config/errors.ts';
import { Device } from '../../cuda/device.ts';
import type { Tensor } from '../../cuda/device.ts';

const options = { device: 'cpu', preset: 'tiny', threads: 2, steps: 8, graph: true };

/** The code of the error that `call` throws. */
async function codeOf(call: () => unknown): Promise<string | undefined> {
  try {
    await call();
  } catch (error) {
    return errorCode(error);
  }
  return 'nothing thrown';
}

describe('benchmarks', function () {
  this.timeout(120_000);
  let scratch = '';
  before(() => {
    scratch = mkdtempSync(join(tmpdir(), 'bench-'));
  });
  after(() => rmSync(scratch, { recursive: true }));

  /** A command that prints `text`. */
  const printing = (name: string, text: string): string => {
    writeFileSync(join(scratch, name), text);
    return `cat ${join(scratch, name)}`;
  };

  it('a breakdown counts each kernel and tells products apart, and leaves the device as it was', () => {
    const device = Device.open({ library: 'cpu', index: 0, threads: 1 });
    try {
      const [a, b, c] = [0, 1, 2].map(() => device.allocate('f32', 64 * 64)) as [Tensor, Tensor, Tensor];
      const work = (): void => {
        for (const [M, N] of [[64, 64], [64, 64], [8, 16]] as const) device.kernels.gemm(c, a, b, M, N, 64, 0, 1, 'f32', 'f32');
        device.kernels.randomNormal(a, 64, 1, 0, 0, 1);
      };
      const current = (): unknown => (device.kernels as unknown as Record<string, unknown>)['gemm'];
      const gemm = current();
      const rows = breakDown(device, work);
      expect(rows.map(({ name, calls }) => [name, calls])).to.have.deep.members([['gemm 64 x 64 x 64', 2], ['gemm 8 x 16 x 64', 1], ['randomNormal', 1]]);
      const shares = rows.map(({ share }) => share as number);
      expect(shares.reduce((sum, share) => sum + share)).to.be.closeTo(1, 0.01);
      expect(shares).to.deep.equal([...shares].sort((x, y) => y - x));
      expect(current()).to.equal(gemm);
      expect(() => breakDown(device, () => device.kernels.gemm(c, a, b, -1, 1, 1, 0, 1, 'f32', 'f32'))).to.throw();
      expect(current()).to.equal(gemm);
    } finally {
      device.close();
    }
  });

  it('decode takes in a long prompt, goes on from it, and gives the ratio to a peer at the same batch and context', async () => {
    const peer = printing('peer', 'compiling\n{"batch": 2, "context": 64, "tokens_per_s": 10}\n{"batch": 1, "context": 64, "tokens_per_s": 1e9}\n');
    const report = await benchDecode({ ...options, shapes: [[2, 64]], prompt: 1200, peer });
    expect(report.passed).to.equal(true);
    const [short, long] = report.rows as [(typeof report.rows)[0], (typeof report.rows)[0]];
    expect(report.rows).to.have.length(2);
    expect(short).to.deep.include({ name: 'batch 2, context 64', peerTokensPerSecond: 10, passed: true });
    expect(short['timesPeer']).to.be.closeTo((short['tokensPerSecond'] as number) / 10, 0.01 * (short['timesPeer'] as number));
    expect(long).to.deep.include({ name: 'a prompt of 1200, NTK alpha 8', peerTokensPerSecond: null, timesPeer: null, passed: true });
    expect(String(long['newest'])).to.match(/^\d+( \d+){3}$/);
    expect(long['prefillTokensPerSecond']).to.be.above(0);
    expect(long['plannedGb']).to.be.above(0);
  });

  it('decode refuses before it allocates a prompt whose cache does not fit', async () => {
    expect(await codeOf(() => benchDecode({ ...options, shapes: [], prompt: 2 ** 33 }))).to.equal('DEVICE_MEMORY');
  });

  it('a peer that prints no figures, and a device or preset that is not there, are bad input', async () => {
    expect(await codeOf(() => peerFigures('echo no figures; exit 1'))).to.equal('USAGE');
    expect(peerFigures(printing('two', '{"a": 1}\nnoise\n{"a": 2}\n'))).to.deep.equal([{ a: 1 }, { a: 2 }]);
    expect(await codeOf(() => benchDecode({ ...options, device: 'tpu' }))).to.equal('USAGE');
    expect(await codeOf(() => benchDecode({ ...options, preset: 'huge' }))).to.equal('USAGE');
  });
});
