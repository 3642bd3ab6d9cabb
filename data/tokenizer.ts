/**
 * The tokenizer: training one (byte-level BPE, written as a Hugging Face tokenizer.json), and loading any such file to
 * encode and decode. The library @huggingface/tokenizers is the authority on what a file means; only this file
 * imports it. Called by prepare.ts, the CLI, and workers that generate.
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { Tokenizer as Library } from '@huggingface/tokenizers';
import { NnError } from '../config/errors.ts';
import { SMALLEST_VOCABULARY, WordCounter, learnMerges } from './bpe-trainer.ts';
import type { LearnedMerges } from './bpe-trainer.ts';
import { WORD_PATTERN } from './byte-level.ts';
import { onFile, quote, removeAbandoned, writeWhole } from './files.ts';
import { SPECIAL_IDS, SPECIAL_TOKENS } from './special-tokens.ts';
import { bytesOfRanges, listTexts, readPieces } from './text-input.ts';

/** Distinct words whose encodings are remembered: about 100 bytes each. */
const REMEMBERED_WORDS = 1 << 18;

/** Longer words are rare, and not remembered. */
const REMEMBERED_CHARACTERS = 64;

/** No vocabulary has such ids: a larger one is damage, and would be memory. */
const MAXIMUM_ID = 1 << 24;

/** Model types that the library knows; files of old leave theirs out. */
const MODEL_TYPES: readonly unknown[] = ['BPE', 'WordPiece', 'Unigram', 'WordLevel', undefined];

/** The part of the library that is used. */
interface LibraryTokenizer {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: number[] };
  decode(ids: number[], options: { skip_special_tokens: boolean; clean_up_tokenization_spaces: boolean }): string;
  get_vocab(): Map<string, number>;
  token_to_id(token: string): number | undefined;
}

const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

/** A Hugging Face tokenizer.json of learned merges. The same merges give the same bytes. */
function encodeTokenizer({ tokens, merges }: LearnedMerges): Uint8Array {
  const special = SPECIAL_TOKENS.map((content, id) => ({ id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true }));
  const bos = SPECIAL_TOKENS[SPECIAL_IDS.bos];
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
  return Buffer.from(
    `${JSON.stringify({
      version: '1.0',
      truncation: null,
      padding: null,
      added_tokens: special,
      normalizer: null,
      pre_tokenizer: byteLevel,
      post_processor: {
        type: 'TemplateProcessing',
        single: [{ SpecialToken: { id: bos, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
        pair: [{ SpecialToken: { id: bos, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }, { SpecialToken: { id: bos, type_id: 1 } }, { Sequence: { id: 'B', type_id: 1 } }],
        special_tokens: { [bos]: { id: bos, ids: [SPECIAL_IDS.bos], tokens: [bos] } },
      },
      decoder: byteLevel,
      model: {
        type: 'BPE',
        dropout: null,
        unk_token: SPECIAL_TOKENS[SPECIAL_IDS.unk],
        continuing_subword_prefix: null,
        end_of_word_suffix: null,
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: false,
        vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
        merges: merges.map(([left, right]) => `${left} ${right}`),
      },
    })}\n`,
  );
}

/** What `trainTokenizer` is told. */
export interface TokenizerTraining {
  /** Text files (.txt, .jsonl) and directories of them. */
  readonly inputs: readonly string[];
  /** tokenizer.json to write. */
  readonly output: string;
  /** Entries, special tokens and bytes included; exactly so many come out. */
  readonly vocabSize: number;
  /** Pairs that occur less often are not merged. */
  readonly minimumCount?: number;
  /** Distinct words kept in memory; above it the rarest are forgotten. */
  readonly maximumWords?: number;
  /** `read`: bytes of text so far; `merge`: vocabulary entries so far. */
  readonly onProgress?: (progress: { phase: 'read' | 'merge'; done: number; total: number }) => void;
}

export interface TrainedTokenizer {
  readonly path: string;
  readonly vocabSize: number;
  readonly merges: number;
  /** Distinct words that the merges were learned from. */
  readonly words: number;
  readonly textBytes: number;
  /** sha-256 of the file. */
  readonly digest: string;
}

