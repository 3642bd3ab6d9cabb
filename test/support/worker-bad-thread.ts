/** A compute thread that goes wrong: `open` ends the thread, `forget` never comes back, `close` is well. Used by worker-pool.test. */
import type { Outcome, Task } from '../../workers/tasks.ts';

export default async function serve(task: Task): Promise<Outcome> {
  if (task.kind === 'open') process.exit(3);
  if (task.kind === 'forget') for (;;) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000);
  return Promise.resolve({ ok: true, value: null, replica: null });
}
