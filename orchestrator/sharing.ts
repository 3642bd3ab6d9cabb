/**
 * One run's side of the sharing of workers: keeps its demand in Redis up to date, and works out its share from everybody's.
 * Made by driver.ts for its run; the rules are in share.ts, what the run does with its share in run-machine.ts.
 */
import { PROTOCOL } from '../config/messages.ts';
import type { RunState } from './run-state.ts';
import { demandOf } from './run-state.ts';
import { shareWorkers } from './share.ts';
import type { Demand, Share } from './share.ts';
import type { RunStore } from './run-store.ts';
import type { WorkerWatch } from './worker-watch.ts';

export interface SharingOptions {
  readonly run: string;
  readonly token: string;
  readonly store: RunStore;
  readonly watch: WorkerWatch;
  readonly timeSliceMs: number;
  readonly onError: (error: unknown) => void;
}

export class Sharing {
  readonly #options: SharingOptions;
  #demand: Demand | null;
  #written = '';
  #writing: Promise<void> | null = null;

  /** A run that another orchestrator drove before goes on with its turn. */
  constructor(options: SharingOptions) {
    this.#options = options;
    this.#demand = options.watch.demands.get(options.run) ?? null;
  }

  /** Brings the demand up to date, and tells the run's share. */
  look(state: RunState): Share | null {
    const { run, watch, timeSliceMs } = this.#options;
    const before = this.#demand;
    const now = demandOf(state);
    const { nowMs } = watch;
    if (now === null) {
      this.#demand = null;
    } else {
      const served = watch.views.some(({ heldBy }) => heldBy === run);
      this.#demand = {
        ...now,
        servedSinceMs: served ? (before?.servedSinceMs ?? nowMs) : null,
        waitingSinceMs: served ? null : (before?.waitingSinceMs ?? nowMs),
        wasServed: served || (before?.wasServed ?? false),
      };
    }
    this.#write();
    if (this.#demand === null) return null;
    const demands = [this.#demand, ...[...watch.demands.values()].filter((other) => other.run !== run)];
    return shareWorkers({ demands, workers: watch.views.filter(({ protocol = PROTOCOL }) => protocol === PROTOCOL), timeSliceMs, nowMs }).get(run) ?? null;
  }

  /** When the demand as it was last told lies in Redis, or could not be written. */
  async settled(): Promise<void> {
    await this.#writing;
  }

  #write(): void {
    if (this.#writing !== null || this.#text() === this.#written) return;
    const { run, token, store, watch, onError } = this.#options;
    this.#writing = (async () => {
      while (this.#text() !== this.#written) {
        const text = this.#text();
        await store.writeDemand(run, token, this.#demand);
        this.#written = text;
        await watch.look();
      }
    })()
      .catch(onError)
      .finally(() => {
        this.#writing = null;
      });
  }

  #text(): string {
    return this.#demand === null ? '' : JSON.stringify(this.#demand);
  }
}
