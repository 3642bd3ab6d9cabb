/** How workers are shared out among runs: laws over random demands, and the cases that people will ask about. */
import { expect } from 'chai';
import { array, assert as check, boolean, constantFrom, integer, option, property, record, uniqueArray } from 'fast-check';
import { shareWorkers } from '../../orchestrator/share.ts';
import type { Demand, Share, SharedWorker } from '../../orchestrator/share.ts';
import { worker as workerView } from '../support/machine-table.ts';

const SLICE_MS = 1_000;
const NOW = 100_000;

const demand = (run: string, changes: Partial<Demand> = {}): Demand => ({
  run, priority: 100, precision: 'fp32', most: 100, createdAtMs: 0, servedSinceMs: null, waitingSinceMs: NOW, wasServed: false, home: null, excluded: [], ...changes,
});
const worker = (id: string, heldBy: string | null = null, changes: Partial<SharedWorker> = {}): SharedWorker => workerView(id, { heldBy, ...changes });
const share = (demands: readonly Demand[], workers: readonly SharedWorker[], timeSliceMs = SLICE_MS, nowMs = NOW): Record<string, readonly string[]> =>
  Object.fromEntries([...shareWorkers({ demands, workers, timeSliceMs, nowMs })].map(([run, each]) => [run, each.workers]));
const served = (run: string, sinceMs: number, changes: Partial<Demand> = {}): Demand => demand(run, { servedSinceMs: sinceMs, waitingSinceMs: null, wasServed: true, ...changes });

const RUNS = ['a', 'b', 'c', 'd', 'e'];
const demands = uniqueArray(
  record({
    run: constantFrom(...RUNS), priority: constantFrom(1, 2, 100), precision: constantFrom('fp32' as const, 'bf16' as const), most: integer({ min: 1, max: 5 }),
    createdAtMs: integer({ min: 0, max: 50 }), servedSinceMs: option(integer({ min: NOW - 3 * SLICE_MS, max: NOW })), waitingSinceMs: option(integer({ min: NOW - 3 * SLICE_MS, max: NOW })),
    wasServed: boolean(), home: option(constantFrom('w0', 'w1', 'w2')), excluded: array(constantFrom('w0/w0-1', 'w3/w3-1'), { maxLength: 1 }),
  }),
  { selector: ({ run }) => run, maxLength: 5 },
);
const workers = array(record({ heldBy: option(constantFrom(...RUNS, 'stranger')), gpu: boolean(), draining: boolean() }), { maxLength: 7 }).map((each) =>
  each.map(({ heldBy, gpu, draining }, index) => worker(`w${index}`, heldBy, { precisions: gpu ? ['fp32', 'bf16'] : ['fp32'], state: draining && index % 3 === 0 ? 'draining' : 'idle' })),
);

const fits = (one: Demand, { id, incarnation, precisions }: SharedWorker): boolean => precisions.includes(one.precision) && !one.excluded.includes(`${id}/${incarnation}`);
/** What is left of the pool for runs of a priority. */
const leftFor = (priority: number, all: readonly Demand[], pool: readonly SharedWorker[], shares: ReadonlyMap<string, Share>): SharedWorker[] => {
  const above = new Set(all.filter((each) => each.priority < priority).flatMap(({ run }) => shares.get(run)!.workers));
  return pool.filter(({ id, state, heldBy }) => state !== 'draining' && !above.has(id) && (heldBy === null || all.some(({ run }) => run === heldBy)));
};
const laws = (name: string, law: (all: readonly Demand[], pool: readonly SharedWorker[], shares: ReadonlyMap<string, Share>) => void): void => {
  it(name, () => check(property(demands, workers, (all, pool) => law(all, pool, shareWorkers({ demands: all, workers: pool, timeSliceMs: SLICE_MS, nowMs: NOW }))), { numRuns: 1_000 }));
};

