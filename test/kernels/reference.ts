/**
 * What the kernels of nn.h compute, in plain float64 and as simply as possible: the reference that both native libraries are held
 * to. Knows nothing of devices. Its own backward functions are held to central finite differences of its forward functions in
 * gradient.test.ts. Shape letters as in nn.h. Products, experts and the fused head have files of their own.
 */
export type Numbers = ArrayLike<number>;

const make = (length: number): Float64Array => new Float64Array(length);
const map = (length: number, value: (i: number) => number): Float64Array => Float64Array.from({ length }, (_, i) => value(i));

/** NaN counts when something is compared here, never silently. */
export function softmaxRow(x: Numbers, from: number, n: number): Float64Array {
  let largest = -Infinity;
  for (let i = 0; i < n; i++) largest = x[from + i]! > largest ? x[from + i]! : largest;
  const y = map(n, (i) => Math.exp(x[from + i]! - largest));
  const sum = y.reduce((a, b) => a + b, 0);
  return y.map((value) => value / sum);
}

// ---- elementwise -----------------------------------------------------------------------------------------------------

export const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
export const silu = (x: number): number => x * sigmoid(x);
export const siluSlope = (x: number): number => sigmoid(x) * (1 + x * (1 - sigmoid(x)));

export function swigluForward(gateUp: Numbers, rows: number, F: number): Float64Array {
  return map(rows * F, (i) => {
    const row = Math.floor(i / F) * 2 * F + (i % F);
    return silu(gateUp[row]!) * gateUp[row + F]!;
  });
}

export function swigluBackward(dh: Numbers, gateUp: Numbers, rows: number, F: number): Float64Array {
  const out = make(rows * 2 * F);
  for (let i = 0; i < rows * F; i++) {
    const row = Math.floor(i / F) * 2 * F + (i % F);
    out[row] = dh[i]! * gateUp[row + F]! * siluSlope(gateUp[row]!);
    out[row + F] = dh[i]! * silu(gateUp[row]!);
  }
  return out;
}

// ---- softmax ---------------------------------------------------------------------------------------------------------

export function softmaxForward(x: Numbers, rows: number, columns: number): Float64Array {
  const y = make(rows * columns);
  for (let r = 0; r < rows; r++) y.set(softmaxRow(x, r * columns, columns), r * columns);
  return y;
}

export function softmaxBackward(dy: Numbers, y: Numbers, rows: number, columns: number): Float64Array {
  const dx = make(rows * columns);
  for (let r = 0; r < rows; r++) {
    let dot = 0;
    for (let i = r * columns; i < (r + 1) * columns; i++) dot += dy[i]! * y[i]!;
    for (let i = r * columns; i < (r + 1) * columns; i++) dx[i] = y[i]! * (dy[i]! - dot);
  }
  return dx;
}

export interface Routing {
  probability: Float64Array;
  weight: Float64Array;
  index: Int32Array;
}

/** The K most probable experts in falling order, ties to the lower index; NaN logits first. */
export function softmaxTopkForward(logits: Numbers, T: number, E: number, K: number): Routing {
  const probability = softmaxForward(logits, T, E);
  const weight = make(T * K);
  const index = new Int32Array(T * K);
  for (let t = 0; t < T; t++) {
    const key = (i: number): number => (Number.isNaN(logits[t * E + i]!) ? Infinity : logits[t * E + i]!);
    const order = Array.from({ length: E }, (_, i) => i).sort((a, b) => (key(a) === key(b) ? a - b : key(b) - key(a)));
    const chosen = order.slice(0, K);
    const sum = chosen.reduce((total, i) => total + probability[t * E + i]!, 0);
    for (const [k, i] of chosen.entries()) {
      index[t * K + k] = i;
      weight[t * K + k] = probability[t * E + i]! / sum;
    }
  }
  return { probability, weight, index };
}

export function softmaxTopkBackward(
  dweight: Numbers, probability: Numbers, weight: Numbers, index: Numbers, load: Numbers, T: number, E: number, K: number, auxScale: number,
): Float64Array {
  const dlogits = make(T * E);
  for (let t = 0; t < T; t++) {
    const dp = map(E, (i) => (auxScale * E * (load[i]! / (T * K))) / T);
    let sum = 0;
    let mean = 0;
    for (let k = t * K; k < (t + 1) * K; k++) {
      sum += probability[t * E + index[k]!]!;
      mean += dweight[k]! * weight[k]!;
    }
    for (let k = t * K; k < (t + 1) * K; k++) dp[index[k]!]! += (dweight[k]! - mean) / sum;
    const dot = dp.reduce((total, d, i) => total + d * probability[t * E + i]!, 0);
    for (let i = 0; i < E; i++) dlogits[t * E + i] = probability[t * E + i]! * (dp[i]! - dot);
  }
  return dlogits;
}

