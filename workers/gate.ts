/**
 * One job at a time on the compute thread, however many queues a worker serves. First come, first served; who will not wait is
 * told so. Pure but for the clock of its timeouts. Used by worker.ts.
 */

/** Ends a turn; calling it twice is allowed. */
export type Leave = () => void;

interface Waiting {
  readonly admit: (leave: Leave | null) => void;
  readonly timer: NodeJS.Timeout | undefined;
}

export class Gate {
  readonly #waiting: Waiting[] = [];
  readonly #onIdle: () => void;
  #busy = false;
  #closed = false;

  /** `onIdle` is called whenever a turn ends and nobody waits. */
  constructor(onIdle: () => void = () => undefined) {
    this.#onIdle = onIdle;
  }

  get busy(): boolean {
    return this.#busy;
  }

  /** Waits for a turn, at most `patienceMs`; null when it did not come, or when the gate is closed. */
  enter(patienceMs: number): Promise<Leave | null> {
    if (this.#closed) return Promise.resolve(null);
    if (!this.#busy) return Promise.resolve(this.#admit());
    return new Promise((resolve) => {
      const timer = Number.isFinite(patienceMs) ? setTimeout(() => this.#giveUp(waiting), patienceMs) : undefined;
      const waiting: Waiting = { admit: resolve, timer };
      this.#waiting.push(waiting);
    });
  }

  /** From now on nobody enters; those who wait are told so. The turn at hand goes on. */
  close(): void {
    this.#closed = true;
    for (const { admit, timer } of this.#waiting.splice(0)) {
      clearTimeout(timer);
      admit(null);
    }
  }

  #admit(): Leave {
    this.#busy = true;
    let left = false;
    return () => {
      if (left) return;
      left = true;
      this.#busy = false;
      const next = this.#waiting.shift();
      if (next === undefined) return this.#onIdle();
      clearTimeout(next.timer);
      next.admit(this.#admit());
    };
  }

  #giveUp(waiting: Waiting): void {
    const at = this.#waiting.indexOf(waiting);
    if (at === -1) return;
    this.#waiting.splice(at, 1);
    waiting.admit(null);
  }
}