describe('share: laws', () => {
  laws('no worker is given twice, none that does not fit, drains, or is another’s to give, and no run gets more than it can use', (all, pool, shares) => {
    const given = [...shares.values()].flatMap((each) => each.workers);
    expect(new Set(given).size).to.equal(given.length);
    expect([...shares.keys()].sort()).to.deep.equal(all.map(({ run }) => run).sort());
    for (const each of all) {
      const own = shares.get(each.run)!.workers;
      expect(own.length).to.be.at.most(each.most);
      for (const id of own) {
        const one = pool.find((candidate) => candidate.id === id)!;
        expect(fits(each, one) && one.state !== 'draining').to.equal(true);
        expect(one.heldBy === null || all.some(({ run }) => run === one.heldBy)).to.equal(true);
      }
    }
  });

  laws('priority is strict: what runs of lower priority want changes nothing', (all, pool, shares) => {
    const first = all.filter(({ priority }) => priority === 1);
    const others = all.filter(({ priority }) => priority !== 1).map((each) => ({ ...each, most: 1, createdAtMs: 99 - each.createdAtMs }));
    const again = shareWorkers({ demands: [...others, ...first], workers: pool.toReversed(), timeSliceMs: SLICE_MS, nowMs: NOW });
    for (const { run } of first) expect(again.get(run)!.workers).to.deep.equal(shares.get(run)!.workers);
  });

  laws('nothing that fits lies idle while a run could use it', (all, pool, shares) => {
    const given = new Set([...shares.values()].flatMap((each) => each.workers));
    for (const each of all) {
      if (shares.get(each.run)!.workers.length >= each.most) continue;
      const idle = leftFor(each.priority, all, pool, shares).filter((one) => fits(each, one) && !given.has(one.id));
      expect(idle).to.deep.equal([]);
    }
  });

  laws('among equals that fit the same workers nobody has two more than another that wants more', (all, _pool, shares) => {
    for (const poor of all) for (const rich of all) {
      const same = poor.priority === rich.priority && poor.precision === rich.precision && poor.excluded.join() === rich.excluded.join();
      const has = (each: Demand): number => shares.get(each.run)!.workers.length;
      if (same && has(poor) < poor.most) expect(has(rich)).to.be.at.most(has(poor) + 1);
    }
  });

  laws('a run keeps what it holds as far as its part goes, unless another can do with nothing else', (all, pool, shares) => {
    if (all.some(({ precision, excluded }) => precision === 'bf16' || excluded.length > 0) || new Set(all.map(({ priority }) => priority)).size > 1) return;
    for (const { run } of all) {
      const held = pool.filter(({ heldBy, state }) => heldBy === run && state !== 'draining').map(({ id }) => id);
      const own = shares.get(run)!.workers;
      expect(own.filter((id) => held.includes(id)).length).to.equal(Math.min(held.length, own.length));
    }
  });

  laws('computing again on the result changes nothing', (all, pool, shares) => {
    const owners = new Map([...shares].flatMap(([run, each]) => each.workers.map((id) => [id, run] as const)));
    const after = pool.map((one) => (one.state === 'draining' || (one.heldBy !== null && all.every(({ run }) => run !== one.heldBy)) ? one : { ...one, heldBy: owners.get(one.id) ?? null }));
    const held = (run: string, of: readonly SharedWorker[]): boolean => of.some((one) => one.heldBy === run);
    const then = all.map((each): Demand => {
      if (held(each.run, after)) return { ...each, wasServed: true, waitingSinceMs: null, servedSinceMs: held(each.run, pool) ? each.servedSinceMs : NOW };
      return { ...each, servedSinceMs: null, wasServed: each.wasServed || held(each.run, pool), waitingSinceMs: held(each.run, pool) ? NOW : each.waitingSinceMs };
    });
    const again = shareWorkers({ demands: then, workers: after, timeSliceMs: SLICE_MS, nowMs: NOW });
    for (const { run } of all) expect(again.get(run)!.workers).to.deep.equal(shares.get(run)!.workers);
  });
});

