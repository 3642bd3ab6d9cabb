/**
 * The cases of the kernel tables in bf16: every tensor that nn.h says to have the type `dtype` is rounded to bf16, the kernel is asked for
 * bf16, and what comes out is held to the CPU library in float32 on the same rounded numbers, which the same tables hold to float64. So
 * what is measured is the kernel's rounding and not that of its inputs. Knows no kernel but by nn.h. Used by harness.ts on a GPU.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { packageRoot } from '../../config/schema.ts';
import type { Kernels, Tensor, TypedArray } from '../../cuda/device.ts';
import type { Case, CaseBuffer } from './harness.ts';

/** Arguments of a kernel by their place in a call: pointers that have the type `dtype` or `out_dtype`, and those two themselves. */
export interface Signature {
  readonly dtype: number;
  readonly outDtype: number;
  readonly half: readonly number[];
  readonly out: readonly number[];
}

const camel = (name: string): string => name.replace(/^nn_/, '').replaceAll(/_(\w)/g, (_, letter: string) => letter.toUpperCase());

/** Reads nn.h: every kernel that computes in a type that it is told, under its name in `Kernels`. */
export function signatures(header = readFileSync(join(packageRoot(), 'cuda', 'include', 'nn.h'), 'utf8')): Map<string, Signature> {
  const found = new Map<string, Signature>();
  for (const [, name, body] of header.matchAll(/NN_API nn_status (nn_\w+)\(([^;]*)\);/g)) {
    const parameters = body!.split('\n').flatMap((line) => {
      const [declarations, comment = ''] = line.split('//') as [string, string?];
      return declarations.split(',').map((part) => part.trim()).filter(Boolean).map((part) => ({ name: /\w+$/.exec(part)![0], type: /^\s*\w+ (\w+)/.exec(comment)?.[1] }));
    });
    const [context, ...given] = parameters;
    if (context?.name !== 'context') continue;
    const places = (type: string): number[] => given.flatMap((parameter, at) => (parameter.type === type ? [at] : []));
    const place = (wanted: string): number => given.findIndex((parameter) => parameter.name === wanted);
    if (place('dtype') >= 0) found.set(camel(name!), { dtype: place('dtype'), outDtype: place('out_dtype'), half: places('dtype'), out: places('out_dtype') });
  }
  return found;
}

/** These say their types themselves, and are in the tables in both. */
const SPELT_OUT = new Set(['cast', 'adamwStep']);

/** A case in bf16, with the buffers that bf16 is in; undefined for a kernel without a type, and for numbers that bf16 has another way. */
export interface HalfCase {
  /** In float32, on rounded numbers: the reference's. */
  readonly plain: Case;
  /** In bf16. */
  readonly half: Case;
  /** Buffers that are bf16 in `half`. */
  readonly names: ReadonlySet<string>;
}

const WORD = new Float32Array(1);
const BITS = new Uint32Array(WORD.buffer);

/** Round to nearest even, of finite numbers. */
function bf16Bits(value: number): number {
  WORD[0] = value;
  const bits = BITS[0]!;
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}
function bf16Value(bits: number): number {
  BITS[0] = bits << 16;
  return WORD[0]!;
}
/** A float32 buffer as bf16, and as the float32 numbers that those are. */
function halves(values: TypedArray): Uint16Array {
  const bits = new Uint16Array(values.length);
  for (let i = 0; i < bits.length; i++) bits[i] = bf16Bits(values[i] as number);
  return bits;
}
function rounded(values: TypedArray): Float32Array {
  const numbers = new Float32Array(values.length);
  for (let i = 0; i < numbers.length; i++) numbers[i] = bf16Value(bf16Bits(values[i] as number));
  return numbers;
}