// ---- rmsnorm ---------------------------------------------------------------------------------------------------------

export function rmsnormForward(
  x: Numbers, weight: Numbers, T: number, H: number, epsilon: number,
): { y: Float64Array; reciprocal: Float64Array } {
  const reciprocal = map(T, (t) => {
    let sum = 0;
    for (let i = 0; i < H; i++) sum += x[t * H + i]! ** 2;
    return 1 / Math.sqrt(sum / H + epsilon);
  });
  return { reciprocal, y: map(T * H, (i) => x[i]! * reciprocal[Math.floor(i / H)]! * weight[i % H]!) };
}

export function rmsnormBackward(
  dy: Numbers, x: Numbers, reciprocal: Numbers, weight: Numbers, T: number, H: number,
): { dx: Float64Array; dweight: Float64Array } {
  const dx = make(T * H);
  const dweight = make(H);
  for (let t = 0; t < T; t++) {
    const r = reciprocal[t]!;
    let mean = 0;
    for (let i = 0; i < H; i++) mean += (weight[i]! * dy[t * H + i]! * x[t * H + i]!) / H;
    for (let i = 0; i < H; i++) {
      dx[t * H + i] = r * (weight[i]! * dy[t * H + i]! - x[t * H + i]! * r * r * mean);
      dweight[i]! += dy[t * H + i]! * x[t * H + i]! * r;
    }
  }
  return { dx, dweight };
}

// ---- rope ------------------------------------------------------------------------------------------------------------

export function ropeFreqs(positions: number, D: number, base: number, alpha: number): { cosine: Float64Array; sine: Float64Array } {
  const half = D / 2;
  const stretched = alpha === 1 ? base : base * alpha ** (D / (D - 2));
  const angle = (n: number): number => Math.floor(n / half) * stretched ** ((-2 * (n % half)) / D);
  return { cosine: map(positions * half, (n) => Math.cos(angle(n))), sine: map(positions * half, (n) => Math.sin(angle(n))) };
}

/** Rotates the first `heads` heads of rows of `width` elements and copies the rest. */
export function rope(
  x: Numbers, position: Numbers, cosine: Numbers, sine: Numbers, T: number, heads: number, width: number, D: number, direction: number,
): Float64Array {
  const y = Float64Array.from(x);
  const half = D / 2;
  for (let t = 0; t < T; t++) {
    for (let h = 0; h < heads; h++) {
      for (let i = 0; i < half; i++) {
        const at = t * width + h * D + i;
        const c = cosine[position[t]! * half + i]!;
        const s = sine[position[t]! * half + i]! * direction;
        y[at] = x[at]! * c - x[at + half]! * s;
        y[at + half] = x[at + half]! * c + x[at]! * s;
      }
    }
  }
  return y;
}

// ---- attention -------------------------------------------------------------------------------------------------------

export interface AttentionShape {
  B: number;
  S: number;
  Q: number;
  G: number;
  D: number;
}

/** Scaled scores [B, Q, S, S], -Infinity above the diagonal. */
export function attentionScores(qkv: Numbers, { B, S, Q, G, D }: AttentionShape): Float64Array {
  const width = (Q + 2 * G) * D;
  const score = make(B * Q * S * S).fill(-Infinity);
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < Q; h++) {
      const head = Math.floor(h / (Q / G));
      for (let i = 0; i < S; i++) {
        for (let j = 0; j <= i; j++) {
          let sum = 0;
          const q = (b * S + i) * width + h * D;
          const k = (b * S + j) * width + (Q + head) * D;
          for (let d = 0; d < D; d++) sum += qkv[q + d]! * qkv[k + d]!;
          score[((b * Q + h) * S + i) * S + j] = sum / Math.sqrt(D);
        }
      }
    }
  }
  return score;
}

export function attentionOutput(probability: Numbers, qkv: Numbers, { B, S, Q, G, D }: AttentionShape): Float64Array {
  const width = (Q + 2 * G) * D;
  const out = make(B * S * Q * D);
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < Q; h++) {
      const head = Math.floor(h / (Q / G));
      for (let i = 0; i < S; i++) {
        for (let j = 0; j <= i; j++) {
          const p = probability[((b * Q + h) * S + i) * S + j]!;
          const v = (b * S + j) * width + (Q + G + head) * D;
          for (let d = 0; d < D; d++) out[((b * S + i) * Q + h) * D + d]! += p * qkv[v + d]!;
        }
      }
    }
  }
  return out;
}

