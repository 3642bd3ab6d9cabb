/**
 * `npm run chaos -- --minutes N --seed S`: the command line of chaos.ts. The report goes to stdout, what happens to stderr.
 * Exit code 0: every run ended as the undisturbed one; 1: one did not; 130: interrupted.
 */
import { Command } from 'commander';
import { BrokenPromise, chaos } from './chaos.ts';
import { reportOf, textOf } from './report.ts';

const number = (whole: boolean) => (text: string): number => {
  const value = Number(text);
  if (!(value > 0) || (whole && !Number.isSafeInteger(value))) throw new Error(`"${text}" is not a ${whole ? 'whole ' : ''}number above 0`);
  return value;
};

interface Flags {
  readonly minutes: number;
  readonly seed: number;
  readonly workers: number;
  readonly steps: number;
  readonly json?: boolean;
}

const program = new Command('chaos')
  .description('Trains while faults chosen by a seed hit Redis, workers, orchestrators, network, disk and checkpoints; every run must end with the bits of the undisturbed one.')
  .option('--minutes <n>', 'how long faults go on', number(false), 5)
  .option('--seed <n>', 'which faults, in which order', number(true), 1)
  .option('--workers <n>', 'worker processes', number(true), 3)
  .option('--steps <n>', 'steps of each run; one follows another', number(true), 600)
  .option('--json', 'one JSON object on stdout')
  .showHelpAfterError()
  .exitOverride((error) => process.exit(error.exitCode === 0 ? 0 : 2))
  .parse();

const { minutes, seed, workers, steps, json } = program.opts<Flags>();
const interrupt = new AbortController();
for (const name of ['SIGINT', 'SIGTERM'] as const) process.on(name, () => interrupt.abort());
const beganMs = Date.now();
const log = (message: string): void => void process.stderr.write(`${((Date.now() - beganMs) / 1000).toFixed(1).padStart(7)} s  ${message}\n`);

try {
  const report = reportOf(await chaos({ minutes, seed, workers, steps, log, signal: interrupt.signal }));
  process.stdout.write(json === true ? `${JSON.stringify(report)}\n` : textOf(report));
  process.exitCode = report.interrupted ? 130 : report.passed ? 0 : 1;
} catch (error) {
  if (!(error instanceof BrokenPromise) && !interrupt.signal.aborted) throw error;
  process.stderr.write(`chaos: ${(error as Error).message}\n`);
  process.exitCode = interrupt.signal.aborted ? 130 : 1;
}