/** Derives both. `wideOut`: an output of the type `out_dtype` stays float32. */
export function inBf16(one: Case, known: ReadonlyMap<string, Signature>, wideOut: boolean): HalfCase | undefined {
  if (/infinit|NaN|every kind|largest/.test(one.sizes)) return undefined;
  const names = new Set<string>();
  let typed = false;
  let hasOut = false;
  const tokens = Object.fromEntries(Object.entries(one.buffers).map(([name, { dtype, values }]) => [name, { name, address: 0, dtype, length: values.length } as Tensor]));
  const listen = new Proxy({}, {
    get: (_, method) => (...values: unknown[]): void => {
      const signature = known.get(String(method));
      if (signature === undefined || SPELT_OUT.has(String(method))) return;
      typed = true;
      const mark = (at: number): void => {
        const token = values[at] as { name: string } | null;
        if (token !== null) names.add(token.name);
      };
      for (const at of signature.half) mark(at);
      hasOut ||= signature.out.length > 0;
      if (!wideOut) for (const at of signature.out) mark(at);
    },
  }) as Kernels;
  one.run(listen, tokens);
  if (!typed || (wideOut && !hasOut)) return undefined;
  // bf16 is added to in float32 only: nn.h's `add` outputs, and a product's own C, are float32.
  if ([...names].some((name) => ['add', 'inout'].includes(one.buffers[name]!.way) && hasOut)) return undefined;
  const buffers = (change: (buffer: CaseBuffer) => CaseBuffer): Case['buffers'] =>
    Object.fromEntries(Object.entries(one.buffers).map(([name, buffer]) => [name, names.has(name) ? change(buffer) : buffer]));
  const aliases = one.aliases?.filter(([a, b]) => names.has(a) === names.has(b));
  const same = { ...one, ...(aliases === undefined ? {} : { aliases }) };
  return {
    names,
    plain: { ...same, buffers: buffers((buffer) => ({ ...buffer, values: rounded(buffer.values) })) },
    half: {
      ...same,
      buffers: buffers((buffer) => ({ ...buffer, dtype: 'bf16', values: halves(buffer.values) })),
      run: (kernels, tensors) => one.run(asking(kernels, known, wideOut), tensors),
    },
  };
}

/** The kernels, asked for bf16 wherever a case says f32. */
function asking(kernels: Kernels, known: ReadonlyMap<string, Signature>, wideOut: boolean): Kernels {
  return new Proxy(kernels, {
    get: (target, method) => (...values: unknown[]): unknown => {
      const signature = known.get(String(method));
      const given = signature === undefined || SPELT_OUT.has(String(method)) ? values : values.map((value, at) => (at === signature.dtype || (at === signature.outDtype && !wideOut) ? 'bf16' : value));
      return (Reflect.get(target, method) as (...all: unknown[]) => unknown).apply(target, given);
    },
  });
}

/** ||got - want|| / ||want|| that a bf16 kernel may have: its products round their results, and some values on the way, to 8 bits. */
export const BF16_TOLERANCE = 2e-2;
/** Where it is more, and why: the logits on the way are bf16, those of 60 are off by up to 0.12, and so is the log of their softmax. */
const LOOSE: Readonly<Record<string, number>> = { linear_cross_entropy: 0.15 };

/** Floats of a buffer as the numbers they are. */
const valuesOf = (buffer: TypedArray): readonly number[] =>
  buffer instanceof Uint16Array ? Array.from(buffer, bf16Value) : Array.from(buffer as Float32Array, Number);

/** Throws where an output is too far from the reference, names how far, or not finite where that is, or another integer. */
export function compareHalf(one: HalfCase, got: Readonly<Record<string, TypedArray>>, want: Readonly<Record<string, TypedArray>>): void {
  const tolerance = LOOSE[one.half.kernel] ?? BF16_TOLERANCE;
  for (const [name, { way, dtype }] of Object.entries(one.half.buffers)) {
    if (way === 'in') continue;
    const [a, b] = [valuesOf(got[name]!), valuesOf(want[name]!)];
    let [difference, norm] = [0, 0];
    for (const [i, wanted] of b.entries()) {
      const value = a[i]!;
      if (!['bf16', 'f32', 'f64'].includes(dtype) || !Number.isFinite(wanted)) {
        if (!Object.is(value, wanted)) throw new Error(`${name}[${i}] is ${value}, must be ${wanted}`);
        continue;
      }
      if (!Number.isFinite(value)) throw new Error(`${name}[${i}] is ${value}, must be about ${wanted}`);
      difference += (value - wanted) ** 2;
      norm += wanted ** 2;
    }
    const error = Math.sqrt(difference) / (norm === 0 ? 1 : Math.sqrt(norm));
    if (!(error <= tolerance)) throw new Error(`${name} is off by ${error.toExponential(2)} of its norm, allowed ${tolerance}`);
  }
}
