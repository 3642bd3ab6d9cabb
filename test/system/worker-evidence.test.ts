/**
 * What is left of a worker that died: its successor's record says how the process ended, with which job in its hands, and what it
 * printed last. Real processes that really crash.
 */
import { once } from 'node:events';
import { renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect } from 'chai';
import type { Job, Queue, QueueEvents } from 'bullmq';
import { workerQueue } from '../../config/keys.ts';
import { parseResult } from '../../config/messages.ts';
import type { WorkerRecord } from '../../config/messages.ts';
import { PRESETS } from '../../config/presets.ts';
import { WorkerWatch } from '../../orchestrator/worker-watch.ts';
import { startSupervisor } from '../../workers/main.ts';
import type { Supervisor, SupervisorEvent } from '../../workers/main.ts';
import { World, eventually, originOf } from './worker-helpers.ts';

const PRELOAD = fileURLToPath(new URL('../support/worker-crash.js', import.meta.url));

describe('evidence of a dead worker', function () {
  this.timeout(60_000);
  let world: World;
  let supervisors: Supervisor[] = [];
  let log: SupervisorEvent[] = [];
  let runs = 0;

  interface Bench {
    readonly id: string;
    readonly supervisor: Supervisor;
    readonly queue: Queue;
    readonly events: QueueEvents;
  }

  const start = async (worker: Record<string, number> = {}): Promise<Bench> => {
    const config = { ...world.config, worker: { ...world.config.worker, ...worker } };
    const supervisor = startSupervisor({ config, device: { library: 'cpu', indices: 'cpu' }, count: 1, idPrefix: `e${runs++}`, onEvent: (event) => log.push(event) });
    supervisors.push(supervisor);
    await supervisor.ready;
    const { id } = supervisor.workers()[0]!;
    return { id, supervisor, ...(await world.queue(workerQueue('train', id))) };
  };
  const record = async ({ id }: Bench): Promise<WorkerRecord> => JSON.parse((await world.redis.hget(world.names.workers, id))!) as WorkerRecord;
  const successor = async (bench: Bench, before: WorkerRecord): Promise<WorkerRecord> =>
    eventually('another incarnation', async () => {
      const text = await world.redis.hget(world.names.workers, bench.id);
      const now = text === null ? undefined : (JSON.parse(text) as WorkerRecord);
      return now?.incarnation === before.incarnation ? undefined : now;
    });
  /** A long job that is under way. */
  const training = async ({ queue, events }: Bench): Promise<Job> => {
    const spec = world.spec(`run-${runs++}`, { steps: 100_000 });
    await world.control(spec.name, { epoch: 0, command: 'run' });
    const progressed = once(events, 'progress');
    const job = await queue.add('steps', { ...originOf(spec), fromStep: 0, stepCount: 50_000 }, { jobId: `${spec.name}.steps` });
    await progressed;
    return job;
  };
  const trigger = (how: string): void => {
    const path = process.env['NN_TEST_CRASH']!;
    writeFileSync(`${path}.new`, how);
    renameSync(`${path}.new`, path);
  };

  before(async () => {
    world = await World.start();
    process.env['NN_TEST_CRASH'] = join(world.directory, 'crash');
    process.execArgv.push('--import', PRELOAD);
  });
  afterEach(async () => {
    await Promise.all(supervisors.map((supervisor) => supervisor.stop()));
    supervisors = [];
    log = [];
    await world.clear();
  });
  after(async () => {
    process.execArgv.splice(-2);
    delete process.env['NN_TEST_CRASH'];
    await world.stop();
  });

  it('none: a first process, and one that was asked to end', async () => {
    const bench = await start();
    const first = await record(bench);
    expect(first.lastExit).to.equal(null);
    process.kill(first.processId, 'SIGTERM');
    expect((await successor(bench, first)).lastExit).to.equal(null);
  });

  for (const [how, signal] of [['SIGSEGV', 'SIGSEGV'], ['assert', 'SIGABRT']] as const) {
    it(`${how} in the native library: the signal, the job, and what was printed; the job is done by the successor`, async () => {
      const bench = await start();
      const before = await record(bench);
      const job = await training(bench);
      const atMs = Date.now();
      trigger(how);
      const { lastExit } = await successor(bench, before);
      expect(lastExit).to.deep.include({ job: job.id, code: null, signal });
      expect(lastExit!.atMs).to.be.within(atMs, Date.now());
      expect(lastExit!.error).to.include({ code: 'WORKER_LOST' });
      expect(lastExit!.error!.message).to.contain(bench.id).and.contain(signal);
      if (how === 'assert') expect(lastExit!.error!.context['stderr']).to.contain('optimizer.c:123: nn_adamw_step: Assertion `length == flat_length');
      await eventually('the job at work again', async () => ((await record(bench)).replica?.step ?? 0) > 0 ? true : undefined);
      const watch = new WorkerWatch(world.redis, world.config, () => undefined);
      await watch.look();
      expect(watch.views.find(({ id }) => id === bench.id)!.lastExit, 'as the orchestrator sees it').to.deep.equal(lastExit);
      await world.control(job.id!.replace('.steps', ''), { epoch: 0, command: 'stop' });
      expect(parseResult('steps', await job.waitUntilFinished(bench.events, 30_000)).stepsDone).to.be.greaterThan(0);
    });
  }

  it('SIGKILL from outside: the job at hand, or none', async () => {
    const bench = await start();
    const idle = await record(bench);
    process.kill(idle.processId, 'SIGKILL');
    const busy = await successor(bench, idle);
    expect(busy.lastExit).to.deep.include({ job: null, signal: 'SIGKILL' });
    const job = await training(bench);
    process.kill(busy.processId, 'SIGKILL');
    expect((await successor(bench, busy)).lastExit).to.deep.include({ job: job.id, signal: 'SIGKILL' });
  });

  it('a hung call: the fault that was reported, and its job', async () => {
    const bench = await start({ callTimeoutMs: 1_000 });
    const before = await record(bench);
    // One microbatch of this model takes many times the timeout on one core.
    const model = { ...PRESETS.demo, vocabSize: 512, hiddenSize: 512, headSize: 128, ffnSize: 2048 };
    const spec = { ...world.spec('hung'), model, batch: { shards: 1, microBatches: 1, sequences: 8, sequenceLength: 512 }, recompute: 'layer' as const };
    await world.control(spec.name, { epoch: 0, command: 'run' });
    const job = await bench.queue.add('steps', { ...originOf(spec), fromStep: 0, stepCount: 1 }, { jobId: 'hung.steps' });
    const { lastExit } = await successor(bench, before);
    expect(lastExit).to.deep.include({ job: job.id, signal: 'SIGKILL' });
    expect(lastExit!.error).to.include({ code: 'DEVICE_FAULT' });
    expect(lastExit!.error!.context['hung']).to.equal(true);
  });
});
