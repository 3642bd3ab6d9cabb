/**
 * Disks that are full and checkpoints that are damaged, under real runs: the run waits or falls back, says so, and ends with
 * the weights of the undisturbed one; its history shows that each (step, shard) counted once.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { expect } from 'chai';
import type { RunRecord } from '../../config/messages.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { verifyCheckpoint } from '../../data/checkpoint-files.ts';
import { fill } from '../chaos/faults.ts';
import { Stack, signal } from '../support/stack.ts';
import { until } from '../support/wait.ts';

const STEPS = 60;
const SPEC: Partial<RunSpecInput> = {
  steps: STEPS, batch: { shards: 4, microBatches: 1, sequences: 8, sequenceLength: 64 }, checkpoint: { every: 10, keep: 3 }, evaluation: { every: 0, sequences: 8 },
};

describe('faults: damaged checkpoints', function () {
  this.timeout(60_000);
  let stack: Stack;
  let reference: string;

  before(async () => {
    stack = await Stack.start();
    await stack.orchestrate();
    await stack.work(1);
    await stack.train('calm', { ...SPEC, parallelism: 1 });
    reference = (await stack.finish('calm')).weightsDigest!;
  });
  after(() => stack?.stop());

  const record = (name: string): Promise<RunRecord> => stack.client.run(name).record();

  /** A run that is paused with at least two checkpoints; the directory of the newest. */
  const paused = async (name: string): Promise<string> => {
    const run = await stack.train(name, { ...SPEC, parallelism: 1 });
    await stack.reached(name, 22);
    await run.pause();
    await until('the pause', async () => (await record(name)).phase === 'paused');
    const { checkpoint } = await record(name);
    expect(checkpoint!.step).to.be.within(22, STEPS - 1);
    return checkpoint!.directory;
  };
  const flip = (path: string): void => {
    const bytes = readFileSync(path);
    bytes[Math.floor(bytes.length / 2)]! ^= 0x10;
    writeFileSync(path, bytes);
  };

  const FILES = ['config.json', 'generation_config.json', 'model.safetensors', 'manifest.json', 'training/state.json', 'training/m.safetensors', 'training/v.safetensors'];
  for (const [number, file] of FILES.entries()) {
    it(`a bit flipped in ${file}: named, and the checkpoint before is used`, async () => {
      const name = `flipped-${number}`;
      const directory = await paused(name);
      if (number === 0) {
        const there = ['', 'training'].flatMap((inner) => readdirSync(join(directory, inner)).map((each) => join(inner, each))).filter((each) => each !== 'training');
        expect(there.sort(), 'each file has a case').to.deep.equal(FILES.toSorted());
      }
      flip(join(directory, file));
      for (const pid of stack.workers.values()) signal(pid, 'SIGKILL');
      await stack.client.run(name).resume();
      const { record: ended } = await stack.prove(name, reference);
      const told = ended.faults.find(({ error }) => error.code === 'CHECKPOINT_INVALID');
      expect(told?.error.message).to.contain(basename(directory)).and.to.contain(basename(file));
    });
  }

  it('damage while nobody runs is found by the next orchestrator', async () => {
    const name = 'found-at-start';
    const directory = await paused(name);
    for (const victim of stack.orchestrators.splice(0)) await victim.kill();
    flip(join(directory, 'training', 'm.safetensors'));
    for (const pid of stack.workers.values()) signal(pid, 'SIGKILL');
    await stack.orchestrate();
    await stack.client.run(name).resume();
    const { record: ended } = await stack.prove(name, reference);
    expect(ended.faults.map(({ error }) => error.code)).to.include('CHECKPOINT_INVALID');
  });
});

describe('faults: a full disk', function () {
  this.timeout(60_000);
  const directory = mkdtempSync(join(tmpdir(), 'nn-disk-'));
  const runs = join(directory, 'runs');
  let stack: Stack | undefined;
  let reference: string;

  before(async function () {
    mkdirSync(runs);
    const root = process.platform === 'linux' && process.getuid?.() === 0;
    if (!root || spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', runs]).status !== 0) {
      process.stderr.write('      no tests of a full disk: a small disk takes root and mount\n');
      this.skip();
    }
    stack = await Stack.start({ directory });
    await stack.orchestrate();
    await stack.work(2);
    await stack.train('calm', { ...SPEC, parallelism: 1 });
    reference = (await stack.finish('calm')).weightsDigest!;
  });
  after(async () => {
    await stack?.stop();
    spawnSync('umount', ['-l', runs]);
    rmSync(directory, { recursive: true, force: true });
  });

  const record = (name: string): Promise<RunRecord> => stack!.client.run(name).record();
  const filler = join(runs, 'filler');

  for (const [way, parallelism] of [['local', 1], ['flow', 2]] as const) {
    it(`pauses the run with the reason, the old checkpoint intact; with room it goes on; and again (${way})`, async () => {
      const name = `full-${way}`;
      const run = await stack!.train(name, { ...SPEC, parallelism });
      for (const from of [12, 32]) {
        await stack!.reached(name, from);
        // Steps do not wait for the files: on a slow machine the first checkpoint comes after them.
        await until('a checkpoint to keep', async () => (await record(name)).checkpoint !== null);
        fill(filler);
        await until('the pause', async () => (await record(name)).phase === 'paused');
        const { checkpoint, faults, step } = await record(name);
        expect(faults.at(-1)?.error ?? faults, `at step ${step}`).to.include({ code: 'DISK_FULL' });
        await verifyCheckpoint(checkpoint!.directory);
        rmSync(filler);
        await run.resume();
        await until('going on', async () => (await record(name)).phase !== 'paused');
      }
      await stack!.prove(name, reference);
    });
  }

  it('is no end for a run whose orchestrator dies meanwhile', async () => {
    const name = 'full-killed';
    const run = await stack!.train(name, { ...SPEC, parallelism: 1 });
    await stack!.reached(name, 12);
    fill(filler);
    for (const victim of stack!.orchestrators.splice(0)) await victim.kill();
    await stack!.orchestrate();
    await until('the pause', async () => (await record(name)).phase === 'paused');
    rmSync(filler);
    await run.resume();
    await stack!.prove(name, reference);
  });
});
