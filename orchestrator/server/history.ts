/**
 * Loss curves for the page: reads a run's metrics.jsonl as it grows, and keeps a bounded number of evenly spaced points.
 * Where the runs' directory is not on this machine there are none. Called by server.ts.
 */
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { join } from 'node:path';
import { isRollback } from '../metrics.ts';
import type { RunLine } from '../metrics.ts';

/** Points kept of a run: beyond it every other one is dropped. */
const POINTS = 1_024;
const RUNS = 64;
const READ_BYTES = 1 << 20;

export interface Curve {
  readonly steps: readonly number[];
  readonly losses: readonly number[];
}

interface Growing {
  bytes: number;
  rest: string;
  stride: number;
  steps: number[];
  losses: number[];
}

export class Histories {
  readonly #runs: string;
  readonly #known = new Map<string, Growing>();

  constructor(runs: string) {
    this.#runs = runs;
  }

  /** The curve so far; empty when there is no file. `run` must be a run's id, not what a user typed. */
  curve(run: string): Curve {
    const known = this.#known.get(run) ?? { bytes: 0, rest: '', stride: 1, steps: [], losses: [] };
    this.#known.delete(run);
    this.#known.set(run, known);
    if (this.#known.size > RUNS) this.#known.delete(this.#known.keys().next().value!);
    let descriptor: number;
    try {
      descriptor = openSync(join(this.#runs, run, 'metrics.jsonl'), 'r');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
      return { steps: [], losses: [] };
    }
    try {
      read(descriptor, known);
    } finally {
      closeSync(descriptor);
    }
    return { steps: known.steps, losses: known.losses };
  }
}

function read(descriptor: number, known: Growing): void {
  if (fstatSync(descriptor).size < known.bytes) Object.assign(known, { bytes: 0, rest: '', stride: 1, steps: [], losses: [] });
  const buffer = Buffer.alloc(READ_BYTES);
  for (let got = readSync(descriptor, buffer, 0, READ_BYTES, known.bytes); got > 0; got = readSync(descriptor, buffer, 0, READ_BYTES, known.bytes)) {
    known.bytes += got;
    const lines = (known.rest + buffer.toString('latin1', 0, got)).split('\n');
    known.rest = lines.pop()!;
    for (const line of lines) take(known, JSON.parse(line) as RunLine);
  }
}

function take(known: Growing, line: RunLine): void {
  if (isRollback(line)) {
    const kept = known.steps.filter((step) => step <= line.toStep).length;
    known.steps = known.steps.slice(0, kept);
    known.losses = known.losses.slice(0, kept);
    return;
  }
  const { step, loss } = line;
  if (loss === null || step % known.stride !== 0) return;
  known.steps.push(step);
  known.losses.push(loss);
  if (known.steps.length < POINTS) return;
  known.stride *= 2;
  known.losses = known.losses.filter((_, index) => known.steps[index]! % known.stride === 0);
  known.steps = known.steps.filter((at) => at % known.stride === 0);
}
