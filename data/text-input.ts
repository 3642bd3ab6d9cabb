/**
 * Text files as a stream of documents in pieces, in constant memory: .txt (a file is a document) and .jsonl (the field
 * `text` of each line is a document). Knows no tokens, but cuts pieces only where no word runs across. Called by
 * tokenizer.ts (training) and prepare.ts.
 */
import { readdirSync, statSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { NnError } from '../config/errors.ts';
import { lastSafeCut } from './byte-level.ts';
import { fileError, onFile } from './files.ts';

/** Bytes read at a time. */
const READ_BYTES = 1 << 20;

/** A word or run of whitespace longer than this many characters is cut all the same: the bound of what is kept in memory. */
export const MAXIMUM_WORD_CHARACTERS = 4 << 20;

/** A longer line of a .jsonl file is refused: a line is parsed as a whole. */
export const MAXIMUM_LINE_BYTES = 64 << 20;

/** A range of bytes of a text file; documents end at its end. */
export interface TextRange {
  readonly path: string;
  readonly kind: 'text' | 'jsonl';
  readonly start: number;
  readonly end: number;
}

/** A part of a document. Its text ends where a word ends. */
export interface Piece {
  readonly text: string;
  /** Whether the document begins, or ends, with this piece. */
  readonly begins: boolean;
  readonly ends: boolean;
  /** Bytes of the range that were read up to here. */
  readonly bytesDone: number;
}

const isText = (name: string): boolean => /\.(txt|jsonl)$/i.test(name);

/**
 * The files that `inputs` name, in order: a file as it is (.jsonl by its ending, else text), a directory as all .txt and
 * .jsonl files in and below it, sorted by path. Throws FILE_NOT_FOUND, and DATA_INVALID for a directory without any, and for
 * no bytes at all.
 */
export function listTexts(inputs: readonly string[]): TextRange[] {
  const files: TextRange[] = [];
  const add = (path: string, bytes: number): void => {
    files.push({ path, kind: /\.jsonl$/i.test(path) ? 'jsonl' : 'text', start: 0, end: bytes });
  };
  for (const input of inputs) {
    const found = onFile(input, () => statSync(input));
    if (!found.isDirectory()) {
      add(input, found.size);
      continue;
    }
    const paths = onFile(input, () => readdirSync(input, { recursive: true, withFileTypes: true }))
      .filter((entry) => !entry.isDirectory() && isText(entry.name))
      .map((entry) => join(entry.parentPath, entry.name))
      .sort((a, b) => (a < b ? -1 : 1));
    if (paths.length === 0) throw new NnError('DATA_INVALID', `${input}: the directory holds no .txt or .jsonl file`, { path: input });
    for (const path of paths) add(path, onFile(path, () => statSync(path)).size);
  }
  if (files.every(({ end }) => end === 0)) throw new NnError('DATA_INVALID', `${inputs.join(', ')}: there is no text in it`, { path: inputs[0] ?? '' });
  return files;
}

export const bytesOfRanges = (ranges: readonly TextRange[]): number => ranges.reduce((sum, { start, end }) => sum + end - start, 0);

/** The bytes of a range, in parts that are valid until the next one is asked for. */
async function* readBytes({ path, start, end }: TextRange, readAtOnce: number): AsyncGenerator<Buffer> {
  let handle;
  try {
    handle = await open(path, 'r');
    const buffer = Buffer.allocUnsafe(Math.min(readAtOnce, Math.max(1, end - start)));
    for (let at = start; at < end; ) {
      const { bytesRead } = await handle.read(buffer, 0, Math.min(buffer.length, end - at), at);
      if (bytesRead === 0) throw new NnError('DATA_INVALID', `${path}: was cut to ${at} bytes while it was read`, { path });
      yield buffer.subarray(0, bytesRead);
      at += bytesRead;
    }
  } catch (error) {
    throw fileError(error, path);
  } finally {
    await handle?.close();
  }
}

/** Decodes UTF-8 across the seams of parts. Throws DATA_INVALID naming about where the file is not UTF-8. */
function decoderOf(path: string): (bytes: Uint8Array | undefined, at: number) => string {
  const decoder = new TextDecoder('utf-8', { fatal: true });
  return (bytes, at) => {
    try {
      return decoder.decode(bytes, { stream: bytes !== undefined });
    } catch (error) {
      throw new NnError('DATA_INVALID', `${path}: is not UTF-8 text between bytes ${Math.max(0, at - 4)} and ${at + (bytes?.length ?? 0)}; convert it first`, { path }, error);
    }
  };
}

/** Whether index `at` would part a surrogate pair. */
const partsPair = (text: string, at: number): boolean => /[\uD800-\uDBFF]/.test(text[at - 1] ?? '') && /[\uDC00-\uDFFF]/.test(text[at] ?? '');

async function* readPlain(range: TextRange, readAtOnce: number): AsyncGenerator<Piece> {
  const decode = decoderOf(range.path);
  let kept = '';
  let begins = true;
  let bytesDone = 0;
  for await (const bytes of readBytes(range, readAtOnce)) {
    const searched = Math.max(0, kept.length - 1); // what is kept has no safe cut
    kept += decode(bytes, range.start + bytesDone);
    bytesDone += bytes.length;
    let cut = lastSafeCut(kept, searched);
    if (cut === 0 && kept.length > MAXIMUM_WORD_CHARACTERS) cut = partsPair(kept, kept.length - 1) ? kept.length - 2 : kept.length - 1;
    if (cut === 0) continue;
    yield { text: kept.slice(0, cut), begins, ends: false, bytesDone };
    kept = kept.slice(cut);
    begins = false;
  }
  kept += decode(undefined, range.end);
  if (kept !== '' || !begins) yield { text: kept, begins, ends: true, bytesDone };
}

/** The `text` of one line, or '' for a blank one. Throws DATA_INVALID naming the line. */
function parseLine(path: string, number: number, line: string): string {
  if (line.trim() === '') return '';
  const refuse = (problem: string, cause?: unknown): never => {
    throw new NnError('DATA_INVALID', `${path}: line ${number} ${problem}`, { path, line: number }, cause);
  };
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch (error) {
    return refuse('is no JSON', error);
  }
  const text = (value as { text?: unknown } | null)?.text;
  return typeof text === 'string' ? text : refuse('has no field "text" that is a string');
}

async function* readLines(range: TextRange, readAtOnce: number): AsyncGenerator<Piece> {
  const { path } = range;
  let parts: Buffer[] = [];
  let kept = 0;
  let number = 0;
  let bytesDone = 0;
  const takeLine = (last: Buffer): string => {
    number++;
    const line = decoderOf(path)(Buffer.concat([...parts, last]), range.start + bytesDone);
    parts = [];
    kept = 0;
    return parseLine(path, number, line);
  };
  for await (const bytes of readBytes(range, readAtOnce)) {
    let from = 0;
    for (let newline = bytes.indexOf(10); newline !== -1; newline = bytes.indexOf(10, from)) {
      const text = takeLine(bytes.subarray(from, newline));
      from = newline + 1;
      if (text !== '') yield { text, begins: true, ends: true, bytesDone: bytesDone + from };
    }
    bytesDone += bytes.length;
    kept += bytes.length - from;
    if (kept > MAXIMUM_LINE_BYTES) throw new NnError('DATA_INVALID', `${path}: line ${number + 1} is longer than ${MAXIMUM_LINE_BYTES} bytes`, { path, line: number + 1 });
    if (from < bytes.length) parts.push(Buffer.from(bytes.subarray(from)));
  }
  if (kept === 0) return;
  const text = takeLine(Buffer.alloc(0));
  if (text !== '') yield { text, begins: true, ends: true, bytesDone };
}

/**
 * The documents of a range, in pieces. Throws DATA_INVALID, naming file and place, for what is not UTF-8 or not JSON.
 * `readAtOnce`: bytes of one read.
 */
export function readPieces(range: TextRange, readAtOnce = READ_BYTES): AsyncGenerator<Piece> {
  return range.kind === 'jsonl' ? readLines(range, readAtOnce) : readPlain(range, readAtOnce);
}
