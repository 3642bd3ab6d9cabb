/**
 * The command `demo`: the whole of cuda-nn in some minutes on a CPU. It trains a tokenizer on a book, prepares the data,
 * trains preset `demo` through an embedded Redis, an orchestrator and supervised workers, evaluates on text it never saw,
 * and samples. Everything stays in a directory of its own; what served is stopped at the end. Called by main.ts.
 *
 *   .cuda-nn/demo/<time>/   tokenizer.json, train.tokens, validation.tokens (the last tenth of the book), spec.json
 *                           runs/demo/   metrics and checkpoints: kept
 *                           home/        Redis: removed at the end
 */
import { strict as assert } from 'node:assert';
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import type { Command } from 'commander';
import { NnError } from '../../config/errors.ts';
import { keys } from '../../config/keys.ts';
import type { RunEvent } from '../../config/messages.ts';
import { openRedis } from '../../config/redis.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { demoText } from '../../data/book.ts';
import { prepareData } from '../../data/prepare.ts';
import { TokenFile } from '../../data/token-file.ts';
import { Tokenizer, trainTokenizer } from '../../data/tokenizer.ts';
import type { Supervisor } from '../../workers/main.ts';
import { followRun } from '../follow.ts';
import { withLifetime } from '../lifetime.ts';
import type { Lifetime } from '../lifetime.ts';
import { parseWhole } from '../options.ts';
import { ProgressBar, fields, formatCount, formatDuration, note, paint, printResult, wrap } from '../output.ts';
import { showTraining } from './data.ts';
import { openClient, provideRedis, runOrchestrator, runWorkers } from '../stack.ts';

const RUN = 'demo';
const VOCABULARY = 4096;
const HELD_OUT = 0.1;
const SEED = 1;
const PROMPT_TOKENS = 48;
const SAMPLE = { maxTokens: 96, method: 'top-p', temperature: 0.8, topP: 0.9, seed: 1 } as const;

interface DemoOptions {
  steps: number;
  workers: number;
  killWorkerAt?: number;
  json?: boolean;
}

/** The beginning of a text that was held out, up to a word's end: what the sample goes on from. */
function heldOutPrompt(tokenFile: string, tokenizerFile: string): string {
  const file = TokenFile.open(tokenFile);
  try {
    const tokens = new Int32Array(Math.min(file.count, PROMPT_TOKENS));
    file.read(0, tokens);
    const text = Tokenizer.load(tokenizerFile).decode(tokens).trim();
    return text.slice(0, Math.max(text.search(/\s\S*$/), 1));
  } finally {
    file.close();
  }
}

interface Prepared {
  readonly spec: RunSpecInput;
  readonly prompt: string;
}

/** Tokenizer, token files and spec, all in `directory`. */
async function prepare(life: Lifetime, directory: string, options: DemoOptions): Promise<Prepared> {
  const at = (name: string): string => join(directory, name);
  const book = demoText();
  let bar = new ProgressBar('tokenizer    ');
  const showTokenizer = bar;
  try {
    await life.until(
      trainTokenizer({ inputs: [book], output: at('tokenizer.json'), vocabSize: VOCABULARY, onProgress: (progress) => showTraining(showTokenizer, progress) }),
    );
    bar.end();
    bar = new ProgressBar('tokens       ');
    const showTokens = bar;
    const prepared = await life.until(
      prepareData({
        inputs: [book],
        tokenizer: at('tokenizer.json'),
        output: at('train.tokens'),
        validation: { output: at('validation.tokens'), fraction: HELD_OUT },
        onProgress: ({ bytesDone, bytesTotal, tokens }) => showTokens.update(bytesDone, bytesTotal, formatCount(tokens)),
      }),
    );
    bar.end();
    note(`data          Moby-Dick: ${formatCount(prepared.train.tokens)} tokens, and ${formatCount(prepared.validation!.tokens)} held out`);
  } finally {
    bar.end();
  }
  const spec: RunSpecInput = {
    name: RUN,
    model: 'demo',
    data: { train: at('train.tokens'), validation: at('validation.tokens'), tokenizer: at('tokenizer.json') },
    seed: SEED,
    steps: options.steps,
    batch: { shards: 4, microBatches: 1, sequences: 2, sequenceLength: 256 },
    optimizer: { learningRate: 2e-3, warmupSteps: Math.min(20, options.steps) },
    evaluation: { every: 50, sequences: 64 },
    checkpoint: { every: 50, keep: 1 },
    parallelism: options.workers,
  };
  writeFileSync(at('spec.json'), `${JSON.stringify(spec, null, 2)}\n`);
  return { spec, prompt: heldOutPrompt(at('validation.tokens'), at('tokenizer.json')) };
}

/** Kills one worker, once, when the run has reached a step: the run must not care. */
function assassin(supervisor: Supervisor, step: number | undefined): (event: RunEvent) => void {
  let done = step === undefined;
  return (event) => {
    if (done || event.type !== 'step' || event.report.step < step!) return;
    done = true;
    const victim = supervisor.workers()[0];
    if (victim?.pid === undefined) return;
    note(paint('yellow', `SIGKILL to worker ${victim.id} (process ${victim.pid}) at step ${event.report.step}`, process.stderr));
    process.kill(victim.pid, 'SIGKILL');
  };
}

/** The mean speed of all steps; a run's record has only that of the last ones. */
class Speed {
  #tokens = 0;
  #milliseconds = 0;

  count(event: RunEvent): void {
    if (event.type !== 'step') return;
    this.#tokens += event.report.targetTokens;
    this.#milliseconds += event.report.milliseconds;
  }

