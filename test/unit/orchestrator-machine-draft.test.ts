/**
 * What the small verbs of the run machine keep together: a job and what its message says, an epoch and its control, a fault and its
 * count, measurements that are smoothed (orchestrator/machine-draft.ts).
 */
import { expect } from 'chai';
import { parseJobId } from '../../orchestrator/run-state.ts';
import { TIMINGS, Table, hex } from '../support/machine-table.ts';

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

describe('run machine: the jobs that it adds', () => {
  it('say what they rest on: the epoch, the newest checkpoint, what is to be done; in the run\'s priority', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 }, priority: 7 }, ['a']);
    table.completeSteps(3).saved().completeSteps(3).saved();
    const { spec } = table.state.settings;
    const { id, data, ...rest } = table.last('steps');
    expect(rest).to.deep.equal({ queue: 'train', worker: 'a', name: 'steps', priority: 7 });
    expect(parseJobId(id)).to.deep.equal({ run: 'r', epoch: 0, name: 'steps', step: 6, part: 0 });
    expect(data).to.deep.equal({ run: 'r', epoch: 0, checkpoint: { directory: 'c/step-6', step: 6 }, spec, fromStep: 6, stepCount: 3 });
  });

  it('of an eval go to its own queue, to the worker whose replica stands there', () => {
    const table = new Table({ parallelism: 1, data: { train: 't', validation: 'v' } }, ['a']);
    expect(table.last('eval')).to.include({ queue: 'eval', worker: 'a' });
    expect(table.last('eval').data).to.deep.include({ data: 'v', checkpoint: null }).and.to.have.nested.property('replica.step', 0);
  });

  it('of a flow go round among its workers, or to the queue of all when nobody else is there', () => {
    const batch = { shards: 3, sequences: 1, sequenceLength: 4 };
    const places = (workers: string[]): (string | null)[] => {
      const table = new Table({ batch, parallelism: 2 }, workers);
      return [table.last('reduce').worker, ...[0, 1, 2].map((shard) => table.shardJob(shard).worker)];
    };
    expect(places(['a', 'b', 'c'])).to.deep.equal(['a', 'a', 'b', 'a']);
    expect(places(['a', 'b'])).to.deep.equal([null, null, null, null]);
  });

  it('are in the history: from which version on, to which, by whom', () => {
    const jobs = (table: Table): object[] => table.all('history').flatMap(({ event }) => (event.type === 'job' ? [event] : []));
    expect(jobs(new Table({ parallelism: 1 }, ['a'], { stepsPerJob: 4 }).completeSteps(4)).at(-1)).to.deep.equal({
      type: 'job', atMs: 0, epoch: 0, kind: 'steps', from: 4, through: 8, workers: ['a'],
    });
    expect(jobs(new Table({}, ['a', 'b']).completeReduce()).at(-1)).to.deep.include({ kind: 'flow', from: 1, through: 2, workers: ['a', 'b'] });
  });
});

describe('run machine: what was measured', () => {
  it('a shard\'s time is smoothed, by the shard whoever computed how many; nonsense is not heard', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const measured = (): number | null => table.state.measurements.shardComputeMs;
    expect(table.progress(1, { milliseconds: 0 }).state.measurements.shardComputeMs).to.equal(null);
    // A step has two shards.
    table.progress(2, { milliseconds: 20 });
    expect(measured()).to.equal(10);
    table.progress(3, { milliseconds: 40 });
    expect(measured()).to.be.closeTo(13, 1e-9);
    table.completeSteps(5, { timings: { ...TIMINGS, computeMs: 330 } });
    expect(measured()).to.be.closeTo(19, 1e-9);
    const flow = new Table({}, ['a', 'b']).completeShard(0, hex('1'), 'a', undefined, { timings: { ...TIMINGS, computeMs: 5 } });
    expect(flow.state.measurements.shardComputeMs).to.equal(5);
  });

  it('the exchange\'s speed is smoothed, of a shard by its gradient, of a sum by all that it read and wrote', () => {
    const table = new Table({}, ['a', 'b']);
    const shard = (bytes: number, exchangeMs: number): Table => table.completeShard(0, hex('1'), 'a', undefined, { bytes, timings: { ...TIMINGS, exchangeMs } });
    expect(shard(0, 1).state.measurements.exchangeBytesPerMs).to.equal(null);
    expect(shard(100, 0).state.measurements.exchangeBytesPerMs).to.equal(null);
    expect(shard(100, 10).state.measurements.exchangeBytesPerMs).to.equal(10);
    table.completeReduce('a', undefined, { bytes: 100, timings: { ...TIMINGS, exchangeMs: 15 } });
    expect(table.state.measurements.exchangeBytesPerMs).to.be.closeTo(13, 1e-9);
  });
});

describe('run machine: what is told of it', () => {
  it('a fault is counted, written to the history and published, with the worker that it names, or else the job\'s', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const job = table.last('steps');
    table.fail(job, 'TIMEOUT').tell({ type: 'fault', what: 'a disk', error: { code: 'TIMEOUT', message: 'slow', context: { worker: 'z' } } });
    expect(table.state.shown.faultCounts).to.deep.equal({ TIMEOUT: 2 });
    expect(table.state.shown.faults.map(({ worker: by }) => by)).to.deep.equal(['a', 'z']);
    expect(table.all('history').filter(({ event }) => event.type === 'fault').map(({ event }) => event)).to.deep.equal([
      { type: 'fault', atMs: 0, epoch: 0, what: `steps 1 to 9 (${job.id})`, code: 'TIMEOUT' }, { type: 'fault', atMs: 0, epoch: 1, what: 'a disk', code: 'TIMEOUT' },
    ]);
    expect(table.all('publish').filter(({ event }) => event.type === 'fault').map(({ event }) => event)).to.deep.equal(
      table.state.shown.faults.map((fault) => ({ type: 'fault', ...fault })),
    );
  });

  it('an epoch goes to the workers and to the history, a phase to the history and to whoever listens', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    table.fail(table.last('steps'), 'TIMEOUT').wish('pause').completeSteps(0);
    expect(table.all('control').map(({ control }) => control)).to.deep.equal([
      { epoch: 0, command: 'run' }, { epoch: 1, command: 'run' }, { epoch: 1, command: 'stop' }, { epoch: 2, command: 'stop' },
    ]);
    const noted = table.all('history').map(({ event }) => event);
    expect(noted.flatMap((event) => (event.type === 'epoch' ? [event.epoch] : []))).to.deep.equal([1, 2]);
    const phases = ['running', 'pausing', 'paused'];
    expect(noted.flatMap((event) => (event.type === 'phase' ? [event.phase] : []))).to.deep.equal(phases);
    expect(table.all('publish').flatMap(({ event }) => (event.type === 'phase' ? [event.phase] : []))).to.deep.equal(phases);
    expect(table.all('release')).to.deep.equal([{ type: 'release', workers: ['a'] }]);
  });
});
