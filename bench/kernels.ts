/**
 * `bench kernels`: the matrix products alone, at a square size and at the demo preset's shapes, each compared with a
 * float64 product at sampled elements before it is timed, as a share of the measured FMA peak. Also gives train.ts the
 * peak and the square product.
 */
import { PRESETS } from '../config/presets.ts';
import { Device } from '../cuda/device.ts';
import type { Tensor } from '../cuda/device.ts';
import { median, provenance, quantile, significant, timeCalls } from './statistics.ts';
import type { Report, Row } from './statistics.ts';

interface KernelOptions {
  readonly threads: number;
  readonly size: number;
}

/** A product C[m, n] = op(A) op(B) of the table, and what it is in the model. */
interface Product {
  readonly name: string;
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly transposeA: 0 | 1;
  readonly transposeB: 0 | 1;
}

/** Largest error of a product over its scale, sqrt(k) times the elements' size: float32 sums stay far below it. */
const TOLERANCE = 1e-5;

const open = (threads: number): Device => Device.open({ library: 'cpu', index: 0, threads });

/** GFLOP/s of `threads` threads that do nothing but fused multiply-adds in registers (nn_peak_flops). */
export function peakGflops(threads: number): number {
  const device = open(threads);
  try {
    return device.peakFlops(0.2) / 1e9;
  } finally {
    device.close();
  }
}

/** Uniform numbers in -0.5 .. 0.5 from a small fixed generator. */
function randomValues(count: number, seed: number): Float32Array {
  let state = seed;
  return Float32Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32 - 0.5;
  });
}

/** The largest relative error at 256 elements spread over C. */
function productError(product: Product, a: Float32Array, b: Float32Array, c: Float32Array): number {
  const { m, n, k, transposeA, transposeB } = product;
  let worst = 0;
  for (let sample = 0; sample < 256; sample++) {
    const row = (sample * 7919) % m;
    const column = (sample * 104729) % n;
    let sum = 0;
    for (let at = 0; at < k; at++) sum += a[transposeA ? at * m + row : row * k + at]! * b[transposeB ? column * k + at : at * n + column]!;
    const error = Math.abs(c[row * n + column]! - sum) / Math.sqrt(k);
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

function measureProduct(device: Device, product: Product, peak: number): Row & { readonly gflops: number; readonly shareOfPeak: number; readonly passed: boolean } {
  const { m, n, k, transposeA, transposeB } = product;
  const a = randomValues(m * k, 1);
  const b = randomValues(k * n, 2);
  const c = new Float32Array(m * n).fill(Number.NaN);
  const tensors: Tensor[] = [device.allocate('f32', m * k), device.allocate('f32', k * n), device.allocate('f32', m * n)];
  const [deviceA, deviceB, deviceC] = tensors as [Tensor, Tensor, Tensor];
  device.upload(deviceA, a);
  device.upload(deviceB, b);
  device.upload(deviceC, c);
  const call = (): void => {
    device.kernels.gemm(deviceC, deviceA, deviceB, m, n, k, transposeA, transposeB, 'f32', 'f32');
    device.synchronize();
  };
  call();
  device.download(c, deviceC);
  const error = productError(product, a, b, c);
  const times = timeCalls(call, 21, 3);
  for (const tensor of tensors) device.free(tensor);
  const gflops = (2 * m * n * k) / median(times) / 1e6;
  return {
    name: product.name, shape: `${m}x${n}x${k}`, error: significant(error, 2), ms: significant(median(times)), p95Ms: significant(quantile(times, 0.95)),
    gflops: significant(gflops), shareOfPeak: significant(gflops / peak, 3), passed: error <= TOLERANCE,
  };
}

/** The product of two square matrices, compared and then timed. */
export function timeSquareProduct(size: number, threads: number): { gflops: number; shareOfPeak: number; passed: boolean } {
  const device = open(threads);
  try {
    return measureProduct(device, { name: 'square', m: size, n: size, k: size, transposeA: 0, transposeB: 0 }, device.peakFlops(0.2) / 1e9);
  } finally {
    device.close();
  }
}

export async function benchKernels(options: KernelOptions): Promise<Report> {
  const { hiddenSize: hidden, vocabSize, ffnSize, headSize, queryHeads, kvHeads } = PRESETS.demo;
  const tokens = 2048;
  const qkv = (queryHeads + 2 * kvHeads) * headSize;
  const slots = (tokens * PRESETS.demo.expertsPerToken) / PRESETS.demo.experts;
  const square = { m: options.size, n: options.size, k: options.size };
  const products: Product[] = [
    { name: 'square', ...square, transposeA: 0, transposeB: 0 },
    { name: 'square, B transposed', ...square, transposeA: 0, transposeB: 1 },
    { name: 'square, A transposed', ...square, transposeA: 1, transposeB: 0 },
    { name: 'qkv', m: tokens, n: qkv, k: hidden, transposeA: 0, transposeB: 1 },
    { name: 'qkv weight gradient', m: qkv, n: hidden, k: tokens, transposeA: 1, transposeB: 0 },
    { name: 'gate and up of one expert', m: slots, n: 2 * ffnSize, k: hidden, transposeA: 0, transposeB: 1 },
    { name: 'down of one expert', m: slots, n: hidden, k: ffnSize, transposeA: 0, transposeB: 1 },
    { name: 'head', m: tokens, n: vocabSize, k: hidden, transposeA: 0, transposeB: 1 },
  ];
  const device = open(options.threads);
  try {
    const peak = device.peakFlops(0.5) / 1e9;
    const rows = products.map((product) => measureProduct(device, product, peak));
    return {
      bench: 'kernels',
      passed: rows.every((row) => row.passed),
      summary: { ...provenance(), isa: device.description.isa ?? null, threads: options.threads, fmaPeakGflops: significant(peak) },
      rows,
    };
  } finally {
    device.close();
  }
}
