/** What chaos found, as numbers and as text. PURE. Called by main.ts and the test of chaos. */
import { recoveries } from './chaos.ts';
import type { ChaosOutcome } from './chaos.ts';
import { KINDS } from './faults.ts';

export interface KindReport {
  readonly kind: string;
  readonly count: number;
  /** Seconds from a fault to the next step that counted; null when no fault was followed by one. */
  readonly recovery: { readonly median: number; readonly p95: number; readonly maximum: number } | null;
}

export interface ChaosReport {
  readonly passed: boolean;
  readonly minutes: number;
  readonly seed: number;
  readonly workers: number;
  readonly interrupted: boolean;
  readonly elapsedSeconds: number;
  readonly faults: number;
  readonly kinds: readonly KindReport[];
  readonly all: KindReport;
  readonly runs: number;
  readonly steps: number;
  readonly stepsPerSecond: number;
  readonly undisturbedStepsPerSecond: number;
  readonly flowSteps: number;
  readonly epochs: number;
  readonly drivers: number;
  readonly shards: number;
  readonly shardsAgain: number;
  readonly resumed: number;
  readonly referenceDigest: string;
  readonly digestsEqual: number;
  readonly violations: readonly string[];
}

const SHARDS = 4;

const quantile = (sorted: readonly number[], part: number): number => sorted[Math.min(sorted.length - 1, Math.ceil(part * sorted.length) - 1)]!;

function kindReport(kind: string, milliseconds: readonly (number | null)[]): KindReport {
  const seconds = milliseconds.flatMap((each) => (each === null ? [] : [each / 1000])).sort((a, b) => a - b);
  const recovery = seconds.length === 0 ? null : { median: quantile(seconds, 0.5), p95: quantile(seconds, 0.95), maximum: seconds.at(-1)! };
  return { kind, count: milliseconds.length, recovery };
}

export function reportOf(outcome: ChaosOutcome): ChaosReport {
  const { options, faults, runs, stepTimesMs, beganMs, endedMs } = outcome;
  const recovered = recoveries(faults, stepTimesMs);
  const sum = (of: (run: ChaosOutcome['runs'][number]) => number): number => runs.reduce((total, run) => total + of(run), 0);
  const digestsEqual = runs.filter(({ weightsDigest }) => weightsDigest === outcome.referenceDigest).length;
  const violations = runs.flatMap(({ run, verdict }) => verdict.violations.map((violation) => `${run}: ${violation}`));
  const steps = sum(({ verdict }) => verdict.steps);
  return {
    passed: runs.length > 0 && digestsEqual === runs.length && violations.length === 0 && !outcome.interrupted,
    minutes: options.minutes, seed: options.seed, workers: options.workers, interrupted: outcome.interrupted,
    elapsedSeconds: (endedMs - beganMs) / 1000,
    faults: faults.length,
    kinds: KINDS.map((kind) => kindReport(kind, recovered.filter((each) => each.kind === kind).map(({ milliseconds }) => milliseconds))).filter(({ count }) => count > 0),
    all: kindReport('all', recovered.map(({ milliseconds }) => milliseconds)),
    runs: runs.length,
    steps,
    stepsPerSecond: steps / ((endedMs - beganMs) / 1000),
    undisturbedStepsPerSecond: outcome.referenceStepsPerSecond,
    flowSteps: sum(({ verdict }) => verdict.flowSteps),
    epochs: sum(({ verdict }) => verdict.epochs),
    drivers: sum(({ verdict }) => verdict.drivers),
    shards: SHARDS * steps,
    shardsAgain: sum(({ verdict }) => verdict.shardsAgain),
    resumed: sum(({ resumed }) => resumed),
    referenceDigest: outcome.referenceDigest,
    digestsEqual,
    violations,
  };
}

/** The report for people. */
export function textOf(report: ChaosReport): string {
  const seconds = (value: number | undefined): string => (value === undefined ? '-' : value.toFixed(1)).padStart(9);
  const row = ({ kind, count, recovery }: KindReport): string => `${kind.padEnd(32)}${String(count).padStart(6)}${seconds(recovery?.median)}${seconds(recovery?.p95)}${seconds(recovery?.maximum)}`;
  const { steps, stepsPerSecond, undisturbedStepsPerSecond, shards, shardsAgain, runs, digestsEqual, violations } = report;
  return [
    `chaos: ${report.minutes} minutes, seed ${report.seed}, ${report.workers} workers, ${report.elapsedSeconds.toFixed(0)} s in all${report.interrupted ? ', INTERRUPTED' : ''}`,
    '',
    `${'fault'.padEnd(32)}${'count'.padStart(6)}${'median'.padStart(9)}${'p95'.padStart(9)}${'maximum'.padStart(9)}  seconds to the next step`,
    ...report.kinds.map(row),
    row(report.all),
    '',
    `runs        ${runs}, ${report.epochs} epochs, ${report.drivers} drivers, ${report.resumed} times resumed or retried by hand`,
    `steps       ${steps} (${report.flowSteps} shared by several workers), ${stepsPerSecond.toFixed(2)} a second; undisturbed on one worker ${undisturbedStepsPerSecond.toFixed(2)}`,
    `shards      ${shards} counted, at most ${shardsAgain} of them computed again (${((100 * shardsAgain) / Math.max(1, shards)).toFixed(1)}%)`,
    `weights     ${digestsEqual} of ${runs} runs as undisturbed (${report.referenceDigest.slice(0, 16)})`,
    `history     ${violations.length === 0 ? 'clean: each (step, shard) counted once' : violations.join('\n            ')}`,
    report.passed ? 'passed' : 'FAILED',
    '',
  ].join('\n');
}
