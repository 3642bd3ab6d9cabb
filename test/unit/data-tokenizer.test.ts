/** The tokenizer: merges as their definition has them, ids as the library has them, any text and any bytes there and back. */
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { Tokenizer as Library } from '@huggingface/tokenizers';
import { expect } from 'chai';
import * as fc from 'fast-check';
import { demoText } from '../../data/book.ts';
import { FIRST_BYTE, WordCounter, learnMerges } from '../../data/bpe-trainer.ts';
import { BYTE_CHARACTERS, WORD_PATTERN, lastSafeCut } from '../../data/byte-level.ts';
import { Tokenizer, trainTokenizer } from '../../data/tokenizer.ts';
import { expectError, expectRejection, temporaryDirectory } from './data-helpers.ts';

const finish = (...given: Parameters<typeof learnMerges>): { tokens: readonly string[]; merges: readonly (readonly [string, string])[] } => {
  const learning = learnMerges(...given);
  let turn = learning.next();
  while (turn.done !== true) turn = learning.next();
  return turn.value;
};

const byteLevel = (word: string): string => Array.from(new TextEncoder().encode(word), (byte) => BYTE_CHARACTERS[byte]!).join('');

/** Byte-pair merging by its definition: all pairs are counted anew each turn. Also how each word ends up. */
function mergesByDefinition(counts: ReadonlyMap<string, number>, vocabSize: number, minimumCount: number): { merges: [string, string][]; words: Map<string, string[]> } {
  const ids = new Map(['<pad>', '<unk>', '<bos>', '<eos>', ...BYTE_CHARACTERS].map((token, id) => [token, id]));
  const words = new Map(Array.from(counts.keys(), (word) => [word, Array.from(byteLevel(word))]));
  const merges: [string, string][] = [];
  while (ids.size < vocabSize) {
    const pairs = new Map<string, number>();
    for (const [word, symbols] of words) {
      for (let at = 0; at + 1 < symbols.length; at++) {
        const key = `${symbols[at]} ${symbols[at + 1]}`;
        pairs.set(key, (pairs.get(key) ?? 0) + counts.get(word)!);
      }
    }
    const best = [...pairs]
      .filter(([key, count]) => count >= minimumCount && !ids.has(key.replace(' ', '')))
      .map(([key, count]) => ({ pair: key.split(' ') as [string, string], count }))
      .sort((a, b) => b.count - a.count || ids.get(a.pair[0])! - ids.get(b.pair[0])! || ids.get(a.pair[1])! - ids.get(b.pair[1])!)[0];
    if (best === undefined) break;
    const [left, right] = best.pair;
    merges.push(best.pair);
    ids.set(left + right, ids.size);
    for (const symbols of words.values()) {
      for (let at = 0; at + 1 < symbols.length; at++) if (symbols[at] === left && symbols[at + 1] === right) symbols.splice(at, 2, left + right);
    }
  }
  return { merges, words };
}

