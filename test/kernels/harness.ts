/**
 * Runs a table of kernel cases on a device and holds each to what nn.h promises. Knows no kernel: a case brings its buffers, the
 * call and the reference. Used by the *.test.ts beside it; a suite is `describeKernels('title', cases)`.
 *
 * For every case: outputs begin as NaN; guard bytes around every buffer survive; inputs keep their bits; outputs agree with the
 * float64 reference within the case's tolerance; the bits are the same again, and with 1, 2 and 3 threads on the CPU; an output
 * that may alias an input gives the same bits when it does; an `add` output gives the bits of zeros + contribution, added once; an
 * output that is `same` as an `add` output has its bits.
 *
 * The suite runs for the CPU library and for the CUDA library, there in bf16 too (bf16.ts); CUDA_NN_TEST_DEVICE=cpu|cuda picks one.
 * Without a GPU the CUDA half is skipped, with the reason and the count on stderr.
 */
import { expect } from 'chai';
import { Device, describeDevices, slice } from '../../cuda/device.ts';
import type { DType, DeviceDescription, Kernels, Tensor, TypedArray, WorkspaceSizes } from '../../cuda/device.ts';
import { errorCode } from '../../config/errors.ts';
import { compareHalf, inBf16, signatures } from './bf16.ts';
import type { HalfCase } from './bf16.ts';
import type { Numbers } from './reference.ts';

export interface CaseBuffer {
  readonly way: 'in' | 'out' | 'add' | 'inout';
  readonly dtype: DType;
  /** Length and type of the buffer, and its content before the call (of an `out` buffer: not used). */
  readonly values: TypedArray;
}

/** |got - want| <= absolute + relative * |want|; a NaN or infinity must be the same. `why` says where the numbers come from. */
export interface Tolerance {
  readonly absolute: number;
  readonly relative: number;
  readonly why: string;
}

export const EXACT: Tolerance = { absolute: 0, relative: 0, why: 'nn.h states the operations, or nothing is rounded' };

type Buffers = Record<string, CaseBuffer>;

export interface Case<B extends Buffers = Buffers> {
  /** The name in nn.h without its prefix, and what is particular about this case. */
  readonly kernel: string;
  readonly sizes: string;
  readonly buffers: B;
  readonly run: (kernels: Kernels, tensors: { [K in keyof B]: Tensor }) => void;
  /** The outputs; of an `add` buffer only the contribution. */
  readonly expected: (values: { [K in keyof B]: Numbers }) => { [K in keyof B]?: Numbers | readonly bigint[] };
  readonly tolerance: Tolerance;
  /** [output, input]: the output may be the input. */
  readonly aliases?: readonly (readonly [keyof B & string, keyof B & string])[];
  /** [output, `add` output]: the output comes out with the bits of the other, which began at zero. */
  readonly same?: readonly (readonly [keyof B & string, keyof B & string])[];
  /** Sizes to ask the library for its workspace with; without them it gets plenty. */
  readonly workspace?: Partial<WorkspaceSizes>;
  /** The libraries that have it; without it, all. */
  readonly libraries?: readonly ('cpu' | 'cuda')[];
}

/** A case with the types of its buffers checked, as any case. */
export const define = <B extends Buffers>(one: Case<B>): Case => one as unknown as Case;

const DTYPES: Readonly<Record<string, DType>> = {
  Float32Array: 'f32', Float64Array: 'f64', Int32Array: 'i32', BigInt64Array: 'i64', BigUint64Array: 'u64', Uint16Array: 'bf16',
  Uint8Array: 'u8',
};
const ARRAYS = {
  f32: Float32Array, f64: Float64Array, i32: Int32Array, i64: BigInt64Array, u64: BigUint64Array, bf16: Uint16Array, u16: Uint16Array,
  u8: Uint8Array,
} as const;

