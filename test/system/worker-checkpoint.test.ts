/**
 * Checkpoints written beside training, by real processes. A tokenizer that is a FIFO holds the writer in the middle of a checkpoint
 * for exactly as long as a test wants: after the weights, before the optimizer state.
 */
import { execFileSync } from 'node:child_process';
import { appendFileSync, closeSync, constants, existsSync, mkdirSync, openSync, readFileSync, readdirSync, renameSync, statSync, writeFileSync, writeSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { expect } from 'chai';
import type { Job } from 'bullmq';
import { decodeFailure } from '../../config/errors.ts';
import type { ErrorRecord } from '../../config/errors.ts';
import { parseResult } from '../../config/messages.ts';
import type { Result } from '../../config/messages.ts';
import type { RunSpec } from '../../config/run-spec.ts';
import { verifyCheckpoint } from '../../data/checkpoint-files.ts';
import { eventually, until } from '../support/wait.ts';
import { WorkerProcesses, addSteps, failureOf, outcomeOf } from '../support/worker-processes.ts';
import type { WorkerBench } from '../support/worker-processes.ts';
import { WorkerWorld, originOf } from '../support/worker-world.ts';

/** A tokenizer that its reader waits for. */
class SlowFile {
  readonly path: string;
  #descriptor: number | undefined;

  constructor(path: string) {
    this.path = path;
    execFileSync('mkfifo', [path]);
  }

  /** Once somebody waits for it, who then waits until it is given. */
  async awaited(): Promise<void> {
    this.#descriptor ??= await eventually('a reader of the tokenizer', () => {
      try {
        return openSync(this.path, constants.O_WRONLY | constants.O_NONBLOCK);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === 'ENXIO') return undefined;
        throw error;
      }
    });
  }

  /** Gives it to whoever waits for it, once somebody does. */
  async give(): Promise<void> {
    await this.awaited();
    const descriptor = this.#descriptor!;
    this.#descriptor = undefined;
    writeSync(descriptor, '{}');
    closeSync(descriptor);
  }
}

