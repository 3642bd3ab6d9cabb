/**
 * The orchestrator against a real Redis and fake workers: each run ends with what an undisturbed run reports, whichever
 * workers served it and whatever became of them, and leaves nothing in Redis but its record.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import type { RunEvent, RunRecord } from '../../config/messages.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import type { StepLine } from '../../orchestrator/metrics.ts';
import type { Run } from '../../orchestrator/client.ts';
import { FakeCluster, until } from '../support/fake-cluster.ts';
import { expectedReport, stateAt } from '../support/fake-worker.ts';

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
});
