/**
 * Bad input gets one clear line, a documented exit code, and nothing lost: every command here must end with exactly one line
 * on stderr, `cuda-nn: CODE: ...`, nothing on stdout, and the exit code that config/errors.ts has for that code.
 */
import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { basename, dirname, join } from 'node:path';
import { crc32 } from 'node:zlib';
import { expect } from 'chai';
import { startEmbeddedRedis } from '../../cli/embedded-redis.ts';
import type { EmbeddedRedis } from '../../cli/embedded-redis.ts';
import { ERROR_KINDS } from '../../config/errors.ts';
import type { ErrorCode } from '../../config/errors.ts';
import type { RunRecord } from '../../config/messages.ts';
import { openRedis } from '../../config/redis.ts';
import { loadConfig, packageRoot } from '../../config/schema.ts';
import { Workplace } from './cli-harness.ts';
import type { Options, Outcome, Running } from './cli-harness.ts';

/** Holds an outcome to the promise; `about` must be in the line. */
function expectRefusal({ code, stdout, stderr }: Outcome, errorCode: ErrorCode, about: string): void {
  expect(stderr).to.match(/^cuda-nn: [A-Z_]+: [^\n]+\n$/);
  expect(stderr).to.contain(`cuda-nn: ${errorCode}: `).and.to.contain(about);
  expect(code, stderr).to.equal(ERROR_KINDS[errorCode].exitCode);
  expect(stdout).to.equal('');
}

