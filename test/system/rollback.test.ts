/**
 * A spike that is real: a stretch of the data is noise, the loss jumps, and the run goes back. Real Redis, worker processes and native
 * library. The end must be that of a run whose data never had the stretch, bit for bit, whoever computed it and whatever died.
 */
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import type { RunEvent, RunRecord } from '../../config/messages.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { sequenceStart } from '../../data/sampler.ts';
import type { RunLine } from '../../orchestrator/metrics.ts';
import { isRollback, presentBranch } from '../../orchestrator/metrics.ts';
import { startCluster } from '../support/cluster.ts';
import type { Cluster } from '../support/cluster.ts';
import { checkRun, readLines } from '../support/history.ts';
import { tinySpec, writeTokenFile } from '../support/tiny-runs.ts';

const SEED = 5;
const STEPS = 24;
const LENGTH = 32;
const BATCH = { shards: 4, microBatches: 1, sequences: 2, sequenceLength: LENGTH };
const SEQUENCES = BATCH.shards * BATCH.sequences;
const COUNT = 20_000;
/** Steps that read noise. With patience 2 the second of them decides, and the newest checkpoint before the first is that of step 12. */
const NOISY = [14, 15];
const BACK = { fromStep: 15, toStep: 12 };

/** Where the sequences of a step begin in the file. */
const startsOf = (step: number): number[] =>
  Array.from({ length: SEQUENCES }, (_, index) => sequenceStart({ count: COUNT, padCount: 0, read: () => undefined }, SEED, LENGTH, (step - 1) * SEQUENCES + index));

/**
 * Tokens in which each follows from the one before, but for the noise. Windows share their outermost token with their neighbours:
 * it is always the same, so that windows can change places.
 */
function noisyTokens(): Int32Array {
  const first = startsOf(1)[0]! % LENGTH;
  const tokens = Int32Array.from({ length: COUNT }, (_, at) => 4 + ((7 * ((at - first + LENGTH) % LENGTH)) % 64));
  let state = 99;
  const noise = (): number => 100 + ((state = (Math.imul(state, 1664525) + 1013904223) >>> 0) % 400);
  for (const start of NOISY.flatMap(startsOf)) for (let at = start + 1; at < start + LENGTH; at++) tokens[at] = noise();
  return tokens;
}

/** The same tokens, in such an order that the steps after 12 read what they read after the rollback. */
function cleanTokens(noisy: Int32Array): Int32Array {
  const tokens = noisy.slice();
  for (let step = BACK.toStep + 1; step <= STEPS; step++) {
    const from = startsOf(step + BACK.fromStep - BACK.toStep);
    for (const [index, start] of startsOf(step).entries()) {
      const at = from[index]!;
      tokens.set(noisy.subarray(at, at + LENGTH + 1), start);
    }
  }
  return tokens;
}

