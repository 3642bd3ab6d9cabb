/**
 * One allocation with a memory plan laid over it: hands out the plan's buffers as tensors. Refuses before it allocates, with
 * the bytes needed and the bytes there. Knows nothing of what the buffers mean. Called by the trainer and the decoder.
 */
import { NnError } from '../../config/errors.ts';
import type { Device, Tensor } from '../../cuda/device.ts';
import type { MemoryPlan } from './plan.ts';

const gigabytes = (bytes: number): string => (bytes >= 1e8 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(1)} MB`);

export class Arena {
  readonly #device: Device;
  readonly #plan: MemoryPlan;
  readonly #memory: Tensor;

  /** Throws DEVICE_MEMORY, having allocated nothing, when the plan does not fit into what the device has free. `advice`: how to need less. */
  constructor(device: Device, plan: MemoryPlan, advice: string) {
    const there = device.freeBytes();
    if (plan.totalBytes > there) {
      const parts = Object.entries(plan.bytes).filter(([, bytes]) => bytes > 0).map(([kind, bytes]) => `${kind} ${gigabytes(bytes)}`);
      const { name } = device.description;
      throw new NnError(
        'DEVICE_MEMORY',
        `${gigabytes(plan.totalBytes)} are needed (${parts.join(', ')}), but ${name} has ${gigabytes(there)} free; ${advice}`,
        { neededBytes: plan.totalBytes, freeBytes: there },
      );
    }
    this.#device = device;
    this.#plan = plan;
    this.#memory = device.allocate('u8', plan.totalBytes);
  }

  /** Bytes of the whole plan. */
  get bytes(): number {
    return this.#plan.totalBytes;
  }

  has(name: string): boolean {
    return this.#plan.buffers.has(name);
  }

  /** The buffer of that name. A name that is not planned is a bug. */
  tensor(name: string): Tensor {
    const buffer = this.#plan.buffers.get(name);
    if (buffer === undefined) throw new Error(`the memory plan has no buffer ${name}`);
    return { address: this.#memory.address + buffer.offset, dtype: buffer.dtype, length: buffer.length };
  }

  /** All activations as one float32 tensor: a place to stage copies between steps. */
  staging(): Tensor {
    const bytes = this.#plan.bytes.activations;
    return { address: this.#memory.address + this.#plan.totalBytes - bytes, dtype: 'f32', length: Math.floor(bytes / 4) };
  }

  free(): void {
    this.#device.free(this.#memory);
  }
}
