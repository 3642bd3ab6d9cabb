/**
 * Chaos: a live system (real Redis, orchestrators, workers, a network between them) trains one run after another while faults
 * chosen by a seed hit it; then calm. Every run must end with the weights of the undisturbed one and a clean history. Called by
 * main.ts (`npm run chaos`) and its test; prints nothing itself.
 */
import { rmSync } from 'node:fs';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { generator } from '../sim/faults.ts';
import { checkRun, readHistory } from '../support/history.ts';
import type { HistoryVerdict } from '../support/history.ts';
import { Stack } from '../support/stack.ts';
import { until } from '../support/wait.ts';
import { choose, inflict, recoversFromBegin } from './faults.ts';
import type { FaultKind, Target } from './faults.ts';
import { Place } from './place.ts';

export interface ChaosOptions {
  readonly minutes: number;
  readonly seed: number;
  readonly workers: number;
  /** Steps of each run. */
  readonly steps: number;
  /** Times of the system; the defaults of a production system unless given. */
  readonly settings?: Record<string, object>;
  readonly log: (message: string) => void;
  /** Ends the faults at once, and then all of it. */
  readonly signal: AbortSignal;
}

export interface FaultDone {
  readonly kind: FaultKind;
  readonly what: string;
  readonly beganMs: number;
  readonly endedMs: number;
}

export interface RunDone {
  readonly run: string;
  readonly parallelism: number | 'auto';
  readonly phase: string;
  readonly weightsDigest: string | null;
  readonly verdict: HistoryVerdict;
  /** Times of resuming a run that a full disk had paused, or of trying again one of whose jobs too many workers were killed. */
  readonly resumed: number;
}

export interface ChaosOutcome {
  readonly options: Pick<ChaosOptions, 'minutes' | 'seed' | 'workers' | 'steps'>;
  readonly referenceDigest: string;
  readonly referenceStepsPerSecond: number;
  readonly faults: readonly FaultDone[];
  readonly runs: readonly RunDone[];
  /** When each step counted, in order of time. */
  readonly stepTimesMs: readonly number[];
  readonly beganMs: number;
  readonly endedMs: number;
  readonly ownDisk: boolean;
  readonly interrupted: boolean;
}

/** How long the last run may take when all is calm again, beyond what its steps take. */
const CALM_MS = 300_000;

export async function chaos(options: ChaosOptions): Promise<ChaosOutcome> {
  const place = Place.make(options.log);
  try {
    const stack = await Stack.start({ directory: place.directory, settings: options.settings ?? {}, proxied: true, onProcess: (pid) => place.remember(pid) });
    try {
      return await new Chaos(options, stack, place).run();
    } finally {
      await stack.stop();
    }
  } finally {
    place.remove();
  }
}

class Chaos {
  readonly #options: ChaosOptions;
  readonly #stack: Stack;
  readonly #ownDisk: boolean;
  readonly #workers: readonly string[];
  readonly #faults: FaultDone[] = [];
  readonly #runs: RunDone[] = [];
  readonly #stepTimesMs: number[] = [];
  #current = '';
  #faultsEndMs = 0;
  #calm = false;
  /** A run has ended otherwise than it must: no more faults. */
  #broken = false;

  constructor(options: ChaosOptions, stack: Stack, place: Place) {
    this.#options = options;
    this.#stack = stack;
    this.#ownDisk = place.ownDisk;
    this.#workers = Array.from({ length: options.workers }, (_, index) => `w${index}`);
  }

