/**
 * Reads and writes the safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes side by side. The
 * reader believes nothing: all of the header is checked against the file's size before any tensor is read, and what is
 * read is read by position, never the whole file. The writer streams. Knows no model: checkpoint-files.ts does, and
 * the doctor's golden files are read here too. Format: https://github.com/huggingface/safetensors#format
 *
 *   byte 0          8             8 + N                           file size
 *   | u64 LE: N     | JSON header | tensors, in order of offset, without gap or overlap |
 */
import assert from 'node:assert/strict';
import { closeSync, fstatSync, fsyncSync, openSync } from 'node:fs';
import { endianness } from 'node:os';
import { NnError } from '../config/errors.ts';
import { bytesOf, fileError, onFile, quote, readAt, writeAll } from './files.ts';

/** Bytes of one element of each dtype that may appear in a header. */
const DTYPE_BYTES = {
  F64: 8, F32: 4, F16: 2, BF16: 2, F8_E4M3: 1, F8_E5M2: 1, I64: 8, I32: 4, I16: 2, I8: 1, U64: 8, U32: 4, U16: 2, U8: 1, BOOL: 1,
} as const;

export type SafetensorsDtype = keyof typeof DTYPE_BYTES;

/** A longer header is refused, as the format's own library does; 6.9b's is 0.2 MB. */
export const MAXIMUM_HEADER_BYTES = 100_000_000;

/** Elements converted at a time when the file's dtype is not the reader's. */
const CONVERT_ELEMENTS = 1 << 18;

assert.equal(endianness(), 'LE', 'tensors are little-endian on disk and are read in place');

/** One tensor of a file. `offset` is its first byte in the file. */
export interface SafetensorsEntry {
  readonly name: string;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
  readonly length: number;
  readonly offset: number;
  readonly bytes: number;
}

const invalid = (path: string, problem: string, tensor?: string): NnError =>
  new NnError('CHECKPOINT_INVALID', `${path}: ${tensor === undefined ? '' : `tensor ${quote(tensor)} `}${problem}`, { path, ...(tensor === undefined ? {} : { tensor }) });

/** Nearest float32 values of bfloat16 bits: exact, they are a float32's upper half. Works in place of nothing: `into` is apart. */
export function decodeBf16(bits: Uint16Array, into: Float32Array): void {
  const words = new Uint32Array(into.buffer, into.byteOffset, bits.length);
  for (let index = 0; index < bits.length; index++) words[index] = bits[index]! << 16;
}

/**
 * The nearest bfloat16 bits of float32 values, every NaN a quiet NaN. Ties go away from zero, as in the weights that a bf16 run computes
 * with (nn_split): so its checkpoint's model is that, to the bit.
 */
export function encodeBf16(values: Float32Array, into: Uint16Array): void {
  const words = new Uint32Array(values.buffer, values.byteOffset, values.length);
  for (let index = 0; index < words.length; index++) {
    const word = words[index]!;
    const isNaN = (word & 0x7fffffff) > 0x7f800000;
    into[index] = isNaN ? (word >>> 16) | 0x40 : (word + 0x8000) >>> 16;
  }
}

/** The float32 values of IEEE half precision bits, subnormals and infinities included: exact. */
export function decodeF16(bits: Uint16Array, into: Float32Array): void {
  for (let index = 0; index < bits.length; index++) {
    const half = bits[index]!;
    const exponent = (half >>> 10) & 31;
    const fraction = half & 1023;
    const magnitude =
      exponent === 0 ? fraction * 2 ** -24 : exponent === 31 ? (fraction === 0 ? Infinity : NaN) : (1024 + fraction) * 2 ** (exponent - 25);
    into[index] = half & 0x8000 ? -magnitude : magnitude;
  }
}

/** Throws unless no object in `text` (valid JSON) names a key twice: JSON.parse would keep the last silently. */
function refuseDuplicateKeys(text: string, path: string): void {
  const open: (Set<string> | null)[] = []; // a set of keys for each object around the position, null for an array
  for (let at = 0; at < text.length; at++) {
    const character = text[at]!;
    if (character === '{') open.push(new Set());
    else if (character === '[') open.push(null);
    else if (character === '}' || character === ']') open.pop();
    else if (character === '"') {
      const start = at++;
      while (text[at] !== '"') at += text[at] === '\\' ? 2 : 1;
      const keys = open.at(-1);
      let next = at + 1;
      while (/\s/.test(text[next] ?? '')) next++;
      if (keys === null || keys === undefined || text[next] !== ':') continue;
      const key = JSON.parse(text.slice(start, at + 1)) as string;
      if (keys.has(key)) throw invalid(path, `the header names ${quote(key)} twice`);
      keys.add(key);
    }
  }
}

