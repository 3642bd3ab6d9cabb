/**
 * The commands that turn text into what a run reads: `tokenizer train` and `data prepare`. Both need no services. Called
 * by main.ts.
 */
import type { Command } from 'commander';
import { NnError } from '../../config/errors.ts';
import { prepareData } from '../../data/prepare.ts';
import type { PreparedFile } from '../../data/prepare.ts';
import { trainTokenizer } from '../../data/tokenizer.ts';
import { withLifetime } from '../lifetime.ts';
import { parseNumber, parseWhole } from '../options.ts';
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
          onProgress: (progress) => showTraining(bar, progress),
        }),
      );
      bar.end();
      const milliseconds = Math.round(performance.now() - startedAt);
      printResult(options.json, { ...result, milliseconds }, () =>
        fields([
          ['tokenizer', result.path],
          ['entries', formatCount(result.vocabSize)],
          ['learned from', `${formatBytes(result.textBytes)}, ${formatCount(result.words)} distinct words`],
          ['digest', result.digest],
          ['time', formatDuration(milliseconds)],
        ]),
      );
    } finally {
      bar.end();
    }
  });
}

/** Paints the two phases of a tokenizer's training: reading text, then learning merges. */
export function showTraining(bar: ProgressBar, { phase, done, total }: { phase: 'read' | 'merge'; done: number; total: number }): void {
  // Reading is a small part of the time, so it gets a small part of the bar.
  if (phase === 'read') bar.update((done / Math.max(1, total)) * 0.1, 1, `read ${formatBytes(done)}`);
  else bar.update(0.1 + (done / Math.max(1, total)) * 0.9, 1, `${formatCount(done)} of ${formatCount(total)} entries`);
}

interface PrepareOptions {
  tokenizer: string;
  output: string;
  validation?: string;
  holdOut?: number;
  json?: boolean;
}

async function prepareCommand(inputs: string[], options: PrepareOptions): Promise<void> {
  if ((options.validation === undefined) !== (options.holdOut === undefined)) {
    throw new NnError('USAGE', '--validation FILE and --hold-out FRACTION go together');
  }
  const startedAt = performance.now();
  await withLifetime(async (life) => {
    const bar = new ProgressBar('prepare');
    try {
      const result = await life.until(
        prepareData({
          inputs,
          tokenizer: options.tokenizer,
          output: options.output,
          ...(options.validation === undefined ? {} : { validation: { output: options.validation, fraction: options.holdOut! } }),
          onProgress: ({ bytesDone, bytesTotal, tokens }) => bar.update(bytesDone, bytesTotal, `${formatBytes(bytesDone)}, ${formatCount(tokens)} tokens`),
        }),
      );
      bar.end();
      const milliseconds = Math.round(performance.now() - startedAt);
      const describe = ({ path, tokens, documents, fileBytes }: PreparedFile): string =>
        `${path}: ${formatCount(tokens)} tokens of ${formatCount(documents)} document${documents === 1 ? '' : 's'}, ${formatBytes(fileBytes)}`;
      printResult(options.json, { ...result, milliseconds }, () =>
        fields([
          ['token file', describe(result.train)],
          ...(result.validation === null ? [] : [['validation', describe(result.validation)] as const]),
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
    .option('--vocab-size <number>', 'entries, with the 4 special and the 256 byte ones', parseWhole('--vocab-size', 260, 1 << 20), 32_000)
    .option('--json', 'print JSON')
    .description('train a byte-level BPE tokenizer, written as a Hugging Face tokenizer.json')
    .action(trainCommand);
  const data = program.command('data').description('token files');
  data
    .command('prepare')
    .argument('<input...>', 'text: .txt and .jsonl files, or directories of them')
    .requiredOption('--tokenizer <file>', 'tokenizer.json to encode with')
    .requiredOption('-o, --output <file>', 'token file to write')
    .option('--validation <file>', 'second token file, for the text held out')
    .option('--hold-out <fraction>', 'share of the text, from its end, that goes there', parseNumber('--hold-out', 0, 0.999999))
    .option('--json', 'print JSON')
    .description('encode text into a token file; larger than memory is fine')
    .action(prepareCommand);
}