const buffer = (way: CaseBuffer['way'], values: TypedArray): CaseBuffer => ({ way, dtype: DTYPES[values.constructor.name]!, values });
export const input = (values: TypedArray): CaseBuffer => buffer('in', values);
export const inout = (values: TypedArray): CaseBuffer => buffer('inout', values);
/** 16 bits that are no bfloat16. */
export const words16 = (way: CaseBuffer['way'], values: Uint16Array): CaseBuffer => ({ way, dtype: 'u16', values });
export const accumulate = (values: Float32Array): CaseBuffer => buffer('add', values);
export const output = (dtype: DType, length: number): CaseBuffer => ({ way: 'out', dtype, values: new ARRAYS[dtype](length) });

/** Deterministic numbers in [0, 1). */
export function generator(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = Math.imul(state ^ (state >>> 15), state | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** About normal numbers of the given scale with outliers (every 61st is 16 times as large), zeros and a negative zero. */
export function numbers(length: number, seed: number, scale = 1): Float32Array {
  const random = generator(seed);
  return Float32Array.from({ length }, (_, i) => {
    const value = (random() + random() + random() + random() - 2) * 1.7 * scale;
    if (i % 61 === 60) return value * 16;
    if (i % 101 === 100) return i % 2 === 0 ? 0 : -0;
    return value;
  });
}

/** `values` with some columns so small that a product of two of them is subnormal, or rounds to a zero of either sign. */
export function withTinyColumns(values: Float32Array, columns: number): Float32Array {
  const scale = [1, 1e-20, 1, 1e-26, 1];
  return values.map((value, i) => value * scale[(i % columns) % scale.length]!);
}

/** Integers in 0 .. bound-1. */
export function integers(length: number, seed: number, bound: number): Int32Array {
  const random = generator(seed);
  return Int32Array.from({ length }, () => Math.floor(random() * bound));
}

const GUARD_BYTES = 256;
const GUARD = 0xc5;
const PLENTY_BYTES = 32 << 20;
const SIZES: WorkspaceSizes = { T: 1, S: 1, H: 1, F: 1, E: 1, K: 1, V: 1, Q: 1, G: 1, D: 1 };

const bytesOf = (values: TypedArray): Uint8Array => new Uint8Array(values.buffer, values.byteOffset, values.byteLength);

/** Runs a case once and returns every buffer's bytes after it. `start` replaces the content of the `add` buffers. */
function execute(device: Device, one: Case, start: 'zeros' | 'values', alias?: readonly [string, string]): Record<string, TypedArray> {
  const regions: Record<string, { memory: Tensor; bytes: Uint8Array }> = {};
  const tensors: Record<string, Tensor> = {};
  const plain = one.workspace === undefined;
  const workspace = device.allocate('u8', plain ? PLENTY_BYTES : device.workspaceBytes({ ...SIZES, ...one.workspace }, 'f32'));
  try {
    device.setWorkspace(workspace);
    for (const [name, { way, dtype, values }] of Object.entries(one.buffers)) {
      if (alias?.[0] === name) continue;
      const bytes = new Uint8Array(2 * GUARD_BYTES + Math.ceil(values.byteLength / 256) * 256).fill(GUARD);
      const inside = bytes.subarray(GUARD_BYTES, GUARD_BYTES + values.byteLength);
      if (way === 'out') inside.fill(0xff); // NaN as float32, float64 and bfloat16
      else if (way === 'add' && start === 'zeros') inside.fill(0);
      else inside.set(bytesOf(values));
      const memory = device.allocate('u8', bytes.length);
      device.upload(memory, bytes);
      regions[name] = { memory, bytes };
      tensors[name] = { address: slice(memory, GUARD_BYTES, values.byteLength).address, dtype, length: values.length };
    }
    if (alias !== undefined) tensors[alias[0]] = tensors[alias[1]]!;
    one.run(device.kernels, tensors);
    device.synchronize();
    const after: Record<string, TypedArray> = {};
    for (const [name, { memory, bytes }] of Object.entries(regions)) {
      const { way, dtype, values } = one.buffers[name]!;
      const got = new Uint8Array(bytes.length);
      device.download(got, memory);
      const end = GUARD_BYTES + values.byteLength;
      for (let i = 0; i < got.length; i++) {
        const outside = i < GUARD_BYTES || i >= end;
        const readOnly = way === 'in' && name !== alias?.[1];
        if (outside && got[i] !== GUARD) throw new Error(`${name}: wrote to byte ${i - GUARD_BYTES} of ${values.byteLength}`);
        if (readOnly && got[i] !== bytes[i]) throw new Error(`${name}: an input was changed at byte ${i - GUARD_BYTES}`);
      }
      after[name] = new ARRAYS[dtype](got.slice(GUARD_BYTES, end).buffer);
    }
    if (alias !== undefined) after[alias[0]] = after[alias[1]]!;
    return after;
  } finally {
    device.setWorkspace(null);
    for (const { memory } of Object.values(regions)) device.free(memory);
    device.free(workspace);
  }
}

function compare(name: string, got: TypedArray, want: Numbers | readonly bigint[], tolerance: Tolerance): void {
  expect(want.length, `length of the reference for ${name}`).to.equal(got.length);
  for (let i = 0; i < got.length; i++) {
    const [a, b] = [got[i]!, want[i]!];
    if (typeof a === 'bigint' || typeof b === 'bigint' ? a === b : Object.is(a, b) || a === b) continue;
    const bound = tolerance.absolute + tolerance.relative * Math.abs(Number(b));
    const error = Math.abs(Number(a) - Number(b));
    if (error <= bound) continue;
    const [allowed, off] = [bound.toPrecision(3), error.toPrecision(3)];
    throw new Error(`${name}[${i}] is ${a}, must be ${b} within ${allowed} (${tolerance.why}); the error is ${off}`);
  }
}

function sameBits(what: string, one: Case, a: Record<string, TypedArray>, b: Record<string, TypedArray>): void {
  for (const [name, { way }] of Object.entries(one.buffers)) {
    if (way !== 'in' && !Buffer.from(bytesOf(a[name]!)).equals(bytesOf(b[name]!))) throw new Error(`${name} has other bits ${what}`);
  }
}

function samePairs(one: Case, result: Record<string, TypedArray>): void {
  for (const [a, b] of one.same ?? []) {
    if (!Buffer.from(bytesOf(result[a]!)).equals(bytesOf(result[b]!))) throw new Error(`${a} has other bits than ${b}`);
  }
}

/** Everything that the head of this file lists, for one case. `devices` differ in their thread count only. */
export function checkCase(devices: readonly Device[], one: Case): void {
  const [first] = devices as [Device, ...Device[]];
  const result = execute(first, one, 'zeros');
  const values = Object.fromEntries(Object.entries(one.buffers).map(([name, { values: given }]) => [name, given as unknown as Numbers]));
  const expected = one.expected(values);
  for (const [name, { way }] of Object.entries(one.buffers)) {
    if (way !== 'in') compare(name, result[name]!, expected[name]!, one.tolerance);
  }
  samePairs(one, result);
  for (const [i, device] of [...devices.slice(1), first].entries()) {
    sameBits(`in run ${i + 2} (threads may differ)`, one, result, execute(device, one, 'zeros'));
  }
  for (const alias of one.aliases ?? []) {
    const aliased = { ...one, buffers: { [alias[0]]: one.buffers[alias[0]]! } };
    sameBits(`when ${alias[0]} is ${alias[1]}`, aliased, result, execute(devices.at(-1)!, one, 'values', alias));
  }
  if (Object.values(one.buffers).some(({ way }) => way === 'add')) {
    const added = execute(devices.at(-1)!, one, 'values');
    for (const [name, { way, values: before }] of Object.entries(one.buffers)) {
      if (way !== 'add') continue;
      const sum = Float32Array.from(before as Float32Array, (value, i) => value + (result[name] as Float32Array)[i]!);
      compare(`${name} (accumulated)`, added[name]!, sum, EXACT);
    }
  }
}

/** The first GPU of the CUDA library, or why there is none. */
function findGpu(): { device: DeviceDescription } | { reason: string } {
  try {
    const [device] = describeDevices('cuda');
    return device === undefined ? { reason: 'the CUDA library finds no GPU' } : { device };
  } catch (error) {
    if (errorCode(error) !== 'LIBRARY_INVALID') throw error;
    return { reason: (error as Error).message };
  }
}

/** Opens the devices that a suite compares: three thread counts of the CPU, one GPU. */
export function openDevices(library: 'cpu' | 'cuda'): Device[] {
  return (library === 'cpu' ? [1, 2, 3] : [0]).map((threads) => Device.open({ library, index: 0, threads }));
}

/** Runs `body` as a mocha suite for each library that is to be tested, or skips it loudly. `count` is how many tests it holds. */
export function forEachLibrary(title: string, count: number, body: (library: 'cpu' | 'cuda') => void): void {
  const wish = process.env['CUDA_NN_TEST_DEVICE'];
  for (const library of ['cpu', 'cuda'] as const) {
    if (wish !== undefined && wish !== '' && wish !== library) continue;
    const gpu = library === 'cuda' ? findGpu() : undefined;
    if (gpu !== undefined && 'reason' in gpu) {
      process.stderr.write(`skipped: ${count} tests of ${title} on cuda: ${gpu.reason}\n`);
      describe.skip(`${title} on cuda (${count} tests need a GPU: ${gpu.reason})`, () => {
        it(`${count} tests`);
      });
      continue;
    }
    describe(`${title} on ${library}`, () => body(library));
  }
}

/** A case in bf16: near the CPU's float32, to the same bits again, in place where that is allowed, `add` outputs added once. */
export function checkHalf(device: Device, cpu: Device, one: HalfCase): void {
  const result = execute(device, one.half, 'zeros');
  compareHalf(one, result, execute(cpu, one.plain, 'zeros'));
  samePairs(one.half, result);
  sameBits('in run 2', one.half, result, execute(device, one.half, 'zeros'));
  for (const alias of one.half.aliases ?? []) {
    const aliased = { ...one.half, buffers: { [alias[0]]: one.half.buffers[alias[0]]! } };
    sameBits(`when ${alias[0]} is ${alias[1]}`, aliased, result, execute(device, one.half, 'values', alias));
  }
  if (!Object.values(one.half.buffers).some(({ way }) => way === 'add')) return;
  const added = execute(device, one.half, 'values');
  for (const [name, { way, values }] of Object.entries(one.half.buffers)) {
    if (way !== 'add') continue;
    const sum = Float32Array.from(values as Float32Array, (value, i) => value + (result[name] as Float32Array)[i]!);
    compare(`${name} (accumulated)`, added[name]!, sum, EXACT);
  }
}

/** The cases in bf16 on a GPU: with outputs in bf16, and products with outputs in float32. `make` is called where there is a GPU only; it makes about `count`. */
export function describeInBf16(title: string, count: number, make: () => readonly Case[]): void {
  forEachLibrary(`${title} in bf16`, count, (library) => {
    if (library === 'cpu') return;
    let devices: [Device, Device] | undefined;
    before(() => {
      devices = [Device.open({ library, index: 0, threads: 0 }), Device.open({ library: 'cpu', index: 0, threads: 0 })];
    });
    after(() => {
      for (const device of devices ?? []) device.close();
    });
    const known = signatures();
    for (const one of make()) {
      for (const wideOut of [false, true]) {
        const half = inBf16(one, known, wideOut);
        if (half !== undefined) it(`${one.kernel} ${one.sizes}${wideOut ? ', to float32' : ''}`, () => checkHalf(...devices!, half));
      }
    }
  });
}

/** One mocha test for each case and library; on a GPU another in bf16. */
export function describeKernels(title: string, cases: readonly Case[]): void {
  forEachLibrary(title, cases.length, (library) => {
    let devices: Device[] = [];
    before(() => {
      devices = openDevices(library);
    });
    after(() => {
      for (const device of devices) device.close();
    });
    for (const one of cases) {
      if (one.libraries === undefined || one.libraries.includes(library)) it(`${one.kernel} ${one.sizes}`, () => checkCase(devices, one));
    }
  });
  describeInBf16(title, cases.length, () => cases);
}
