/** bfloat16 on the host: how bf16 device memory is read and written as float32. Pure. */

/** Widens bf16 bits to float32, exactly. */
export function fromBfloat16(into: Float32Array, from: Uint16Array): void {
  const bits = new Uint32Array(into.buffer, into.byteOffset, into.length);
  for (let i = 0; i < from.length; i++) bits[i] = from[i]! << 16;
}

/** Rounds float32 to bf16 bits, to nearest, ties to even; a NaN stays one. */
export function toBfloat16(into: Uint16Array, from: Float32Array): void {
  const bits = new Uint32Array(from.buffer, from.byteOffset, from.length);
  for (let i = 0; i < from.length; i++) {
    const word = bits[i]!;
    const isNaN = (word & 0x7fffffff) > 0x7f800000;
    into[i] = isNaN ? (word >>> 16) | 0x40 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16;
  }
}