  get tokensPerSecond(): number | null {
    return this.#milliseconds === 0 ? null : this.#tokens / (this.#milliseconds / 1000);
  }
}

/** On a Redis that is not ours, nothing of the demo may stay: it all lies under one prefix. */
async function removePrefix(config: Config): Promise<void> {
  const redis = openRedis(config.redis.url, config, 'command');
  try {
    const pattern = `${keys(config.redis.prefix).runs.slice(0, -'runs'.length)}*`;
    let cursor = '0';
    do {
      const [next, found] = await redis.scan(cursor, 'MATCH', pattern, 'COUNT', 1000);
      if (found.length > 0) await redis.del(...found);
      cursor = next;
    } while (cursor !== '0');
  } finally {
    redis.disconnect();
  }
}

async function demo(options: DemoOptions): Promise<void> {
  const startedAt = performance.now();
  const stamp = `${new Date().toISOString().slice(0, 19).replace(/[-:]/g, '').replace('T', '-')}-${process.pid}`;
  const base = loadConfig();
  const directory = resolve(base.home, 'demo', stamp);
  const config = loadConfig({
    home: join(directory, 'home'),
    runs: join(directory, 'runs'),
    redis: { prefix: `${base.redis.prefix}-demo-${stamp}` },
    store: { url: '' },
    ...(process.env['CUDA_NN_LOG'] === undefined ? { logLevel: 'error' } : {}),
  });
  mkdirSync(directory, { recursive: true });
  await withLifetime(async (life) => {
    // An interrupted demo leaves nothing; one that ends, or fails, leaves its data and its run to look at.
    life.defer('files', () => rmSync(life.signal.aborted ? directory : config.home, { recursive: true, force: true }));
    let redisFailed: (error: NnError) => void = () => undefined;
    const failure = new Promise<never>((_, refuse) => {
      redisFailed = refuse;
    });
    failure.catch(() => undefined); // it may come when nobody waits any more
    const where = await life.until(provideRedis(life, config, (reason) => redisFailed(new NnError('REDIS_UNAVAILABLE', reason))));
    if (where === 'configured') life.defer('keys', () => removePrefix(config));
    const { spec, prompt } = await prepare(life, directory, options);
    await life.until(runOrchestrator(life, config));
    const supervisor = await life.until(runWorkers(life, config, { gpus: [], count: options.workers, threads: config.worker.threads }));
    const client = await openClient(life, config);
    const run = await life.until(client.train(spec));
    note(`training      preset demo, ${formatCount(options.steps)} steps of 2,048 tokens, ${options.workers} worker${options.workers === 1 ? '' : 's'}`);
    const kill = assassin(supervisor, options.killWorkerAt);
    const speed = new Speed();
    const watch = (event: RunEvent): void => {
      kill(event);
      speed.count(event);
    };
    await life.until(Promise.race([followRun(life, run.events(), { label: 'training', steps: options.steps, onEvent: watch }), failure]));
    const record = await life.until(run.wait());
    assert(record.checkpoint !== null, 'a completed run has a checkpoint');
    const checkpoint = resolve(record.checkpoint.directory);
    const [sample] = (await life.until(client.generate({ checkpoint, prompts: [prompt], ...SAMPLE }))).completions;
    const summary = {
      run: record.run,
      steps: record.steps,
      firstLoss: record.firstLoss,
      lastLoss: record.lastReport?.loss ?? null,
      validationLossBefore: record.validationBefore,
      validationLoss: record.validation?.loss ?? null,
      tokensPerSecond: speed.tokensPerSecond,
      checkpoint,
      weightsDigest: record.weightsDigest,
      sample: prompt + sample!.text,
    };
    printResult(options.json, summary, () => describe(summary, prompt, sample!.text, performance.now() - startedAt));
  });
}

interface Summary {
  readonly firstLoss: number | null;
  readonly lastLoss: number | null;
  readonly validationLossBefore: number | null;
  readonly validationLoss: number | null;
  readonly tokensPerSecond: number | null;
  readonly checkpoint: string;
  readonly weightsDigest: string | null;
}

function describe(summary: Summary, prompt: string, completion: string, milliseconds: number): string[] {
  const pair = (before: number | null, after: number | null): string => `${before?.toFixed(3) ?? '-'} -> ${after?.toFixed(3) ?? '-'}`;
  return [
    '',
    ...fields([
      ['training loss', pair(summary.firstLoss, summary.lastLoss)],
      ['held-out loss', pair(summary.validationLossBefore, summary.validationLoss)],
      ['speed', summary.tokensPerSecond === null ? '-' : `${formatCount(summary.tokensPerSecond)} tokens/s`],
      ['weights digest', summary.weightsDigest ?? '-'],
      ['checkpoint', summary.checkpoint],
      ['time', formatDuration(milliseconds)],
    ]),
    '',
    ...wrap(`${paint('dim', prompt.replace(/\s+/g, ' '))}${completion.replace(/\s+/g, ' ')}`),
    '',
    paint('dim', 'more of it:'),
    `  npx cuda-nn generate ${summary.checkpoint} --prompt "The whale" --top-p 0.9`,
  ];
}

export function registerDemo(program: Command): void {
  program
    .command('demo')
    .option('--steps <number>', 'optimizer steps', parseWhole('--steps', 1, 1_000_000), 200)
    .option('--workers <number>', 'worker processes that share each step', parseWhole('--workers', 1, 64), 1)
    .option('--kill-worker-at <step>', 'SIGKILL one worker at this step; the weights come out the same', parseWhole('--kill-worker-at', 1, 1_000_000))
    .option('--json', 'print one JSON object')
    .description('train a small model on a book from nothing: tokenizer, data, training, eval, sample')
    .action(demo);
}
