/**
 * What a worker's main thread asks of its compute thread, and what comes back. Everything here is cloned between threads;
 * errors travel as records, because classes and codes are lost on the way. Types only: pool.ts sends, thread.ts serves.
 */
import type { MessagePort } from 'node:worker_threads';
import type { ErrorRecord } from '../config/errors.ts';
import type { Message, Result, StepReport, WorkerRecord } from '../config/messages.ts';
import type { Config } from '../config/schema.ts';
import type { DeviceDescription } from '../cuda/device.ts';
import type { StateCopy } from './state-copy.ts';

/** Which device a compute thread opens. */
export interface DeviceChoice {
  readonly library: 'auto' | 'cpu' | 'cuda';
  readonly index: number;
  /** CPU threads; 0: all cores. */
  readonly threads: number;
}

/** Given to the compute thread at its start. */
export interface ThreadData {
  readonly config: Config;
  readonly device: DeviceChoice;
  readonly worker: string;
  /** Addresses of both Redis; never logged. */
  readonly queuesUrl: string;
  readonly exchangeUrl: string;
  /** Signals (signals.ts). */
  readonly shared: SharedArrayBuffer;
}

/** The jobs that the compute thread does, by name. */
export type JobTask = 'steps' | 'shard' | 'reduce' | 'checkpoint' | 'digest' | 'eval' | 'generate';

interface JobTaskOf<Name extends JobTask> {
  readonly kind: Name;
  readonly message: Message<Name>;
  readonly port?: MessagePort;
  /** Where the files that the message names lie on this machine (places.ts), where that is elsewhere. */
  readonly local?: Readonly<Record<string, string>>;
}

export type Task =
  | { readonly [Name in JobTask]: JobTaskOf<Name> }[JobTask]
  /** Opens the device; the first task of a thread. */
  | { readonly kind: 'open' }
  /** Deletes all that the exchange holds of a run that is over, and its replica. */
  | { readonly kind: 'forget'; readonly run: string }
  /** Frees all native state and closes connections; the last task. */
  | { readonly kind: 'close' };

export interface TaskValues {
  readonly steps: Result<'steps'>;
  readonly shard: Result<'shard'>;
  readonly reduce: Result<'reduce'>;
  /** Written here, or copied into host memory for the writer. */
  readonly checkpoint: CheckpointOutcome;
  readonly digest: Result<'digest'>;
  readonly eval: Result<'eval'>;
  readonly generate: Result<'generate'>;
  readonly open: DeviceDescription;
  readonly forget: number;
  readonly close: null;
}

export type CheckpointOutcome = { readonly written: Result<'checkpoint'> } | { readonly copied: StateCopy };

export type TaskKind = Task['kind'];
export type TaskOf<Kind extends TaskKind> = Extract<Task, { kind: Kind }>;

/** Which replica the thread holds after a task. */
export type ReplicaState = WorkerRecord['replica'];

export type Outcome<Kind extends TaskKind = TaskKind> =
  | { readonly ok: true; readonly value: TaskValues[Kind]; readonly replica: ReplicaState }
  | { readonly ok: false; readonly error: ErrorRecord; readonly replica: ReplicaState };

/** What the main thread asks of the writer thread. */
export interface WriteTask {
  readonly directory: string;
  readonly copy: StateCopy;
}

export type WriteOutcome = { readonly ok: true; readonly bytes: number } | { readonly ok: false; readonly error: ErrorRecord };

/** On the port of a `steps` task, for each step. */
export interface StepMessage {
  readonly report: StepReport;
}
