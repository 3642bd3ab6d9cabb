/**
 * Whole runs through real parts: Redis, BullMQ, worker processes, the native library. What must come out is the promise of the
 * design: the same weights, bit for bit, for any number of workers and whatever died on the way.
 */
import { expect } from 'chai';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { RunEvent, RunRecord } from '../../config/messages.ts';
import { elementCount, parameterShapes, PRESETS } from '../../config/presets.ts';
import { openRedis } from '../../config/redis.ts';
import { CheckpointReader } from '../../data/checkpoint-reader.ts';
import { SafetensorsFile } from '../../data/safetensors.ts';
import type { StepLine } from '../../orchestrator/metrics.ts';
import { startCluster } from '../support/cluster.ts';
import type { Cluster } from '../support/cluster.ts';
import { readLines } from '../support/history.ts';
import { tinySpec } from '../support/tiny-runs.ts';

/** Follows a run to its end, calling `onStep` at each step, and returns its record. */
async function finish(cluster: Cluster, name: string, onStep: (step: number) => void = () => undefined): Promise<{ record: RunRecord; events: RunEvent[] }> {
  const run = cluster.client.run(name);
  const events: RunEvent[] = [];
  for await (const event of run.events()) {
    events.push(event);
    if (event.type === 'step') onStep(event.report.step);
  }
  return { record: await run.wait(), events };
}

const lossesOf = (cluster: Cluster, name: string): unknown[] => {
  const lines = readLines<StepLine>(join(cluster.config.runs, name, 'metrics.jsonl'));
  expect(lines.length, 'steps in metrics.jsonl').to.be.above(0);
  return lines.map(({ step, loss, auxLoss, expertLoad, gradientNorm }) => [step, loss, auxLoss, expertLoad, gradientNorm]);
};

