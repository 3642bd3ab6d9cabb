/**
 * `npm run bench -- <what> [--json]`: the command line of the benchmarks. Every benchmark compares with a reference before
 * it times anything, and prints medians with the share of the ceiling measured in the same run. One file each:
 * kernels.ts, train.ts, queue.ts; statistics.ts has what they share.
 */
import { Command } from 'commander';
import { toErrorRecord, errorCode, ERROR_KINDS } from '../config/errors.ts';
import { benchKernels } from './kernels.ts';
import { benchQueue } from './queue.ts';
import { printReport } from './statistics.ts';
import type { Report } from './statistics.ts';
import { benchTrain } from './train.ts';

const wholeNumber = (text: string): number => {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 0) throw new Error(`"${text}" is not a whole number`);
  return value;
};

const program = new Command('bench').description('Measures this build on this machine, after comparing it with its references.');
program.showHelpAfterError().exitOverride((error) => process.exit(error.exitCode === 0 ? 0 : 2));

const json = ['--json', 'one JSON object on stdout'] as const;
const peer = ['--peer <command>', 'run this program before and after, and print the ratio to its tokens_per_s'] as const;

/** Runs a benchmark and prints its report; a failed comparison or requirement makes the exit code 1. */
async function run(bench: () => Promise<Report>, asJson: boolean | undefined): Promise<void> {
  try {
    const report = await bench();
    printReport(report, asJson === true);
    process.exitCode = report.passed ? 0 : 1;
  } catch (error) {
    const code = errorCode(error);
    if (code === undefined) throw error;
    process.stderr.write(`bench: ${code}: ${toErrorRecord(error).message}\n`);
    process.exitCode = ERROR_KINDS[code].exitCode;
  }
}

program
  .command('train')
  .description('a whole training step (forward, backward, clipping, AdamW) of a preset')
  .option('--preset <name>', 'model preset', 'demo')
  .option('--threads <n>', 'CPU threads, 0 for all cores', wholeNumber, 0)
  .option('--sequences <n>', 'sequences in the batch', wholeNumber, 8)
  .option('--sequence-length <n>', 'tokens in a sequence', wholeNumber, 256)
  .option('--steps <n>', 'timed steps', wholeNumber, 15)
  .option(...peer)
  .option(...json)
  .action((options) => run(() => benchTrain(options), options.json));

program
  .command('kernels')
  .description('matrix products and the other kernels at the demo preset’s sizes, one by one')
  .option('--threads <n>', 'CPU threads, 0 for all cores', wholeNumber, 1)
  .option('--size <n>', 'size of the square product', wholeNumber, 1024)
  .option(...json)
  .action((options) => run(() => benchKernels(options), options.json));

program
  .command('queue')
  .description('what going through the queue costs a step, both ways')
  .option('--steps <n>', 'timed steps of each way', wholeNumber, 100)
  .option('--shards <n>', 'shards of a flow', wholeNumber, 8)
  .option('--workers <n>', 'workers of a flow', wholeNumber, 2)
  .option('--local-steps <n>', 'steps of the demo preset', wholeNumber, 20)
  .option(...json)
  .action((options) => run(() => benchQueue(options), options.json));

await program.parseAsync();
