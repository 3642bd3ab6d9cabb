/**
 * The checkpoints of a run on disk, as the orchestrator sees them: which are good, and the removal of those that the spec no
 * longer keeps. Their contents are data/'s business; which to keep is plan.ts's. Called by driver.ts.
 */
import { rename, rm } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { branchOf } from '../config/branches.ts';
import { toErrorRecord } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import type { Rollback } from '../config/messages.ts';
import { listCheckpoints, newestGood } from '../data/checkpoint-files.ts';
import type { NamedCheckpoint } from '../data/checkpoint-files.ts';
import type { CheckpointPlace } from './plan.ts';

export interface FoundCheckpoints {
  /** Oldest first; the newest was verified byte by byte, those before it will be when they are needed. */
  readonly good: readonly CheckpointPlace[];
  readonly bad: readonly { readonly directory: string; readonly error: ErrorRecord }[];
}

/** `rollbacks`: those of the run; checkpoints of branches that were given up are neither good nor bad. */
export async function findCheckpoints(runDirectory: string, rollbacks: readonly Rollback[]): Promise<FoundCheckpoints> {
  const present = isPresent(rollbacks);
  const { checkpoint, damaged } = await newestGood(runDirectory, present);
  const all = checkpoint === null ? [] : listCheckpoints(runDirectory).filter((each) => present(each) && each.step <= checkpoint.step);
  const good = all.map(({ directory, step }) => ({ directory, step })).toReversed();
  return { good, bad: damaged.map(({ directory, error }) => ({ directory, error: toErrorRecord(error) })) };
}

const isPresent = (rollbacks: readonly Rollback[]) => ({ step, branch }: NamedCheckpoint): boolean => branchOf(rollbacks, step) === branch;

/** Removes the checkpoints of branches that were given up, which a crash or a slow writer may have left. */
export async function deleteAbandoned(runDirectory: string, rollbacks: readonly Rollback[]): Promise<void> {
  if (rollbacks.length === 0) return;
  const present = isPresent(rollbacks);
  for (const each of listCheckpoints(runDirectory)) if (!present(each)) await deleteCheckpoint(each.directory);
}

/** Removes a checkpoint; a crash half-way leaves nothing that looks like one. */
export async function deleteCheckpoint(directory: string): Promise<void> {
  const away = join(dirname(directory), `.deleted-${basename(directory)}`);
  try {
    await rename(directory, away);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  await rm(away, { recursive: true, force: true });
}
