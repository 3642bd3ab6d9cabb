/**
 * A replica's promise: the weights after step t are the same bits whichever way they came about. Real native library, real
 * Redis; the orchestrator's part is done by hand.
 */
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import type { Control } from '../../config/keys.ts';
import type { Result, StepReport } from '../../config/messages.ts';
import { parameterCount, parameterShapes } from '../../config/presets.ts';
import type { RunSpec } from '../../config/run-spec.ts';
import { Device } from '../../cuda/device.ts';
import { RedisExchange } from '../../workers/exchange/redis.ts';
import { Replica } from '../../workers/replica.ts';
import { Places } from '../../workers/places.ts';
import { Signals } from '../../workers/signals.ts';
import { codeOf } from '../support/code-of.ts';
import { WorkerWorld, originOf } from '../support/worker-world.ts';

/** One worker's compute side. */
class Bench {
  readonly device = Device.open({ library: 'cpu', index: 0, threads: 1 });
  readonly signals = new Signals();
  readonly exchange: RedisExchange;
  readonly replica: Replica;
  /** What the orchestrator wants. */
  control: Control | null = { epoch: 0, command: 'run' };

  constructor(world: WorkerWorld, spec: RunSpec, worker: string) {
    this.exchange = new RedisExchange({ url: world.config.redis.exchangeUrl, config: world.config, beat: () => this.signals.checkStop() });
    const control = (): Promise<Control | null> => Promise.resolve(this.control);
    this.replica = new Replica({ control, device: this.device, exchange: this.exchange, signals: this.signals, places: new Places(), config: world.config, worker, run: spec.name, spec });
  }

  close(): void {
    this.replica.close();
    this.exchange.close();
    this.device.close();
  }
}

const withoutTime = (report: StepReport): Omit<StepReport, 'milliseconds'> => {
  const { milliseconds, ...rest } = report;
  expect(milliseconds).to.be.greaterThan(0);
  return rest;
};

const SHAPES: Record<string, RunSpec['batch']> = {
  'four shards': { shards: 4, microBatches: 1, sequences: 2, sequenceLength: 32 },
  'four shards of two microbatches': { shards: 4, microBatches: 2, sequences: 1, sequenceLength: 32 },
  'one shard of three microbatches': { shards: 1, microBatches: 3, sequences: 1, sequenceLength: 32 },
};

