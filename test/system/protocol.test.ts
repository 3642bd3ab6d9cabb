/**
 * Versions of this program that speak different protocols on one Redis: nobody takes what he would misunderstand, whoever waits
 * says why, and a run that was driven by another version goes on from its checkpoint with the same bits.
 */
import { expect } from 'chai';
import { Queue } from 'bullmq';
import { PROTOCOL } from '../../config/messages.ts';
import type { RunRecord, WorkerRecord } from '../../config/messages.ts';
import { keys } from '../../config/keys.ts';
import { openRedis } from '../../config/redis.ts';
import type { Redis } from '../../config/redis.ts';
import { startCluster } from '../support/cluster.ts';
import type { Cluster } from '../support/cluster.ts';
import { tinySpec } from '../support/tiny-runs.ts';
import { eventually } from '../support/wait.ts';

describe('versions of different protocols', function () {
  this.timeout(90_000);
  let cluster: Cluster;
  let redis: Redis;
  let stranger: NodeJS.Timeout;
  let names: ReturnType<typeof keys>;

  before(async () => {
    cluster = await startCluster({ workers: 0, settings: { queue: { stalledIntervalMs: 500 }, orchestrator: { jobTimeoutMs: 1_000, requestTimeoutMs: 1_500, watchMs: 50 } } });
    redis = openRedis(cluster.redis.url, cluster.config, 'blocking');
    names = keys(cluster.config.redis.prefix);
    // The heartbeats of a worker of a later version.
    const record: Omit<WorkerRecord, 'heartbeatAtMs'> = {
      id: 'later', incarnation: '1', protocol: PROTOCOL + 1, host: 'elsewhere', processId: 1, device: { kind: 'cpu', name: 'later', index: 0, memoryBytes: 0 },
      precisions: ['fp32'], state: 'idle', replica: null, startedAtMs: 0, lastExit: null,
    };
    stranger = setInterval(() => void redis.hset(names.workers, 'later', JSON.stringify({ ...record, heartbeatAtMs: Date.now() })), 100);
  });
  after(async () => {
    clearInterval(stranger);
    redis?.disconnect();
    await cluster?.stop();
  });

  it('a run waits for a worker of its own, and says why; then the right one does it', async () => {
    const run = await cluster.client.train(tinySpec(cluster, 'waits', { parallelism: 1 }));
    const waiting = await eventually('the fault that says why', async () => {
      const record: RunRecord = await run.record();
      return record.faults.some(({ error }) => error.code === 'NO_WORKER') ? record : undefined;
    });
    expect(waiting.way!.reason).to.include(`speaks protocol ${PROTOCOL + 1}, this orchestrator ${PROTOCOL}; upgrade what is older`);
    expect(waiting.faults.at(-1)!.error.message).to.include(`protocol ${PROTOCOL + 1}`);
    const failure = await cluster.client.eval({ checkpoint: '/nowhere', data: '/nowhere' }).then(() => null, (error: Error) => error);
    expect(failure).to.have.property('code', 'NO_WORKER');
    expect(failure!.message).to.include('speak another protocol');
    await cluster.join(1);
    expect((await run.wait()).step).to.equal(24);
  });

  it('a worker leaves a job of another protocol alone, and goes on with those it understands', async () => {
    const queue = new Queue('eval', { connection: redis, prefix: cluster.config.redis.prefix });
    const foreign = await queue.add('eval', { protocol: PROTOCOL + 1, something: 'it cannot know' }, { jobId: 'foreign.1.eval.0.0', attempts: 1 });
    await eventually('the worker’s word', () => cluster.events.find((event) => event.type === 'log' && event.message.includes(`is of protocol ${PROTOCOL + 1}`)));
    const { checkpoint } = await cluster.client.run('waits').record();
    // Asked for twice, so that at least one comes after the worker has left the queue alone.
    for (const sequences of [2, 4]) {
      const done = await cluster.client.eval({ checkpoint: checkpoint!.directory, data: `${cluster.directory}/validation.tokens`, sequences, sequenceLength: 32, timeoutMs: 20_000 });
      expect(done.targetTokens).to.be.above(0);
    }
    expect(await foreign.getState()).to.be.oneOf(['waiting', 'delayed', 'active']);
    expect((await queue.getJob(foreign.id!))!.attemptsMade).to.equal(0);
    await foreign.remove().catch(() => undefined);
    await queue.close();
  });

  it('a run that another version drove goes on from its checkpoint, to the same bits', async () => {
    const reference = await cluster.client.run('waits').record();
    await cluster.join(1);
    const run = await cluster.client.train(tinySpec(cluster, 'taken', { parallelism: 2 }));
    for await (const event of run.events()) if (event.type === 'step' && event.report.step === 11) break;
    await cluster.stopOrchestrator();
    const before = await run.record();
    await redis.hset(names.run('taken'), 'protocol', PROTOCOL + 1);
    await cluster.startOrchestrator();
    const record = await run.wait();
    expect(record.weightsDigest).to.equal(reference.weightsDigest);
    expect(record.epoch).to.be.above(before.epoch);
    expect(await redis.hget(names.run('taken'), 'protocol')).to.equal(String(PROTOCOL));
  });
});
