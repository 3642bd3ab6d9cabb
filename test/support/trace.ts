/**
 * Sees from outside what processes do, so that a test can act at that very moment: every command that reaches a Redis
 * (MONITOR), the processor time that a process has used, the files that a directory holds. Used by the fault tests.
 */
import { readFileSync, readdirSync } from 'node:fs';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { PASSWORD } from './redis.ts';
import type { RedisServer } from './redis.ts';

interface Watch {
  readonly pattern: RegExp;
  readonly act: (match: RegExpExecArray) => void;
}

/**
 * Patterns see a command as its words, parted by blanks; those that a script issues come one by one, too. Reads the stream of
 * MONITOR itself: ioredis takes lines that come in one packet with the answer to MONITOR for answers to other commands.
 */
export class Trace {
  readonly #socket: Socket;
  readonly #watches = new Set<Watch>();

  private constructor(socket: Socket) {
    this.#socket = socket;
  }

  static open(server: RedisServer): Promise<Trace> {
    const socket = connect(server.socket);
    const trace = new Trace(socket);
    socket.setEncoding('latin1').write(`AUTH ${PASSWORD}\r\nMONITOR\r\n`);
    return new Promise((resolve, reject) => {
      let rest = '';
      let answers = 0;
      socket.on('data', (text: string) => {
        const lines = (rest + text).split('\r\n');
        rest = lines.pop()!;
        for (const line of lines) {
          if (line.startsWith('-')) return reject(new Error(`MONITOR: ${line}`));
          if (answers < 2) answers++;
          else trace.#hear(line);
        }
        if (answers === 2) resolve(trace);
      });
      socket.once('error', reject);
    });
  }

  /** A line: +<time> [<database> <client>] "word" "word" ... */
  #hear(line: string): void {
    const words = line.slice(line.indexOf(']') + 1).match(/"(?:[^"\\]|\\.)*"/g) ?? [];
    const text = words.map((word) => word.slice(1, -1).replace(/\\(["\\])/g, '$1')).join(' ');
    for (const watch of this.#watches) {
      const match = watch.pattern.exec(text);
      if (match !== null) watch.act(match);
    }
  }

  /**
   * Resolves with the first command that matches and for which `act` says true (or that there is, without `act`), as soon as
   * it is seen; `act` runs before anything else does here.
   */
  seen(what: string, pattern: RegExp, deadlineMs: number, act: (match: RegExpExecArray) => boolean = () => true): Promise<RegExpExecArray> {
    return new Promise((resolve, reject) => {
      const watch: Watch = {
        pattern,
        act: (match) => {
          if (!act(match)) return;
          this.#watches.delete(watch);
          clearTimeout(timer);
          resolve(match);
        },
      };
      const timer = setTimeout(() => {
        this.#watches.delete(watch);
        reject(new Error(`${what}: not seen within ${deadlineMs} ms`));
      }, deadlineMs);
      this.#watches.add(watch);
    });
  }

  close(): void {
    this.#socket.destroy();
  }
}

/** Milliseconds of processor time that a process has used, in ticks of 10; null when it is gone. */
export function processorMs(pid: number): number | null {
  try {
    const fields = readFileSync(`/proc/${pid}/stat`, 'latin1').replace(/^.*\) /s, '').split(' ');
    return 10 * (Number(fields[11]) + Number(fields[12]));
  } catch (error) {
    if (['ENOENT', 'ESRCH'].includes((error as NodeJS.ErrnoException).code ?? '')) return null;
    throw error;
  }
}

/** Checkpoints of a run that are being written: the process that writes, and the name of the temporary directory. */
export function partialCheckpoints(directory: string): { readonly pid: number; readonly name: string }[] {
  try {
    return readdirSync(directory).flatMap((name) => {
      const match = /^\.step-\d+\..*\.(\d+)\.[0-9a-f]{8}\.partial$/.exec(name);
      return match === null ? [] : [{ pid: Number(match[1]), name }];
    });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}
