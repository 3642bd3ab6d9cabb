/**
 * Runs the whole suite: every test file in a mocha process of its own, as many at once as there are lanes, because most of the
 * system tests wait. Owns the order, the deadline of a file and the total; mocha and test/reporter.mjs know nothing of it. Called
 * by `npm test` and .ci/run; `npx mocha` by itself runs the same files one after another.
 *
 *   node dist/test/main.js [--lanes N] [--cuda] [file ...] [-- mocha's options]
 *
 * `--cuda` builds the CUDA library beside the tests, with what they leave of the processors; files that look for the library
 * begin when it is there. A file's output is printed whole when the file is done. A file fails that does not end by itself.
 * Exit code: 0 when every test passed, 1 otherwise, 128 + n after signal n.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { availableParallelism, constants, setPriority, tmpdir } from 'node:os';
import { join, relative, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { packageRoot } from '../config/schema.ts';

/** What the reporter writes of one file: titles, those that failed with the first line of why. */
interface Report {
  readonly passed: number;
  readonly failed: readonly string[];
  readonly skipped: readonly string[];
}

/** Files at once. One lane more than processors would be a minute faster on two of them, and brings tests near their deadlines. */
const LANES = Math.min(4, Math.max(2, availableParallelism()));
/** The longest file takes a minute and a half alone. */
const FILE_DEADLINE_MS = 15 * 60_000;
/** Long files first: the system tests, by folder; the many short ones fill what is left at the end. */
const FOLDERS = ['system', 'sim', 'golden', 'kernels', 'unit', ''];
const LOOKS_FOR_CUDA = /^(golden|kernels|unit)\/|gpu/;

const root = packageRoot();
const built = join(root, 'dist', 'test');
const scratch = mkdtempSync(join(tmpdir(), 'nn-tests-'));
const running = new Set<ChildProcess>();
const interruption: { signal?: NodeJS.Signals } = {};

/** A process at its end: how it ended, and all that it said, in order. */
async function ended(name: string, args: readonly string[], priority = 0): Promise<{ problem: string | undefined; said: string }> {
  const log = join(scratch, `${name.replaceAll('/', '-')}.log`);
  const output = openSync(log, 'a'); // a file, because a process that is left behind would keep a pipe open
  const child = spawn(process.execPath, args, { cwd: root, stdio: ['ignore', output, output] });
  closeSync(output);
  running.add(child);
  if (priority !== 0 && child.pid !== undefined) setPriority(child.pid, priority);
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    child.kill('SIGKILL');
  }, FILE_DEADLINE_MS);
  const problem = await new Promise<string | undefined>((settle) => {
    child.once('error', (error) => settle(error.message));
    child.once('exit', (code, signal) => settle(code === 0 ? undefined : `ended with ${code ?? signal}`));
  });
  clearTimeout(timer);
  running.delete(child);
  return { problem: late ? `did not end within ${FILE_DEADLINE_MS / 1000} s: a test hangs, or something that one started is still open` : problem, said: readFileSync(log, 'utf8') };
}

/** Runs one test file; what it counted, with a failure of the process itself among the failed. */
async function runFile(file: string, mochaOptions: readonly string[]): Promise<Report> {
  const begunMs = performance.now();
  const report = join(scratch, `${file.replaceAll('/', '-')}.json`);
  const { timeout, forbidOnly, reporter } = JSON.parse(readFileSync(join(root, '.mocharc.json'), 'utf8')) as { timeout: number; forbidOnly: boolean; reporter: string };
  const args = [
    join(root, 'node_modules', 'mocha', 'bin', 'mocha.js'), '--no-config', '--timeout', String(timeout), ...(forbidOnly ? ['--forbid-only'] : []),
    '--reporter', resolve(root, reporter), '--reporter-option', `report=${report}`, process.stdout.isTTY ? '--color' : '--no-color', ...mochaOptions, join(built, file),
  ];
  const { problem, said } = await ended(file, args);
  console.log(`\n${file.replace(/\.js$/, '.ts')} (${((performance.now() - begunMs) / 1000).toFixed(1)} s)\n${said.trimEnd()}`);
  const counted: Report = existsSync(report) ? (JSON.parse(readFileSync(report, 'utf8')) as Report) : { passed: 0, failed: [], skipped: [] };
  // Mocha ends with the number of failures; any other way to end badly is a failure of its own.
  if (problem === undefined || (counted.failed.length > 0 && problem === `ended with ${Math.min(counted.failed.length, 255)}`)) return counted;
  return { ...counted, failed: [...counted.failed, `${file} ${problem}`] };
}

/** Builds the CUDA library; its failure, if it fails. */
async function buildCuda(): Promise<Report> {
  const begunMs = performance.now();
  const { problem, said } = await ended('cuda', [join(root, 'cuda', 'build.mjs'), '--cuda'], constants.priority.PRIORITY_LOW);
  console.log(`\ncuda/build.mjs --cuda (${((performance.now() - begunMs) / 1000).toFixed(1)} s)\n${said.trimEnd()}`);
  return { passed: 0, failed: problem === undefined ? [] : [`cuda/build.mjs ${problem}`], skipped: [] };
}

/** Every built test file relative to dist/test, in the order in which they begin. */
function allFiles(): string[] {
  const rank = (file: string): number => FOLDERS.indexOf(file.includes('/') ? file.split('/')[0]! : '');
  return readdirSync(built, { recursive: true, encoding: 'utf8' })
    .filter((file) => file.endsWith('.test.js'))
    .sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({ allowPositionals: true, options: { lanes: { type: 'string' }, cuda: { type: 'boolean' } } });
  const isFile = (argument: string): boolean => argument.endsWith('.test.js');
  const named = positionals.filter(isFile).map((file) => relative(built, resolve(file)));
  const mochaOptions = positionals.filter((argument) => !isFile(argument));
  const lanes = Math.max(1, Number(values.lanes ?? LANES));

  let library: Promise<Report> | undefined = values.cuda ? buildCuda() : undefined;
  const reports: Report[] = [];
  void library?.then(() => (library = undefined));
  const waiting = named.length > 0 ? named : allFiles();
  const total = waiting.length;
  const lane = async (): Promise<void> => {
    while (waiting.length > 0 && interruption.signal === undefined) {
      const ready = waiting.findIndex((file) => library === undefined || !LOOKS_FOR_CUDA.test(file));
      if (ready === -1) await library;
      else reports.push(await runFile(waiting.splice(ready, 1)[0]!, mochaOptions));
    }
  };
  const building = library;
  await Promise.all(Array.from({ length: lanes }, lane));
  if (building !== undefined) reports.push(await building);

  const [failed, skipped] = [reports.flatMap((report) => report.failed), reports.flatMap((report) => report.skipped)];
  console.log('');
  for (const title of skipped) console.log(`skipped: ${title}`);
  for (const title of failed) console.log(`failed: ${title}`);
  console.log(`${reports.reduce((sum, { passed }) => sum + passed, 0)} passed, ${failed.length} failed, ${skipped.length} skipped`);
  if (interruption.signal !== undefined) return 128 + constants.signals[interruption.signal];
  return failed.length === 0 && total > 0 ? 0 : 1;
}

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.on(signal, () => {
    interruption.signal = signal;
    for (const child of running) child.kill(signal);
  });
}

try {
  process.exitCode = await main();
} finally {
  rmSync(scratch, { recursive: true, force: true });
}
