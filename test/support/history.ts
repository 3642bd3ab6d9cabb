/**
 * The history checker: reads what a run wrote down of itself (orchestrator/history.ts) and says what in it breaks the promise
 * that every (step, shard) counts exactly once. PURE but for `readHistory`. Used by the simulation, the fault tests and chaos.
 *
 *   step          the next one, always: no double, no hole. One hole of one step is lawful: a driver was killed between its two
 *                 files; then the next driver's `taken` tells of it, and metrics.jsonl holds it
 *   shards        a sum's inputs are shards 0..n-1, in order, with the digests that were published; two reports of one shard never differ
 *   rollback      steps beyond its target are void: they count once more, on the next branch, and reports of epochs before it are of
 *                 the branch before. It is in metrics.jsonl, which may have it alone: then the next driver's `taken` tells of it
 *   driver        after `taken`, no line of a driver before
 *   epoch         never falls, but from that of an end which a crash kept from the record: nobody was ever told it
 *   checkpoint    of a version that was counted
 *   phase         as run-machine.ts has them; nothing counts after the last one; `completed` means that all steps counted
 */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { TERMINAL_PHASES } from '../../config/messages.ts';
import { branchOf } from '../../config/branches.ts';
import type { Rollback, RunPhase } from '../../config/messages.ts';
import type { HistoryLine } from '../../orchestrator/history.ts';
import { isRollback, presentBranch } from '../../orchestrator/metrics.ts';
import type { RunLine } from '../../orchestrator/metrics.ts';
import type { ShardInput } from '../../orchestrator/run-state.ts';

export interface HistoryContext {
  readonly steps: number;
  readonly shards: number;
  /** The steps that metrics.jsonl holds of the run's last branch, in its order. */
  readonly metrics: readonly number[];
  /** The rollbacks that it holds; absent: none. */
  readonly rollbacks?: readonly Rollback[];
  /** Weights digest of the undisturbed run, if the run is to have ended with it. */
  readonly weightsDigest?: string;
}

export interface HistoryVerdict {
  readonly violations: readonly string[];
  readonly steps: number;
  readonly epochs: number;
  readonly drivers: number;
  readonly faults: number;
  readonly flowSteps: number;
  /** Shards that jobs were added for although they had counted, or had been asked for in an earlier epoch. */
  readonly shardsAgain: number;
}

type Line<Type extends HistoryLine['type']> = Extract<HistoryLine, { type: Type }>;

/** From which phase a phase may come. */
const BEFORE: Record<RunPhase, readonly RunPhase[]> = {
  queued: [],
  running: ['queued', 'pausing', 'paused'],
  pausing: ['running'],
  paused: ['pausing', 'running'],
  completed: ['running', 'pausing'], // a pause that comes while the last digest is computed
  failed: ['queued', 'running', 'pausing', 'paused'],
  cancelled: ['queued', 'running', 'pausing', 'paused'],
};

/** Checks a whole history. Every violation is told, each with its line number. */
export function checkHistory(lines: readonly HistoryLine[], context: HistoryContext): HistoryVerdict {
  const checker = new Checker(context);
  for (const line of lines) checker.hear(line);
  return checker.end();
}

class Checker {
  readonly #context: HistoryContext;
  readonly #violations: string[] = [];
  readonly #drivers = new Set<string>();
  readonly #digests = new Map<string, { readonly digest: string; readonly worker: string }>();
  /** Flow steps asked for -> the epoch in which they first were. */
  readonly #asked = new Map<number, number>();
  #number = 0;
  #driver: string | null = null;
  #epoch = 0;
  #firstEpoch: number | null = null;
  #step = 0;
  #branch = 0;
  #phase: RunPhase = 'queued';
  #digest: string | null = null;
  #faults = 0;
  #flowSteps = 0;
  #shardsAgain = 0;

  constructor(context: HistoryContext) {
    this.#context = context;
  }