describe('share: cases', () => {
  const four = ['w0', 'w1', 'w2', 'w3'];

  it('one run has all that it can use', () => {
    expect(share([demand('a', { most: 3 })], four.map((id) => worker(id)))).to.deep.equal({ a: ['w0', 'w1', 'w2'] });
  });

  it('two runs have half each; the one that had all keeps its home, and says why it has fewer', () => {
    const pool = four.map((id) => worker(id, 'a'));
    const all = [served('a', 0, { home: 'w3' }), demand('b', { createdAtMs: 5 })];
    const shares = shareWorkers({ demands: all, workers: pool, timeSliceMs: 0, nowMs: NOW });
    expect(shares.get('a')).to.deep.equal({ workers: ['w0', 'w3'], reason: 'shares 4 workers with 1 other run' });
    expect(shares.get('b')).to.deep.equal({ workers: ['w1', 'w2'], reason: 'shares 4 workers with 1 other run' });
  });

  it('a run of higher priority takes what it can use, homes last; who is left without says why', () => {
    const all = [served('low', 0, { priority: 200, home: 'w0' }), served('mid', 0, { priority: 100, home: 'w2' }), demand('high', { priority: 1, most: 2 })];
    const pool = [worker('w0', 'low'), worker('w1', 'low'), worker('w2', 'mid')];
    const shares = shareWorkers({ demands: all, workers: pool, timeSliceMs: SLICE_MS, nowMs: NOW });
    expect(shares.get('high')!.workers).to.deep.equal(['w0', 'w1']);
    expect(shares.get('mid')).to.deep.equal({ workers: ['w2'], reason: '2 of 3 workers serve runs of higher priority' });
    expect(shares.get('low')).to.deep.equal({ workers: [], reason: '3 of 3 workers serve runs of higher priority' });
  });

  it('more runs than workers take turns: who was served longest gives way to who waited longest', () => {
    const pool = [worker('w0', 'a'), worker('w1', 'b')];
    const waiting = (run: string, sinceMs: number): Demand => demand(run, { waitingSinceMs: sinceMs, wasServed: true });
    const at = (a: number, b: number, c: number): Record<string, readonly string[]> => share([served('a', a), served('b', b), waiting('c', c)], pool);
    expect(at(NOW - 10, NOW - 20, NOW - 5_000)).to.deep.equal({ a: ['w0'], b: ['w1'], c: [] });
    expect(at(NOW - 1_500, NOW - 2_000, NOW - 1_000)).to.deep.equal({ a: ['w0'], b: [], c: ['w1'] });
    expect(at(NOW - 1_500, NOW - 2_000, NOW - 500), 'who has just given way waits for a slice').to.deep.equal({ a: ['w0'], b: ['w1'], c: [] });
    expect(share([served('a', 0), served('b', 10), demand('c')], pool), 'who never had a turn does not').to.deep.equal({ a: [], b: ['w1'], c: ['w0'] });
    expect(share([served('a', 0), served('b', 10), demand('c')], pool, 0), 'without slices everybody stays').to.deep.equal({ a: ['w0'], b: ['w1'], c: [] });
    const { reason } = shareWorkers({ demands: [served('a', NOW), demand('c')], workers: [worker('w0', 'a')], timeSliceMs: SLICE_MS, nowMs: NOW }).get('c')!;
    expect(reason).to.equal('2 runs take turns on 1 worker');
  });

  it('a run that fits few workers gets them, and the others take the rest', () => {
    const pool = [worker('gpu', 'a', { precisions: ['fp32', 'bf16'] }), worker('w1')];
    expect(share([served('a', 0, { most: 1, home: 'gpu' }), demand('b', { precision: 'bf16' })], pool)).to.deep.equal({ a: ['w1'], b: ['gpu'] });
  });

  it('a worker of a run that demands nothing is not given away', () => {
    expect(share([demand('a')], [worker('w0', 'paused'), worker('w1')])).to.deep.equal({ a: ['w1'] });
  });
});
