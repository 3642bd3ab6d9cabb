/**
 * The commands about checkpoints: eval and generate. Both go through the queues; when nothing is up they bring an embedded
 * Redis and one worker along for as long as they take. What can be refused without a worker is refused first. Called by
 * main.ts.
 */
import { resolve } from 'node:path';
import type { Command } from 'commander';
import { NnError } from '../../config/errors.ts';
import { loadConfig } from '../../config/schema.ts';
import { CheckpointReader } from '../../data/checkpoint-files.ts';
import { TokenFile } from '../../data/token-file.ts';
import { withLifetime } from '../lifetime.ts';
import { parseNumber, parseWhole, readText } from '../options.ts';
import { fields, formatCount, formatDuration, note, printResult } from '../output.ts';
import { borrowWorker } from '../stack.ts';

const LARGEST = 1 << 20;

/** Throws CHECKPOINT_INVALID or FILE_NOT_FOUND for what a worker would refuse later. */
function lookAtCheckpoint(directory: string): { vocabSize: number } {
  const reader = CheckpointReader.open(directory, { verify: false });
  try {
    return { vocabSize: reader.model.vocabSize };
  } finally {
    reader.close();
  }
}

async function evaluate(checkpoint: string, options: { data: string; sequences: number; length?: number; json?: boolean }): Promise<void> {
  const config = loadConfig();
  const { vocabSize } = lookAtCheckpoint(checkpoint);
  const file = TokenFile.open(options.data);
  try {
    if (file.vocabSize > vocabSize) {
      throw new NnError('DATA_INVALID', `${options.data} has a vocabulary of ${file.vocabSize}, but the model of ${checkpoint} only ${vocabSize}`);
    }
  } finally {
    file.close();
  }
  await withLifetime(async (life) => {
    const client = await borrowWorker(life, config);
    const result = await life.until(
      client.eval({
        checkpoint: resolve(checkpoint),
        data: resolve(options.data),
        sequences: options.sequences,
        ...(options.length === undefined ? {} : { sequenceLength: options.length }),
      }),
    );
    const { loss } = result;
    if (loss === null) throw new NnError('NON_FINITE', `the loss of ${checkpoint} on ${options.data} is not a finite number`);
    printResult(options.json, { checkpoint, data: options.data, ...result, perplexity: Math.exp(loss) }, () =>
      fields([
        ['loss', `${loss.toFixed(4)} nats a token`],
        ['perplexity', Math.exp(loss).toFixed(2)],
        ['tokens', formatCount(result.targetTokens)],
        ['time', formatDuration(result.milliseconds)],
      ]),
    );
  });
}

interface GenerateOptions {
  prompt?: string[];
  promptFile?: string;
  maxTokens: number;
  temperature?: number;
  topK?: number;
  topP?: number;
  seed: number;
  ntkAlpha?: number;
  json?: boolean;
}

/** The method that the given options ask for: greedy unless one of sampling's is there. Throws USAGE. */
export function samplingMethod({ temperature, topK, topP }: Pick<GenerateOptions, 'temperature' | 'topK' | 'topP'>): 'greedy' | 'sample' | 'top-k' | 'top-p' {
  if (topK !== undefined && topP !== undefined) throw new NnError('USAGE', '--top-k and --top-p cannot be used together; choose one');
  if (topK !== undefined) return 'top-k';
  if (topP !== undefined) return 'top-p';
  return temperature === undefined ? 'greedy' : 'sample';
}

function readPrompts({ prompt = [], promptFile }: GenerateOptions): string[] {
  const prompts = [...prompt, ...(promptFile === undefined ? [] : [readText(promptFile)])];
  if (prompts.length === 0) throw new NnError('USAGE', 'no prompt: give --prompt TEXT (more than once for several) or --prompt-file FILE (- for standard input)');
  if (prompts.length > 64) throw new NnError('USAGE', `${prompts.length} prompts are too many; 64 go into one command`);
  return prompts;
}

async function generate(checkpoint: string, options: GenerateOptions): Promise<void> {
  const config = loadConfig();
  const method = samplingMethod(options);
  const prompts = readPrompts(options);
  lookAtCheckpoint(checkpoint);
  await withLifetime(async (life) => {
    const client = await borrowWorker(life, config);
    const result = await life.until(
      client.generate({
        checkpoint: resolve(checkpoint),
        prompts,
        maxTokens: options.maxTokens,
        method,
        seed: options.seed,
        ...(options.temperature === undefined ? {} : { temperature: options.temperature }),
        ...(options.topK === undefined ? {} : { topK: options.topK }),
        ...(options.topP === undefined ? {} : { topP: options.topP }),
        ...(options.ntkAlpha === undefined ? {} : { ntkAlpha: options.ntkAlpha }),
      }),
    );
    const value = { checkpoint, method, tokensPerSecond: result.tokensPerSecond, completions: result.completions.map((each, at) => ({ prompt: prompts[at]!, ...each })) };
    printResult(options.json, value, () => result.completions.map(({ text }, at) => prompts[at]! + text));
    note(`${formatCount(result.tokensPerSecond)} tokens/s`);
  });
}

const collect = (value: string, before: string[] = []): string[] => [...before, value];

export function registerCheckpointCommands(program: Command): void {
  program
    .command('eval')
    .argument('<checkpoint>', 'checkpoint directory: of a run, or any Mixtral of Hugging Face')
    .requiredOption('--data <file>', 'token file (cuda-nn data prepare)')
    .option('--sequences <number>', 'sequences to read, from the start of the file', parseWhole('--sequences', 1, LARGEST), 32)
    .option('--length <tokens>', 'tokens in a sequence (default: what the checkpoint was trained on)', parseWhole('--length', 1, LARGEST))
    .option('--json', 'print JSON')
    .description('loss of a checkpoint on a token file')
    .action(evaluate);
  program
    .command('generate')
    .argument('<checkpoint>', 'checkpoint directory with a tokenizer.json')
    .option('--prompt <text>', 'text to go on from; may be given several times', collect)
    .option('--prompt-file <file>', 'read the prompt from a file, or from - for standard input')
    .option('--max-tokens <number>', 'tokens to generate at most', parseWhole('--max-tokens', 1, LARGEST), 128)
    .option('--temperature <number>', 'sample, with the logits divided by this', parseNumber('--temperature', 0, 1000))
    .option('--top-k <number>', 'sample among the k most probable tokens', parseWhole('--top-k', 1, LARGEST))
    .option('--top-p <number>', 'sample among the fewest tokens that hold this probability', parseNumber('--top-p', 0, 1))
    .option('--seed <number>', 'seed of the sampling', parseWhole('--seed', 0, 0xffffffff), 0)
    .option('--ntk-alpha <number>', 'stretch the context by NTK scaling of RoPE', parseNumber('--ntk-alpha', 0.999999, 1024))
    .option('--json', 'print JSON')
    .description('text from a checkpoint; greedy unless a sampling option is given')
    .action(generate);
}
