#!/usr/bin/env node
/**
 * The `cuda-nn` command: names the commands, runs one, and turns whatever it threw into one line and an exit code.
 * Each command lives in commands/. The only folder that may import everything; nobody imports it.
 *
 * Exit codes: 0 done · 2 bad input · 3 not found or in conflict · 4 the environment · 5 damaged data · 6 the run failed ·
 * 70 a bug (the only case with a stack trace) · 128 + n ended by signal n. docs/operations.md lists the codes of each.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Command, CommanderError } from 'commander';
import { NnError, errorCode } from '../config/errors.ts';
import { packageRoot } from '../config/schema.ts';
import { registerCheckpointCommands } from './commands/checkpoints.ts';
import { registerDataCommands } from './commands/data.ts';
import { registerDemo } from './commands/demo.ts';
import { registerDoctor } from './commands/doctor.ts';
import { registerRunCommands } from './commands/runs.ts';
import { registerServiceCommands } from './commands/services.ts';
import { Interrupted, onBrokenPipe } from './lifetime.ts';
import { paint, printable } from './output.ts';

const EXIT_BUG = 70;

/** The whole command line; exported as a function so that it can be read by a test without running anything. */
function createProgram(): Command {
  const { version, description } = JSON.parse(readFileSync(join(packageRoot(), 'package.json'), 'utf8')) as { version: string; description: string };
  const program = new Command('cuda-nn')
    .description(description)
    .version(version)
    .showHelpAfterError(false)
    .configureOutput({ writeErr: () => undefined }) // what commander would say on stderr comes out of fail(), as one line
    .exitOverride()
    .addHelpText('after', '\nSettings come from the environment: see docs/operations.md, or `cuda-nn doctor`.');
  registerServiceCommands(program);
  registerRunCommands(program);
  registerCheckpointCommands(program);
  registerDataCommands(program);
  registerDoctor(program);
  registerDemo(program);
  return program;
}

/** Commander's complaint as one of ours: `error: unknown option '--x'` and so on. */
function usageError(error: CommanderError): NnError {
  const message = error.message.replace(/^error: /, '').replace(/\s*\n\s*/g, ' ').trim();
  return new NnError('USAGE', `${message} (see cuda-nn --help)`);
}

/** Reports on stderr why the command failed, in one line unless it is a bug, and returns the exit code. */
function fail(error: unknown): number {
  if (error instanceof Interrupted) return error.signal === 'SIGPIPE' ? 0 : error.exitCode;
  const label = paint('red', 'cuda-nn:', process.stderr);
  const code = errorCode(error);
  if (code === undefined) {
    const stack = error instanceof Error ? (error.stack ?? error.message) : String(error);
    process.stderr.write(`${label} BUG: ${stack}\n`);
    return EXIT_BUG;
  }
  const expected = error as NnError;
  process.stderr.write(`${label} ${code}: ${printable(expected.message.replace(/\s*\n\s*/g, ' '))}\n`);
  if (['debug', 'trace'].includes(process.env['CUDA_NN_LOG'] ?? '')) {
    process.stderr.write(`${expected.stack}\n${expected.cause instanceof Error ? `caused by ${expected.cause.stack}\n` : ''}`);
  }
  return new NnError(code, '').exitCode;
}

async function main(argv: readonly string[]): Promise<number> {
  try {
    await createProgram().parseAsync(argv);
    return 0;
  } catch (error) {
    if (!(error instanceof CommanderError)) return fail(error);
    // Help and version are no failures; a bare `cuda-nn` or a bare group prints help and counts as a usage error.
    if (error.exitCode === 0) return 0;
    if (error.code === 'commander.help') return fail(new NnError('USAGE', 'no command given (see cuda-nn --help)'));
    return fail(usageError(error));
  }
}

for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error;
    if (stream === process.stdout) onBrokenPipe();
  });
}

process.exitCode = await main(process.argv);
