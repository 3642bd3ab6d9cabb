/**
 * The life of one command: what it started is stopped in reverse order when it ends, fails or is interrupted. The first
 * Ctrl-C (or SIGTERM, SIGHUP) ends it cleanly, the second at once. Knows nothing of what is stopped. Called by the commands.
 */
import { constants } from 'node:os';
import { note } from './output.ts';

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;
type EndSignal = (typeof SIGNALS)[number] | 'SIGPIPE';

/** Thrown out of a command's waits when a signal ended it. */
export class Interrupted extends Error {
  readonly signal: EndSignal;

  constructor(signal: EndSignal) {
    super(`interrupted by ${signal}`);
    this.signal = signal;
  }

  /** As shells count: 128 + the signal's number. */
  get exitCode(): number {
    return 128 + constants.signals[this.signal];
  }
}

export class Lifetime {
  readonly #stops: { readonly what: string; readonly stop: () => unknown }[] = [];
  readonly #controller = new AbortController();

  /** Aborted, with an Interrupted as its reason, by the first signal. */
  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** Remembers how to stop what was just started. */
  defer(what: string, stop: () => unknown): void {
    this.#stops.push({ what, stop });
  }

  interrupt(signal: EndSignal): void {
    this.#controller.abort(new Interrupted(signal));
  }

  /** Waits for `work` or the first signal. Throws Interrupted. */
  async until<Value>(work: Promise<Value>): Promise<Value> {
    const { signal } = this;
    signal.throwIfAborted();
    let onAbort: (() => void) | undefined;
    const aborted = new Promise<never>((_, refuse) => {
      onAbort = () => refuse(signal.reason as Error);
      signal.addEventListener('abort', onAbort);
    });
    try {
      return await Promise.race([work, aborted]);
    } finally {
      signal.removeEventListener('abort', onAbort!);
      work.catch(() => undefined); // whoever lost the race has no reader any more
    }
  }

  /** Stops everything, newest first, even if one stop fails; then throws the first failure. */
  async end(): Promise<void> {
    const failures: unknown[] = [];
    for (let each = this.#stops.pop(); each !== undefined; each = this.#stops.pop()) {
      try {
        await each.stop();
      } catch (error) {
        failures.push(error);
      }
    }
    if (failures.length > 0) throw failures[0];
  }
}

let current: Lifetime | undefined;

/** stdout was closed by its reader (`| head`): the command at hand ends, quietly. */
export function onBrokenPipe(): void {
  if (current === undefined) process.exit(0);
  current.interrupt('SIGPIPE');
}

/** Runs a command's body with a lifetime, and ends it whatever happens. */
export async function withLifetime<Value>(body: (life: Lifetime) => Promise<Value>): Promise<Value> {
  const life = new Lifetime();
  current = life;
  const onSignal = (signal: NodeJS.Signals): void => {
    if (life.signal.aborted) process.exit(128 + constants.signals[signal]);
    note(`${signal === 'SIGINT' ? '\n' : ''}stopping (once more: at once)`);
    life.interrupt(signal as EndSignal);
  };
  for (const signal of SIGNALS) process.on(signal, onSignal);
  let failed = true;
  try {
    const value = await body(life);
    failed = false;
    return value;
  } finally {
    try {
      await life.end();
    } catch (error) {
      // A failure to stop must not hide why we stop.
      if (!failed) throw error; // oxlint-disable-line no-unsafe-finally -- nothing else is on its way out
      note(`while stopping: ${(error as Error).message}`);
    }
    for (const signal of SIGNALS) process.off(signal, onSignal);
    current = undefined;
  }
}
