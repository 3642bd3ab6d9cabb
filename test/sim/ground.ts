/**
 * What every part of a simulated world stands on: the chance of one seed, a clock of its own, what is still to happen, and the log.
 * It knows no run, no job and no worker. Made by world.ts.
 */
import { Agenda } from './agenda.ts';
import { chooseFaults, generator } from './faults.ts';
import type { Faults } from './faults.ts';

/** Faults end some time before this, so that every run can end; often early, so that what they broke is not hidden by the next. */
const FAULTS_END_MS = 20_000;
const LINES_KEPT = 5_000;

export class Ground {
  readonly random: () => number;
  faults: Faults;
  readonly #faultsEndMs: number;
  now = 0;
  readonly #agenda = new Agenda();
  /** When something last went wrong, changed, or was put right. */
  disturbedMs = 0;
  /** What happened, in words, when that is asked for. */
  readonly log: string[] = [];
  readonly logs: boolean;

  constructor(seed: number, faults: Faults | undefined, logs: boolean) {
    this.logs = logs;
    this.random = generator(seed);
    this.faults = faults ?? chooseFaults(this.random);
    this.#faultsEndMs = 200 + this.random() ** 2 * FAULTS_END_MS;
  }

  /** A whole number from 0 to below `below`. */
  pick(below: number): number {
    return Math.floor(this.random() * below);
  }

  /** Whether a fault of this probability happens now. */
  chance(probability: number): boolean {
    return this.now < this.#faultsEndMs && this.random() < probability;
  }

  at(delayMs: number, act: () => void): void {
    this.#agenda.put(this.now + Math.max(0, delayMs), act);
  }

  /** Goes to the time of what happens next, and gives it. */
  next(): () => void {
    const { at, act } = this.#agenda.take();
    this.now = at;
    return act;
  }

  disturb(): void {
    this.disturbedMs = this.now;
  }

  note(text: string): void {
    if (this.logs && this.log.length < LINES_KEPT) this.log.push(`${this.now.toFixed(0)} ${text}`);
  }
}
