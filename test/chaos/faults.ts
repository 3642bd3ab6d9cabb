/**
 * The faults of chaos: which there are, how one is chosen, and how it is done to a stack. `choose` is a pure function of a
 * seeded generator, so that a seed always gives the same faults in the same order (when each hits is not reproducible). Called
 * by chaos.ts; knows nothing of promises or reports.
 */
import { readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Silence } from '../support/proxy.ts';
import { signal } from '../support/stack.ts';
import type { Network, Stack } from '../support/stack.ts';

export const KINDS = [
  'worker killed', 'worker stopped', 'worker drained, another joins', 'orchestrator killed', 'orchestrator stopped', 'Redis killed', 'Redis stopped',
  'network silent', 'connections forgotten', 'connections closed', 'Redis out of memory', 'eviction policy changed', 'disk full', 'checkpoint damaged', 'paused and resumed',
] as const;
export type FaultKind = (typeof KINDS)[number];

/** How often each comes, relative to the others. */
const WEIGHTS: Record<FaultKind, number> = {
  'worker killed': 6, 'worker stopped': 3, 'worker drained, another joins': 4, 'orchestrator killed': 4, 'orchestrator stopped': 2, 'Redis killed': 3, 'Redis stopped': 2,
  'network silent': 4, 'connections forgotten': 1, 'connections closed': 2, 'Redis out of memory': 2, 'eviction policy changed': 1, 'disk full': 2, 'checkpoint damaged': 2, 'paused and resumed': 2,
};
/** Those that others make up for while they last; the rest must end before the run can go on. */
const OUTLIVED: readonly FaultKind[] = [
  'worker killed', 'worker stopped', 'worker drained, another joins', 'orchestrator killed', 'orchestrator stopped', 'connections forgotten', 'connections closed',
];

export interface ChosenFault {
  readonly kind: FaultKind;
  /** Which of several victims: from 0 to 1. */
  readonly pick: number;
  readonly choice: number;
  /** How long it lasts, for those that do. */
  readonly lastsMs: number;
  /** Calm after it. */
  readonly pauseMs: number;
}

/** The scale of durations: what makes a fault short or long is how the times of a system are set. */
export interface Times {
  readonly deadAfterMs: number;
  readonly lockDurationMs: number;
}

/** The next fault. Draws the same number of times whatever it chooses. */
export function choose(random: () => number, { deadAfterMs, lockDurationMs }: Times): ChosenFault {
  const total = KINDS.reduce((sum, kind) => sum + WEIGHTS[kind], 0);
  let at = random() * total;
  const kind = KINDS.find((each) => (at -= WEIGHTS[each]) < 0) ?? KINDS[0];
  const [pick, choice, length, long, pause] = [random(), random(), random(), random(), random()];
  const lastsMs = long < 0.2 ? lockDurationMs * (1.1 + 0.3 * length) : deadAfterMs * (0.1 + 2 * length);
  return { kind, pick, choice, lastsMs: Math.round(lastsMs), pauseMs: Math.round(deadAfterMs * (0.2 + 2 * pause)) };
}

/** The moment from which the run is to go on again: the begin of what others make up for, the end of anything else. */
export const recoversFromBegin = (kind: FaultKind): boolean => OUTLIVED.includes(kind);

export interface Target {
  readonly stack: Stack;
  /** Prefixes of the supervisors, one worker each. */
  readonly workers: readonly string[];
  /** Name of the run under way. */
  readonly run: () => string;
  /** Whether the runs lie on a disk of their own that may be filled. */
  readonly ownDisk: boolean;
  readonly sleep: (milliseconds: number) => Promise<void>;
}

const pickOf = <Value>(values: readonly Value[], pick: number): Value | undefined => values[Math.min(values.length - 1, Math.floor(pick * values.length))];

