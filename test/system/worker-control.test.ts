/**
 * How soon a worker does what its run is told, whatever it is at; that a long native call costs it neither its lock nor its
 * heartbeat nor the exchange; and that a process which was stopped and goes on changes nothing any more. Real processes.
 */
import { once } from 'node:events';
import { expect } from 'chai';
import type { Job, Queue, QueueEvents } from 'bullmq';
import { decodeFailure } from '../../config/errors.ts';
import { workerQueue } from '../../config/keys.ts';
import type { Control } from '../../config/keys.ts';
import { parseResult } from '../../config/messages.ts';
import type { WorkerRecord } from '../../config/messages.ts';
import type { RunSpec } from '../../config/run-spec.ts';
import { startSupervisor } from '../../workers/main.ts';
import type { Supervisor, SupervisorEvent } from '../../workers/main.ts';
import { World, eventually, originOf } from './worker-helpers.ts';

/** What is promised is a second; machines that run tests are slow. */
const SOON_MS = 2_000;

describe('a worker under control', function () {
  this.timeout(60_000);
  let world: World;
  let supervisors: Supervisor[] = [];
  let exits: Extract<SupervisorEvent, { type: 'exited' }>[] = [];
  let runs = 0;

  interface Bench {
    readonly id: string;
    readonly pid: number;
    readonly supervisor: Supervisor;
    readonly queue: Queue;
    readonly events: QueueEvents;
  }

  const start = async (worker: Record<string, number> = {}, queue: Record<string, number> = {}): Promise<Bench> => {
    const config = { ...world.config, worker: { ...world.config.worker, ...worker }, queue: { ...world.config.queue, ...queue } };
    const supervisor = startSupervisor({ config, device: { library: 'cpu', indices: 'cpu' }, count: 1, idPrefix: `k${runs++}`, onEvent: (event) => event.type === 'exited' && exits.push(event) });
    supervisors.push(supervisor);
    await supervisor.ready;
    const { id, pid } = supervisor.workers()[0]!;
    return { id, pid, supervisor, ...(await world.queue(workerQueue('train', id))) };
  };
  const newSpec = async (more: Partial<RunSpec> = {}): Promise<RunSpec> => {
    const spec = { ...world.spec(`run-${runs++}`, { steps: 100_000 }), ...more };
    await world.control(spec.name, { epoch: 0, command: 'run' });
    return spec;
  };
  const codeOf = async (job: Job, events: QueueEvents): Promise<string> => {
    const error: unknown = await job.waitUntilFinished(events, 40_000).then(() => undefined, (reason: unknown) => reason);
    expect(error, 'the job did not fail').to.be.instanceOf(Error);
    return decodeFailure((error as Error).message).code;
  };
  /** Without a message the worker must see it by itself. */
  const tell = async (spec: RunSpec, control: Control | null, published: boolean): Promise<void> => {
    if (control === null) await world.redis.del(world.names.control(spec.name));
    else await world.redis.set(world.names.control(spec.name), JSON.stringify(control));
    if (published) await world.redis.publish(world.names.controlChannel, spec.name);
  };
  const busy = ({ id }: Bench): Promise<true> =>
    eventually('a busy worker', async () => ((JSON.parse((await world.redis.hget(world.names.workers, id))!) as WorkerRecord).state === 'busy' ? true : undefined));
  /** Until `job` is active and the exchange has been silent to it, for long enough that it must be waiting there. */
  const waiting = async (bench: Bench, job: Job): Promise<void> => {
    await eventually('an active job', async () => ((await job.isActive()) ? true : undefined));
    await eventually('a command that the exchange holds back', async () => (/blocked_clients:[1-9]/.test(await world.exchange.info('clients')) ? true : undefined));
    await busy(bench);
  };

  before(async () => {
    world = await World.start({ worker: { controlPollMs: 1_000 } });
    world.tokenFile('long.bin', 600_000);
  });
  afterEach(async () => {
    await world.exchange.call('CLIENT', 'UNPAUSE');
    await Promise.all(supervisors.map((supervisor) => supervisor.stop()));
    supervisors = [];
    exits = [];
    await world.clear();
  });
  after(() => world.stop());

  const CASES: Record<string, { readonly begin: (bench: Bench, spec: RunSpec) => Promise<Job>; readonly stopped: 'CANCELLED' | 'completed' }> = {
    'steps': {
      begin: async ({ queue, events }, spec) => {
        const progressed = once(events, 'progress');
        const job = await queue.add('steps', { ...originOf(spec), fromStep: 0, stepCount: 90_000 });
        await progressed;
        return job;
      },
      stopped: 'completed',
    },
    'the way to a version, with an exchange that takes nothing': {
      begin: async (bench, spec) => {
        // What is no sum is withdrawn first, and that is where the worker waits.
        await world.exchange.set(world.names.reducedGradient(spec.name, 1), 'no sum');
        await world.exchange.call('CLIENT', 'PAUSE', '60000', 'WRITE');
        const job = await bench.queue.add('steps', { ...originOf(spec), fromStep: 1, stepCount: 2 });
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
        const data = spec.data.train.replace('tokens.bin', 'long.bin');
        return queue.add('eval', { replica: { ...originOf(spec), step: 0 }, checkpoint: null, data, sequences: 18_000, sequenceLength: 32 });
      },
      stopped: 'CANCELLED',
    },
  };
  for (const [what, { begin, stopped }] of Object.entries(CASES)) {
    it(`pauses and is cancelled soon in ${what}, with and without the message`, async () => {
      const bench = await start();
      const times: string[] = [];
      for (const published of [true, false]) {
        for (const control of [{ epoch: 0, command: 'stop' } as const, { epoch: 1, command: 'run' } as const, null]) {
          const spec = await newSpec();
          const job = await begin(bench, spec);
          await eventually('an active job', async () => ((await job.isActive()) ? true : undefined));
          await busy(bench);
          const toldAt = performance.now();
          await tell(spec, control, published);
          await eventually('the end of the job', async () => ((await job.isActive()) ? undefined : true));
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
    const bench = await start({ heartbeatMs: 100 }, { lockDurationMs });
    // Two microbatches of several seconds each on one core.
    const spec = await newSpec({ batch: { shards: 1, microBatches: 2, sequences: 96, sequenceLength: 1024 }, recompute: 'layer' });
    await bench.queue.add('digest', { ...originOf(spec), step: 0 });
    const job = await bench.queue.add('shard', { ...originOf(spec), step: 1, shard: 0 });
    await eventually('an active job', async () => ((await job.isActive()) ? true : undefined));
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
    const bench = await start({ drainMs: 1_000 });
    const spec = await newSpec();
    const job = await bench.queue.add('shard', { ...originOf(spec), step: 1, shard: 0 });
    await job.waitUntilFinished(bench.events, 40_000);
    await world.exchange.call('CLIENT', 'PAUSE', '60000', 'WRITE');
    await tell(spec, null, true);
    await eventually('a removal that the exchange holds back', async () => (/blocked_clients:[1-9]/.test(await world.exchange.info('clients')) ? true : undefined));
    const heartbeatAtMs = async (): Promise<number> => (JSON.parse((await world.redis.hget(world.names.workers, bench.id))!) as WorkerRecord).heartbeatAtMs;
    const heldAtMs = await heartbeatAtMs();
    await eventually('heartbeats', async () => ((await heartbeatAtMs()) - heldAtMs > 5 * world.config.worker.heartbeatMs ? true : undefined));
    expect(await world.exchange.info('clients'), 'it is still held back').to.match(/blocked_clients:[1-9]/);
    await bench.supervisor.stop();
    expect(exits.map(({ code }) => code)).to.deep.equal([0]);
  });

  it('publishes nothing after it was stopped for so long that its job went to another epoch', async () => {
    const bench = await start({ controlPollMs: 60_000 });
    const spec = await newSpec();
    await world.exchange.call('CLIENT', 'PAUSE', '60000', 'WRITE');
    const job = await bench.queue.add('shard', { ...originOf(spec), step: 1, shard: 0 }, { attempts: 1 });
    await waiting(bench, job);
    process.kill(bench.pid, 'SIGSTOP');
    try {
      await tell(spec, { epoch: 1, command: 'run' }, false);
      await world.exchange.call('CLIENT', 'UNPAUSE');
    } finally {
      process.kill(bench.pid, 'SIGCONT');
    }
    expect(await codeOf(job, bench.events)).to.equal('CANCELLED');
    expect(await world.exchange.exists(world.names.shardGradient(spec.name, 1, 0))).to.equal(0);
    const again = await bench.queue.add('shard', { ...originOf(spec, 1), step: 1, shard: 0 });
    expect(parseResult('shard', await again.waitUntilFinished(bench.events, 40_000)).epoch).to.equal(1);
  });
});
