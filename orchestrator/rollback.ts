/**
 * What a rollback changes in the state of a run, and what it is called. PURE: no IO, no clock. When one is due is loss-spike.ts's to
 * say, and machine-counting.ts has it done; config/branches.ts tells what a branch is.
 */
import { branchOf, survives } from '../config/branches.ts';
import type { ErrorRecord } from '../config/errors.ts';
import type { Origin, Rollback } from '../config/messages.ts';
import type { RunSpec } from '../config/run-spec.ts';
import { afterRollback } from './loss-spike.ts';
import type { Spike } from './loss-spike.ts';
import type { WorkerView } from './plan.ts';
import type { RunState } from './run-state.ts';

/** Why step `at` rolls the run back, or fails it when that was done too often. */
export function spikeError({ lossSpike: { factor, window, maxRollbacks } }: RunSpec, { loss, threshold, toStep }: Spike, at: number, rollbacks: number): ErrorRecord {
  const what = `the loss of step ${at} is ${loss.toFixed(4)}, above ${threshold.toFixed(4)}, which is ${factor} times the median of the ${window} before that were not`;
  const context = { step: at, toStep, loss, threshold, rollbacks };
  if (rollbacks < maxRollbacks) return { code: 'LOSS_SPIKE', message: `${what}; the run goes back to step ${toStep}, and on without the data read since`, context };
  const allowed = maxRollbacks === 0 ? 'lossSpike.maxRollbacks allows no rollback' : `the run was rolled back as often as lossSpike.maxRollbacks allows, ${rollbacks} times`;
  const advice = `look at the data and the learning rate, and begin a new run, if need be from the newest checkpoint up to step ${toStep} (initialCheckpoint)`;
  return { code: 'LOSS_SPIKE', message: `${what}; ${allowed}: ${advice}`, context };
}

/**
 * The state after a rollback, but for jobs, replica and epoch, which the machine gives up: steps beyond the target do not count any
 * more, their checkpoints are not the run's, and the newest that is left is where it goes on.
 */
export function rolledBack({ rollbacks, lossWatch, checkpoints, trimmedThrough, digests, lastEvalStep, lastComparisonStep, kills, shown }: RunState, rollback: Rollback): Partial<RunState> {
  const { toStep } = rollback;
  const kept = checkpoints.filter(({ step }) => step <= toStep);
  const newest = kept.at(-1)?.step ?? 0;
  return {
    rollbacks: [...rollbacks, rollback],
    lossWatch: afterRollback(lossWatch),
    step: toStep,
    version: newest,
    sharedVersion: newest,
    checkpoints: kept,
    trimmedThrough: Math.min(trimmedThrough, newest),
    digests: new Map([...digests].filter(([step]) => step <= toStep)),
    early: new Map(),
    home: null,
    lastEvalStep: Math.min(lastEvalStep, toStep),
    lastComparisonStep: Math.min(lastComparisonStep, toStep),
    skippedInARow: 0,
    kills: kills.filter(({ step }) => step <= toStep),
    shown: { ...shown, lastReport: null, validation: survives(shown.validation?.step ?? 0, [rollback]) ? shown.validation : null },
  };
}

/** Whether what was reported of a step in that epoch is of a branch that was given up. */
export const isAbandoned = (rollbacks: readonly Rollback[], step: number, epoch: number): boolean =>
  rollbacks.some((rollback) => epoch < rollback.epoch && step > rollback.toStep);

/** Whether a worker's replica stands at the run's version. */
export const standsAtVersion = ({ settings: { run }, version, rollbacks }: Pick<RunState, 'settings' | 'version' | 'rollbacks'>, { replica }: WorkerView): boolean =>
  replica?.run === run && replica.step === version && (replica.branch ?? 0) === branchOf(rollbacks, version);

/** What a job's message says of rollbacks; nothing, where there were none. */
export const originRollbacks = (rollbacks: readonly Rollback[]): Pick<Origin, 'rollbacks'> =>
  rollbacks.length === 0 ? {} : { rollbacks: rollbacks.map(({ fromStep, toStep }) => ({ fromStep, toStep })) };

/** An effect's list of rollbacks; nothing, where there were none. */
export const listed = (rollbacks: readonly Rollback[]): { readonly rollbacks?: readonly Rollback[] } => (rollbacks.length === 0 ? {} : { rollbacks });

/** How many rollbacks a job's message knows of. */
export function rollbacksIn(data: unknown): number {
  const { rollbacks, replica } = data as Partial<Origin> & { replica?: Partial<Origin> };
  return (rollbacks ?? replica?.rollbacks ?? []).length;
}