  hear(line: HistoryLine): void {
    this.#number++;
    const endedUntold = line.type === 'taken' && TERMINAL_PHASES.includes(this.#phase);
    if (line.epoch < this.#epoch && !endedUntold) this.#wrong(`the epoch falls from ${this.#epoch} to ${line.epoch}`);
    this.#epoch = line.epoch;
    this.#firstEpoch ??= line.epoch;
    if (line.type === 'taken') return this.#hearTaken(line);
    if (this.#driver === null) this.#wrong('nobody took the run');
    if (line.driver !== (this.#driver ??= line.driver)) this.#wrong(`driver ${line.driver} writes on, though ${this.#driver} has the run`);
    if (TERMINAL_PHASES.includes(this.#phase)) this.#wrong(`${line.type} after the run was ${this.#phase}`);
    switch (line.type) {
      case 'step': return this.#hearStep(line);
      case 'shard': return this.#hearDigest(line.step, line.shard, line.digest, line.worker, line.reportEpoch);
      case 'rollback': return this.#hearRollback(line);
      case 'job': return this.#hearJob(line);
      case 'checkpoint': return line.step > this.#step ? this.#wrong(`a checkpoint of step ${line.step}, but ${this.#step} counted`) : undefined;
      case 'phase': return this.#hearPhase(line);
      case 'fault': return void this.#faults++;
      case 'epoch': return;
    }
  }

  #wrong(message: string): void {
    this.#violations.push(`line ${this.#number}: ${message}`);
  }

  #hearTaken(line: Line<'taken'>): void {
    if (this.#drivers.has(line.driver)) this.#wrong(`driver ${line.driver} takes the run twice`);
    this.#drivers.add(line.driver);
    this.#driver = line.driver;
    // Written down, and not acted upon.
    if ((line.branch ?? 0) > this.#branch) this.#goTo(line.branch!);
    if (line.step < this.#step) this.#wrong(`steps ${line.step + 1} to ${this.#step} had counted, and are forgotten`);
    if (line.step > this.#step + 1) this.#wrong(`steps ${this.#step + 1} to ${line.step} never counted`);
    if (line.step === this.#step + 1 && !this.#inMetrics(line.step)) this.#wrong(`step ${line.step} never counted`);
    this.#step = line.step;
    if (line.checkpoint > this.#step) this.#wrong(`a checkpoint of step ${line.checkpoint}, but ${this.#step} counted`);
    // The end may have been written here and not in the record: then the run ends again.
    this.#phase = line.phase;
  }

  /** Whether metrics.jsonl has this step of the present branch, be it void by now. */
  #inMetrics(step: number): boolean {
    return this.#context.metrics.includes(step) || this.#rollbacks.slice(this.#branch).some(({ fromStep }) => fromStep >= step);
  }

  #hearRollback({ branch, fromStep, toStep, epoch }: Line<'rollback'>): void {
    if (branch !== this.#branch + 1) this.#wrong(`branch ${branch} after branch ${this.#branch}`);
    if (fromStep !== this.#step) this.#wrong(`a rollback from step ${fromStep}, but ${this.#step} counted`);
    const written = this.#rollbacks[branch - 1];
    if (written?.fromStep !== fromStep || written.toStep !== toStep || written.epoch !== epoch) this.#wrong(`the rollback from ${fromStep} to ${toStep} in epoch ${epoch} is not in metrics.jsonl`);
    this.#goTo(branch);
  }

  #goTo(branch: number): void {
    this.#branch = branch;
    const toStep = this.#rollbacks[branch - 1]?.toStep ?? this.#step;
    if (toStep >= this.#step) this.#wrong(`branch ${branch} goes back from step ${this.#step} to step ${toStep}`);
    this.#step = Math.min(this.#step, toStep);
    for (const step of this.#asked.keys()) if (step > toStep) this.#asked.delete(step);
  }

  get #rollbacks(): readonly Rollback[] {
    return this.#context.rollbacks ?? [];
  }

  #hearStep(line: Line<'step'>): void {
    if (line.step <= this.#step) this.#wrong(`step ${line.step} counts again`);
    if (line.step > this.#step + 1) this.#wrong(`step ${this.#step + 1}${line.step === this.#step + 2 ? '' : ` to ${line.step - 1}`} left out`);
    this.#step = Math.max(this.#step, line.step);
    if (line.step > this.#context.steps) this.#wrong(`step ${line.step} of ${this.#context.steps}`);
    if (line.way === 'flow') this.#flowSteps++;
    if (line.shards !== null) this.#hearSum(line.step, line.shards);
  }

  #hearSum(step: number, inputs: readonly ShardInput[]): void {
    const wanted = Array.from({ length: this.#context.shards }, (_, shard) => shard);
    if (inputs.map(({ shard }) => shard).join() !== wanted.join()) this.#wrong(`the sum of step ${step} is of shards ${inputs.map(({ shard }) => shard).join()}, not ${wanted.join()}`);
    for (const { shard, digest, worker, epoch } of inputs) {
      if (epoch > this.#epoch) this.#wrong(`shard ${shard} of step ${step} comes from epoch ${epoch}, ahead of ${this.#epoch}`);
      this.#hearDigest(step, shard, digest, worker, epoch);
    }
    const first = this.#asked.get(step);
    if (first !== undefined) this.#shardsAgain += inputs.filter(({ epoch }) => epoch > first).length;
  }

  #hearDigest(step: number, shard: number, digest: string, worker: string, epoch: number): void {
    const branch = branchOf(this.#rollbacks.filter((each) => each.epoch <= epoch), step);
    const known = this.#digests.get(`${branch}:${step}:${shard}`);
    if (known === undefined) this.#digests.set(`${branch}:${step}:${shard}`, { digest, worker });
    else if (known.digest !== digest) this.#wrong(`shard ${shard} of step ${step} is ${known.digest} (${known.worker}) and ${digest} (${worker})`);
  }

  #hearJob(line: Line<'job'>): void {
    if (line.through < line.from || line.through > this.#context.steps) this.#wrong(`a ${line.kind} job from ${line.from} to ${line.through}`);
    if (line.from > this.#step) this.#wrong(`a ${line.kind} job from version ${line.from}, but ${this.#step} counted`);
    if (line.kind === 'flow' && !this.#asked.has(line.through)) this.#asked.set(line.through, line.epoch);
    if (line.kind === 'steps') this.#shardsAgain += Math.max(0, Math.min(line.through, this.#step) - line.from) * this.#context.shards;
  }

  #hearPhase(line: Line<'phase'>): void {
    if (!BEFORE[line.phase].includes(this.#phase)) this.#wrong(`${this.#phase} becomes ${line.phase}`);
    this.#phase = line.phase;
    if (line.phase !== 'completed') return;
    if (this.#step !== this.#context.steps) this.#wrong(`completed at step ${this.#step} of ${this.#context.steps}`);
    this.#digest = line.weightsDigest;
  }

  end(): HistoryVerdict {
    const { metrics, weightsDigest } = this.#context;
    this.#number++;
    const wrongAt = metrics.findIndex((step, index) => step !== index + 1);
    if (wrongAt !== -1) this.#wrong(`metrics.jsonl has step ${metrics[wrongAt]} where ${wrongAt + 1} belongs`);
    if (metrics.length !== this.#step && metrics.length !== this.#step + 1) this.#wrong(`metrics.jsonl has ${metrics.length} steps, the history ${this.#step}`);
    if (weightsDigest !== undefined && this.#digest !== weightsDigest) this.#wrong(`the run ended with weights ${this.#digest}, undisturbed with ${weightsDigest}`);
    return {
      violations: this.#violations,
      steps: this.#step,
      epochs: this.#epoch - (this.#firstEpoch ?? 0),
      drivers: this.#drivers.size,
      faults: this.#faults,
      flowSteps: this.#flowSteps,
      shardsAgain: this.#shardsAgain,
    };
  }
}

/** The lines of a JSON-lines file, the last one left out if it is not whole; none when there is no file. */
export function readLines<Line>(path: string): Line[] {
  if (!existsSync(path)) return [];
  const text = readFileSync(path, 'utf8');
  return text.slice(0, text.lastIndexOf('\n') + 1).split('\n').filter((line) => line !== '').map((line) => JSON.parse(line) as Line);
}

/** Both files of a run's history, the older first. */
export const readHistory = (directory: string): HistoryLine[] => ['history.1.jsonl', 'history.jsonl'].flatMap((name) => readLines<HistoryLine>(join(directory, name)));

/** Checks the run of that directory. */
export function checkRun(directory: string, weightsDigest?: string): HistoryVerdict {
  const spec = JSON.parse(readFileSync(join(directory, 'spec.json'), 'utf8')) as { steps: number; batch: { shards: number } };
  const lines = readLines<RunLine>(join(directory, 'metrics.jsonl'));
  const { rollbacks } = presentBranch(lines, []);
  // What is void is left out, and nothing else: doubles and holes are for the checker to find.
  const metrics = lines.reduce<number[]>((steps, line) => (isRollback(line) ? steps.filter((step) => step <= line.toStep) : [...steps, line.step]), []);
  return checkHistory(readHistory(directory), { steps: spec.steps, shards: spec.batch.shards, metrics, rollbacks, ...(weightsDigest === undefined ? {} : { weightsDigest }) });
}
