/** What `status` prints of a run with a past: attempts, faults by code, the newest of them, all within 80 columns. */
import { stripVTControlCharacters } from 'node:util';
import { expect } from 'chai';
import { describeRun } from '../../cli/commands/runs.ts';
import type { RunRecord } from '../../config/messages.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import { beginAttempt, changeAttempt, endAttempt, failedRecord, openAttempt, retriedRecord } from '../../orchestrator/attempts.ts';
import { queuedRecord } from '../../orchestrator/run-state.ts';

const spec = parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't' }, steps: 30, batch: { sequences: 1, sequenceLength: 8 } });
const error = { code: 'DEVICE_MEMORY', message: 'the model and its activations need 81 GB and there are 80 GB; lower batch.sequences, or use recompute layer', context: {} } as const;
const past = (): RunRecord => {
  const faults = Array.from({ length: 30 }, (_, index) => ({
    atMs: 1_000 * index, what: `steps ${index} to 30 (a-run-with-a-rather-long-name.3.steps.${index}.0)`, worker: index % 2 === 0 ? 'host-1-1234-0' : null,
    error: { code: index % 3 === 0 ? 'WORKER_LOST' : 'TIMEOUT', message: `something that takes quite some words to say happened, number ${index}`, context: {} } as const,
  }));
  const record = { ...queuedRecord('r', spec, 0), step: 12, faults, faultCounts: { WORKER_LOST: 41, TIMEOUT: 800 } };
  return { ...retriedRecord(failedRecord({ ...record, phase: 'running' }, error, 5_000)), phase: 'failed', error };
};

describe('cli: status', () => {
  const lines = describeRun(past()).map(stripVTControlCharacters);
  const text = lines.join('\n');

  it('fits 80 columns', () => {
    for (const line of lines) expect(line.length, line).to.be.at.most(80);
  });

  it('tells of attempts, of faults by code, and of the newest ten with time, place and cause', () => {
    expect(text).to.match(/attempt 1 +1970-01-01 00:00:05 steps 12 to 12, .* failed,\s+DEVICE_MEMORY/);
    expect(text).to.match(/800 TIMEOUT, 41 WORKER_LOST; the last 10/);
    expect(lines.filter((line) => line.startsWith('fault ')).length).to.equal(10);
    expect(text.replaceAll(/\s+/g, ' ')).to.include('1970-01-01 00:00:28 steps 28 to 30 (a-run-with-a-rather-long-name.3.steps.28.0) on host-1-1234-0: TIMEOUT: something');
  });

  it('says nothing of attempts and faults where there were none', () => {
    expect(describeRun(queuedRecord('r', spec, 0)).join('\n')).not.to.match(/attempt|fault/);
  });
});

describe('attempts of a run', () => {
  it('one goes on at a time; only that one changes, and an end is final', () => {
    const one = beginAttempt([], { fromStep: 3, atMs: 1 });
    expect(beginAttempt(one, { fromStep: 9, atMs: 2 })).to.equal(one);
    expect(openAttempt(one)).to.include({ number: 1, fromStep: 3, phase: 'running' });
    const ended = endAttempt(one, { phase: 'cancelled', toStep: 7, atMs: 5, error: null });
    expect(openAttempt(ended)).to.equal(null);
    expect(changeAttempt(ended, () => ({ toStep: 99 }))).to.equal(ended);
    expect(beginAttempt(ended, { fromStep: 5, atMs: 8 }).map(({ number, toStep }) => [number, toStep])).to.deep.equal([[1, 7], [2, 5]]);
  });

  it('are kept up to a bound, and their numbers go on', () => {
    let attempts: RunRecord['attempts'] = [];
    for (let at = 1; at <= 70; at++) attempts = endAttempt(beginAttempt(attempts, { fromStep: at, atMs: at }), { phase: 'failed', toStep: at, atMs: at, error });
    expect(attempts).to.have.length(50);
    expect(attempts.at(-1)!.number).to.equal(70);
  });

  it('a retry raises the epoch and forgets how the run ended, not what it did', () => {
    const failed = failedRecord({ ...queuedRecord('r', spec, 0), step: 4, epoch: 6 }, error, 9);
    expect(failed).to.deep.include({ phase: 'failed', error, finishedAtMs: 9 });
    expect(retriedRecord(failed)).to.deep.include({ phase: 'queued', epoch: 7, step: 4, error: null, finishedAtMs: null, attempts: failed.attempts });
  });
});
