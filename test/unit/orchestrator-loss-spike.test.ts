/** The rule about losses that rise too far: what it depends on, where it leads, and that a file of metrics tells it as it was. */
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import fc from 'fast-check';
import { describeRun, oldness, pastEvents } from '../../cli/commands/runs.ts';
import { eventLine } from '../../cli/follow.ts';
import { errorCode } from '../../config/errors.ts';
import type { Rollback, RunEvent, StepReport } from '../../config/messages.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import { UNWATCHED, afterRollback, oldestTarget, spikeOf, watchLoss } from '../../orchestrator/loss-spike.ts';
import type { LossWatch } from '../../orchestrator/loss-spike.ts';
import { RunMetrics } from '../../orchestrator/metrics.ts';
import { checkpointsToDelete } from '../../orchestrator/plan.ts';
import { rebuild } from '../../orchestrator/restore.ts';
import { claimDirectory } from '../../orchestrator/run-directory.ts';
import { Histories } from '../../orchestrator/server/history.ts';
import { prometheusText } from '../../orchestrator/server/prometheus.ts';
import { report as anyReport } from '../support/machine-table.ts';

const specOf = (lossSpike: RunSpecInput['lossSpike'], every = 4): RunSpec =>
  parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't' }, steps: 100, batch: { sequences: 1, sequenceLength: 8 }, checkpoint: { every }, lossSpike });
const report = (step: number, loss: number | null, skipped = false): StepReport => anyReport(step, { loss, skipped, targetTokens: 8 });
const watch = (spec: RunSpec, losses: readonly (number | null)[], from: LossWatch = UNWATCHED, at = 0): LossWatch =>
  losses.reduce<LossWatch>((state, loss, index) => watchLoss(spec, state, report(at + index + 1, loss)), from);

const anyRules = fc.record({ factor: fc.constantFrom(1.5, 2, 3), window: fc.integer({ min: 1, max: 6 }), patience: fc.integer({ min: 1, max: 4 }) });
const between = (min: number, max: number, weight: number): { arbitrary: fc.Arbitrary<number>; weight: number } => ({ arbitrary: fc.double({ min, max, noNaN: true }), weight });
const anyLosses = fc.array(fc.oneof(between(0.5, 2, 4), between(2, 20, 2), { arbitrary: fc.constant(null), weight: 1 }), { maxLength: 60 });

