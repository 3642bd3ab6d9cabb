/** What a run writes beside its checkpoints: metrics that survive crashes, charts that TensorBoard reads; and who may ask the server. */
import { appendFileSync, mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { errorCode } from '../../config/errors.ts';
import type { StepReport } from '../../config/messages.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import { FaultLog } from '../../orchestrator/fault-log.ts';
import { RunMetrics } from '../../orchestrator/metrics.ts';
import { claimDirectory } from '../../orchestrator/run-directory.ts';
import { Access, isLoopback } from '../../orchestrator/server/access.ts';
import { Histories } from '../../orchestrator/server/history.ts';
import { prometheusText } from '../../orchestrator/server/prometheus.ts';
import { parseJobId, jobId, queuedRecord } from '../../orchestrator/run-state.ts';
import { crc32c, maskedCrc, scalarEvent } from '../../orchestrator/tensorboard.ts';

const report = (step: number, skipped = false): StepReport => ({
  step, loss: skipped ? null : 8 / step, auxLoss: [1, 3], expertLoad: [[1], [1]], targetTokens: 4, gradientNorm: 1, clipScale: 1, learningRate: 0.5, skipped, nonFinite: null, milliseconds: 2,
});
const line = (step: number, skipped = false) => ({ type: 'step', atMs: 1_000 * step, epoch: 0, tokensPerSecond: 10, report: report(step, skipped) }) as const;

describe('orchestrator: files of a run', () => {
  let directory: string;
  beforeEach(() => (directory = mkdtempSync(join(tmpdir(), 'nn-metrics-'))));
  afterEach(() => rmSync(directory, { recursive: true }));
  const lines = (file: string): unknown[] => readFileSync(join(directory, file), 'utf8').trim().split('\n').map((text) => JSON.parse(text) as unknown);

  it('metrics hold each step once, flat, with its speed; evals lie beside them', () => {
    const metrics = new RunMetrics(directory, 0);
    expect(metrics.counted).to.equal(null);
    for (const step of [1, 2, 2, 1, 3]) metrics.append(line(step));
    metrics.append({ type: 'eval', atMs: 9, step: 0, loss: 7 });
    metrics.append({ type: 'eval', atMs: 9, step: 0, loss: 7 });
    metrics.close();
    expect(lines('metrics.jsonl')).to.deep.equal([1, 2, 3].map((step) => ({ ...report(step), tokensPerSecond: 10, epoch: 0, atMs: 1_000 * step })));
    expect(lines('evals.jsonl')).to.deep.equal([{ step: 0, loss: 7, atMs: 9 }]);
  });

  it('a line that a crash cut off is written again; what was counted is known', () => {
    const before = new RunMetrics(directory, 0);
    before.append(line(1));
    before.append(line(2, true));
    before.append({ type: 'eval', atMs: 9, step: 0, loss: 7 });
    before.close();
    appendFileSync(join(directory, 'metrics.jsonl'), '{"step":3,"lo');
    const after = new RunMetrics(directory, 1);
    expect(after.counted).to.deep.equal({ step: 2, lastReport: report(2, true), skippedInARow: 1, lastEvalStep: 0 });
    after.append(line(2));
    after.append(line(3));
    after.sync();
    after.close();
    expect((lines('metrics.jsonl') as { step: number }[]).map(({ step }) => step)).to.deep.equal([1, 2, 3]);
  });

  it('a damaged line is named', () => {
    appendFileSync(join(directory, 'metrics.jsonl'), '{"step":1}\nrubbish\n');
    expect(() => new RunMetrics(directory, 0)).to.throw(/metrics\.jsonl: line 2 is damaged/);
  });

  it('a directory belongs to one spec', () => {
    const spec = parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't' }, steps: 3, batch: { sequences: 1, sequenceLength: 8 } });
    claimDirectory(join(directory, 'r'), spec);
    claimDirectory(join(directory, 'r'), spec);
    let caught: unknown;
    try {
      claimDirectory(join(directory, 'r'), { ...spec, seed: 1 });
    } catch (error) {
      caught = error;
    }
    expect(errorCode(caught)).to.equal('RUN_EXISTS');
  });

  it('a curve grows with its file and stays bounded', () => {
    const metrics = new RunMetrics(directory, 0);
    const histories = new Histories(join(directory, '..'));
    const run = directory.split('/').at(-1)!;
    for (let step = 1; step <= 10; step++) metrics.append(line(step, step === 5));
    expect(histories.curve(run).steps).to.deep.equal([1, 2, 3, 4, 6, 7, 8, 9, 10]);
    for (let step = 11; step <= 3_000; step++) metrics.append(line(step));
    metrics.close();
    const { steps, losses } = histories.curve(run);
    expect(steps.length).to.equal(losses.length).and.to.be.within(256, 1_024);
    expect(steps.at(-1)).to.be.above(2_990);
    expect(histories.curve('no-such-run')).to.deep.equal({ steps: [], losses: [] });
  });

  it('TensorBoard events are framed with masked crc32c', () => {
    // Test vectors of RFC 3720, B.4.
    expect(crc32c(new Uint8Array(32))).to.equal(0x8a9136aa);
    expect(crc32c(Uint8Array.from({ length: 32 }, (_, index) => index))).to.equal(0x46dd794e);
    const metrics = new RunMetrics(directory, 5_000);
    metrics.append(line(1));
    metrics.append({ type: 'eval', atMs: 9, step: 1, loss: 7 });
    metrics.close();
    const file = readdirSync(directory).find((name) => name.startsWith('events.out.tfevents.5.'))!;
    const bytes = readFileSync(join(directory, file));
    const records: Buffer[] = [];
    for (let at = 0; at < bytes.length; ) {
      const length = Number(bytes.readBigUInt64LE(at));
      expect(bytes.readUInt32LE(at + 8)).to.equal(maskedCrc(bytes.subarray(at, at + 8)));
      const data = bytes.subarray(at + 12, at + 12 + length);
      expect(bytes.readUInt32LE(at + 12 + length)).to.equal(maskedCrc(data));
      records.push(data);
      at += 16 + length;
    }
    expect(records.length).to.equal(3);
    expect(records[0]!.toString('latin1')).to.include('brain.Event:2');
    expect(records[1]!.toString('latin1')).to.include('loss/train').and.to.include('loss/aux').and.to.include('speed/tokens_per_second');
    expect(records[2]).to.deep.equal(scalarEvent(9, 1, { 'loss/validation': 7 }));
    // double 1.5 | step 300 | summary { value { tag "a", simple_value 1 } }, as protoc encodes it.
    expect(scalarEvent(1_500, 300, { a: 1 }).toString('hex')).to.equal('09000000000000f83f10ac022a0a0a080a0161150000803f');
  });
});

