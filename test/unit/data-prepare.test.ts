/** Preparing data: any reads give the same tokens, documents are marked, the held-out part is the end of the text. */
import { spawnSync } from 'node:child_process';
import { closeSync, ftruncateSync, mkdirSync, openSync, readFileSync, readdirSync, writeFileSync, writeSync } from 'node:fs';
import { expect } from 'chai';
import * as fc from 'fast-check';
import { demoText } from '../../data/book.ts';
import { prepareData, splitRanges } from '../../data/prepare.ts';
import { MAXIMUM_LINE_BYTES, MAXIMUM_WORD_CHARACTERS, listTexts, readPieces } from '../../data/text-input.ts';
import { TokenFile } from '../../data/token-file.ts';
import { Tokenizer, trainTokenizer } from '../../data/tokenizer.ts';
import { expectError, expectRejection, temporaryDirectory } from './data-helpers.ts';

const readTokens = (path: string): number[] => {
  const file = TokenFile.open(path);
  const tokens = new Int32Array(file.count);
  file.read(0, tokens);
  file.close();
  return [...tokens];
};

const someLines = fc.array(fc.constantFrom('a\n', 'bbb\n', '\n', 'cc'), { maxLength: 6 }).map((lines) => lines.join(''));
const noParts = { added_tokens: [], normalizer: null, pre_tokenizer: null, post_processor: null, decoder: null };

