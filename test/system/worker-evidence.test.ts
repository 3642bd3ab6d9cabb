/**
 * What is left of a worker that died: its successor's record says how the process ended, with which job in its hands, and what it
 * printed last. Real processes that really crash.
 */
import { renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect } from 'chai';
import type { Job } from 'bullmq';
import type { WorkerRecord } from '../../config/messages.ts';
import { WorkerWatch } from '../../orchestrator/worker-watch.ts';
import { until } from '../support/wait.ts';
import { SLOW_MICROBATCH, WorkerProcesses, addSteps, outcomeOf, stepsUnderWay } from '../support/worker-processes.ts';
import type { WorkerBench } from '../support/worker-processes.ts';
import { WorkerWorld } from '../support/worker-world.ts';

const PRELOAD = fileURLToPath(new URL('../support/worker-crash.js', import.meta.url));

describe('evidence of a dead worker', function () {
  this.timeout(60_000);
  let world: WorkerWorld;
  let workers: WorkerProcesses;

  const record = async ({ id }: WorkerBench): Promise<WorkerRecord> => (await workers.record(id))!;
  /** A long job that is under way. */
  const training = async (bench: WorkerBench): Promise<Job> => {
    const spec = await world.newRun({ steps: 100_000 });
    return stepsUnderWay(bench, spec, 0, 50_000, { jobId: `${spec.name}.steps` });
  };
  const trigger = (how: string): void => {
    const path = process.env['NN_TEST_CRASH']!;
    writeFileSync(`${path}.new`, how);
    renameSync(`${path}.new`, path);
  };

  before(async () => {
    world = await WorkerWorld.start();
    workers = new WorkerProcesses(world);
    process.env['NN_TEST_CRASH'] = join(world.directory, 'crash');
    process.execArgv.push('--import', PRELOAD);
  });
  afterEach(() => workers.clear());
  after(async () => {
    process.execArgv.splice(-2);
    delete process.env['NN_TEST_CRASH'];
    await world.stop();
  });

  it('none: a first process, and one that was asked to end', async () => {
    const bench = await workers.bench();
    const first = await record(bench);
    expect(first.lastExit).to.equal(null);
    process.kill(first.processId, 'SIGTERM');
    expect((await workers.successor(first)).lastExit).to.equal(null);
  });

  for (const [how, signal] of [['SIGSEGV', 'SIGSEGV'], ['assert', 'SIGABRT']] as const) {
    it(`${how} in the native library: the signal, the job, and what was printed; the job is done by the successor`, async () => {
      const bench = await workers.bench();
      const before = await record(bench);
      const job = await training(bench);
      const atMs = Date.now();
      trigger(how);
      const { lastExit } = await workers.successor(before);
      expect(lastExit).to.deep.include({ job: job.id, code: null, signal });
      expect(lastExit!.atMs).to.be.within(atMs, Date.now());
      expect(lastExit!.error).to.include({ code: 'WORKER_LOST' });
      expect(lastExit!.error!.message).to.contain(bench.id).and.contain(signal);
      if (how === 'assert') expect(lastExit!.error!.context['stderr']).to.contain('optimizer.c:123: nn_adamw_step: Assertion `length == flat_length');
      await until('the job at work again', async () => ((await record(bench)).replica?.step ?? 0) > 0);
      const watch = new WorkerWatch(world.redis, world.config, () => undefined);
      await watch.look();
      expect(watch.views.find(({ id }) => id === bench.id)!.lastExit, 'as the orchestrator sees it').to.deep.equal(lastExit);
      await world.control(job.id!.replace('.steps', ''), { epoch: 0, command: 'stop' });
      expect((await outcomeOf('steps', job, bench.events)).stepsDone).to.be.greaterThan(0);
    });
  }

  it('SIGKILL from outside: the job at hand, or none', async () => {
    const bench = await workers.bench();
    const idle = await record(bench);
    process.kill(idle.processId, 'SIGKILL');
    const busy = await workers.successor(idle);
    expect(busy.lastExit).to.deep.include({ job: null, signal: 'SIGKILL' });
    const job = await training(bench);
    process.kill(busy.processId, 'SIGKILL');
    expect((await workers.successor(busy)).lastExit).to.deep.include({ job: job.id, signal: 'SIGKILL' });
  });

  it('a hung call: the fault that was reported, and its job', async () => {
    const bench = await workers.bench({ worker: { callTimeoutMs: 1_000 } });
    const before = await record(bench);
    const spec = await world.newRun(SLOW_MICROBATCH);
    const job = await addSteps(bench.queue, spec, 0, 1, { jobId: 'hung.steps' });
    const { lastExit } = await workers.successor(before);
    expect(lastExit).to.deep.include({ job: job.id, signal: 'SIGKILL' });
    expect(lastExit!.error).to.include({ code: 'DEVICE_FAULT' });
    expect(lastExit!.error!.context['hung']).to.equal(true);
  });
});
