/**
 * The writer thread of a worker: writes a copied state to the disk as a checkpoint, while the compute thread goes on. One at a
 * time. Loaded by piscina (pool.ts) and nobody else; knows neither devices nor BullMQ.
 */
import { workerData } from 'node:worker_threads';
import { toErrorRecord } from '../config/errors.ts';
import { writeCheckpoint } from '../data/checkpoint-files.ts';
import { Signals } from './signals.ts';
import { sourceOf } from './state-copy.ts';
import type { WriteOutcome, WriteTask } from './tasks.ts';

const signals = new Signals((workerData as { readonly shared: SharedArrayBuffer }).shared);

/** Never throws: failures are values. CANCELLED when the signals say `drop`; the temporary directory is then removed. */
export default async function write({ directory, copy }: WriteTask): Promise<WriteOutcome> {
  try {
    signals.beat();
    const { bytes } = await writeCheckpoint(directory, sourceOf(copy, () => signals.check()));
    return { ok: true, bytes };
  } catch (error) {
    return { ok: false, error: toErrorRecord(error) };
  }
}
