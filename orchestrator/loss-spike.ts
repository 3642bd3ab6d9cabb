/**
 * When a loss has risen too far, and to which version the run then goes back: arithmetic on the reports as they are counted, so that
 * every orchestrator, also one that takes the run over and reads them from metrics.jsonl, decides the same. PURE: no IO, no clock.
 * Called by the run machine (machine-counting.ts, machine-decisions.ts) and metrics.ts; what a rollback changes is in config/branches.ts.
 *
 *   above       loss > lossSpike.factor * median of the last `window` losses that were not above; nothing is, before there are so many
 *   spike       `patience` steps in a row are above
 *   target      the newest multiple of checkpoint.every before the first of them; 0 without one
 *
 * Steps whose gradient was not finite changed nothing: they are not looked at. After a rollback the losses up to the target are
 * those that the next are compared with, and no step up to there counts as above any more, so that targets never fall.
 */
import type { StepReport } from '../config/messages.ts';
import type { RunSpec } from '../config/run-spec.ts';

/** What the rule remembers of a branch. */
export interface LossWatch {
  /** The last losses that were not above, oldest first, at most `window`. */
  readonly recent: readonly number[];
  /** The target of a spike that began at the newest step that was looked at; 0 at first. */
  readonly target: number;
  /** `recent`, as it was at the target. */
  readonly atTarget: readonly number[];
  /** Steps in a row that were above. */
  readonly above: number;
  /** The newest of them, and what it was above. */
  readonly loss: number;
  readonly threshold: number;
}

export interface Spike {
  readonly loss: number;
  readonly threshold: number;
  /** The version to go back to. */
  readonly toStep: number;
}

export const UNWATCHED: LossWatch = { recent: [], target: 0, atTarget: [], above: 0, loss: 0, threshold: 0 };

type Rules = Pick<RunSpec, 'lossSpike' | 'checkpoint'>;

/** The newest version at or before `step` to which a run goes back. */
const targetBefore = ({ checkpoint: { every } }: Rules, step: number): number => (every === 0 ? 0 : Math.floor(step / every) * every);

/** Looks at the report of the next step. */
export function watchLoss(rules: Rules, watch: LossWatch, { step, loss, skipped }: Pick<StepReport, 'step' | 'loss' | 'skipped'>): LossWatch {
  const { factor, window } = rules.lossSpike;
  if (factor === 0 || skipped || loss === null) return watch;
  // `recent` changes only below, so it is that of the target as long as nothing was added since.
  const target = targetBefore(rules, step - 1);
  const moved = target > watch.target ? { ...watch, target, atTarget: watch.recent } : watch;
  const threshold = watch.recent.length < window ? Infinity : factor * median(watch.recent);
  if (loss <= threshold) return { ...moved, recent: [...watch.recent, loss].slice(-window), above: 0 };
  return { ...(watch.above > 0 ? watch : moved), above: watch.above + 1, loss, threshold };
}

/** The spike that the newest report completed; null: none. */
export function spikeOf({ lossSpike: { factor, patience } }: Rules, { above, loss, threshold, target }: LossWatch): Spike | null {
  return factor > 0 && above >= patience ? { loss, threshold, toStep: target } : null;
}

/** What is remembered after the rollback that a spike brought. */
export const afterRollback = (watch: LossWatch): LossWatch => ({ ...watch, recent: watch.atTarget, above: 0 });

/** The oldest version to which a run that has counted `step` steps may still go back; null: it never does. */
export function oldestTarget(rules: Rules, { above, target }: LossWatch, step: number): number | null {
  if (rules.lossSpike.factor === 0) return null;
  return above > 0 ? target : targetBefore(rules, step);
}

function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}
