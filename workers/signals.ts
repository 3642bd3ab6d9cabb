/**
 * The shared memory between a worker's main thread and its compute thread: what the compute thread is to do with the job at
 * hand, and a pulse by which the main thread sees that it lives. A native call blocks the compute thread's messages, but not
 * this. Written by pool.ts (commands) and replica.ts (pulse); knows no jobs.
 *
 *   Int32 [0] command   0 run | 1 yield | 2 stop | 3 drop       Int32 [1] pulse   counts up, wraps
 */
import { NnError } from '../config/errors.ts';

/**
 * - `run`: go on.
 * - `yield`: stop at the next step boundary; a job of one step or less is finished.
 * - `stop`: give up the step at hand at the next microbatch.
 * - `drop`: the job is of an older epoch, or its run is over, or its lock is lost: give up whatever it does, publish nothing.
 */
export const COMMANDS = ['run', 'yield', 'stop', 'drop'] as const;
export type Command = (typeof COMMANDS)[number];

const COMMAND = 0;
const PULSE = 1;

export class Signals {
  readonly shared: SharedArrayBuffer;
  readonly #words: Int32Array;

  /** What the job does now is done with before it stops: only `drop` ends it. Of this thread alone. */
  finishing = false;

  constructor(shared: SharedArrayBuffer = new SharedArrayBuffer(8)) {
    this.shared = shared;
    this.#words = new Int32Array(shared);
  }

  get command(): Command {
    return COMMANDS[Atomics.load(this.#words, COMMAND)]!;
  }

  set command(command: Command) {
    Atomics.store(this.#words, COMMAND, COMMANDS.indexOf(command));
  }

  get pulse(): number {
    return Atomics.load(this.#words, PULSE);
  }

  /** The compute thread lives. */
  beat(): void {
    Atomics.add(this.#words, PULSE, 1);
  }

  /** Beats, and throws CANCELLED if the job is to be dropped. */
  check(): void {
    this.beat();
    if (this.command === 'drop') throw new NnError('CANCELLED', 'the job was dropped: it is of an older epoch, or its run is over');
  }

  /** Beats, and throws CANCELLED if the job is to be stopped or dropped: where nothing that others see is half done. */
  checkStop(): void {
    this.check();
    if (this.command === 'stop' && !this.finishing) throw new NnError('CANCELLED', 'the job was stopped: its run is pausing or cancelled');
  }
}