  async run(): Promise<ChaosOutcome> {
    const { minutes, seed, workers, steps, log, signal } = this.#options;
    for (let count = 0; count < 2; count++) await this.#stack.orchestrate();
    for (const prefix of this.#workers) await this.#stack.work(1, prefix);
    const calmMs = Date.now();
    await this.#train('reference', 1);
    const reference = await this.#unlessInterrupted(this.#stack.finish('reference', CALM_MS + steps * 1_000));
    const referenceMs = Date.now() - calmMs;
    log(`undisturbed, on one worker: ${steps} steps in ${(referenceMs / 1000).toFixed(0)} s, weights ${reference.weightsDigest!.slice(0, 16)}`);
    this.#forget('reference');
    const beganMs = Date.now();
    this.#faultsEndMs = beganMs + minutes * 60_000;
    const training = this.#trainOn(reference.weightsDigest!);
    // Its failure is thrown below, when the fault at hand is over.
    training.catch(() => (this.#broken = true));
    await this.#disturb();
    this.#calm = true;
    log(signal.aborted ? 'interrupted' : 'calm: the last run goes on to its end');
    await training;
    return {
      options: { minutes, seed, workers, steps }, referenceDigest: reference.weightsDigest!, referenceStepsPerSecond: (1000 * steps) / referenceMs, faults: this.#faults, runs: this.#runs,
      stepTimesMs: this.#stepTimesMs.sort((a, b) => a - b), beganMs, endedMs: Date.now(), ownDisk: this.#ownDisk, interrupted: signal.aborted,
    };
  }

  #spec(parallelism: number | 'auto'): Partial<RunSpecInput> {
    const { steps } = this.#options;
    const every = Math.max(5, Math.round(steps / 12));
    return {
      steps, parallelism, batch: { shards: 4, microBatches: 1, sequences: 16, sequenceLength: 128 }, checkpoint: { every, keep: 3 }, compareDigestsEvery: every,
      evaluation: { every: 2 * every, sequences: 8 },
    };
  }

  async #train(run: string, parallelism: number | 'auto'): Promise<void> {
    this.#current = run;
    await this.#stack.train(run, this.#spec(parallelism));
  }

  /** One run after another until the faults are over; each in another way. */
  async #trainOn(weightsDigest: string): Promise<void> {
    const { workers, log, signal, steps } = this.#options;
    for (let number = 1; !this.#calm && !signal.aborted; number++) {
      const run = `run-${number}`;
      const parallelism = ([workers, 1, 'auto'] as const)[(number - 1) % 3]!;
      await this.#persist(() => this.#train(run, parallelism));
      const { phase, weightsDigest: digest, resumed } = await this.#follow(run, steps);
      if (phase === 'interrupted') return;
      const verdict = checkRun(this.#stack.runDirectory(run), weightsDigest);
      this.#runs.push({ run, parallelism, phase, weightsDigest: digest, verdict, resumed });
      const good = digest === weightsDigest && verdict.violations.length === 0;
      const history = verdict.violations.length === 0 ? 'clean' : verdict.violations.join('; ');
      log(`${run} (parallelism ${parallelism}) is ${phase}: weights ${digest === weightsDigest ? 'as undisturbed' : String(digest)}, history ${history}`);
      if (!good) throw new BrokenPromise(this.#runs.at(-1)!, JSON.stringify(await this.#stack.client.run(run).record()));
      this.#collect(run);
    }
  }

  /** Until the run is over; a run that a full disk has paused is resumed. */
  async #follow(run: string, steps: number): Promise<{ phase: string; weightsDigest: string | null; resumed: number }> {
    const { signal, log } = this.#options;
    const handle = this.#stack.client.run(run);
    let [resumed, calmSinceMs, pausedLooks] = [0, 0, 0];
    for (;;) {
      if (signal.aborted) return { phase: 'interrupted', weightsDigest: null, resumed };
      const record = await handle.record().catch(() => null);
      if (record?.error?.code === 'JOB_FATAL') {
        // Faults struck the same step too often: an operator who knows why tries it again.
        log(`${run} is failed at step ${record.step} (${record.error.message}): tried again`);
        await handle.retry().then(() => resumed++, () => undefined);
        await this.#sleep(1_000);
        continue;
      }
      if (record !== null && ['completed', 'failed', 'cancelled'].includes(record.phase)) return { phase: record.phase, weightsDigest: record.weightsDigest, resumed };
      pausedLooks = record?.phase === 'paused' && !this.#pausing ? pausedLooks + 1 : 0;
      if (pausedLooks >= 4) {
        log(`${run} is paused at step ${record!.step}: resumed`);
        await handle.resume().then(() => resumed++, () => undefined);
        pausedLooks = 0;
      }
      if (this.#calm && calmSinceMs === 0) calmSinceMs = Date.now();
      if (calmSinceMs > 0 && Date.now() - calmSinceMs > CALM_MS + steps * 1_000) throw new Error(`${run} does not end: ${JSON.stringify(record)}`);
      await this.#sleep(500);
    }
  }

  /** A pause that is wanted is under way. */
  #pausing = false;

  /** What needs Redis is tried again while it is away. */
  async #persist(work: () => Promise<void>): Promise<void> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await work();
      } catch (error) {
        if (attempt >= 50 || this.#options.signal.aborted) throw error;
        if ((error as { code?: string }).code === 'RUN_EXISTS') return;
        await this.#sleep(1_000);
      }
    }
  }