describe('bad input', function () {
  this.timeout(180_000);
  const place = new Workplace();
  const refused = async (args: readonly string[], errorCode: ErrorCode, about: string, options: Options = {}): Promise<void> =>
    expectRefusal(await place.run(args, options), errorCode, about);

  before(() => place.prepareData());
  after(() => place.remove());

  describe('on the command line', () => {
    const cases: [args: string[], about: string][] = [
      [[], 'no command given'],
      [['fly'], "unknown command 'fly'"],
      [['runs', '--fast'], "unknown option '--fast'"],
      [['status'], "missing required argument 'run'"],
      [['runs', 'a', 'b'], 'too many arguments'],
      [['eval', 'checkpoint'], '--data'],
      [['generate', 'checkpoint'], 'no prompt'],
      [['generate', 'c', '--prompt', 'x', '--top-k', '4', '--top-p', '0.5'], '--top-k and --top-p'],
      [['generate', 'c', '--prompt', 'x', '--temperature', '0'], '--temperature is "0"'],
      [['up', '--gpus', 'some'], '--gpus is "some"'],
      [['up', '--port', '70000'], '--port is "70000"'],
      [['worker', '--count', '0'], '--count is "0"'],
      [['doctor', '--golden', 'x', '--device', 'tpu'], '--device is "tpu"'],
      [['doctor', '--golden', 'x', '--precision', 'fp8'], '--precision is "fp8"'],
      [['data', 'prepare', 'text.txt', '--tokenizer', 'tokenizer.json', '-o', 'x', '--hold-out', '0.1'], '--validation'],
      [['demo', '--steps', 'many'], '--steps is "many"'],
    ];
    for (const [args, about] of cases) it(`cuda-nn ${args.join(' ')}`, () => refused(args, 'USAGE', about));

    it('settings out of bounds or of the wrong type', async () => {
      await refused(['runs'], 'USAGE', 'server.port', { env: { CUDA_NN_PORT: 'http' } });
      await refused(['runs'], 'USAGE', 'worker.heartbeatMs', { env: { CUDA_NN_HEARTBEAT_MS: '-1' } });
      await refused(['runs'], 'USAGE', 'logLevel', { env: { CUDA_NN_LOG: 'loud' } });
      await refused(['runs'], 'USAGE', 'http://x', { env: { CUDA_NN_REDIS_URL: 'http://x' } });
    });
  });

  describe('in a run spec', () => {
    const base = {
      name: 'bad',
      model: 'tiny',
      data: { train: 'train.tokens' },
      steps: 1,
      batch: { sequences: 1, sequenceLength: 8 },
    };
    const cases: [what: string, spec: unknown, about: string][] = [
      ['an unknown key', { ...base, learningRate: 1 }, 'unknown key learningRate'],
      ['an unknown key within', { ...base, batch: { ...base.batch, shard: 1 } }, 'unknown key batch.shard'],
      ['a wrong type', { ...base, steps: '10' }, 'steps'],
      ['a missing key', { ...base, data: {} }, 'data.train'],
      ['a hidden size that heads do not divide', { ...base, model: { preset: 'tiny', hiddenSize: 65 } }, 'hiddenSize'],
      ['more experts a token than experts', { ...base, model: { preset: 'tiny', expertsPerToken: 5 } }, 'expertsPerToken'],
      ['a preset that does not exist', { ...base, model: 'huge' }, 'model'],
      ['a name that is a path', { ...base, name: '../up' }, 'name'],
      ['more warm-up than steps', { ...base, optimizer: { warmupSteps: 2 } }, 'warmupSteps'],
      ['a list', [base], 'must be a JSON object'],
    ];
    for (const [what, spec, about] of cases) {
      it(what, async () => {
        writeFileSync(place.at('bad.json'), JSON.stringify(spec));
        await refused(['train', 'bad.json'], 'SPEC_INVALID', about);
        await refused(['train', '-'], 'SPEC_INVALID', about, { input: JSON.stringify(spec) });
      });
    }
    it('no JSON', () => refused(['train', '-'], 'SPEC_INVALID', 'not JSON', { input: '{"name"' }));
    it('no file', () => refused(['train', 'nowhere.json'], 'FILE_NOT_FOUND', 'nowhere.json'));
  });

  describe('in text and tokenizers', () => {
    const prepare = (input: string, tokenizer = 'tokenizer.json'): string[] => ['data', 'prepare', input, '--tokenizer', tokenizer, '-o', 'out.tokens'];

    it('text that is not there, or is empty', async () => {
      await refused(prepare('nowhere.txt'), 'FILE_NOT_FOUND', 'nowhere.txt');
      writeFileSync(place.at('empty.txt'), '');
      await refused(prepare('empty.txt'), 'DATA_INVALID', 'empty.txt');
      await refused(['tokenizer', 'train', 'empty.txt', '-o', 'out.json'], 'DATA_INVALID', 'empty.txt');
      await refused(['tokenizer', 'train', 'nowhere.txt', '-o', 'out.json'], 'FILE_NOT_FOUND', 'nowhere.txt');
      expect(existsSync(place.at('out.tokens')) || existsSync(place.at('out.json'))).to.equal(false);
    });

    it('a tokenizer that is damaged', async () => {
      const good = readFileSync(place.at('tokenizer.json'), 'utf8');
      writeFileSync(place.at('cut.json'), good.slice(0, good.length / 2));
      await refused(prepare('text.txt', 'cut.json'), 'TOKENIZER_INVALID', 'cut.json');
      writeFileSync(place.at('foreign.json'), '{"model":5}');
      await refused(prepare('text.txt', 'foreign.json'), 'TOKENIZER_INVALID', 'foreign.json');
      await refused(prepare('text.txt', 'nowhere.json'), 'FILE_NOT_FOUND', 'nowhere.json');
    });
  });

  describe('in golden files', () => {
    const golden = join(packageRoot(), 'test', 'golden', 'mqa-top2.safetensors');
    const doctor = (file: string): string[] => ['doctor', '--golden', file];

    it('a file that is not there or damaged', async () => {
      await refused(doctor('nowhere.safetensors'), 'FILE_NOT_FOUND', 'nowhere');
      cpSync(golden, place.at('cut.safetensors'));
      cpSync(golden.replace(/safetensors$/, 'json'), place.at('cut.json'));
      truncateSync(place.at('cut.safetensors'), 1000);
      await refused(doctor('cut.safetensors'), 'CHECKPOINT_INVALID', 'cut.safetensors');
    });

    it('bf16 on a CPU, which computes in float32', () => refused([...doctor(golden), '--precision', 'bf16'], 'DEVICE_UNSUPPORTED', 'bf16'));

    it('a model that this build does not reproduce', async () => {
      const bytes = readFileSync(golden);
      const start = 8 + Number(bytes.readBigUInt64LE(0));
      const header = JSON.parse(bytes.subarray(8, start).toString('utf8')) as Record<string, { data_offsets: [number, number] }>;
      const logits = Object.keys(header).find((name) => name.includes('logits'))!;
      bytes.writeFloatLE(99, start + header[logits]!.data_offsets[0]);
      writeFileSync(place.at('other.safetensors'), bytes);
      if (existsSync(golden.replace(/safetensors$/, 'json'))) cpSync(golden.replace(/safetensors$/, 'json'), place.at('other.json'));
      const { code, stdout, stderr } = await place.run(doctor('other.safetensors'));
      expect(code).to.equal(5);
      expect(stderr).to.match(/^cuda-nn: GOLDEN_MISMATCH: [^\n]*logits[^\n]*\n$/);
      expect(stdout).to.match(/^no {2}logits/m);
      expect((await place.run(doctor(golden))).code).to.equal(0);
    });
  });

  describe('in the environment', () => {
    it('no Redis and no redis-server', async () => {
      const env = { PATH: '/nowhere' };
      await refused(['up', '--gpus', 'none', '--port', '0'], 'REDIS_UNAVAILABLE', 'redis-server', { env });
      await refused(['demo'], 'REDIS_UNAVAILABLE', 'redis-server', { env });
      await refused(['runs'], 'REDIS_UNAVAILABLE', 'cuda-nn up', { env });
      const doctor = await place.run(['doctor'], { env });
      expectRefusal({ ...doctor, stdout: '' }, 'REDIS_UNAVAILABLE', 'redis-server');
      expect(doctor.stdout).to.match(/^no Redis/m);
    });

    it('a Redis that is not there', () =>
      refused(['worker', '--gpus', 'none'], 'REDIS_UNAVAILABLE', 'cannot be reached', { env: { CUDA_NN_REDIS_URL: 'redis://user:hidden-word@127.0.0.1:1' } }));

    it('no C compiler', () => {
      const tools = place.at('tools');
      mkdirSync(tools, { recursive: true });
      symlinkSync(process.execPath, join(tools, 'node'));
      const env: NodeJS.ProcessEnv = { ...process.env, PATH: tools };
      delete env['CC'];
      const { status, stdout, stderr } = spawnSync(process.execPath, [join(packageRoot(), 'cli', 'setup.mjs'), '--quiet'], { env, encoding: 'utf8' });
      expectRefusal({ code: status, stdout, stderr }, 'COMPILER_MISSING', 'apt-get install gcc');
    });

    it('a port in use', async () => {
      const server = createServer().listen(0, '127.0.0.1');
      await new Promise((listening) => server.once('listening', listening));
      const { port } = server.address() as AddressInfo;
      await refused(['up', '--gpus', 'none', '--port', String(port)], 'PORT_IN_USE', String(port));
      await new Promise((closed) => server.close(closed));
      expect(existsSync(place.at('.cuda-nn', 'up.lock'))).to.equal(false);
    });

    it('a GPU that is not there', async () => {
      const { code, stderr } = await place.run(['worker', '--gpus', '99']);
      expect(stderr).to.match(/^cuda-nn: (DEVICE_UNAVAILABLE|LIBRARY_INVALID): [^\n]+\n$/); // the latter where no CUDA library is built
      expect(code).to.equal(4);
    });

    it('a full disk keeps what was there, and leaves no half of what was not', async function () {
      const disk = place.at('disk');
      mkdirSync(disk);
      if (process.platform !== 'linux' || process.getuid?.() !== 0 || spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=16k', 'tmpfs', disk]).status !== 0) {
        this.skip(); // a small disk takes root and mount
      }
      try {
        await refused(['data', 'prepare', 'text.txt', '--tokenizer', 'tokenizer.json', '-o', join(disk, 'out.tokens')], 'DISK_FULL', 'out.tokens');
        expect(readdirSync(disk)).to.deep.equal([]);
        writeFileSync(join(disk, 'tokenizer.json'), 'kept');
        writeFileSync(join(disk, 'filler'), new Uint8Array(8192));
        await refused(['tokenizer', 'train', 'text.txt', '--vocab-size', '300', '-o', join(disk, 'tokenizer.json')], 'DISK_FULL', 'tokenizer.json');
        expect(readFileSync(join(disk, 'tokenizer.json'), 'utf8')).to.equal('kept');
        expect(readdirSync(disk).sort()).to.deep.equal(['filler', 'tokenizer.json']);
      } finally {
        spawnSync('umount', [disk]);
      }
    });
  });

  describe('on a Redis that will not do', () => {
    let redis: EmbeddedRedis;
    before(async () => {
      redis = await startEmbeddedRedis(loadConfig({ home: place.at('redis-home'), redis: { url: '' } }));
    });
    after(() => redis.stop());

    it('a wrong password, which is not repeated', async () => {
      const url = redis.addresses.url.replace(/password=.*/, 'password=wrong-word');
      for (const args of [['runs'], ['up', '--gpus', 'none'], ['worker', '--gpus', 'none'], ['orchestrator'], ['demo']]) {
        const outcome = await place.run(args, { env: { CUDA_NN_REDIS_URL: url } });
        expectRefusal(outcome, 'REDIS_AUTH', 'CUDA_NN_REDIS_URL');
        expect(outcome.stderr).not.to.contain('wrong-word');
      }
    });

    it('an eviction policy other than noeviction', async () => {
      const connection = openRedis(redis.addresses.url, loadConfig(), 'command');
      await connection.config('SET', 'maxmemory-policy', 'allkeys-lru');
      connection.disconnect();
      const env = { CUDA_NN_REDIS_URL: redis.addresses.url };
      for (const args of [['runs'], ['worker', '--gpus', 'none'], ['orchestrator']]) await refused(args, 'REDIS_POLICY', 'allkeys-lru', { env });
      const doctor = await place.run(['doctor'], { env });
      expectRefusal({ ...doctor, stdout: '' }, 'REDIS_POLICY', 'noeviction');
      expect(doctor.stdout + doctor.stderr).not.to.contain(new URL(redis.addresses.url).searchParams.get('password')!);
    });
  });

  describe('with services up', () => {
    let up: Running;
    let checkpoint: string;

    before(async () => {
      up = place.start(['up', '--gpus', 'none', '--port', '0', '--json'], { timeoutMs: 170_000 });
      await up.saw('"dashboard"');
      const { code, stdout, stderr } = await place.run(['train', place.writeSpec('good', { steps: 2 }), '--follow', '--json']);
      if (code !== 0) throw new Error(stderr);
      checkpoint = (JSON.parse(stdout) as RunRecord).checkpoint!.directory;
    });

    after(async () => {
      up.child.kill('SIGTERM');
      expect((await up.ended).code).to.equal(0);
    });

    it('a run that does not exist', async () => {
      for (const verb of ['status', 'logs', 'pause', 'resume', 'cancel']) await refused([verb, 'nobody'], 'RUN_NOT_FOUND', 'nobody');
    });

    it('no worker for what is asked', async () => {
      const redis = await startEmbeddedRedis(loadConfig({ home: place.at('lonely-home'), redis: { url: '' } }));
      const env = { CUDA_NN_REDIS_URL: redis.addresses.url, CUDA_NN_REQUEST_TIMEOUT_MS: '1000' };
      await refused(['eval', checkpoint, '--data', 'validation.tokens', '--length', '32'], 'NO_WORKER', 'cuda-nn worker', { env });
      await refused(['generate', checkpoint, '--prompt', 'x'], 'NO_WORKER', 'cuda-nn worker', { env });
      await redis.stop();
    });

    it('two runs with the same name', () => refused(['train', 'good.json'], 'RUN_EXISTS', 'good'));

    it('a run that is over', () => refused(['pause', 'good'], 'RUN_STATE', 'good'));

    it('a vocabulary smaller than the tokenizer’s', () =>
      refused(['train', place.writeSpec('small', { model: { preset: 'tiny', vocabSize: 280 } })], 'DATA_INVALID', 'vocabSize'));

    it('sequences longer than the data', () =>
      refused(['train', place.writeSpec('short', { batch: { sequences: 1, sequenceLength: 1_000_000 } })], 'DATA_INVALID', 'too few'));

    describe('token files', () => {
      const damaged = (name: string, change: (bytes: Buffer) => Buffer): string => {
        writeFileSync(place.at(name), change(readFileSync(place.at('validation.tokens'))));
        return name;
      };
      const cases: [what: string, change: (bytes: Buffer) => Buffer, about: string][] = [
        ['empty', () => Buffer.alloc(0), 'empty'],
        ['truncated', (bytes) => bytes.subarray(0, bytes.length - 100), 'truncated'],
        ['cut in its header', (bytes) => bytes.subarray(0, 20), 'truncated'],
        ['foreign', () => Buffer.from('PK\u0003\u0004'.padEnd(500, 'x')), 'no token file'],
        ['with a damaged header', (bytes) => Buffer.concat([bytes.subarray(0, 20), Buffer.from([bytes[20]! ^ 1]), bytes.subarray(21)]), 'header'],
        ['with a flipped bit', (bytes) => Buffer.concat([bytes.subarray(0, 100), Buffer.from([bytes[100]! ^ 4]), bytes.subarray(101)]), 'flipped.tokens'],
        ['with ids beyond its vocabulary', lowerVocabulary, 'vocabulary'],
      ];
      for (const [what, change, about] of cases) {
        it(what, async () => {
          const file = damaged('flipped.tokens', change);
          await refused(['eval', checkpoint, '--data', file, '--length', '32', '--sequences', '4'], 'TOKEN_FILE_INVALID', about);
        });
      }

      it('that is missing', async () => {
        await refused(['eval', checkpoint, '--data', 'nowhere.tokens'], 'FILE_NOT_FOUND', 'nowhere.tokens');
        await refused(['train', place.writeSpec('nodata', { data: { train: 'nowhere.tokens' } })], 'FILE_NOT_FOUND', 'nowhere.tokens');
      });

      it('that train is given', async () => {
        const file = damaged('cut.tokens', (bytes) => bytes.subarray(0, bytes.length - 100));
        await refused(['train', place.writeSpec('cutdata', { data: { train: file } })], 'TOKEN_FILE_INVALID', 'cut.tokens');
      });

      it('that a run meets only when it reads', async () => {
        const file = damaged('late.tokens', lowerVocabulary);
        const { code, stderr } = await place.run(['train', place.writeSpec('late', { data: { train: file } }), '--follow']);
        expect(code).to.equal(6);
        expect(stderr.trimEnd().split('\n').at(-1)).to.match(/^cuda-nn: RUN_FAILED: .*TOKEN_FILE_INVALID/);
      });
    });

    describe('checkpoints', () => {
      /** A copy of the good checkpoint, without its manifest so that what is inside is looked at, changed. */
      function damaged(change: (directory: string) => void): string {
        const directory = join(dirname(checkpoint), `damaged-${basename(checkpoint)}`);
        rmSync(directory, { recursive: true, force: true });
        cpSync(checkpoint, directory, { recursive: true });
        rmSync(join(directory, 'manifest.json'), { force: true });
        rmSync(join(directory, 'training'), { recursive: true, force: true });
        change(directory);
        return directory;
      }

      /** Rewrites the JSON header of model.safetensors. */
      const editHeader = (edit: (header: Record<string, { shape: number[] }>) => void) => (directory: string) => {
        const path = join(directory, 'model.safetensors');
        const bytes = readFileSync(path);
        const start = 8 + Number(bytes.readBigUInt64LE(0));
        const header = JSON.parse(bytes.subarray(8, start).toString('utf8')) as Record<string, { shape: number[] }>;
        edit(header);
        const text = Buffer.from(JSON.stringify(header));
        const length = Buffer.alloc(8);
        length.writeBigUInt64LE(BigInt(text.length));
        writeFileSync(path, Buffer.concat([length, text, bytes.subarray(start)]));
      };

      const renameNorm = (header: Record<string, { shape: number[] }>): void => {
        header['model.other.weight'] = header['model.norm.weight']!;
        delete header['model.norm.weight'];
      };

      const overwrite = (file: string, at: number, content: Buffer) => (directory: string) => {
        const path = join(directory, file);
        const bytes = readFileSync(path);
        content.copy(bytes, at);
        writeFileSync(path, bytes);
      };

      const gigabytes = Buffer.alloc(8);
      gigabytes.writeBigUInt64LE(8n * 1024n ** 3n);

      const cases: [what: string, change: (directory: string) => void, about: string][] = [
        ['a tensor is missing', editHeader(renameNorm), 'model.norm.weight'],
        ['a tensor has another shape', editHeader((header) => header['model.norm.weight']!.shape.unshift(1)), 'model.norm.weight'],
        ['the header is damaged', overwrite('model.safetensors', 8, Buffer.from('!!!!')), 'header'],
        ['the header claims gigabytes', overwrite('model.safetensors', 0, gigabytes), 'header'],
        ['the weights are cut', (directory) => truncateSync(join(directory, 'model.safetensors'), statSync(join(directory, 'model.safetensors')).size - 8), 'model.safetensors'],
        ['the weights are empty', (directory) => truncateSync(join(directory, 'model.safetensors'), 0), 'model.safetensors'],
        ['the weights are missing', (directory) => rmSync(join(directory, 'model.safetensors')), 'model.safetensors'],
        ['the configuration is no JSON', (directory) => writeFileSync(join(directory, 'config.json'), '{'), 'config.json'],
        ['the configuration is missing', (directory) => rmSync(join(directory, 'config.json')), 'config.json'],
        ['the model is another', (directory) => writeFileSync(join(directory, 'config.json'), '{"model_type":"bert"}'), 'config.json'],
      ];
      for (const [what, change, about] of cases) {
        it(what, async () => {
          const directory = damaged(change);
          await refused(['eval', directory, '--data', 'validation.tokens', '--length', '32'], 'CHECKPOINT_INVALID', about);
          await refused(['generate', directory, '--prompt', 'x'], 'CHECKPOINT_INVALID', about);
        });
      }

      it('a bit was flipped in the weights of a checkpoint with a manifest', async () => {
        const directory = damaged(() => undefined);
        rmSync(directory, { recursive: true });
        cpSync(checkpoint, directory, { recursive: true });
        const path = join(directory, 'model.safetensors');
        const bytes = readFileSync(path);
        bytes[bytes.length - 5]! ^= 1;
        writeFileSync(path, bytes);
        await refused(['eval', directory, '--data', 'validation.tokens', '--length', '32'], 'CHECKPOINT_INVALID', 'model.safetensors');
      });

      it('there is none', async () => {
        await refused(['eval', 'nowhere', '--data', 'validation.tokens'], 'FILE_NOT_FOUND', 'nowhere');
        await refused(['generate', 'nowhere', '--prompt', 'x'], 'FILE_NOT_FOUND', 'nowhere');
      });

      it('it has no tokenizer to generate with', () =>
        refused(['generate', damaged((directory) => rmSync(join(directory, 'tokenizer.json'))), '--prompt', 'x'], 'FILE_NOT_FOUND', 'tokenizer.json'));
    });
  });
});

/** The file's vocabulary made smaller than its ids, with checksums that are right. */
function lowerVocabulary(bytes: Buffer): Buffer {
  const copy = Buffer.from(bytes);
  copy.writeUInt32LE(20, 32);
  copy.writeUInt32LE(crc32(copy.subarray(0, 76)), 76);
  return copy;
}
