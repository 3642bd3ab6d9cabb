/**
 * Workers as processes: the supervisor keeps them alive, they serve BullMQ jobs one at a time, heed the control channel, drain
 * on SIGTERM, and lose nothing when they are killed. Real processes, real Redis, real native library.
 */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect } from 'chai';
import { FlowProducer } from 'bullmq';
import { workerQueue } from '../../config/keys.ts';
import { parseResult } from '../../config/messages.ts';
import type { Result } from '../../config/messages.ts';
import { trainTokenizer } from '../../data/tokenizer.ts';
import { PASSWORD } from '../support/redis.ts';
import { eventually, until } from '../support/wait.ts';
import { SLOW_MICROBATCH, WorkerProcesses, addSteps, failureOf, outcomeOf, stepsUnderWay } from '../support/worker-processes.ts';
import { WorkerWorld, originOf } from '../support/worker-world.ts';

const isAlive = (pid: number): boolean => {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false;
    throw error;
  }
};

describe('worker processes', function () {
  this.timeout(60_000);
  let world: WorkerWorld;
  let workers: WorkerProcesses;

  before(async () => {
    world = await WorkerWorld.start();
    workers = new WorkerProcesses(world);
  });
  afterEach(() => workers.clear());
  after(() => world.stop());

  it('say what they are, and sign off when they are stopped', async () => {
    const { supervisor, ids } = await workers.start({ count: 2 });
    const first = (await workers.record(ids[0]!))!;
    expect(first).to.include({ id: ids[0], state: 'idle', replica: null });
    expect(first.device.kind).to.equal('cpu');
    expect(first.precisions).to.deep.equal(['fp32']);
    expect(supervisor.workers().map(({ pid }) => pid)).to.include(first.processId);
    await until('a heartbeat', async () => (await workers.record(ids[0]!))!.heartbeatAtMs > first.heartbeatAtMs);
    await supervisor.stop();
    await supervisor.ended;
    expect(await world.redis.hlen(world.names.workers)).to.equal(0);
    expect(workers.exits.map(({ code, restartInMs }) => [code, restartInMs])).to.deep.equal([[0, null], [0, null]]);
  });

  it('are restarted when killed, with the same id and a new incarnation', async () => {
    const { supervisor, ids } = await workers.start();
    const before = (await workers.record(ids[0]!))!;
    process.kill(before.processId, 'SIGKILL');
    const after = await workers.successor(before);
    expect(after.id).to.equal(before.id);
    expect(supervisor.workers()).to.deep.equal([{ id: ids[0], pid: after.processId }]);
    expect(workers.exits[0]).to.include({ signal: 'SIGKILL' });
    expect(workers.exits[0]!.restartInMs).to.be.within(25, 50);
  });

  it('are given up when a restart cures nothing, and the supervisor says why', async () => {
    await world.redis.config('SET', 'maxmemory-policy', 'allkeys-lru');
    const supervisor = workers.supervise();
    const ready = await supervisor.ready.then(() => undefined, (error: unknown) => error);
    const ended = await supervisor.ended.then(() => undefined, (error: unknown) => error);
    await world.redis.config('SET', 'maxmemory-policy', 'noeviction');
    expect(ready).to.include({ code: 'REDIS_POLICY' });
    expect(ended).to.include({ code: 'REDIS_POLICY' });
    expect(supervisor.workers()).to.deep.equal([]);
  });

  it('that served once are not given up: what is refused later may be cured', async () => {
    const { ids } = await workers.start();
    const before = (await workers.record(ids[0]!))!;
    await world.redis.config('SET', 'requirepass', 'another');
    process.kill(before.processId, 'SIGKILL');
    await until('a process that is refused', () => workers.exits.some(({ error, restartInMs }) => error?.code === 'REDIS_AUTH' && restartInMs !== null));
    await world.redis.config('SET', 'requirepass', PASSWORD);
    await workers.successor(before);
  });

  it('do steps, report each of them, and show the replica', async () => {
    const { ids } = await workers.start();
    const spec = await world.newRun();
    const { queue, events } = await world.queue(workerQueue('train', ids[0]!));
    const progress: Result<'stepProgress'>[] = [];
    events.on('progress', ({ data }) => progress.push(parseResult('stepProgress', data)));
    const result = await outcomeOf('steps', await addSteps(queue, spec, 0, 5), events);
    expect(result).to.include({ worker: ids[0], fromStep: 0, stepsDone: 5, epoch: 0 });
    expect(progress.map(({ report }) => report)).to.deep.equal(result.reports);
    expect(result.reports.map(({ step }) => step)).to.deep.equal([1, 2, 3, 4, 5]);
    await until('the replica in the heartbeat', async () => (await workers.record(ids[0]!))?.replica?.step === 5);
    await world.redis.del(world.names.control(spec.name));
    await until('a free device after the run', async () => (await workers.record(ids[0]!))?.replica === null);
  });

  it('give the bits of the local way in a flow of two workers, and leave nothing behind', async () => {
    const { ids } = await workers.start({ count: 2 });
    const spec = await world.newRun();
    const flows = new FlowProducer({ connection: world.connect(), prefix: world.config.redis.prefix });
    const { events } = await world.queue('train');
    const times: number[] = [];
    for (let step = 1; step <= 4; step++) {
      const startedAt = performance.now();
      const { job } = await flows.add({
        name: 'reduce', queueName: 'train', data: { ...originOf(spec), step, shardCount: 4 }, opts: { removeOnComplete: { count: 10 } },
        children: Array.from({ length: 4 }, (_, shard) => ({
          name: 'shard', queueName: 'train', data: { ...originOf(spec), step, shard }, opts: { attempts: 3, failParentOnFailure: true, removeOnComplete: true },
        })),
      });
      await outcomeOf('reduce', job, events);
      times.push(performance.now() - startedAt);
    }
    await flows.close();
    const digests = await Promise.all([ids[0]!, ids[1]!].map(async (id) => {
      const own = await world.queue(workerQueue('train', id));
      return (await outcomeOf('digest', await own.queue.add('digest', { ...originOf(spec), step: 4 }), own.events)).digest;
    }));
    const local = await world.newRun();
    const own = await world.queue(workerQueue('train', ids[0]!));
    await outcomeOf('steps', await addSteps(own.queue, local, 0, 4), own.events);
    const reference = await outcomeOf('digest', await own.queue.add('digest', { ...originOf(local), step: 4 }), own.events);
    expect(digests).to.deep.equal([reference.digest, reference.digest]);
    expect(await world.exchange.keys(`${world.names.exchangeOf(spec.name)}shard:*`)).to.deep.equal([]);
    console.log(`      flow steps of tiny, 4 shards on 2 workers: ${times.map((time) => time.toFixed(1)).join(', ')} ms`);
  });

  it('drop jobs of an older epoch and of runs that are over', async () => {
    await workers.start();
    const spec = world.spec('fenced');
    const { queue, events } = await world.queue('train');
    const over = await queue.add('shard', { ...originOf(spec), step: 1, shard: 0 }, { attempts: 5 });
    expect((await failureOf(over, events)).code).to.equal('CANCELLED');
    await world.control(spec.name, { epoch: 2, command: 'run' });
    const stale = await queue.add('shard', { ...originOf(spec, 1), step: 1, shard: 0 }, { attempts: 5 });
    expect((await failureOf(stale, events)).code).to.equal('CANCELLED');
    expect(await world.exchange.keys(`${world.names.exchangeOf(spec.name)}*`)).to.deep.equal([]);
    await outcomeOf('shard', await queue.add('shard', { ...originOf(spec, 2), step: 1, shard: 0 }), events);
  });

  it('stop at a step boundary on yield, at once on stop, and drop on a new epoch, by the channel and without it', async () => {
    const { ids } = await workers.start();
    const spec = world.spec('controlled', { steps: 100_000, optimizer: { warmupSteps: 0 } });
    const { queue, events } = await world.queue(workerQueue('train', ids[0]!));
    let done = 0;
    for (const [command, epoch, publish] of [['yield', 0, true], ['stop', 0, true], ['yield', 0, false]] as const) {
      await world.control(spec.name, { epoch, command: 'run' });
      const job = await stepsUnderWay({ queue, events }, spec, done, 50_000);
      if (publish) await world.control(spec.name, { epoch, command });
      else await world.redis.set(world.names.control(spec.name), JSON.stringify({ epoch, command }));
      const result = await outcomeOf('steps', job, events);
      expect(result.stepsDone).to.be.within(1, 10_000);
      expect(result.reports).to.have.lengthOf(result.stepsDone);
      done += result.stepsDone;
    }
    await world.control(spec.name, { epoch: 0, command: 'run' });
    const job = await stepsUnderWay({ queue, events }, spec, done, 50_000);
    await world.control(spec.name, { epoch: 1, command: 'run' });
    expect((await failureOf(job, events)).code).to.equal('CANCELLED');
    await until('an idle worker', async () => (await workers.record(ids[0]!))?.state === 'idle');
  });

  it('finish the step at hand on SIGTERM, and another worker goes on with the same bits', async () => {
    const { supervisor, ids } = await workers.start();
    const spec = await world.newRun({ steps: 100_000 });
    const { queue, events } = await world.queue(workerQueue('train', ids[0]!));
    const job = await stepsUnderWay({ queue, events }, spec, 0, 50_000);
    const [result] = await Promise.all([outcomeOf('steps', job, events), supervisor.stop()]);
    expect(result.stepsDone).to.be.within(1, 10_000);
    expect(await workers.record(ids[0]!)).to.equal(undefined);
    expect(workers.exits.at(-1)).to.include({ code: 0 });
  });

  it('give a job of a shared queue back when they are busy, so that an idle one takes it', async () => {
    const { ids } = await workers.start({ count: 2 });
    const spec = await world.newRun({ steps: 100_000 });
    const other = await world.newRun();
    const own = await world.queue(workerQueue('train', ids[0]!));
    const long = await stepsUnderWay(own, spec, 0, 90_000);
    const shared = await world.queue('train');
    for (let shard = 0; shard < 4; shard++) {
      const result = await outcomeOf('shard', await shared.queue.add('shard', { ...originOf(other), step: 1, shard }), shared.events);
      expect(result.worker).to.equal(ids[1]);
    }
    await world.control(spec.name, { epoch: 0, command: 'yield' });
    await outcomeOf('steps', long, own.events);
  });

  it('lose nothing to SIGKILL: the job is done again, by the process that comes after', async () => {
    const { supervisor, ids } = await workers.start();
    const spec = await world.newRun({ steps: 60 });
    const { queue, events } = await world.queue(workerQueue('train', ids[0]!));
    const job = await stepsUnderWay({ queue, events }, spec, 0, 60);
    process.kill(supervisor.workers()[0]!.pid, 'SIGKILL');
    const result = await outcomeOf('steps', job, events);
    expect(result.stepsDone).to.equal(60);
    expect(workers.exits).to.have.lengthOf(1);
  });

  it('fail a job that they do not know, or cannot understand, once and for all', async () => {
    await workers.start();
    const { queue, events } = await world.queue('train');
    const unknown = await queue.add('dance', {}, { attempts: 5 });
    expect((await failureOf(unknown, events)).code).to.equal('MESSAGE_INVALID');
    const crooked = await queue.add('shard', { run: 'x' }, { attempts: 5 });
    const failure = await failureOf(crooked, events);
    expect(failure.code).to.equal('MESSAGE_INVALID');
    expect(failure.message).to.contain('epoch');
    expect((await queue.getJob(crooked.id!))!.attemptsMade).to.equal(1);
  });

  it('carry the code of an expected failure, and retry what may be retried', async () => {
    await workers.start();
    const spec = await world.newRun();
    const { queue, events } = await world.queue('train');
    const job = await queue.add('shard', { ...originOf(spec), step: 3, shard: 0 }, { attempts: 2, backoff: { type: 'fixed', delay: 10 } });
    const failure = await failureOf(job, events);
    expect(failure.code).to.equal('GRADIENT_LOST');
    expect(failure.context).to.include({ step: 1, version: 2 });
    expect((await queue.getJob(job.id!))!.attemptsMade).to.equal(2);
    const missing = { ...spec, data: { ...spec.data, train: join(world.directory, 'nothing.bin') } };
    const bad = await queue.add('shard', { ...originOf(missing), step: 1, shard: 0 }, { attempts: 5 });
    expect((await failureOf(bad, events)).code).to.equal('FILE_NOT_FOUND');
  });

  it('report a fault and exit, and come back', async () => {
    const { ids } = await workers.start();
    const spec = await world.newRun();
    const { queue, events } = await world.queue('train');
    const shard = { ...originOf(spec), step: 1, shard: 0 };
    const published = await outcomeOf('shard', await queue.add('shard', shard), events);
    await world.exchange.set(published.key, JSON.stringify({ ...published, digest: 'f'.repeat(32) }));
    await world.exchange.del(`${published.key}:0`);
    const before = (await workers.record(ids[0]!))!;
    const failure = await failureOf(await queue.add('shard', shard), events);
    expect(failure.code).to.equal('REPLICA_DIVERGED');
    const exit = await eventually('the exit', () => workers.exits[0]);
    expect(exit).to.include({ code: 75 });
    expect(exit.error!.code).to.equal('REPLICA_DIVERGED');
    await workers.successor(before);
  });

  it('die with their supervisor', async () => {
    const child = fork(fileURLToPath(new URL('../support/worker-supervisor.js', import.meta.url)));
    const heard = once(child, 'message');
    child.send({ config: world.config, count: 2 });
    const [pids] = (await heard) as [number[]];
    expect(pids).to.have.lengthOf(2);
    child.kill('SIGKILL');
    for (const pid of pids) await until(`the end of ${pid}`, () => !isAlive(pid));
  });

  it('exit when a native call hangs, having failed its job, and come back', async () => {
    const config = { ...world.config, worker: { ...world.config.worker, callTimeoutMs: 1_000 } };
    const { ids } = await workers.start({ config });
    const spec = await world.newRun(SLOW_MICROBATCH);
    const { queue, events } = await world.queue(workerQueue('train', ids[0]!));
    const failure = await failureOf(await addSteps(queue, spec, 0, 1), events);
    expect(failure).to.deep.include({ code: 'DEVICE_FAULT', context: { hung: true } });
    const exit = await eventually('the exit', () => workers.exits[0]);
    expect(exit).to.include({ signal: 'SIGKILL' });
    expect(exit.error!.code).to.equal('DEVICE_FAULT');
    await eventually('another process', () => workers.log.filter(({ type }) => type === 'ready').at(1));
  });

  it('evaluate a checkpoint and continue prompts with it, beside a replica', async () => {
    const { ids } = await workers.start();
    const text = join(world.directory, 'text.txt');
    const words = Array.from({ length: 20_000 }, (_, index) => `w${((index * 7919) % 997).toString(36)}`);
    writeFileSync(text, words.join(' '));
    const tokenizer = join(world.directory, 'tokenizer.json');
    await trainTokenizer({ inputs: [text], output: tokenizer, vocabSize: 512 });
    const { data } = world.spec('data');
    const spec = await world.newRun({ data: { ...data, tokenizer } });
    const own = await world.queue(workerQueue('train', ids[0]!));
    await outcomeOf('steps', await addSteps(own.queue, spec, 0, 3), own.events);
    const directory = join(world.directory, 'served', 'step-3');
    await outcomeOf('checkpoint', await own.queue.add('checkpoint', { ...originOf(spec), step: 3, directory }), own.events);
    const evals = await world.queue('eval');
    const message = { data: spec.data.train, sequences: 5, sequenceLength: 32 };
    const ofReplica = await outcomeOf('eval', await evals.queue.add('eval', { ...message, replica: { ...originOf(spec), step: 3 }, checkpoint: null }), evals.events);
    const ofCheckpoint = await outcomeOf('eval', await evals.queue.add('eval', { ...message, replica: null, checkpoint: directory }), evals.events);
    expect(ofCheckpoint.step).to.equal(3);
    expect(ofCheckpoint.targetTokens).to.equal(5 * 32);
    expect(ofCheckpoint.loss).to.be.closeTo(ofReplica.loss!, 1e-5);
    const generating = await world.queue('generate');
    const generate = async (more: object): Promise<Result<'generate'>> => {
      const job = await generating.queue.add('generate', { checkpoint: directory, prompts: ['w1 w2', ''], maxTokens: 12, method: 'greedy', ...more });
      return parseResult('generate', await job.waitUntilFinished(generating.events, 40_000));
    };
    const greedy = await generate({});
    expect(greedy.completions).to.have.lengthOf(2);
    for (const { tokens, text: continued } of greedy.completions) expect(tokens.length > 0 ? continued.length : 1).to.be.greaterThan(0);
    expect(Math.max(...greedy.completions.map(({ tokens }) => tokens.length))).to.be.within(1, 12);
    expect((await generate({})).completions).to.deep.equal(greedy.completions);
    expect((await generate({ ntkAlpha: 8, method: 'top-k', seed: 3 })).completions).to.have.lengthOf(2);
    // The replica is as it was.
    const more = await outcomeOf('steps', await addSteps(own.queue, spec, 3, 2), own.events);
    expect(more.stepsDone).to.equal(2);
  });

  it('wait for a Redis that was away, and serve again', async () => {
    const { ids } = await workers.start();
    const before = (await workers.record(ids[0]!))!;
    await world.killRedis();
    await world.startRedis();
    await until('a heartbeat after the outage', async () => (await workers.record(ids[0]!))!.heartbeatAtMs > before.heartbeatAtMs);
    const spec = await world.newRun();
    const { queue, events } = await world.queue('train');
    await outcomeOf('shard', await queue.add('shard', { ...originOf(spec), step: 1, shard: 0 }), events);
    expect((await workers.record(ids[0]!))!.incarnation).to.equal(before.incarnation);
  });
});
