/**
 * How soon a worker does what its run is told, whatever it is at; that a long native call costs it neither its lock nor its
 * heartbeat nor the exchange; and that a process which was stopped and goes on changes nothing any more. Real processes.
 */
import { join } from 'node:path';
import { expect } from 'chai';
import type { Job } from 'bullmq';
import { workerQueue } from '../../config/keys.ts';
import { parseResult } from '../../config/messages.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import { writeTokens } from '../support/tiny-runs.ts';
import { until } from '../support/wait.ts';
import { WorkerProcesses, addSteps, failureOf, outcomeOf, stepsUnderWay } from '../support/worker-processes.ts';
import type { WorkerBench } from '../support/worker-processes.ts';
import { WorkerWorld, originOf } from '../support/worker-world.ts';

/** What is promised is a second; machines that run tests are slow. */
const SOON_MS = 2_000;

describe('a worker under control', function () {
  this.timeout(60_000);
  let world: WorkerWorld;
  let workers: WorkerProcesses;
  let longData: string;

  const newRun = (more: Partial<RunSpecInput> = {}): Promise<RunSpec> => world.newRun({ steps: 100_000, ...more });
  const busy = ({ id }: WorkerBench): Promise<void> => until('a busy worker', async () => (await workers.record(id))!.state === 'busy');
  /** Until `job` is active and the exchange has been silent to it, for long enough that it must be waiting there. */
  const waiting = async (bench: WorkerBench, job: Job): Promise<void> => {
    await until('an active job', () => job.isActive());
    await until('a command that the exchange holds back', async () => /blocked_clients:[1-9]/.test(await world.exchange.info('clients')));
    await busy(bench);
  };

  before(async () => {
    world = await WorkerWorld.start({ worker: { controlPollMs: 1_000 } });
    workers = new WorkerProcesses(world);
    longData = join(world.directory, 'long.tokens');
    writeTokens(longData, 600_000, 3);
  });
  afterEach(async () => {
    await world.exchange.call('CLIENT', 'UNPAUSE');
    await workers.clear();
  });
  after(() => world.stop());

  const CASES: Record<string, { readonly begin: (bench: WorkerBench, spec: RunSpec) => Promise<Job>; readonly stopped: 'CANCELLED' | 'completed' }> = {
    'steps': {
      begin: (bench, spec) => stepsUnderWay(bench, spec, 0, 90_000),
      stopped: 'completed',
    },
    'the way to a version, with an exchange that takes nothing': {
      begin: async (bench, spec) => {
        // What is no sum is withdrawn first, and that is where the worker waits.
        await world.exchange.set(world.names.reducedGradient(spec.name, 1), 'no sum');
        await world.exchange.call('CLIENT', 'PAUSE', '60000', 'WRITE');
        const job = await addSteps(bench.queue, spec, 1, 2);
        await waiting(bench, job);
        return job;
      },
      stopped: 'completed',
    },
    'an upload, with an exchange that takes nothing': {
      begin: async (bench, spec) => {
        await world.exchange.call('CLIENT', 'PAUSE', '60000', 'WRITE');
        const job = await bench.queue.add('shard', { ...originOf(spec), step: 1, shard: 0 });
        await waiting(bench, job);
        return job;
      },
      stopped: 'CANCELLED',
    },
    'an eval': {
      begin: async ({ id }, spec) => {
        const { queue } = await world.queue(workerQueue('eval', id));
        return queue.add('eval', { replica: { ...originOf(spec), step: 0 }, checkpoint: null, data: longData, sequences: 18_000, sequenceLength: 32 });
      },
      stopped: 'CANCELLED',
    },
  };
  for (const [what, { begin, stopped }] of Object.entries(CASES)) {
    it(`pauses and is cancelled soon in ${what}, with and without the message`, async () => {
      const bench = await workers.bench();
      const times: string[] = [];
      for (const published of [true, false]) {
        for (const control of [{ epoch: 0, command: 'stop' } as const, { epoch: 1, command: 'run' } as const, null]) {
          const spec = await newRun();
          const job = await begin(bench, spec);
          await until('an active job', () => job.isActive());
          await busy(bench);
          const toldAt = performance.now();
          await world.control(spec.name, control, published);
          await until('the end of the job', async () => !(await job.isActive()));
          const tookMs = performance.now() - toldAt;
          times.push(tookMs.toFixed(0));
          expect(tookMs, `${JSON.stringify(control)} ${published ? 'published' : 'not published'}`).to.be.lessThan(published ? SOON_MS : SOON_MS + world.config.worker.controlPollMs);
          const expected = control?.command === 'stop' && stopped === 'completed' ? 'completed' : 'failed';
          expect(await job.getState()).to.equal(expected);
          // An answer that is held back still holds the connection back.
          await world.exchange.call('CLIENT', 'UNPAUSE');
        }
      }
      console.log(`      ms: ${times.join(', ')}`);
    });
  }

  it('keeps its lock, its heartbeat and the exchange through native calls many times longer than the lock', async () => {
    const lockDurationMs = 1_000;
    const bench = await workers.bench({ worker: { heartbeatMs: 100 }, queue: { lockDurationMs } });
    // Two microbatches of several seconds each on one core.
    const spec = await newRun({ batch: { shards: 1, microBatches: 2, sequences: 96, sequenceLength: 1024 }, recompute: 'layer' });
    await bench.queue.add('digest', { ...originOf(spec), step: 0 });
    const job = await bench.queue.add('shard', { ...originOf(spec), step: 1, shard: 0 });
    await until('an active job', () => job.isActive());
    let heartbeat = '';
    let changedAt = performance.now();
    let longestMs = 0;
    const finished = job.waitUntilFinished(bench.events, 50_000);
    const finish = { over: false };
    void finished.finally(() => (finish.over = true)).catch(() => undefined);
    const startedAt = performance.now();
    let cut = false;
    while (!finish.over) {
      const text = (await world.redis.hget(world.names.workers, bench.id))!;
      if (text !== heartbeat) changedAt = performance.now();
      heartbeat = text;
      longestMs = Math.max(longestMs, performance.now() - changedAt);
      // The exchange closes every connection in the middle of the first call: nobody hears it then.
      if (!cut && performance.now() - startedAt > lockDurationMs) {
        await world.exchange.call('CLIENT', 'KILL', 'TYPE', 'normal', 'SKIPME', 'yes');
        cut = true;
      }
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    const result = parseResult('shard', await finished);
    console.log(`      calls of ${(result.timings.computeMs / 2000).toFixed(1)} s, lock of ${lockDurationMs / 1000} s; longest silence ${longestMs.toFixed(0)} ms`);
    expect(result.timings.computeMs / 2, 'the calls were long').to.be.greaterThan(2 * lockDurationMs);
    expect((await bench.queue.getJob(job.id!))!.attemptsStarted, 'the lock was never lost').to.equal(1);
    expect(longestMs).to.be.lessThan(world.config.worker.deadAfterMs);
    expect(await world.exchange.exists(result.key)).to.equal(1);
  });

  it('says that it lives, and ends when it is asked to, while what is left of a run cannot be cleared away', async () => {
    const bench = await workers.bench({ worker: { drainMs: 1_000 } });
    const spec = await newRun();
    const job = await bench.queue.add('shard', { ...originOf(spec), step: 1, shard: 0 });
    await outcomeOf('shard', job, bench.events);
    await world.exchange.call('CLIENT', 'PAUSE', '60000', 'WRITE');
    await world.control(spec.name, null);
    await until('a removal that the exchange holds back', async () => /blocked_clients:[1-9]/.test(await world.exchange.info('clients')));
    const heartbeatAtMs = async (): Promise<number> => (await workers.record(bench.id))!.heartbeatAtMs;
    const heldAtMs = await heartbeatAtMs();
    await until('heartbeats', async () => (await heartbeatAtMs()) - heldAtMs > 5 * world.config.worker.heartbeatMs);
    expect(await world.exchange.info('clients'), 'it is still held back').to.match(/blocked_clients:[1-9]/);
    await bench.supervisor.stop();
    expect(workers.exits.map(({ code }) => code)).to.deep.equal([0]);
  });

  it('publishes nothing after it was stopped for so long that its job went to another epoch', async () => {
    const bench = await workers.bench({ worker: { controlPollMs: 60_000 } });
    const spec = await newRun();
    await world.exchange.call('CLIENT', 'PAUSE', '60000', 'WRITE');
    const job = await bench.queue.add('shard', { ...originOf(spec), step: 1, shard: 0 }, { attempts: 1 });
    await waiting(bench, job);
    process.kill(bench.pid, 'SIGSTOP');
    try {
      await world.control(spec.name, { epoch: 1, command: 'run' }, false);
      await world.exchange.call('CLIENT', 'UNPAUSE');
    } finally {
      process.kill(bench.pid, 'SIGCONT');
    }
    expect((await failureOf(job, bench.events)).code).to.equal('CANCELLED');
    expect(await world.exchange.exists(world.names.shardGradient(spec.name, 1, 0))).to.equal(0);
    const again = await bench.queue.add('shard', { ...originOf(spec, 1), step: 1, shard: 0 });
    expect((await outcomeOf('shard', again, bench.events)).epoch).to.equal(1);
  });
});
