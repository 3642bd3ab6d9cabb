/**
 * Owns the token file: what `data prepare` writes and training reads. Knows neither text nor batches. Called by
 * prepare.ts (writer) and through the sampler by workers (reader).
 *
 * Node has no mmap, and an addon for it would be a second native library only to save a copy of a few kilobytes. A
 * positional read of just the wanted range goes through the same page cache, keeps nothing else in this process's memory,
 * and a truncated file is an error here where a mapping would end the process with SIGBUS.
 *
 *   byte   what (little-endian)
 *   0      8 bytes  magic "NNTOKENS"
 *   8      u32      version, 1
 *   12     u32      bytes of a token, 2 or 4
 *   16     u64      count of tokens
 *   24     u64      how many of them are <pad> (id 0), which are never targets
 *   32     u32      vocabulary size: every id is below it
 *   36     u32      bytes of a block
 *   40     32 bytes sha-256 of the tokenizer.json that made it; zeros: unknown
 *   72     u32      crc32 of the trailer
 *   76     u32      crc32 of bytes 0..76
 *   80     tokens, uint16 or uint32
 *   ...    trailer: u32 crc32 of each block of tokens; the last block may be short
 */
import assert from 'node:assert/strict';
import { closeSync, fstatSync, fsyncSync, openSync, rmSync } from 'node:fs';
import { endianness } from 'node:os';
import { dirname } from 'node:path';
import { crc32 } from 'node:zlib';
import { NnError } from '../config/errors.ts';
import { bytesOf, fileError, forgetTemporary, onFile, publish, readAt, removeAbandoned, temporaryName, writeAll } from './files.ts';
import { SPECIAL_IDS } from './special-tokens.ts';

const MAGIC = 'NNTOKENS';
const VERSION = 1;
const HEADER_BYTES = 80;

/** A block is checked as a whole when any of it is first read, so it is small: 64 KiB cost about 30 us. */
const BLOCK_BYTES = 64 << 10;

assert.equal(endianness(), 'LE', 'tokens are little-endian on disk and are read in place');

const invalid = (path: string, problem: string): NnError => new NnError('TOKEN_FILE_INVALID', `${path}: ${problem}`, { path });

interface Header {
  readonly width: 2 | 4;
  readonly count: number;
  readonly padCount: number;
  readonly vocabSize: number;
  readonly blockBytes: number;
  readonly tokenizerDigest: string;
  readonly trailerChecksum: number;
}

function encodeHeader(header: Header): Uint8Array {
  const bytes = new Uint8Array(HEADER_BYTES);
  const view = new DataView(bytes.buffer);
  bytes.set(Buffer.from(MAGIC, 'latin1'), 0);
  view.setUint32(8, VERSION, true);
  view.setUint32(12, header.width, true);
  view.setBigUint64(16, BigInt(header.count), true);
  view.setBigUint64(24, BigInt(header.padCount), true);
  view.setUint32(32, header.vocabSize, true);
  view.setUint32(36, header.blockBytes, true);
  bytes.set(Buffer.from(header.tokenizerDigest, 'hex'), 40);
  view.setUint32(72, header.trailerChecksum, true);
  view.setUint32(76, crc32(bytes.subarray(0, 76)), true);
  return bytes;
}

