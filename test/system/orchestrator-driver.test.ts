/**
 * The orchestrator against a real Redis and fake workers: each run ends with what an undisturbed run reports, whichever
 * workers served it and whatever became of them, and leaves nothing in Redis but its record.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import { NnError } from '../../config/errors.ts';
import type { RunEvent, RunRecord } from '../../config/messages.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import type { StepLine } from '../../orchestrator/metrics.ts';
import type { Run } from '../../orchestrator/client.ts';
import { FakeCluster } from '../support/fake-cluster.ts';
import { expectedReport, stateAt } from '../support/fake-worker.ts';
import { checkRun } from '../support/history.ts';
import { until } from '../support/wait.ts';

describe('orchestrator: a run over real Redis', function () {
  this.timeout(60_000);
  let cluster: FakeCluster;
  beforeEach(async () => {
    cluster = await FakeCluster.start();
  });
  afterEach(() => cluster.stop());

  const train = async (name: string, changes: Partial<RunSpecInput> = {}): Promise<{ run: Run; spec: RunSpec }> => ({
    run: await cluster.client.train(cluster.spec(name, changes)),
    spec: cluster.checked(name, changes),
  });

  /** The metrics hold each step once, in order, with the values of the undisturbed run; the record agrees. */
  const expectUndisturbed = (spec: RunSpec, record: RunRecord): void => {
    expect(record).to.include({ phase: 'completed', step: spec.steps, error: null });
    const state = stateAt(spec.seed, spec.steps);
    expect(record.weightsDigest).to.equal(state + state);
    const lines = readFileSync(join(cluster.config.runs, spec.name, 'metrics.jsonl'), 'utf8').trim().split('\n').map((line) => JSON.parse(line) as StepLine);
    expect(lines.map(({ step, loss }) => ({ step, loss }))).to.deep.equal(
      Array.from({ length: spec.steps }, (_, index) => ({ step: index + 1, loss: expectedReport(spec, index + 1).loss })),
    );
    expect(checkRun(join(cluster.config.runs, spec.name), state + state).violations.join('\n')).to.equal('');
  };

  /** Redis holds of the run its record, and its events for a little while. */
  const expectClean = async (name: string): Promise<void> => {
    const left = (await cluster.keys()).filter((key) => key.includes(name));
    expect(left.filter((key) => key !== `nn:run:${name}:events`)).to.deep.equal([`nn:run:${name}`]);
    expect((await cluster.keys()).filter((key) => key.startsWith('nn:x:') || key === 'nn:claims')).to.deep.equal([]);
  };

  it('one worker: local, evals and checkpoints at their steps', async () => {
    await cluster.orchestrate();
    const worker = await cluster.work('w1');
    const { run, spec } = await train('one');
    const events: RunEvent[] = [];
    for await (const event of run.events()) events.push(event);
    const record = await run.wait();
    expectUndisturbed(spec, record);
    await expectClean('one');
    expect(record.way).to.include({ exchange: 'local', workers: 1 });
    expect(record.faults).to.deep.equal([]);
    expect(record.validation?.step).to.equal(20);
    expect(record.validationBefore).to.be.a('number');
    expect(events.flatMap((event) => (event.type === 'eval' ? [event.step] : []))).to.deep.equal([0, 8, 16, 20]);
    expect(events.flatMap((event) => (event.type === 'checkpoint' ? [event.step] : []))).to.deep.equal([10, 20]);
    expect(events.flatMap((event) => (event.type === 'step' ? [event.report.step] : []))).to.deep.equal(Array.from({ length: 20 }, (_, index) => index + 1));
    expect(events.at(-1)).to.include({ type: 'phase', phase: 'completed' });
    expect(worker.done.get('shard')).to.equal(undefined);
  });

  it('three workers: a flow a step, on all of them', async () => {
    await cluster.orchestrate();
    const workers = await Promise.all(['w1', 'w2', 'w3'].map((id) => cluster.work(id, { shardMs: 2 })));
    const { run, spec } = await train('three', { parallelism: 3, compareDigestsEvery: 5 });
    const record = await run.wait();
    expectUndisturbed(spec, record);
    await expectClean('three');
    expect(record.way).to.include({ exchange: 'redis', workers: 3 });
    expect(record.faults).to.deep.equal([]);
    expect(workers.every((worker) => (worker.done.get('shard') ?? 0) > 0)).to.equal(true);
  });

  const stepReached = (run: Run, step: number): Promise<void> => until(`step ${step}`, async () => (await run.record()).step >= step);

  it('a dead worker is replaced by another, from the checkpoint', async () => {
    await cluster.orchestrate();
    const first = await cluster.work('w1', { shardMs: 5 });
    const { run, spec } = await train('replaced', { steps: 30 });
    await stepReached(run, 14);
    await first.crash();
    await cluster.work('w2');
    const record = await run.wait();
    expectUndisturbed(spec, record);
    await expectClean('replaced');
    expect(record.faults.map((fault) => fault.error.code)).to.include('WORKER_LOST');
    expect(record.epoch).to.be.above(0);
  });

  it('a worker that comes back under its old name is another one', async () => {
    await cluster.orchestrate();
    const first = await cluster.work('w1', { shardMs: 5 });
    const { run, spec } = await train('again', { steps: 30, checkpoint: { every: 0 } });
    await stepReached(run, 5);
    await first.crash();
    await cluster.work('w1');
    expectUndisturbed(spec, await run.wait());
    await expectClean('again');
  });

  it('workers join and leave in the middle: local, flow, local', async () => {
    await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 5 });
    const { run, spec } = await train('elastic', { steps: 60, parallelism: 2 });
    await stepReached(run, 5);
    const second = await cluster.work('w2', { shardMs: 5 });
    await until('a flow', async () => (await run.record()).way?.exchange === 'redis');
    const { step } = await run.record();
    await stepReached(run, step + 3);
    await second.crash();
    const record = await run.wait();
    expectUndisturbed(spec, record);
    await expectClean('elastic');
    expect(record.way?.exchange).to.equal('local');
  });

  it('a worker that dies during a flow loses one step at most', async () => {
    await cluster.orchestrate();
    const workers = await Promise.all(['w1', 'w2', 'w3'].map((id) => cluster.work(id, { shardMs: 4 })));
    const { run, spec } = await train('flow-death', { steps: 40, parallelism: 3, checkpoint: { every: 0 } });
    await stepReached(run, 10);
    await workers[1]!.crash();
    const record = await run.wait();
    expectUndisturbed(spec, record);
    await expectClean('flow-death');
  });

  it('pause stops within a step, resume goes on, cancel ends; nothing is left', async () => {
    await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 5 });
    const { run } = await train('paused', { steps: 2_000 });
    await stepReached(run, 3);
    await run.pause();
    await until('paused', async () => (await run.record()).phase === 'paused', 2_000);
    const { step } = await run.record();
    await new Promise((resolve) => setTimeout(resolve, 200));
    expect((await run.record()).step).to.equal(step);
    await run.resume();
    await stepReached(run, step + 3);
    await run.cancel();
    const record = await run.ended();
    expect(record.phase).to.equal('cancelled');
    await expectClean('paused');
    const failure = await run.wait().then(() => null, (error: unknown) => error);
    expect(failure).to.have.property('code', 'CANCELLED');
    expect(await run.cancel().then(() => null, (error: unknown) => error)).to.have.property('code', 'RUN_STATE');
  });

  it('pause and resume in a flow, without a step lost or counted twice', async () => {
    await cluster.orchestrate();
    await Promise.all(['w1', 'w2'].map((id) => cluster.work(id, { shardMs: 2 })));
    const { run, spec } = await train('paused-flow', { steps: 60, parallelism: 2, checkpoint: { every: 0 } });
    await stepReached(run, 5);
    await run.pause();
    await until('paused', async () => (await run.record()).phase === 'paused', 2_000);
    await run.resume();
    expectUndisturbed(spec, await run.wait());
    await expectClean('paused-flow');
  });

  for (const [what, workers] of [['local', 1], ['flow', 2]] as const) {
    it(`an orchestrator that is stopped is followed by another, without recomputation (${what})`, async () => {
      const first = await cluster.orchestrate();
      await Promise.all(['w1', 'w2'].slice(0, workers).map((id) => cluster.work(id, { shardMs: 4 })));
      const { run, spec } = await train('handed', { steps: 60, parallelism: workers, checkpoint: { every: 0 }, evaluation: { every: 0, sequences: 1 } });
      await stepReached(run, 8);
      await first.stop();
      cluster.orchestrators.length = 0;
      await cluster.orchestrate();
      const record = await run.wait();
      expectUndisturbed(spec, record);
      expect(record.faults).to.deep.equal([]);
      await expectClean('handed');
    });
  }

  for (const [what, workers] of [['local', 1], ['flow', 2]] as const) {
    it(`an orchestrator that is killed, and again, is followed by others (${what})`, async () => {
      let current = await cluster.orchestrateApart();
      await Promise.all(['w1', 'w2'].slice(0, workers).map((id) => cluster.work(id, { shardMs: 10 })));
      const { run, spec } = await train('killed', { steps: 100, parallelism: workers, checkpoint: { every: 0 }, evaluation: { every: 30, sequences: 1 } });
      for (const step of [5, 45]) {
        await stepReached(run, step);
        await current.kill();
        current = await cluster.orchestrateApart();
      }
      const record = await run.wait();
      expectUndisturbed(spec, record);
      expect(record.faults).to.deep.equal([]);
      await expectClean('killed');
    });
  }

  it('two orchestrators share the runs; one is killed', async () => {
    const first = await cluster.orchestrateApart();
    await cluster.orchestrateApart();
    await Promise.all(['w1', 'w2'].map((id) => cluster.work(id, { shardMs: 5 })));
    const runs = await Promise.all(['one', 'two', 'three'].map((name) => train(name, { steps: 40, parallelism: 1 })));
    await stepReached(runs[0]!.run, 10);
    await first.kill();
    for (const { run, spec } of runs) expectUndisturbed(spec, await run.wait());
  });

  for (const [what, workers] of [['local', 1], ['flow', 2]] as const) {
    it(`both Redis servers are killed and come back, the exchange empty (${what})`, async () => {
      await cluster.orchestrate();
      await Promise.all(['w1', 'w2'].slice(0, workers).map((id) => cluster.work(id, { shardMs: 5 })));
      const { run, spec } = await train('outage', { steps: 40, parallelism: workers });
      await stepReached(run, 12);
      await cluster.redis.kill();
      await cluster.redis.start();
      expectUndisturbed(spec, await run.wait());
      await expectClean('outage');
    });
  }

  it('two runs and one worker: one after the other', async () => {
    await cluster.orchestrate();
    await cluster.work('w1');
    const runs = await Promise.all(['left', 'right'].map((name) => train(name)));
    for (const { run, spec } of runs) expectUndisturbed(spec, await run.wait());
    await expectClean('left');
    await expectClean('right');
  });

  it('steps that are skipped are counted, and too many in a row fail the run', async () => {
    await cluster.orchestrate();
    await cluster.work('w1', { skips: (step) => step === 3 || step >= 10 });
    const { run } = await train('nan', { maxNonFiniteSteps: 4 });
    const record = await run.ended();
    expect(record).to.deep.include({ phase: 'failed', step: 13, skippedSteps: 5 });
    expect(record.error?.code).to.equal('NON_FINITE');
    expect(await run.wait().then(() => null, (error: unknown) => error)).to.have.property('code', 'RUN_FAILED');
    await expectClean('nan');
  });

  it('a failure that no attempt cures fails the run with its code; one that passes does not', async () => {
    await cluster.orchestrate();
    let failures = 0;
    await cluster.work('w1', {
      before: (job) => {
        if (job.name === 'steps' && failures++ < 2) throw new NnError('TIMEOUT', 'a passing trouble');
        if (job.name === 'eval' && job.data.replica?.run === 'bad') throw new NnError('TOKEN_FILE_INVALID', 'the file is damaged');
      },
    });
    const good = await train('good');
    expectUndisturbed(good.spec, await good.run.wait());
    const bad = await train('bad');
    const record = await bad.run.ended();
    expect(record.error).to.include({ code: 'TOKEN_FILE_INVALID', message: 'the file is damaged' });
    await expectClean('bad');
  });

  it('without a worker the run waits and says why, then goes on', async () => {
    await cluster.orchestrate();
    const { run, spec } = await train('patient');
    await until('a reason', async () => (await run.record()).way?.reason === 'waiting: no live worker');
    await cluster.work('w1');
    expectUndisturbed(spec, await run.wait());
  });
});
