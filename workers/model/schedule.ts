/** The learning rate of a step: linear warm-up, then a cosine to a minimum. Pure. Called by the trainer and by charts. */
import type { RunSpec } from '../../config/run-spec.ts';

/** The fields of a run's optimizer that decide the learning rate. */
export type Schedule = Pick<RunSpec['optimizer'], 'learningRate' | 'minLearningRateRatio' | 'warmupSteps'>;

/**
 * Learning rate of step `step`, counted from 1, of `totalSteps`:
 * base * step / warmup while step <= warmup, then min + (base - min)/2 * (1 + cos(pi * (step - warmup)/(total - warmup))), with
 * min = base * minLearningRateRatio. A step after the last keeps the minimum.
 */
export function learningRate(schedule: Schedule, totalSteps: number, step: number): number {
  const { learningRate: base, minLearningRateRatio, warmupSteps } = schedule;
  if (!(step >= 1)) throw new RangeError(`step ${step} has no learning rate: steps count from 1`);
  if (step <= warmupSteps) return (base * step) / warmupSteps;
  const minimum = base * minLearningRateRatio;
  if (step >= totalSteps) return minimum;
  return minimum + ((base - minimum) / 2) * (1 + Math.cos((Math.PI * (step - warmupSteps)) / (totalSteps - warmupSteps)));
}
