/**
 * One `up` (or demo) per home directory: a lock file that names the process, which a crash cannot leave locked, because
 * a process is known by its id and its start time. Knows nothing of what the home is used for. Called by embedded-redis.ts
 * and by commands that want to know whether something runs here.
 */
import { linkSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { NnError } from '../config/errors.ts';

/** A process, distinguishable from a later one with the same id. */
export interface ProcessName {
  readonly pid: number;
  /** Field 22 of /proc/<pid>/stat, clock ticks since boot; null where there is no /proc. */
  readonly startedAt: string | null;
}

export function processName(pid: number): ProcessName {
  return { pid, startedAt: startTime(pid) };
}

/** Start time of a process; null if it is gone, is a zombie that nobody has waited for, or there is no /proc. */
function startTime(pid: number): string | null {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const after = stat.slice(stat.lastIndexOf(')') + 2).split(' '); // the name before may hold anything
    return after[0] === 'Z' || after[0] === 'X' ? null : (after[19] ?? null);
  } catch (error) {
    if (['ENOENT', 'ESRCH', 'EACCES'].includes((error as NodeJS.ErrnoException).code ?? '')) return null;
    throw error;
  }
}

/** Whether that very process is still there. */
export function isAlive({ pid, startedAt }: ProcessName): boolean {
  try {
    process.kill(pid, 0);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EPERM') return false;
  }
  return startedAt === null || startTime(pid) === startedAt;
}

const lockPath = (home: string): string => join(home, 'up.lock');

/** The process that holds this home, or undefined. A damaged lock file counts as left by a crash. */
export function homeOwner(home: string): ProcessName | undefined {
  try {
    const owner = JSON.parse(readFileSync(lockPath(home), 'utf8')) as ProcessName;
    return typeof owner.pid === 'number' && isAlive(owner) ? owner : undefined;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT' || error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/**
 * Takes the home for this process. `release` gives it back.
 * Throws ALREADY_UP, naming the process that has it.
 */
export function takeHome(home: string): { release(): void } {
  mkdirSync(home, { recursive: true, mode: 0o700 });
  const path = lockPath(home);
  const draft = `${path}.${process.pid}`;
  writeFileSync(draft, JSON.stringify(processName(process.pid)), { mode: 0o600 });
  try {
    for (let attempt = 0; attempt < 3; attempt++) {
      const owner = homeOwner(home);
      if (owner !== undefined) {
        throw new NnError('ALREADY_UP', `\`cuda-nn up\` runs in ${home} already (process ${owner.pid}); use it, stop it, or name another home with CUDA_NN_HOME`, {
          home,
          pid: owner.pid,
        });
      }
      rmSync(path, { force: true });
      try {
        linkSync(draft, path); // fails if another process was faster: a complete lock or none
        return { release: () => rmSync(path, { force: true }) };
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
      }
    }
    throw new NnError('ALREADY_UP', `another process is just starting in ${home}`, { home });
  } finally {
    rmSync(draft, { force: true });
  }
}
