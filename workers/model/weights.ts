/**
 * The float32 master weights of a trainer, however they lie in memory: float32 themselves, or the two 16-bit halves of nn_split,
 * of which the high ones are the bf16 weights that kernels compute with. Whichever it is, what is read, written and digested is the
 * float32 values. Knows neither parameters nor optimizers nor the order of a step. Used by the trainer.
 *
 *   fp32   master  f32 [flat]                       kernels compute with master
 *   bf16   compute bf16 [flat], residue u16 [flat]  kernels compute with compute
 */
import type { Precision } from '../../config/run-spec.ts';
import { reinterpret, slice } from '../../cuda/device.ts';
import type { Device, Tensor } from '../../cuda/device.ts';
import type { Arena } from './arena.ts';
import type { ElementRange } from './parameters.ts';

export interface MasterWeights {
  /** What kernels compute with, f32 or bf16 [flat]. */
  readonly compute: Tensor;
  /** A range as nn_adamw_step takes it. */
  range(range: ElementRange): { readonly parameter: Tensor; readonly residue: Tensor | null };
  /** Elements offset .. offset+into.length-1. Waits for the device. */
  read(offset: number, into: Float32Array): void;
  write(offset: number, from: Float32Array): void;
  /** Draws a whole range from Normal(0, deviation): element i of it from (seed, stream, i). */
  draw(range: ElementRange, seed: number, stream: number, deviation: number): void;
  /** All elements, padding too, become zero. */
  clear(): void;
  /** nn_digest of all elements, padding too, into u64 [2]. */
  digest(digest: Tensor): void;
}

/** The weights of an arena that was planned for `precision`. Their content is not yet defined. */
export function masterWeights(device: Device, arena: Arena, precision: Precision): MasterWeights {
  return precision === 'bf16' ? new Halves(device, arena) : new Whole(device, arena.tensor('master'));
}

class Whole implements MasterWeights {
  readonly compute: Tensor;
  readonly #device: Device;

  constructor(device: Device, master: Tensor) {
    this.#device = device;
    this.compute = master;
  }

  range({ offset, length }: ElementRange): { parameter: Tensor; residue: null } {
    return { parameter: slice(this.compute, offset, length), residue: null };
  }

  read(offset: number, into: Float32Array): void {
    this.#device.download(into, slice(this.compute, offset, into.length));
  }

  write(offset: number, from: Float32Array): void {
    this.#device.upload(slice(this.compute, offset, from.length), from);
  }

  draw({ offset, length }: ElementRange, seed: number, stream: number, deviation: number): void {
    this.#device.kernels.randomNormal(slice(this.compute, offset, length), length, seed, stream, 0, deviation);
  }

  clear(): void {
    this.#device.kernels.zeroGrad(this.compute, this.compute.length);
  }

  digest(digest: Tensor): void {
    this.#device.kernels.digest(digest, this.compute, this.compute.length);
  }
}

/** Float32 values pass through the arena's staging memory, so these calls belong between microbatches; the stream keeps them in order. */
class Halves implements MasterWeights {
  readonly compute: Tensor;
  readonly #residue: Tensor;
  readonly #staging: Tensor;
  readonly #device: Device;

  constructor(device: Device, arena: Arena) {
    this.#device = device;
    this.compute = arena.tensor('compute');
    this.#residue = arena.tensor('residue');
    this.#staging = arena.staging();
  }

  range({ offset, length }: ElementRange): { parameter: Tensor; residue: Tensor } {
    return { parameter: slice(this.compute, offset, length), residue: slice(this.#residue, offset, length) };
  }

  read(offset: number, into: Float32Array): void {
    this.#inPieces({ offset, length: into.length }, ({ parameter, residue }, start, length) => {
      this.#device.kernels.join(this.#staging, parameter, residue, length);
      this.#device.download(into.subarray(start, start + length), this.#staging);
    });
  }

  write(offset: number, from: Float32Array): void {
    this.#inPieces({ offset, length: from.length }, ({ parameter, residue }, start, length) => {
      this.#device.upload(this.#staging, from.subarray(start, start + length));
      this.#device.kernels.split(parameter, residue, this.#staging, length);
    });
  }

  draw(range: ElementRange, seed: number, stream: number, deviation: number): void {
    this.#inPieces(range, ({ parameter, residue }, start, length) => {
      this.#device.kernels.randomNormal(this.#staging, length, seed, stream, start, deviation);
      this.#device.kernels.split(parameter, residue, this.#staging, length);
    });
  }

  clear(): void {
    // Both halves of zero are zero, and a flat buffer is a whole number of words.
    for (const half of [this.compute, this.#residue]) {
      const words = reinterpret(half, 'f32');
      this.#device.kernels.zeroGrad(words, words.length);
    }
  }

  digest(digest: Tensor): void {
    this.#device.kernels.digestHalves(digest, this.compute, this.#residue, this.compute.length);
  }

  /** Calls `work` for pieces of a range that fit the staging memory; `start` counts from the range's first element. */
  #inPieces({ offset, length }: ElementRange, work: (piece: { parameter: Tensor; residue: Tensor }, start: number, length: number) => void): void {
    for (let start = 0; start < length; start += this.#staging.length) {
      const count = Math.min(this.#staging.length, length - start);
      work(this.range({ offset: offset + start, length: count }), start, count);
    }
  }
}
