/** Runs the built `cuda-nn` command as a process, in a directory and environment of its own. For the cli-*.test.ts. */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { RunSpecInput } from '../../config/run-spec.ts';

const MAIN = fileURLToPath(new URL('../../cli/main.js', import.meta.url));

export interface Outcome {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface Options {
  readonly env?: NodeJS.ProcessEnv;
  readonly input?: string;
  readonly timeoutMs?: number;
}

/** A command under way. */
export interface Running {
  readonly child: ChildProcess;
  stdout(): string;
  stderr(): string;
  /** Resolves once stdout or stderr holds `text`; rejects with all output if the command ends first. */
  saw(text: string): Promise<void>;
  readonly ended: Promise<Outcome>;
}

/** A directory with a home and runs of its own; every command runs in it. */
export class Workplace {
  readonly directory = mkdtempSync(join(tmpdir(), 'cuda-nn-cli-'));
  readonly #running = new Set<ChildProcess>();
  readonly #main: string;

  /** `main`: the command line to run, that of this package unless it is another copy's. */
  constructor(main = MAIN) {
    this.#main = main;
  }

  at(...names: string[]): string {
    return join(this.directory, ...names);
  }

  start(args: readonly string[], { env = {}, input, timeoutMs = 120_000 }: Options = {}): Running {
    const clean = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(CUDA_NN_|FORCE_COLOR|NO_COLOR)/.test(name)));
    const child = spawn(process.execPath, [this.#main, ...args], {
      cwd: this.directory,
      env: { ...clean, CUDA_NN_THREADS: '1', CUDA_NN_DRAIN_MS: '5000', ...env },
      stdio: [input === undefined ? 'ignore' : 'pipe', 'pipe', 'pipe'],
    });
    this.#running.add(child);
    let stdout = '';
    let stderr = '';
    const waiting = new Set<() => void>();
    child.stdout!.setEncoding('utf8').on('data', (text: string) => {
      stdout += text;
      for (const look of waiting) look();
    });
    child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      stderr += text;
      for (const look of waiting) look();
    });
    if (input !== undefined) child.stdin!.end(input);
    const timer = setTimeout(() => child.kill('SIGKILL'), timeoutMs);
    const ended = new Promise<Outcome>((settle) => {
      child.once('close', (code) => {
        clearTimeout(timer);
        this.#running.delete(child);
        settle({ code, stdout, stderr });
      });
    });
    const saw = (text: string): Promise<void> =>
      new Promise((settle, refuse) => {
        const look = (): void => {
          if (!stdout.includes(text) && !stderr.includes(text)) return;
          waiting.delete(look);
          settle();
        };
        waiting.add(look);
        void ended.then(({ code }) => refuse(new Error(`${args.join(' ')} ended with ${code} before it said ${JSON.stringify(text)}:\n${stdout}${stderr}`)));
        look();
      });
    return { child, stdout: () => stdout, stderr: () => stderr, saw, ended };
  }

  run(args: readonly string[], options: Options = {}): Promise<Outcome> {
    return this.start(args, options).ended;
  }

  /** Runs a command that has to succeed, and reads the JSON on its stdout. */
  async json<Value>(args: readonly string[], options: Options = {}): Promise<Value> {
    const { code, stdout, stderr } = await this.run([...args, '--json'], options);
    if (code !== 0) throw new Error(`${args.join(' ')} ended with ${code}:\n${stderr}`);
    return JSON.parse(stdout) as Value;
  }

  /** Makes text, tokenizer.json, train.tokens and validation.tokens for the preset `tiny`, with the commands for that. */
  async prepareData(): Promise<void> {
    const words = ['the', 'whale', 'and', 'a', 'ship', 'upon', 'sea', 'old', 'captain', 'harpoon', 'white', 'of', 'deep'];
    const sentence = (line: number): string => Array.from({ length: 9 }, (_, at) => words[(line * 7 + at * at * 3 + at) % words.length]).join(' ');
    writeFileSync(this.at('text.txt'), Array.from({ length: 900 }, (_, line) => `${sentence(line)} ${line % 97}.\n`).join(''));
    await this.json(['tokenizer', 'train', 'text.txt', '--vocab-size', '300', '--output', 'tokenizer.json']);
    await this.json(['data', 'prepare', 'text.txt', '--tokenizer', 'tokenizer.json', '--output', 'train.tokens', '--validation', 'validation.tokens', '--hold-out', '0.2']);
  }

  /** Writes a spec of the preset `tiny` on that data; returns its file name. */
  writeSpec(name: string, changes: Partial<RunSpecInput> = {}): string {
    const spec: RunSpecInput = {
      name,
      model: 'tiny',
      data: { train: 'train.tokens', validation: 'validation.tokens', tokenizer: 'tokenizer.json' },
      seed: 7,
      steps: 6,
      batch: { shards: 2, sequences: 1, sequenceLength: 32 },
      evaluation: { every: 3, sequences: 4 },
      checkpoint: { every: 3 },
      parallelism: 1,
      ...changes,
    };
    writeFileSync(this.at(`${name}.json`), JSON.stringify(spec));
    return `${name}.json`;
  }

  remove(): void {
    for (const child of this.#running) child.kill('SIGKILL');
    rmSync(this.directory, { recursive: true, force: true });
  }
}
