/**
 * Where chaos lives: a directory under the temporary one that tells whose it is, a small disk of its own for the runs where
 * that may be had, and a list of every process it has started; so that the next one can clean up after one that was killed.
 * Called by chaos.ts.
 */
import { spawnSync } from 'node:child_process';
import { appendFileSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { isAlive, processName } from '../../cli/home-lock.ts';
import type { ProcessName } from '../../cli/home-lock.ts';
import { signal } from '../support/stack.ts';

/** Enough for three checkpoints of `tiny` and what is being written beside them, and little enough to fill. */
const DISK = 'size=64m';

export class Place {
  readonly directory: string;
  /** Whether the runs lie on a disk of their own. */
  readonly ownDisk: boolean;

  private constructor(directory: string, ownDisk: boolean) {
    this.directory = directory;
    this.ownDisk = ownDisk;
  }

  /** Makes one, after cleaning up what killed ones left. */
  static make(log: (message: string) => void): Place {
    for (const name of readdirSync(tmpdir())) {
      const match = /^nn-chaos-(\d+)-/.exec(name);
      if (match === null || existing(Number(match[1]))) continue;
      log(`cleaning up ${join(tmpdir(), name)}`);
      clear(join(tmpdir(), name));
    }
    const directory = mkdtempSync(join(tmpdir(), `nn-chaos-${process.pid}-`));
    const runs = join(directory, 'runs');
    mkdirSync(runs);
    const mounted = process.platform === 'linux' && process.getuid?.() === 0 && spawnSync('mount', ['-t', 'tmpfs', '-o', DISK, 'tmpfs', runs]).status === 0;
    if (!mounted) log('no disk of its own (that takes root and mount): no fault fills it');
    return new Place(directory, mounted);
  }

  /** A process that must not outlive this one. */
  remember(pid: number): void {
    appendFileSync(join(this.directory, 'processes.jsonl'), `${JSON.stringify(processName(pid))}\n`);
  }

  remove(): void {
    clear(this.directory);
  }
}

function existing(pid: number): boolean {
  return isAlive({ pid, startedAt: null });
}

/** Ends the processes, unmounts the disk, deletes the directory. */
function clear(directory: string): void {
  for (const each of remembered(directory)) if (each.startedAt !== null && isAlive(each)) signal(each.pid, 'SIGKILL');
  spawnSync('umount', ['-l', join(directory, 'runs')]);
  rmSync(directory, { recursive: true, force: true });
}

function remembered(directory: string): ProcessName[] {
  try {
    return readFileSync(join(directory, 'processes.jsonl'), 'utf8').split('\n').slice(0, -1).map((line) => JSON.parse(line) as ProcessName);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}