describe('loss spikes', () => {
  it('are told by the median of the steps before, after so many in a row, and not before there are enough to compare with', () => {
    const spec = specOf({ factor: 2, window: 3, patience: 2 });
    expect(spikeOf(spec, watch(spec, [9, 99, 999]))).to.equal(null);
    // Median of 1, 1.2, 1.1 is 1.1: 2.2 is not above twice of it.
    expect(spikeOf(spec, watch(spec, [1, 1.2, 1.1, 2.2, 9]))).to.equal(null);
    expect(spikeOf(spec, watch(spec, [1, 1.2, 1.1, 8, 1, 9]))).to.equal(null);
    expect(spikeOf(spec, watch(spec, [1, 1.2, 1.1, 8, 9]))).to.deep.equal({ loss: 9, threshold: 2.2, toStep: 0 });
    // A step that was skipped is neither calm nor above.
    expect(spikeOf(spec, watch(spec, [1, 1.2, 1.1, 8, null, 9]))).to.deep.include({ loss: 9 });
    const skipped = watchLoss(spec, watch(spec, [1, 1.2, 1.1, 8]), report(5, 99, true));
    expect(spikeOf(spec, skipped)).to.equal(null);
    // An even window has a median between two.
    const even = specOf({ factor: 2, window: 2, patience: 1 });
    expect(spikeOf(even, watch(even, [1, 2, 3.01]))).to.deep.equal({ loss: 3.01, threshold: 3, toStep: 0 });
  });

  it('lead to the newest checkpoint step before the first step above, whatever multiple was passed since', () => {
    const spec = specOf({ factor: 2, window: 2, patience: 3 });
    const calm = (count: number): number[] => Array.from({ length: count }, () => 1);
    const cases: [number, number][] = [[3, 0], [4, 4], [5, 4], [6, 4], [7, 4], [8, 8]];
    for (const [before, toStep] of cases) expect(spikeOf(spec, watch(spec, [...calm(before), 9, 9, 9]))?.toStep, `after ${before}`).to.equal(toStep);
    expect(spikeOf(specOf({ factor: 2, window: 2, patience: 3 }, 0), watch(spec, [...calm(9), 9, 9, 9]))).to.not.equal(null);
    const unbroken = specOf({ factor: 2, window: 2, patience: 3 }, 0);
    expect(spikeOf(unbroken, watch(unbroken, [...calm(9), 9, 9, 9]))?.toStep).to.equal(0);
  });

  it('never come while the factor is 0', () => {
    fc.assert(fc.property(anyLosses, (losses) => {
      const spec = specOf({});
      expect(spec.lossSpike.factor).to.equal(0);
      expect(watch(spec, losses)).to.equal(UNWATCHED);
      expect(oldestTarget(spec, UNWATCHED, losses.length)).to.equal(null);
    }));
  });

  it('leave nothing of an abandoned branch behind: what follows a rollback is as if the branch had begun there', () => {
    fc.assert(fc.property(anyRules, fc.nat(7), anyLosses, anyLosses, (rules, every, losses, then) => {
      const spec = specOf(rules, every);
      let state = UNWATCHED;
      for (const [index, loss] of losses.entries()) {
        const target = oldestTarget(spec, state, index)!;
        state = watchLoss(spec, state, report(index + 1, loss));
        const spike = spikeOf(spec, state);
        if (spike === null) continue;
        // What retention was told to keep is what the run goes back to, however long the spike took to be one.
        if (rules.patience > 1) expect(spike.toStep).to.equal(target);
        const { toStep } = spike;
        expect(every === 0 ? 0 : toStep % every).to.equal(0);
        const short = { ...watch(spec, losses.slice(0, toStep)), above: 0 };
        for (let at = 0, back = afterRollback(state), fresh = short; at < then.length; at++) {
          back = watchLoss(spec, back, report(toStep + at + 1, then[at]!));
          fresh = watchLoss(spec, fresh, report(toStep + at + 1, then[at]!));
          expect(spikeOf(spec, back)).to.deep.equal(spikeOf(spec, fresh));
          expect(oldestTarget(spec, back, toStep + at + 1)).to.equal(oldestTarget(spec, fresh, toStep + at + 1));
          if (spikeOf(spec, back) !== null) expect(spikeOf(spec, back)!.toStep).to.be.at.least(toStep);
        }
        return;
      }
    }), { numRuns: 300 });
  });

  it('keep the checkpoint that a rollback may need, or the newest before it', () => {
    const spec = parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't' }, steps: 99, batch: { sequences: 1, sequenceLength: 8 }, checkpoint: { every: 4, keep: 1 } });
    const places = [2, 4, 6, 7].map((step) => ({ directory: `step-${step}`, step }));
    const deleted = (target: number | null): number[] => checkpointsToDelete(spec, places, target).map(({ step }) => step);
    expect(deleted(null)).to.deep.equal([2, 4, 6]);
    expect(deleted(4)).to.deep.equal([2, 6]);
    expect(deleted(3)).to.deep.equal([4, 6]);
    expect(deleted(0)).to.deep.equal([2, 4, 6]);
  });

  it('have bounds in the spec', () => {
    for (const lossSpike of [{ factor: 1 }, { factor: 0.5 }, { factor: -1 }, { factor: 2, window: 0 }, { factor: 2, window: 1001 }, { patience: 0 }, { maxRollbacks: 101 }, { nonsense: 1 }]) {
      let caught: unknown;
      try {
        specOf(lossSpike);
      } catch (error) {
        caught = error;
      }
      expect(errorCode(caught), JSON.stringify(lossSpike)).to.equal('SPEC_INVALID');
    }
  });
});

