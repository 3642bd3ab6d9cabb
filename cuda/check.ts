/**
 * What the generated bindings call: the type codes of nn.h, and the error of a tensor that does not fit. A misfit is a bug of
 * the caller, so it is a plain Error that names kernel, argument, what was wanted and what came. Imports no library.
 */
import { elementBytes } from './tensor.ts';
import type { ComputeType, Tensor } from './tensor.ts';

/** nn_dtype of nn.h. Any other string is a bug. */
export function code(dtype: ComputeType): number {
  if (dtype === 'f32') return 0;
  if (dtype === 'bf16') return 1;
  throw new Error(`${String(dtype)} is no type that kernels compute in: f32 or bf16`);
}

/** Bytes of a tensor; NaN for what is no device memory, so that every comparison with it fails. */
export const bytesOf = (tensor: Tensor): number => tensor.length * elementBytes(tensor.dtype);

/** Throws for an argument that is not device memory, of another type, or too short. */
export function refuse(kernel: string, argument: string, given: unknown, dtype: string, length: number): never {
  const wanted = `${dtype} [${length}]`;
  const tensor = given as Partial<Tensor> | null | undefined;
  let got = String(given);
  if (ArrayBuffer.isView(given)) got = `host memory, ${given.constructor.name} [${(given as Uint8Array).length}]`;
  else if (typeof tensor?.dtype === 'string') got = `${tensor.dtype} [${tensor.length}]`;
  throw new Error(`${kernel}: ${argument} must be ${wanted}, but is ${got}`);
}
