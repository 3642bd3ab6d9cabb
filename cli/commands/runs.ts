/**
 * The commands about runs: train, runs, status, logs, pause, resume, cancel, retry, restore. All are written on the Client library and
 * need services that are up. Called by main.ts.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { Command } from 'commander';
import { branchOf } from '../../config/branches.ts';
import { NnError, fromErrorRecord } from '../../config/errors.ts';
import { TERMINAL_PHASES } from '../../config/messages.ts';
import type { Rollback, RunEvent, RunRecord } from '../../config/messages.ts';
import { parseRunSpec, tokensPerStep } from '../../config/run-spec.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { loadConfig } from '../../config/schema.ts';
import type { Restored } from '../../orchestrator/client.ts';
import { isRollback, reportOf } from '../../orchestrator/metrics.ts';
import type { EvalLine, RunLine } from '../../orchestrator/metrics.ts';
import { eventLine, followRun, meanAux } from '../follow.ts';
import { withLifetime } from '../lifetime.ts';
import { readSpec, readText } from '../options.ts';
import { fields, formatCount, formatDuration, formatLoss, note, paint, printResult, printable, table } from '../output.ts';
import { connect } from '../stack.ts';

async function train(path: string, options: { name?: string; follow?: boolean; json?: boolean }): Promise<void> {
  const config = loadConfig();
  const input = readSpec(path);
  if (options.name !== undefined) input['name'] = options.name;
  const spec = parseRunSpec(input, path === '-' ? 'standard input' : path);
  await withLifetime(async (life) => {
    const client = await connect(life, config);
    const run = await life.until(client.train(input as RunSpecInput));
    note(`run ${spec.name}: ${formatCount(spec.steps)} steps of ${formatCount(tokensPerStep(spec))} tokens`);
    if (options.follow !== true) {
      printResult(options.json, { run: spec.name, phase: 'queued' }, () => [spec.name]);
      return;
    }
    await followRun(life, run.events(), { label: spec.name, steps: spec.steps });
    const record = await life.until(run.ended());
    printResult(options.json, record, () => describeRun(record));
    await run.wait(); // throws unless it completed
  });
}

const PHASE_STYLE = { queued: 'dim', running: 'cyan', pausing: 'yellow', paused: 'yellow', completed: 'green', failed: 'red', cancelled: 'dim' } as const;
const phaseText = (record: RunRecord): string => paint(PHASE_STYLE[record.phase], record.phase);
const instant = (milliseconds: number): string => new Date(milliseconds).toISOString().replace('T', ' ').slice(0, 19);

/** Attempts and faults that `status` shows; --json has those of the record. */
const SHOWN = 10;

/** How long a run has been at it, or took. */
const elapsed = (record: RunRecord): string =>
  record.startedAtMs === null ? '-' : formatDuration((record.finishedAtMs ?? Date.now()) - record.startedAtMs);

async function listRuns(options: { json?: boolean }): Promise<void> {
  await withLifetime(async (life) => {
    const client = await connect(life, loadConfig());
    const records = await life.until(client.runs());
    const columns = [
      { title: 'RUN' },
      { title: 'PHASE' },
      { title: 'STEP', align: 'right' },
      { title: 'LOSS', align: 'right' },
      { title: 'EVAL', align: 'right' },
      { title: 'TOK/S', align: 'right' },
      { title: 'TIME' },
    ] as const;
    const row = (record: RunRecord): string[] => [
      record.run,
      phaseText(record),
      `${record.step}/${record.steps}`,
      formatLoss(record.lastReport?.loss),
      formatLoss(record.validation?.loss),
      record.tokensPerSecond === null ? '-' : formatCount(record.tokensPerSecond),
      elapsed(record),
    ];
    printResult(options.json, records, () => (records.length === 0 ? ['no runs'] : table(columns, records.map(row))));
  });
}

/** A run in lines of 80 columns: what `status` prints. */
export function describeRun(record: RunRecord): string[] {
  const rows: [string, string][] = [
    ['run', record.run],
    ['phase', phaseText(record)],
    ['step', `${record.step} of ${record.steps}`],
    ['loss', record.lastReport === null ? '-' : `${formatLoss(record.lastReport.loss)} (first ${formatLoss(record.firstLoss)}, aux ${formatLoss(meanAux(record.lastReport))})`],
  ];
  if (record.validation !== null) {
    const before = record.validationBefore === null ? '' : `, before training ${formatLoss(record.validationBefore)}`;
    rows.push(['validation', `${formatLoss(record.validation.loss)} at step ${record.validation.step}${before}`]);
  }
  if (record.tokensPerSecond !== null) rows.push(['speed', `${formatCount(record.tokensPerSecond)} tokens/s`]);
  if (record.way !== null) rows.push(['way', `${record.way.exchange}, ${record.way.workers} worker${record.way.workers === 1 ? '' : 's'}: ${record.way.reason}`]);
  rows.push(['checkpoint', record.checkpoint === null ? '-' : record.checkpoint.directory]);
  if (record.weightsDigest !== null) rows.push(['digest', record.weightsDigest]);
  if (record.rollbacks.length > 0) rows.push(['rollbacks', record.rollbacks.map(({ fromStep, toStep }) => `${fromStep} to ${toStep}`).join(', ')]);
  if (record.skippedSteps > 0) rows.push(['skipped', `${record.skippedSteps} steps with gradients that were not finite`]);
  rows.push(['created', `${instant(record.createdAtMs)} UTC`], ['time', elapsed(record)]);
  if (record.error !== null) rows.push(['error', printable(`${record.error.code}: ${record.error.message}`)]);
  return fields([...rows, ...attemptRows(record), ...faultRows(record)]);
}