describe('orchestrator: faults.jsonl', () => {
  it('tells the next driver of the newest faults, and counts them all', () => {
    const directory = mkdtempSync(join(tmpdir(), 'nn-faults-'));
    try {
      const first = new FaultLog(directory);
      expect(first.before).to.equal(null);
      const place = { attempt: 1, epoch: 0, step: 1 };
      first.append({ atMs: 0, what: 'a disk', worker: null, error: { code: 'DISK_FULL', message: 'full', context: {} } }, place);
      for (let at = 1; at <= 149; at++) first.append({ atMs: at, what: `step ${at}`, worker: null, error: { code: 'NON_FINITE', message: 'NaN', context: { step: at } } }, place);
      first.close();
      const next = new FaultLog(directory);
      expect(next.before!.faultCounts).to.deep.equal({ DISK_FULL: 1, NON_FINITE: 149 });
      expect(next.before!.faults.map(({ what }) => what)).to.deep.equal(['a disk', ...Array.from({ length: 20 }, (_, index) => `step ${130 + index}`)]);
      next.close();
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});

describe('orchestrator: ids and metrics text', () => {
  it('an id says run, epoch, job and step, also for names with dots and numbers', () => {
    for (const run of ['a', 'a.1', 'a.0.steps.5.0', '2026-01.b_c']) {
      const parts = { run, epoch: 3, name: 'shard', step: 12, part: 4 } as const;
      expect(parseJobId(jobId(run, 3, 'shard', 12, 4))).to.deep.equal(parts);
    }
    for (const id of ['request.1', 'run.a', 'a.1.2.3.4', '']) expect(parseJobId(id)).to.equal(null);
  });

  it('Prometheus gets live runs one by one, others by phase, with labels escaped', () => {
    const spec = parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't' }, steps: 3, batch: { sequences: 1, sequenceLength: 8 } });
    const counts = { waiting: 1, active: 0, delayed: 0, failed: 0, completed: 0 };
    const runs = [{ ...queuedRecord('a"b\\', spec, 0), phase: 'running', step: 2 } as const, { ...queuedRecord('old', spec, 0), phase: 'completed' } as const];
    const text = prometheusText(runs, [], { runs: counts, train: counts, eval: counts, generate: counts }, { sentBytes: 1, receivedBytes: 2 });
    expect(text).to.include('nn_run_step{run="a\\"b\\\\"} 2\n').and.to.include('nn_runs{phase="completed"} 1\n').and.not.to.include('old');
    expect(text).to.include('nn_queue_jobs{queue="train",state="waiting"} 1\n').and.not.to.include('NaN').and.not.to.include('null');
  });
});