/** Does it, and undoes it. Resolves with what was done, or null when there was nothing to do it to. */
export async function inflict(fault: ChosenFault, target: Target): Promise<string | null> {
  const { kind, pick, choice, lastsMs } = fault;
  const { stack, sleep } = target;
  switch (kind) {
    case 'worker killed':
    case 'worker stopped': {
      const victim = pickOf([...stack.workers], pick);
      if (victim === undefined) return null;
      const [id, pid] = victim;
      if (kind === 'worker killed') {
        signal(pid, 'SIGKILL');
        return id;
      }
      signal(pid, 'SIGSTOP');
      await sleep(lastsMs);
      signal(pid, 'SIGCONT');
      return `${id} for ${lastsMs} ms`;
    }
    case 'worker drained, another joins': {
      const prefix = pickOf(target.workers, pick)!;
      await stack.leave(prefix);
      await sleep(lastsMs / 2);
      await stack.work(1, prefix);
      return prefix;
    }
    case 'orchestrator killed': {
      const victim = pickOf(stack.orchestrators.filter(({ alive }) => alive), pick);
      await victim?.kill();
      await sleep(lastsMs / 4);
      await stack.orchestrate();
      return victim === undefined ? null : String(victim.pid);
    }
    case 'orchestrator stopped': {
      const victim = pickOf(stack.orchestrators.filter(({ alive }) => alive), pick);
      victim?.pause();
      await sleep(lastsMs);
      victim?.resume();
      return victim === undefined ? null : `${victim.pid} for ${lastsMs} ms`;
    }
    case 'Redis killed':
    case 'Redis stopped': {
      const { queues, exchange } = stack.redis;
      const [what, servers] = pickOf([['queues', [queues]], ['exchange', [exchange]], ['both', [queues, exchange]]] as const, pick)!;
      for (const server of servers) {
        if (kind === 'Redis killed') await server.kill();
        else server.pause();
      }
      await sleep(lastsMs);
      for (const server of servers) {
        if (kind === 'Redis killed') await server.start();
        else server.resume();
      }
      return `${what} for ${lastsMs} ms`;
    }
    case 'network silent': {
      const way = pickOf<Silence>(['up', 'down', 'both'], choice)!;
      const end = pick < 0.5 ? 'heal' : 'cut';
      const whose = (pick * 2) % 1 < 0.6 ? 'workers' : 'orchestrators';
      const network = (whose === 'workers' ? stack.workersNetwork : stack.orchestratorsNetwork)!;
      for (const proxy of proxiesOf(network)) proxy.silence(way);
      await sleep(lastsMs);
      for (const proxy of proxiesOf(network)) proxy[end]();
      return `${whose}, ${way}, ${end} after ${lastsMs} ms`;
    }
    case 'connections forgotten':
      for (const proxy of proxiesOf((pick < 0.5 ? stack.workersNetwork : stack.orchestratorsNetwork)!)) proxy.strand();
      return pick < 0.5 ? 'workers' : 'orchestrators';
    case 'connections closed':
      for (const server of [stack.redis.queues, stack.redis.exchange]) {
        for (const type of ['normal', 'pubsub']) await server.call('CLIENT', 'KILL', 'TYPE', type, 'SKIPME', 'yes');
      }
      return 'all';
    case 'Redis out of memory': {
      const servers = pickOf([[stack.redis.queues], [stack.redis.exchange], [stack.redis.queues, stack.redis.exchange]], pick)!;
      for (const server of servers) await server.call('CONFIG', 'SET', 'maxmemory', '1mb');
      await sleep(lastsMs);
      for (const server of servers) await server.call('CONFIG', 'SET', 'maxmemory', '0');
      return `${servers.length} for ${lastsMs} ms`;
    }
    case 'eviction policy changed':
      await stack.redis.queues.call('CONFIG', 'SET', 'maxmemory-policy', 'allkeys-lru');
      await sleep(lastsMs);
      await stack.redis.queues.call('CONFIG', 'SET', 'maxmemory-policy', 'noeviction');
      return `for ${lastsMs} ms`;
    case 'disk full': {
      if (!target.ownDisk) return null;
      const filler = join(stack.directory, 'runs', 'filler');
      fill(filler);
      await sleep(lastsMs);
      rmSync(filler, { force: true });
      return `for ${lastsMs} ms`;
    }
    case 'checkpoint damaged': {
      const file = damageNewest(join(stack.runDirectory(target.run()), 'checkpoints'), pick, choice);
      // Nobody needs a checkpoint as long as anybody holds a replica.
      for (const pid of stack.workers.values()) signal(pid, 'SIGKILL');
      return file;
    }
    case 'paused and resumed': {
      const run = stack.client.run(target.run());
      await run.pause();
      await sleep(lastsMs / 2);
      await run.resume();
      return `for ${Math.round(lastsMs / 2)} ms`;
    }
  }
}

const proxiesOf = ({ queues, exchange }: Network) => [queues, exchange];

/** Fills the disk that `path` lies on. */
export function fill(path: string): void {
  for (let bytes = 1 << 20; bytes >= 1; bytes >>= 1) {
    for (let full = false; !full; ) {
      try {
        writeFileSync(path, new Uint8Array(bytes), { flag: 'a' });
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error;
        full = true;
      }
    }
  }
}

/** Flips a bit of a file of the newest checkpoint; its path within the checkpoints, or null when there is none. */
export function damageNewest(checkpoints: string, pick: number, choice: number): string | null {
  const newest = names(checkpoints).filter((name) => /^step-\d+$/.test(name)).sort((a, b) => Number(b.slice(5)) - Number(a.slice(5)))[0];
  if (newest === undefined) return null;
  const directory = join(checkpoints, newest);
  const file = pickOf(['', 'training'].flatMap((inner) => names(join(directory, inner)).filter((name) => name.includes('.')).map((name) => join(inner, name))).sort(), pick);
  if (file === undefined) return null;
  try {
    const bytes = readFileSync(join(directory, file));
    bytes[Math.floor(choice * bytes.length)]! ^= 1 << Math.floor(pick * 8);
    writeFileSync(join(directory, file), bytes);
  } catch (error) {
    // It was deleted for a newer one, or there is no room.
    if (!['ENOENT', 'ENOSPC'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
    return null;
  }
  return `${newest}/${file}`;
}

function names(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
}