/** Throws TOKEN_FILE_INVALID unless the header is whole and the file is exactly as long as it says. */
function decodeHeader(path: string, bytes: Uint8Array, fileBytes: number): Header {
  if (fileBytes === 0) throw invalid(path, 'the file is empty');
  const magic = Buffer.from(bytes.subarray(0, 8)).toString('latin1');
  if (fileBytes < HEADER_BYTES || magic !== MAGIC) {
    throw invalid(path, MAGIC.startsWith(magic.slice(0, 8)) && fileBytes < HEADER_BYTES ? 'the file is truncated' : 'is no token file; make one with `cuda-nn data prepare`');
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, HEADER_BYTES);
  const version = view.getUint32(8, true);
  if (version !== VERSION) throw invalid(path, `has version ${version} of the token file format, but this program reads version ${VERSION}; prepare the data again`);
  if (crc32(bytes.subarray(0, 76)) !== view.getUint32(76, true)) throw invalid(path, 'the header is damaged (its checksum differs); prepare the data again');
  const header: Header = {
    width: view.getUint32(12, true) as 2 | 4,
    count: Number(view.getBigUint64(16, true)),
    padCount: Number(view.getBigUint64(24, true)),
    vocabSize: view.getUint32(32, true),
    blockBytes: view.getUint32(36, true),
    tokenizerDigest: Buffer.from(bytes.subarray(40, 72)).toString('hex'),
    trailerChecksum: view.getUint32(72, true),
  };
  const { width, count, vocabSize, blockBytes } = header;
  if (width !== 2 && width !== 4) throw invalid(path, `has tokens of ${String(width)} bytes, but 2 or 4 are known`);
  if (blockBytes < 4 || blockBytes % 4 !== 0 || blockBytes > 1 << 30) throw invalid(path, `has blocks of ${blockBytes} bytes`);
  if (count === 0 || vocabSize === 0) throw invalid(path, 'holds no tokens');
  const expected = HEADER_BYTES + count * width + 4 * Math.ceil((count * width) / blockBytes);
  if (fileBytes < expected) throw invalid(path, `is truncated: ${count} tokens take ${expected} bytes, but the file has ${fileBytes}`);
  if (fileBytes > expected) throw invalid(path, `has ${fileBytes - expected} bytes too many behind its ${count} tokens`);
  return header;
}

/** A token file open for reading; synchronous. Each block is checked once, when it is first touched. */
export class TokenFile {
  readonly path: string;
  readonly count: number;
  /** Tokens that are <pad>. */
  readonly padCount: number;
  readonly vocabSize: number;
  /** sha-256 of the tokenizer.json in hex, or 64 zeros when it is unknown. */
  readonly tokenizerDigest: string;
  readonly #descriptor: number;
  readonly #width: 2 | 4;
  readonly #blockBytes: number;
  readonly #checksums: Uint32Array;
  readonly #checked: Uint8Array;
  readonly #block: Uint8Array;

