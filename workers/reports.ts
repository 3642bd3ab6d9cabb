/**
 * What microbatches report, summed to shards and to steps. All sums are float64 in microbatch order within a shard and in
 * shard order within a step, so that a step reports the same numbers whether one worker computed it or many. Pure.
 */
import type { ShardReport, StepReport } from '../config/messages.ts';

/** What one microbatch said (workers/model/trainer.ts). */
export interface MicrobatchNumbers {
  readonly lossSum: number;
  readonly targetTokens: number;
  /** Per layer. */
  readonly aux: readonly number[];
  /** Per layer and expert: routed slots. */
  readonly expertLoad: readonly (readonly number[])[];
}

/** What the optimizer said of a step. */
export interface StepNumbers {
  readonly gradientNorm: number;
  readonly clipScale: number;
  readonly learningRate: number;
  readonly skipped: boolean;
  /** Name of the first parameter whose gradient was not finite. */
  readonly nonFinite: string | null;
}

/** JSON has no NaN. */
export const finite = (value: number): number | null => (Number.isFinite(value) ? value : null);
const orNaN = (value: number | null): number => value ?? Number.NaN;

/** Sums the microbatches of a shard in order; loss sums in nats, aux sums per layer. */
export function sumMicrobatches(microbatches: readonly MicrobatchNumbers[]): ShardReport {
  const [first] = microbatches;
  const lossSum = microbatches.reduce((sum, each) => sum + each.lossSum, 0);
  const auxLossSum = (first?.aux ?? []).map((_, layer) => microbatches.reduce((sum, each) => sum + each.aux[layer]!, 0));
  const expertLoad = (first?.expertLoad ?? []).map((experts, layer) =>
    experts.map((_, expert) => microbatches.reduce((sum, each) => sum + each.expertLoad[layer]![expert]!, 0)),
  );
  const targetTokens = microbatches.reduce((sum, each) => sum + each.targetTokens, 0);
  return { lossSum: finite(lossSum), auxLossSum: auxLossSum.map(finite), expertLoad, targetTokens };
}

/**
 * The report of a step from its shards, in shard order. `microBatches` is the number in the whole step: aux losses are means
 * over them, the loss is the mean over target tokens (null when there is none, or when a sum is not finite).
 */
export function sumShards(step: number, shards: readonly ShardReport[], microBatches: number, outcome: StepNumbers, milliseconds: number): StepReport {
  const [first] = shards;
  const lossSum = shards.reduce((sum, shard) => sum + orNaN(shard.lossSum), 0);
  const targetTokens = shards.reduce((sum, shard) => sum + shard.targetTokens, 0);
  return {
    step,
    loss: finite(lossSum / targetTokens),
    auxLoss: (first?.auxLossSum ?? []).map((_, layer) => finite(shards.reduce((sum, shard) => sum + orNaN(shard.auxLossSum[layer]!), 0) / microBatches)),
    expertLoad: (first?.expertLoad ?? []).map((experts, layer) =>
      experts.map((_, expert) => shards.reduce((sum, shard) => sum + shard.expertLoad[layer]![expert]!, 0)),
    ),
    targetTokens,
    gradientNorm: finite(outcome.gradientNorm),
    clipScale: finite(outcome.clipScale),
    learningRate: outcome.learningRate,
    skipped: outcome.skipped,
    nonFinite: outcome.nonFinite,
    milliseconds,
  };
}

/** Milliseconds of a step done by several workers: the busiest worker's share of the shards, then the reduction. */
export function flowMilliseconds(shards: readonly { worker: string; timings: { computeMs: number; exchangeMs: number; waitMs: number } }[], reduceMs: number): number {
  const perWorker = new Map<string, number>();
  for (const { worker, timings } of shards) {
    perWorker.set(worker, (perWorker.get(worker) ?? 0) + timings.computeMs + timings.exchangeMs + timings.waitMs);
  }
  return Math.max(0, ...perWorker.values()) + reduceMs;
}

/** Reduced gradients that the log keeps: as many as fit into logBytes, but always two, or a worker that is one step behind could not follow. */
export function logLength(logBytes: number, gradientBytes: number): number {
  return Math.max(2, Math.floor(logBytes / Math.max(1, gradientBytes)));
}
