/**
 * The compute thread and the writer thread seen from the worker's main thread: the only file that imports piscina. Two pools of
 * exactly one thread, each with one task at a time. A compute thread that dies, or shows no sign of life for callTimeoutMs, is a
 * DEVICE_FAULT: native state cannot be trusted after it, so that only a new process cures it. A writer thread holds nothing that
 * the next one lacks: it fails its task and no more. Called by worker.ts and background.ts.
 */
import { MessageChannel } from 'node:worker_threads';
import type { MessagePort } from 'node:worker_threads';
import { Piscina } from 'piscina';
import { branchOf, replicaAt } from '../config/branches.ts';
import { toErrorRecord, NnError } from '../config/errors.ts';
import type { Origin, StepReport } from '../config/messages.ts';
import { Signals } from './signals.ts';
import type { Outcome, ReplicaState, StepMessage, TaskKind, TaskOf, ThreadData, WriteOutcome, WriteTask } from './tasks.ts';

/** Heap of the compute thread: its bulk is native memory, which no heap limit sees. */
const HEAP_MIB = 4096;
/** Heap of the writer thread: its buffers are no part of it. */
const WRITER_HEAP_MIB = 256;
/** Milliseconds between looks at the pulse. */
const LOOK_MS = 500;

export class ComputePool {
  readonly signals = new Signals();
  readonly #piscina: Piscina;
  readonly #callTimeoutMs: number;
  #replica: ReplicaState = null;

  /** Starts the thread; the device is opened by the task `open`. `file`: the thread's module. */
  constructor(data: Omit<ThreadData, 'shared'>, file: URL = new URL('./thread.js', import.meta.url)) {
    this.#callTimeoutMs = data.config.worker.callTimeoutMs;
    this.#piscina = onlyThread(file, { ...data, shared: this.signals.shared } satisfies ThreadData, HEAP_MIB);
  }

  /** The replica that the thread holds, as of its last word. */
  get replica(): ReplicaState {
    return this.#replica;
  }

  /**
   * Does a task; failures are values. `onReport` hears of every step of a `steps` task before the outcome is there.
   * The caller sets `signals.command` before, and sees to it that there is one task at a time.
   */
  async run<Kind extends TaskKind>(task: TaskOf<Kind> & { readonly kind: Kind }, onReport?: (report: StepReport) => void): Promise<Outcome<Kind>> {
    const reports = onReport === undefined ? null : this.#listen(onReport, originIn(task));
    const sent = reports === null ? task : { ...task, port: reports.port };
    const watch = this.#watch();
    try {
      const work = this.#piscina.run(sent, reports === null ? {} : { transferList: [reports.port] }) as Promise<Outcome<Kind>>;
      // When the watch ends first, nobody waits for the thread any more.
      work.catch(() => undefined);
      const outcome = await Promise.race([work, watch.hung]);
      if (reports !== null && outcome !== watch.outcome) await reports.ended;
      this.#replica = outcome.replica;
      return outcome;
    } catch (error) {
      this.#replica = null;
      const fault = new NnError('DEVICE_FAULT', `the compute thread died (${error instanceof Error ? error.message : String(error)}); its process must be started anew`, {}, error);
      return { ok: false, error: toErrorRecord(fault), replica: null };
    } finally {
      watch.stop();
      reports?.close();
    }
  }

  /** Frees native state by a task (a pool thread hears no 'exit' event), then ends the thread. */
  async close(): Promise<void> {
    this.signals.command = 'run';
    await this.run({ kind: 'close' });
    await this.destroy();
  }

  /** Ends the thread as it is; a native call under way is waited for. */
  destroy(): Promise<void> {
    return this.#piscina.destroy();
  }

  #listen(onReport: (report: StepReport) => void, { run, rollbacks }: Pick<Origin, 'run' | 'rollbacks'>): { port: MessagePort; ended: Promise<void>; close: () => void } {
    const { port1, port2 } = new MessageChannel();
    const ended = new Promise<void>((resolve) => port1.once('close', resolve));
    port1.on('message', ({ report }: StepMessage) => {
      this.#replica = replicaAt(run, report.step, branchOf(rollbacks, report.step));
      onReport(report);
    });
    return { port: port2, ended, close: () => port1.close() };
  }

  /** Ends in a DEVICE_FAULT when the pulse stands still for too long. */
  #watch(): { hung: Promise<Outcome<never>>; outcome: Outcome<never>; stop: () => void } {
    const message = `the compute thread gave no sign of life for ${this.#callTimeoutMs} ms; its process must be started anew`;
    const outcome: Outcome<never> = { ok: false, error: toErrorRecord(new NnError('DEVICE_FAULT', message, { hung: true })), replica: null };
    const { still, stop } = watchPulse(this.signals, this.#callTimeoutMs);
    return { hung: still.then(() => outcome), outcome, stop };
  }
}

