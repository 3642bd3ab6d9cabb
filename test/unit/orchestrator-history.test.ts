/** The history of a run: the file keeps every line and belongs to one writer; the checker finds each kind of broken promise. */
import { appendFileSync, mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { History } from '../../orchestrator/history.ts';
import type { HistoryLine } from '../../orchestrator/history.ts';
import { LineFile } from '../../orchestrator/line-file.ts';
import type { HistoryEvent } from '../../orchestrator/run-state.ts';
import { checkHistory, readHistory } from '../support/history.ts';
import type { HistoryVerdict } from '../support/history.ts';

const epochEvent = (epoch: number): HistoryEvent => ({ type: 'epoch', atMs: 0, epoch });

describe('orchestrator: the history file', () => {
  let directory: string;
  beforeEach(() => (directory = mkdtempSync(join(tmpdir(), 'nn-history-'))));
  afterEach(() => rmSync(directory, { recursive: true }));

  it('keeps every line of every driver, doubles too, and cuts off one that was not written whole', () => {
    const first = new History(directory, '11111111-rest');
    for (const epoch of [1, 1, 0]) first.append(epochEvent(epoch));
    first.close();
    appendFileSync(join(directory, 'history.jsonl'), '{"driver":"111');
    const second = new History(directory, '22222222-rest');
    second.append(epochEvent(7));
    second.sync();
    second.close();
    expect(readHistory(directory).map(({ driver, epoch }) => [driver, epoch])).to.deep.equal([['11111111', 1], ['11111111', 1], ['11111111', 0], ['22222222', 7]]);
    expect(readdirSync(directory)).to.deep.equal(['history.jsonl']);
  });

  it('is bounded: two files of the given size', () => {
    const history = new History(directory, 'driver', 1_000);
    for (let epoch = 0; epoch < 100; epoch++) history.append(epochEvent(epoch));
    history.close();
    expect(readdirSync(directory).sort()).to.deep.equal(['history.1.jsonl', 'history.jsonl']);
    for (const name of readdirSync(directory)) expect(readFileSync(join(directory, name)).length).to.be.below(1_100);
    const epochs = readHistory(directory).map(({ epoch }) => epoch);
    expect(epochs.at(-1)).to.equal(99);
    expect(epochs).to.deep.equal(epochs.map((_, index) => epochs[0]! + index));
  });

  it('belongs to who opened it last: a writer that wakes up late changes nothing', () => {
    const path = join(directory, 'lines.jsonl');
    const stale = new LineFile(path, true);
    stale.append({ line: 1 });
    const owner = new LineFile(path, true);
    expect(owner.takeLines()).to.deep.equal([{ line: 1 }]);
    stale.append({ line: 'late' });
    owner.append({ line: 2 });
    expect([stale.owned, owner.owned]).to.deep.equal([false, true]);
    stale.close();
    owner.close();
    expect(readFileSync(path, 'utf8')).to.equal('{"line":1}\n{"line":2}\n');
  });
});

describe('the history checker', () => {
  type Entry = HistoryLine extends infer Line ? (Line extends HistoryLine ? Omit<Line, 'driver' | 'atMs' | 'epoch'> & { driver?: string; epoch?: number } : never) : never;
  const digest = (step: number, shard: number): string => `${step}${shard}`.padStart(32, '0');
  const shard = (step: number, at: number, more: object = {}): Entry => ({ type: 'shard', step, shard: at, worker: 'w1', reportEpoch: 0, digest: digest(step, at), ...more });
  const inputs = (step: number) => [0, 1].map((at) => ({ shard: at, worker: 'w1', epoch: 0, digest: digest(step, at) }));
  const flow = (step: number, more: object = {}): Entry => ({ type: 'step', step, way: 'flow', worker: 'w1', digest: digest(step, 9), shards: inputs(step), ...more });
  const local = (step: number): Entry => ({ type: 'step', step, way: 'local', worker: 'w1', digest: null, shards: null });
  const taken = (step: number, more: object = {}): Entry => ({ type: 'taken', phase: step === 0 ? 'queued' : 'running', step, checkpoint: 0, ...more });
  const phase = (name: 'running' | 'completed' | 'failed' | 'paused', weightsDigest: string | null = null): Entry => ({ type: 'phase', phase: name, weightsDigest });
  /** Two flow steps, a new driver, two local steps. */
  const good: readonly Entry[] = [
    taken(0), phase('running'), { type: 'job', kind: 'flow', from: 0, through: 1, workers: ['w1', 'w2'] }, shard(1, 1), shard(1, 0), flow(1), shard(1, 0, { worker: 'w2' }), flow(2),
    { type: 'checkpoint', step: 2, worker: 'w1' }, { ...taken(2), driver: 'd2' }, { type: 'epoch', epoch: 3 },
    { type: 'job', kind: 'steps', from: 2, through: 4, workers: ['w1'] }, local(3), local(4), phase('completed', 'good'),
  ];
  const check = (entries: readonly Entry[], metrics = [1, 2, 3, 4]): HistoryVerdict => {
    let [driver, epoch] = ['d1', 0];
    const lines = entries.map((entry): HistoryLine => {
      if (entry.type === 'taken' && entry.driver !== undefined) driver = entry.driver;
      epoch = entry.epoch ?? epoch;
      return { driver, atMs: 0, epoch, ...entry };
    });
    return checkHistory(lines, { steps: 4, shards: 2, metrics, weightsDigest: 'good' });
  };
  /** `good` with the entry at `at` replaced by `entries`. */
  const planted = (at: number, ...entries: Entry[]): Entry[] => [...good.slice(0, at), ...entries, ...good.slice(at + 1)];

  it('is content with a rollback, and counts nothing of the branch before; without one it is not', () => {
    const back = { atMs: 0, branch: 1, fromStep: 3, toStep: 1, epoch: 4, loss: 9, threshold: 2 };
    const line = (more: object = {}): Entry => ({ type: 'rollback', branch: 1, fromStep: 3, toStep: 1, epoch: 4, ...more });
    const begin: Entry[] = [taken(0), phase('running'), shard(1, 0), shard(1, 1), flow(1), flow(2), local(3)];
    // Other gradients of step 2; and one of the branch before that comes late.
    const other = (at: number): object => ({ digest: digest(7, at), reportEpoch: 4 });
    const end: Entry[] = [shard(2, 0, other(0)), shard(2, 0), local(2), local(3), local(4), phase('completed', 'good')];
    const found = (entries: Entry[], rollbacks = [back]): string => {
      let [driver, epoch] = ['d1', 0];
      const lines = entries.map((entry): HistoryLine => {
        driver = entry.type === 'taken' ? (entry.driver ?? driver) : driver;
        epoch = entry.epoch ?? epoch;
        return { driver, atMs: 0, epoch, ...entry };
      });
      return checkHistory(lines, { steps: 4, shards: 2, metrics: [1, 2, 3, 4], rollbacks, weightsDigest: 'good' }).violations.join('; ');
    };
    expect(found([...begin, line(), ...end])).to.equal('');
    // The driver died between its two files.
    expect(found([...begin, { ...taken(1, { branch: 1 }), driver: 'd2', epoch: 4 }, ...end])).to.equal('');
    expect(found([...begin, ...end])).to.contain('step 2 counts again');
    expect(found([...begin, line(), ...end], [])).to.contain('is not in metrics.jsonl');
    expect(found([...begin, line({ toStep: 2 }), ...end])).to.contain('is not in metrics.jsonl');
    expect(found([...begin, line(), shard(2, 0, other(1)), ...end])).to.contain('shard 0 of step 2 is');
    expect(found([...begin, line(), shard(1, 0, { digest: digest(7, 7), reportEpoch: 4 }), ...end])).to.contain('shard 0 of step 1 is');
    expect(found([...begin, line(), line({ branch: 3 }), ...end])).to.contain('branch 3 after branch 1');
    expect(found([...begin.slice(0, -1), line(), ...end])).to.contain('a rollback from step 3, but 2 counted');
  });

  it('is content with a good history, and counts', () => {
    expect(check(good)).to.deep.equal({ violations: [], steps: 4, epochs: 3, drivers: 2, faults: 0, flowSteps: 2, shardsAgain: 0 });
  });

  it('allows a crash between the two files, if the metrics hold the step', () => {
    const gap = planted(7, { type: 'fault', what: 'x', code: 'WORKER_LOST' }).filter((entry) => entry.type !== 'checkpoint');
    expect(check(gap).violations).to.deep.equal([]);
    expect(check(gap, [1, 3, 4]).violations.join()).to.contain('step 2 never counted');
  });

  it('counts shards that were computed again', () => {
    const again = planted(11, { type: 'job', kind: 'steps', from: 1, through: 4, workers: ['w2'] });
    expect(check(again).shardsAgain).to.equal(2);
    const late = inputs(1).map((input) => ({ ...input, epoch: 1 }));
    expect(check(planted(5, { type: 'epoch', epoch: 1 }, flow(1, { shards: late }))).shardsAgain).to.equal(2);
  });

  const cases: [what: string, entries: Entry[], about: string, metrics?: number[]][] = [
    ['a step that counts twice', planted(7, flow(2), flow(2)), 'step 2 counts again'],
    ['a step that is left out', planted(12), 'step 3 left out'],
    ['a step that comes too early', planted(12, local(4), local(3)), 'step 3 left out'],
    ['a step that a new driver counts again', planted(9, { ...taken(1), driver: 'd2' }, flow(2)), 'steps 2 to 2 had counted, and are forgotten'],
    ['steps that no driver counted', planted(7), 'step 2 never counted', [1, 3, 4]],
    ['many steps lost between two drivers', planted(9, { ...taken(4), driver: 'd2' }), 'steps 3 to 4 never counted'],
    ['a sum without a shard', planted(5, flow(1, { shards: inputs(1).slice(0, 1) })), 'the sum of step 1 is of shards 0, not 0,1'],
    ['a sum with a shard twice', planted(5, flow(1, { shards: [inputs(1)[0], inputs(1)[0]] })), 'is of shards 0,0'],
    ['a sum out of order', planted(5, flow(1, { shards: inputs(1).toReversed() })), 'is of shards 1,0'],
    ['a sum of another gradient than was published', planted(5, flow(1, { shards: [inputs(1)[0], { ...inputs(1)[1], digest: 'f' }] })), 'shard 1 of step 1 is'],
    ['two reports of one shard that differ', planted(6, shard(1, 0, { worker: 'w2', digest: 'f' })), `shard 0 of step 1 is ${digest(1, 0)} (w1) and f (w2)`],
    ['a shard from an epoch to come', planted(7, flow(2, { shards: inputs(2).map((input) => ({ ...input, epoch: 5 })) })), 'ahead of'],
    ['an epoch that falls', planted(12, { ...local(3), epoch: 2 }), 'the epoch falls from 3 to 2'],
    ['a checkpoint of what did not count', planted(8, { type: 'checkpoint', step: 3, worker: 'w1' }), 'a checkpoint of step 3, but 2 counted'],
    ['a run taken up with such a checkpoint', planted(9, { ...taken(2, { checkpoint: 3 }), driver: 'd2' }), 'a checkpoint of step 3'],
    ['a driver that writes on after another', planted(12, { ...local(3), driver: 'd1' }), 'driver d1 writes on'],
    ['a driver that is two', planted(9, { ...taken(2), driver: 'd1' }), 'takes the run twice'],
    ['a history without a beginning', good.slice(1), 'nobody took the run'],
    ['a job ahead of the count', planted(11, { type: 'job', kind: 'steps', from: 3, through: 4, workers: ['w1'] }), 'from version 3, but 2 counted'],
    ['a job beyond the end', planted(11, { type: 'job', kind: 'steps', from: 2, through: 5, workers: ['w1'] }), 'a steps job from 2 to 5'],
    ['a step beyond the end', planted(13, local(4), local(5)), 'step 5 of 4', [1, 2, 3, 4, 5]],
    ['a phase that cannot follow', planted(10, { type: 'epoch', epoch: 3 }, phase('paused'), phase('paused')), 'paused becomes paused'],
    ['a step after the end', [...good, local(4)], 'step after the run was completed'],
    ['an end too early', planted(13), 'completed at step 3 of 4'],
    ['other weights', planted(14, phase('completed', 'other')), 'the run ended with weights other'],
    ['no end', good.slice(0, -1), 'the run ended with weights null'],
    ['metrics with a double', [...good], 'metrics.jsonl has step 2 where 3 belongs', [1, 2, 2, 3, 4]],
    ['metrics with a hole', [...good], 'metrics.jsonl has step 4 where 3 belongs', [1, 2, 4]],
    ['metrics that are short', [...good], 'metrics.jsonl has 3 steps, the history 4', [1, 2, 3]],
  ];
  for (const [what, entries, about, metrics] of cases) it(`finds ${what}`, () => expect(check(entries, metrics).violations.join('\n')).to.contain(about));
});
