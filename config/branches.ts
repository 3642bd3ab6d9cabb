/**
 * Branches of a run: each time a loss spike rolls it back (orchestrator/loss-spike.ts) a new branch begins, which skips the data
 * that was read since the version it goes back to. What a version of the present branch is follows from the list of rollbacks
 * alone, so that list is all that orchestrators and workers tell each other. Pure; imports nothing.
 *
 *   branch 0   ... 18 19 20 21 22 23 (spike: back from 23 to 20)
 *   branch 1               \ 21 22 ...      step 21 reads the data of step 24; versions up to 20 are those of branch 0
 *
 * A version is named by its step and the branch that it was computed on: the same pair is the same bits, wherever it is met.
 */

/** The run went back from version `fromStep` to version `toStep`, which never falls from one rollback to the next. */
export interface Return {
  readonly fromStep: number;
  readonly toStep: number;
}

type Returns = readonly Return[] | undefined;

/** The branch on which version `step` of the present branch was computed. */
export const branchOf = (returns: Returns, step: number): number => (returns === undefined ? 0 : returns.findLastIndex(({ toStep }) => toStep < step) + 1);

/** The step of the sampler whose data step `step` reads. */
export const dataStep = (returns: Returns, step: number): number =>
  (returns ?? []).slice(0, branchOf(returns, step)).reduce((sum, { fromStep, toStep }) => sum + fromStep - toStep, step);

/** Whether a version is the same one after these rollbacks. */
export const survives = (step: number, returns: readonly Return[]): boolean => returns.every(({ toStep }) => step <= toStep);

/** Name of a version's checkpoint directory. */
export const checkpointName = (step: number, branch: number): CheckpointName => (branch === 0 ? `step-${step}` : `step-${step}-branch-${branch}`);
export type CheckpointName = `step-${number}` | `step-${number}-branch-${number}`;

/** Step and branch of such a name, or null. */
export function parseCheckpointName(name: string): { readonly step: number; readonly branch: number } | null {
  const match = /^step-(0|[1-9]\d{0,14})(?:-branch-([1-9]\d{0,3}))?$/.exec(name);
  return match === null ? null : { step: Number(match[1]), branch: Number(match[2] ?? 0) };
}

/** How a worker tells of the replica that it holds. */
export const replicaAt = (run: string, step: number, branch: number): { run: string; step: number; branch?: number } => (branch === 0 ? { run, step } : { run, step, branch });
