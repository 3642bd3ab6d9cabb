/**
 * cuda/include/nn_random.h once more, in TypeScript: BigInt for the integers and plain float64 for the rest, which gives the same
 * bits because both use IEEE operations only. Written from the formulas in the header's comments; the oracle of the generator's,
 * digest's and sampling tests.
 */
const MASK_64 = (1n << 64n) - 1n;
const MASK_32 = 0xffffffffn;

export function mix64(z: bigint): bigint {
  z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK_64;
  z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & MASK_64;
  return z ^ (z >> 31n);
}

/** nn_digest of 32-bit words. */
export function digest(words: Uint32Array): [bigint, bigint] {
  const term = (word: number, i: number, stride: bigint): bigint => mix64((BigInt(word) + BigInt(i + 1) * stride) & MASK_64);
  const sum = (stride: bigint): bigint => words.reduce((total, word, i) => (total + term(word, i, stride)) & MASK_64, 0n);
  return [sum(0x9e3779b97f4a7c15n), sum(0xd1b54a32d192ed03n)];
}

/** Philox 4x32-10 on four counter words and two key words. */
export function philox(counter: readonly bigint[], key: readonly bigint[]): bigint[] {
  let [c0, c1, c2, c3] = counter as [bigint, bigint, bigint, bigint];
  let [k0, k1] = key as [bigint, bigint];
  for (let round = 0; round < 10; round++) {
    const p0 = 0xd2511f53n * c0;
    const p1 = 0xcd9e8d57n * c2;
    [c0, c1, c2, c3] = [(p1 >> 32n) ^ c1 ^ k0, p1 & MASK_32, (p0 >> 32n) ^ c3 ^ k1, p0 & MASK_32];
    k0 = (k0 + 0x9e3779b9n) & MASK_32;
    k1 = (k1 + 0xbb67ae85n) & MASK_32;
  }
  return [c0, c1, c2, c3];
}

function randomBits(seed: bigint, stream: bigint, index: bigint): bigint {
  const half = index >> 1n;
  const word = philox([half & MASK_32, half >> 32n, stream & MASK_32, stream >> 32n], [seed & MASK_32, seed >> 32n]);
  return index & 1n ? (word[3]! << 32n) | word[2]! : (word[1]! << 32n) | word[0]!;
}

/** In [0, 1). */
export const uniform = (seed: bigint, stream: bigint, index: bigint): number => Number(randomBits(seed, stream, index) >> 11n) * 2 ** -53;

function ieeeLog(x: number): number {
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, x);
  let bits = view.getBigUint64(0);
  let k = Number(bits >> 52n) - 1023;
  bits = (bits & 0x000fffffffffffffn) | 0x3ff0000000000000n;
  if (bits >= 0x3ff6a09e667f3bcdn) {
    bits -= 0x0010000000000000n;
    k += 1;
  }
  view.setBigUint64(0, bits);
  const m = view.getFloat64(0) - 1;
  const s = m / (2 + m);
  const z = s * s;
  const w = z * z;
  const odd = z * (0.6666666666666735 + w * (0.2857142874366239 + w * (0.1818357216161805 + w * 0.14798198605116586)));
  const r = w * (0.3999999999940942 + w * (0.22222198432149784 + w * 0.15313837699209373)) + odd;
  const half = 0.5 * m * m;
  return k * 0.6931471803691238 - (half - (s * (half + r) + k * 1.9082149292705877e-10) - m);
}

/** Coefficients of algorithm AS 241, highest power first. */
const CENTRE = [
  [2509.0809287301227, 33430.57558358813, 67265.7709270087, 45921.95393154987, 13731.69376550946,
    1971.5909503065513, 133.14166789178438, 3.3871328727963665],
  [5226.495278852854, 28729.085735721943, 39307.89580009271, 21213.794301586597, 5394.196021424751,
    687.1870074920579, 42.31333070160091, 1],
] as const;
const TAIL = [
  [0.0007745450142783414, 0.022723844989269184, 0.2417807251774506, 1.2704582524523684, 3.6478483247632045,
    5.769497221460691, 4.630337846156546, 1.4234371107496835],
  [1.0507500716444169e-9, 0.0005475938084995345, 0.015198666563616457, 0.14810397642748008, 0.6897673349851,
    1.6763848301838038, 2.053191626637759, 1],
] as const;
const FAR_TAIL = [
  [2.0103343992922881e-7, 0.000027115555687434876, 0.0012426609473880784, 0.026532189526576124, 0.29656057182850487,
    1.7848265399172913, 5.463784911164114, 6.657904643501103],
  [2.0442631033899397e-15, 1.421511758316446e-7, 0.000018463183175100548, 0.0007868691311456133, 0.014875361290850615,
    0.1369298809227358, 0.599832206555888, 1],
] as const;

const rational = ([top, bottom]: readonly (readonly number[])[], r: number): [number, number] => {
  const horner = (coefficients: readonly number[]): number => coefficients.reduce((sum, c) => sum * r + c);
  return [horner(top!), horner(bottom!)];
};

/** The quantile function of the standard normal distribution. */
export function normalQuantile(p: number): number {
  const q = p - 0.5;
  if (Math.abs(q) <= 0.425) {
    const [top, bottom] = rational(CENTRE, 0.180625 - q * q);
    return (q * top) / bottom;
  }
  const r = Math.sqrt(-ieeeLog(q < 0 ? p : 1 - p));
  const [top, bottom] = r <= 5 ? rational(TAIL, r - 1.6) : rational(FAR_TAIL, r - 5);
  return q < 0 ? -(top / bottom) : top / bottom;
}

/** z(seed, stream, index) of nn_random_normal. */
export function normal(seed: bigint, stream: bigint, index: bigint): number {
  return normalQuantile((Number(randomBits(seed, stream, index) >> 12n) + 0.5) * 2 ** -52);
}