describe('data: tokenizer', () => {
  const directory = temporaryDirectory();
  const book = demoText();

  it('learns the merges that the definition gives, and the library encodes words as they were merged', async () => {
    // Few letters, so that pairs overlap, repeat and tie.
    const corpus = fc.array(fc.stringMatching(/^[ab é]{1,12}$/), { minLength: 1, maxLength: 25 }).map((parts) => parts.join(' '));
    await fc.assert(
      fc.asyncProperty(corpus, fc.integer({ min: 261, max: 300 }), fc.integer({ min: 1, max: 3 }), async (text, vocabSize, minimumCount) => {
        const counter = new WordCounter(1000);
        counter.add(text);
        const learned = finish(counter.counts, { vocabSize, minimumCount });
        const wanted = mergesByDefinition(counter.counts, vocabSize, minimumCount);
        expect(learned.merges).to.deep.equal(wanted.merges);
        expect(learned.tokens).to.have.length(260 + wanted.merges.length);
        if (learned.merges.length === 0) return;

        writeFileSync(directory.file('text.txt'), text);
        await trainTokenizer({ inputs: [directory.file('text.txt')], output: directory.file('t.json'), vocabSize: learned.tokens.length, minimumCount });
        const tokenizer = Tokenizer.load(directory.file('t.json'));
        for (const [word, symbols] of wanted.words) expect(tokenizer.encode(word), word).to.deep.equal(symbols.map((symbol) => learned.tokens.indexOf(symbol)));
      }),
      { numRuns: 60 },
    );
  });

  it('makes exactly the vocabulary asked for, specials and bytes first, the same file each time', async () => {
    const train = (name: string, vocabSize: number): Promise<{ digest: string; vocabSize: number }> => trainTokenizer({ inputs: [book], output: directory.file(name), vocabSize });
    const one = await train('one.json', 4096);
    const two = await train('two.json', 4096);
    expect(one.digest).to.equal(two.digest);
    expect(readFileSync(directory.file('one.json')).equals(readFileSync(directory.file('two.json')))).to.equal(true);
    const json = JSON.parse(readFileSync(directory.file('one.json'), 'utf8')) as { model: { vocab: Record<string, number>; merges: string[] } };
    expect(Object.values(json.model.vocab).sort((a, b) => a - b)).to.deep.equal(Array.from({ length: 4096 }, (_, id) => id));
    expect(json.model.merges).to.have.length(4096 - 260);
    expect(json.model.vocab).to.include({ '<pad>': 0, '<unk>': 1, '<bos>': 2, '<eos>': 3 });
    BYTE_CHARACTERS.forEach((character, byte) => expect(json.model.vocab[character]).to.equal(FIRST_BYTE + byte));
    const tokenizer = Tokenizer.load(directory.file('one.json'));
    expect([tokenizer.vocabSize, tokenizer.digest, tokenizer.eosId, tokenizer.bosId]).to.deep.equal([4096, one.digest, 3, 2]);
    expect(readdirSync(directory.path).sort()).to.deep.equal(['one.json', 'two.json']);

    // The whole book there and back, and as the library alone encodes it.
    const text = readFileSync(book, 'utf8');
    const ids = tokenizer.encode(text);
    expect(tokenizer.decode(ids)).to.equal(text);
    expect(text.length / ids.length).to.be.above(3);
    expect(Math.min(...new Set(ids))).to.be.at.least(FIRST_BYTE);
    const library = new Library(json, { clean_up_tokenization_spaces: false });
    const chapter = text.slice(0, 60_000);
    expect(tokenizer.encode(chapter)).to.deep.equal(library.encode(chapter, { add_special_tokens: false }).ids);
    expect(library.encode('Call', { add_special_tokens: true }).ids[0]).to.equal(2);
  });

  describe('with a small vocabulary', () => {
    const suite = temporaryDirectory('suite');
    let tokenizer: Tokenizer;
    let library: { encode(text: string, options: object): { ids: number[] } };
    before(async () => {
      await trainTokenizer({ inputs: [book], output: suite.file('t.json'), vocabSize: 700 });
      tokenizer = Tokenizer.load(suite.file('t.json'));
      library = new Library(JSON.parse(readFileSync(suite.file('t.json'), 'utf8')) as object, { clean_up_tokenization_spaces: false });
    });
    const words = fc.constantFrom(' the', ' whale', "'s", ' ', '\n', '\r\n', '  ', 'é', '日本', '🐋', '12', ' ,', '—', '\u00a0', 'I', ' .', 'don', "'t");

    it('gives back any text, and agrees with the library', () => {
      const text = fc.oneof(fc.string({ unit: 'binary' }), fc.array(words).map((parts) => parts.join('')));
      fc.assert(
        fc.property(text, (each) => {
          const ids = tokenizer.encode(each);
          expect(tokenizer.decode(ids)).to.equal(each);
          expect(ids).to.deep.equal(library.encode(each, { add_special_tokens: false }).ids);
        }),
        { numRuns: 300 },
      );
    });

    it('has an id for every byte, so that bytes which are no text have ids too', () => {
      fc.assert(
        fc.property(fc.uint8Array({ maxLength: 40 }), (bytes) => {
          const decoded = tokenizer.decode(Array.from(bytes, (byte) => FIRST_BYTE + byte));
          expect(decoded).to.equal(new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes));
        }),
      );
    });

    it('cuts text only where the ids stay the same', () => {
      fc.assert(
        fc.property(fc.array(fc.oneof(words, fc.string({ unit: 'binary', maxLength: 3 })), { maxLength: 30 }).map((parts) => parts.join('')), (text) => {
          const cut = lastSafeCut(text);
          expect([...tokenizer.encode(text.slice(0, cut)), ...tokenizer.encode(text.slice(cut))]).to.deep.equal(tokenizer.encode(text));
        }),
        { numRuns: 500 },
      );
    });

    it('takes text that spells a special token for text, and leaves special tokens out of what it decodes', () => {
      const ids = tokenizer.encode('a<eos><pad>b');
      expect(ids.every((id) => id >= FIRST_BYTE)).to.equal(true);
      expect(tokenizer.decode(ids)).to.equal('a<eos><pad>b');
      expect(tokenizer.decode([2, ...tokenizer.encode('hello , world'), 3, 0])).to.equal('hello , world');
      expect(tokenizer.decode([2, 3], { special: true })).to.equal('<bos><eos>');
      expect([tokenizer.decode([]), tokenizer.encode('')]).to.deep.equal(['', []]);
      expect(tokenizer.decode([69_999])).to.equal('');
    });
  });

  it('counts words in bounded memory, the frequent ones kept', () => {
    const counter = new WordCounter(100);
    for (let index = 0; index < 5000; index++) counter.add(` common x${'abcdefghij'[index % 10]}${String.fromCharCode(0x4e00 + index)} `);
    expect(counter.counts.size).to.be.at.most(103);
    expect(counter.counts.get(' common')).to.equal(5000);
    counter.add('z'.repeat(257));
    expect([...counter.counts.keys()].every((word) => word.length <= 256)).to.equal(true);
    expect('one two'.match(WORD_PATTERN)).to.deep.equal(['one', ' two']);
  });

  it('says how many entries a text could make when it is too small', async () => {
    writeFileSync(directory.file('small.txt'), 'abab abab');
    const train = (vocabSize: number): Promise<unknown> => trainTokenizer({ inputs: [directory.file('small.txt')], output: directory.file('t.json'), vocabSize });
    await expectRejection(train(512), 'DATA_INVALID', 'small.txt', 'too small for a vocabulary of 512', 'could make 262 entries');
    await expectRejection(train(259), 'USAGE', '260');
    await train(262);
    writeFileSync(directory.file('empty.txt'), '');
    await expectRejection(trainTokenizer({ inputs: [directory.file('empty.txt')], output: directory.file('t'), vocabSize: 300 }), 'DATA_INVALID', 'no text');
    await expectRejection(trainTokenizer({ inputs: [directory.file('small.txt')], output: directory.file('no/t'), vocabSize: 260 }), 'FILE_NOT_FOUND', 'no/t');
    await expectRejection(trainTokenizer({ inputs: [directory.file('gone')], output: directory.file('t'), vocabSize: 300 }), 'FILE_NOT_FOUND', 'gone');
  });

  it('refuses a damaged or foreign tokenizer file in one line', () => {
    const path = directory.file('bad.json');
    const model = { type: 'BPE', vocab: { a: 0, b: 1 }, merges: [] };
    const full = { added_tokens: [], normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null };
    for (const [contents, text] of [
      ['', 'is no JSON'],
      ['{"model": ', 'is no JSON'],
      ['[]', 'no tokenizer.json'],
      ['null', 'no tokenizer.json'],
      [JSON.stringify({ model: {} }), 'no tokenizer.json'],
      [JSON.stringify({ ...full, model: { ...model, vocab: { a: 0, b: 0 } } }), 'gives two entries one id'],
      [JSON.stringify({ ...full, model: { ...model, vocab: { a: 4e9 } } }), 'no proper id'],
      [JSON.stringify({ ...full, model: { ...model, vocab: { a: 'x' } } }), 'no proper id'],
      [JSON.stringify({ ...full, model: { ...model, vocab: {} } }), 'empty'],
      [JSON.stringify({ ...full, model: { ...model, type: 'Magic' } }), 'unknown type "Magic"'],
      [JSON.stringify({ ...full, pre_tokenizer: { type: 'Nope' }, model }), 'cannot be loaded'],
    ] as const) {
      writeFileSync(path, contents);
      expectError(() => Tokenizer.load(path), 'TOKENIZER_INVALID', path, text);
    }
    expectError(() => Tokenizer.load(directory.file('none.json')), 'FILE_NOT_FOUND', 'none.json');
  });
});
