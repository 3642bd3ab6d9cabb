/**
 * What a supervisor and its worker processes say to each other over the channel that fork opens: settings on the way down
 * (they hold passwords, which argv and the environment would show), word of life and death on the way up. Types and codes only.
 */
import type { ErrorRecord } from '../config/errors.ts';
import type { Config } from '../config/schema.ts';
import type { DeviceDescription } from '../cuda/device.ts';
import type { DeviceChoice } from './tasks.ts';

/** The supervisor's one message, right after the fork. */
export interface StartMessage {
  readonly type: 'start';
  readonly id: string;
  readonly config: Config;
  readonly device: DeviceChoice;
}

export type LogLevel = 'debug' | 'info' | 'warn' | 'error';

export type WorkerMessage =
  | { readonly type: 'ready'; readonly device: DeviceDescription }
  | { readonly type: 'log'; readonly level: LogLevel; readonly message: string; readonly error?: ErrorRecord }
  /** Why the process is about to exit. */
  | { readonly type: 'fault'; readonly error: ErrorRecord };

/** Exit codes of a worker process besides 0 (drained). */
export const EXIT = {
  /** Something that no restart cures: settings, Redis password, missing device. */
  refused: 69,
  /** A fault that a new process cures. */
  restart: 75,
} as const;