describe('checkpoints beside training', function () {
  this.timeout(60_000);
  let world: WorkerWorld;
  let workers: WorkerProcesses;
  let files = 0;

  interface Bench extends WorkerBench {
    /** Progress of checkpoints so far. */
    readonly copied: Result<'checkpointProgress'>[];
  }

  const start = async (worker: Record<string, number> = {}): Promise<Bench> => {
    const bench = await workers.bench({ worker });
    const copied: Result<'checkpointProgress'>[] = [];
    bench.events.on('progress', ({ data }) => {
      if ((data as { copied?: boolean }).copied === true) copied.push(parseResult('checkpointProgress', data));
    });
    return { ...bench, copied };
  };
  const newSpec = async (tokenizer?: string): Promise<RunSpec> => {
    const { data } = world.spec('data');
    return world.newRun({ steps: 100_000, data: tokenizer === undefined ? data : { ...data, tokenizer } });
  };
  const slowFile = (): SlowFile => new SlowFile(join(world.directory, `tokenizer-${files++}.json`));
  const placeOf = (spec: RunSpec, step: number): string => join(world.directory, spec.name, 'checkpoints', `step-${step}`);
  const steps = async ({ queue, events }: Bench, spec: RunSpec, fromStep: number, stepCount: number): Promise<Result<'steps'>> =>
    outcomeOf('steps', await addSteps(queue, spec, fromStep, stepCount), events);
  const save = async ({ queue }: Bench, spec: RunSpec, step: number, options: object = {}): Promise<Job> =>
    queue.add('checkpoint', { ...originOf(spec), step, directory: placeOf(spec, step) }, options);
  const saved = ({ events }: Bench, job: Job): Promise<Result<'checkpoint'>> => outcomeOf('checkpoint', job, events);
  const failed = ({ events }: Bench, job: Job): Promise<ErrorRecord> => failureOf(job, events);
  const digestAt = async ({ queue, events }: Bench, spec: RunSpec, step: number, checkpoint: Parameters<typeof originOf>[2] = null): Promise<string> =>
    (await outcomeOf('digest', await queue.add('digest', { ...originOf(spec, 0, checkpoint), step }), events)).digest;
  const incarnation = async ({ id }: Bench): Promise<string> => (await workers.record(id))!.incarnation;
  /** Until a checkpoint's weights are written, so that its writer waits for the tokenizer, or soon will. */
  const inTheMiddle = (spec: RunSpec): Promise<void> =>
    until('a writer in the middle', () => {
      const parent = dirname(placeOf(spec, 0));
      const partial = existsSync(parent) ? readdirSync(parent).find((name) => name.endsWith('.partial')) : undefined;
      return partial !== undefined && existsSync(join(parent, partial, 'model.safetensors'));
    });
  const filesBeside = (directory: string): string[] => readdirSync(dirname(directory));

  before(async () => {
    world = await WorkerWorld.start();
    workers = new WorkerProcesses(world);
  });
  afterEach(() => workers.clear());
  after(() => world.stop());

  it('training goes on while the files are written, for longer than the lock, and the files hold the version that was asked for', async () => {
    const bench = await start();
    const slow = slowFile();
    const spec = await newSpec(slow.path);
    await steps(bench, spec, 0, 3);
    const digest = await digestAt(bench, spec, 3);
    const job = await save(bench, spec, 3);
    await eventually('the word that the state is copied', () => bench.copied[0]);
    expect(bench.copied).to.deep.equal([{ worker: bench.id, epoch: 0, step: 3, copied: true }]);
    const { lockDurationMs } = world.config.queue;
    const endMs = Date.now() + 2 * lockDurationMs;
    let at = 3;
    while (Date.now() < endMs) at += (await steps(bench, spec, at, 40)).stepsDone;
    expect(at).to.be.greaterThan(3);
    expect(await job.getState()).to.equal('active');
    expect(filesBeside(placeOf(spec, 3))).to.have.lengthOf(1);
    await slow.give();
    const result = await saved(bench, job);
    expect(result).to.include({ worker: bench.id, epoch: 0, step: 3, directory: placeOf(spec, 3) });
    expect(result.milliseconds).to.be.greaterThan(2 * lockDurationMs);
    expect(filesBeside(placeOf(spec, 3))).to.deep.equal(['step-3']);
    expect(await verifyCheckpoint(placeOf(spec, 3))).to.deep.equal({ step: 3 });
    expect((await bench.queue.getJob(job.id!))!.attemptsStarted, 'the lock was never lost').to.equal(1);
    const other = await start();
    expect(await digestAt(other, spec, 3, { directory: placeOf(spec, 3), step: 3 })).to.equal(digest);
  });

  it('jobs keep their order, one at a time on the device; a second checkpoint waits for the first', async () => {
    const bench = await start();
    const slow = slowFile();
    const spec = await newSpec(slow.path);
    await steps(bench, spec, 0, 2);
    const first = await save(bench, spec, 2);
    const more = await addSteps(bench.queue, spec, 2, 2);
    const second = await save(bench, spec, 4);
    const last = await addSteps(bench.queue, spec, 4, 2);
    expect((await outcomeOf('steps', more, bench.events)).stepsDone).to.equal(2);
    await until('the second checkpoint taken', async () => (await second.getState()) === 'active');
    await inTheMiddle(spec);
    expect(bench.copied.map(({ step }) => step)).to.deep.equal([2]);
    expect(await last.getState()).to.equal('waiting');
    await slow.give();
    await saved(bench, first);
    await eventually('the second copied', () => bench.copied[1]);
    expect((await outcomeOf('steps', last, bench.events)).stepsDone, 'beside the second').to.equal(2);
    await slow.give();
    await saved(bench, second);
    for (const step of [2, 4]) expect(await verifyCheckpoint(placeOf(spec, step))).to.deep.equal({ step });
  });

  it('a checkpoint that waits for another is given up when its epoch is over, and the jobs of the next begin', async () => {
    const bench = await start();
    const slow = slowFile();
    const spec = await newSpec(slow.path);
    const first = await save(bench, spec, 0);
    await inTheMiddle(spec);
    const second = await bench.queue.add('checkpoint', { ...originOf(spec), step: 0, directory: placeOf(spec, 1) });
    const next = await bench.queue.add('steps', { ...originOf(spec, 1), fromStep: 0, stepCount: 2 });
    await until('the second taken', () => second.isActive());
    expect(await next.getState()).to.equal('waiting');
    await world.control(spec.name, { epoch: 1, command: 'run' });
    expect(await failed(bench, second)).to.include({ code: 'CANCELLED' });
    expect((await outcomeOf('steps', next, bench.events)).stepsDone).to.equal(2);
    expect(await first.getState()).to.equal('active');
    await slow.give();
    expect((await saved(bench, first)).step).to.equal(0);
  });

  it('a copied checkpoint is finished whatever its run is told, but for the end of the run: that leaves nothing', async () => {
    const bench = await start();
    const slow = slowFile();
    const spec = await newSpec(slow.path);
    for (const [epoch, command] of [[0, 'yield'], [0, 'stop'], [7, 'run']] as const) {
      await world.control(spec.name, { epoch: 0, command: 'run' });
      const step = epoch + (command === 'stop' ? 1 : 0);
      const job = await bench.queue.add('checkpoint', { ...originOf(spec), step: 0, directory: placeOf(spec, step) });
      await slow.awaited(); // a writer that is told before it waits may never come to that
      await world.control(spec.name, { epoch, command });
      // Twice as long as the worker needs to see it even when its message is lost.
      await new Promise((resolve) => setTimeout(resolve, 2 * world.config.worker.controlPollMs));
      await slow.give();
      expect((await saved(bench, job)).directory).to.equal(placeOf(spec, step));
    }
    await world.control(spec.name, { epoch: 0, command: 'run' });
    const job = await save(bench, spec, 0);
    await slow.awaited();
    await world.control(spec.name, null);
    await new Promise((resolve) => setTimeout(resolve, 2 * world.config.worker.controlPollMs));
    await slow.give();
    expect(await failed(bench, job)).to.include({ code: 'CANCELLED' });
    expect(filesBeside(placeOf(spec, 0)).filter((name) => name.startsWith('.'))).to.deep.equal([]);
  });

  it('SIGTERM waits for the checkpoint that is being written', async () => {
    const bench = await start();
    const slow = slowFile();
    const spec = await newSpec(slow.path);
    const job = await save(bench, spec, 0);
    await inTheMiddle(spec);
    const stopped = bench.supervisor.stop();
    await until('a draining worker', async () => (await workers.record(bench.id))?.state === 'draining');
    await slow.give();
    await stopped;
    expect((await saved(bench, job)).step).to.equal(0);
    expect(workers.exits.map(({ code }) => code)).to.deep.equal([0]);
    expect(await verifyCheckpoint(placeOf(spec, 0))).to.deep.equal({ step: 0 });
  });

  it('SIGKILL in the middle leaves only a temporary directory, which the next attempt removes', async () => {
    const bench = await start();
    const slow = slowFile();
    const spec = await newSpec(slow.path);
    const job = await save(bench, spec, 0);
    await inTheMiddle(spec);
    process.kill(bench.supervisor.workers()[0]!.pid, 'SIGKILL');
    await until('the end of the process', () => workers.exits.length > 0);
    expect(filesBeside(placeOf(spec, 0)).map((name) => /^\.step-0\..*\.partial$/.test(name))).to.deep.equal([true]);
    await slow.give();
    await saved(bench, job);
    expect(filesBeside(placeOf(spec, 0))).to.deep.equal(['step-0']);
  });

  it('a full disk fails the attempt and not the worker; the next writes the same copy, though training went on', async function () {
    const mount = join(world.directory, 'small');
    mkdirSync(mount);
    try {
      execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', mount], { stdio: 'pipe' });
    } catch (error) {
      console.error(`      skipped: a small tmpfs cannot be mounted here (${(error as Error).message.split('\n').at(-1)}); run as root to test a full disk`);
      this.skip();
    }
    try {
      const bench = await start();
      const before = await incarnation(bench);
      const spec = await newSpec();
      const directory = join(mount, 'step-2');
      await steps(bench, spec, 0, 2);
      const digest = await digestAt(bench, spec, 2);
      const job = await bench.queue.add('checkpoint', { ...originOf(spec), step: 2, directory }, { attempts: 2, backoff: { type: 'fixed', delay: 1_000 } });
      await until('the first attempt', async () => (await bench.queue.getJob(job.id!))!.attemptsMade === 1);
      const reason = decodeFailure((await bench.queue.getJob(job.id!))!.failedReason);
      expect(reason).to.include({ code: 'DISK_FULL' });
      expect(reason.context['path']).to.contain('step-2');
      expect(readdirSync(mount)).to.deep.equal([]);
      expect((await steps(bench, spec, 2, 3)).stepsDone).to.equal(3);
      execFileSync('mount', ['-o', 'remount,size=64m', mount]);
      await saved(bench, job);
      expect(await verifyCheckpoint(directory)).to.deep.equal({ step: 2 });
      expect(await incarnation(bench)).to.equal(before);
      expect((await steps(bench, spec, 5, 1)).stepsDone, 'the replica was not moved').to.equal(1);
      const other = await start();
      expect(await digestAt(other, spec, 2, { directory, step: 2 })).to.equal(digest);
    } finally {
      execFileSync('umount', [mount]);
    }
  });

  it('a checkpoint that is asked for again when training has gone on is answered by what lies there; the replica is not moved', async () => {
    const bench = await start();
    const spec = await newSpec();
    await steps(bench, spec, 0, 3);
    const first = await saved(bench, await save(bench, spec, 3));
    await steps(bench, spec, 3, 2);
    const manifest = join(placeOf(spec, 3), 'manifest.json');
    const { ino } = statSync(manifest);
    const again = await saved(bench, await save(bench, spec, 3));
    expect(again).to.deep.equal({ ...first, milliseconds: again.milliseconds });
    expect(statSync(manifest).ino, 'it was not written again').to.equal(ino);
    expect((await steps(bench, spec, 5, 1)).stepsDone, 'the replica was not moved').to.equal(1);
    expect(bench.copied).to.have.length(1);
    // What is damaged is no answer, and another version neither: both would have to be reached.
    renameSync(placeOf(spec, 3), placeOf(spec, 2));
    expect(await failed(bench, await save(bench, spec, 2))).to.include({ code: 'GRADIENT_LOST' });
    renameSync(placeOf(spec, 2), placeOf(spec, 3));
    appendFileSync(join(placeOf(spec, 3), 'config.json'), ' ');
    expect(await failed(bench, await save(bench, spec, 3))).to.include({ code: 'GRADIENT_LOST' });
  });

  it('a worker without memory for a copy writes as it trains, in turn', async () => {
    const bench = await start({ checkpointCopyPercent: 0 });
    const spec = await newSpec();
    await steps(bench, spec, 0, 1);
    const job = await save(bench, spec, 1);
    const more = steps(bench, spec, 1, 1);
    expect((await saved(bench, job)).bytes).to.be.greaterThan(0);
    expect((await more).stepsDone).to.equal(1);
    expect(bench.copied).to.deep.equal([]);
    expect(await verifyCheckpoint(placeOf(spec, 1))).to.deep.equal({ step: 1 });
  });

  it('a hundred checkpoints take no more memory than a few', async () => {
    const bench = await start();
    const spec = await newSpec();
    const residentBytes = (): number => {
      const [, pages] = readFileSync(`/proc/${bench.supervisor.workers()[0]!.pid}/statm`, 'utf8').split(' ');
      return Number(pages) * 4096;
    };
    const directory = placeOf(spec, 0);
    const copyBytes = 3 * 4 * 250_000;
    const round = async (count: number): Promise<void> => {
      for (let index = 0; index < count; index++) {
        await saved(bench, await save(bench, spec, 0, { removeOnComplete: { count: 2 } }));
        // Another of that name is replaced, so that each is written whole.
        writeFileSync(join(directory, 'manifest.json'), '{}');
      }
    };
    await round(20);
    const before = residentBytes();
    await round(100);
    const grown = residentBytes() - before;
    console.log(`      grown by ${(grown / 1e6).toFixed(1)} MB in 100 checkpoints of ${(copyBytes / 1e6).toFixed(1)} MB`);
    expect(grown).to.be.lessThan(20e6);
  });
});