describe('data: prepare', () => {
  const suite = temporaryDirectory('suite');
  const directory = temporaryDirectory();
  const book = demoText();
  let tokenizer: Tokenizer;
  before(async () => {
    await trainTokenizer({ inputs: [book], output: suite.file('tokenizer.json'), vocabSize: 512 });
    tokenizer = Tokenizer.load(suite.file('tokenizer.json'));
  });

  const pieces = async (path: string, readAtOnce?: number): Promise<{ text: string; begins: boolean; ends: boolean; bytesDone: number }[]> => {
    const found = [];
    for await (const piece of readPieces(listTexts([path])[0]!, readAtOnce)) found.push(piece);
    return found;
  };

  it('gives the ids of the whole text however it is read, also across characters and lines', async () => {
    const text = fc.array(fc.oneof(fc.string({ unit: 'binary', maxLength: 5 }), fc.constantFrom(' ', '\n', ' whale', '日本', '🐋')), { maxLength: 40 }).map((parts) => parts.join(''));
    await fc.assert(
      fc.asyncProperty(text, fc.integer({ min: 1, max: 9 }), async (each, readAtOnce) => {
        const plain = each.replace(/^\ufeff+/, '');
        if (plain === '') return;
        const path = directory.file('x.txt');
        writeFileSync(path, plain);
        const found = await pieces(path, readAtOnce);
        expect(found.map((piece) => piece.text).join('')).to.equal(plain);
        expect(found.flatMap((piece) => tokenizer.encode(piece.text))).to.deep.equal(tokenizer.encode(plain));
        expect(found.map(({ begins, ends }) => [begins, ends])).to.deep.equal(found.map((_, index) => [index === 0, index === found.length - 1]));
        expect(found.at(-1)!.bytesDone).to.equal(Buffer.byteLength(plain));

        const lines = directory.file('x.jsonl');
        writeFileSync(lines, `${JSON.stringify({ text: plain, id: 1 })}\n\n  \r\n${JSON.stringify({ text: 'z' })}`);
        expect((await pieces(lines, readAtOnce)).map((piece) => piece.text)).to.deep.equal([plain, 'z']);
      }),
      { numRuns: 40 },
    );
  });

  it('writes documents as <bos> text <eos>, in the order of the inputs, with their tokenizer’s digest', async () => {
    mkdirSync(directory.file('corpus/b'), { recursive: true });
    writeFileSync(directory.file('corpus/c.txt'), 'third');
    writeFileSync(directory.file('corpus/b/a.txt'), '\ufeffsecond');
    writeFileSync(directory.file('corpus/b/skipped.md'), 'not text');
    writeFileSync(directory.file('corpus/empty.txt'), '');
    writeFileSync(directory.file('first.jsonl'), '{"text":"one <eos>"}\n{"text":""}\n{"text":"two"}\n');
    const progress: number[] = [];
    const result = await prepareData({
      inputs: [directory.file('first.jsonl'), directory.file('corpus')],
      tokenizer: tokenizer.path,
      output: directory.file('out.tokens'),
      onProgress: ({ bytesDone, bytesTotal }) => progress.push(bytesDone / bytesTotal),
    });
    const wanted = ['one <eos>', 'two', 'second', 'third'].flatMap((text) => [2, ...tokenizer.encode(text), 3]);
    expect(readTokens(directory.file('out.tokens'))).to.deep.equal(wanted);
    expect(result.train).to.include({ documents: 4, tokens: wanted.length, textBytes: 62 });
    expect(result.validation).to.equal(null);
    const file = TokenFile.open(directory.file('out.tokens'));
    expect([file.vocabSize, file.tokenizerDigest, file.padCount]).to.deep.equal([512, tokenizer.digest, 0]);
    file.close();
    expect(progress.at(-1)).to.equal(1);
    expect(progress).to.deep.equal([...progress].sort((a, b) => a - b));
  });

  it('holds out the last part of the book, cut at a line, nothing lost and nothing twice', async () => {
    const result = await prepareData({
      inputs: [book],
      tokenizer: tokenizer.path,
      output: directory.file('train.tokens'),
      validation: { output: directory.file('validation.tokens'), fraction: 0.1 },
    });
    const text = readFileSync(book, 'utf8');
    const train = tokenizer.decode(readTokens(directory.file('train.tokens')));
    const validation = tokenizer.decode(readTokens(directory.file('validation.tokens')));
    expect(train + validation).to.equal(text);
    expect(train.endsWith('\n')).to.equal(true);
    expect(Buffer.byteLength(validation) / Buffer.byteLength(text)).to.be.closeTo(0.1, 0.001);
    expect(result.train.textBytes + result.validation!.textBytes).to.equal(Buffer.byteLength(text));
  });

  it('cuts between lines for any fraction and any files', () => {
    fc.assert(
      fc.property(fc.array(someLines, { minLength: 1, maxLength: 5 }), fc.double({ min: 0.01, max: 0.99, noNaN: true }), (texts, fraction) => {
        if (texts.join('') === '') return;
        const paths = texts.map((text, index) => {
          writeFileSync(directory.file(`${index}.txt`), text);
          return directory.file(`${index}.txt`);
        });
        const { train, validation } = splitRanges(listTexts(paths), fraction);
        const textOf = (ranges: typeof train): string => ranges.map(({ path, start, end }) => readFileSync(path, 'utf8').slice(start, end)).join('');
        expect(textOf(train) + textOf(validation)).to.equal(texts.join(''));
        for (const { path, end } of train) expect(end === readFileSync(path).length || readFileSync(path)[end - 1] === 10).to.equal(true);
        // The training part reaches the cut, and ends with the first line that does.
        const cut = Math.floor(texts.join('').length * (1 - fraction));
        expect(textOf(train).length).to.be.at.least(cut);
        expect(textOf(train).length).to.be.at.most(cut + 'bbbccccccccccbbb\n'.length);
      }),
    );
  });

  it('bounds what it keeps of a word without end', async () => {
    const path = directory.file('long.txt');
    const text = `${'x'.repeat(MAXIMUM_WORD_CHARACTERS)}${'🐋'.repeat(600_000)}`;
    writeFileSync(path, text);
    const found = await pieces(path);
    expect(found.length).to.be.above(1);
    expect(found.every((piece) => piece.text.length <= MAXIMUM_WORD_CHARACTERS + (2 << 20) && !/\p{Surrogate}/u.test(piece.text))).to.equal(true);
    expect(found.map((piece) => piece.text).join('') === text).to.equal(true);
  });

  it('refuses what is no text, naming file and place, and leaves no file', async () => {
    const prepare = (...inputs: string[]): Promise<unknown> => prepareData({ inputs: inputs.map((each) => directory.file(each)), tokenizer: tokenizer.path, output: directory.file('out') });
    const refuse = async (name: string, contents: string | Uint8Array, ...texts: string[]): Promise<void> => {
      writeFileSync(directory.file(name), contents);
      await expectRejection(prepare(name), 'DATA_INVALID', name, ...texts);
    };
    await refuse('latin1.txt', Buffer.concat([Buffer.from('caf'), Buffer.from([0xe9]), Buffer.from(' noir')]), 'is not UTF-8');
    await refuse('cut.txt', Buffer.from('caf\u00e9').subarray(0, 4), 'is not UTF-8');
    await refuse('latin1.jsonl', Buffer.from([0x22, 0xe9, 0x22]), 'is not UTF-8');
    await refuse('bad.jsonl', '{"text":"a"}\n\n{"text":', 'line 3 is no JSON');
    await refuse('field.jsonl', '{"text":"a"}\n{"body":"a"}\n', 'line 2 has no field "text"');
    await refuse('number.jsonl', '7\n', 'line 1 has no field "text"');
    await refuse('empty.txt', '', 'no text');
    await refuse('blank.jsonl', '\n\n', 'there is no text');
    mkdirSync(directory.file('none'));
    await expectRejection(prepare('none'), 'DATA_INVALID', 'none', 'no .txt or .jsonl');
    await expectRejection(prepare('gone'), 'FILE_NOT_FOUND', 'gone');
    const sparse = openSync(directory.file('line.jsonl'), 'w');
    ftruncateSync(sparse, MAXIMUM_LINE_BYTES + (2 << 20));
    writeSync(sparse, '{');
    closeSync(sparse);
    await expectRejection(prepare('line.jsonl'), 'DATA_INVALID', 'line.jsonl', 'line 1 is longer than');
    writeFileSync(directory.file('line.txt'), 'only one line');
    const split = (fraction: number): Promise<unknown> =>
      prepareData({ inputs: [directory.file('line.txt')], tokenizer: tokenizer.path, output: directory.file('out'), validation: { output: directory.file('out2'), fraction } });
    await expectRejection(split(0.5), 'DATA_INVALID', 'leaves nothing for validation');
    await expectRejection(split(1), 'USAGE', 'between 0 and 1');
    writeFileSync(directory.file('foreign.json'), JSON.stringify({ ...noParts, model: { type: 'BPE', vocab: { a: 0 }, merges: [] } }));
    await expectRejection(prepareData({ inputs: [book], tokenizer: directory.file('foreign.json'), output: directory.file('out') }), 'TOKENIZER_INVALID', 'no <bos> and <eos>');
    expectError(() => listTexts([directory.file('gone')]), 'FILE_NOT_FOUND', 'gone');
    expect(readdirSync(directory.path).filter((name) => name.startsWith('out') || name.startsWith('.'))).to.deep.equal([]);
  });

  it('leaves the old token file when it is killed', () => {
    const output = directory.file('t.tokens');
    const input = suite.file('part.txt');
    writeFileSync(input, readFileSync(book).subarray(0, 50_000));
    const script = (kill: boolean): string => `
      import { prepareData } from ${JSON.stringify(new URL('../../data/prepare.js', import.meta.url).href)};
      await prepareData({ inputs: [${JSON.stringify(input)}], tokenizer: ${JSON.stringify(tokenizer.path)}, output: ${JSON.stringify(output)},
        onProgress: ({ bytesDone, bytesTotal }) => { if (${kill} && bytesDone > bytesTotal / 2) process.kill(process.pid, 'SIGKILL'); } });`;
    const run = (kill: boolean): string | null => spawnSync(process.execPath, ['--input-type=module', '--eval', script(kill)]).signal;
    expect(run(true)).to.equal('SIGKILL');
    expectError(() => TokenFile.open(output), 'FILE_NOT_FOUND', 't.tokens');
    expect(run(false)).to.equal(null);
    expect(readdirSync(directory.path), 'the next run removes what the killed one left').to.deep.equal(['t.tokens']);
    const before = readFileSync(output);
    expect(run(true)).to.equal('SIGKILL');
    expect(readFileSync(output).equals(before)).to.equal(true);
  });
});
