/**
 * What the small verbs of the run machine keep together: a job and what its message says, an epoch and its control, a fault and its
 * count, measurements that are smoothed (orchestrator/machine-draft.ts).
 */
import { expect } from 'chai';
import { Table } from '../support/machine-table.ts';

describe('run machine: the faults that the record keeps', () => {
  it('are the newest hundred, of which skipped steps are twenty at most, so that they push out nothing else', () => {
    const table = new Table({ parallelism: 1, steps: 150, maxNonFiniteSteps: 1_000 }, ['a'], { stepsPerJob: 1_000 });
    table.tell({ type: 'fault', what: 'a disk', error: { code: 'DISK_FULL', message: 'full', context: {} } });
    for (let at = 1; at <= 149; at++) table.progress(at, { skipped: true });
    expect(table.faults).to.deep.equal(['DISK_FULL', ...Array.from({ length: 20 }, () => 'NON_FINITE')]);
    expect(table.state.shown.faults.slice(1).map(({ what }) => what)).to.deep.equal(Array.from({ length: 20 }, (_, index) => `step ${130 + index}`));
    expect(table.state.shown.faultCounts).to.deep.equal({ DISK_FULL: 1, NON_FINITE: 149 });
    for (let count = 0; count < 120; count++) table.tell({ type: 'fault', what: `${count}`, error: { code: 'REDIS_UNAVAILABLE', message: 'away', context: {} } });
    expect(table.state.shown.faults.map(({ what }) => what)).to.deep.equal(Array.from({ length: 100 }, (_, index) => `${20 + index}`));
  });
});
