/**
 * Rebuilds runs on a Redis that does not know them, from their directories: spec.json, record.json, metrics.jsonl and the
 * checkpoints. Runs that were live are queued again and go on from their newest good checkpoint, finished ones get their
 * record back, and what Redis has is left alone. Called by client.ts; the runs are then driven as any others.
 *
 * Epochs: a worker that outlived the old Redis may hold a job of any epoch that was ever told to it. record.json is written
 * before that (run-directory.ts) and each line of metrics.jsonl has its epoch, so one more than the largest of them would be
 * above all; EPOCHS_UNWRITTEN more are for a disk that was full when it should have been written.
 *
 * Steps that metrics.jsonl holds beyond the newest checkpoint stay counted; they are computed again and not counted again.
 */
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { basename, join } from 'node:path';
import { NnError, errorCode, toErrorRecord } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import { TERMINAL_PHASES } from '../config/messages.ts';
import type { RunPhase, RunRecord } from '../config/messages.ts';
import type { RunSpec } from '../config/run-spec.ts';
import { listCheckpoints } from '../data/checkpoint-files.ts';
import { presentBranch } from './metrics.ts';
import type { EvalLine, RunLine } from './metrics.ts';
import { branchOf, survives } from '../config/branches.ts';
import { readRecordFile, readSpecFile } from './run-directory.ts';
import { queuedRecord } from './run-state.ts';
import type { RunStore } from './run-store.ts';

const EPOCHS_UNWRITTEN = 1_000;

/** What became of a run: `queued` goes on, `restored` has its record back, `kept` was in Redis, `refused` could not be read. */
export interface Restored {
  readonly run: string;
  readonly outcome: 'queued' | 'restored' | 'kept' | 'refused';
  readonly phase: RunPhase | null;
  /** Steps counted. */
  readonly step: number;
  readonly steps: number;
  /** Step of the newest checkpoint, from which a live run goes on; 0: there is none. */
  readonly checkpoint: number;
  readonly error: ErrorRecord | null;
}

export interface RestoreContext {
  /** The directory of runs. */
  readonly runs: string;
  readonly store: RunStore;
  readonly addRun: (run: string, priority: number) => Promise<void>;
}

/** Restores the runs of these names, or all that have a directory, in order of name. Throws what Redis throws. */
export async function restoreRuns({ runs, store, addRun }: RestoreContext, names: readonly string[]): Promise<Restored[]> {
  const wanted = names.length > 0 ? names : directoriesIn(runs);
  const restored: Restored[] = [];
  for (const name of wanted) restored.push(await restoreRun(join(runs, name), store, addRun));
  return restored;
}

const directoriesIn = (runs: string): string[] =>
  existsSync(runs) ? readdirSync(runs).filter((name) => existsSync(join(runs, name, 'spec.json'))).sort() : [];

async function restoreRun(directory: string, store: RunStore, addRun: RestoreContext['addRun']): Promise<Restored> {
  const run = basename(directory);
  const told = (outcome: Restored['outcome'], record: RunRecord | null, error: ErrorRecord | null = null): Restored => ({
    run, outcome, phase: record?.phase ?? null, step: record?.step ?? 0, steps: record?.steps ?? 0, checkpoint: record?.checkpoint?.step ?? 0, error,
  });
  const there = await known(store, run);
  if (there !== null) return told('kept', there);
  let spec: RunSpec;
  let record: RunRecord;
  try {
    ({ spec, record } = rebuild(directory));
  } catch (error) {
    if (errorCode(error) === undefined) throw error;
    return told('refused', null, toErrorRecord(error));
  }
  if (!(await store.create(run, spec, record))) return told('kept', await known(store, run));
  if (TERMINAL_PHASES.includes(record.phase)) return told('restored', record);
  await addRun(run, spec.priority);
  return told('queued', record);
}

async function known(store: RunStore, run: string): Promise<RunRecord | null> {
  try {
    return (await store.read(run)).record;
  } catch (error) {
    if (errorCode(error) === 'RUN_NOT_FOUND') return null;
    throw error;
  }
}

/** Spec and record of a run as its directory tells them. Throws RUN_NOT_FOUND, SPEC_INVALID, RUN_STATE, FILE_NOT_FOUND. */
export function rebuild(directory: string): { readonly spec: RunSpec; readonly record: RunRecord } {
  const run = basename(directory);
  if (!existsSync(join(directory, 'spec.json'))) throw new NnError('RUN_NOT_FOUND', `${directory} holds no run: there is no spec.json in it`, { run });
  const spec = readSpecFile(directory);
  if (spec.name !== run) throw new NnError('RUN_STATE', `${directory} holds a run named ${JSON.stringify(spec.name)}; give the directory that name`, { run });
  // Without a record the run was never taken up, or by an older version: it goes on from what else is there.
  const kept = readRecordFile(directory) ?? queuedRecord(run, spec, Date.now());
  const lines = linesOf<RunLine>(join(directory, 'metrics.jsonl'));
  const { step: reached, steps, evals: all, rollbacks: written } = presentBranch(lines, linesOf<EvalLine>(join(directory, 'evals.jsonl')));
  const rollbacks = lines.length === 0 ? kept.rollbacks : written;
  const evals = all.filter(({ loss }) => loss !== null);
  const epoch = lines.reduce((most, line) => Math.max(most, line.epoch), kept.epoch) + EPOCHS_UNWRITTEN + 1;
  const newest = listCheckpoints(directory).find(({ step, branch }) => branch === branchOf(rollbacks, step));
  const last = evals.at(-1);
  const validation = survives(kept.validation?.step ?? 0, rollbacks.slice(kept.rollbacks.length)) ? kept.validation : null;
  const record: RunRecord = {
    ...kept,
    run,
    step: lines.length > 0 ? reached : Math.max(kept.step, newest?.step ?? 0),
    checkpoint: newest === undefined ? null : { directory: newest.directory, step: newest.step },
    rollbacks,
    skippedSteps: Math.max(kept.skippedSteps, steps.filter(({ skipped }) => skipped).length),
    firstLoss: steps[0]?.loss ?? kept.firstLoss,
    validation: last === undefined ? validation : { step: last.step, loss: last.loss! },
    validationBefore: evals.find(({ step }) => step === 0)?.loss ?? kept.validationBefore,
  };
  if (TERMINAL_PHASES.includes(kept.phase)) return { spec, record };
  // A pause that was asked for outlives Redis.
  const phase = kept.phase === 'running' ? 'queued' : kept.phase;
  return { spec, record: { ...record, phase, epoch, way: null } };
}

/** The lines of a file but for a last one that was not written whole. Throws RUN_STATE. */
function linesOf<Line>(path: string): Line[] {
  if (!existsSync(path)) return [];
  const text = readFileSync(path, 'utf8');
  const lines = text.slice(0, text.lastIndexOf('\n') + 1).split('\n').filter((line) => line !== '');
  return lines.map((line, index) => {
    try {
      return JSON.parse(line) as Line;
    } catch (error) {
      throw new NnError('RUN_STATE', `${path}: line ${index + 1} is damaged; restore the file, or delete it to count the steps from the checkpoints`, { path, line: index + 1 }, error);
    }
  });
}
