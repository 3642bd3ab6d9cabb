/**
 * What a supervisor and its worker processes say to each other over the channel that fork opens: settings on the way down
 * (they hold passwords, which argv and the environment would show), word of life and death on the way up. Types and codes only.
 */
import type { ErrorRecord } from '../config/errors.ts';
import type { ExitRecord } from '../config/messages.ts';
import type { Config } from '../config/schema.ts';
import type { DeviceDescription } from '../cuda/device.ts';
import type { DeviceChoice } from './tasks.ts';

/** The supervisor's one message, right after the fork. */
export interface StartMessage {
  readonly type: 'start';
  readonly id: string;
  readonly config: Config;
  readonly device: DeviceChoice;
  /** How the process before this one ended, for the worker's record. */
  readonly lastExit: ExitRecord | null;
}

export type LogLevel = 'debug' | 'info' | 'warn' | 'error';

export type WorkerMessage =
  | { readonly type: 'ready'; readonly device: DeviceDescription }
  | { readonly type: 'log'; readonly level: LogLevel; readonly message: string; readonly error?: ErrorRecord }
  /** Id of the job at hand, or null: should this process die, its supervisor knows with what. */
  | { readonly type: 'holds'; readonly job: string | null }
  /** Why the process is about to exit, and the job that met it. */
  | { readonly type: 'fault'; readonly error: ErrorRecord; readonly job: string | null };

/** Exit codes of a worker process besides 0 (drained). */
export const EXIT = {
  /** Something that no restart cures: settings, Redis password, missing device. */
  refused: 69,
  /** A fault that a new process cures. */
  restart: 75,
} as const;