/**
 * Trains a byte-level BPE tokenizer and writes it. The text is streamed; only word counts are in memory. The same text
 * gives the same file. Throws DATA_INVALID when the text is too small for the vocabulary (saying how many entries it could
 * make) or is no text, USAGE for a vocabulary below 260 or above 2^20, FILE_NOT_FOUND, DISK_FULL.
 */
export async function trainTokenizer(training: TokenizerTraining): Promise<TrainedTokenizer> {
  const { inputs, output, vocabSize, minimumCount = 2, maximumWords = 2_000_000, onProgress = () => undefined } = training;
  if (!Number.isInteger(vocabSize) || vocabSize < SMALLEST_VOCABULARY || vocabSize > 1 << 20) {
    throw new NnError('USAGE', `the vocabulary size must be a whole number from ${SMALLEST_VOCABULARY} (4 special tokens and 256 bytes) to ${1 << 20}, not ${vocabSize}`, { vocabSize });
  }
  const texts = listTexts(inputs);
  const textBytes = bytesOfRanges(texts);
  const counter = new WordCounter(maximumWords);
  let bytesBefore = 0;
  for (const text of texts) {
    for await (const piece of readPieces(text)) {
      counter.add(piece.text);
      onProgress({ phase: 'read', done: bytesBefore + piece.bytesDone, total: textBytes });
    }
    bytesBefore += text.end - text.start;
  }

  const learning = learnMerges(counter.counts, { vocabSize, minimumCount });
  let turn = learning.next();
  for (; turn.done !== true; turn = learning.next()) {
    onProgress({ phase: 'merge', done: turn.value, total: vocabSize });
    await setImmediate();
  }
  const learned = turn.value;
  if (learned.tokens.length < vocabSize) {
    throw new NnError('DATA_INVALID', `${inputs.join(', ')}: the text is too small for a vocabulary of ${vocabSize}; it could make ${learned.tokens.length} entries`, {
      vocabSize,
      possible: learned.tokens.length,
    });
  }
  onProgress({ phase: 'merge', done: vocabSize, total: vocabSize });
  const bytes = encodeTokenizer(learned);
  onFile(output, () => removeAbandoned(dirname(output)));
  writeWhole(output, bytes);
  return { path: output, vocabSize, merges: learned.merges.length, words: counter.counts.size, textBytes, digest: sha256(bytes) };
}

interface TokenizerJson {
  readonly model: { readonly type?: unknown; readonly vocab?: unknown };
  readonly normalizer?: unknown;
  readonly pre_tokenizer?: { readonly type?: unknown; readonly add_prefix_space?: unknown; readonly use_regex?: unknown } | null;
}

/** Whether words can be encoded one by one with the same result: our own files, and any GPT-2-like one. */
const isByWord = ({ normalizer = null, pre_tokenizer: before, model }: TokenizerJson): boolean =>
  normalizer === null && before?.type === 'ByteLevel' && before.add_prefix_space === false && before.use_regex !== false && model.type === 'BPE';