/** An attempt in a line: its steps, its time, how it ended. One attempt that goes well needs none. */
function attemptRows({ attempts }: RunRecord): [string, string][] {
  if (attempts.length < 2 && attempts[0]?.error == null) return [];
  return attempts.slice(-SHOWN).map((attempt): [string, string] => {
    const { number, startedAtMs, fromStep, toStep, phase, error, runningMs } = attempt;
    const end = error === null ? phase : printable(`${phase}, ${error.code}`);
    return [`attempt ${number}`, `${instant(startedAtMs)} steps ${fromStep} to ${toStep}, ${formatDuration(runningMs)} running: ${end}`];
  });
}

/** How many there were of each code, and the newest with time and cause. */
function faultRows({ faults, faultCounts }: RunRecord): [string, string][] {
  const counts = Object.entries(faultCounts).toSorted((a, b) => b[1] - a[1]);
  if (counts.length === 0) return [];
  const shown = faults.slice(-SHOWN);
  const all = counts.reduce((sum, [, count]) => sum + count, 0);
  const rest = all > shown.length ? `; the last ${shown.length} (all: faults.jsonl)` : '';
  return [
    ['faults', printable(`${counts.map(([code, count]) => `${count} ${code}`).join(', ')}${rest}`)],
    ...shown.map(({ atMs, what, worker, error }): [string, string] => {
      const where = worker === null || error.message.includes(worker) ? '' : ` on ${worker}`;
      return ['fault', printable(`${instant(atMs)} ${what}${where}: ${error.code}: ${error.message}`)];
    }),
  ];
}

async function status(name: string, options: { json?: boolean }): Promise<void> {
  await withLifetime(async (life) => {
    const client = await connect(life, loadConfig());
    const record = await life.until(client.run(name).record());
    printResult(options.json, record, () => describeRun(record));
  });
}

type LoggedEvent = Extract<RunEvent, { type: 'step' | 'eval' | 'rollback' }>;

/**
 * The steps, rollbacks and evals that stand in a run's directory, as events: each eval after its step, on its branch. A last line that
 * is still being written is left out.
 */
export function pastEvents(directory: string): LoggedEvent[] {
  const lines = (file: string): unknown[] => {
    const path = join(directory, file);
    if (!existsSync(path)) return [];
    return readText(path).split('\n').slice(0, -1).map((line, at) => {
      try {
        return JSON.parse(line) as unknown;
      } catch (error) {
        throw new NnError('RUN_STATE', `${path}: line ${at + 1} is damaged`, { path, line: at + 1 }, error);
      }
    });
  };
  const evals = new Map((lines('evals.jsonl') as EvalLine[]).map((line) => [`${line.branch ?? 0}:${line.step}`, line]));
  const rollbacks: Rollback[] = [];
  const evalOf = (step: number): LoggedEvent[] => {
    const line = evals.get(`${branchOf(rollbacks, step)}:${step}`);
    return line === undefined ? [] : [{ type: 'eval', step, loss: line.loss ?? NaN, atMs: line.atMs }];
  };
  const events = (lines('metrics.jsonl') as RunLine[]).flatMap((line): LoggedEvent[] => {
    if (!isRollback(line)) return [{ type: 'step', report: reportOf(line), tokensPerSecond: line.tokensPerSecond, atMs: line.atMs }, ...evalOf(line.step)];
    rollbacks.push(line);
    return [line];
  });
  return [...evalOf(0), ...events];
}