/** The writer thread; it is started by the first task, and again by the next after it died. */
export class WriterPool {
  #signals = new Signals();
  readonly #callTimeoutMs: number;
  readonly #file: URL;
  #piscina: Piscina | null = null;

  /** `file`: the thread's module. */
  constructor(callTimeoutMs: number, file: URL = new URL('./writer.js', import.meta.url)) {
    this.#callTimeoutMs = callTimeoutMs;
    this.#file = file;
  }

  /** Those of the writing at hand, or of the next. */
  get signals(): Signals {
    return this.#signals;
  }

  /**
   * Writes one checkpoint; failures are values: what writeCheckpoint throws, CANCELLED after `signals.command = 'drop'`, WORKER_LOST
   * when the thread dies, TIMEOUT when it shows no sign of life for callTimeoutMs: it is then left to itself.
   */
  async write(task: WriteTask): Promise<WriteOutcome> {
    this.#signals.command = 'run';
    this.#piscina ??= onlyThread(this.#file, { shared: this.#signals.shared }, WRITER_HEAP_MIB);
    const { still, stop } = watchPulse(this.#signals, this.#callTimeoutMs);
    const context = { path: task.directory };
    let failure: NnError;
    try {
      const work = this.#piscina.run(task) as Promise<WriteOutcome>;
      // When the watch ends first, nobody waits for the thread any more.
      work.catch(() => undefined);
      const outcome = await Promise.race([work, still]);
      if (outcome !== undefined) return outcome;
      failure = new NnError('TIMEOUT', `${task.directory}: the disk gave no sign of life for ${this.#callTimeoutMs} ms`, context);
    } catch (error) {
      failure = new NnError('WORKER_LOST', `${task.directory}: the thread that wrote it died (${error instanceof Error ? error.message : String(error)})`, context, error);
    } finally {
      stop();
    }
    // Should a hung thread wake after all, it must not read the copy any more: another version may lie there by then.
    this.#signals.command = 'drop';
    this.#signals = new Signals();
    void this.#piscina.destroy().catch(() => undefined);
    this.#piscina = null;
    return { ok: false, error: toErrorRecord(failure) };
  }

  async close(): Promise<void> {
    await this.#piscina?.destroy();
    this.#piscina = null;
  }
}

function onlyThread(file: URL, workerData: object, heapMib: number): Piscina {
  const piscina = new Piscina({
    filename: file.href,
    minThreads: 1,
    maxThreads: 1,
    concurrentTasksPerWorker: 1,
    maxQueue: 1,
    idleTimeout: Number.POSITIVE_INFINITY,
    // With 'sync' an idle thread blocks in Atomics.wait, and its sockets and timers with it.
    atomics: 'disabled',
    recordTiming: false,
    resourceLimits: { maxOldGenerationSizeMb: heapMib },
    workerData,
  });
  // Errors of the thread outside a task (inside one they reject its promise as well).
  piscina.on('error', () => undefined);
  return piscina;
}

/** `still` resolves when the pulse stands still for limitMs before `stop`. */
function watchPulse(signals: Signals, limitMs: number): { still: Promise<undefined>; stop: () => void } {
  let timer: NodeJS.Timeout | undefined;
  const still = new Promise<undefined>((resolve) => {
    let pulse = signals.pulse;
    let since = performance.now();
    timer = setInterval(() => {
      const now = performance.now();
      if (signals.pulse !== pulse) {
        pulse = signals.pulse;
        since = now;
      } else if (now - since > limitMs) {
        resolve(undefined);
      }
    }, LOOK_MS);
  });
  return { still, stop: () => clearInterval(timer) };
}

const originIn = (task: object): Pick<Origin, 'run' | 'rollbacks'> => (task as { message?: Origin }).message ?? { run: '' };