export interface AttentionResult {
  out: Float64Array;
  logSumExp: Float64Array;
  probability: Float64Array;
}

export function attention(qkv: Numbers, shape: AttentionShape): AttentionResult {
  const { B, S, Q } = shape;
  const score = attentionScores(qkv, shape);
  const probability = softmaxForward(score, B * Q * S, S);
  const logSumExp = map(B * Q * S, (row) => {
    let largest = -Infinity;
    for (let j = 0; j < S; j++) largest = Math.max(largest, score[row * S + j]!);
    let sum = 0;
    for (let j = 0; j < S; j++) sum += Math.exp(score[row * S + j]! - largest);
    return largest + Math.log(sum);
  });
  return { out: attentionOutput(probability, qkv, shape), logSumExp, probability };
}

export function attentionBackward(dout: Numbers, qkv: Numbers, shape: AttentionShape): Float64Array {
  const { B, S, Q, G, D } = shape;
  const width = (Q + 2 * G) * D;
  const { probability, out } = attention(qkv, shape);
  const dqkv = make(B * S * width);
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < Q; h++) {
      const head = Math.floor(h / (Q / G));
      for (let i = 0; i < S; i++) {
        const row = ((b * S + i) * Q + h) * D;
        const q = (b * S + i) * width + h * D;
        let delta = 0;
        for (let d = 0; d < D; d++) delta += dout[row + d]! * out[row + d]!;
        for (let j = 0; j <= i; j++) {
          const p = probability[((b * Q + h) * S + i) * S + j]!;
          const k = (b * S + j) * width + (Q + head) * D;
          const v = k + G * D;
          let dp = 0;
          for (let d = 0; d < D; d++) dp += dout[row + d]! * qkv[v + d]!;
          const ds = (p * (dp - delta)) / Math.sqrt(D);
          for (let d = 0; d < D; d++) {
            dqkv[q + d]! += ds * qkv[k + d]!;
            dqkv[k + d]! += ds * qkv[q + d]!;
            dqkv[v + d]! += p * dout[row + d]!;
          }
        }
      }
    }
  }
  return dqkv;
}

/** Attention of S queries for each sequence over its cache [B, C, G*D]; query (b, i) sees positions 0 .. start[b] + i. */
export function attentionCached(
  qkv: Numbers, keyCache: Numbers, valueCache: Numbers, start: Numbers, { B, S, Q, G, D }: AttentionShape, C: number,
): Float64Array {
  const out = make(B * S * Q * D);
  for (let b = 0; b < B; b++) {
    for (let i = 0; i < S; i++) {
      for (let h = 0; h < Q; h++) {
        const head = Math.floor(h / (Q / G));
        const q = (b * S + i) * (Q + 2 * G) * D + h * D;
        const count = start[b]! + i + 1;
        const at = (j: number): number => (b * C + j) * G * D + head * D;
        const score = map(count, (j) => {
          let sum = 0;
          for (let d = 0; d < D; d++) sum += qkv[q + d]! * keyCache[at(j) + d]!;
          return sum / Math.sqrt(D);
        });
        const p = softmaxRow(score, 0, count);
        for (let j = 0; j < count; j++) for (let d = 0; d < D; d++) out[((b * S + i) * Q + h) * D + d]! += p[j]! * valueCache[at(j) + d]!;
      }
    }
  }
  return out;
}

// ---- loss ------------------------------------------------------------------------------------------------------------

export const IGNORED = -100;

export function crossEntropyForward(logits: Numbers, target: Numbers, T: number, V: number): Float64Array {
  return map(T, (t) => {
    if (target[t] === IGNORED) return 0;
    if (!(target[t]! >= 0 && target[t]! < V)) return NaN;
    let largest = -Infinity;
    for (let i = 0; i < V; i++) largest = Math.max(largest, logits[t * V + i]!);
    let sum = 0;
    for (let i = 0; i < V; i++) sum += Math.exp(logits[t * V + i]! - largest);
    return Math.log(sum) + largest - logits[t * V + target[t]!]!;
  });
}

export function crossEntropyBackward(logits: Numbers, target: Numbers, T: number, V: number, scale: number): Float64Array {
  const dlogits = softmaxForward(logits, T, V);
  for (let t = 0; t < T; t++) {
    const valid = target[t]! >= 0 && target[t]! < V;
    for (let i = 0; i < V; i++) {
      const at = t * V + i;
      if (target[t] === IGNORED) dlogits[at] = 0;
      else if (valid) dlogits[at] = scale * (dlogits[at]! - Number(i === target[t]));
      else dlogits[at] = NaN;
    }
  }
  return dlogits;
}

