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
  const sum = (stride: bigint): bigint => words.reduce((total, word, i) => (total + mix64((BigInt(word) + BigInt(i + 1) * stride) & MASK_64)) & MASK_64, 0n);
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
  const odd = z * (6.66666666666673513e-1 + w * (2.857142874366239149e-1 + w * (1.818357216161805012e-1 + w * 1.479819860511658591e-1)));
  const r = w * (3.999999999940941908e-1 + w * (2.222219843214978396e-1 + w * 1.531383769920937332e-1)) + odd;
  const half = 0.5 * m * m;
  return k * 6.9314718036912381649e-1 - (half - (s * (half + r) + k * 1.90821492927058770002e-10) - m);
}

/** Coefficients of algorithm AS 241, highest power first. */
const CENTRE = [
  [2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4, 1.3731693765509461125e4,
    1.9715909503065514427e3, 1.3314166789178437745e2, 3.387132872796366608],
  [5.226495278852854561e3, 2.8729085735721942674e4, 3.930789580009271061e4, 2.1213794301586595867e4, 5.3941960214247511077e3,
    6.871870074920579083e2, 4.2313330701600911252e1, 1],
] as const;
const TAIL = [
  [7.7454501427834140764e-4, 2.27238449892691845833e-2, 2.4178072517745061177e-1, 1.27045825245236838258, 3.64784832476320460504,
    5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734],
  [1.05075007164441684324e-9, 5.475938084995344946e-4, 1.51986665636164571966e-2, 1.4810397642748007459e-1, 6.8976733498510000455e-1,
    1.6763848301838038494, 2.05319162663775882187, 1],
] as const;
const FAR_TAIL = [
  [2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.2426609473880784386e-3, 2.6532189526576123093e-2, 2.9656057182850489123e-1,
    1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772],
  [2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4, 1.48753612908506148525e-2,
    1.3692988092273580531e-1, 5.9983220655588793769e-1, 1],
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
