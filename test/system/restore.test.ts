/**
 * Redis loses runs, all of them or their last second, under a living orchestrator and living workers, or under new ones:
 * they are rebuilt from their directories and end with the bits of an undisturbed run; nothing counts twice.
 */
import { copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import { keys } from '../../config/keys.ts';
import type { RunRecord } from '../../config/messages.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import type { Run } from '../../orchestrator/client.ts';
import type { StepLine } from '../../orchestrator/metrics.ts';
import { rebuild } from '../../orchestrator/restore.ts';
import { readRecordFile } from '../../orchestrator/run-directory.ts';
import { FakeCluster } from '../support/fake-cluster.ts';
import { expectedReport, stateAt } from '../support/fake-worker.ts';
import { checkRun, readLines } from '../support/history.ts';
import { until } from '../support/wait.ts';

describe('orchestrator: what Redis lost', function () {
  this.timeout(120_000);
  let cluster: FakeCluster;
  beforeEach(async () => {
    cluster = await FakeCluster.start();
  });
  afterEach(() => cluster.stop());

  const directoryOf = (name: string): string => join(cluster.config.runs, name);
  const stepReached = (run: Run, step: number): Promise<void> => until(`step ${step}`, async () => (await run.record()).step >= step, 40_000);

  const expectUndisturbed = (name: string, record: RunRecord, changes: Partial<RunSpecInput>): void => {
    const spec = cluster.checked(name, changes);
    const state = stateAt(spec.seed, spec.steps);
    expect(record).to.include({ phase: 'completed', step: spec.steps, error: null, weightsDigest: state + state });
    expect(checkRun(directoryOf(name), state + state).violations).to.deep.equal([]);
    expect(readLines<StepLine>(join(directoryOf(name), 'metrics.jsonl')).map(({ step, loss }) => ({ step, loss }))).to.deep.equal(
      Array.from({ length: spec.steps }, (_, index) => ({ step: index + 1, loss: expectedReport(spec, index + 1).loss })),
    );
  };

  /**
   * That Redis lost something is told once. The worker goes on with the job at hand until it hears that nobody believes in it any more: then it
   * may be past the step that it is asked to begin at, and what it would need to come back there was never published.
   */
  const expectLostOnce = ({ faultCounts: { REDIS_LOST: lost, GRADIENT_LOST: beyond = 0, ...others } }: RunRecord): void => {
    expect(lost).to.equal(1);
    expect(beyond).to.be.at.most(1);
    expect(others).to.deep.equal({});
  };

  /** An empty Redis in place of the one there was. */
  const replaceRedis = async (): Promise<void> => {
    await cluster.redis.kill();
    cluster.redis.queues.empty();
    await cluster.redis.start();
    await until('an empty Redis', async () => (await cluster.client.runs()).length === 0);
  };

  for (const [what, workers] of [['local', 1], ['flow', 2]] as const) {
    it(`an empty Redis: restore, and the run goes on, with the processes that there were (${what})`, async () => {
      await cluster.orchestrate();
      const fakes = await Promise.all(['w1', 'w2'].slice(0, workers).map((id) => cluster.work(id, { shardMs: 6 })));
      const changes = { steps: 60, parallelism: workers };
      const run = await cluster.client.train(cluster.spec('lost', changes));
      await stepReached(run, 25);
      const { epoch } = await run.record();
      await replaceRedis();
      const [restored] = await cluster.client.restore();
      expect(restored).to.include({ run: 'lost', outcome: 'queued', phase: 'queued', steps: 60 });
      expect(restored!.checkpoint).to.be.within(20, restored!.step);
      const record = await run.wait();
      expectUndisturbed('lost', record, changes);
      expect(record.epoch).to.be.above(epoch);
      expect(record.attempts).to.have.length(1);
      const now = await cluster.client.workers();
      expect(now.map(({ incarnation }) => incarnation).sort()).to.deep.equal(fakes.map(({ incarnation }) => incarnation).sort());
    });
  }

  it('restores a paused run as paused, a finished one with its record, and leaves what Redis has', async () => {
    await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 2 });
    const done = await cluster.client.train(cluster.spec('done'));
    const before = await done.wait();
    const paused = await cluster.client.train(cluster.spec('paused', { steps: 400 }));
    await stepReached(paused, 3);
    await paused.pause();
    await until('paused', async () => (await paused.record()).phase === 'paused');
    await replaceRedis();
    const restored = await cluster.client.restore();
    expect(restored.map(({ run, outcome, phase }) => [run, outcome, phase])).to.deep.equal([['done', 'restored', 'completed'], ['paused', 'queued', 'paused']]);
    expect(await done.record()).to.deep.equal(before);
    expect((await cluster.client.restore(['done', 'paused'])).map(({ outcome }) => outcome)).to.deep.equal(['kept', 'kept']);
    expect((await paused.record()).phase).to.equal('paused');
    await paused.resume();
    const { step } = await paused.record();
    await stepReached(paused, step + 3);
    await paused.cancel();
    await paused.ended();
  });

  it('refuses what it cannot read, by name, and restores the rest', async () => {
    await cluster.orchestrate();
    await cluster.work('w1');
    await (await cluster.client.train(cluster.spec('good'))).wait();
    for (const name of ['damaged', 'renamed']) {
      mkdirSync(directoryOf(name));
      copyFileSync(join(directoryOf('good'), 'spec.json'), join(directoryOf(name), 'spec.json'));
    }
    writeFileSync(join(directoryOf('damaged'), 'spec.json'), '{"name":');
    await replaceRedis();
    const restored = await cluster.client.restore(['damaged', 'good', 'nobody', 'renamed']);
    expect(restored.map(({ outcome, error }) => [outcome, error?.code])).to.deep.equal([['refused', 'SPEC_INVALID'], ['restored', undefined], ['refused', 'RUN_NOT_FOUND'], ['refused', 'RUN_STATE']]);
    // Who was there is back, too: BullMQ cannot close a worker whose connection is just waiting to be opened anew.
    await (await cluster.client.train(cluster.spec('next'))).wait();
  });

  it('goes on from metrics and checkpoints alone, and without metrics from the checkpoints', async () => {
    const orchestrator = await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 3 });
    const changes = { steps: 50 };
    const run = await cluster.client.train(cluster.spec('bare', changes));
    await stepReached(run, 25);
    await orchestrator.stop();
    cluster.orchestrators.length = 0;
    await replaceRedis();
    const counted = readLines<StepLine>(join(directoryOf('bare'), 'metrics.jsonl'));
    const told = readRecordFile(directoryOf('bare'))!;
    expect(rebuild(directoryOf('bare')).record).to.deep.include({ phase: 'queued', step: counted.length });
    rmSync(join(directoryOf('bare'), 'record.json'));
    const { record } = rebuild(directoryOf('bare'));
    expect(record).to.include({ phase: 'queued', step: counted.length });
    expect(record.epoch).to.be.above(told.epoch);
    await cluster.client.restore(['bare']);
    await cluster.orchestrate();
    expectUndisturbed('bare', await run.wait(), changes);
  });

  it('steps that are computed again must be what counted: a difference is an alarm', async () => {
    const orchestrator = await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 4 });
    const run = await cluster.client.train(cluster.spec('differs', { steps: 40, checkpoint: { every: 0 } }));
    await stepReached(run, 20);
    await orchestrator.stop();
    cluster.orchestrators.length = 0;
    await cluster.workers[0]!.crash();
    await cluster.work('w2', { shardMs: 1 });
    const path = join(directoryOf('differs'), 'metrics.jsonl');
    const lines = readLines<StepLine>(path);
    writeFileSync(path, lines.map((line) => `${JSON.stringify(line.step === 7 ? { ...line, loss: line.loss! + 1e-12 } : line)}\n`).join(''));
    await cluster.orchestrate();
    const record = await run.wait();
    expect(record).to.include({ phase: 'completed', step: 40 });
    const alarms = record.faults.filter(({ error }) => error.code === 'REPLICA_DIVERGED');
    expect(alarms.map(({ what }) => what)).to.deep.equal(['step 7 computed again']);
  });

  it('a run that was rolled back is rebuilt on the branch that it is on', () => {
    const directory = directoryOf('branched');
    mkdirSync(join(directory, 'checkpoints'), { recursive: true });
    writeFileSync(join(directory, 'spec.json'), JSON.stringify(cluster.checked('branched')));
    for (const name of ['step-4', 'step-6', 'step-6-branch-1', 'step-8']) mkdirSync(join(directory, 'checkpoints', name));
    const step = (at: number): object => ({ ...expectedReport(cluster.checked('branched'), at), tokensPerSecond: 1, epoch: 2, atMs: at });
    const rollback = { type: 'rollback', atMs: 9, branch: 1, fromStep: 8, toStep: 4, epoch: 3, loss: 9, threshold: 2 };
    const lines = [...[1, 2, 3, 4, 5, 6, 7, 8].map(step), rollback, ...[5, 6, 7].map(step)];
    writeFileSync(join(directory, 'metrics.jsonl'), lines.map((line) => `${JSON.stringify(line)}\n`).join(''));
    const { record } = rebuild(directory);
    expect(record).to.include({ phase: 'queued', step: 7 });
    expect(record.epoch).to.be.above(3);
    expect(record.rollbacks).to.have.length(1);
    expect(record.checkpoint).to.deep.equal({ directory: join(directory, 'checkpoints', 'step-6-branch-1'), step: 6 });
  });

  it('no worker is told an epoch above the one on the disk', async () => {
    await cluster.orchestrate();
    const epochs: [told: number, kept: number][] = [];
    let failures = 0;
    await cluster.work('w1', {
      before: (job) => {
        if (job.name !== 'steps') return;
        epochs.push([job.data.epoch as number, readRecordFile(directoryOf('epochs'))!.epoch]);
        if (failures++ < 6) throw new Error('a passing trouble');
      },
    });
    await (await cluster.client.train(cluster.spec('epochs'))).wait().catch(() => null);
    expect(epochs.length).to.be.above(2);
    for (const [told, kept] of epochs) expect(kept).to.be.at.least(told);
  });

  for (const [what, workers] of [['local', 1], ['flow', 2]] as const) {
    it(`a Redis that lost its last second is noticed, and the run goes on (${what})`, async () => {
      await cluster.orchestrate();
      await Promise.all(['w1', 'w2'].slice(0, workers).map((id) => cluster.work(id, { shardMs: 6 })));
      const changes = { steps: 80, parallelism: workers };
      const run = await cluster.client.train(cluster.spec('second', changes));
      for (const step of [15, 40]) {
        await stepReached(run, step);
        await cluster.redis.kill();
        // No more than what a second of steps and heartbeats writes: the run itself was queued long before.
        const bytes = cluster.redis.queues.truncate(12_000);
        await cluster.redis.start();
        expect(bytes).to.be.above(40_000);
      }
      const record = await run.wait();
      expectUndisturbed('second', record, changes);
      // A driver that is just taking the run up reads all anew, and has nothing to notice.
      expect(record.faultCounts['REDIS_LOST'], JSON.stringify(record.faultCounts)).to.be.at.least(1);
    });
  }

  it('an orchestrator that starts on a Redis that lost its last writes goes on above what the disk tells', async () => {
    const orchestrator = await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 4 });
    const changes = { steps: 50 };
    const run = await cluster.client.train(cluster.spec('older', changes));
    await stepReached(run, 25);
    await orchestrator.stop();
    cluster.orchestrators.length = 0;
    const path = join(directoryOf('older'), 'record.json');
    const kept = JSON.parse(readFileSync(path, 'utf8')) as RunRecord;
    writeFileSync(path, JSON.stringify({ ...kept, epoch: kept.epoch + 7 }));
    await cluster.orchestrate();
    const record = await run.wait();
    expectUndisturbed('older', record, changes);
    expect(record.epoch).to.be.above(kept.epoch + 7);
    expectLostOnce(record);
  });

  it('an orchestrator that starts on another process of Redis than the one before believes none of its jobs', async () => {
    const orchestrator = await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 4 });
    const changes = { steps: 50 };
    const run = await cluster.client.train(cluster.spec('another', changes));
    await stepReached(run, 15);
    await orchestrator.stop();
    cluster.orchestrators.length = 0;
    const { epoch } = readRecordFile(directoryOf('another'))!;
    await cluster.redis.kill();
    await cluster.redis.start();
    const next = await cluster.orchestrate();
    await stepReached(run, 30);
    // The Redis that it has made right is believed by whoever comes next.
    await next.stop();
    cluster.orchestrators.length = 0;
    await cluster.orchestrate();
    const record = await run.wait();
    expectUndisturbed('another', record, changes);
    expect(record.epoch).to.be.above(epoch + 100);
    expectLostOnce(record);
  });

  it('a run that was cancelled stays so when Redis loses that', async () => {
    const orchestrator = await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 4 });
    const run = await cluster.client.train(cluster.spec('over', { steps: 5_000 }));
    await stepReached(run, 3);
    const names = keys(cluster.config.redis.prefix);
    const { queues } = cluster.redis;
    const [record, control] = [await queues.call('HGET', names.run('over'), 'record'), await queues.call('GET', names.control('over'))];
    await run.cancel();
    await run.ended();
    await orchestrator.stop();
    cluster.orchestrators.length = 0;
    await queues.call('HSET', names.run('over'), 'record', record as string);
    await queues.call('SET', names.control('over'), control as string);
    expect((await run.record()).phase).to.equal('running');
    await cluster.orchestrate();
    await until('cancelled again', async () => (await run.record()).phase === 'cancelled');
    await until('no control', async () => (await queues.call('GET', names.control('over'))) === null);
  });
});
