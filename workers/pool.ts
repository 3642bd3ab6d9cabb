/**
 * The compute thread seen from the worker's main thread: the only file that imports piscina. One pool of exactly one thread for
 * a device, one task at a time. A thread that dies, or shows no sign of life for callTimeoutMs, is a DEVICE_FAULT: native state
 * cannot be trusted after it, so that only a new process cures it. Called by worker.ts.
 */
import { MessageChannel } from 'node:worker_threads';
import type { MessagePort } from 'node:worker_threads';
import { Piscina } from 'piscina';
import { toErrorRecord, NnError } from '../config/errors.ts';
import type { StepReport } from '../config/messages.ts';
import { Signals } from './signals.ts';
import type { Outcome, ReplicaState, StepMessage, TaskKind, TaskOf, ThreadData } from './tasks.ts';

/** Heap of the compute thread: its bulk is native memory, which no heap limit sees. */
const HEAP_MIB = 4096;
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
    this.#piscina = new Piscina({
      filename: file.href,
      minThreads: 1,
      maxThreads: 1,
      concurrentTasksPerWorker: 1,
      maxQueue: 1,
      idleTimeout: Number.POSITIVE_INFINITY,
      // With 'sync' an idle thread blocks in Atomics.wait, and its sockets and timers with it.
      atomics: 'disabled',
      recordTiming: false,
      resourceLimits: { maxOldGenerationSizeMb: HEAP_MIB },
      workerData: { ...data, shared: this.signals.shared } satisfies ThreadData,
    });
    // Errors of the thread outside a task (inside one they reject its promise as well).
    this.#piscina.on('error', () => undefined);
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
    const reports = onReport === undefined ? null : this.#listen(onReport, replicaRun(task));
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

  #listen(onReport: (report: StepReport) => void, run: string): { port: MessagePort; ended: Promise<void>; close: () => void } {
    const { port1, port2 } = new MessageChannel();
    const ended = new Promise<void>((resolve) => port1.once('close', resolve));
    port1.on('message', ({ report }: StepMessage) => {
      this.#replica = { run, step: report.step };
      onReport(report);
    });
    return { port: port2, ended, close: () => port1.close() };
  }

  /** Ends in a DEVICE_FAULT when the pulse stands still for too long. */
  #watch(): { hung: Promise<Outcome<never>>; outcome: Outcome<never>; stop: () => void } {
    const message = `the compute thread gave no sign of life for ${this.#callTimeoutMs} ms; its process must be started anew`;
    const outcome: Outcome<never> = { ok: false, error: toErrorRecord(new NnError('DEVICE_FAULT', message, { hung: true })), replica: null };
    let timer: NodeJS.Timeout | undefined;
    const hung = new Promise<Outcome<never>>((resolve) => {
      let pulse = this.signals.pulse;
      let since = performance.now();
      timer = setInterval(() => {
        const now = performance.now();
        if (this.signals.pulse !== pulse) {
          pulse = this.signals.pulse;
          since = now;
        } else if (now - since > this.#callTimeoutMs) {
          resolve(outcome);
        }
      }, LOOK_MS);
    });
    return { hung, outcome, stop: () => clearInterval(timer) };
  }
}

const replicaRun = (task: object): string => (task as { message?: { run?: string } }).message?.run ?? '';
