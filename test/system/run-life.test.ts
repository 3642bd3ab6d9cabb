/**
 * The life of a run over real Redis with fake workers: attempts and faults as the record and faults.jsonl tell them, retry
 * from the last checkpoint with the bits of a run that never failed, and who may not meddle with a later attempt.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import { NnError, errorCode } from '../../config/errors.ts';
import type { RunRecord } from '../../config/messages.ts';
import { openRedis } from '../../config/redis.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import type { Run } from '../../orchestrator/client.ts';
import type { FaultLine } from '../../orchestrator/fault-log.ts';
import type { StepLine } from '../../orchestrator/metrics.ts';
import { Fenced, RunStore } from '../../orchestrator/run-store.ts';
import { FakeCluster } from '../support/fake-cluster.ts';
import { expectedReport, stateAt } from '../support/fake-worker.ts';
import { checkRun } from '../support/history.ts';
import { until } from '../support/wait.ts';

describe('orchestrator: the life of a run', function () {
  this.timeout(60_000);
  let cluster: FakeCluster;
  beforeEach(async () => {
    cluster = await FakeCluster.start();
  });
  afterEach(() => cluster.stop());

  const linesOf = <Line>(name: string, file: string): Line[] =>
    readFileSync(join(cluster.config.runs, name, file), 'utf8').trim().split('\n').map((line) => JSON.parse(line) as Line);

  const expectUndisturbed = (name: string, record: RunRecord, changes: Partial<RunSpecInput> = {}): void => {
    const spec = cluster.checked(name, changes);
    expect(record).to.include({ phase: 'completed', step: spec.steps, error: null });
    const state = stateAt(spec.seed, spec.steps);
    expect(record.weightsDigest).to.equal(state + state);
    expect(checkRun(join(cluster.config.runs, name), state + state).violations).to.deep.equal([]);
    expect(linesOf<StepLine>(name, 'metrics.jsonl').map(({ step, loss }) => ({ step, loss }))).to.deep.equal(
      Array.from({ length: spec.steps }, (_, index) => ({ step: index + 1, loss: expectedReport(spec, index + 1).loss })),
    );
  };
  const refusal = (work: Promise<unknown>): Promise<unknown> => work.then(() => null, errorCode);

  /** A run of 30 steps that fails at the eval of step 16, for good, until `mended` says otherwise. */
  const failing = async (name: string, mended: () => boolean): Promise<Run> => {
    await cluster.work('w1', {
      shardMs: 1,
      before: (job) => {
        if (job.name === 'eval' && job.data.replica?.step === 16 && !mended()) throw new NnError('TOKEN_FILE_INVALID', 'the file is damaged');
      },
    });
    return cluster.client.train(cluster.spec(name, { steps: 30 }));
  };

  it('a failed run is tried again from its checkpoint, to the same bits; every attempt and fault is on record', async () => {
    await cluster.orchestrate();
    let mended = false;
    const run = await failing('again', () => mended);
    const failed = await run.ended();
    expect(failed).to.include({ phase: 'failed', step: 16 });
    expect(failed.attempts).to.have.length(1);
    expect(failed.attempts[0]).to.deep.include({ number: 1, fromStep: 0, toStep: 16, phase: 'failed', error: failed.error });
    expect(failed.faultCounts).to.deep.equal({ TOKEN_FILE_INVALID: 1 });
    mended = true;
    expect(await run.retry()).to.include({ phase: 'queued', step: 16 });
    const record = await run.wait();
    expectUndisturbed('again', record, { steps: 30 });
    expect(record.attempts.map(({ number, fromStep, toStep, phase }) => ({ number, fromStep, toStep, phase }))).to.deep.equal([
      { number: 1, fromStep: 0, toStep: 16, phase: 'failed' },
      { number: 2, fromStep: 10, toStep: 30, phase: 'completed' },
    ]);
    for (const { startedAtMs, endedAtMs, runningMs } of record.attempts) expect(runningMs).to.be.within(1, endedAtMs! - startedAtMs);
    expect(record.runningMs).to.equal(record.attempts[0]!.runningMs + record.attempts[1]!.runningMs);
    const faults = linesOf<FaultLine>('again', 'faults.jsonl');
    expect(faults.map(({ code, worker, attempt, step }) => ({ code, worker, attempt, step }))).to.deep.equal([{ code: 'TOKEN_FILE_INVALID', worker: 'w1', attempt: 1, step: 16 }]);
    expect(record.faults).to.deep.equal(failed.faults);
  });

  it('a cancelled run is tried again, and again; live and completed runs are not', async () => {
    await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 3 });
    const run = await cluster.client.train(cluster.spec('twice', { steps: 40 }));
    for (const step of [12, 25]) {
      await until(`step ${step}`, async () => (await run.record()).step >= step, 40_000);
      expect(await refusal(run.retry())).to.equal('RUN_STATE');
      await run.cancel();
      expect(await run.ended()).to.include({ phase: 'cancelled' });
      await run.retry();
    }
    expectUndisturbed('twice', await run.wait(), { steps: 40 });
    expect((await run.record()).attempts.map(({ phase }) => phase)).to.deep.equal(['cancelled', 'cancelled', 'completed']);
    expect(await refusal(run.retry())).to.equal('RUN_STATE');
    expect(await refusal(cluster.client.run('nobody').retry())).to.equal('RUN_NOT_FOUND');
  });

  it('a run that used up its time stands at a checkpoint; each retry has the time anew, and the bits are the same', async () => {
    await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 8 });
    const changes = { steps: 60, maxDurationSeconds: 1, checkpoint: { every: 0 } };
    const run = await cluster.client.train(cluster.spec('limited', changes));
    let record = await run.ended();
    expect(record).to.include({ phase: 'failed' });
    const failure = await run.wait().then(() => null, (error: unknown) => error);
    expect(failure).to.have.property('code', 'RUN_FAILED');
    for (; record.phase === 'failed'; record = await run.ended()) {
      expect(record.error?.code).to.equal('TIME_LIMIT');
      expect(record.checkpoint?.step).to.equal(record.step);
      expect(record.attempts.at(-1)!.runningMs).to.be.within(1_000, 5_000);
      expect(record.attempts.length).to.be.below(20);
      await run.retry();
    }
    expectUndisturbed('limited', record, changes);
    for (const [index, { fromStep }] of record.attempts.entries()) expect(fromStep).to.equal(record.attempts[index - 1]?.toStep ?? 0);
  });

  it('of several retries at once one succeeds', async () => {
    await cluster.orchestrate();
    let mended = false;
    const run = await failing('once', () => mended);
    await run.ended();
    mended = true;
    const outcomes = await Promise.all(Array.from({ length: 5 }, () => refusal(run.retry())));
    expect(outcomes.filter((outcome) => outcome === null)).to.have.length(1);
    expect(outcomes.filter((outcome) => outcome === 'RUN_STATE')).to.have.length(4);
    const record = await run.wait();
    expectUndisturbed('once', record, { steps: 30 });
    expect(record.attempts).to.have.length(2);
  });

  it('a retry while the last attempt is still being cleared away waits for that', async () => {
    await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 150 }); // a step of 600 ms, which a cancelled run is cleared away after
    const run = await cluster.client.train(cluster.spec('hasty', { steps: 6, evaluation: { every: 0, sequences: 1 } }));
    await until('a step', async () => (await run.record()).step >= 1);
    await run.cancel();
    await until('cancelled', async () => (await run.record()).phase === 'cancelled');
    await run.retry();
    const record = await run.wait();
    expectUndisturbed('hasty', record, { steps: 6 });
    expect(record.attempts.map(({ phase }) => phase)).to.deep.equal(['cancelled', 'completed']);
  });

  it('whoever drove an earlier attempt can change nothing of a later one', async () => {
    const orchestrator = await cluster.orchestrate();
    let mended = false;
    const run = await failing('fenced', () => mended);
    await run.ended();
    await orchestrator.stop();
    cluster.orchestrators.length = 0;
    const redis = openRedis(cluster.redis.url, cluster.config, 'command');
    const store = new RunStore(redis, cluster.config);
    await store.own('fenced', 'of the first attempt');
    mended = true;
    const next = await run.retry();
    const before = await cluster.keys();
    const event = { type: 'phase', phase: 'failed', atMs: 1 } as const;
    for (const meddle of [
      () => store.writeRecord('fenced', 'of the first attempt', { ...next, step: 999 }),
      () => store.writeControl('fenced', 'of the first attempt', { epoch: 999, command: 'stop' }),
      () => store.deleteControl('fenced', 'of the first attempt'),
      () => store.close('fenced', 'of the first attempt', { ...next, phase: 'failed' }, event),
      () => store.publish('fenced', 'of the first attempt', event),
    ]) {
      expect(await meddle().then(() => null, (error: unknown) => error)).to.be.instanceOf(Fenced);
    }
    await store.sweep('fenced', 'of the first attempt');
    await store.leave('fenced', 'of the first attempt');
    expect(await store.owns('fenced', 'of the first attempt')).to.equal(false);
    redis.disconnect();
    expect(await run.record()).to.deep.equal(next);
    expect(await cluster.keys()).to.deep.equal(before);
    await cluster.orchestrate();
    expectUndisturbed('fenced', await run.wait(), { steps: 30 });
  });
});
