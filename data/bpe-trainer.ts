/**
 * Learns byte-pair merges from word counts (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, on bytes). Pure: no
 * files, no clock; the same counts give the same merges. Called by tokenizer.ts.
 *
 * Each turn merges the most frequent pair of neighbours everywhere; ties go to the lower left id, then the lower right
 * id. Pair counts are kept up to date instead of counted anew: a merge visits only the words that hold its pair.
 *
 *   ids      0..3 special tokens | 4..259 the bytes | 260.. one for each merge
 *   symbols  all words side by side; a word's symbols are compacted in place as they merge
 *   heap     (count, pair), largest first; an entry whose count is no longer the pair's is stale and put right when popped
 */
import assert from 'node:assert/strict';
import { BYTE_CHARACTERS, WORD_PATTERN } from './byte-level.ts';
import { SPECIAL_TOKENS } from './special-tokens.ts';

/** Id of byte 0; byte b is FIRST_BYTE + b. */
export const FIRST_BYTE = SPECIAL_TOKENS.length;

/** Entries that every vocabulary has: the special tokens and the bytes. */
export const SMALLEST_VOCABULARY = FIRST_BYTE + 256;

/** A longer word is not counted: a long run of one character is nothing to learn from. */
const WORD_CHARACTERS = 256;

/** Merges between two chances for other work on the same thread. */
const MERGES_A_SLICE = 64;

/**
 * Counts words in bounded memory: above `maximumWords` distinct ones the rarest are forgotten, until half are left.
 */
export class WordCounter {
  readonly counts = new Map<string, number>();
  readonly #maximumWords: number;

  constructor(maximumWords: number) {
    this.#maximumWords = maximumWords;
  }

  /** Counts the words of a piece of text that ends where a word ends. */
  add(text: string): void {
    for (const word of text.match(WORD_PATTERN) ?? []) {
      if (word.length <= WORD_CHARACTERS) this.counts.set(word, (this.counts.get(word) ?? 0) + 1);
    }
    if (this.counts.size <= this.#maximumWords) return;
    for (let rare = 1; this.counts.size > this.#maximumWords / 2; rare++) {
      for (const [word, count] of this.counts) if (count <= rare) this.counts.delete(word);
    }
  }
}

/** A binary heap of (count, pair): largest count first, then the lower left and right ids. */
class PairHeap {
  readonly #counts: number[] = [];
  readonly #pairs: number[] = [];
  readonly #left: readonly number[];
  readonly #right: readonly number[];

  constructor(left: readonly number[], right: readonly number[]) {
    this.#left = left;
    this.#right = right;
  }

  push(count: number, pair: number): void {
    let at = this.#counts.length;
    this.#counts.push(count);
    this.#pairs.push(pair);
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!this.#before(at, parent)) break;
      this.#swap(at, parent);
      at = parent;
    }
  }

  pop(): { count: number; pair: number } | undefined {
    const count = this.#counts[0];
    if (count === undefined) return undefined;
    const pair = this.#pairs[0]!;
    const last = this.#counts.length - 1;
    this.#swap(0, last);
    this.#counts.pop();
    this.#pairs.pop();
    for (let at = 0; ; ) {
      let first = at;
      for (const child of [2 * at + 1, 2 * at + 2]) if (child < last && this.#before(child, first)) first = child;
      if (first === at) return { count, pair };
      this.#swap(at, first);
      at = first;
    }
  }

  #before(a: number, b: number): boolean {
    const difference = this.#counts[a]! - this.#counts[b]!;
    if (difference !== 0) return difference > 0;
    const [pairA, pairB] = [this.#pairs[a]!, this.#pairs[b]!];
    const left = this.#left[pairA]! - this.#left[pairB]!;
    return left === 0 ? this.#right[pairA]! < this.#right[pairB]! : left < 0;
  }

  #swap(a: number, b: number): void {
    const [count, pair] = [this.#counts[a]!, this.#pairs[a]!];
    this.#counts[a] = this.#counts[b]!;
    this.#pairs[a] = this.#pairs[b]!;
    this.#counts[b] = count;
    this.#pairs[b] = pair;
  }
}

/** Every pair of neighbours seen so far: its count over the corpus, and the words that may hold it. */
class PairTable {
  readonly left: number[] = [];
  readonly right: number[] = [];
  readonly counts: number[] = [];
  readonly words: number[][] = [];
  readonly #index = new Map<number, number>();

  /** Index of a pair, new ones with count 0. Ids are below 2^26, so that a key is exact in a double. */
  of(left: number, right: number): number {
    const key = left * 2 ** 26 + right;
    const known = this.#index.get(key);
    if (known !== undefined) return known;
    const pair = this.counts.length;
    this.#index.set(key, pair);
    this.left.push(left);
    this.right.push(right);
    this.counts.push(0);
    this.words.push([]);
    return pair;
  }

