/**
 * What goes wrong in a simulated world, and how often: chosen once for a world, from its seed. Half of the faults are absent from any
 * one of them, so that none is hidden by all the others. Used by ground.ts and world.ts.
 */

/** mulberry32: small, seeded, good enough for choosing faults. */
export function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let word = Math.imul(state ^ (state >>> 15), 1 | state);
    word = (word + Math.imul(word ^ (word >>> 7), 61 | word)) ^ word;
    return ((word ^ (word >>> 14)) >>> 0) / 0x1_0000_0000;
  };
}

/** Work that ends the process of whoever begins it, so many times. */
export interface Curse {
  readonly name: 'steps' | 'shard' | 'reduce' | 'checkpoint' | 'eval' | 'digest';
  readonly step: number;
  readonly shard: number;
  readonly times: number;
}

/** For a tenth of all worlds, which then are short of other deaths. From a generator of its own, so that other worlds stay as they are. */
export function chooseCurse(seed: number, steps: number): Curse | null {
  const random = generator(seed ^ 0xc0ffee);
  const pick = (below: number): number => Math.floor(random() * below);
  if (random() >= 0.1) return null;
  const name = (['steps', 'shard', 'reduce', 'checkpoint', 'eval', 'digest'] as const)[pick(6)]!;
  return { name, step: name === 'eval' ? pick(2) * steps : 1 + pick(steps), shard: pick(2), times: random() < 0.5 ? Infinity : 1 + pick(2) };
}

/** How often what goes wrong; probabilities. */
export interface Faults {
  readonly drop: number;
  readonly double: number;
  readonly slowest: number;
  readonly crash: number;
  readonly orchestratorCrash: number;
  readonly hide: number;
  readonly loseGradient: number;
  /** Redis is killed and comes back as it was up to a second before. */
  readonly loseSecond: number;
  readonly drain: number;
  /** Another run, of the same rank or above, is to have some of the workers. */
  readonly share: number;
  readonly damageCheckpoint: number;
  readonly diskFull: number;
  /** Longest time to write a checkpoint's files. */
  readonly slowestDiskMs: number;
  readonly wishes: boolean;
  readonly cancel: boolean;
}

export const CALM: Faults = {
  drop: 0, double: 0, slowest: 5, crash: 0, orchestratorCrash: 0, hide: 0, loseGradient: 0, loseSecond: 0, drain: 0, share: 0, damageCheckpoint: 0, diskFull: 0, slowestDiskMs: 200,
  wishes: false, cancel: false,
};

export function chooseFaults(random: () => number): Faults {
  const some = (most: number): number => (random() < 0.5 ? 0 : random() * most);
  return {
    drop: some(0.2), double: some(0.3), slowest: random() < 0.5 ? 10 : 400, crash: some(0.06), orchestratorCrash: some(0.02), hide: some(0.04),
    loseGradient: some(0.02), loseSecond: random() < 0.4 ? random() * 0.03 : 0, drain: some(0.03), share: some(0.03), damageCheckpoint: some(0.2),
    diskFull: random() < 0.2 ? random() * 0.5 : 0, slowestDiskMs: random() < 0.5 ? 40 : 2_000, wishes: random() < 0.3, cancel: random() < 0.05,
  };
}
