/**
 * What a new driver believes of what Redis tells it about its run. PURE: no IO, no clock. Called by driver.ts as it takes a run up,
 * and by the simulation.
 *
 * A Redis that was started anew, or that another took the place of, may have lost its last second: its epoch may be one that was
 * over, a job that it shows as active may have ended, and one that it never heard of may be in a worker's hands, of an epoch that
 * is given out again. So nothing of it is believed: jobs are planned anew, under an epoch above all that any worker can have seen.
 * record.json holds that epoch (run-directory.ts), unless the disk was full; the lost second had room for EPOCHS_LOST of them.
 */
import type { Control } from '../config/keys.ts';
import type { RunRecord } from '../config/messages.ts';

const EPOCHS_LOST = 100;

export interface Told {
  /** The record in Redis. */
  readonly record: RunRecord;
  readonly control: Control | null;
  /** The record in the run's directory; null: there is none. */
  readonly kept: RunRecord | null;
  /** Whether the Redis that answers is known not to be the one that the driver before spoke to. */
  readonly restarted: boolean;
}

/** The record and the control to go on from: as they were told, or, when writes were `lost`, a record of a new epoch and no control. */
export function believe({ record, control, kept, restarted }: Told): { readonly record: RunRecord; readonly control: Control | null; readonly lost: boolean } {
  const told = Math.max(record.epoch, control?.epoch ?? 0);
  const lost = restarted || (kept !== null && kept.epoch > told);
  return lost ? { record: { ...record, epoch: Math.max(told, kept?.epoch ?? 0) + EPOCHS_LOST + 1 }, control: null, lost } : { record, control, lost };
}
