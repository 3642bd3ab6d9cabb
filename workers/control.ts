/**
 * What the orchestrator wants of the job at hand: reads the control key of its run when the control channel names it, and every
 * controlPollMs in case the message was lost. A Redis that is away changes nothing. Called by worker.ts; sends nothing itself.
 */
import { NnError } from '../config/errors.ts';
import { keys } from '../config/keys.ts';
import type { Control } from '../config/keys.ts';
import { openRedis } from '../config/redis.ts';
import type { Redis } from '../config/redis.ts';
import type { Config } from '../config/schema.ts';
import { COMMANDS } from './signals.ts';
import type { Command } from './signals.ts';

/** What a job of `epoch` is to do under a control: one of an older epoch, or of a run that is over, is dropped. Pure. */
export function commandFor(control: Control | null, epoch: number): Command {
  if (control === null || control.epoch > epoch) return 'drop';
  return control.command;
}

/** The control that the text of its key holds; null: there is none, the run is over. Pure. */
export const parseControl = (text: string | null): Control | null => (text === null ? null : (JSON.parse(text) as Control));

/** The stronger of two commands. Pure. */
export const stronger = (a: Command, b: Command): Command => (COMMANDS.indexOf(a) >= COMMANDS.indexOf(b) ? a : b);

export interface Watch {
  /** The last known command. */
  readonly command: Command;
  stop(): void;
}

export class ControlWatcher {
  readonly #names: ReturnType<typeof keys>;
  readonly #pollMs: number;
  readonly #commands: Redis;
  readonly #subscriber: Redis;
  readonly #listeners = new Set<(run: string) => void>();

  constructor(url: string, config: Config, onError: (error: Error) => void) {
    this.#names = keys(config.redis.prefix);
    this.#pollMs = config.worker.controlPollMs;
    this.#commands = openRedis(url, config, 'command', onError);
    this.#subscriber = openRedis(url, config, 'blocking', onError);
    this.#subscriber.on('message', (_channel: string, run: string) => {
      for (const listener of this.#listeners) listener(run);
    });
    // ioredis subscribes again by itself after a reconnection.
    this.#subscriber.subscribe(this.#names.controlChannel).catch(onError);
  }

  /** The control of a run, null if there is none: the run is over. Throws REDIS_UNAVAILABLE when Redis is away for long. */
  async read(run: string): Promise<Control | null> {
    const text = await this.#commands.get(this.#names.control(run)).catch((error: Error) => {
      throw new NnError('REDIS_UNAVAILABLE', `control of run ${run}: ${error.message}`, { run }, error);
    });
    return parseControl(text);
  }

  /** Follows the control of a job's run until `stop`; `onCommand` hears the first command before this resolves, then each change. */
  async watch(run: string, epoch: number, onCommand: (command: Command) => void): Promise<Watch> {
    let command: Command = commandFor(await this.read(run), epoch);
    let looking = false;
    let again = false;
    const look = async (): Promise<void> => {
      again = looking;
      if (looking) return;
      looking = true;
      try {
        const next = commandFor(await this.read(run), epoch);
        if (next !== command) onCommand((command = next));
      } catch {
        // Redis is away: the next look will tell.
        again = false;
      }
      looking = false;
      if (again) void look();
    };
    const listener = (changed: string): void => {
      if (changed === run) void look();
    };
    const timer = setInterval(() => void look(), this.#pollMs);
    this.#listeners.add(listener);
    onCommand(command);
    return {
      get command() {
        return command;
      },
      stop: () => {
        clearInterval(timer);
        this.#listeners.delete(listener);
      },
    };
  }

  close(): void {
    this.#commands.disconnect();
    this.#subscriber.disconnect();
  }
}
