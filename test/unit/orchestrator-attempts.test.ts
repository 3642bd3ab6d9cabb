/** The attempts of a run as its record tells them: one at a time, numbered, the newest fifty, and what of a record another attempt keeps. */
import { expect } from 'chai';
import { beginAttempt, endAttempt, openAttempt, retriedRecord, spend, timeLimit } from '../../orchestrator/attempts.ts';
import { recordOf } from '../../orchestrator/run-state.ts';
import { Table } from '../support/machine-table.ts';

const end = { phase: 'failed', toStep: 3, atMs: 5, error: null } as const;

describe('attempts of a run', () => {
  it('go on through a change of orchestrators, and are numbered on when the last one ended', () => {
    const first = beginAttempt([], { fromStep: 0, atMs: 1 });
    expect(beginAttempt(first, { fromStep: 2, atMs: 9 })).to.equal(first);
    const ended = endAttempt(first, end);
    expect(openAttempt(ended)).to.equal(null);
    expect(endAttempt(ended, { ...end, atMs: 8 })).to.equal(ended);
    const second = beginAttempt(ended, { fromStep: 3, atMs: 6 });
    expect(second.map(({ number, fromStep, toStep, endedAtMs }) => [number, fromStep, toStep, endedAtMs])).to.deep.equal([[1, 0, 3, 5], [2, 3, 3, null]]);
  });

  it('are kept up to fifty, the newest', () => {
    let attempts = beginAttempt([], { fromStep: 0, atMs: 0 });
    for (let count = 2; count <= 60; count++) attempts = beginAttempt(endAttempt(attempts, end), { fromStep: 3, atMs: 0 });
    expect(attempts.map(({ number }) => number)).to.deep.equal(Array.from({ length: 50 }, (_, index) => 11 + index));
  });

  it('have their own time, which alone is limited; the run has the time of all', () => {
    const ended = endAttempt(beginAttempt([], { fromStep: 0, atMs: 0 }), end);
    const again = spend({ attempts: beginAttempt(ended, { fromStep: 3, atMs: 6 }), runningMs: 100 }, 40);
    expect(again.attempts.map(({ runningMs }) => runningMs)).to.deep.equal([0, 40]);
    expect(again.runningMs).to.equal(140);
    const { spec } = new Table({ maxDurationSeconds: 2 }, ['a']).state.settings;
    expect([1_999, 2_000].map((runningMs) => timeLimit(spec, runningMs)?.code)).to.deep.equal([undefined, 'TIME_LIMIT']);
    expect(timeLimit({ ...spec, maxDurationSeconds: 0 }, 1e9)).to.equal(null);
  });

  it('that are to come begin with an epoch above that of every job before, and without the end of the last', () => {
    const table = new Table({ parallelism: 1 }, ['a']).progress(1);
    const record = recordOf(table.fail(table.last('steps'), 'DEVICE_MEMORY').state);
    expect(record).to.include({ phase: 'failed', epoch: 1 });
    expect(retriedRecord(record)).to.deep.include({ phase: 'queued', epoch: 2, step: 1, error: null, finishedAtMs: null, way: null, attempts: record.attempts });
    const next = new Table({ parallelism: 1 }, ['a'], {}, { epoch: 1, command: 'stop' }, 0, { record: retriedRecord(record) });
    next.now = 9;
    next.tell({ type: 'ready' });
    expect(next.state).to.include({ phase: 'running', step: 1 });
    expect(next.state.epoch).to.be.at.least(2);
    expect(next.state.shown).to.include({ startedAtMs: 0 });
    expect(next.state.shown.attempts.map(({ number, startedAtMs }) => [number, startedAtMs])).to.deep.equal([[1, 0], [2, 9]]);
  });
});