const isIndex = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;

/** Checks one tensor's entry alone: its form, its dtype, and that shape times size is what its offsets say. */
function parseEntry(path: string, name: string, value: unknown, dataStart: number, dataBytes: number): SafetensorsEntry {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw invalid(path, 'has an entry that is no object', name);
  const { dtype, shape, data_offsets: offsets } = value as { dtype?: unknown; shape?: unknown; data_offsets?: unknown };
  if (typeof dtype !== 'string' || !Object.hasOwn(DTYPE_BYTES, dtype)) throw invalid(path, `has the unknown dtype ${quote(JSON.stringify(dtype) ?? 'undefined')}`, name);
  if (!Array.isArray(shape) || !shape.every(isIndex)) throw invalid(path, 'has a shape that is no list of whole numbers', name);
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isIndex)) throw invalid(path, 'has data_offsets that are no pair of whole numbers', name);
  const [begin, end] = offsets as [number, number];
  const length = shape.reduce((product, size) => product * size, 1);
  const bytes = length * DTYPE_BYTES[dtype as SafetensorsDtype];
  if (begin > end) throw invalid(path, `ends at ${end}, before it begins at ${begin}`, name);
  if (end > dataBytes) throw invalid(path, `ends at data byte ${end}, but the file holds only ${dataBytes}: it is truncated or its header is damaged`, name);
  if (end - begin !== bytes) {
    throw invalid(path, `of shape [${shape.slice(0, 8).join(', ')}] and dtype ${dtype} takes ${bytes} bytes, but its offsets hold ${end - begin}`, name);
  }
  return { name, dtype: dtype as SafetensorsDtype, shape, length, offset: dataStart + begin, bytes };
}

/** Throws unless the entries, in order of their offsets, fill the file to its last byte without gap or overlap. */
function requireContiguous(path: string, entries: readonly SafetensorsEntry[], dataStart: number, fileBytes: number): void {
  let at = dataStart;
  let before = '';
  for (const { name, offset, bytes } of [...entries].sort((a, b) => a.offset - b.offset || a.bytes - b.bytes)) {
    if (offset < at) throw invalid(path, `overlaps tensor ${quote(before)}`, name);
    if (offset > at) throw invalid(path, `begins ${offset - at} bytes after the tensor before it ends`, name);
    at = offset + bytes;
    before = name;
  }
  if (at !== fileBytes) throw invalid(path, `${fileBytes - at} bytes follow the last tensor`);
}

function parseHeader(path: string, descriptor: number, fileBytes: number): { metadata: Record<string, string>; entries: SafetensorsEntry[] } {
  if (fileBytes < 8) throw invalid(path, fileBytes === 0 ? 'the file is empty' : `the file has ${fileBytes} bytes and is no safetensors file`);
  const prefix = new DataView(new ArrayBuffer(8));
  if (readAt(descriptor, bytesOf(prefix), 0) !== 8) throw invalid(path, 'the file was cut while it was read');
  const claimed = prefix.getBigUint64(0, true);
  if (claimed > BigInt(fileBytes - 8)) throw invalid(path, `the header claims ${claimed} bytes, but the file has ${fileBytes}: it is truncated or no safetensors file`);
  if (claimed > BigInt(MAXIMUM_HEADER_BYTES)) throw invalid(path, `the header claims ${claimed} bytes, more than the ${MAXIMUM_HEADER_BYTES} that are allowed`);
  const headerBytes = new Uint8Array(Number(claimed));
  if (readAt(descriptor, headerBytes, 8) !== headerBytes.length) throw invalid(path, 'the file was cut while it was read');

  let text: string;
  let header: unknown;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(headerBytes);
    header = JSON.parse(text);
  } catch (error) {
    throw new NnError('CHECKPOINT_INVALID', `${path}: the header is no JSON: it is damaged or this is no safetensors file`, { path }, error);
  }
  if (!text.startsWith('{') || typeof header !== 'object' || header === null) throw invalid(path, 'the header is no JSON object');
  refuseDuplicateKeys(text, path);

  const { __metadata__: metadata = {}, ...tensors } = header as Record<string, unknown>;
  if (typeof metadata !== 'object' || metadata === null || !Object.values(metadata).every((value) => typeof value === 'string')) {
    throw invalid(path, 'the header has a __metadata__ that is no map of strings');
  }
  const dataStart = 8 + headerBytes.length;
  const entries = Object.entries(tensors).map(([name, value]) => parseEntry(path, name, value, dataStart, fileBytes - dataStart));
  requireContiguous(path, entries, dataStart, fileBytes);
  return { metadata: metadata as Record<string, string>, entries };
}

