/**
 * Jobs that end their worker's process: a native crash, a hung call, the system's memory killer. Whatever the cause, the same work
 * given to the next process may end that one too, for ever; so deaths are counted by the work that was in hand, and a run whose
 * work killed too often fails with the evidence. PURE. Called by run-machine.ts and machine-counting.ts; the evidence comes from the
 * supervisor of the dead process, by way of its successor's record (WorkerRecord.lastExit).
 *
 * Work is named by what stays the same when it is planned anew: `steps` by the step at hand, the others by their step (and shard).
 * A death counts once, by the incarnation that tells of it. It is forgiven when the work, or later work of its kind, is done.
 */
import type { ErrorRecord } from '../config/errors.ts';
import type { ExitRecord, WorkKill } from '../config/messages.ts';
import type { WorkerView } from './plan.ts';
import { parseJobId } from './run-state.ts';
import type { JobIdParts } from './run-state.ts';

/** Characters of a dead process's last words that go into a message. */
const LAST_WORDS = 200;

type Work = Pick<WorkKill, 'name' | 'step' | 'part'>;

/** The work that a job stood for when its worker died, while the run had counted `counted` steps. */
function workOf({ name, step, part }: JobIdParts, counted: number): Work {
  if (name === 'steps') return { name, step: counted + 1, part: 0 };
  return { name, step, part: name === 'shard' ? part : 0 };
}

const isSame = (a: Work, b: Work): boolean => a.name === b.name && a.step === b.step && a.part === b.part;

/** The death that a worker tells of, if a job of this run was in hand; null otherwise. */
export function killOf(view: WorkerView, run: string, counted: number): WorkKill | null {
  const { id, incarnation, lastExit } = view;
  const parts = lastExit?.job === null || lastExit === null ? null : parseJobId(lastExit.job);
  if (lastExit === null || parts === null || parts.run !== run) return null;
  return { ...workOf(parts, counted), worker: id, incarnation, epoch: parts.epoch, exit: lastExit };
}

/** The kills without those that work done by now forgives: `names` of work of `step` or earlier. */
export const forgive = (kills: readonly WorkKill[], names: readonly Work['name'][], step: number): readonly WorkKill[] =>
  kills.some((kill) => names.includes(kill.name) && kill.step <= step) ? kills.filter((kill) => !names.includes(kill.name) || kill.step > step) : kills;

/** The deaths of one work, when they are `most` or more; null otherwise. */
export function tooMany(kills: readonly WorkKill[], newest: WorkKill, most: number): readonly WorkKill[] | null {
  const same = kills.filter((kill) => isSame(kill, newest));
  return same.length >= most ? same : null;
}

/** Why a run fails whose work killed too often: the work, and how each process ended. */
export function fatalJob(kills: readonly WorkKill[]): ErrorRecord {
  const { name, step, part, exit } = kills.at(-1)!;
  const what = name === 'shard' ? `shard ${part} of step ${step}` : name === 'steps' ? `step ${step}` : `the ${name} of step ${step}`;
  const ends = kills.map(({ worker, exit: { code, signal } }) => `${worker} by ${signal ?? `exit code ${code}`}`).join(', ');
  const words = lastWords(exit);
  const message = `${what} ended its worker ${kills.length} times (${ends})${words === '' ? '' : `; last: ${words}`}; look at the workers' machine and log, then \`cuda-nn retry\``;
  return { code: 'JOB_FATAL', message, context: { job: exit.job, step, ...(name === 'shard' ? { shard: part } : {}), worker: kills.at(-1)!.worker, signal: exit.signal, exitCode: exit.code } };
}

function lastWords({ error }: ExitRecord): string {
  const stderr = error?.context['stderr'];
  const text = typeof stderr === 'string' ? (stderr.trim().split('\n').at(-1) ?? '') : (error?.message ?? '');
  return text.slice(0, LAST_WORDS);
}
