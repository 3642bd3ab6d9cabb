/**
 * Checkpoints that are written while training goes on: one at a time, from a copy of the state, by the writer thread. A copied
 * checkpoint is written to its end whatever its run is told, because the bits of a version are right whoever wants them; only the
 * end of the run, or of this process, abandons it. Called by worker.ts; knows the control channel, but no queue and no device.
 *
 *   enter ----> (state is copied) ----> write ----> leave
 *     |                                   |  failed: the copy stands, so that the job's next attempt goes straight to write
 *     null: not before the process ends   |  run over, or drop(): CANCELLED, and the temporary directory is removed
 */
import { NnError } from '../config/errors.ts';
import type { Message, Origin } from '../config/messages.ts';
import type { Config } from '../config/schema.ts';
import { commandFor } from './control.ts';
import type { ControlWatcher, Watch } from './control.ts';
import { Gate } from './gate.ts';
import type { Leave } from './gate.ts';
import { WriterPool } from './pool.ts';
import type { StateCopy } from './state-copy.ts';
import type { WriteOutcome } from './tasks.ts';

export class BackgroundWriter {
  readonly #config: Config;
  readonly #control: Pick<ControlWatcher, 'read' | 'watch'>;
  readonly #pool: WriterPool;
  readonly #gate = new Gate();
  #copy: { readonly run: string; readonly epoch: number; readonly step: number; readonly state: StateCopy } | null = null;
  #draining = false;
  #dropped = false;

  constructor(config: Config, control: Pick<ControlWatcher, 'read' | 'watch'>, pool = new WriterPool(config.worker.callTimeoutMs)) {
    this.#config = config;
    this.#control = control;
    this.#pool = pool;
  }

  /** The turn of one checkpoint; null: this process ends. Throws CANCELLED when the job is given up before its turn comes. */
  async enter({ run, epoch }: Origin): Promise<Leave | null> {
    for (;;) {
      const leave = await this.#gate.enter(this.#config.worker.controlPollMs);
      if (leave !== null || this.#draining) return leave;
      const control = await this.#control.read(run).catch(() => undefined);
      if (control !== undefined && commandFor(control, epoch) === 'drop') throw new NnError('CANCELLED', `the checkpoint was dropped: its job is of an older epoch, or run ${run} is over`, { run });
    }
  }

  /** The copy of this version that an earlier attempt of the job left. */
  copyOf({ run, epoch, step }: Message<'checkpoint'>): StateCopy | null {
    const copy = this.#copy;
    return copy !== null && copy.run === run && copy.epoch === epoch && copy.step === step ? copy.state : null;
  }

  /** The copy's memory is about to be written to, or its run is over. */
  forget(): void {
    this.#copy = null;
  }

  /** Writes a copied state; failures are values (WriterPool.write). */
  async write({ run, epoch, step, directory }: Message<'checkpoint'>, state: StateCopy): Promise<WriteOutcome> {
    this.#copy = { run, epoch, step, state };
    const { signals } = this.#pool;
    const work = this.#pool.write({ directory, copy: state });
    let over = false;
    if (this.#dropped) signals.command = 'drop';
    // No epoch is newer than this one: only the end of the run drops the writing. A Redis that is away drops nothing.
    const watching: Promise<Watch | null> = this.#control
      .watch(run, Number.POSITIVE_INFINITY, (command) => {
        if (command === 'drop' && !over) signals.command = 'drop';
      })
      .catch(() => null);
    const outcome = await work;
    over = true;
    void watching.then((watch) => watch?.stop());
    if (outcome.ok) this.forget();
    return outcome;
  }

  /** Nobody enters any more; the writing at hand goes on. */
  closeGate(): void {
    this.#draining = true;
    this.#gate.close();
  }

  /** Abandons the writing at hand. */
  drop(): void {
    this.#dropped = true;
    this.#pool.signals.command = 'drop';
  }

  close(): Promise<void> {
    this.forget();
    return this.#pool.close();
  }
}