describe('training through the queue', function () {
  this.timeout(120_000);
  let cluster: Cluster;
  let reference: RunRecord;

  before(async () => {
    cluster = await startCluster({ workers: 3, settings: { orchestrator: { eventsExpireSeconds: 2 } } });
    await cluster.client.train(tinySpec(cluster, 'alone', { parallelism: 1 }));
    reference = (await finish(cluster, 'alone')).record;
  });
  after(async () => {
    await cluster.stop();
  });

  it('trains: the loss falls on text that was not trained on', () => {
    expect(reference.phase).to.equal('completed');
    expect(reference.step).to.equal(24);
    expect(reference.weightsDigest).to.match(/^[0-9a-f]{64}$/);
    expect(reference.validation!.loss).to.be.below(reference.validationBefore! - 0.2);
    expect(reference.way!.exchange).to.equal('local');
  });

  it('stops after so many steps in a row with gradients that are not finite, and names the step, the layer and the tensor', async () => {
    const errors: unknown[] = [];
    for (const [name, parallelism] of [['exploding-alone', 1], ['exploding-three', 3]] as const) {
      const optimizer = { learningRate: 1e25, warmupSteps: 0 };
      await cluster.client.train(tinySpec(cluster, name, { parallelism, optimizer, maxNonFiniteSteps: 3, checkpoint: { every: 0 }, evaluation: { every: 0 } }));
      const record = await cluster.client.run(name).ended();
      expect(record).to.include({ phase: 'failed', step: 4, skippedSteps: 3 });
      expect(record.error).to.include({ code: 'NON_FINITE' });
      const { tensor } = record.error!.context;
      expect(parameterShapes(PRESETS.tiny).map(({ name: known }) => known)).to.include(tensor);
      expect(record.error!.message).to.contain('up to step 4').and.contain(tensor);
      errors.push(record.error);
    }
    expect(errors[1]).to.deep.equal(errors[0]);
  });

  it('gives the same bits and the same metrics with three workers', async () => {
    await cluster.client.train(tinySpec(cluster, 'three', { parallelism: 3 }));
    const { record, events } = await finish(cluster, 'three');
    expect(record.phase).to.equal('completed');
    expect(events.some((event) => event.type === 'way' && event.exchange === 'redis')).to.equal(true);
    expect(record.weightsDigest).to.equal(reference.weightsDigest);
    expect(lossesOf(cluster, 'three')).to.deep.equal(lossesOf(cluster, 'alone'));
  });

  it('gives the same bits when a worker is killed in the middle, either way', async () => {
    for (const parallelism of [1, 3]) {
      const name = `killed-${parallelism}`;
      await cluster.client.train(tinySpec(cluster, name, { parallelism }));
      let victims = 0;
      const { record } = await finish(cluster, name, (step) => {
        if (step < 10 || victims > 0) return;
        for (const { pid } of cluster.supervisor.workers().slice(0, parallelism === 1 ? 3 : 1)) {
          victims++;
          process.kill(pid, 'SIGKILL');
        }
      });
      expect(victims).to.be.above(0);
      expect(record.phase).to.equal('completed');
      expect(record.weightsDigest, name).to.equal(reference.weightsDigest);
      expect(lossesOf(cluster, name)).to.deep.equal(lossesOf(cluster, 'alone'));
    }
  });

  it('gives the same bits when the orchestrator is replaced in the middle', async () => {
    await cluster.client.train(tinySpec(cluster, 'replaced', { parallelism: 3 }));
    let replacement: Promise<void> | undefined;
    const { record } = await finish(cluster, 'replaced', (step) => {
      if (step >= 8) replacement ??= cluster.stopOrchestrator().then(() => cluster.startOrchestrator());
    });
    await replacement;
    expect(replacement).to.not.equal(undefined);
    expect(record.weightsDigest).to.equal(reference.weightsDigest);
  });

  it('gives the same bits when a run is paused and resumed, and ends a cancelled one', async () => {
    const run = await cluster.client.train(tinySpec(cluster, 'paused', { parallelism: 1, steps: 24 }));
    for await (const event of run.events()) {
      if (event.type === 'step' && event.report.step === 5) await run.pause();
      if (event.type === 'phase' && event.phase === 'paused') break;
    }
    expect((await run.record()).phase).to.equal('paused');
    await run.resume();
    expect((await run.wait()).weightsDigest).to.equal(reference.weightsDigest);

    const other = await cluster.client.train(tinySpec(cluster, 'cancelled', { steps: 100_000 }));
    for await (const event of other.events()) if (event.type === 'step' && event.report.step === 3) await other.cancel();
    expect((await other.record()).phase).to.equal('cancelled');
  });

  it('writes checkpoints that are Hugging Face Mixtral directories, with the training state beside', async () => {
    const { directory } = reference.checkpoint!;
    const config = JSON.parse(readFileSync(join(directory, 'config.json'), 'utf8')) as Record<string, unknown>;
    expect(config).to.include({ model_type: 'mixtral', num_local_experts: 4, num_experts_per_tok: 2, num_key_value_heads: 1 });
    const file = SafetensorsFile.open(join(directory, 'model.safetensors'));
    const shapes = parameterShapes(PRESETS.tiny);
    expect([...file.tensors.keys()].toSorted()).to.deep.equal(shapes.map(({ name }) => name).toSorted());
    for (const { name, shape } of shapes) expect(file.tensors.get(name)).to.deep.include({ dtype: 'F32', shape: [...shape] });
    file.close();
    const reader = CheckpointReader.open(directory, { verify: true });
    expect(reader.step).to.equal(24);
    expect(reader.hasTraining).to.equal(true);
    const norm = new Float32Array(elementCount([64]));
    reader.read('model.norm.weight', norm);
    expect(norm.every((value) => value > 0.5 && value < 1.5)).to.equal(true);
    reader.close();
    expect(existsSync(join(directory, 'manifest.json'))).to.equal(true);
  });

  it('evaluates a checkpoint to the loss that the run had, and samples from it', async () => {
    const result = await cluster.client.eval({ checkpoint: reference.checkpoint!.directory, data: join(cluster.directory, 'validation.tokens'), sequences: 8, sequenceLength: 32 });
    expect(result.loss).to.be.closeTo(reference.validation!.loss, 1e-6);
  });

  it('leaves nothing in Redis of a finished run but its record', async () => {
    const redis = openRedis(cluster.redis.url, cluster.config, 'command');
    const exchange = openRedis(cluster.redis.exchangeUrl, cluster.config, 'command');
    const { prefix } = cluster.config.redis;
    const deadline = Date.now() + 30_000;
    let left: string[] = [];
    do {
      left = (await redis.keys(`${prefix}:*`)).filter((key) => /alone|three|killed|replaced|paused|cancelled/.test(key));
      left = left.filter((key) => !/^[^:]+:run:[a-z0-9-]+$/.test(key));
      await new Promise((resolve) => setTimeout(resolve, 250));
    } while (left.length > 0 && Date.now() < deadline);
    expect(left).to.deep.equal([]);
    expect(await exchange.keys(`${prefix}:x:*`)).to.deep.equal([]);
    redis.disconnect();
    exchange.disconnect();
  });
});

describe('memory of a worker', function () {
  this.timeout(180_000);

  it('stays flat over 1,000 steps after the first 100', async () => {
    const cluster = await startCluster({ workers: 1, threads: 2 });
    try {
      // The first checkpoint starts the thread that writes them, and takes the memory that its state is copied to.
      await cluster.client.train(tinySpec(cluster, 'long', { steps: 1000, evaluation: { every: 0, sequences: 8 }, checkpoint: { every: 50, keep: 1 } }));
      const [{ pid }] = cluster.supervisor.workers() as [{ id: string; pid: number }];
      const residentBytes = (): number => Number(/VmRSS:\s+(\d+) kB/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))![1]) * 1024;
      const samples: { step: number; bytes: number }[] = [];
      const { record } = await finish(cluster, 'long', (step) => {
        if (step % 50 === 0) samples.push({ step, bytes: residentBytes() });
      });
      expect(record.phase).to.equal('completed');
      // Single readings jump by what the garbage collector has just done.
      const middle = (part: typeof samples): number => part.map(({ bytes }) => bytes).sort((a, b) => a - b)[Math.floor(part.length / 2)]!;
      const early = middle(samples.filter(({ step }) => step >= 100 && step <= 200));
      const late = middle(samples.slice(-3));
      expect(samples.at(-1)!.step).to.equal(1000);
      expect(late / early, `RSS ${early} -> ${late}`).to.be.below(1.05);
    } finally {
      await cluster.stop();
    }
  });
});