/** An open safetensors file. All its reads are synchronous and by position; it holds a descriptor until `close`. */
export class SafetensorsFile {
  readonly path: string;
  readonly metadata: Readonly<Record<string, string>>;
  /** By name, in the header's order. */
  readonly tensors: ReadonlyMap<string, SafetensorsEntry>;
  readonly bytes: number;
  readonly #descriptor: number;

  private constructor(path: string, descriptor: number) {
    this.path = path;
    this.#descriptor = descriptor;
    this.bytes = fstatSync(descriptor).size;
    const { metadata, entries } = parseHeader(path, descriptor, this.bytes);
    this.metadata = metadata;
    this.tensors = new Map(entries.map((entry) => [entry.name, entry]));
  }

  /** Opens and checks a file. Throws FILE_NOT_FOUND, or CHECKPOINT_INVALID in one line that names the file and the tensor. */
  static open(path: string): SafetensorsFile {
    const descriptor = onFile(path, () => openSync(path, 'r'));
    try {
      return new SafetensorsFile(path, descriptor);
    } catch (error) {
      closeSync(descriptor);
      throw fileError(error, path);
    }
  }

  /** The tensor of that name. Throws CHECKPOINT_INVALID when there is none. */
  entry(name: string): SafetensorsEntry {
    const entry = this.tensors.get(name);
    if (entry === undefined) throw invalid(this.path, 'is missing', name);
    return entry;
  }

  /**
   * Reads elements from..from + into.length of a tensor as float32; F32 as it is, F16 and BF16 exactly, F64 rounded.
   * Throws CHECKPOINT_INVALID for another dtype or a file that was cut meanwhile.
   */
  readFloats(name: string, into: Float32Array, from = 0): void {
    const entry = this.#range(name, from, into.length);
    if (entry.dtype === 'F32') return this.#fill(entry, bytesOf(into), from * 4);
    for (let done = 0; done < into.length; done += CONVERT_ELEMENTS) {
      const part = into.subarray(done, done + CONVERT_ELEMENTS);
      if (entry.dtype === 'BF16' || entry.dtype === 'F16') {
        const bits = new Uint16Array(part.length);
        this.#fill(entry, bytesOf(bits), (from + done) * 2);
        if (entry.dtype === 'BF16') decodeBf16(bits, part);
        else decodeF16(bits, part);
      } else if (entry.dtype === 'F64') {
        const values = new Float64Array(part.length);
        this.#fill(entry, bytesOf(values), (from + done) * 8);
        part.set(values);
      } else throw invalid(this.path, `is ${entry.dtype}, but F32, BF16, F16 or F64 is wanted`, name);
    }
  }

  /** Reads elements from..from + into.length of an integer tensor. Throws CHECKPOINT_INVALID also for a value beyond int32. */
  readIntegers(name: string, into: Int32Array, from = 0): void {
    const entry = this.#range(name, from, into.length);
    const size = DTYPE_BYTES[entry.dtype];
    if (entry.dtype === 'I32') return this.#fill(entry, bytesOf(into), from * 4);
    const raw = new Uint8Array(into.length * size);
    this.#fill(entry, raw, from * size);
    const view = new DataView(raw.buffer);
    const read: Partial<Record<SafetensorsDtype, (at: number) => number>> = {
      I64: (at) => Number(view.getBigInt64(at, true)),
      U64: (at) => Number(view.getBigUint64(at, true)),
      U32: (at) => view.getUint32(at, true),
      I16: (at) => view.getInt16(at, true),
      U16: (at) => view.getUint16(at, true),
      I8: (at) => view.getInt8(at),
      U8: (at) => view.getUint8(at),
      BOOL: (at) => view.getUint8(at),
    };
    const readOne = read[entry.dtype];
    if (readOne === undefined) throw invalid(this.path, `is ${entry.dtype}, but integers are wanted`, name);
    for (let index = 0; index < into.length; index++) {
      const value = readOne(index * size);
      into[index] = value;
      if (into[index] !== value) throw invalid(this.path, `holds ${value} at index ${from + index}, beyond 32 bits`, name);
    }
  }