  private constructor(path: string, descriptor: number) {
    this.path = path;
    this.#descriptor = descriptor;
    const fileBytes = fstatSync(descriptor).size;
    const headerBytes = new Uint8Array(HEADER_BYTES);
    readAt(descriptor, headerBytes, 0);
    const header = decodeHeader(path, headerBytes, fileBytes);
    this.count = header.count;
    this.padCount = header.padCount;
    this.vocabSize = header.vocabSize;
    this.tokenizerDigest = header.tokenizerDigest;
    this.#width = header.width;
    this.#blockBytes = header.blockBytes;
    const tokenBytes = header.count * header.width;
    this.#checksums = new Uint32Array(Math.ceil(tokenBytes / header.blockBytes));
    const trailer = bytesOf(this.#checksums);
    if (readAt(descriptor, trailer, HEADER_BYTES + tokenBytes) !== trailer.length || crc32(trailer) !== header.trailerChecksum) {
      throw invalid(path, 'the checksums at its end are damaged; prepare the data again');
    }
    this.#checked = new Uint8Array(this.#checksums.length);
    this.#block = new Uint8Array(Math.min(tokenBytes, header.blockBytes));
  }

  /** Opens and checks the header and the file's length. Throws FILE_NOT_FOUND or TOKEN_FILE_INVALID, one line each. */
  static open(path: string): TokenFile {
    const descriptor = onFile(path, () => openSync(path, 'r'));
    try {
      return new TokenFile(path, descriptor);
    } catch (error) {
      closeSync(descriptor);
      throw fileError(error, path);
    }
  }

  /**
   * Reads tokens start..start + into.length. Throws TOKEN_FILE_INVALID when a block that holds some of them is damaged or
   * has an id beyond the vocabulary. The range must lie inside the file.
   */
  read(start: number, into: Int32Array): void {
    assert(Number.isSafeInteger(start) && start >= 0 && start + into.length <= this.count, `tokens ${start}..${start + into.length} of ${this.count}`);
    const perBlock = this.#blockBytes / this.#width;
    for (let done = 0; done < into.length; ) {
      const block = Math.floor((start + done) / perBlock);
      const inBlock = start + done - block * perBlock;
      const length = Math.min(into.length - done, perBlock - inBlock);
      if (this.#checked[block] === 0) {
        const tokens = this.#readChecked(block);
        into.set(tokens.subarray(inBlock, inBlock + length), done);
      } else {
        const part = this.#block.subarray(0, length * this.#width);
        this.#readExactly(part, HEADER_BYTES + (start + done) * this.#width);
        into.set(this.#view(part), done);
      }
      done += length;
    }
  }

  /** Reads and checks the whole file, a block at a time. Throws TOKEN_FILE_INVALID. */
  verify(): void {
    for (let block = 0; block < this.#checksums.length; block++) this.#readChecked(block);
  }

  close(): void {
    closeSync(this.#descriptor);
  }

  #readChecked(block: number): Uint16Array | Uint32Array {
    const at = block * this.#blockBytes;
    const bytes = this.#block.subarray(0, Math.min(this.#blockBytes, this.count * this.#width - at));
    this.#readExactly(bytes, HEADER_BYTES + at);
    if (crc32(bytes) !== this.#checksums[block]) {
      throw invalid(this.path, `bytes ${HEADER_BYTES + at} to ${HEADER_BYTES + at + bytes.length} are damaged (their checksum differs); prepare the data again`);
    }
    const tokens = this.#view(bytes);
    for (let index = 0; index < tokens.length; index++) {
      if (tokens[index]! >= this.vocabSize) {
        throw invalid(this.path, `token ${at / this.#width + index} is ${tokens[index]}, beyond the vocabulary of ${this.vocabSize}`);
      }
    }
    this.#checked[block] = 1;
    return tokens;
  }

  #readExactly(into: Uint8Array, position: number): void {
    if (readAt(this.#descriptor, into, position) !== into.length) throw invalid(this.path, 'was truncated while it was read');
  }

  #view(bytes: Uint8Array): Uint16Array | Uint32Array {
    return this.#width === 2
      ? new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2)
      : new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  }
}

/**
 * Writes a token file in a stream: the count is not known before `finish`, which completes the header, syncs, and gives
 * the file its name. Until then only a temporary file beside it exists, and a file of that name stays as it was.
 */
export class TokenFileWriter {
  readonly path: string;
  readonly vocabSize: number;
  readonly #tokenizerDigest: string;
  readonly #temporary: string;
  readonly #descriptor: number;
  readonly #width: 2 | 4;
  readonly #block: Uint16Array | Uint32Array;
  #filled = 0;
  #count = 0;
  #padCount = 0;
  #checksums: number[] = [];
  #open = true;

  /** `tokenizerDigest`: sha-256 in hex of the tokenizer.json, or null. Throws FILE_NOT_FOUND or DISK_FULL. */
  constructor(path: string, { vocabSize, tokenizerDigest }: { vocabSize: number; tokenizerDigest: string | null }) {
    assert(Number.isInteger(vocabSize) && vocabSize > 0 && vocabSize <= 2 ** 31, `vocabulary of ${vocabSize}`);
    assert(tokenizerDigest === null || /^[0-9a-f]{64}$/.test(tokenizerDigest), 'a sha-256 in hex');
    this.path = path;
    this.vocabSize = vocabSize;
    this.#tokenizerDigest = tokenizerDigest ?? '0'.repeat(64);
    this.#width = vocabSize <= 1 << 16 ? 2 : 4;
    this.#block = this.#width === 2 ? new Uint16Array(BLOCK_BYTES / 2) : new Uint32Array(BLOCK_BYTES / 4);
    onFile(path, () => removeAbandoned(dirname(path)));
    this.#temporary = temporaryName(path);
    this.#descriptor = onFile(path, () => openSync(this.#temporary, 'wx'));
    this.#guard(() => writeAll(this.#descriptor, new Uint8Array(HEADER_BYTES)));
  }

  /** Tokens appended so far. */
  get count(): number {
    return this.#count;
  }

  /** Throws DATA_INVALID for an id beyond the vocabulary, DISK_FULL; after a throw the temporary file is gone. */
  append(tokens: ArrayLike<number>): void {
    assert(this.#open, 'the writer is open');
    this.#guard(() => {
      for (let index = 0; index < tokens.length; index++) {
        const token = tokens[index]!;
        if (!(token >= 0 && token < this.vocabSize)) {
          throw new NnError('DATA_INVALID', `${this.path}: token ${this.#count} would be ${token}, beyond the vocabulary of ${this.vocabSize}`, { path: this.path, token });
        }
        if (token === SPECIAL_IDS.pad) this.#padCount++;
        this.#block[this.#filled++] = token;
        this.#count++;
        if (this.#filled === this.#block.length) this.#flush();
      }
    });
  }

  /** Completes, syncs and names the file. Returns its count and bytes. Throws DATA_INVALID without any token, DISK_FULL. */
  finish(): { count: number; bytes: number } {
    assert(this.#open, 'the writer is open');
    return this.#guard(() => {
      if (this.#count === 0) throw new NnError('DATA_INVALID', `${this.path}: there is no token to write; the text is empty`, { path: this.path });
      this.#flush();
      const trailer = bytesOf(Uint32Array.from(this.#checksums));
      writeAll(this.#descriptor, trailer);
      const header = encodeHeader({
        width: this.#width,
        count: this.#count,
        padCount: this.#padCount,
        vocabSize: this.vocabSize,
        blockBytes: BLOCK_BYTES,
        tokenizerDigest: this.#tokenizerDigest,
        trailerChecksum: crc32(trailer),
      });
      writeAll(this.#descriptor, header, 0);
      fsyncSync(this.#descriptor);
      this.#open = false;
      closeSync(this.#descriptor);
      publish(this.#temporary, this.path);
      return { count: this.#count, bytes: HEADER_BYTES + this.#count * this.#width + trailer.length };
    });
  }

  /** Gives up: removes the temporary file. Does nothing after `finish`. */
  abort(): void {
    if (this.#open) this.#discard();
  }

  #discard(): void {
    if (this.#open) closeSync(this.#descriptor);
    this.#open = false;
    rmSync(this.#temporary, { force: true });
    forgetTemporary(this.#temporary);
  }

  #flush(): void {
    if (this.#filled === 0) return;
    const bytes = bytesOf(this.#block.subarray(0, this.#filled));
    this.#checksums.push(crc32(bytes));
    writeAll(this.#descriptor, bytes);
    this.#filled = 0;
  }

  #guard<Value>(work: () => Value): Value {
    try {
      return work();
    } catch (error) {
      this.#discard();
      throw fileError(error, this.path);
    }
  }
}

/**
 * Throws unless a token file, its tokenizer and a model go together: DATA_INVALID when the file's vocabulary is beyond
 * the model's, TOKENIZER_INVALID when the tokenizer's is, or when another tokenizer made the file.
 */
export function requireVocabulary(
  model: { vocabSize: number },
  file: Pick<TokenFile, 'path' | 'vocabSize' | 'tokenizerDigest'>,
  tokenizer?: { path: string; vocabSize: number; digest: string },
): void {
  if (file.vocabSize > model.vocabSize) {
    throw new NnError('DATA_INVALID', `${file.path}: its vocabulary is ${file.vocabSize}, but model.vocabSize is only ${model.vocabSize}`, { path: file.path, vocabSize: file.vocabSize });
  }
  if (tokenizer === undefined) return;
  if (tokenizer.vocabSize > model.vocabSize) {
    throw new NnError('TOKENIZER_INVALID', `${tokenizer.path}: its vocabulary is ${tokenizer.vocabSize}, but model.vocabSize is only ${model.vocabSize}`, {
      path: tokenizer.path,
      vocabSize: tokenizer.vocabSize,
    });
  }
  if (!/^0+$/.test(file.tokenizerDigest) && file.tokenizerDigest !== tokenizer.digest) {
    throw new NnError('TOKENIZER_INVALID', `${tokenizer.path}: ${file.path} was made with another tokenizer; prepare the data again or name that one`, { path: tokenizer.path });
  }
}
