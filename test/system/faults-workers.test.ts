/**
 * Workers that die, stand still, come and go while real runs go on: each run ends with the weights of the undisturbed one, and
 * its history shows that each (step, shard) counted once.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import { keys } from '../../config/keys.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { generator } from '../sim/faults.ts';
import { Stack, signal } from '../support/stack.ts';
import { Trace, partialCheckpoints, processorMs } from '../support/trace.ts';
import { until } from '../support/wait.ts';

/** A shard of this takes some 50 ms on one core: long enough to be seen at work. */
const SLOW: Partial<RunSpecInput> = { steps: 12, batch: { shards: 4, microBatches: 1, sequences: 32, sequenceLength: 64 }, checkpoint: { every: 3, keep: 2 } };
const SEED = Number(process.env['NN_FAULT_SEED'] ?? 4);

describe('faults: workers', function () {
  this.timeout(90_000);
  let stack: Stack;
  let trace: Trace;
  let reference: string;
  let slowReference: string;

  before(async () => {
    stack = await Stack.start();
    await stack.orchestrate();
    await stack.work(3);
    await stack.train('calm', { parallelism: 1 });
    reference = (await stack.finish('calm')).weightsDigest!;
    await stack.train('calm-slow', { ...SLOW, parallelism: 1 });
    slowReference = (await stack.finish('calm-slow')).weightsDigest!;
    trace = await Trace.open(stack.redis.queues);
  });
  afterEach(() => stack.settle());
  after(async () => {
    trace?.close();
    await stack?.stop();
  });

  /** The process of the worker that takes a job of `run` of that kind and a step from `step` on; `act` runs as soon as that is seen. */
  const taken = async (
    run: string, kind: 'steps' | 'shard' | 'reduce', step: number, act: (pid: number) => void, deadlineMs = 20_000,
  ): Promise<{ pid: number; step: number; part: number; key: string }> => {
    const pattern = new RegExp(`^HMSET (nn:train\\S*:${run}\\.\\d+\\.${kind}\\.(\\d+)\\.(\\d+)) processedOn \\d+ pb (\\S+)`);
    const [, key, at, part, worker] = await trace.seen(`a ${kind} job of ${run}`, pattern, deadlineMs, ([, , found, , id]) => {
      const pid = stack.workers.get(id!);
      if (Number(found) < step || pid === undefined) return false;
      act(pid);
      return true;
    });
    return { pid: stack.workers.get(worker!)!, step: Number(at), part: Number(part), key: key! };
  };
  const kill = (pid: number): void => signal(pid, 'SIGKILL');

  for (const [way, parallelism, kind] of [['local', 1, 'steps'], ['flow', 3, 'shard'], ['flow', 3, 'reduce']] as const) {
    it(`SIGKILL as soon as it took a ${kind} job (${way})`, async () => {
      const name = `taken-${kind}`;
      const seen = taken(name, kind, kind === 'steps' ? 0 : 3, kill);
      await stack.train(name, { parallelism });
      await seen;
      const { record } = await stack.prove(name, reference);
      expect(record.faults.map(({ error }) => error.code)).to.include('WORKER_LOST');
    });
  }

  for (const [way, parallelism, kind] of [['local', 1, 'steps'], ['flow', 3, 'shard']] as const) {
    it(`SIGKILL while it computes (${way})`, async () => {
      const name = `computing-${way}`;
      let before = 0;
      const look = (from: number): ReturnType<typeof taken> => taken(name, kind, from, (pid) => (before = processorMs(pid)!));
      let seen = look(kind === 'steps' ? 0 : 2);
      await stack.train(name, { ...SLOW, parallelism });
      for (;;) {
        const { pid, step, part } = await seen;
        await until('the worker computes', () => (processorMs(pid) ?? Infinity) >= before + 20, 10_000, 1);
        signal(pid, 'SIGSTOP');
        // This process may have slept while the shard was finished: then a later one will do.
        const caught = kind === 'steps' || (await stack.redis.exchange.call('GET', keys('nn').shardGradient(name, step, part))) === null;
        if (!caught) seen = look(step + 1);
        signal(pid, caught ? 'SIGKILL' : 'SIGCONT');
        if (caught) break;
      }
      await stack.prove(name, slowReference);
    });
  }

  it('SIGKILL after it published a gradient, before anybody heard of it', async () => {
    const name = 'published';
    const { queues, exchange } = stack.redis;
    const admin = queues.connect();
    await admin.ping();
    try {
      await stack.train(name, { ...SLOW, parallelism: 3 });
      for (let [from, caught] = [2, false]; !caught; ) {
        // It may look at the control and publish, but not tell: a job's result is a write.
        const { pid, step, part } = await taken(name, 'shard', from, () => void admin.call('CLIENT', 'PAUSE', '8000', 'WRITE'));
        const worker = [...stack.workers].find(([, each]) => each === pid)?.[0];
        const key = keys('nn').shardGradient(name, step, part);
        await until('the gradient', async () => (await exchange.call('GET', key)) !== null, 5_000).catch(() => undefined);
        const text = (await exchange.call('GET', key)) as string | null;
        caught = text !== null && (JSON.parse(text) as { worker: string }).worker === worker;
        if (caught) kill(pid);
        await admin.call('CLIENT', 'UNPAUSE');
        from = step + 1;
        if (!caught) expect(from, 'caught in no step').to.be.below(12);
      }
    } finally {
      admin.disconnect();
    }
    const { verdict } = await stack.prove(name, slowReference);
    expect(verdict.flowSteps).to.equal(12);
  });

  it('SIGKILL of every worker that computes a certain step: the run fails with the evidence, others are served, a retry ends as undisturbed', async () => {
    const name = 'fatal';
    const run = await stack.train(name, { ...SLOW, parallelism: 1 });
    const fate = { over: false };
    const ended = run.ended().finally(() => (fate.over = true));
    // A process that comes back may be given its dead predecessor's job once more, of an epoch that is over: that one is spared.
    for (let newest = -1; !fate.over; ) {
      let before = 0;
      const next = taken(name, 'steps', 3, (pid) => (before = processorMs(pid)!)).catch((error: Error) => (fate.over ? null : Promise.reject(error)));
      const found = await Promise.race([next, ended.then(() => null)]);
      const epoch = found === null ? -1 : Number(/\.(\d+)\.steps\./.exec(found.key)![1]);
      if (found === null || epoch <= newest) continue;
      newest = epoch;
      await until('the worker computes', () => fate.over || (processorMs(found.pid) ?? Infinity) >= before + 20, 10_000, 1);
      if (!fate.over) kill(found.pid);
    }
    const { phase, step, error } = await ended;
    expect({ phase, step }).to.deep.equal({ phase: 'failed', step: 3 });
    expect(error).to.deep.include({ code: 'JOB_FATAL' });
    expect(error!.message).to.match(/^step 4 ended its worker 3 times \(\S+ by SIGKILL, \S+ by SIGKILL, \S+ by SIGKILL\)/);
    await stack.train('after-fatal', { parallelism: 2 });
    await stack.prove('after-fatal', reference);
    await run.retry();
    await stack.prove(name, slowReference);
  });

  for (const parallelism of [1, 3]) {
    it(`SIGKILL while it writes a checkpoint (parallelism ${parallelism})`, async () => {
      const name = `checkpoint-${parallelism}`;
      const directory = join(stack.runDirectory(name), 'checkpoints');
      await stack.train(name, { parallelism });
      await until('a worker caught at it', () => {
        for (const { pid, name: partial } of partialCheckpoints(directory)) {
          signal(pid, 'SIGSTOP');
          const caught = existsSync(join(directory, partial));
          signal(pid, caught ? 'SIGKILL' : 'SIGCONT');
          if (caught) return true;
        }
        return false;
      }, 20_000, 1);
      await stack.prove(name, reference);
      expect(partialCheckpoints(directory), 'what was left of it').to.deep.equal([]);
    });
  }

  for (const [way, parallelism] of [['local', 1], ['flow', 3]] as const) {
    it(`SIGSTOP past its lock and its death, then SIGCONT (${way}): its late reports change nothing`, async () => {
      const name = `stopped-${way}`;
      const seen = taken(name, way === 'local' ? 'steps' : 'shard', way === 'local' ? 0 : 2, () => undefined);
      await stack.train(name, { ...SLOW, parallelism });
      const { pid, key } = await seen;
      signal(pid, 'SIGSTOP');
      const stoppedAt = stack.counted(name);
      try {
        await until('the others go on', () => stack.counted(name) >= stoppedAt + 3, 30_000);
        await until('its lock is over', async () => (await stack.redis.queues.call('EXISTS', `${key}:lock`)) === 0, 10_000);
      } finally {
        signal(pid, 'SIGCONT');
      }
      const { record } = await stack.prove(name, slowReference);
      expect(record.faults.map(({ error }) => error.code)).to.include('WORKER_LOST');
    });
  }

  it(`workers join and leave at random, drained and killed, through a whole run (NN_FAULT_SEED=${SEED})`, async () => {
    const random = generator(SEED);
    const name = 'elastic';
    const steps = 50;
    await stack.train(`calm-${name}`, { parallelism: 1, steps });
    const { weightsDigest } = await stack.finish(`calm-${name}`);
    await stack.train(name, { parallelism: 4, steps, evaluation: { every: 0, sequences: 8 } });
    let changes = 0;
    for (let at = 3; at < steps - 5; at += 2 + Math.floor(random() * 5)) {
      await stack.reached(name, at);
      const choice = random();
      const victims = [...stack.workers];
      const [, pid] = victims[Math.floor(random() * victims.length)] ?? [];
      const joined = stack.supervisors.slice(1).filter((supervisor) => supervisor.workers().length > 0);
      if (choice < 0.35 && pid !== undefined) kill(pid);
      else if (choice < 0.65 && joined.length > 0) void joined[Math.floor(random() * joined.length)]!.stop();
      else if (victims.length < 5) void stack.work(1);
      changes++;
    }
    expect(changes).to.be.above(5);
    await stack.prove(name, weightsDigest!);
  });
});