  async #disturb(): Promise<void> {
    const { seed, log, signal } = this.#options;
    const random = generator(seed);
    const { worker, queue } = this.#stack.config;
    const target: Target = { stack: this.#stack, workers: this.#workers, run: () => this.#current, ownDisk: this.#ownDisk, sleep: (milliseconds) => this.#sleep(milliseconds) };
    while (Date.now() < this.#faultsEndMs && !signal.aborted && !this.#broken) {
      const fault = choose(random, { deadAfterMs: worker.deadAfterMs, lockDurationMs: queue.lockDurationMs });
      const beganMs = Date.now();
      this.#pausing = fault.kind === 'paused and resumed';
      const what = await inflict(fault, target).catch((error: unknown) => {
        // A run that has just ended cannot be paused, and nobody is there to hear a wish while Redis starts.
        if (['RUN_STATE', 'RUN_NOT_FOUND', 'TIMEOUT', 'REDIS_UNAVAILABLE'].includes((error as { code?: string }).code ?? '')) return null;
        throw error;
      });
      this.#pausing = false;
      const endedMs = Date.now();
      if (what !== null) {
        this.#faults.push({ kind: fault.kind, what, beganMs, endedMs });
        log(`fault ${this.#faults.length}: ${fault.kind} (${what}); ${this.#current} is at step ${this.#stack.counted(this.#current)}`);
      }
      await this.#sleep(fault.pauseMs);
    }
    await until('two orchestrators', () => this.#stack.orchestrators.filter(({ alive }) => alive).length >= 2);
  }

  /** Keeps of a run when its steps counted, and deletes it. */
  #collect(run: string): void {
    for (const line of readHistory(this.#stack.runDirectory(run))) if (line.type === 'step') this.#stepTimesMs.push(line.atMs);
    this.#forget(run);
  }

  #forget(run: string): void {
    rmSync(this.#stack.runDirectory(run), { recursive: true, force: true });
  }

  /** Rejects as soon as the signal comes. */
  #unlessInterrupted<Value>(work: Promise<Value>): Promise<Value> {
    const { signal } = this.#options;
    work.catch(() => undefined);
    return Promise.race([work, new Promise<never>((_, reject) => {
      const stop = (): void => reject(new Error('interrupted'));
      if (signal.aborted) stop();
      else signal.addEventListener('abort', stop, { once: true });
    })]);
  }

  /** A sleep that ends with the signal. */
  #sleep(milliseconds: number): Promise<void> {
    const { signal } = this.#options;
    return new Promise((resolve) => {
      if (signal.aborted) return resolve();
      const done = (): void => {
        clearTimeout(timer);
        signal.removeEventListener('abort', done);
        resolve();
      };
      const timer = setTimeout(done, milliseconds);
      signal.addEventListener('abort', done);
    });
  }
}

/** A run ended otherwise than it must. */
export class BrokenPromise extends Error {
  readonly run: RunDone;

  constructor(run: RunDone, record: string) {
    super(`${run.run} is ${run.phase}, weights ${run.weightsDigest}, history: ${run.verdict.violations.join('; ') || 'clean'}; its record: ${record}`);
    this.run = run;
  }
}

/** Milliseconds from each fault to the next step that counted; null when none came after. Pure. */
export function recoveries(faults: readonly FaultDone[], stepTimesMs: readonly number[]): readonly { readonly kind: FaultKind; readonly milliseconds: number | null }[] {
  return faults.map(({ kind, beganMs, endedMs }) => {
    const from = recoversFromBegin(kind) ? beganMs : endedMs;
    const next = stepTimesMs.find((atMs) => atMs > from);
    return { kind, milliseconds: next === undefined ? null : next - from };
  });
}
