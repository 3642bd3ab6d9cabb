/** A writer thread that goes wrong: its directory says how. Used by worker-pool.test. */
import type { WriteOutcome, WriteTask } from '../../workers/tasks.ts';

export default async function write({ directory }: WriteTask): Promise<WriteOutcome> {
  if (directory.endsWith('die')) process.exit(3);
  if (directory.endsWith('hang')) for (;;) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000);
  return Promise.resolve({ ok: true, bytes: 7 });
}
