/**
 * A run of the simulated world without jobs, workers or faults: the steps one after another, and the rule of loss-spike.ts told again
 * in the plainest way, from the whole line of losses at every step. What any disturbed run must come to. Used by run-machine.test.ts.
 */
import type { RunSpec } from '../../config/run-spec.ts';
import { chainAt } from './chain.ts';

export interface Outcome {
  readonly phase: 'completed' | 'failed';
  readonly step: number;
  readonly rollbacks: readonly { readonly fromStep: number; readonly toStep: number }[];
  /** State of the chain at the end. */
  readonly state: number;
}

export function outcomeOf(spec: RunSpec): Outcome {
  const { factor, window, patience, maxRollbacks } = spec.lossSpike;
  const { every } = spec.checkpoint;
  const rollbacks: { fromStep: number; toStep: number }[] = [];
  let line: { loss: number; above: boolean }[] = [];
  while (line.length < spec.steps) {
    const step = line.length + 1;
    const loss = chainAt(step - 1, rollbacks);
    const others = line.filter(({ above }) => !above).map((each) => each.loss).slice(-window).sort((a, b) => a - b);
    const middle = (others[Math.floor((window - 1) / 2)]! + others[Math.ceil((window - 1) / 2)]!) / 2;
    line.push({ loss, above: factor > 0 && others.length === window && loss > factor * middle });
    const calm = Math.max(rollbacks.at(-1)?.toStep ?? 0, line.findLastIndex(({ above }) => !above) + 1);
    if (factor === 0 || step - calm < patience) continue;
    if (rollbacks.length === maxRollbacks) return { phase: 'failed', step, rollbacks, state: chainAt(step, rollbacks) };
    const toStep = every === 0 ? 0 : calm - (calm % every);
    rollbacks.push({ fromStep: step, toStep });
    line = line.slice(0, toStep);
  }
  return { phase: 'completed', step: spec.steps, rollbacks, state: chainAt(spec.steps, rollbacks) };
}
