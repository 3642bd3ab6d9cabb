/**
 * Two hosts without a shared file system (support/two-hosts.ts): data and checkpoints travel through the store of the
 * orchestrator, and the weights are the same bits as on one host, also when the link is cut for longer than a worker may be
 * silent, in the middle of whatever it carries. Runs of preset `tiny`.
 */
import { expect } from 'chai';
import { existsSync, readFileSync, readdirSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { RunRecord } from '../../config/messages.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { verifyCheckpoint } from '../../data/checkpoint-files.ts';
import { readManifest } from '../../data/manifest.ts';
import { tinySpec, writeTinyData, writeTokens } from '../support/tiny-runs.ts';
import { STORE_TOKEN, TwoHosts, whyNot } from '../support/two-hosts.ts';
import type { Part } from '../support/two-hosts.ts';
import { until } from '../support/wait.ts';

/** Longer than QUICK's deadAfter of 2 s by far, so that the workers are given up and come back. */
const CUT_MS = 5_000;
const BIG_TOKENS = 6_000_000;

describe('two hosts without a shared file system', function () {
  this.timeout(180_000);
  let hosts: TwoHosts;
  let there: Part;
  let alone: RunRecord;
  let bigAlone: RunRecord;

  const spec = (name: string, changes: Partial<RunSpecInput> = {}): RunSpecInput => {
    const place = { directory: hosts.first };
    return tinySpec(place, name, { data: { ...tinySpec(place, name).data, tokenizer: join(hosts.first, 'tokenizer.json') }, steps: 16, parallelism: 1, ...changes });
  };
  const big = (name: string): RunSpecInput => spec(name, { data: { train: join(hosts.first, 'big.tokens') }, steps: 4, evaluation: {}, checkpoint: { every: 0 } });
  /** The checkpoint's files and digests; what it says of its run, with the run's name left out. */
  const contentsOf = ({ run, checkpoint }: RunRecord): unknown => {
    const { files } = readManifest(checkpoint!.directory)!;
    const state = readFileSync(join(checkpoint!.directory, 'training/state.json'), 'utf8').replaceAll(run, 'NAME');
    return { ...files, 'training/state.json': state };
  };
  const bytesIn = ({ checkpoint }: RunRecord): number => Object.values(readManifest(checkpoint!.directory)!.files).reduce((sum, { bytes }) => sum + bytes, 0);
  const pause = (milliseconds: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, milliseconds));
  /** Cuts the link for as long as it takes to be given up, and mends it. */
  const cut = async (): Promise<void> => {
    hosts.cut();
    await pause(CUT_MS);
    hosts.mend();
  };

  before(async function () {
    const reason = whyNot();
    if (reason !== null) {
      console.error(`      skipped: ${reason}`);
      return this.skip();
    }
    hosts = new TwoHosts();
    writeTinyData({ directory: hosts.first });
    writeTokens(join(hosts.first, 'big.tokens'), BIG_TOKENS, 3);
    writeFileSync(join(hosts.first, 'tokenizer.json'), '{"version":"1.0"}');
    await hosts.start();
    const here = await hosts.workHere(1);
    alone = await (await hosts.client.train(spec('alone'))).wait();
    bigAlone = await (await hosts.client.train(big('big-alone'))).wait();
    await here.stop();
    there = await hosts.workThere(2);
  });
  after(async () => {
    await hosts?.stop();
  });

  it('the workers cannot see the first host’s files, and get none without the token', async () => {
    const [, pid] = await there.saw(/\(process (\d+)\) on/);
    expect(existsSync(join('/proc', pid!, 'root', hosts.first, 'train.tokens'))).to.equal(false);
    expect(existsSync(join(hosts.first, 'train.tokens'))).to.equal(true);
    for (const token of ['', 'wrong']) expect((await hosts.get('/store/runs/alone/train', token)).status).to.equal(401);
    expect((await hosts.get('/store/runs/alone/train', STORE_TOKEN)).status).to.equal(200);
    expect((await hosts.get('/api/runs', STORE_TOKEN)).status).to.equal(401);
  });

  it('a run gives the same bits and the same checkpoint, with one worker and with two', async () => {
    for (const parallelism of [1, 2]) {
      const record = await (await hosts.client.train(spec(`apart-${parallelism}`, { parallelism }))).wait();
      expect(record.weightsDigest).to.equal(alone.weightsDigest);
      expect(record.validation).to.deep.equal(alone.validation);
      expect((await verifyCheckpoint(record.checkpoint!.directory)).step).to.equal(16);
      const expected = contentsOf(alone) as Record<string, unknown>;
      const found = contentsOf(record) as Record<string, unknown>;
      const state = (expected['training/state.json'] as string).replace('"parallelism": 1', `"parallelism": ${parallelism}`);
      expect(found).to.deep.equal({ ...expected, 'training/state.json': state });
    }
  });

  it('a checkpoint of a run is evaluated through the store; other paths are refused in words', async () => {
    const data = join(hosts.first, 'validation.tokens');
    const result = await hosts.client.eval({ checkpoint: alone.checkpoint!.directory, data, sequences: 8, sequenceLength: 32 });
    expect(result.loss).to.be.closeTo(alone.validation!.loss, 1e-6);
    for (const request of [
      { checkpoint: alone.checkpoint!.directory, data: join(hosts.first, 'big.tokens') },
      { checkpoint: join(hosts.first, 'elsewhere', 'alone', 'checkpoints', 'step-16'), data },
    ]) {
      const failure = await hosts.client.eval(request).then(() => null, (error: Error) => error);
      expect(failure).to.have.property('code', 'FILE_NOT_FOUND');
      expect(failure!.message).to.include('out of reach');
    }
  });

  it('a link that is cut in the middle of a step changes no bit', async () => {
    const run = await hosts.client.train(spec('cut-step', { steps: 16, parallelism: 2 }));
    let cutting: Promise<void> | undefined;
    for await (const event of run.events()) if (event.type === 'step' && event.report.step === 5) cutting ??= cut();
    await cutting;
    const record = await run.wait();
    expect(record.weightsDigest).to.equal(alone.weightsDigest);
    expect(record.faults.length + record.epoch).to.be.above(0);
  });

  it('a download that is cut goes on where it stood', async () => {
    const before = await hosts.moved();
    const { size } = statSync(join(hosts.first, 'big.tokens'));
    hosts.slow('second', 24);
    const run = await hosts.client.train(big('cut-download'));
    await until('a third of the download', async () => (await hosts.moved()).sent - before.sent > size / 3);
    await cut();
    hosts.slow('second', null);
    const record = await run.wait();
    expect(record.weightsDigest).to.equal(bigAlone.weightsDigest);
    const fetched = /train of run cut-download fetched, (\d+) of (\d+) bytes/.exec(there.output())!;
    expect(Number(fetched[2])).to.equal(size);
    expect(Number(fetched[1]), 'bytes of the last attempt').to.be.below(size);
    // What was on its way when the link was cut had been sent, and is sent once more: the buffers of one connection.
    expect((await hosts.moved()).sent - before.sent).to.be.below(size + (5 << 20));
  });

  it('a checkpoint whose delivery is cut goes on where it stood, and is complete or absent', async () => {
    const before = await hosts.moved();
    const size = bytesIn(alone);
    hosts.slow('first', 6);
    const run = await hosts.client.train(spec('cut-upload', { checkpoint: { every: 0 } }));
    await until('a third of the delivery', async () => (await hosts.moved()).received - before.received > size / 3);
    expect((await run.record()).checkpoint).to.equal(null);
    expect(existsSync(join(hosts.config.runs, 'cut-upload', 'checkpoints', 'step-16'))).to.equal(false);
    await cut();
    hosts.slow('first', null);
    const record = await run.wait();
    expect(record.weightsDigest).to.equal(alone.weightsDigest);
    expect((await verifyCheckpoint(record.checkpoint!.directory)).step).to.equal(16);
    expect(readdirSync(join(hosts.config.runs, 'cut-upload', 'checkpoints'))).to.deep.equal(['step-16']);
    expect((await hosts.moved()).received - before.received).to.equal(bytesIn(record));
  });
});
