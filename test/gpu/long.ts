/**
 * Everything that must hold on a GPU and takes longer than a test suite should: the program behind `npm run test:gpu:long`. Parts are
 * run one by one; what has passed is kept in OUT/report.jsonl and skipped with --resume, so that the whole may be shown in pieces
 * on a machine that is lent by the minute. One line a check; exit 1 if any fails.
 *
 *   npm run test:gpu:long -- [PART ...] [--out DIR] [--resume]      parts: see PARTS; without any, all of them
 *   npm run test:gpu:long -- queue --rehearse                       the queue's checks with preset tiny on the CPU
 */
import { spawnSync } from 'node:child_process';
import { appendFileSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { packageRoot } from '../../config/schema.ts';
import { whyNoGpu } from '../support/gpu.ts';
import { queueChecks } from './queue-checks.ts';
import type { Check } from './queue-checks.ts';

interface Line {
  readonly part: string;
  readonly name: string;
  readonly outcome: 'passed' | 'failed' | 'skipped';
  readonly seconds: number;
  readonly detail: string;
}

/** What could not be tried here: it does not fail, and is not passed. */
export class Skipped extends Error {}

const root = packageRoot();
const program = (...names: string[]): string => join(root, ...names);

/** Runs a program to its end and returns its stdout; all it says goes to OUT/log. Throws with its last words. */
function run(out: string, log: string, command: string, args: readonly string[], limitSeconds: number, environment: NodeJS.ProcessEnv = {}): string {
  const result = spawnSync(command, args, {
    cwd: root, encoding: 'utf8', timeout: limitSeconds * 1000, killSignal: 'SIGKILL', maxBuffer: 256 << 20, env: { ...process.env, ...environment },
  });
  const said = `${result.stdout ?? ''}${result.stderr ?? ''}`;
  writeFileSync(join(out, log), said);
  if (result.error !== undefined && (result.error as NodeJS.ErrnoException).code === 'ENOENT') throw new Skipped(`there is no ${command} here`);
  const words = said.trim().split('\n').slice(-3).join(' | ').slice(-400);
  if (result.signal !== null) throw new Error(`ended by ${result.signal} within ${limitSeconds} s: ${words}`);
  if (result.status !== 0) throw new Error(`exit ${result.status}: ${words}`);
  return result.stdout;
}

const node = process.execPath;
const mocha = (grep?: string): string[] => [
  program('node_modules', 'mocha', 'bin', 'mocha.js'), '--config', program('test', 'gpu.mocharc.json'), ...(grep === undefined ? [] : ['--grep', grep]),
];
const onGpu = { CUDA_NN_TEST_DEVICE: 'cuda' };

/** `N passed, N failed, N skipped` of test/reporter.mjs; throws where nothing ran. */
function countOf(said: string): string {
  const count = said.trim().split('\n').at(-1) ?? '';
  if (!/^[1-9]\d* passed, 0 failed/.test(count)) throw new Error(`no tests passed: ${count}`);
  return count;
}

const golden = (name: string, precision: string): Check => ({
  name: `golden ${name} in ${precision}`,
  run: (out) => {
    const file = program('test', 'golden', `${name}.safetensors`);
    const said = run(out, `golden-${name}-${precision}.log`, node, [program('dist', 'cli', 'main.js'), 'doctor', '--golden', file, '--device', 'cuda:0', '--precision', precision, '--json'], 120);
    const { rows } = JSON.parse(said) as { rows: { what: string; error: number; tolerance: number }[] };
    return rows.map(({ what, error, tolerance }) => `${what} ${error.toExponential(1)} of ${tolerance}`).join(', ');
  },
});

/**
 * compute-sanitizer over small cases of the kernel table. racecheck follows each access to shared memory and is by far the slower, so
 * it gets the kernels with shared memory at one small size of more than one block or tile each.
 */
const sanitizer = (tool: 'memcheck' | 'racecheck', what: string, grep: string, limitSeconds: number): Check => ({
  name: `${tool}: ${what}`,
  run: (out) => {
    const log = `${tool}-${what.replaceAll(/\W+/g, '-')}.log`;
    const flags = ['--tool', tool, '--target-processes', 'all', '--error-exitcode', '9', ...(tool === 'racecheck' ? ['--racecheck-report', 'analysis'] : [])];
    const said = run(out, log, 'compute-sanitizer', [...flags, node, ...mocha(grep)], limitSeconds, onGpu);
    const found = /ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?/.exec(said + readFileSync(join(out, log), 'utf8'));
    if (found === null || Number(found[1] ?? found[2]) !== 0) throw new Error(found === null ? 'the sanitizer printed no summary' : found[0]);
    return `${found[0]}; ${/\d+ passed, \d+ failed/.exec(said)?.[0] ?? 'no count'}`;
  },
});

const SMALL = {
  products: 'on cuda (gemm|moe)\\w* .*(97x61x53|15x33x17|128x264x128|129x512x192|T (64|97|500|1100),)',
  attention: 'on cuda (flash_attention|attention_cached|cache_append)\\w* .*(S=(7|65|85|128|260) |S=1 C=200)',
  decoding: 'on cuda decode_(attention|moe) .*(B=(1 C=70|17) |T=(9|17) )',
  rows: 'on cuda (rmsnorm|softmax|cross_entropy|linear_cross_entropy|aux_loss)\\w* .*(7|17|33|63|65)( |$)',
  scans: 'on cuda (scatter_add|moe_permute|grad_norm|sum|digest|argmax|sample|topk_sample|topp_sample|advance) .*(T (37|97),|T=(7|333) |[=](17|33|65|4097|4099)( |$))',
} as const;

const bench = (name: string, args: readonly string[], peer: string, summary: (report: Record<string, unknown> & { rows: Record<string, unknown>[] }) => string): Check => ({
  name,
  run: (out) => {
    const withPeer = spawnSync('python3', ['-c', 'import torch; assert torch.cuda.is_available()'], { stdio: 'ignore' }).status === 0;
    const peers = withPeer ? ['--peer', `python3 ${program('bench', 'peers', peer)}`] : [];
    const said = run(out, `${name.replaceAll(' ', '-')}.json`, node, [program('dist', 'bench', 'main.js'), ...args, '--device', 'cuda:0', '--preset', '6.9b', ...peers, '--json'], 590);
    return `${withPeer ? '' : 'without torch: no peer; '}${summary(JSON.parse(said) as never)}`;
  },
});

const times = ({ timesPeer }: Record<string, unknown>, unit: string): string => (typeof timesPeer === 'number' ? ` (${timesPeer}${unit})` : '');

const PARTS: Readonly<Record<string, readonly Check[]>> = {
  suite: [{ name: 'kernel table, golden models, training and decoding', run: (out) => countOf(run(out, 'suite.log', node, mocha(), 580, onGpu)) }],
  golden: ['mqa-top2', 'spec-shaped'].flatMap((name) => ['fp32', 'bf16'].map((precision) => golden(name, precision))),
  transformers: [
    {
      name: '6.9b in bf16, loaded by transformers',
      run: (out) => {
        if (spawnSync('python3', ['-c', 'import torch, transformers'], { stdio: 'ignore' }).status !== 0) throw new Skipped('there is no python3 with torch and transformers here');
        const directory = mkdtempSync(join(tmpdir(), 'transformers-'));
        try {
          run(out, 'export.log', node, [program('dist', 'test', 'gpu', 'export-for-transformers.js'), '6.9b', directory], 240);
          return run(out, 'transformers.log', 'python3', [program('test', 'gpu', 'compare_with_transformers.py'), directory], 340).trim().split('\n').at(-1)!;
        } finally {
          rmSync(directory, { recursive: true, force: true });
        }
      },
    },
  ],
  sanitizer: [
    ...Object.entries(SMALL).map(([what, grep]) => sanitizer('memcheck', what, grep, 120)),
    ...Object.entries(SMALL).map(([what, grep]) => sanitizer('racecheck', what, grep, 120)),
  ],
  queue: queueChecks({ gpu: true }),
  'bench-train': [
    bench('bench train', ['train', '--sequences', '2', '--micro-batches', '4'], 'torch_train.py', (r) =>
      `${String(r['tokensPerSecond'])} tokens/s, ${String(r['times_peer_tokens_per_s'])} times the peer, first loss ${String(r['firstLoss'])}`),
  ],
  'bench-decode': [
    bench('bench decode', ['decode', '--prompt', '262144'], 'torch_decode.py', ({ rows }) =>
      rows.map((row) => `${String(row['name'])}: ${String(row['tokensPerSecond'])} tokens/s${times(row, ' times the peer')}`).join('; ')),
  ],
  'bench-kernels': [
    bench('bench kernels', ['kernels'], 'torch_kernels.py', ({ rows }) =>
      rows.map((row) => `${String(row['name'])} ${String(row['ms'])} ms${times(row, '')}`).join('; ')),
  ],
};

const { values, positionals } = parseArgs({
  allowPositionals: true, options: { out: { type: 'string', default: 'gpu-report' }, resume: { type: 'boolean', default: false }, rehearse: { type: 'boolean', default: false } },
});
const out = resolve(values.out);
const wanted = positionals.length === 0 ? Object.keys(PARTS) : positionals;
const unknown = wanted.find((part) => !(part in PARTS));
const reason = values.rehearse ? undefined : whyNoGpu();
if (unknown !== undefined || reason !== undefined) {
  process.stderr.write(unknown === undefined ? `test:gpu:long: nothing can be shown here: ${reason}\n` : `test:gpu:long: there is no part ${unknown}; there are ${Object.keys(PARTS).join(', ')}\n`);
  process.exit(unknown === undefined ? 1 : 2);
}
mkdirSync(out, { recursive: true });
const report = join(out, 'report.jsonl');
const before = existsSync(report) ? readFileSync(report, 'utf8').trim().split('\n').filter(Boolean).map((line) => JSON.parse(line) as Line) : [];
const lines: Line[] = [];
for (const part of wanted) {
  for (const { name, run: show } of values.rehearse && part === 'queue' ? queueChecks({ gpu: false }) : PARTS[part]!) {
    const known = before.findLast((line) => line.part === part && line.name === name);
    if (values.resume && known?.outcome === 'passed') {
      lines.push(known);
      continue;
    }
    const start = performance.now();
    let [outcome, detail]: [Line['outcome'], string] = ['passed', ''];
    try {
      detail = await show(out);
    } catch (error) {
      [outcome, detail] = [error instanceof Skipped ? 'skipped' : 'failed', (error as Error).message];
    }
    const line: Line = { part, name, outcome, seconds: Math.round((performance.now() - start) / 100) / 10, detail };
    lines.push(line);
    appendFileSync(report, `${JSON.stringify(line)}\n`);
    process.stdout.write(`${outcome.padEnd(8)} ${part}: ${name} (${line.seconds} s)\n         ${detail}\n`);
  }
}
const count = (outcome: Line['outcome']): number => lines.filter((line) => line.outcome === outcome).length;
process.stdout.write(`${count('passed')} passed, ${count('failed')} failed, ${count('skipped')} skipped; ${report}\n`);
process.exit(count('failed') === 0 ? 0 : 1);