/** Throws TOKENIZER_INVALID, in one line, unless the library can load the file and its ids make sense. */
function parseTokenizer(path: string, bytes: Uint8Array): { json: TokenizerJson; library: LibraryTokenizer; vocabSize: number } {
  const invalid = (problem: string, cause?: unknown): NnError => new NnError('TOKENIZER_INVALID', `${path}: ${problem}`, { path }, cause);
  let json: TokenizerJson | null;
  try {
    json = JSON.parse(Buffer.from(bytes).toString('utf8')) as TokenizerJson | null;
  } catch (error) {
    throw invalid('is no JSON: it is empty, damaged or no tokenizer.json', error);
  }
  const vocab = typeof json === 'object' ? json?.model?.vocab : undefined;
  if (json === null || typeof vocab !== 'object' || vocab === null) throw invalid('has no model.vocab: it is no tokenizer.json');
  if (!MODEL_TYPES.includes(json.model.type)) throw invalid(`has a model of the unknown type ${quote(String(json.model.type))}`);
  if (!Array.isArray(vocab)) {
    const ids = new Set(Object.values(vocab) as unknown[]);
    const good = [...ids].every((id) => Number.isInteger(id) && (id as number) >= 0 && (id as number) < MAXIMUM_ID);
    if (!good || ids.size !== Object.keys(vocab).length) throw invalid('gives two entries one id, or an entry no proper id: it is damaged');
  }
  try {
    const library = new Library({ added_tokens: [], ...json }, { clean_up_tokenization_spaces: false }) as unknown as LibraryTokenizer;
    let vocabSize = 0;
    for (const id of library.get_vocab().values()) vocabSize = Math.max(vocabSize, id + 1);
    if (vocabSize === 0) throw new Error('its vocabulary is empty');
    return { json, library, vocabSize };
  } catch (error) {
    throw invalid(`cannot be loaded: ${(error as Error).message.split('\n')[0]!.slice(0, 200)}`, error);
  }
}

/** A loaded tokenizer.json. Encoding and decoding are synchronous and have no limits but memory. */
export class Tokenizer {
  readonly path: string;
  /** One more than the largest id. */
  readonly vocabSize: number;
  /** sha-256 of the file, as token files carry it. */
  readonly digest: string;
  /** <eos> (or what another project's file calls so); null: none. */
  readonly eosId: number | null;
  /** <bos>, likewise. */
  readonly bosId: number | null;
  readonly #library: LibraryTokenizer;
  readonly #byWord: boolean;
  /** Two generations of remembered words: when the younger is full it becomes the older, which is forgotten. */
  #younger = new Map<string, readonly number[]>();
  #older = new Map<string, readonly number[]>();

  private constructor(path: string, bytes: Uint8Array) {
    this.path = path;
    this.digest = sha256(bytes);
    const { json, library, vocabSize } = parseTokenizer(path, bytes);
    this.#library = library;
    this.vocabSize = vocabSize;
    this.#byWord = isByWord(json);
    const idOf = (...names: string[]): number | null => names.map((name) => library.token_to_id(name)).find((id) => id !== undefined) ?? null;
    this.eosId = idOf('<eos>', '</s>', '<|endoftext|>');
    this.bosId = idOf('<bos>', '<s>', '<|endoftext|>');
  }

  /** Loads a file. Throws FILE_NOT_FOUND, TOKENIZER_INVALID. */
  static load(path: string): Tokenizer {
    return new Tokenizer(path, onFile(path, () => readFileSync(path)));
  }

  /**
   * The ids of a text, without <bos> and <eos>. Text that spells a special token, such as "<eos>", is text here: what
   * somebody wrote cannot end a document (files of other projects: as their library has it).
   */
  encode(text: string): number[] {
    if (!this.#byWord) return text === '' ? [] : this.#library.encode(text, { add_special_tokens: false }).ids;
    const ids: number[] = [];
    for (const word of text.match(WORD_PATTERN) ?? []) for (const id of this.#encodeWord(word)) ids.push(id);
    return ids;
  }

  /** The text of ids; special tokens are left out unless `special`. Bytes that are no UTF-8 become U+FFFD. */
  decode(ids: ArrayLike<number>, { special = false }: { special?: boolean } = {}): string {
    if (ids.length === 0) return '';
    return this.#library.decode(Array.from(ids), { skip_special_tokens: !special, clean_up_tokenization_spaces: false });
  }

  #encodeWord(word: string): readonly number[] {
    const known = this.#younger.get(word) ?? this.#older.get(word);
    if (known !== undefined) return known;
    const { ids } = this.#library.encode(word, { add_special_tokens: false });
    if (word.length <= REMEMBERED_CHARACTERS) {
      if (this.#younger.size >= REMEMBERED_WORDS) {
        this.#older = this.#younger;
        this.#younger = new Map();
      }
      this.#younger.set(word, ids);
    }
    return ids;
  }
}
