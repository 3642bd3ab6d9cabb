/**
 * What the runs of system tests are: the preset `tiny` over random token files, small enough for a step in milliseconds and with
 * enough to learn that a wrong gradient shows. It starts nothing. Used by the stacks of this folder, by tests and by bench.
 */
import { join } from 'node:path';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { TokenFileWriter } from '../../data/token-file.ts';

/** A place that writeTinyData was told. */
export interface DataPlace {
  readonly directory: string;
}

/** A spec of preset tiny, over four shards, on the files of writeTinyData; `changes` replace whole keys. */
export function tinySpec({ directory }: DataPlace, name: string, changes: Partial<RunSpecInput> = {}): RunSpecInput {
  return {
    name,
    model: 'tiny',
    data: { train: join(directory, 'train.tokens'), validation: join(directory, 'validation.tokens') },
    steps: 24,
    batch: { shards: 4, microBatches: 1, sequences: 2, sequenceLength: 32 },
    optimizer: { learningRate: 3e-3, warmupSteps: 4 },
    evaluation: { every: 8, sequences: 8 },
    checkpoint: { every: 8, keep: 2 },
    ...changes,
  };
}

/** train.tokens and validation.tokens. */
export function writeTinyData({ directory }: DataPlace): void {
  writeTokens(join(directory, 'train.tokens'), 20_000, 1);
  writeTokens(join(directory, 'validation.tokens'), 2_000, 2);
}

/** A token file of `count` ids in which each follows from the one before often enough that there is something to learn. */
export function writeTokens(path: string, count: number, seed: number, vocabSize = 512): void {
  const tokens = new Int32Array(count);
  let state = seed;
  const random = (): number => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  for (let index = 0; index < count; index++) {
    const predicted = 4 + (((tokens[index - 1] ?? 0) * 7) % 64);
    tokens[index] = random() < 0.8 ? predicted : 4 + Math.floor(random() * (vocabSize - 4));
  }
  writeTokenFile(path, tokens, vocabSize);
}

/** A token file of these ids, of no tokenizer. */
export function writeTokenFile(path: string, tokens: Int32Array, vocabSize = 512): void {
  const writer = new TokenFileWriter(path, { vocabSize, tokenizerDigest: null });
  writer.append(tokens);
  writer.finish();
}
