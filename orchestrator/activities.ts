/**
 * What can be said of the run machine's activities without knowing its rules: who holds them, which jobs they are, what they are
 * called, and which of them a job found in Redis is. PURE. Called by the layers of the run machine.
 */
import { parseMessage } from '../config/messages.ts';
import type { Activity, Holder, JobAddress, NewJob, RunState } from './run-state.ts';

export type Of<Kind extends Activity['kind']> = Extract<Activity, { kind: Kind }>;

/** The workers whose death ends the activity. */
export function holdersOf(activity: Activity | null): readonly Holder[] {
  switch (activity?.kind) {
    case 'steps': case 'checkpoint': case 'eval': return [activity.holder];
    case 'flow': return activity.holders;
    case 'digest': return activity.jobs.map((job) => job.holder);
    case 'claim': case 'findCheckpoints': case undefined: return [];
  }
}

/** Its jobs that have not ended; the parent of a flow first. */
export function jobsOf(activity: Activity | null): readonly JobAddress[] {
  switch (activity?.kind) {
    case 'steps': case 'checkpoint': case 'eval': return [activity.job];
    case 'flow': return [activity.parent, ...activity.children];
    case 'digest': return activity.jobs;
    case 'claim': case 'findCheckpoints': case undefined: return [];
  }
}

/** What is under way, in words for people. */
export function nameOf({ activity, saving }: Pick<RunState, 'activity' | 'saving'>): string {
  switch (activity?.kind) {
    case 'steps': return `steps ${activity.fromStep + 1} to ${activity.fromStep + activity.stepCount}`;
    case 'flow': return `step ${activity.step}`;
    case 'checkpoint': return `checkpoint of step ${activity.step}`;
    case 'eval': return `eval of step ${activity.step}`;
    case 'digest': return `digest of step ${activity.step}`;
    case 'claim': return 'the claim of workers';
    case 'findCheckpoints': return 'the search for a good checkpoint';
    case undefined: return saving === null ? 'the run' : `checkpoint of step ${saving.step}, which is being written`;
  }
}

/** The activity that a job found in Redis is, if the run as it stands could have it. Throws MESSAGE_INVALID. */
export function adoptable(state: RunState, name: NewJob['name'], job: JobAddress, data: unknown, holder: Holder, related: readonly JobAddress[]): Activity | null {
  const { step: counted, version, checkpoints, lastEvalStep } = state;
  switch (name) {
    case 'steps': {
      const { fromStep, stepCount } = parseMessage('steps', data);
      return fromStep <= counted && fromStep + stepCount >= counted ? { kind: 'steps', job, holder, fromStep, stepCount } : null;
    }
    case 'reduce': {
      const { step: at } = parseMessage('reduce', data);
      return at === version + 1 ? { kind: 'flow', step: at, parent: job, children: related, holders: [] } : null;
    }
    case 'checkpoint': {
      const { step: at, directory } = parseMessage('checkpoint', data);
      return at === version && at > (checkpoints.at(-1)?.step ?? 0) ? { kind: 'checkpoint', job, holder, step: at, directory } : null;
    }
    case 'eval': {
      const { replica } = parseMessage('eval', data);
      return replica?.step === version && version > lastEvalStep ? { kind: 'eval', job, holder, step: version } : null;
    }
    case 'shard': case 'digest': return null;
  }
}
