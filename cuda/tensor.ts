/**
 * What a piece of device memory looks like from TypeScript: an opaque address with a type and a length. Knows nothing of
 * libraries and devices, and never looks behind an address. Used by the generated bindings, device.ts and whoever calls kernels.
 */

/** Element type of device memory. `u8` is raw bytes. */
export type DType = 'f32' | 'bf16' | 'i32' | 'i64' | 'u64' | 'f64' | 'u16' | 'u8';

/** The types that kernels compute in: nn_dtype of nn.h. */
export type ComputeType = 'f32' | 'bf16';

/** Device memory. `length` counts elements. The address is opaque: only kernels and copies may follow it. */
export interface Tensor {
  readonly address: number;
  readonly dtype: DType;
  readonly length: number;
}

/** Host memory that can be copied from and to a device. */
export type TypedArray = Float32Array | Float64Array | Int32Array | Uint32Array | Uint16Array | Uint8Array | BigInt64Array | BigUint64Array;

const ELEMENT_BYTES = { f32: 4, bf16: 2, i32: 4, i64: 8, u64: 8, f64: 8, u16: 2, u8: 1 } as const satisfies Record<DType, number>;

/** Bytes of one element. */
export const elementBytes = (dtype: DType): number => ELEMENT_BYTES[dtype];

/** Bytes of a whole tensor. */
export const tensorBytes = (tensor: Tensor): number => tensor.length * ELEMENT_BYTES[tensor.dtype];

/** The elements offset .. offset+length-1 of a tensor, as a tensor that shares its memory. Out of bounds is a bug: RangeError. */
export function slice(tensor: Tensor, offset: number, length: number): Tensor {
  if (!(offset >= 0 && length >= 0 && offset + length <= tensor.length && Number.isInteger(offset) && Number.isInteger(length))) {
    throw new RangeError(`slice ${offset} .. ${offset + length} lies outside a tensor of ${tensor.length} elements`);
  }
  return { address: tensor.address + offset * ELEMENT_BYTES[tensor.dtype], dtype: tensor.dtype, length };
}

/** The same memory read as another type, as long as it goes into it. */
export function reinterpret(tensor: Tensor, dtype: DType): Tensor {
  return { address: tensor.address, dtype, length: Math.floor(tensorBytes(tensor) / ELEMENT_BYTES[dtype]) };
}
