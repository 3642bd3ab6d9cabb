/**
 * One flat gradient buffer whose largest parts are stored by the first microbatch that adds to it, so that they are neither zeroed
 * before nor read as zeros. Until then they are stale: they hold what an earlier step left, NaN too. The buffer is private here, so
 * that nobody reads or adds to stale elements: a microbatch is told to store, and everybody else gets the buffer through `whole`,
 * which zeroes them first. Knows neither steps nor shards. Used by the trainer.
 *
 *   clear        the stored parts become stale, the rest zero
 *   microbatch   stale: the parts are stored, the rest is added to | not stale: everything is added to
 *   whole        stale: the parts become zero
 */
import type { Kernels, Tensor } from '../../cuda/device.ts';
import { slice } from '../../cuda/tensor.ts';
import type { ElementRange } from './parameters.ts';

export class Gradient {
  readonly #kernels: Kernels;
  readonly #buffer: Tensor;
  readonly #stored: readonly Tensor[];
  readonly #rest: readonly Tensor[];
  #isStale = false;

  /** Zeroes `buffer` (f32). `stored`: what a microbatch that does not accumulate writes whole, in rising order. */
  constructor(kernels: Kernels, buffer: Tensor, stored: readonly ElementRange[]) {
    const cut = ({ offset, length }: ElementRange): Tensor => slice(buffer, offset, length);
    this.#kernels = kernels;
    this.#buffer = buffer;
    this.#stored = stored.map(cut);
    this.#rest = between(stored, buffer.length).map(cut);
    this.#zero([buffer]);
  }

  /** The gradient is zero from here on. */
  clear(): void {
    this.#isStale = true;
    this.#zero(this.#rest);
  }

  /**
   * Runs a microbatch over this buffer: with accumulate false it must store the stored parts, and add to the rest. When it throws, what
   * was stale still is.
   */
  microbatch<Result>(run: (accumulate: boolean) => Result): Result {
    const result = run(!this.#isStale);
    this.#isStale = false;
    return result;
  }

  /** The buffer with nothing stale in it, to read and to write until the next clear. */
  whole(): Tensor {
    if (this.#isStale) this.#zero(this.#stored);
    this.#isStale = false;
    return this.#buffer;
  }

  #zero(tensors: readonly Tensor[]): void {
    for (const tensor of tensors) this.#kernels.zeroGrad(tensor, tensor.length);
  }
}

/** What lies before, between and after ranges in rising order, of `length` elements in all. */
function between(ranges: readonly ElementRange[], length: number): ElementRange[] {
  const gaps: ElementRange[] = [];
  let end = 0;
  for (const range of [...ranges, { offset: length, length: 0 }]) {
    if (range.offset > end) gaps.push({ offset: end, length: range.offset - end });
    end = range.offset + range.length;
  }
  return gaps;
}
