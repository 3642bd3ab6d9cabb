/**
 * Which workers each live run should have: by priority, strictly; among equals in equal parts; and by turns where there are
 * more runs than workers. PURE: no IO, no clock. Every orchestrator computes the same from the same state of Redis (demands,
 * live workers, claims, Redis' clock); that they disagree for a moment is harmless, since a claim is the lock. Called by
 * driver.ts; what a run does with its share is plan.ts's and machine-decisions.ts's.
 *
 *   among runs of one priority, a worker is given in rounds: the first worker of each run, then the second of each, ...
 *   first round, in this order:  1. who is served, and whose time slice is not over
 *                                2. who waits and was never served, or has waited for a time slice; who waited longest first
 *                                3. who is served and whose slice is over; who was served longest last
 *                                4. who waits for less
 *   later rounds:                who holds so many workers already, then the oldest run
 *
 * A run keeps what it holds as far as its part goes, its home before all; what it must take from others it takes first
 * from those of the lowest priority. Applying a share and computing again changes nothing.
 */
import type { WorkerRecord } from '../config/messages.ts';

/** What a run could use, written by its driver as long as the run wants workers. Times are of Redis' clock. */
export interface Demand {
  readonly run: string;
  /** 1 is served first. */
  readonly priority: number;
  readonly precision: WorkerRecord['precisions'][number];
  /** The most workers that it can use. */
  readonly most: number;
  readonly createdAtMs: number;
  /** Since when it has had a worker without a break; null: it has none. */
  readonly servedSinceMs: number | null;
  /** Since when it has had none; null: it has one. */
  readonly waitingSinceMs: number | null;
  /** Whether it ever had one. */
  readonly wasServed: boolean;
  /** The worker that it would lose last. */
  readonly home: string | null;
  /** Workers that it must not use: `id/incarnation`. */
  readonly excluded: readonly string[];
}

export interface SharedWorker {
  readonly id: string;
  readonly incarnation: string;
  readonly precisions: WorkerRecord['precisions'];
  readonly state: WorkerRecord['state'];
  readonly replica: WorkerRecord['replica'];
  readonly heldBy: string | null;
}

export interface Share {
  /** Sorted. */
  readonly workers: readonly string[];
  /** Why these are fewer than the run could use; null: they are not, or there are no more. */
  readonly reason: string | null;
}

export interface ShareInput {
  readonly demands: readonly Demand[];
  /** The live ones. */
  readonly workers: readonly SharedWorker[];
  /** 0: a run that is served stays so until it ends. */
  readonly timeSliceMs: number;
  readonly nowMs: number;
}

/** The share of every run that has a demand. Deterministic in its input, whatever its order. */
export function shareWorkers({ demands, workers, timeSliceMs, nowMs }: ShareInput): ReadonlyMap<string, Share> {
  const runs = new Map(demands.map((demand) => [demand.run, demand]));
  // A worker whose run demands nothing is not ours to give: that run is pausing on a full disk, or being cleared away.
  const pool = workers.filter(({ state, heldBy }) => state !== 'draining' && (heldBy === null || runs.has(heldBy))).sort((a, b) => compare(a.id, b.id));
  const served = new Set(workers.flatMap(({ heldBy }) => (heldBy === null ? [] : [heldBy])));
  const shares = new Map<string, Share>();
  let left = pool;
  for (const priority of [...new Set(demands.map((demand) => demand.priority))].sort((a, b) => a - b)) {
    const equals = demands.filter((demand) => demand.priority === priority);
    const owners = new Division(equals, left, runs, { timeSliceMs, nowMs, served }).divide();
    for (const demand of equals) {
      const own = left.filter(({ id }) => owners.get(id) === demand.run).map(({ id }) => id);
      shares.set(demand.run, { workers: own, reason: reasonOf(demand, own.length, equals, left, pool) });
    }
    left = left.filter(({ id }) => !owners.has(id));
  }
  return shares;
}

const compare = (a: string, b: string): number => (a < b ? -1 : a > b ? 1 : 0);

const fits = ({ precision, excluded }: Demand, { id, incarnation, precisions }: SharedWorker): boolean =>
  precisions.includes(precision) && !excluded.includes(`${id}/${incarnation}`);

const count = (number: number, what: string): string => `${number} ${what}${number === 1 ? '' : 's'}`;

function reasonOf(demand: Demand, own: number, equals: readonly Demand[], left: readonly SharedWorker[], pool: readonly SharedWorker[]): string | null {
  const mine = left.filter((worker) => fits(demand, worker)).length;
  const all = pool.filter((worker) => fits(demand, worker)).length;
  if (own >= Math.min(demand.most, all)) return null;
  const taken = all - mine;
  const others = equals.length - 1;
  const above = `${taken} of ${count(all, 'worker')} ${taken === 1 ? 'serves' : 'serve'} runs of higher priority`;
  if (own === 0) return mine === 0 ? above : `${count(others + 1, 'run')} take turns on ${count(mine, 'worker')}`;
  const shared = others === 0 ? '' : `shares ${count(mine, 'worker')} with ${count(others, 'other run')}`;
  return [taken === 0 ? '' : above, shared].filter((part) => part !== '').join('; ') || null;
}

interface Turns extends Pick<ShareInput, 'timeSliceMs' | 'nowMs'> {
  readonly served: ReadonlySet<string>;
}

