/**
 * What a run's directory says of the run as a whole: spec.json, and record.json, from which `restore` rebuilds it when Redis
 * has lost it. Both are complete or absent. Called by driver.ts and main.ts (write) and restore.ts (read).
 *
 * record.json is written at every change of phase, at checkpoints, and before a new epoch is told to the workers: no worker
 * ever saw an epoch above the one that lies here.
 */
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { NnError } from '../config/errors.ts';
import type { RunRecord } from '../config/messages.ts';
import { parseRunSpec } from '../config/run-spec.ts';
import type { RunSpec } from '../config/run-spec.ts';
import { onFile, writeWhole } from '../data/files.ts';
import { readRecord } from './run-store.ts';

const SPEC = 'spec.json';
const RECORD = 'record.json';

/** Writes spec.json, or checks the one that is there. Throws RUN_EXISTS when the directory belongs to another spec, DISK_FULL. */
export function claimDirectory(directory: string, spec: RunSpec): void {
  onFile(directory, () => mkdirSync(directory, { recursive: true }));
  const path = join(directory, SPEC);
  if (!existsSync(path)) return writeJson(path, spec);
  if (canonical(readSpecFile(directory)) === canonical(spec)) return;
  throw new NnError('RUN_EXISTS', `${directory} holds a run of another spec; choose another name, or move the directory away`, { path: directory });
}

/** The spec in a directory, with the defaults of this version for what an older one did not know. Throws FILE_NOT_FOUND, SPEC_INVALID. */
export function readSpecFile(directory: string): RunSpec {
  const path = join(directory, SPEC);
  return parseRunSpec(readJson(path, 'SPEC_INVALID'), path);
}

/** The record in a directory; null: there is none. Throws RUN_STATE when it is damaged. */
export function readRecordFile(directory: string): RunRecord | null {
  const path = join(directory, RECORD);
  return existsSync(path) ? readRecord(JSON.stringify(readJson(path, 'RUN_STATE'))) : null;
}

/** Replaces record.json, unless the one there is of a later epoch: then another orchestrator wrote it. Throws DISK_FULL. */
export function writeRecordFile(directory: string, record: RunRecord): void {
  const path = join(directory, RECORD);
  if (existsSync(path) && (readJson(path, 'RUN_STATE') as RunRecord).epoch > record.epoch) return;
  writeJson(path, record);
}

function readJson(path: string, code: 'SPEC_INVALID' | 'RUN_STATE'): unknown {
  const text = onFile(path, () => readFileSync(path, 'utf8'));
  try {
    return JSON.parse(text) as unknown;
  } catch (error) {
    throw new NnError(code, `${path}: not JSON (${(error as Error).message}); restore it from a backup${code === 'RUN_STATE' ? ', or delete it to go on with the run' : ''}`, { path }, error);
  }
}

/** One spec's text, however its keys are ordered. */
const canonical = (spec: RunSpec): string =>
  JSON.stringify(parseRunSpec(spec), (_key, value: unknown) =>
    typeof value === 'object' && value !== null && !Array.isArray(value) ? Object.fromEntries(Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1))) : value,
  );

/** JSON, complete or absent. Throws DISK_FULL, FILE_NOT_FOUND. */
function writeJson(path: string, value: object): void {
  onFile(dirname(path), () => mkdirSync(dirname(path), { recursive: true }));
  writeWhole(path, Buffer.from(`${JSON.stringify(value, null, 2)}\n`));
}
