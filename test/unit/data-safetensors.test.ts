/** safetensors: what is written is read back, bit for bit; whatever is wrong with a header is refused in one line. */
import { readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import * as fc from 'fast-check';
import { packageRoot } from '../../config/schema.ts';
import { SafetensorsFile, decodeBf16, decodeF16, encodeBf16, writeSafetensors } from '../../data/safetensors.ts';
import { expectError, temporaryDirectory } from './data-helpers.ts';

const file = (header: string | object, dataBytes: number, claimed?: bigint): Buffer => {
  const text = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const bytes = Buffer.alloc(8 + text.length + dataBytes);
  bytes.writeBigUInt64LE(claimed ?? BigInt(text.length), 0);
  text.copy(bytes, 8);
  return bytes;
};

const tensor = (begin: number, end: number, shape: unknown = [(end - begin) / 4], dtype: unknown = 'F32'): object => ({ dtype, shape, data_offsets: [begin, end] });

describe('data: safetensors', () => {
  const directory = temporaryDirectory();

  it('reads back what it wrote, whole and by range, and writes the same bytes again', () => {
    const values: Record<string, Float32Array> = { a: Float32Array.from([1, -0, 3.14159, NaN, Infinity, 1e-42]), b: new Float32Array(0), c: Float32Array.from([7]) };
    const planned = [
      { name: 'a', dtype: 'F32', shape: [2, 3] },
      { name: 'b', dtype: 'F32', shape: [0, 5] },
      { name: 'c', dtype: 'BF16', shape: [] },
    ] as const;
    const write = (name: string): number => writeSafetensors(directory.file(name), planned, (tensorName, into) => into.set(values[tensorName]!));
    const bytes = write('one');
    write('two');
    expect(readFileSync(directory.file('one')).equals(readFileSync(directory.file('two')))).to.equal(true);
    expect(readFileSync(directory.file('one')).length).to.equal(bytes);
    const read = SafetensorsFile.open(directory.file('one'));
    expect(read.metadata).to.deep.equal({ format: 'pt' });
    expect([...read.tensors.keys()]).to.deep.equal(['a', 'b', 'c']);
    expect(read.entry('a').offset % 8).to.equal(0);
    const a = new Float32Array(6);
    read.readFloats('a', a);
    expect(new Uint32Array(a.buffer)).to.deep.equal(new Uint32Array(values['a']!.buffer));
    const part = new Float32Array(2);
    read.readFloats('a', part, 1);
    expect([...part]).to.deep.equal([-0, Math.fround(3.14159)]);
    const c = new Float32Array(1);
    read.readFloats('c', c);
    expect(c[0]).to.equal(7);
    expectError(() => read.readFloats('d', c), 'CHECKPOINT_INVALID', 'one', '"d" is missing');
    read.close();
  });

  it('reads a golden file of another program', () => {
    const golden = SafetensorsFile.open(join(packageRoot(), 'test/golden/mqa-top2.safetensors'));
    const entry = golden.entry('tokens');
    const tokens = new Int32Array(entry.length);
    golden.readIntegers('tokens', tokens);
    expect(Math.min(...tokens)).to.be.at.least(0);
    const logits = new Float32Array(golden.entry('logits').length);
    golden.readFloats('logits', logits);
    expect(logits.every(Number.isFinite)).to.equal(true);
    golden.close();
  });

  it('rounds to bf16 to nearest, ties away from zero, and reads it back exactly', () => {
    fc.assert(
      fc.property(fc.float({ noNaN: true }), (value) => {
        const bits = new Uint16Array(1);
        encodeBf16(Float32Array.of(value), bits);
        const back = new Float32Array(1);
        decodeBf16(bits, back);
        const neighbours = [bits[0]! - 1, bits[0]!, bits[0]! + 1].map((each) => {
          const neighbour = new Float32Array(1);
          decodeBf16(Uint16Array.of(each), neighbour);
          return Math.abs(neighbour[0]! - value);
        });
        if (Number.isFinite(back[0]!)) {
          expect(neighbours[1]).to.be.at.most(Math.min(...neighbours.filter((each) => !Number.isNaN(each))));
          expect(neighbours[1]).to.not.equal(neighbours[2]);
        } else expect(Math.abs(value)).to.be.above(3.38e38);
      }),
    );
    const bits = new Uint16Array(4);
    encodeBf16(Float32Array.of(NaN, Infinity, -Infinity, -0), bits);
    expect([...bits]).to.deep.equal([0x7fc0, 0x7f80, 0xff80, 0x8000]);
    encodeBf16(new Float32Array(Uint32Array.of(0x3f808000, 0xbf818000, 0x3f807fff, 0x7f7f8000).buffer), bits);
    expect([...bits]).to.deep.equal([0x3f81, 0xbf82, 0x3f80, 0x7f80]);
  });

  it('reads half precision: normal, subnormal, infinite', () => {
    const values = new Float32Array(7);
    decodeF16(Uint16Array.of(0x3c00, 0xc000, 0x0001, 0x7bff, 0x7c00, 0x8000, 0x3555), values);
    expect([...values]).to.deep.equal([1, -2, 2 ** -24, 65504, Infinity, -0, 0.333251953125]);
  });

  it('reads integers of any width, and refuses what is beyond 32 bits', () => {
    const bytes = file({ a: tensor(0, 16, [2], 'I64'), b: tensor(16, 18, [2], 'U8') }, 18);
    bytes.writeBigInt64LE(-5n, bytes.length - 18);
    bytes.writeBigInt64LE(1n << 40n, bytes.length - 10);
    bytes.set([3, 255], bytes.length - 2);
    writeFileSync(directory.file('i'), bytes);
    const read = SafetensorsFile.open(directory.file('i'));
    const one = new Int32Array(1);
    read.readIntegers('a', one);
    expect(one[0]).to.equal(-5);
    expectError(() => read.readIntegers('a', one, 1), 'CHECKPOINT_INVALID', '"a" holds 1099511627776 at index 1');
    const two = new Int32Array(2);
    read.readIntegers('b', two);
    expect([...two]).to.deep.equal([3, 255]);
    expectError(() => read.readFloats('b', new Float32Array(1)), 'CHECKPOINT_INVALID', '"b" is U8');
    read.close();
  });

  const refused: [string, Buffer, ...(string | RegExp)[]][] = [
    ['an empty file', Buffer.alloc(0), 'the file is empty'],
    ['a file of 5 bytes', Buffer.from('hello'), 'no safetensors file'],
    ['a header that claims gigabytes', file('{}', 0, 8n << 30n), 'claims 8589934592 bytes'],
    ['a header length of 2^64 - 1', file('{}', 0, (1n << 64n) - 1n), 'claims 18446744073709551615 bytes'],
    ['a header longer than the file', file('{}', 0, 3n), 'claims 3 bytes, but the file has 10'],
    ['a header that is no JSON', file('{"a": nope}', 0), 'the header is no JSON'],
    ['a header that is a JSON array', file('[1]', 0), 'no JSON object'],
    ['a header of bad UTF-8', Buffer.concat([file('', 0, 2n), Buffer.from([0x7b, 0xff])]), 'no JSON'],
    ['a metadata that is no map of strings', file({ __metadata__: { a: 1 } }, 0), '__metadata__'],
    ['an entry that is no object', file({ a: 7 }, 0), '"a" has an entry'],
    ['an unknown dtype', file({ a: tensor(0, 4, [1], 'Q4') }, 4), '"a"', 'dtype', 'Q4'],
    ['an inherited name as dtype', file({ a: tensor(0, 4, [1], 'toString') }, 4), '"a"', 'dtype'],
    ['no dtype', file({ a: { shape: [1], data_offsets: [0, 4] } }, 4), '"a"', 'dtype'],
    ['a negative shape', file({ a: tensor(0, 4, [-1]) }, 4), '"a" has a shape'],
    ['a fractional shape', file({ a: tensor(0, 4, [0.5]) }, 4), '"a" has a shape'],
    ['a shape whose product overflows', file({ a: tensor(0, 4, [2 ** 40, 2 ** 40]) }, 4), '"a" of shape', 'takes'],
    ['offsets of one number', file({ a: { dtype: 'F32', shape: [1], data_offsets: [0] } }, 4), '"a" has data_offsets'],
    ['offsets the wrong way round', file({ a: tensor(4, 0, [1]) }, 4), '"a" ends at 0, before it begins'],
    ['a size that is not the shape’s', file({ a: tensor(0, 8, [3]) }, 8), '"a" of shape [3] and dtype F32 takes 12 bytes, but its offsets hold 8'],
    ['a tensor beyond the file', file({ a: tensor(0, 8) }, 4), '"a" ends at data byte 8', 'truncated'],
    ['overlapping tensors', file({ a: tensor(0, 8), b: tensor(4, 12) }, 12), '"b" overlaps tensor "a"'],
    ['a gap', file({ a: tensor(0, 4), b: tensor(8, 12) }, 12), '"b" begins 4 bytes after'],
    ['bytes behind the last tensor', file({ a: tensor(0, 4) }, 5), '1 bytes follow the last tensor'],
    ['a name that comes twice', file('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "\\u0061" :{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4), 'names "a" twice'],
    ['a name with line breaks', file({ 'x\ny': 7 }, 0), '"x\\ny"'],
  ];
  for (const [what, bytes, ...texts] of refused) {
    it(`refuses ${what}`, () => {
      const path = directory.file('bad.safetensors');
      writeFileSync(path, bytes);
      expectError(() => SafetensorsFile.open(path), 'CHECKPOINT_INVALID', path, ...texts);
    });
  }

  it('refuses a sparse file whose header claims gigabytes that are there, without allocating them', () => {
    const path = directory.file('huge');
    writeFileSync(path, file('{}', 0, 6n << 30n));
    truncateSync(path, 7 * 2 ** 30);
    const before = process.memoryUsage().arrayBuffers;
    expectError(() => SafetensorsFile.open(path), 'CHECKPOINT_INVALID', 'more than the 100000000');
    expect(process.memoryUsage().arrayBuffers - before).to.be.below(1 << 20);
  });

  it('names a file that is not there, or is a directory', () => {
    expectError(() => SafetensorsFile.open(directory.file('none')), 'FILE_NOT_FOUND', 'none');
    expectError(() => SafetensorsFile.open(directory.path), 'FILE_NOT_FOUND', 'is a directory');
  });

  it('survives any damage of a header: an error of ours or the same tensors', () => {
    const good = file({ a: tensor(0, 8), b: tensor(8, 12), __metadata__: { x: 'y' } }, 12);
    const path = directory.file('fuzz');
    fc.assert(
      fc.property(fc.nat(good.length - 1), fc.nat(255), fc.nat(good.length), (at, byte, length) => {
        const bytes = Buffer.from(good.subarray(0, Math.max(length, good.length / 2)));
        if (at < bytes.length) bytes[at] = byte;
        writeFileSync(path, bytes);
        try {
          const read = SafetensorsFile.open(path);
          for (const entry of read.tensors.values()) expect(entry.offset + entry.bytes).to.be.at.most(bytes.length);
          read.close();
        } catch (error) {
          expect((error as { code?: string }).code).to.equal('CHECKPOINT_INVALID');
        }
      }),
    );
  });
});