describe('replica', () => {
  let world: WorkerWorld;
  const benches: Bench[] = [];
  let runs = 0;

  const bench = (spec: RunSpec, worker = `w${benches.length}`): Bench => {
    const made = new Bench(world, spec, worker);
    benches.push(made);
    return made;
  };
  const newSpec = (more: Partial<RunSpec> = {}): RunSpec => ({ ...world.spec(`run-${runs++}`), ...more });
  /** One step of the flow, its shards dealt out to `workers` in turn, summed by the last of them. */
  const flowStep = async (spec: RunSpec, step: number, workers: readonly Bench[], checkpoint: Parameters<typeof originOf>[2] = null): Promise<StepReport> => {
    const origin = originOf(spec, 0, checkpoint);
    for (let shard = spec.batch.shards - 1; shard >= 0; shard--) await workers[shard % workers.length]!.replica.shard({ ...origin, step, shard });
    return (await workers.at(-1)!.replica.reduce({ ...origin, step, shardCount: spec.batch.shards })).report;
  };
  const localSteps = async (spec: RunSpec, one: Bench, fromStep: number, stepCount: number): Promise<StepReport[]> =>
    (await one.replica.steps({ ...originOf(spec), fromStep, stepCount }, () => undefined)).reports;
  const digestAt = async (spec: RunSpec, one: Bench, step: number, checkpoint: Parameters<typeof originOf>[2] = null): Promise<string> =>
    (await one.replica.digest({ ...originOf(spec, 0, checkpoint), step })).digest;
  /** What an undisturbed local run of `steps` steps ends with. */
  const reference = async (spec: RunSpec, steps: number): Promise<{ digest: string; reports: StepReport[] }> => {
    const one = bench(spec);
    const reports = await localSteps(spec, one, 0, steps);
    return { digest: await digestAt(spec, one, steps), reports };
  };

  before(async () => {
    world = await WorkerWorld.start();
  });
  afterEach(async () => {
    for (const each of benches.splice(0)) each.close();
    await world.clear();
  });
  after(() => world.stop());

  for (const [name, batch] of Object.entries(SHAPES)) {
    it(`gives the same bits and the same reports locally and by a flow over three workers: ${name}`, async () => {
      const spec = newSpec({ batch });
      const { digest, reports } = await reference(spec, 4);
      const workers = [bench(spec), bench(spec), bench(spec)];
      const flow: StepReport[] = [];
      for (let step = 1; step <= 4; step++) flow.push(await flowStep(spec, step, workers));
      for (const worker of workers) expect(await digestAt(spec, worker, 4)).to.equal(digest);
      expect(flow.map(withoutTime)).to.deep.equal(reports.map(withoutTime));
    });
  }

  it('skips a step whose gradient is not finite on every replica alike, and names the same tensor whichever way it came about', async () => {
    const base = newSpec();
    // The first update throws the weights so far that the products of the second step overflow.
    const spec = { ...base, optimizer: { ...base.optimizer, learningRate: 1e25, warmupSteps: 0 } };
    const { digest, reports } = await reference(spec, 4);
    expect(reports.map(({ skipped, nonFinite }) => [skipped, nonFinite !== null])).to.deep.equal([[false, false], [true, true], [true, true], [true, true]]);
    const workers = [bench(spec), bench(spec), bench(spec)];
    const flow: StepReport[] = [];
    for (let step = 1; step <= 4; step++) flow.push(await flowStep(spec, step, workers));
    expect(flow.map(withoutTime)).to.deep.equal(reports.map(withoutTime));
    for (const worker of workers) expect(await digestAt(spec, worker, 4)).to.equal(digest);
    const early = bench(spec);
    expect(await digestAt(spec, early, 1), 'as after step 1').to.equal(digest);
    expect(parameterShapes(spec.model).map(({ name }) => name)).to.include(reports[1]!.nonFinite);
  });

  it('lists the shards that it summed, whoever computed them', async () => {
    const spec = newSpec();
    const workers = [bench(spec), bench(spec)];
    const shards: Result<'shard'>[] = [];
    for (let shard = 0; shard < 4; shard++) shards.push(await workers[shard % 2]!.replica.shard({ ...originOf(spec, shard), step: 1, shard }));
    const { shards: summed } = await workers[0]!.replica.reduce({ ...originOf(spec, 9), step: 1, shardCount: 4 });
    expect(summed).to.deep.equal(shards.map(({ shard, worker, epoch, digest }) => ({ shard, worker, epoch, digest })));
    expect(summed.map(({ worker, epoch }) => [worker, epoch])).to.deep.equal([['w0', 0], ['w1', 1], ['w0', 2], ['w1', 3]]);
  });

  it('reports what a step did', async () => {
    const spec = newSpec();
    const [report] = (await reference(spec, 1)).reports;
    expect(report!.loss).to.be.within(Math.log(512) - 0.3, Math.log(512) + 0.3);
    expect(report!.targetTokens).to.equal(4 * 2 * 32);
    expect(report!.auxLoss).to.have.lengthOf(2);
    for (const aux of report!.auxLoss) expect(aux).to.be.within(0.9, 2);
    for (const layer of report!.expertLoad) expect(layer.reduce((sum, load) => sum + load, 0)).to.equal(4 * 2 * 32 * 2);
    expect(report!.gradientNorm).to.be.greaterThan(0);
    expect(report!.skipped).to.equal(false);
  });

  it('changes from local to flow and back at a step boundary without changing a bit', async () => {
    const spec = newSpec();
    const { digest } = await reference(spec, 6);
    const [a, b] = [bench(spec), bench(spec)];
    await localSteps(spec, a, 0, 2);
    const directory = join(world.directory, 'switch', 'step-2');
    await a.replica.checkpoint({ ...originOf(spec), step: 2, directory });
    await flowStep(spec, 3, [a, b], { directory, step: 2 });
    await flowStep(spec, 4, [b, a], { directory, step: 2 });
    await b.replica.steps({ ...originOf(spec), fromStep: 4, stepCount: 2 }, () => undefined);
    expect(await digestAt(spec, b, 6)).to.equal(digest);
  });

  it('catches up through reduced gradients, from the seed and from a checkpoint', async () => {
    const spec = newSpec();
    const { digest } = await reference(spec, 5);
    const worker = bench(spec);
    for (let step = 1; step <= 5; step++) await flowStep(spec, step, [worker]);
    expect(await digestAt(spec, bench(spec), 5), 'from the seed').to.equal(digest);
    const late = bench(spec);
    await digestAt(spec, late, 3);
    expect(await digestAt(spec, late, 5), 'from version 3').to.equal(digest);
    const directory = join(world.directory, 'catch-up', 'step-4');
    await late.replica.bringTo(4, originOf(spec));
    await late.replica.checkpoint({ ...originOf(spec), step: 4, directory });
    await world.exchange.del(world.names.reducedGradient(spec.name, 2));
    const joiner = bench(spec);
    expect(await codeOf(joiner.replica.bringTo(5, originOf(spec)))).to.equal('GRADIENT_LOST');
    expect(await digestAt(spec, joiner, 5, { directory, step: 4 }), 'from a checkpoint').to.equal(digest);
  });

  it('goes on from a checkpoint, back in time too, with the same bits', async () => {
    const spec = newSpec({ batch: SHAPES['four shards of two microbatches']! });
    const { digest } = await reference(spec, 6);
    const one = bench(spec);
    const directory = join(world.directory, 'resume', 'step-3');
    await localSteps(spec, one, 0, 3);
    const saved = await one.replica.checkpoint({ ...originOf(spec), step: 3, directory });
    expect('written' in saved ? saved.written.bytes : 0).to.be.greaterThan(3 * 4 * parameterCount(spec.model));
    await localSteps(spec, one, 3, 3);
    expect(await digestAt(spec, one, 6)).to.equal(digest);
    expect(await digestAt(spec, one, 3, { directory, step: 3 })).to.not.equal(digest);
    await one.replica.steps({ ...originOf(spec, 0, { directory, step: 3 }), fromStep: 3, stepCount: 3 }, () => undefined);
    expect(await digestAt(spec, one, 6), 'went back and did it again').to.equal(digest);
    const other = bench(spec);
    await other.replica.steps({ ...originOf(spec, 0, { directory, step: 3 }), fromStep: 3, stepCount: 3 }, () => undefined);
    expect(await digestAt(spec, other, 6), 'another worker').to.equal(digest);
  });

  it('takes nothing of an abandoned branch for its own: versions, reports, sums, checkpoints', async () => {
    const spec = newSpec();
    const place = (name: string): string => join(world.directory, 'branches', name);
    const start = { directory: place('step-2'), step: 2 };
    const rolledBack = { ...originOf(spec, 1, start), rollbacks: [{ fromStep: 5, toStep: 2 }] };
    const alone = bench(spec);
    await localSteps(spec, alone, 0, 2);
    await alone.replica.checkpoint({ ...originOf(spec), step: 2, directory: start.directory });
    const before = await localSteps(spec, alone, 2, 3);
    await alone.replica.checkpoint({ ...originOf(spec), step: 5, directory: place('step-5') });
    const { reports } = await alone.replica.steps({ ...rolledBack, fromStep: 2, stepCount: 3 }, () => undefined);
    expect(reports.map(({ step }) => step)).to.deep.equal([3, 4, 5]);
    expect(reports.map(({ loss }) => loss)).to.not.include.members(before.map(({ loss }) => loss));
    // The schedule of the learning rate goes by the step, the data does not.
    expect(reports.map(({ learningRate }) => learningRate)).to.deep.equal(before.map(({ learningRate }) => learningRate));
    expect(alone.replica.state).to.deep.equal({ run: spec.name, step: 5, branch: 1 });
    const { digest } = await alone.replica.digest({ ...rolledBack, step: 5 });

    const workers = [bench(spec), bench(spec)];
    for (let step = 1; step <= 5; step++) await flowStep(spec, step, workers);
    for (let step = 3; step <= 5; step++) {
      for (let shard = 0; shard < 4; shard++) await workers[shard % 2]!.replica.shard({ ...rolledBack, step, shard });
      const { report } = await workers[1]!.replica.reduce({ ...rolledBack, step, shardCount: 4 });
      expect(withoutTime(report)).to.deep.equal(withoutTime(reports[step - 3]!));
    }
    for (const worker of [...workers, bench(spec)]) expect((await worker.replica.digest({ ...rolledBack, step: 5 })).digest).to.equal(digest);

    const own = { directory: place('step-5-branch-1'), step: 5 };
    await alone.replica.checkpoint({ ...rolledBack, step: 5, directory: own.directory });
    const late = bench(spec);
    expect(await codeOf(late.replica.bringTo(5, { ...rolledBack, checkpoint: { directory: place('step-5'), step: 5 } }))).to.equal('CHECKPOINT_INVALID');
    expect(await codeOf(late.replica.bringTo(5, originOf(spec, 0, own)))).to.equal('CHECKPOINT_INVALID');
    await world.exchange.flushall();
    expect((await late.replica.digest({ ...rolledBack, checkpoint: own, step: 5 })).digest).to.equal(digest);
  });

  it('refuses a damaged checkpoint, and one of another step or model, and can go on from a good one', async () => {
    const spec = newSpec();
    const one = bench(spec);
    const good = join(world.directory, 'damage', 'step-2');
    await localSteps(spec, one, 0, 2);
    const digest = await digestAt(spec, one, 2);
    await one.replica.checkpoint({ ...originOf(spec), step: 2, directory: good });
    const bad = join(world.directory, 'damage', 'step-9');
    cpSync(good, bad, { recursive: true });
    const file = join(bad, 'training', 'm.safetensors');
    const bytes = readFileSync(file);
    bytes[bytes.length - 5]! ^= 1;
    writeFileSync(file, bytes);
    const fresh = bench(spec);
    expect(await codeOf(fresh.replica.bringTo(2, originOf(spec, 0, { directory: bad, step: 2 })))).to.equal('CHECKPOINT_INVALID');
    expect(fresh.replica.step).to.equal(null);
    expect(await codeOf(fresh.replica.bringTo(3, originOf(spec, 0, { directory: good, step: 3 })))).to.equal('CHECKPOINT_INVALID');
    const wider = newSpec({ model: { ...spec.model, ffnSize: 64 } });
    expect(await codeOf(bench(wider).replica.bringTo(2, originOf(wider, 0, { directory: good, step: 2 })))).to.equal('CHECKPOINT_INVALID');
    expect(await digestAt(spec, fresh, 2, { directory: good, step: 2 })).to.equal(digest);
  });

  it('computes a published shard only once, and again when a chunk of it is gone', async () => {
    const spec = newSpec();
    const [a, b] = [bench(spec), bench(spec)];
    const job = { ...originOf(spec), step: 1, shard: 2 };
    const first = await a.replica.shard(job);
    const second = await b.replica.shard({ ...job, epoch: 3 });
    expect(second).to.deep.equal(first);
    expect(b.replica.step, 'nothing was computed').to.equal(null);
    await world.exchange.del(`${first.key}:1`);
    const third = await b.replica.shard({ ...job, epoch: 3 });
    expect(third).to.include({ worker: 'w1', epoch: 3, digest: first.digest });
  });

  it('says REPLICA_DIVERGED when a shard computed again has other bits than were published', async () => {
    const spec = newSpec();
    const one = bench(spec);
    const job = { ...originOf(spec), step: 1, shard: 0 };
    const result = await one.replica.shard(job);
    await world.exchange.set(result.key, JSON.stringify({ ...result, digest: 'f'.repeat(32) }));
    await world.exchange.del(`${result.key}:0`);
    expect(await codeOf(one.replica.shard(job))).to.equal('REPLICA_DIVERGED');
  });

  it('heals shards that are missing or damaged when they are summed', async () => {
    const spec = newSpec();
    const { digest } = await reference(spec, 1);
    const one = bench(spec);
    const origin = originOf(spec);
    for (let shard = 0; shard < 4; shard++) await one.replica.shard({ ...origin, step: 1, shard });
    const key = (shard: number): string => world.names.shardGradient(spec.name, 1, shard);
    const chunk = (await world.exchange.getBuffer(`${key(1)}:0`))!;
    chunk[100]! ^= 4;
    await world.exchange.set(`${key(1)}:0`, chunk);
    await world.exchange.del(`${key(3)}:1`, key(0));
    await one.replica.reduce({ ...origin, step: 1, shardCount: 4 });
    expect(await digestAt(spec, one, 1)).to.equal(digest);
    expect(await world.exchange.keys(`${world.names.exchangeOf(spec.name)}shard:*`), 'shards are deleted').to.deep.equal([]);
  });

  it('withdraws a damaged sum and says GRADIENT_LOST; summed again it serves', async () => {
    const spec = newSpec();
    const { digest } = await reference(spec, 1);
    const [a, b, c] = [bench(spec), bench(spec), bench(spec)];
    await flowStep(spec, 1, [a]);
    const key = world.names.reducedGradient(spec.name, 1);
    const chunk = (await world.exchange.getBuffer(`${key}:1`))!;
    chunk[33]! ^= 1;
    await world.exchange.set(`${key}:1`, chunk);
    expect(await codeOf(b.replica.bringTo(1, originOf(spec)))).to.equal('GRADIENT_LOST');
    expect(await world.exchange.keys(`${key}*`)).to.deep.equal([]);
    expect(b.replica.step).to.equal(0);
    await flowStep(spec, 1, [c]);
    await b.replica.bringTo(1, originOf(spec));
    expect(await digestAt(spec, b, 1)).to.equal(digest);
  });

  it('sums a step only once: a reduction that is repeated returns what was published', async () => {
    const spec = newSpec();
    const [a, b] = [bench(spec), bench(spec)];
    const report = await flowStep(spec, 1, [a]);
    const again = await b.replica.reduce({ ...originOf(spec, 5), step: 1, shardCount: 4 });
    expect(again.report).to.deep.equal(report);
    expect(again.epoch).to.equal(0);
  });

  it('keeps the newest sums only, as many as the log may hold, and says how far back they go', async () => {
    const small = await WorkerWorld.start({ exchange: { logBytes: 0 } });
    try {
      const spec = small.spec('bounded');
      const one = new Bench(small, spec, 'w');
      benches.push(one);
      for (let step = 1; step <= 5; step++) await flowStep(spec, step, [one]);
      const sums = (await small.exchange.keys(`${small.names.exchangeOf(spec.name)}sum:*`)).filter((key) => /:sum:\d+$/.test(key));
      expect(sums.sort()).to.deep.equal([small.names.reducedGradient(spec.name, 4), small.names.reducedGradient(spec.name, 5)]);
      expect(JSON.parse((await small.exchange.get(`${small.names.exchangeOf(spec.name)}log`))!)).to.deep.equal({ first: 4, last: 5 });
    } finally {
      await small.stop();
    }
  });

  it('stops at a step boundary on yield, within a step on stop, and leaves the version whole', async () => {
    const spec = newSpec({ batch: SHAPES['four shards of two microbatches']! });
    const { digest } = await reference(spec, 5);
    const one = bench(spec);
    const job = { ...originOf(spec), fromStep: 0, stepCount: 5 };
    const yielded = await one.replica.steps(job, ({ step }) => {
      if (step === 2) one.signals.command = 'yield';
    });
    expect(yielded.stepsDone).to.equal(2);
    one.signals.command = 'run';
    // The sixth beat of the next step is in its third shard.
    const pulse = one.signals.pulse;
    Object.defineProperty(one.signals, 'command', { configurable: true, get: () => (one.signals.pulse - pulse > 6 ? 'stop' : 'run') });
    const stopped = await one.replica.steps({ ...job, fromStep: 2, stepCount: 3 }, () => undefined);
    expect(stopped.stepsDone).to.equal(0);
    expect(one.replica.step).to.equal(2);
    expect(await codeOf(one.replica.shard({ ...originOf(spec), step: 3, shard: 1 })), 'a shard').to.equal('CANCELLED');
    Reflect.deleteProperty(one.signals, 'command');
    await one.replica.steps({ ...job, fromStep: 2, stepCount: 3 }, () => undefined);
    expect(await digestAt(spec, one, 5)).to.equal(digest);
  });

  it('publishes nothing for a job that is dropped', async () => {
    const spec = newSpec();
    const one = bench(spec);
    one.signals.command = 'drop';
    expect(await codeOf(one.replica.shard({ ...originOf(spec), step: 1, shard: 0 }))).to.equal('CANCELLED');
    expect(await codeOf(one.replica.steps({ ...originOf(spec), fromStep: 0, stepCount: 1 }, () => undefined))).to.equal('CANCELLED');
    expect(await world.exchange.keys('*')).to.deep.equal([]);
  });

  it('publishes nothing for an epoch that was over when it came to publishing, and leaves the version whole', async () => {
    const spec = newSpec();
    const { digest } = await reference(spec, 1);
    const one = bench(spec);
    const job = { ...originOf(spec), step: 1 };
    for (const control of [{ epoch: 1, command: 'run' } as const, null]) {
      one.control = control;
      expect(await codeOf(one.replica.shard({ ...job, shard: 0 }))).to.equal('CANCELLED');
      expect(await world.exchange.exists(world.names.shardGradient(spec.name, 1, 0))).to.equal(0);
    }
    one.control = { epoch: 0, command: 'stop' };
    for (let shard = 0; shard < 4; shard++) await one.replica.shard({ ...job, shard });
    one.control = { epoch: 1, command: 'run' };
    expect(await codeOf(one.replica.reduce({ ...job, shardCount: 4 }))).to.equal('CANCELLED');
    expect(await world.exchange.exists(world.names.reducedGradient(spec.name, 1))).to.equal(0);
    expect(one.replica.step).to.equal(0);
    await one.replica.reduce({ ...job, epoch: 1, shardCount: 4 });
    expect(await digestAt(spec, one, 1)).to.equal(digest);
  });

  it('reports steps again that it has done already when their job comes twice', async () => {
    const spec = newSpec();
    const one = bench(spec);
    const first = await localSteps(spec, one, 0, 3);
    const seen: number[] = [];
    const again = await one.replica.steps({ ...originOf(spec, 1), fromStep: 0, stepCount: 5 }, ({ step }) => seen.push(step));
    expect(again.reports.slice(0, 3)).to.deep.equal(first);
    expect(seen).to.deep.equal([1, 2, 3, 4, 5]);
    expect(await digestAt(spec, one, 5)).to.equal((await reference(spec, 5)).digest);
  });

  it('gives the weights digest of the last version only, and evaluates any', async () => {
    const spec = newSpec({ steps: 2 });
    const one = bench(spec);
    await localSteps(spec, one, 0, 2);
    const message = { data: spec.data.train, sequences: 5, sequenceLength: null, checkpoint: null, replica: { ...originOf(spec), step: 2 } };
    const { loss, targetTokens, step } = await one.replica.evaluate(message);
    expect(loss).to.be.within(4, 7);
    expect([targetTokens, step]).to.deep.equal([5 * 32, 2]);
    const last = await one.replica.digest({ ...originOf(spec), step: 2 });
    expect(last.weightsDigest).to.match(/^[0-9a-f]{64}$/);
    const early = bench(spec);
    expect((await early.replica.digest({ ...originOf(spec), step: 0 })).weightsDigest).to.equal(null);
  });

  it('refuses jobs that the spec has no place for', async () => {
    const spec = newSpec({ steps: 2 });
    const one = bench(spec);
    expect(await codeOf(localSteps(spec, one, 1, 2))).to.equal('MESSAGE_INVALID');
    expect(await codeOf(one.replica.shard({ ...originOf(spec), step: 1, shard: 4 }))).to.equal('MESSAGE_INVALID');
    expect(await codeOf(one.replica.reduce({ ...originOf(spec), step: 1, shardCount: 3 }))).to.equal('MESSAGE_INVALID');
  });
});
