/** Token files: what is appended is read back at any width; every damage is noticed before a token of it is used. */
import { readFileSync, readdirSync, truncateSync, writeFileSync } from 'node:fs';
import { crc32 } from 'node:zlib';
import { expect } from 'chai';
import * as fc from 'fast-check';
import { TokenFile, TokenFileWriter, requireVocabulary } from '../../data/token-file.ts';
import { expectError, temporaryDirectory } from './data-helpers.ts';

const DIGEST = 'ab'.repeat(32);

function write(path: string, tokens: ArrayLike<number>, vocabSize: number, tokenizerDigest: string | null = DIGEST): void {
  const writer = new TokenFileWriter(path, { vocabSize, tokenizerDigest });
  writer.append(tokens);
  writer.finish();
}

describe('data: token file', () => {
  const directory = temporaryDirectory();

  it('gives back any range of what was appended, for 2 and 4 byte tokens, across blocks', () => {
    for (const vocabSize of [65536, 65537]) {
      const path = directory.file(`t${vocabSize}`);
      const tokens = Int32Array.from({ length: 100_003 }, (_, index) => (index * 7919) % vocabSize);
      const writer = new TokenFileWriter(path, { vocabSize, tokenizerDigest: DIGEST });
      for (let at = 0; at < tokens.length; at += 777) writer.append(tokens.subarray(at, at + 777));
      const { count, bytes } = writer.finish();
      expect(count).to.equal(tokens.length);
      expect(readFileSync(path).length).to.equal(bytes);
      const file = TokenFile.open(path);
      expect([file.count, file.vocabSize, file.tokenizerDigest, file.padCount]).to.deep.equal([tokens.length, vocabSize, DIGEST, tokens.filter((token) => token === 0).length]);
      fc.assert(
        fc.property(fc.nat(tokens.length), fc.nat(70_000), (start, length) => {
          const into = new Int32Array(Math.min(length, tokens.length - start));
          file.read(start, into);
          expect(Buffer.from(into.buffer).equals(Buffer.from(tokens.slice(start, start + into.length).buffer))).to.equal(true);
        }),
      );
      file.verify();
      file.close();
    }
  });

  it('leaves the old file until the new one is complete, and no temporary file afterwards', () => {
    const path = directory.file('t');
    write(path, [1, 2, 3], 10);
    const before = readFileSync(path);
    const given = new TokenFileWriter(path, { vocabSize: 10, tokenizerDigest: null });
    given.append([4]);
    expect(readFileSync(path).equals(before)).to.equal(true);
    given.abort();
    expectError(() => {
      const writer = new TokenFileWriter(path, { vocabSize: 10, tokenizerDigest: null });
      writer.append([4, 10]);
    }, 'DATA_INVALID', 'token 1 would be 10, beyond the vocabulary of 10');
    expectError(() => new TokenFileWriter(path, { vocabSize: 10, tokenizerDigest: null }).finish(), 'DATA_INVALID', 'no token');
    expect(readFileSync(path).equals(before)).to.equal(true);
    expect(readdirSync(directory.path)).to.deep.equal(['t']);
    expectError(() => new TokenFileWriter(directory.file('no/t'), { vocabSize: 10, tokenizerDigest: null }), 'FILE_NOT_FOUND', 'no/t');
  });

  it('refuses an empty, foreign, truncated, lengthened or newer file and a damaged header, one line each', () => {
    const path = directory.file('t');
    write(path, Int32Array.from({ length: 50_000 }, (_, index) => index % 9), 9);
    const good = readFileSync(path);
    const altered = (change: (bytes: Buffer) => Buffer | void): Buffer => {
      const bytes = Buffer.from(good);
      return change(bytes) ?? bytes;
    };
    const refused: [Buffer, string][] = [
      [Buffer.alloc(0), 'the file is empty'],
      [Buffer.from('Call me Ishmael. '.repeat(20)), 'is no token file'],
      [Buffer.from('short'), 'is no token file'],
      [altered((bytes) => bytes.subarray(0, 40)), 'truncated'],
      [altered((bytes) => bytes.subarray(0, -1)), 'is truncated: 50000 tokens take'],
      [altered((bytes) => Buffer.concat([bytes, Buffer.alloc(3)])), '3 bytes too many'],
      [altered((bytes) => void bytes.writeUInt32LE(2, 8)), 'version 2'],
      [altered((bytes) => void bytes.writeUInt32LE(60_000, 16)), 'the header is damaged'],
      [altered((bytes) => void bytes.writeUInt8(bytes.at(-1)! ^ 1, bytes.length - 1)), 'checksums at its end are damaged'],
    ];
    for (const [bytes, text] of refused) {
      writeFileSync(path, bytes);
      expectError(() => TokenFile.open(path), 'TOKEN_FILE_INVALID', path, text);
    }
    expectError(() => TokenFile.open(directory.file('none')), 'FILE_NOT_FOUND', 'none');
    expectError(() => TokenFile.open(directory.path), 'FILE_NOT_FOUND', 'directory');
  });

  it('notices a flipped bit when its block is first read, and only then', () => {
    const path = directory.file('t');
    write(path, Int32Array.from({ length: 100_000 }, (_, index) => index % 9), 9);
    const bytes = readFileSync(path);
    const at = 80 + 2 * 90_000;
    bytes[at] = bytes[at]! ^ 1;
    writeFileSync(path, bytes);
    const file = TokenFile.open(path);
    file.read(0, new Int32Array(1000));
    expectError(() => file.read(95_000, new Int32Array(10)), 'TOKEN_FILE_INVALID', path, 'are damaged');
    expectError(() => file.verify(), 'TOKEN_FILE_INVALID', 'are damaged');
    file.close();
  });

  it('notices ids beyond the vocabulary under a right checksum, and a file cut while it is open', () => {
    const path = directory.file('t');
    write(path, [5, 6, 7, 8], 9);
    const forged = readFileSync(path);
    forged.writeUInt32LE(8, 32);
    forged.writeUInt32LE(crc32(forged.subarray(0, 76)), 76);
    writeFileSync(path, forged);
    const file = TokenFile.open(path);
    expectError(() => file.read(0, new Int32Array(1)), 'TOKEN_FILE_INVALID', 'token 3 is 8, beyond the vocabulary of 8');
    file.close();
    const other = directory.file('u');
    write(other, [5, 6, 7, 8], 9);
    const cut = TokenFile.open(other);
    truncateSync(other, 82);
    expectError(() => cut.read(0, new Int32Array(4)), 'TOKEN_FILE_INVALID', 'truncated while it was read');
    cut.close();
  });

  it('refuses a file, a tokenizer and a model that do not go together', () => {
    const file = { path: 'train.tokens', vocabSize: 600, tokenizerDigest: DIGEST };
    requireVocabulary({ vocabSize: 600 }, file, { path: 'tokenizer.json', vocabSize: 600, digest: DIGEST });
    expectError(() => requireVocabulary({ vocabSize: 512 }, file), 'DATA_INVALID', 'train.tokens', 'vocabulary is 600, but model.vocabSize is only 512');
    expectError(() => requireVocabulary({ vocabSize: 600 }, file, { path: 'tokenizer.json', vocabSize: 601, digest: DIGEST }), 'TOKENIZER_INVALID', 'tokenizer.json', '601');
    expectError(() => requireVocabulary({ vocabSize: 600 }, file, { path: 'tokenizer.json', vocabSize: 600, digest: 'cd'.repeat(32) }), 'TOKENIZER_INVALID', 'another tokenizer');
  });
});
