/** Checkpoints: complete or absent, the same bits back, every damage named; plain Hugging Face directories are read too. */
import { execFileSync, spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readFileSync, readdirSync, renameSync, rmSync, truncateSync, utimesSync, writeFileSync } from 'node:fs';
import { hostname } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { expect } from 'chai';
import * as fc from 'fast-check';
import { NnError } from '../../config/errors.ts';
import { PRESETS, elementCount, parameterShapes, validateModel } from '../../config/presets.ts';
import type { ModelConfig } from '../../config/presets.ts';
import {
  CheckpointReader, checkpointDirectory, huggingFaceConfig, listCheckpoints, modelFromHuggingFace, newestGood, verifyCheckpoint, writeCheckpoint,
} from '../../data/checkpoint-files.ts';
import type { CheckpointSource, TrainingKind } from '../../data/checkpoint-files.ts';
import { encodeHuggingFaceConfig } from '../../data/hugging-face.ts';
import { SafetensorsFile, encodeBf16, writeSafetensors } from '../../data/safetensors.ts';
import { TokenFileWriter } from '../../data/token-file.ts';
import { expectError, expectRejection, temporaryDirectory } from './data-helpers.ts';

const model: ModelConfig = { ...PRESETS.tiny, vocabSize: 40, hiddenSize: 16, headSize: 4, layers: 2, experts: 3, ffnSize: 8 };

/** Values that tell tensor, kind and step apart, and do not survive bf16. */
function fill(kind: TrainingKind, name: string, step: number, into: Float32Array): void {
  let state = Array.from(`${kind} ${name} ${step}`).reduce((hash, character) => Math.imul(hash ^ character.charCodeAt(0), 16777619), 2166136261);
  for (let index = 0; index < into.length; index++) {
    state = Math.imul(state, 1664525) + 1013904223;
    into[index] = state / 2 ** 31;
  }
}

const source = (step: number, changed: Partial<CheckpointSource> = {}): CheckpointSource => ({
  model,
  step,
  precision: 'fp32',
  tokenizer: null,
  runInfo: { run: 'r', seed: 3 },
  read: (kind, name, into) => fill(kind, name, step, into),
  ...changed,
});

/** Compares all that a reader gives with what `fill` wrote. */
function expectContents(directory: string, step: number, precision: 'fp32' | 'bf16'): void {
  const reader = CheckpointReader.open(directory, { verify: true });
  expect(reader.step).to.equal(step);
  expect(reader.model).to.deep.equal(model);
  expect(reader.hasTraining).to.equal(true);
  expect(reader.state!.run).to.deep.equal({ run: 'r', seed: 3 });
  for (const { name, shape } of parameterShapes(model)) {
    const wanted = new Float32Array(elementCount(shape));
    const found = new Float32Array(wanted.length);
    for (const kind of ['weight', 'm', 'v'] as const) {
      fill(kind, name, step, wanted);
      reader.readTraining(kind, name, found);
      expect(found, `${kind} ${name}`).to.deep.equal(wanted);
    }
    fill('weight', name, step, wanted);
    if (precision === 'bf16') {
      const bits = new Uint16Array(wanted.length);
      encodeBf16(wanted, bits);
      bits.forEach((each, index) => (wanted[index] = new Float32Array(Uint32Array.of(each << 16).buffer)[0]!));
    }
    expect(reader.has(name)).to.equal(true);
    reader.read(name, found);
    expect(found, name).to.deep.equal(wanted);
  }
  reader.close();
}

