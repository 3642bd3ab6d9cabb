/**
 * Text to token files: `cuda-nn data prepare`. Streams, so that a corpus larger than memory works, and knows neither the
 * file format's bytes nor how text becomes ids. Called by the CLI.
 *
 * Documents follow each other in the order of the inputs, each as <bos> text <eos>. With a validation fraction f the
 * text is cut in two: at the first line boundary at or after byte (1 - f) x all bytes, counted over all inputs in order. What
 * is before is for training, what is behind for validation; a file (a book) that holds the cut becomes two documents.
 */
import { closeSync, openSync } from 'node:fs';
import { NnError } from '../config/errors.ts';
import { onFile, readAt } from './files.ts';
import { bytesOfRanges, listTexts, readPieces } from './text-input.ts';
import type { TextRange } from './text-input.ts';
import { TokenFileWriter } from './token-file.ts';
import { Tokenizer } from './tokenizer.ts';

export interface Preparation {
  /** Text files (.txt, .jsonl) and directories of them. */
  readonly inputs: readonly string[];
  /** tokenizer.json. */
  readonly tokenizer: string;
  /** Token file to write. */
  readonly output: string;
  /** The last `fraction` of the text goes into a second token file. */
  readonly validation?: { readonly output: string; readonly fraction: number };
  readonly onProgress?: (progress: { bytesDone: number; bytesTotal: number; tokens: number }) => void;
}

export interface PreparedFile {
  readonly path: string;
  readonly tokens: number;
  readonly documents: number;
  readonly textBytes: number;
  readonly fileBytes: number;
}

export interface PreparedData {
  readonly train: PreparedFile;
  readonly validation: PreparedFile | null;
  readonly vocabSize: number;
  readonly tokenizerDigest: string;
}

/** The byte after the first newline at or after `from`; the range's end when there is none. */
function lineBoundary({ path, end }: TextRange, from: number): number {
  const buffer = Buffer.alloc(64 << 10);
  return onFile(path, () => {
    const descriptor = openSync(path, 'r');
    try {
      for (let at = from; at < end; ) {
        const read = readAt(descriptor, buffer.subarray(0, Math.min(buffer.length, end - at)), at);
        const newline = buffer.subarray(0, read).indexOf(10);
        if (newline !== -1) return at + newline + 1;
        if (read === 0) break;
        at += read;
      }
      return end;
    } finally {
      closeSync(descriptor);
    }
  });
}

/** Cuts ranges in two at the line boundary that the fraction asks for (see the top of the file). */
export function splitRanges(ranges: readonly TextRange[], validationFraction: number): { train: TextRange[]; validation: TextRange[] } {
  const cut = Math.floor(bytesOfRanges(ranges) * (1 - validationFraction));
  const train: TextRange[] = [];
  const validation: TextRange[] = [];
  let before = 0;
  for (const range of ranges) {
    const bytes = range.end - range.start;
    if (before + bytes <= cut) train.push(range);
    else if (before >= cut) validation.push(range);
    else {
      // A line that ends right at the cut is whole before it: the search begins one byte earlier.
      const middle = lineBoundary(range, Math.max(range.start, range.start + cut - before - 1));
      if (middle > range.start) train.push({ ...range, end: middle });
      if (middle < range.end) validation.push({ ...range, start: middle });
    }
    before += bytes;
  }
  return { train, validation };
}

/**
 * Tokenizes texts into a token file, or two. Files appear complete or not at all. Throws DATA_INVALID (no text, not UTF-8, a
 * bad line, a part that is empty), FILE_NOT_FOUND, TOKENIZER_INVALID, DISK_FULL, USAGE for a fraction outside 0..1.
 */
export async function prepareData({ inputs, tokenizer: tokenizerPath, output, validation, onProgress = () => undefined }: Preparation): Promise<PreparedData> {
  if (validation !== undefined && !(validation.fraction > 0 && validation.fraction < 1)) {
    throw new NnError('USAGE', `the validation fraction must lie between 0 and 1, not at ${validation.fraction}`, { fraction: validation.fraction });
  }
  const tokenizer = Tokenizer.load(tokenizerPath);
  const { bosId, eosId } = tokenizer;
  if (bosId === null || eosId === null) throw new NnError('TOKENIZER_INVALID', `${tokenizerPath}: has no <bos> and <eos>, which begin and end documents`, { path: tokenizerPath });
  const texts = listTexts(inputs);
  const parts = validation === undefined ? { train: texts, validation: [] } : splitRanges(texts, validation.fraction);
  if (validation !== undefined && (parts.train.length === 0 || parts.validation.length === 0)) {
    throw new NnError('DATA_INVALID', `${inputs.join(', ')}: a validation fraction of ${validation.fraction} leaves nothing for ${parts.train.length === 0 ? 'training' : 'validation'}`, {});
  }
  const bytesTotal = bytesOfRanges(texts);
  let bytesBefore = 0;
  let tokensBefore = 0;

  const write = async (path: string, ranges: readonly TextRange[]): Promise<PreparedFile> => {
    const writer = new TokenFileWriter(path, { vocabSize: tokenizer.vocabSize, tokenizerDigest: tokenizer.digest });
    let documents = 0;
    try {
      for (const range of ranges) {
        for await (const piece of readPieces(range)) {
          if (piece.begins) {
            writer.append([bosId]);
            documents++;
          }
          writer.append(tokenizer.encode(piece.text));
          if (piece.ends) writer.append([eosId]);
          onProgress({ bytesDone: bytesBefore + piece.bytesDone, bytesTotal, tokens: tokensBefore + writer.count });
        }
        bytesBefore += range.end - range.start;
      }
      if (documents === 0) throw new NnError('DATA_INVALID', `${inputs.join(', ')}: there is no text in it`, { path });
      const { count, bytes } = writer.finish();
      tokensBefore += count;
      return { path, tokens: count, documents, textBytes: bytesOfRanges(ranges), fileBytes: bytes };
    } finally {
      writer.abort();
    }
  };
  const train = await write(output, parts.train);
  const held = validation === undefined ? null : await write(validation.output, parts.validation);
  return { train, validation: held, vocabSize: tokenizer.vocabSize, tokenizerDigest: tokenizer.digest };
}
