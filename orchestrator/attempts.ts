/**
 * The attempts of a run as its record tells them: begun, ended, and a record made ready for another. PURE: no IO, no clock.
 * Called by run-machine.ts, machine-decisions.ts and driver.ts (begin, end) and client.ts (retry).
 */
import type { ErrorRecord } from '../config/errors.ts';
import type { RunAttempt, RunPhase, RunRecord } from '../config/messages.ts';
import type { RunSpec } from '../config/run-spec.ts';

const ATTEMPTS_KEPT = 50;

type Attempts = readonly RunAttempt[];


/** The attempt that goes on, if one does. */
export function openAttempt(attempts: Attempts): RunAttempt | null {
  const last = attempts.at(-1);
  return last?.endedAtMs === null ? last : null;
}

/** With one more attempt, unless one goes on already: a run that changes orchestrators is in the same. */
export function beginAttempt(attempts: Attempts, { fromStep, atMs }: { fromStep: number; atMs: number }): Attempts {
  if (openAttempt(attempts) !== null) return attempts;
  const next: RunAttempt = {
    number: (attempts.at(-1)?.number ?? 0) + 1, startedAtMs: atMs, endedAtMs: null, fromStep, toStep: fromStep, phase: 'running', error: null, runningMs: 0,
  };
  return [...attempts, next].slice(-ATTEMPTS_KEPT);
}

/** The attempt that goes on, changed; nothing if none does. */
export function changeAttempt(attempts: Attempts, change: (open: RunAttempt) => Partial<RunAttempt>): Attempts {
  const open = openAttempt(attempts);
  return open === null ? attempts : [...attempts.slice(0, -1), { ...open, ...change(open) }];
}

/** Time in phase `running` goes by. */
export const spend = ({ attempts, runningMs }: Pick<RunRecord, 'attempts' | 'runningMs'>, spentMs: number): Pick<RunRecord, 'attempts' | 'runningMs'> => ({
  attempts: changeAttempt(attempts, (open) => ({ runningMs: open.runningMs + spentMs })),
  runningMs: runningMs + spentMs,
});

/** Why an attempt that was running for so long must end; null: it need not. */
export function timeLimit({ maxDurationSeconds: limit }: RunSpec, runningMs: number): ErrorRecord | null {
  if (!(limit > 0) || runningMs < 1000 * limit) return null;
  const message = `running for ${limit} s, as long as maxDurationSeconds allows; \`cuda-nn retry\` goes on from its checkpoint for as long again`;
  return { code: 'TIME_LIMIT', message, context: { seconds: limit } };
}

export interface End {
  readonly phase: RunPhase;
  readonly toStep: number;
  readonly atMs: number;
  readonly error: ErrorRecord | null;
}

export const endAttempt = (attempts: Attempts, { phase, toStep, atMs, error }: End): Attempts => changeAttempt(attempts, () => ({ phase, toStep, error, endedAtMs: atMs }));

/** The record of a run that could not even be taken up: an attempt of no length. */
export function failedRecord(record: RunRecord, error: ErrorRecord, atMs: number): RunRecord {
  const attempts = beginAttempt(record.attempts, { fromStep: record.step, atMs });
  return { ...record, phase: 'failed', error, finishedAtMs: atMs, attempts: endAttempt(attempts, { phase: 'failed', toStep: record.step, atMs, error }) };
}

/** The record of a run that is to be tried again. Its epoch is above that of every job of the attempts before. */
export const retriedRecord = (record: RunRecord): RunRecord => ({
  ...record, phase: 'queued', epoch: record.epoch + 1, error: null, finishedAtMs: null, weightsDigest: null, way: null, tokensPerSecond: null,
});