/** Whether an event of the stream, which begins before now, was among those of the past. Steps come again on another branch: times tell these apart. */
export function oldness(past: readonly LoggedEvent[]): (event: RunEvent) => boolean {
  const lastBack = past.findLastIndex(({ type }) => type === 'rollback');
  const beforeMs = past[lastBack]?.atMs ?? -Infinity;
  const present = past.slice(lastBack + 1);
  let lastStep = Math.max(-1, ...present.map((event) => (event.type === 'step' ? event.report.step : -1)));
  let lastEval = Math.max(-1, ...present.map((event) => (event.type === 'eval' ? event.step : -1)));
  return (event) => {
    if (event.type === 'rollback' && event.atMs > beforeMs) {
      lastStep = Math.min(lastStep, event.toStep);
      lastEval = Math.min(lastEval, event.toStep);
    }
    if (event.type === 'step') return event.atMs <= beforeMs || event.report.step <= lastStep;
    if (event.type === 'eval') return event.atMs <= beforeMs || event.step <= lastEval;
    return event.type === 'rollback' && event.atMs <= beforeMs;
  };
}

/** The steps so far from the run's metrics, then, with --follow, every event until the run ends. */
async function logs(name: string, options: { follow?: boolean; json?: boolean }): Promise<void> {
  const config = loadConfig();
  await withLifetime(async (life) => {
    const client = await connect(life, config);
    const run = client.run(name);
    const record = await life.until(run.record()); // RUN_NOT_FOUND before anything is printed
    const print = (event: RunEvent): void => void process.stdout.write(`${options.json === true ? JSON.stringify(event) : printable(eventLine(event))}\n`);
    const past = pastEvents(join(config.runs, name));
    for (const event of past) print(event);
    const isOld = oldness(past);
    if (options.follow !== true || TERMINAL_PHASES.includes(record.phase)) return;
    const iterator = run.events()[Symbol.asyncIterator]();
    try {
      for (let next = await life.until(iterator.next()); next.done !== true; next = await life.until(iterator.next())) {
        const event = next.value;
        if (isOld(event)) continue;
        print(event);
      }
    } finally {
      await iterator.return?.();
    }
  });
}

type Verb = 'pause' | 'resume' | 'cancel' | 'retry';

async function control(verb: Verb, name: string, options: { json?: boolean }): Promise<void> {
  await withLifetime(async (life) => {
    const client = await connect(life, loadConfig());
    const run = client.run(name);
    await life.until<unknown>(run[verb]());
    const record = await life.until(run.record());
    printResult(options.json, { run: name, asked: verb, phase: record.phase }, () => [`${name}: ${verb} asked for, now ${record.phase}`]);
  });
}

/** What became of a run, in a few words. */
function restoredText({ outcome, phase, step, steps, checkpoint, error }: Restored): string {
  switch (outcome) {
    case 'queued': return `${phase} again, goes on from step ${checkpoint}; ${step} of ${steps} counted`;
    case 'restored': return `${phase} at step ${step} of ${steps}; its record is back`;
    case 'kept': return `${phase}; Redis knows it, nothing was done`;
    case 'refused': return printable(`${error!.code}: ${error!.message}`);
  }
}

/** Exits with the code of the first run that could not be restored; the others are. */
async function restore(names: string[], options: { json?: boolean }): Promise<void> {
  await withLifetime(async (life) => {
    const client = await connect(life, loadConfig());
    const restored = await life.until(client.restore(names));
    const rows = restored.map((each): [string, string] => [printable(each.run), restoredText(each)]);
    printResult(options.json, restored, () => (rows.length === 0 ? ['no runs to restore'] : fields(rows)));
    const refused = restored.find(({ error }) => error !== null);
    if (refused !== undefined) throw fromErrorRecord(refused.error!);
  });
}

export function registerRunCommands(program: Command): void {
  const json = (command: Command, what = 'print JSON'): Command => command.option('--json', what);
  json(program.command('train'))
    .argument('<spec>', 'run spec: a JSON file, or - for standard input; relative paths in it count from the file')
    .option('--name <name>', 'name of the run instead of the spec’s')
    .option('-f, --follow', 'show progress until the run ends; Ctrl-C leaves the run going')
    .description('queue a training run')
    .action(train);
  json(program.command('runs')).description('list runs').action(listRuns);
  json(program.command('status')).argument('<run>').description('all that is known of a run').action(status);
  json(program.command('logs'), 'print JSON lines')
    .argument('<run>')
    .option('-f, --follow', 'go on until the run ends')
    .description('print a run’s steps')
    .action(logs);
  json(program.command('restore'))
    .argument('[runs...]', 'runs to restore; all that have a directory if none is named')
    .description('rebuild runs on a Redis that lost them, from their directories')
    .action(restore);
  const controls: Record<Verb, string> = {
    pause: 'stop a run at its next step, keeping all',
    resume: 'go on with a paused run',
    cancel: 'end a run; what it has is kept',
    retry: 'try a failed or cancelled run again from its last checkpoint',
  };
  for (const [verb, what] of Object.entries(controls) as [Verb, string][]) {
    json(program.command(verb)).argument('<run>').description(what).action((name: string, options: { json?: boolean }) => control(verb, name, options));
  }
}
