/**
 * runs/<id>/faults.jsonl: every fault that a run ever had, with time, what was going on, code, message and worker; the
 * record in Redis holds the newest of them. Written by driver.ts, which asks it at the beginning for what was before.
 */
import { join } from 'node:path';
import type { ErrorRecord } from '../config/errors.ts';
import type { RunFault, RunRecord } from '../config/messages.ts';
import { LineFile } from './line-file.ts';
import { newestFaults } from './run-state.ts';

/** A line of faults.jsonl; attempt, epoch and step are those of the run when it was recorded. */
export type FaultLine = Omit<RunFault, 'error'> & ErrorRecord & { readonly attempt: number; readonly epoch: number; readonly step: number };

export class FaultLog {
  readonly #file: LineFile;
  /** What the file held when it was opened; null: there was none. */
  readonly before: Pick<RunRecord, 'faults' | 'faultCounts'> | null;

  /** Takes the file over from whoever wrote it before. Throws RUN_STATE, DISK_FULL. */
  constructor(directory: string) {
    this.#file = new LineFile(join(directory, 'faults.jsonl'), true);
    const lines = this.#file.takeLines() as FaultLine[] | null;
    this.before = lines === null ? null : summary(lines);
  }

  /** Throws DISK_FULL, and then keeps the line for the next append. */
  append({ atMs, what, worker, error }: RunFault, place: Pick<FaultLine, 'attempt' | 'epoch' | 'step'>): void {
    this.#file.append({ atMs, what, worker, ...error, ...place } satisfies FaultLine);
  }

  close(): void {
    this.#file.close();
  }
}

function summary(lines: readonly FaultLine[]): Pick<RunRecord, 'faults' | 'faultCounts'> {
  const faultCounts: Record<string, number> = {};
  for (const { code } of lines) faultCounts[code] = (faultCounts[code] ?? 0) + 1;
  const faults = lines.map(({ atMs, what, worker, code, message, context, stack }): RunFault => ({
    atMs, what, worker, error: { code, message, context, ...(stack === undefined ? {} : { stack }) },
  }));
  return { faults: newestFaults(faults), faultCounts };
}
