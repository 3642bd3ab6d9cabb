/**
 * The checkpoints of a run on disk, as the orchestrator sees them: which are good, and the removal of those that the spec no
 * longer keeps. Their contents are data/'s business; which to keep is plan.ts's. Called by driver.ts.
 */
import { rename, rm } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { toErrorRecord } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import { listCheckpoints, newestGood } from '../data/checkpoint-files.ts';
import type { CheckpointPlace } from './plan.ts';

export interface FoundCheckpoints {
  /** Oldest first; the newest was verified byte by byte, those before it will be when they are needed. */
  readonly good: readonly CheckpointPlace[];
  readonly bad: readonly { readonly directory: string; readonly error: ErrorRecord }[];
}

export async function findCheckpoints(runDirectory: string): Promise<FoundCheckpoints> {
  const { checkpoint, damaged } = await newestGood(runDirectory);
  const good = checkpoint === null ? [] : listCheckpoints(runDirectory).filter(({ step }) => step <= checkpoint.step).toReversed().map(({ directory, step }) => ({ directory, step }));
  return { good, bad: damaged.map(({ directory, error }) => ({ directory, error: toErrorRecord(error) })) };
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
