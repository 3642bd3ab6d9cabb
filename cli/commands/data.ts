/**
 * The commands that turn text into what a run reads: `tokenizer train` and `data prepare`. Both need no services. Called
 * by main.ts.
 */
import type { Command } from 'commander';
import { prepareData } from '../../data/prepare.ts';
import { trainTokenizer } from '../../data/train-tokenizer.ts';
import { withLifetime } from '../lifetime.ts';
import { parseWhole } from '../options.ts';
import { ProgressBar, fields, formatBytes, formatCount, formatDuration, printResult } from '../output.ts';

async function trainCommand(inputs: string[], options: { output: string; vocabSize: number; json?: boolean }): Promise<void> {
  const startedAt = performance.now();
  await withLifetime(async (life) => {
    const bar = new ProgressBar('tokenizer');
    try {
      const result = await life.until(
        trainTokenizer({
          inputs,
          output: options.output,
          vocabSize: options.vocabSize,
          onProgress: ({ done, total }) => bar.update(done, total, `${formatCount(done)} entries`),
        }),
      );
      bar.end();
      const milliseconds = Math.round(performance.now() - startedAt);
      printResult(options.json, { output: options.output, ...result, milliseconds }, () =>
        fields([
          ['tokenizer', options.output],
          ['entries', formatCount(result.vocabSize)],
          ['digest', result.digest],
          ['time', formatDuration(milliseconds)],
        ]),
      );
    } finally {
      bar.end();
    }
  });
}

async function prepareCommand(inputs: string[], options: { tokenizer: string; output: string; json?: boolean }): Promise<void> {
  const startedAt = performance.now();
  await withLifetime(async (life) => {
    const bar = new ProgressBar('prepare');
    try {
      const result = await life.until(
        prepareData({
          inputs,
          tokenizer: options.tokenizer,
          output: options.output,
          signal: life.signal,
          onProgress: ({ done, total, tokens }) => bar.update(done, total, `${formatBytes(done)}, ${formatCount(tokens)} tokens`),
        }),
      );
      bar.end();
      const milliseconds = Math.round(performance.now() - startedAt);
      printResult(options.json, { output: options.output, ...result, milliseconds }, () =>
        fields([
          ['token file', options.output],
          ['tokens', formatCount(result.tokens)],
          ['documents', formatCount(result.documents)],
          ['time', formatDuration(milliseconds)],
        ]),
      );
    } finally {
      bar.end();
    }
  });
}

export function registerDataCommands(program: Command): void {
  const tokenizer = program.command('tokenizer').description('tokenizers');
  tokenizer
    .command('train')
    .argument('<input...>', 'text: .txt and .jsonl files, or directories of them')
    .requiredOption('-o, --output <file>', 'tokenizer.json to write')
    .option('--vocab-size <number>', 'entries, with the 4 special and the 256 byte ones', parseWhole('--vocab-size', 260, 1 << 24), 32_000)
    .option('--json', 'print JSON')
    .description('train a byte-level BPE tokenizer, written as a Hugging Face tokenizer.json')
    .action(trainCommand);
  const data = program.command('data').description('token files');
  data
    .command('prepare')
    .argument('<input...>', 'text: .txt and .jsonl files, or directories of them')
    .requiredOption('--tokenizer <file>', 'tokenizer.json to encode with')
    .requiredOption('-o, --output <file>', 'token file to write')
    .option('--json', 'print JSON')
    .description('encode text into a token file; larger than memory is fine')
    .action(prepareCommand);
}