  close(): void {
    closeSync(this.#descriptor);
  }

  #range(name: string, from: number, length: number): SafetensorsEntry {
    const entry = this.entry(name);
    assert(isIndex(from) && from + length <= entry.length, `elements ${from}..${from + length} of ${name} (${entry.length})`);
    return entry;
  }

  #fill(entry: SafetensorsEntry, into: Uint8Array, at: number): void {
    if (readAt(this.#descriptor, into, entry.offset + at) !== into.length) throw invalid(this.path, 'was cut while it was read', entry.name);
  }
}

/** A tensor to be written. */
export interface PlannedTensor {
  readonly name: string;
  readonly dtype: 'F32' | 'BF16';
  readonly shape: readonly number[];
}

/** The header of a file that holds these tensors in this order, padded with spaces to 8 bytes. The same tensors give the same bytes. */
function encodeHeader(tensors: readonly PlannedTensor[], metadata: Readonly<Record<string, string>>): Uint8Array {
  const header: Record<string, unknown> = { __metadata__: metadata };
  let at = 0;
  for (const { name, dtype, shape } of tensors) {
    assert(!Object.hasOwn(header, name), `tensor ${name} is planned twice`);
    const end = at + shape.reduce((product, size) => product * size, 1) * DTYPE_BYTES[dtype];
    header[name] = { dtype, shape, data_offsets: [at, end] };
    at = end;
  }
  const text = Buffer.from(JSON.stringify(header));
  const bytes = new Uint8Array(8 + Math.ceil(text.length / 8) * 8).fill(0x20, 8);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(bytes.length - 8), true);
  bytes.set(text, 8);
  return bytes;
}

/**
 * Writes a new safetensors file and syncs it. `read` is asked for each tensor in turn, so that one tensor is in memory at
 * a time; BF16 is rounded as encodeBf16 does. `observe` sees all bytes in order (a hash). Returns the file's bytes. Throws
 * DISK_FULL; the unfinished file is left to the caller, who writes into a temporary directory.
 */
export function writeSafetensors(
  path: string,
  tensors: readonly PlannedTensor[],
  read: (name: string, into: Float32Array) => void,
  {
    metadata = { format: 'pt' },
    observe = () => undefined,
  }: { metadata?: Readonly<Record<string, string>>; observe?: (bytes: Uint8Array) => void } = {},
): number {
  const longest = tensors.reduce((most, { shape }) => Math.max(most, shape.reduce((product, size) => product * size, 1)), 0);
  const values = new Float32Array(longest);
  const rounded = new Uint16Array(Math.min(longest, CONVERT_ELEMENTS));
  const descriptor = onFile(path, () => openSync(path, 'wx'));
  let bytes = 0;
  const append = (part: Uint8Array): void => {
    writeAll(descriptor, part);
    observe(part);
    bytes += part.length;
  };
  try {
    append(encodeHeader(tensors, metadata));
    for (const { name, dtype, shape } of tensors) {
      const tensor = values.subarray(0, shape.reduce((product, size) => product * size, 1));
      read(name, tensor);
      if (dtype === 'F32') append(bytesOf(tensor));
      else {
        for (let done = 0; done < tensor.length; done += CONVERT_ELEMENTS) {
          const part = tensor.subarray(done, done + CONVERT_ELEMENTS);
          encodeBf16(part, rounded);
          append(bytesOf(rounded.subarray(0, part.length)));
        }
      }
    }
    fsyncSync(descriptor);
    return bytes;
  } catch (error) {
    throw fileError(error, path);
  } finally {
    closeSync(descriptor);
  }
}