/** The workers left for runs of one priority, divided among them. A matching of runs and workers that grows by augmenting paths. */
class Division {
  readonly #demands: readonly Demand[];
  readonly #pool: readonly SharedWorker[];
  readonly #runs: ReadonlyMap<string, Demand>;
  readonly #timeSliceMs: number;
  readonly #nowMs: number;
  /** Runs that hold a worker, be it one that others get now. */
  readonly #served: ReadonlySet<string>;
  /** Worker -> run. */
  #owners = new Map<string, string>();

  constructor(demands: readonly Demand[], pool: readonly SharedWorker[], runs: ReadonlyMap<string, Demand>, time: Turns) {
    this.#demands = demands;
    this.#pool = pool;
    this.#runs = runs;
    this.#timeSliceMs = time.timeSliceMs;
    this.#nowMs = time.nowMs;
    this.#served = time.served;
  }

  divide(): ReadonlyMap<string, string> {
    const quotas = this.#quotas();
    // How many is settled; which ones: those that a run holds, as many as it may, then others.
    this.#owners = new Map();
    for (const demand of this.#demands) for (const id of this.#held(demand).slice(0, quotas.get(demand.run))) this.#owners.set(id, demand.run);
    for (const demand of this.#demands.toSorted((a, b) => compare(a.run, b.run))) {
      while (this.#owned(demand.run) < quotas.get(demand.run)!) if (!this.#augment(demand, new Set())) break;
    }
    return this.#owners;
  }

  /** How many workers each run gets. Rounds of a greedy choice: no run has more than another that could have as many. */
  #quotas(): ReadonlyMap<string, number> {
    const quotas = new Map(this.#demands.map(({ run }) => [run, 0]));
    for (let round = 1; ; round++) {
      let given = 0;
      for (const demand of this.#order(round)) {
        if (quotas.get(demand.run) !== round - 1 || demand.most < round || !this.#augment(demand, new Set())) continue;
        quotas.set(demand.run, round);
        given++;
      }
      if (given === 0) return quotas;
    }
  }

  #order(round: number): Demand[] {
    const holds = (demand: Demand): number => this.#held(demand).length;
    if (round > 1) {
      const rank = (demand: Demand): number => (holds(demand) >= round ? 0 : 1);
      return this.#demands.toSorted((a, b) => rank(a) - rank(b) || a.createdAtMs - b.createdAtMs || compare(a.run, b.run));
    }
    const turn = (demand: Demand): [place: number, time: number] => {
      const servedSinceMs = demand.servedSinceMs ?? this.#nowMs;
      const waitingSinceMs = demand.waitingSinceMs ?? this.#nowMs;
      const sliced = this.#timeSliceMs > 0;
      if (this.#served.has(demand.run)) return sliced && this.#nowMs - servedSinceMs >= this.#timeSliceMs ? [3, -servedSinceMs] : [1, servedSinceMs];
      const entitled = sliced && (!demand.wasServed || this.#nowMs - waitingSinceMs >= this.#timeSliceMs);
      return [entitled ? 2 : 4, waitingSinceMs];
    };
    const turns = new Map(this.#demands.map((demand) => [demand, turn(demand)]));
    return this.#demands.toSorted((a, b) => {
      const [one, other] = [turns.get(a)!, turns.get(b)!];
      return one[0] - other[0] || one[1] - other[1] || a.createdAtMs - b.createdAtMs || compare(a.run, b.run);
    });
  }

  #owned(run: string): number {
    let owned = 0;
    for (const owner of this.#owners.values()) if (owner === run) owned++;
    return owned;
  }

  /** What a run holds of the pool and may use, home first. */
  #held(demand: Demand): string[] {
    const held = this.#pool.filter((worker) => worker.heldBy === demand.run && fits(demand, worker)).map(({ id }) => id);
    return held.toSorted((a, b) => Number(b === demand.home) - Number(a === demand.home) || compare(a, b));
  }

  /** One more worker for a run: one that is free, else one whose owner can have another instead. */
  #augment(demand: Demand, visited: Set<string>): boolean {
    const candidates = this.#pool.filter((worker) => fits(demand, worker) && !visited.has(worker.id));
    const free = candidates.filter(({ id }) => !this.#owners.has(id)).map((worker) => ({ worker, cost: this.#cost(demand, worker) }));
    free.sort((a, b) => a.cost - b.cost || compare(a.worker.id, b.worker.id));
    if (free.length > 0) {
      this.#owners.set(free[0]!.worker.id, demand.run);
      return true;
    }
    const settled = (worker: SharedWorker): number => Number(worker.heldBy === this.#owners.get(worker.id));
    for (const worker of candidates.toSorted((a, b) => settled(a) - settled(b) || compare(a.id, b.id))) {
      if (visited.has(worker.id)) continue;
      visited.add(worker.id);
      const owner = this.#demands.find(({ run }) => run === this.#owners.get(worker.id))!;
      if (owner.run === demand.run || !this.#augment(owner, visited)) continue;
      this.#owners.set(worker.id, demand.run);
      return true;
    }
    return false;
  }

  /** How much it hurts to take a worker: none that is one's own, little one that is free, most the home of a run just below. */
  #cost(demand: Demand, worker: SharedWorker): number {
    if (worker.heldBy === demand.run) return 0;
    if (worker.heldBy === null) return worker.replica?.run === demand.run ? 1 : 2;
    const holder = this.#runs.get(worker.heldBy)!;
    return 10_000 - holder.priority + (holder.home === worker.id ? 0.5 : 0);
  }
}
