/** What users write as options and specs is understood, or refused with USAGE, SPEC_INVALID or FILE_NOT_FOUND. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { parseDevice, parsePrecision } from '../../cli/commands/golden.ts';
import { samplingMethod } from '../../cli/commands/checkpoints.ts';
import { settings } from '../../cli/commands/doctor.ts';
import { parseGpus, parseNumber, parseWhole, readSpec } from '../../cli/options.ts';
import { luaAdvisory } from '../../cli/redis-version.ts';
import { threadsEach } from '../../cli/stack.ts';
import { errorCode } from '../../config/errors.ts';
import { knobs, loadConfig } from '../../config/schema.ts';

/** The code that a call throws, and its message. */
function refusal(call: () => unknown): { code: string | undefined; message: string } {
  try {
    call();
  } catch (error) {
    return { code: errorCode(error), message: (error as Error).message };
  }
  throw new Error('nothing was thrown');
}

describe('cli options', () => {
  it('reads which GPUs are wanted', () => {
    expect(parseGpus('all')).to.equal('all');
    expect(parseGpus('none')).to.equal('none');
    expect(parseGpus('0,2,0')).to.deep.equal([0, 2]);
    for (const wrong of ['', 'some', '0,', '-1', '1.5', '0 1']) expect(refusal(() => parseGpus(wrong)).code).to.equal('USAGE');
  });

  it('reads numbers within bounds and names the option otherwise', () => {
    expect(parseWhole('--count', 1, 8)('8')).to.equal(8);
    for (const wrong of ['0', '9', '1.5', '-1', '', ' 3', '1e0', 'x']) {
      expect(refusal(() => parseWhole('--count', 1, 8)(wrong))).to.deep.include({ code: 'USAGE' });
    }
    expect(refusal(() => parseWhole('--count', 1, 8)('9')).message).to.equal('--count is "9", but must be a whole number from 1 to 8');
    expect(parseNumber('--top-p', 0, 1)('0.9')).to.equal(0.9);
    for (const wrong of ['0', '1.1', 'NaN', '', 'x']) expect(refusal(() => parseNumber('--top-p', 0, 1)(wrong)).code).to.equal('USAGE');
  });

  it('chooses how to sample from the options that are there', () => {
    expect(samplingMethod({})).to.equal('greedy');
    expect(samplingMethod({ temperature: 0.5 })).to.equal('sample');
    expect(samplingMethod({ topK: 5, temperature: 0.5 })).to.equal('top-k');
    expect(samplingMethod({ topP: 0.5 })).to.equal('top-p');
    expect(refusal(() => samplingMethod({ topK: 5, topP: 0.5 })).code).to.equal('USAGE');
  });

  it('reads devices and precisions', () => {
    expect(['fp32', 'bf16'].map(parsePrecision)).to.deep.equal(['fp32', 'bf16']);
    for (const wrong of ['fp16', 'BF16', '']) expect(refusal(() => parsePrecision(wrong)).code).to.equal('USAGE');
    expect(parseDevice('cpu')).to.deep.equal({ library: 'cpu', index: 0 });
    expect(parseDevice('cuda:3')).to.deep.equal({ library: 'cuda', index: 3 });
    for (const wrong of ['gpu', 'cuda', 'cuda:', 'cuda:-1', '']) expect(refusal(() => parseDevice(wrong)).code).to.equal('USAGE');
  });

  it('shares the cores out, at least one thread each', () => {
    expect([1, 2, 3, 8].map((workers) => threadsEach(workers, 8))).to.deep.equal([8, 4, 2, 1]);
    expect(threadsEach(3, 2)).to.equal(1);
  });

  describe('run specs', () => {
    let directory: string;
    before(() => {
      directory = mkdtempSync(join(tmpdir(), 'cuda-nn-spec-'));
    });
    after(() => rmSync(directory, { recursive: true }));
    const specFile = (text: string): string => {
      const path = join(directory, 'spec.json');
      writeFileSync(path, text);
      return path;
    };

    it('count relative paths from the spec’s directory', () => {
      const path = specFile('{"data":{"train":"a/t.tokens","validation":"/abs/v.tokens"},"initialCheckpoint":"../c"}');
      expect(readSpec(path)).to.deep.equal({
        data: { train: join(directory, 'a/t.tokens'), validation: '/abs/v.tokens' },
        initialCheckpoint: join(directory, '../c'),
      });
    });

    it('leave what is not a path to whoever checks the form', () => {
      expect(readSpec(specFile('{"data":5}'))).to.deep.equal({ data: 5 });
      expect(readSpec(specFile('{"data":{"train":""}}'))).to.deep.equal({ data: { train: '' } });
    });

    it('are refused when they are no JSON object, or not there', () => {
      expect(refusal(() => readSpec(specFile('{"a"'))).code).to.equal('SPEC_INVALID');
      expect(refusal(() => readSpec(specFile('[]'))).code).to.equal('SPEC_INVALID');
      expect(refusal(() => readSpec(join(directory, 'none.json'))).code).to.equal('FILE_NOT_FOUND');
      expect(refusal(() => readSpec(directory)).code).to.equal('FILE_NOT_FOUND');
    });
  });

  it('tells which Redis carries CVE-2025-49844', () => {
    const mended = { redis: ['8.2.2', '8.4.0', '9.0.0', '8.0.4', '7.4.6', '7.2.11', '6.2.20'], valkey: ['8.1.4', '9.0.0', '8.0.6', '7.2.11'] } as const;
    const open = { redis: ['7.0.15', '8.2.1', '8.0.3', '7.4.5', '6.0.16'], valkey: ['8.1.3', '8.0.5'] } as const;
    for (const kind of ['redis', 'valkey'] as const) {
      for (const version of mended[kind]) expect(luaAdvisory(kind, version), version).to.equal(undefined);
      for (const version of open[kind]) expect(luaAdvisory(kind, version), version).to.contain('CVE-2025-49844');
    }
    expect(luaAdvisory('redis', 'unknown')).to.be.a('string');
  });

  it('doctor lists every setting with where it comes from, and no secret', () => {
    const config = loadConfig({ server: { host: '::', port: 1, token: 'secret-token' }, redis: { url: 'redis://user:secret-word@host:1' } });
    const rows = settings(config, { CUDA_NN_PORT: '1' });
    expect(rows).to.have.length(knobs().length);
    expect(rows.find(({ name }) => name === 'server.port')).to.deep.include({ value: 1, source: 'environment' });
    expect(rows.find(({ name }) => name === 'server.host')).to.deep.include({ source: 'default' });
    expect(JSON.stringify(rows)).not.to.match(/secret/);
  });
});