describe('metrics of a run that was rolled back', () => {
  let directory: string;
  beforeEach(() => (directory = mkdtempSync(join(tmpdir(), 'nn-rollback-'))));
  afterEach(() => rmSync(directory, { recursive: true }));
  const spec = specOf({ factor: 2, window: 2, patience: 1 });
  const counts = { waiting: 0, active: 0, delayed: 0, failed: 0, completed: 0 };
  const rollback: Rollback = { atMs: 7, branch: 1, fromStep: 6, toStep: 4, epoch: 3, loss: 9, threshold: 2 };
  const step = (at: number, loss: number, skipped = false) => ({ type: 'step', atMs: at, epoch: 0, tokensPerSecond: 10, report: report(at, loss, skipped) }) as const;

  it('tell each step of each branch once, and recovery what counts and what was being watched', () => {
    const before = new RunMetrics(directory, 0, spec);
    for (const at of [1, 2, 3, 4, 5]) before.append(step(at, 1, at === 5));
    before.append({ type: 'eval', atMs: 1, step: 4, loss: 2 });
    before.append({ type: 'eval', atMs: 1, step: 5, loss: 2.5 });
    before.append(step(6, 9));
    before.append({ type: 'rollback', ...rollback });
    for (const at of [4, 5, 5]) before.append(step(at, 1.5));
    before.append({ type: 'eval', atMs: 2, step: 5, loss: 2.25, branch: 1 });
    before.close();
    const lines = (file: string): Record<string, unknown>[] => readFileSync(join(directory, file), 'utf8').trim().split('\n').map((text) => JSON.parse(text) as Record<string, unknown>);
    expect(lines('metrics.jsonl').map((line) => line['step'] ?? line['type'])).to.deep.equal([1, 2, 3, 4, 5, 6, 'rollback', 5]);
    expect(lines('metrics.jsonl')[6]).to.deep.equal({ type: 'rollback', ...rollback });
    expect(lines('evals.jsonl').map(({ step: at, branch }) => [at, branch ?? 0])).to.deep.equal([[4, 0], [5, 0], [5, 1]]);

    const after = new RunMetrics(directory, 1, spec);
    expect(after.counted).to.deep.include({ step: 5, lastReport: report(5, 1.5), skippedInARow: 0, lastEvalStep: 5 });
    expect(after.counted!.branch!.rollbacks).to.deep.equal([rollback]);
    expect(after.counted!.branch!.lossWatch.recent).to.deep.equal([1, 1.5]);
    after.append(step(6, 9));
    after.close();
    // Nobody had the time to write the second rollback down: the rule says again that one is due.
    const again = new RunMetrics(directory, 2, spec);
    expect(spikeOf(spec, again.counted!.branch!.lossWatch)).to.deep.equal({ loss: 9, threshold: 2.5, toStep: 4 });
    again.close();
  });

  it('are printed in the order in which they came, each eval on its branch, and then what is new of the stream', () => {
    const metrics = new RunMetrics(directory, 0);
    metrics.append({ type: 'eval', atMs: 0, step: 0, loss: 7 });
    for (const at of [1, 2, 3, 4, 5, 6]) {
      metrics.append(step(at, 1));
      if (at === 5) metrics.append({ type: 'eval', atMs: 5, step: 5, loss: 3 });
    }
    metrics.append({ type: 'rollback', ...rollback });
    metrics.append({ ...step(5, 2), atMs: 8 });
    metrics.append({ type: 'eval', atMs: 8, step: 5, loss: 2, branch: 1 });
    metrics.close();
    const past = pastEvents(directory);
    const shown = (event: RunEvent): string => (event.type === 'step' ? `${event.report.step}` : event.type === 'eval' ? `eval ${event.step} ${event.loss}` : event.type);
    expect(past.map(shown)).to.deep.equal(['eval 0 7', '1', '2', '3', '4', '5', 'eval 5 3', '6', 'rollback', '5', 'eval 5 2']);
    expect(past.map(eventLine)[8]).to.equal('back from step 6 to step 4: the loss 9.000 was above 2.000');
    const isOld = oldness(past);
    for (const event of past) expect(isOld(event), shown(event)).to.equal(true);
    const stepAt = (at: number, atMs: number): RunEvent => ({ type: 'step', report: report(at, 1), tokensPerSecond: 1, atMs });
    expect(isOld(stepAt(6, 9))).to.equal(false);
    // Another rollback, heard and not read: its steps come again.
    expect(isOld({ type: 'rollback', ...rollback, branch: 2, atMs: 10 })).to.equal(false);
    expect([isOld(stepAt(5, 11)), isOld({ type: 'eval', step: 5, loss: 1, atMs: 11 })]).to.deep.equal([false, false]);
  });

  it('rebuild the record of the present branch, and no checkpoint of another', () => {
    const run = join(directory, 'r');
    claimDirectory(run, spec);
    const metrics = new RunMetrics(run, 0, spec);
    for (const at of [1, 2, 3, 4, 5, 6]) metrics.append(step(at, at === 6 ? 9 : 1));
    metrics.append({ type: 'rollback', ...rollback });
    metrics.append(step(5, 1));
    metrics.close();
    for (const name of ['step-4', 'step-6']) mkdirSync(join(run, 'checkpoints', name), { recursive: true });
    const { record } = rebuild(run);
    expect(record).to.deep.include({ phase: 'queued', step: 5, rollbacks: [rollback], checkpoint: { directory: join(run, 'checkpoints', 'step-4'), step: 4 } });
    expect(record.epoch).to.be.above(rollback.epoch);
    const text = prometheusText([{ ...record, phase: 'running' }], [], { runs: counts, train: counts, eval: counts, generate: counts }, { sentBytes: 0, receivedBytes: 0 });
    expect(text).to.include('nn_run_rollbacks{run="r"} 1\n');
    expect(describeRun(record).join('\n')).to.match(/rollbacks +6 to 4/);
  });

  it('have TensorBoard drop what is void', () => {
    const metrics = new RunMetrics(directory, 0);
    metrics.append({ type: 'rollback', ...rollback });
    metrics.close();
    const file = readFileSync(join(directory, readdirSync(directory).find((name) => name.startsWith('events.'))!));
    // tensorflow.Event: step = 5 (field 2), session_log = { status: START } (field 7: a message of field 1).
    expect(file.includes(Buffer.from([0x10, 5, 0x3a, 2, 0x08, 1]))).to.equal(true);
  });

  it('are drawn as the present branch only', () => {
    const metrics = new RunMetrics(directory, 0);
    for (const at of [1, 2, 3, 4, 5, 6]) metrics.append(step(at, at));
    metrics.append({ type: 'rollback', ...rollback });
    metrics.append(step(5, 50));
    metrics.close();
    const { steps, losses } = new Histories(join(directory, '..')).curve(directory.split('/').at(-1)!);
    expect(steps).to.deep.equal([1, 2, 3, 4, 5]);
    expect(losses).to.deep.equal([1, 2, 3, 4, 50]);
  });
});
