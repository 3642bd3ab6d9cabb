/**
 * Reads what users write as options into checked values, with USAGE in one line where it cannot be. Pure but for the spec
 * file. Called by the commands.
 */
import { readFileSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { NnError } from '../config/errors.ts';

/** Which GPUs the workers drive: every one, some by index, or none (the CPU). */
export type Gpus = 'all' | 'none' | readonly number[];

/** Reads `all`, `none` or `0,1,3`. Throws USAGE. */
export function parseGpus(text: string): Gpus {
  if (text === 'all' || text === 'none') return text;
  if (!/^\d{1,4}(,\d{1,4})*$/.test(text)) {
    throw new NnError('USAGE', `--gpus is ${JSON.stringify(text)}, but must be all, none, or numbers such as 0,1`);
  }
  return [...new Set(text.split(',').map(Number))];
}

/** A parser of whole numbers within bounds, for commander. It throws USAGE. */
export const parseWhole =
  (option: string, low: number, high: number) =>
  (text: string): number => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || value < low || value > high) {
      throw new NnError('USAGE', `${option} is ${JSON.stringify(text)}, but must be a whole number from ${low} to ${high}`);
    }
    return value;
  };

/** A parser of numbers above `low` and up to `high`, for commander. It throws USAGE. */
export const parseNumber =
  (option: string, low: number, high: number) =>
  (text: string): number => {
    const value = Number(text);
    if (text.trim() === '' || !Number.isFinite(value) || value <= low || value > high) {
      throw new NnError('USAGE', `${option} is ${JSON.stringify(text)}, but must be a number above ${low}${Number.isFinite(high) ? ` and up to ${high}` : ''}`);
    }
    return value;
  };

/** All of standard input, or of a file. Throws FILE_NOT_FOUND. */
export function readText(path: string): string {
  try {
    return readFileSync(path === '-' ? 0 : path, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') throw new NnError('FILE_NOT_FOUND', `${path}: no such file`, { path }, error);
    if (code === 'EISDIR') throw new NnError('FILE_NOT_FOUND', `${path} is a directory, not a file`, { path }, error);
    if (code === 'EACCES') throw new NnError('FILE_NOT_FOUND', `${path} may not be read`, { path }, error);
    throw error;
  }
}

/** Paths within a spec, by section and key. */
const SPEC_PATHS = [['data', 'train'], ['data', 'validation'], ['data', 'tokenizer'], ['initialCheckpoint']] as const;

/**
 * Reads a run spec (JSON) from a file, or from standard input for `-`. Relative paths in it count from the spec file's
 * directory (from the current one for `-`), so that a spec and its data can be moved together. Its form is checked by
 * whoever gets it. Throws FILE_NOT_FOUND, SPEC_INVALID.
 */
export function readSpec(path: string): Record<string, unknown> {
  const where = path === '-' ? 'standard input' : path;
  const text = readText(path);
  let spec: unknown;
  try {
    spec = JSON.parse(text);
  } catch (error) {
    throw new NnError('SPEC_INVALID', `${where}: not JSON (${(error as Error).message})`, { path }, error);
  }
  if (typeof spec !== 'object' || spec === null || Array.isArray(spec)) throw new NnError('SPEC_INVALID', `${where}: must be a JSON object`, { path });
  const base = path === '-' ? process.cwd() : dirname(resolve(path));
  for (const steps of SPEC_PATHS) {
    const parent = steps.slice(0, -1).reduce<unknown>((at, key) => (at as Record<string, unknown> | undefined)?.[key], spec);
    const key = steps.at(-1)!;
    if (typeof parent !== 'object' || parent === null) continue;
    const value = (parent as Record<string, unknown>)[key];
    if (typeof value === 'string' && value !== '') (parent as Record<string, unknown>)[key] = resolve(base, value);
  }
  return spec as Record<string, unknown>;
}