describe('server: who may ask', () => {
  const facts = { method: 'GET', host: 'localhost:7077', origin: undefined, fetchSite: undefined, authorization: undefined, cookie: undefined };

  it('knows what is this machine', () => {
    for (const host of ['127.0.0.1', '127.9.9.9', 'localhost', 'a.localhost', '::1', '[::1]']) expect(isLoopback(host), host).to.equal(true);
    for (const host of ['0.0.0.0', '::', '10.0.0.1', '127.0.0.1.evil.example', 'evil', '']) expect(isLoopback(host), host).to.equal(false);
  });

  it('on loopback answers to its own names only', () => {
    const access = new Access('127.0.0.1', '');
    for (const host of ['localhost', 'localhost:1', '127.0.0.1:7077', '[::1]:7077']) expect(access.fromHere({ ...facts, host }).allowed, host).to.equal(true);
    for (const host of [undefined, '', 'evil.example', 'localhost.evil.example:7077', '127.0.0.1@evil']) expect(access.fromHere({ ...facts, host }).allowed, String(host)).to.equal(false);
  });

  it('lets other origins read nothing new and write nothing', () => {
    const access = new Access('127.0.0.1', '');
    const post = { ...facts, method: 'POST' };
    for (const good of [post, { ...post, origin: 'http://localhost:7077' }, { ...post, fetchSite: 'same-origin' }]) expect(access.fromHere(good).allowed).to.equal(true);
    for (const bad of [{ ...post, origin: 'http://localhost:1' }, { ...post, origin: 'null' }, { ...post, origin: 'nonsense' }, { ...post, fetchSite: 'same-site' }]) {
      expect(access.fromHere(bad).allowed).to.equal(false);
    }
  });

  it('takes the token or the cookie of a login, and no other', () => {
    const access = new Access('0.0.0.0', 'sixteen characters');
    const cookie = access.sessionCookie().split(';')[0]!;
    for (const good of [{ ...facts, authorization: 'Bearer sixteen characters' }, { ...facts, cookie: `x=1; ${cookie}` }]) expect(access.knows(good).allowed).to.equal(true);
    const other = new Access('0.0.0.0', 'sixteen characters').sessionCookie().split(';')[0]!;
    for (const bad of [facts, { ...facts, authorization: 'Bearer sixteen' }, { ...facts, authorization: 'sixteen characters' }, { ...facts, cookie: other }]) {
      expect(access.knows(bad).allowed).to.equal(false);
    }
  });
});