describe('a loss spike', function () {
  this.timeout(60_000);
  let cluster: Cluster;
  let wanted: RunRecord;

  before(async () => {
    cluster = await startCluster({ workers: 2, settings: { worker: { restartBackoffMs: 50 }, queue: { lockDurationMs: 4_000, stalledIntervalMs: 1_000 } } });
    const noisy = noisyTokens();
    writeTokenFile(join(cluster.directory, 'noisy.tokens'), noisy);
    writeTokenFile(join(cluster.directory, 'clean.tokens'), cleanTokens(noisy));
    wanted = (await finish('clean', { data: data('clean'), lossSpike: {}, parallelism: 1 })).record;
    expect(wanted).to.include({ phase: 'completed', step: STEPS });
    expect(wanted.rollbacks).to.deep.equal([]);
  });
  after(() => cluster.stop());

  const data = (name: string): RunSpecInput['data'] => ({ train: join(cluster.directory, `${name}.tokens`), validation: join(cluster.directory, 'validation.tokens') });
  const directoryOf = (name: string): string => join(cluster.config.runs, name);
  const specOf = (name: string, changes: Partial<RunSpecInput>): RunSpecInput =>
    tinySpec(cluster, name, {
      data: data('noisy'), seed: SEED, steps: STEPS, batch: BATCH, optimizer: { learningRate: 1e-2, warmupSteps: 2 },
      checkpoint: { every: 4, keep: 1 }, evaluation: { every: 6, sequences: 4 }, lossSpike: { factor: 2, window: 4, patience: 2, maxRollbacks: 2 }, ...changes,
    });
  async function finish(name: string, changes: Partial<RunSpecInput>, hear: (event: RunEvent) => void = () => undefined): Promise<{ record: RunRecord; events: RunEvent[] }> {
    const run = await cluster.client.train(specOf(name, changes));
    const events: RunEvent[] = [];
    for await (const event of run.events()) {
      events.push(event);
      hear(event);
    }
    return { record: await run.record(), events };
  }
  /** Losses of the steps that count, which must be those of the clean run. */
  const lossesOf = (name: string): unknown[] => presentBranch(readLines<RunLine>(join(directoryOf(name), 'metrics.jsonl')), []).steps.map(({ step, loss }) => [step, loss]);

  function expectRolledBack(name: string, record: RunRecord): void {
    expect(record).to.include({ phase: 'completed', step: STEPS });
    expect(record.rollbacks.map(({ fromStep, toStep }) => ({ fromStep, toStep }))).to.deep.equal([BACK]);
    expect(record.weightsDigest).to.equal(wanted.weightsDigest);
    expect(record.validation).to.deep.equal(wanted.validation);
    expect(lossesOf(name)).to.deep.equal(lossesOf('clean'));
    expect(readLines<RunLine>(join(directoryOf(name), 'metrics.jsonl')).filter(isRollback).length).to.equal(1);
    expect(checkRun(directoryOf(name), wanted.weightsDigest!).violations).to.deep.equal([]);
    const checkpoints = readdirSync(join(directoryOf(name), 'checkpoints'));
    expect(checkpoints.filter((each) => !each.startsWith('.'))).to.deep.equal([`step-${STEPS}-branch-1`]);
    expect(record.checkpoint!.directory).to.equal(join(directoryOf(name), 'checkpoints', `step-${STEPS}-branch-1`));
  }

  it('that nobody watches for leaves its mark in the weights', async () => {
    const { record } = await finish('unwatched', { lossSpike: {}, parallelism: 1 });
    expect(record.phase).to.equal('completed');
    expect(record.weightsDigest).to.not.equal(wanted.weightsDigest);
  });

  for (const [way, parallelism] of [['on one worker', 1], ['on two workers', 2]] as const) {
    it(`is gone from the result ${way}`, async () => {
      const name = `calm-${parallelism}`;
      const { record, events } = await finish(name, { parallelism });
      expectRolledBack(name, record);
      expect(events.find((event) => event.type === 'rollback')).to.deep.include({ ...BACK, branch: 1 });
      expect(record.faults.map(({ error }) => error.code)).to.deep.equal(['LOSS_SPIKE']);
    });

    it(`is gone from the result ${way}, with workers killed as the spike is seen and as the run goes back`, async () => {
      const name = `killed-${parallelism}`;
      let killed = 0;
      const { record } = await finish(name, { parallelism }, (event) => {
        const seen = event.type === 'step' && event.report.step === NOISY[0] && killed === 0;
        if (!seen && event.type !== 'rollback') return;
        killed++;
        for (const { pid } of cluster.supervisor.workers().slice(0, parallelism === 1 ? 2 : 1)) process.kill(pid, 'SIGKILL');
      });
      expect(killed).to.be.at.least(2);
      expectRolledBack(name, record);
    });

    it(`is gone from the result ${way}, with the orchestrator replaced as the run goes back`, async () => {
      const name = `replaced-${parallelism}`;
      let replacement: Promise<void> | undefined;
      const { record } = await finish(name, { parallelism }, (event) => {
        if (event.type === 'rollback') replacement ??= cluster.stopOrchestrator().then(() => cluster.startOrchestrator());
      });
      expect(replacement).to.not.equal(undefined);
      await replacement;
      expectRolledBack(name, record);
    });
  }

  it('fails the run when it may not go back any more, and a retry comes to the same', async () => {
    const { record } = await finish('stopped', { parallelism: 1, lossSpike: { factor: 2, window: 4, patience: 2, maxRollbacks: 0 } });
    expect(record).to.include({ phase: 'failed', step: BACK.fromStep });
    expect(record.error!.code).to.equal('LOSS_SPIKE');
    expect(record.error!.message).to.match(/^the loss of step 15 is \d.*look at the data.*step 12/);
    // The one of step 12 may not have been complete when the run ended.
    expect(['step-12', 'step-8'].some((each) => existsSync(join(directoryOf('stopped'), 'checkpoints', each)))).to.equal(true);
    const run = cluster.client.run('stopped');
    await run.retry();
    await run.wait().catch(() => undefined);
    const again = await run.record();
    expect(again.error).to.deep.equal(record.error);
    expect(again.attempts.map(({ phase, error }) => [phase, error?.code])).to.deep.equal([['failed', 'LOSS_SPIKE'], ['failed', 'LOSS_SPIKE']]);
  });
});