  add(left: number, right: number, count: number, word: number): number {
    const pair = this.of(left, right);
    this.counts[pair]! += count;
    const words = this.words[pair]!;
    if (words.at(-1) !== word) words.push(word);
    return pair;
  }

  remove(left: number, right: number, count: number): void {
    this.counts[this.of(left, right)]! -= count;
  }
}

/** All words as rows of symbols in one buffer. */
interface Words {
  readonly symbols: Int32Array;
  readonly starts: Int32Array;
  readonly lengths: Int32Array;
  readonly counts: Float64Array;
}

function layOut(counts: ReadonlyMap<string, number>): Words {
  const encoder = new TextEncoder();
  const rows = Array.from(counts.keys(), (word) => encoder.encode(word));
  const words: Words = {
    symbols: new Int32Array(rows.reduce((sum, row) => sum + row.length, 0)),
    starts: new Int32Array(rows.length),
    lengths: new Int32Array(rows.length),
    counts: Float64Array.from(counts.values()),
  };
  let at = 0;
  rows.forEach((row, word) => {
    words.starts[word] = at;
    words.lengths[word] = row.length;
    for (const byte of row) words.symbols[at++] = FIRST_BYTE + byte;
  });
  return words;
}

/** Replaces (left, right) by `merged` in one word, from left to right; adds the pairs that come to be to `grown`. */
function mergeInWord(words: Words, pairs: PairTable, word: number, left: number, right: number, merged: number, grown: Set<number>): void {
  const { symbols } = words;
  const start = words.starts[word]!;
  const end = start + words.lengths[word]!;
  const count = words.counts[word]!;
  let to = start;
  for (let from = start; from < end; ) {
    if (symbols[from] !== left || from + 1 >= end || symbols[from + 1] !== right) {
      symbols[to++] = symbols[from++]!;
      continue;
    }
    if (to > start) {
      const before = symbols[to - 1]!;
      pairs.remove(before, left, count);
      grown.add(pairs.add(before, merged, count, word));
    }
    if (from + 2 < end) {
      const after = symbols[from + 2]!;
      pairs.remove(right, after, count);
      grown.add(pairs.add(merged, after, count, word));
    }
    symbols[to++] = merged;
    from += 2;
  }
  words.lengths[word] = to - start;
}

/** What training gives: `tokens` by id, and the merges in order, as pairs of tokens. */
export interface LearnedMerges {
  readonly tokens: readonly string[];
  readonly merges: readonly (readonly [string, string])[];
}

/**
 * Learns merges until the vocabulary has `vocabSize` entries or no pair occurs `minimumCount` times. Yields the entries so
 * far every few merges, so that the caller can show progress and let other work run; returns what was learned, which
 * may be fewer entries than asked for.
 */
export function* learnMerges(
  counts: ReadonlyMap<string, number>,
  { vocabSize, minimumCount }: { vocabSize: number; minimumCount: number },
): Generator<number, LearnedMerges> {
  assert(vocabSize >= SMALLEST_VOCABULARY && vocabSize < 2 ** 26, `vocabulary of ${vocabSize}`);
  const tokens: string[] = [...SPECIAL_TOKENS, ...BYTE_CHARACTERS];
  const known = new Set(tokens);
  const merges: [string, string][] = [];
  const words = layOut(counts);
  const pairs = new PairTable();
  for (let word = 0; word < words.starts.length; word++) {
    const start = words.starts[word]!;
    for (let at = start; at + 1 < start + words.lengths[word]!; at++) pairs.add(words.symbols[at]!, words.symbols[at + 1]!, words.counts[word]!, word);
  }
  const heap = new PairHeap(pairs.left, pairs.right);
  pairs.counts.forEach((count, pair) => heap.push(count, pair));

  while (tokens.length < vocabSize) {
    const top = heap.pop();
    if (top === undefined) break;
    const current = pairs.counts[top.pair]!;
    if (top.count !== current) {
      // A pair only grows while one of its members is made, before it is pushed; since then it can only have shrunk.
      if (current >= minimumCount) heap.push(current, top.pair);
      continue;
    }
    if (current < minimumCount) break;
    const [left, right] = [pairs.left[top.pair]!, pairs.right[top.pair]!];
    const token = tokens[left]! + tokens[right]!;
    // Another pair spells the same: a second way to one string would give it two ranks, so it is not learned.
    if (known.has(token)) continue;
    const merged = tokens.push(token) - 1;
    known.add(token);
    merges.push([tokens[left]!, tokens[right]!]);
    const grown = new Set<number>();
    for (const word of pairs.words[top.pair]!) mergeInWord(words, pairs, word, left, right, merged, grown);
    pairs.words[top.pair] = [];
    pairs.counts[top.pair] = 0;
    for (const pair of grown) if (pairs.counts[pair]! > 0) heap.push(pairs.counts[pair]!, pair);
    if (merges.length % MERGES_A_SLICE === 0) yield tokens.length;
  }
  return { tokens, merges };
}