export function auxLoss(probability: Numbers, load: Numbers, T: number, E: number, K: number): number {
  if (T === 0) return 0;
  let total = 0;
  for (let i = 0; i < E; i++) {
    let mean = 0;
    for (let t = 0; t < T; t++) mean += probability[t * E + i]! / T;
    total += (load[i]! / (T * K)) * mean;
  }
  return E * total;
}

// ---- embedding and optimizer -----------------------------------------------------------------------------------------

export function embeddingForward(token: Numbers, table: Numbers, T: number, H: number, V: number): Float64Array {
  return map(T * H, (i) => {
    const row = token[Math.floor(i / H)]!;
    return row >= 0 && row < V ? table[row * H + (i % H)]! : NaN;
  });
}

export function scatterAdd(dtable: Numbers, dy: Numbers, token: Numbers, T: number, H: number, V: number): Float64Array {
  const sum = make(V * H);
  for (let t = 0; t < T; t++) {
    if (token[t]! >= 0 && token[t]! < V) for (let i = 0; i < H; i++) sum[token[t]! * H + i]! += dy[t * H + i]!;
  }
  return sum.map((value, i) => dtable[i]! + value);
}

/** The order that nn.h states for nn_grad_norm, followed to the bit: chunks of 4096, 64 lanes, halves, again over the sums. */
export function orderedSum(x: Numbers): number {
  const sums: number[] = [];
  for (let begin = 0; begin < x.length; begin += 4096) {
    const lane = make(64);
    for (let i = begin; i < Math.min(begin + 4096, x.length); i++) lane[(i - begin) % 64]! += x[i]!;
    for (let half = 32; half >= 1; half /= 2) for (let l = 0; l < half; l++) lane[l]! += lane[l + half]!;
    sums.push(lane[0]!);
  }
  return sums.length === 0 ? 0 : sums.length === 1 ? sums[0]! : orderedSum(sums);
}

/** base^exponent by squaring from the lowest bit on, as nn_random.h states. */
export function power(base: number, exponent: number): number {
  let result = 1;
  for (let left = exponent; left > 0; left = Math.floor(left / 2)) {
    if (left % 2 === 1) result *= base;
    base *= base;
  }
  return result;
}

export interface AdamwScalars {
  beta1: number;
  beta2: number;
  epsilon: number;
  decay: number;
  rate: number;
  step: number;
  clip: number;
}

const f = Math.fround;

/** float32 to the bits of bfloat16, to nearest, ties to even; a NaN stays one. */
export function bf16Bits(x: number): number {
  const bits = new Uint32Array(new Float32Array([x]).buffer)[0]!;
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >>> 16) | 0x40;
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

export const bf16Value = (bits: number): number => new Float32Array(new Uint32Array([bits << 16]).buffer)[0]!;

/** Everything that rounding to bfloat16 and back must get right: ties, overflow, denormals, infinities, NaN with any payload. */
export const SPECIAL_BITS = Uint32Array.from([
  0x3f800000, 0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0x7f7fffff, 0x7f7f8000, 0x00000001, 0x00008000, 0x00018000, 0x80000000,
  0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xff800001, 0x7fffffff, 0xffffffff,
]);

/** The halves of a float32's bits: cut off after 16 bits and one up from the middle on, which is to nearest, ties away from zero. */
export function halves(bits: number): { high: number; low: number } {
  const isNaN = (bits & 0x7fffffff) > 0x7f800000;
  const [top, low] = isNaN ? [0x7fc0, 0] : [bits >>> 16, bits & 0xffff];
  return { high: (top + Number(low >= 0x8000)) & 0xffff, low };
}

/** AdamW to the bit: every operation rounded to float32 in the order that nn.h states. m and v as float32 values. */
export function adamw(p: number, m: number, v: number, gradient: number, s: AdamwScalars): { p: number; m: number; v: number } {
  const [beta1, beta2, rate] = [f(s.beta1), f(s.beta2), f(s.rate)];
  const inverse1 = f(1 / (1 - power(s.beta1, s.step)));
  const inverse2 = f(1 / (1 - power(s.beta2, s.step)));
  const g = f(gradient * f(s.clip));
  const nextM = f(f(m * beta1) + f(g * f(1 - s.beta1)));
  const nextV = f(f(v * beta2) + f(f(g * g) * f(1 - s.beta2)));
  const decayed = f(p - f(f(s.rate * s.decay) * p));
  const change = f(f(f(nextM * inverse1) * rate) / f(f(Math.sqrt(f(nextV * inverse2))) + f(s.epsilon)));
  return { p: f(decayed - change), m: nextM, v: nextV };
}