describe('data: checkpoints', () => {
  const directory = temporaryDirectory();

  it('leaves out what only training needs where that is wanted', async () => {
    const place = directory.file('model-only');
    await writeCheckpoint(place, source(3, { precision: 'bf16' }), { withTraining: false });
    expect(readdirSync(place)).not.to.include('training');
    const reader = CheckpointReader.open(place, { verify: true });
    expect([reader.hasTraining, reader.step, reader.precision]).to.deep.equal([false, null, 'bf16']);
    expectError(() => reader.readTraining('m', 'lm_head.weight', new Float32Array(1)), 'CHECKPOINT_INVALID', 'no optimizer state');
    reader.close();
  });

  it('gives back the same bits, in float32 and bf16, whole and sharded', async () => {
    const tokenizer = directory.file('some-tokenizer.json');
    writeFileSync(tokenizer, '{"model": 1}');
    for (const [step, precision, shardBytes] of [[0, 'fp32', undefined], [1, 'bf16', undefined], [2, 'fp32', 4000], [3, 'bf16', 1]] as const) {
      const place = checkpointDirectory(directory.path, step);
      const { bytes } = await writeCheckpoint(place, source(step, { precision, tokenizer }), shardBytes === undefined ? {} : { shardBytes });
      expectContents(place, step, precision);
      const manifest = JSON.parse(readFileSync(join(place, 'manifest.json'), 'utf8')) as { files: Record<string, { bytes: number }> };
      expect(Object.values(manifest.files).reduce((sum, file) => sum + file.bytes, 0)).to.equal(bytes);
      const files = readdirSync(place, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile()).map(({ name }) => name);
      expect(files).to.have.length(Object.keys(manifest.files).length + 1);
      expect(existsSync(join(place, 'training/weights.safetensors'))).to.equal(precision === 'bf16');
      expect(existsSync(join(place, 'model.safetensors'))).to.equal(shardBytes === undefined);
      expect(readFileSync(join(place, 'tokenizer.json'), 'utf8')).to.equal('{"model": 1}');
    }
    const shards = readdirSync(checkpointDirectory(directory.path, 2)).filter((name) => name.startsWith('model-'));
    expect(shards).to.include(`model-00001-of-0000${shards.length}.safetensors`);
    for (const shard of shards) {
      const file = SafetensorsFile.open(join(checkpointDirectory(directory.path, 2), shard));
      expect(file.tensors.size === 1 || file.bytes < 4000 + 3000).to.equal(true);
      file.close();
    }
    expect(listCheckpoints(directory.path).map(({ step }) => step)).to.deep.equal([3, 2, 1, 0]);
  });

  it('writes the same bytes for the same replica, and leaves a checkpoint that is there already', async () => {
    const [one, two] = [directory.file('one'), directory.file('two')];
    await writeCheckpoint(one, source(5));
    await writeCheckpoint(two, source(5));
    for (const file of ['model.safetensors', 'config.json', 'training/m.safetensors', 'manifest.json']) {
      expect(readFileSync(join(one, file)).equals(readFileSync(join(two, file))), file).to.equal(true);
    }
    await writeCheckpoint(one, source(5));
    expectContents(one, 5, 'fp32');
    truncateSync(join(one, 'model.safetensors'), 99);
    await writeCheckpoint(one, source(5));
    expectContents(one, 5, 'fp32');
    expect(readdirSync(directory.path).sort()).to.deep.equal(['one', 'two']);
  });

  it('writes a config.json that means the same model when read back, NTK included', () => {
    fc.assert(
      fc.property(
        fc.record({
          vocabSize: fc.integer({ min: 1, max: 1e6 }), layers: fc.integer({ min: 1, max: 99 }), kvHeads: fc.integer({ min: 1, max: 8 }), groups: fc.integer({ min: 1, max: 8 }),
          headSize: fc.integer({ min: 2, max: 128 }).map((half) => half * 2), experts: fc.integer({ min: 1, max: 64 }), ffnSize: fc.integer({ min: 1, max: 9999 }),
          ropeTheta: fc.double({ min: 2, max: 1e7, noNaN: true }), ntkAlpha: fc.double({ min: 1, max: 64, noNaN: true }), rmsNormEps: fc.double({ min: 1e-8, max: 1e-3, noNaN: true }),
        }),
        ({ groups, ...sizes }) => {
          const queryHeads = sizes.kvHeads * groups;
          const given: ModelConfig = { ...sizes, queryHeads, hiddenSize: queryHeads * sizes.headSize, expertsPerToken: Math.ceil(sizes.experts / 2) };
          validateModel(given, 'test');
          expect(modelFromHuggingFace(JSON.parse(JSON.stringify(huggingFaceConfig(given))))).to.deep.equal(given);
        },
      ),
    );
    const config = huggingFaceConfig({ ...PRESETS['6.9b'], ntkAlpha: 8 }, { precision: 'bf16' });
    expect(config).to.include({
      model_type: 'mixtral', hidden_act: 'silu', torch_dtype: 'bfloat16', num_local_experts: 16, num_experts_per_tok: 4, head_dim: 64,
      bos_token_id: 2, eos_token_id: 3, pad_token_id: 0, max_position_embeddings: 262144,
    });
    expect(config['rope_theta']).to.be.closeTo(10000 * 8 ** (64 / 62), 1e-6);
    // Whole floats keep a point: transformers refuses an int where a float belongs.
    const text = Buffer.from(encodeHuggingFaceConfig(huggingFaceConfig(PRESETS.demo, { auxLossWeight: 1 }))).toString();
    for (const line of ['"rope_theta": 10000.0', '"ntk_alpha": 1.0', '"router_aux_loss_coef": 1.0', '"rms_norm_eps": 0.00001', '"hidden_size": 256,']) expect(text).to.include(line);
    expect(modelFromHuggingFace(JSON.parse(text))).to.deep.equal(PRESETS.demo);
    // Whoever edits rope_theta means it.
    expect(modelFromHuggingFace({ ...config, rope_theta: 5e5 })).to.include({ ropeTheta: 5e5, ntkAlpha: 1 });
    expect(modelFromHuggingFace({ ...config, rope_theta: undefined, rope_parameters: { rope_theta: 7e5, rope_type: 'default' } })).to.include({ ropeTheta: 7e5 });
  });

  it('refuses a config.json that is not a Mixtral that can be computed, naming the key', () => {
    const good = huggingFaceConfig(model);
    const refused: [object | null, string][] = [
      [null, 'no JSON object'],
      [{ model_type: 'llama' }, 'model_type is "llama"'],
      [{ hidden_act: 'gelu' }, 'hidden_act'],
      [{ sliding_window: 4096 }, 'sliding_window is 4096'],
      [{ tie_word_embeddings: true }, 'tie_word_embeddings'],
      [{ rope_scaling: { type: 'yarn', factor: 4 } }, 'rope_type is "yarn"'],
      [{ vocab_size: '40' }, 'vocab_size is "40"'],
      [{ vocab_size: -1 }, 'vocabSize'],
      [{ hidden_size: undefined }, 'hidden_size is missing'],
      [{ num_key_value_heads: 3 }, 'kvHeads'],
      [{ num_experts_per_tok: 4 }, 'expertsPerToken'],
      [{ num_hidden_layers: 1e12 }, 'num_hidden_layers'],
    ];
    for (const [change, text] of refused) {
      expectError(() => modelFromHuggingFace(change === null ? null : { ...good, ...change }, 'x/config.json'), 'CHECKPOINT_INVALID', 'x/config.json', text);
    }
  });

  it('reads a plain Hugging Face directory, sharded or not, and in half precision', async () => {
    await writeCheckpoint(directory.file('own'), source(1), { shardBytes: 4000 });
    const plain = directory.file('plain');
    cpSync(directory.file('own'), plain, { recursive: true });
    rmSync(join(plain, 'training'), { recursive: true });
    rmSync(join(plain, 'manifest.json'));
    const config = huggingFaceConfig(model);
    delete config['cuda_nn'];
    delete config['head_dim'];
    writeFileSync(join(plain, 'config.json'), JSON.stringify(config));
    const reader = CheckpointReader.open(plain, { verify: true });
    expect([reader.step, reader.hasTraining, reader.tokenizer, reader.model]).to.deep.equal([null, false, null, model]);
    expectError(() => reader.readTraining('m', 'lm_head.weight', new Float32Array(640)), 'CHECKPOINT_INVALID', 'no optimizer state');
    expectError(() => reader.requireModel({ ...model, ffnSize: 9 }), 'CHECKPOINT_INVALID', 'ffnSize 8, but 9 is wanted');
    reader.close();
    await verifyCheckpoint(plain);

    const half = directory.file('half');
    mkdirSync(half);
    writeFileSync(join(half, 'config.json'), JSON.stringify(config));
    writeSafetensors(join(half, 'model.safetensors'), parameterShapes(model).map((each) => ({ ...each, dtype: 'BF16' as const })), (_, into) => into.fill(1.5));
    // The same bits under the name F16: 0x3fc0 is 1.9375 there.
    const bytes = readFileSync(join(half, 'model.safetensors'));
    const header = bytes.readUInt32LE(0);
    const text = bytes.toString('utf8', 8, 8 + header).replaceAll('"BF16"', '"F16" ');
    bytes.write(text, 8);
    writeFileSync(join(half, 'model.safetensors'), bytes);
    const read = CheckpointReader.open(half, { verify: false });
    const norm = new Float32Array(16);
    read.read('model.norm.weight', norm);
    expect([...norm]).to.deep.equal(Array.from({ length: 16 }, () => 1.9375));
    read.close();
  });

  it('names missing, mis-shaped, extra and mistyped tensors', () => {
    const place = directory.file('hf');
    mkdirSync(place);
    writeFileSync(join(place, 'config.json'), JSON.stringify(huggingFaceConfig(model)));
    const shapes = parameterShapes(model).map((each) => ({ ...each, dtype: 'F32' as const }));
    const attempt = (tensors: Parameters<typeof writeSafetensors>[1], ...texts: string[]): void => {
      rmSync(join(place, 'model.safetensors'), { force: true });
      writeSafetensors(join(place, 'model.safetensors'), tensors, (_, into) => into.fill(0));
      expectError(() => CheckpointReader.open(place, { verify: false }), 'CHECKPOINT_INVALID', 'hf', ...texts);
    };
    attempt(shapes.filter(({ name }) => name !== 'lm_head.weight'), '"lm_head.weight" is missing');
    attempt([], '"model.embed_tokens.weight"', `and ${shapes.length - 3} more is missing`);
    attempt([...shapes, { name: 'score.weight', dtype: 'F32', shape: [2] }], '"score.weight" is not of this model');
    attempt(shapes.map((each) => (each.name === 'model.norm.weight' ? { ...each, shape: [4, 4] } : each)), '"model.norm.weight" has shape [4, 4], but its config wants [16]');
    writeFileSync(join(place, 'model.safetensors.index.json'), JSON.stringify({ weight_map: { a: '../x.safetensors' } }));
    expectError(() => CheckpointReader.open(place, { verify: false }), 'CHECKPOINT_INVALID', 'names no file of this directory');
    writeFileSync(join(place, 'model.safetensors.index.json'), JSON.stringify({ weight_map: { a: 'gone.safetensors' } }));
    expectError(() => CheckpointReader.open(place, { verify: false }), 'CHECKPOINT_INVALID', 'gone.safetensors is missing');
    writeFileSync(join(place, 'model.safetensors.index.json'), JSON.stringify({ weight_map: { a: 'model.safetensors' } }));
    expectError(() => CheckpointReader.open(place, { verify: false }), 'CHECKPOINT_INVALID', '"a" is missing from model.safetensors');
    writeFileSync(join(place, 'model.safetensors.index.json'), '{');
    expectError(() => CheckpointReader.open(place, { verify: false }), 'CHECKPOINT_INVALID', 'index.json is no JSON');
  });

  it('notices a flipped bit, a cut, a missing file, a damaged header, and says which file', async () => {
    const place = directory.file('good');
    await writeCheckpoint(place, source(1, { precision: 'bf16' }), { shardBytes: 4000 });
    const files = readdirSync(place, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name).slice(place.length + 1));
    expect(files.length).to.be.above(8);
    const bad = directory.file('bad');
    for (const file of files) {
      const attempt = async (change: (path: string) => void): Promise<void> => {
        cpSync(place, bad, { recursive: true });
        change(join(bad, file));
        await expectRejection(verifyCheckpoint(bad), 'CHECKPOINT_INVALID', bad, file);
        expectError(() => CheckpointReader.open(bad, { verify: true }), 'CHECKPOINT_INVALID', bad, file);
        rmSync(bad, { recursive: true });
      };
      await attempt((path) => truncateSync(path, readFileSync(path).length - 2));
      await attempt((path) => rmSync(path));
      if (file === 'manifest.json') continue; // any change of it is a change of another file, or of its form
      await attempt((path) => {
        const bytes = readFileSync(path);
        bytes[bytes.length >> 1]! ^= 4;
        writeFileSync(path, bytes);
      });
    }
    cpSync(place, bad, { recursive: true });
    const huge = Buffer.alloc(readFileSync(join(bad, 'training/v.safetensors')).length);
    huge.writeBigUInt64LE(9n << 30n);
    writeFileSync(join(bad, 'training/v.safetensors'), huge);
    expectError(() => CheckpointReader.open(bad, { verify: false }), 'CHECKPOINT_INVALID', 'v.safetensors', 'claims 9663676416 bytes');
    await expectRejection(verifyCheckpoint(directory.file('none')), 'FILE_NOT_FOUND', 'no such directory');
    expectError(() => CheckpointReader.open(directory.path, { verify: false }), 'CHECKPOINT_INVALID', 'config.json is missing');
  });

  it('finds the newest good checkpoint and names the damaged ones', async () => {
    expect(await newestGood(directory.path)).to.deep.equal({ checkpoint: null, damaged: [] });
    for (const step of [9, 10, 100, 101]) await writeCheckpoint(checkpointDirectory(directory.path, step), source(step));
    mkdirSync(join(directory.path, 'checkpoints', '.step-200.host.1.00000000.partial'));
    mkdirSync(join(directory.path, 'checkpoints', 'step-077'));
    renameSync(checkpointDirectory(directory.path, 101), checkpointDirectory(directory.path, 102));
    rmSync(join(checkpointDirectory(directory.path, 100), 'training/m.safetensors'));
    const found = await newestGood(directory.path);
    expect(found.checkpoint).to.deep.equal({ directory: checkpointDirectory(directory.path, 10), step: 10, branch: 0 });
    expect(found.damaged.map(({ step, error }) => [step, error.code])).to.deep.equal([[102, 'CHECKPOINT_INVALID'], [100, 'CHECKPOINT_INVALID']]);
    expect(found.damaged[0]!.error.message).to.include('holds step 101');
    expect((await newestGood(directory.path, ({ step }) => step <= 9)).checkpoint!.step).to.equal(9);
  });

  it('leaves nothing behind when the source fails, or the tokenizer is not there', async () => {
    const failing = source(1, {
      read: () => {
        throw new Error('device gone');
      },
    });
    let message = '';
    await writeCheckpoint(directory.file('c/step-1'), failing).catch((error: Error) => (message = error.message));
    expect(message).to.equal('device gone');
    await expectRejection(writeCheckpoint(directory.file('c/step-1'), source(1, { tokenizer: directory.file('gone.json') })), 'FILE_NOT_FOUND', 'gone.json');
    // Address 0 of any process: the one file that cannot be read but with EIO.
    await expectRejection(writeCheckpoint(directory.file('c/step-1'), source(1, { tokenizer: '/proc/self/mem' })), 'DISK_FAULT', '/proc/self/mem', 'EIO');
    expect(readdirSync(directory.file('c'))).to.deep.equal([]);
  });

  it('is absent after a kill in the middle, the older one untouched, and the next write cleans up', async () => {
    const [first, second] = [checkpointDirectory(directory.path, 1), checkpointDirectory(directory.path, 2)];
    await writeCheckpoint(first, source(1));
    const script = `
      import { writeCheckpoint } from ${JSON.stringify(new URL('../../data/checkpoint-files.js', import.meta.url).href)};
      await writeCheckpoint(${JSON.stringify(second)}, { model: ${JSON.stringify(model)}, step: 2, precision: 'fp32', tokenizer: null, runInfo: {},
        read: (kind, name) => { if (kind === 'v' && name === 'lm_head.weight') process.kill(process.pid, 'SIGKILL'); } });`;
    const child = spawnSync(process.execPath, ['--input-type=module', '--eval', script], { encoding: 'utf8' });
    expect(child.signal, child.stderr).to.equal('SIGKILL');
    const names = readdirSync(dirname(first));
    expect(names).to.have.length(2);
    expect(names.find((name) => name !== 'step-1')).to.match(/^\.step-2\..*\.partial$/);
    expect(listCheckpoints(directory.path).map(({ step }) => step)).to.deep.equal([1]);
    expectContents(first, 1, 'fp32');
    await writeCheckpoint(second, source(2));
    expect(readdirSync(dirname(first)).sort()).to.deep.equal(['step-1', 'step-2']);
    expectContents(second, 2, 'fp32');
  });

  it('hashes a directory that stays as it is once, and again when a file of it was touched or others came between', async () => {
    const places = Array.from({ length: 9 }, (_, step) => checkpointDirectory(directory.path, step));
    for (const [step, place] of places.entries()) await writeCheckpoint(place, source(step));
    let looks = 0;
    const read = (place: string): number => {
      looks = 0;
      CheckpointReader.open(place, { verify: 'once', check: () => void looks++ }).close();
      return looks;
    };
    const [first] = places as [string];
    expect(read(first)).to.be.greaterThan(0);
    expect(read(first), 'files that have changed within the resolution of their times').to.be.greaterThan(0);
    // Times of files older than this are believed.
    await new Promise((resolve) => setTimeout(resolve, 2_100));
    expect(read(first)).to.be.greaterThan(0);
    expect(read(first)).to.equal(0);
    for (const place of places.slice(1)) expect(read(place)).to.be.greaterThan(0);
    expect(read(first), 'forgotten: the memory is bounded').to.be.greaterThan(0);
    expect(read(first)).to.equal(0);
    const file = join(first, 'training/m.safetensors');
    const bytes = readFileSync(file);
    bytes[bytes.length - 3]! ^= 1;
    writeFileSync(file, bytes);
    const long = new Date(Date.now() - 3_600_000);
    utimesSync(file, long, long);
    expectError(() => read(first), 'CHECKPOINT_INVALID', 'training/m.safetensors');
    expectError(() => read(first), 'CHECKPOINT_INVALID', 'training/m.safetensors');
  });

  it('stops hashing where it is told to', async () => {
    const place = checkpointDirectory(directory.path, 1);
    await writeCheckpoint(place, source(1));
    const check = (): void => {
      throw new NnError('CANCELLED', 'enough');
    };
    for (const verify of [true, 'once'] as const) expectError(() => CheckpointReader.open(place, { verify, check }), 'CANCELLED', 'enough');
  });

  it('removes what nobody has written to for a day, and nothing that somebody may be writing', async () => {
    const of = (host: string, processId: number): string => directory.file(`.step-3.${host}.${processId}.0000000a.partial`);
    const [elsewhere, old, own, living] = [of('elsewhere', 77), of('gone.example', 77), of(hostname(), process.pid), of(hostname(), process.ppid)];
    const twoDaysAgo = new Date(Date.now() - 48 * 3_600_000);
    for (const each of [elsewhere, old, own, living]) {
      mkdirSync(join(each, 'training'), { recursive: true });
      for (const file of ['model.safetensors', 'training/m.safetensors']) {
        writeFileSync(join(each, file), 'x');
        utimesSync(join(each, file), twoDaysAgo, twoDaysAgo);
      }
      for (const inner of [join(each, 'training'), each]) utimesSync(inner, twoDaysAgo, twoDaysAgo);
    }
    // Somebody far away, and somebody here with the number of a living process, write on; the file's own time tells.
    for (const each of [elsewhere, living]) utimesSync(join(each, 'training/m.safetensors'), new Date(), new Date());
    await writeCheckpoint(directory.file('step-4'), source(4));
    expect(readdirSync(directory.path).sort()).to.deep.equal([elsewhere, living, directory.file('step-4')].map((path) => basename(path)).sort());
  });

  it('keeps the older checkpoint and removes the temporary one when the disk is full', async function () {
    const mount = directory.file('small');
    mkdirSync(mount);
    try {
      execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', mount], { stdio: 'pipe' });
    } catch (error) {
      console.error(`      skipped: a small tmpfs cannot be mounted here (${(error as Error).message.split('\n').at(-1)}); run as root to test a full disk`);
      this.skip();
    }
    try {
      const small: ModelConfig = { ...model, vocabSize: 200 };
      const of = (step: number): CheckpointSource => source(step, { model: small });
      await writeCheckpoint(join(mount, 'step-1'), of(1));
      await expectRejection(writeCheckpoint(join(mount, 'step-2'), of(2)), 'DISK_FULL', 'step-2', 'disk is full');
      expect(readdirSync(mount)).to.deep.equal(['step-1']);
      await verifyCheckpoint(join(mount, 'step-1'));
      const writer = new TokenFileWriter(join(mount, 'tokens'), { vocabSize: 70_000, tokenizerDigest: null });
      expectError(() => writer.append(new Int32Array(100_000)), 'DISK_FULL', 'tokens');
      expect(readdirSync(mount)).to.deep.equal(['step-1']);
    } finally {
      execFileSync('umount', [mount]);
    }
  });
});
