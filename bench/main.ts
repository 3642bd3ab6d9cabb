/**
 * `npm run bench -- <what> [--json]`: the command line of the benchmarks. Every benchmark compares with a reference before
 * it times anything, and prints medians with the share of the ceiling measured in the same run. One file each: kernels.ts,
 * train.ts, decode.ts, queue.ts, on a GPU gpu-kernels.ts and gpu-train.ts; statistics.ts and gpu.ts have what they share.
 */
import { Command, Option } from 'commander';
import { toErrorRecord, errorCode, ERROR_KINDS } from '../config/errors.ts';
import { benchDecode } from './decode.ts';
import { parseDevice } from './gpu.ts';
import { benchGpuKernels } from './gpu-kernels.ts';
import { benchGpuTrain } from './gpu-train.ts';
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

const device = ['--device <device>', 'cpu or cuda:N', 'cpu'] as const;
const noGraph = ['--no-graph', 'GPU: launch each kernel by itself'] as const;
const isGpu = (text: string): boolean => parseDevice(text).library === 'cuda';

/** Runs a benchmark and prints its report; a failed comparison or requirement makes the exit code 1. */
async function run(bench: () => Report | Promise<Report>, asJson: boolean | undefined): Promise<void> {
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
  .description('a whole training step (forward, backward, clipping, AdamW) of a preset: float32 on the CPU, bf16 on a GPU')
  .option(...device)
  .option('--preset <name>', 'model preset', 'demo')
  .option('--threads <n>', 'CPU threads, 0 for all cores', wholeNumber, 0)
  .option('--sequences <n>', 'sequences in a microbatch', wholeNumber, 8)
  .option('--sequence-length <n>', 'tokens in a sequence; CPU: 256, GPU: 4096', wholeNumber)
  .option('--steps <n>', 'timed steps', wholeNumber, 15)
  .option('--micro-batches <n>', 'GPU: microbatches of a step', wholeNumber, 1)
  .addOption(new Option('--recompute <what>', 'GPU: what the backward computes again').choices(['none', 'swiglu', 'layer']).default('layer'))
  .addOption(new Option('--state-dtype <type>', 'GPU: type of AdamW’s states').choices(['fp32', 'bf16']).default('fp32'))
  .option(...noGraph)
  .option('--breakdown', 'GPU: also time each kernel of a step by itself; implies --no-graph')
  .option(...peer)
  .option(...json)
  .action((options) =>
    run(() => {
      const sequenceLength = options.sequenceLength ?? (isGpu(options.device) ? 4096 : 256);
      return isGpu(options.device) ? benchGpuTrain({ ...options, sequenceLength }) : benchTrain({ ...options, sequenceLength });
    }, options.json),
  );

program
  .command('kernels')
  .description('CPU: matrix products at the demo preset’s sizes; GPU: every kernel of a training step at a preset’s sizes')
  .option(...device)
  .option('--threads <n>', 'CPU threads, 0 for all cores', wholeNumber, 1)
  .option('--size <n>', 'CPU: size of the square product', wholeNumber, 1024)
  .option('--preset <name>', 'GPU: model preset', '6.9b')
  .option('--sequences <n>', 'GPU: sequences', wholeNumber, 4)
  .option('--sequence-length <n>', 'GPU: tokens in a sequence', wholeNumber, 4096)
  .option('--peer <command>', 'GPU: run this program first, and print the ratio to its ms of a kernel')
  .option(...json)
  .action((options) => run(() => (isGpu(options.device) ? benchGpuKernels(options) : benchKernels(options)), options.json));

program
  .command('decode')
  .description('greedy decoding of a preset with random weights, at several batches and contexts')
  .option(...device)
  .option('--preset <name>', 'model preset', 'demo')
  .option('--threads <n>', 'CPU threads, 0 for all cores', wholeNumber, 0)
  .option('--steps <n>', 'timed steps', wholeNumber, 200)
  .option('--prompt <n>', 'also take in a prompt of so many tokens, with NTK alpha 8, and go on from there', wholeNumber)
  .option(...noGraph)
  .option(...peer)
  .option(...json)
  .action((options) => run(() => benchDecode(options), options.json));

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
