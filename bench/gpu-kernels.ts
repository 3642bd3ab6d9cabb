/**
 * `bench kernels --device cuda:N`: every kernel of a training step and of a decoding step at a preset's sizes in bf16. Each is first
 * held to the CPU library in float32, on the same random inputs and few tokens, then timed with the device's events, as TFLOP/s
 * or GB/s and as the share of the floor that the two ceilings of the same run set. A peer's figures are matched by name and shape.
 * Shape letters: workers/model/sizes.ts.
 */
import { Device, slice } from '../cuda/device.ts';
import type { Kernels, Tensor } from '../cuda/device.ts';
import { sizesOf } from '../workers/model/sizes.ts';
import type { Sizes } from '../workers/model/sizes.ts';
import { measureCeilings, parseDevice, peerFigures, presetOf, timeOnDevice } from './gpu.ts';
import type { Ceilings } from './gpu.ts';
import { median, provenance, quantile, significant } from './statistics.ts';
import type { Report, Row } from './statistics.ts';

export interface GpuKernelOptions {
  readonly device: string;
  readonly preset: string;
  readonly sequences: number;
  readonly sequenceLength: number;
  readonly peer?: string | undefined;
}

/** A buffer: 'x' has the compute type. `normal`: random with that deviation; `zero`; or integers from the host. */
interface Buffer {
  readonly dtype: 'x' | 'f32' | 'i32' | 'f64' | 'u16';
  readonly length: number;
  readonly normal?: number;
  readonly values?: Int32Array | Float32Array | Float64Array | Uint16Array;
}

interface Entry {
  readonly name: string;
  readonly shape: string;
  readonly buffers: Readonly<Record<string, Buffer>>;
  /** Run once before the kernel, for instance the sort of the slots. */
  readonly prepare?: (kernels: Kernels, t: Record<string, Tensor>) => void;
  readonly run: (kernels: Kernels, t: Record<string, Tensor>, dtype: 'f32' | 'bf16') => void;
  readonly outputs: readonly string[];
  readonly flops: number;
  /** Each input read once, each output written once. */
  readonly bytes: number;
}

/** ||got - want|| / ||want||: bf16 rounds results, and probabilities and SwiGLU's values on the way, to 8 bits. */
const TOLERANCE = 2e-2;
/** Tokens and sequence length of the comparison: so many slots that gathered rows are packed, as they are at the size that is timed. */
const COMPARED = { B: 2, S: 288 };
/** Tokens that a decoding step sees. */
const STEP_CONTEXT = 1024;

const x = (length: number, normal?: number): Buffer => ({ dtype: 'x', length, ...(normal === undefined ? {} : { normal }) });
const f32 = (length: number, normal?: number): Buffer => ({ dtype: 'f32', length, ...(normal === undefined ? {} : { normal }) });
const i32 = (length: number, values?: Int32Array): Buffer => ({ dtype: 'i32', length, ...(values === undefined ? {} : { values }) });

/** K different experts for each token, and weights that add up to 1. */
function routing(T: number, E: number, K: number): { index: Int32Array; weight: Float32Array } {
  const index = new Int32Array(T * K);
  const weight = new Float32Array(T * K);
  let state = 7;
  for (let t = 0; t < T; t++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const first = state >>> 16;
    for (let k = 0; k < K; k++) {
      index[t * K + k] = (first + k * (1 + ((state >>> 8) % Math.max(1, Math.floor(E / K))))) % E;
      weight[t * K + k] = 1 / K + (k - (K - 1) / 2) * 0.05;
    }
  }
  return { index, weight };
}

/** The kernels at B sequences of S tokens. */
function entries(sizes: Sizes, B: number, S: number): Entry[] {
  const { H, F, E, K, V, Q, G, D, P, epsilon } = sizes;
  const T = B * S;
  const N = T * K;
  const tokens = `T=${T}`;
  const routed = routing(T, E, K);
  const slots = {
    index: i32(N, routed.index), weight: { ...f32(N), values: routed.weight }, offsets: i32(E + 1), load: i32(E), slotToken: i32(N), slotWeight: f32(N), slotOf: i32(N),
  };
  const permute = (k: Kernels, t: Record<string, Tensor>): void =>
    k.moePermute(t['offsets']!, t['load']!, t['slotToken']!, t['slotWeight']!, t['slotOf']!, t['index']!, t['weight']!, T, E, K);
  const weights = 2 * E * H * F;
  const up = 4 * N * H * F;
  const down = 2 * N * H * F;
  const attention = 2 * B * Q * S * S * D; // both products, half of each masked
  const product = (name: string, m: number, n: number, k: number): Entry => ({
    name, shape: `${m}x${n}x${k}`, buffers: { c: x(m * n), a: x(m * k, 1), b: x(n * k, 0.02) },
    run: (kernels, t, dtype) => kernels.gemm(t['c']!, t['a']!, t['b']!, m, n, k, 0, 1, dtype, dtype), outputs: ['c'], flops: 2 * m * n * k, bytes: 2 * (m * n + m * k + n * k),
  });
  const gradient = (name: string, m: number, n: number): Entry => ({
    name, shape: `${m}x${n}x${T}`, buffers: { c: f32(m * n, 0), a: x(T * m, 1), b: x(T * n, 1) },
    run: (kernels, t, dtype) => kernels.gemmBeta(t['c']!, t['a']!, t['b']!, m, n, T, 1, 0, 1, 1, 'f32', dtype), outputs: ['c'], flops: 2 * m * n * T, bytes: 8 * m * n + 2 * T * (m + n),
  });
  const ids = Int32Array.from({ length: T }, (_, t) => (t * 7919) % V);
  return [
    product('qkv', T, P, H),
    product('attention output', T, H, Q * D),
    gradient('qkv weight gradient', P, H),
    {
      name: 'flash_attention_forward', shape: `B=${B} S=${S}`, buffers: { out: x(T * Q * D), lse: f32(T * Q), qkv: x(T * P, 1) },
      run: (k, t, dtype) => k.flashAttentionForward(t['out']!, t['lse']!, t['qkv']!, B, S, Q, G, D, dtype), outputs: ['out', 'lse'], flops: attention, bytes: 2 * T * (P + Q * D),
    },
    {
      name: 'flash_attention_backward', shape: `B=${B} S=${S}`, buffers: { dqkv: x(T * P), dout: x(T * Q * D, 1), out: x(T * Q * D), lse: f32(T * Q), qkv: x(T * P, 1) },
      prepare: (k, t) => k.flashAttentionForward(t['out']!, t['lse']!, t['qkv']!, B, S, Q, G, D, t['qkv']!.dtype as 'bf16'),
      run: (k, t, dtype) => k.flashAttentionBackward(t['dqkv']!, t['dout']!, t['out']!, t['lse']!, t['qkv']!, B, S, Q, G, D, dtype),
      outputs: ['dqkv'], flops: 2.5 * attention, bytes: 2 * T * (2 * P + 2 * Q * D),
    },
    {
      name: 'moe_permute', shape: tokens, buffers: slots, run: (k, t) => permute(k, t), outputs: ['offsets', 'slotToken', 'slotWeight', 'slotOf'], flops: 0, bytes: 20 * N,
    },
    {
      name: 'moe_up_forward', shape: tokens, buffers: { h: x(N * F), gateUp: x(N * 2 * F), x: x(T * H, 1), w: x(E * 2 * F * H, 0.02), ...slots }, prepare: permute,
      run: (k, t, dtype) => k.moeUpForward(t['h']!, t['gateUp']!, t['x']!, t['slotToken']!, t['offsets']!, t['w']!, T, H, F, E, K, dtype),
      outputs: ['h', 'gateUp'], flops: up, bytes: 2 * (3 * N * F + T * H + weights),
    },
    {
      name: 'moe_down_forward', shape: tokens, buffers: { y: x(N * H), h: x(N * F, 0.3), w: x(E * H * F, 0.02), ...slots }, prepare: permute,
      run: (k, t, dtype) => k.moeDownForward(t['y']!, t['h']!, t['offsets']!, t['w']!, T, H, F, E, K, dtype), outputs: ['y'], flops: down, bytes: 2 * (N * F + N * H + weights / 2),
    },
    {
      name: 'moe_down_backward', shape: tokens,
      buffers: { dgateUp: x(N * 2 * F), h: x(N * F), dweight: f32(N), dout: x(T * H, 1), gateUp: x(N * 2 * F, 0.5), w: x(E * H * F, 0.02), ...slots }, prepare: permute,
      run: (k, t, dtype) =>
        k.moeDownBackward(
          t['dgateUp']!, t['h']!, t['dweight']!, t['dout']!, t['gateUp']!, t['slotToken']!, t['slotWeight']!, t['slotOf']!, t['offsets']!, t['w']!,
          T, H, F, E, K, dtype,
        ),
      outputs: ['dgateUp', 'h', 'dweight'], flops: down, bytes: 2 * (5 * N * F + T * H + weights / 2),
    },
    {
      name: 'moe_down_weight_gradient', shape: tokens, buffers: { dw: f32(E * H * F, 0), dout: x(T * H, 1), h: x(N * F, 0.3), ...slots }, prepare: permute,
      run: (k, t, dtype) => k.moeDownWeightGradient(t['dw']!, t['dout']!, t['h']!, t['slotToken']!, t['slotWeight']!, t['offsets']!, T, H, F, E, K, 1, dtype),
      outputs: ['dw'], flops: down, bytes: 8 * E * H * F + 2 * (N * F + T * H),
    },
    {
      name: 'moe_up_backward', shape: tokens, buffers: { dx: x(N * H), dgateUp: x(N * 2 * F, 0.1), w: x(E * 2 * F * H, 0.02), ...slots }, prepare: permute,
      run: (k, t, dtype) => k.moeUpBackward(t['dx']!, t['dgateUp']!, t['offsets']!, t['w']!, T, H, F, E, K, dtype), outputs: ['dx'], flops: up, bytes: 2 * (2 * N * F + N * H + weights),
    },
    {
      name: 'moe_up_weight_gradient', shape: tokens, buffers: { dw: f32(E * 2 * F * H, 0), dgateUp: x(N * 2 * F, 0.1), x: x(T * H, 1), ...slots }, prepare: permute,
      run: (k, t, dtype) => k.moeUpWeightGradient(t['dw']!, t['dgateUp']!, t['x']!, t['slotToken']!, t['offsets']!, T, H, F, E, K, 1, dtype),
      outputs: ['dw'], flops: up, bytes: 16 * E * H * F + 2 * (2 * N * F + T * H),
    },
    {
      name: 'moe_combine', shape: tokens, buffers: { out: x(T * H), base: x(T * H, 1), y: x(N * H, 1), ...slots }, prepare: permute,
      run: (k, t, dtype) => k.moeCombine(t['out']!, t['base']!, t['y']!, t['weight']!, t['slotOf']!, T, H, K, dtype), outputs: ['out'], flops: 0, bytes: 2 * (2 * T * H + N * H),
    },
    {
      name: 'linear_cross_entropy', shape: tokens, buffers: { loss: f32(T), dx: x(T * H), dw: f32(V * H, 0), x: x(T * H, 1), target: i32(T, ids), w: x(V * H, 0.02) },
      run: (k, t, dtype) => k.linearCrossEntropy(t['loss']!, t['dx']!, t['dw']!, t['x']!, t['target']!, t['w']!, T, H, V, 1, dtype),
      outputs: ['loss', 'dx', 'dw'], flops: 6 * T * H * V, bytes: 10 * V * H + 4 * T * H,
    },
    {
      name: 'rmsnorm_residual_forward', shape: tokens, buffers: { sum: x(T * H), y: x(T * H), reciprocal: f32(T), x: x(T * H, 1), delta: x(T * H, 1), w: x(H, 1) },
      run: (k, t, dtype) => k.rmsnormResidualForward(t['sum']!, t['y']!, t['reciprocal']!, t['x']!, t['delta']!, t['w']!, T, H, epsilon, dtype),
      outputs: ['sum', 'y', 'reciprocal'], flops: 0, bytes: 8 * T * H,
    },
    {
      name: 'rmsnorm_residual_backward', shape: tokens,
      buffers: { dx: x(T * H), dw: f32(H, 0), dy: x(T * H, 1), dsum: x(T * H, 1), sum: x(T * H, 1), reciprocal: { ...f32(T), values: new Float32Array(T).fill(1) }, w: x(H, 1) },
      run: (k, t, dtype) => k.rmsnormResidualBackward(t['dx']!, t['dw']!, t['dy']!, t['dsum']!, t['sum']!, t['reciprocal']!, t['w']!, T, H, dtype),
      outputs: ['dx', 'dw'], flops: 0, bytes: 8 * T * H,
    },
    {
      name: 'aux_loss', shape: tokens, buffers: { aux: f32(1), probability: f32(T * E, 1), ...slots }, prepare: permute,
      run: (k, t) => k.auxLoss(t['aux']!, t['probability']!, t['load']!, T, E, K), outputs: ['aux'], flops: 0, bytes: 4 * T * E,
    },
    {
      name: 'embedding_forward', shape: tokens, buffers: { y: x(T * H), token: i32(T, ids), table: x(V * H, 1) },
      run: (k, t, dtype) => k.embeddingForward(t['y']!, t['token']!, t['table']!, T, H, V, dtype), outputs: ['y'], flops: 0, bytes: 4 * T * H,
    },
    {
      name: 'scatter_add', shape: tokens, buffers: { table: f32(V * H, 0), dy: x(T * H, 1), token: i32(T, ids) },
      run: (k, t, dtype) => k.scatterAdd(t['table']!, t['dy']!, t['token']!, T, H, V, dtype), outputs: ['table'], flops: 0, bytes: 2 * T * H + 8 * Math.min(T, V) * H,
    },
    {
      name: 'adamw_step', shape: `n=${E * H * F}`,
      buffers: {
        p: x(E * H * F, 0.02), residue: { dtype: 'u16', length: E * H * F, values: new Uint16Array(E * H * F) }, m: f32(E * H * F, 0.001), v: f32(E * H * F, 0), g: f32(E * H * F, 0.001),
        control: { dtype: 'f64', length: 3, values: Float64Array.of(1, 0.5, 0) }, schedule: { dtype: 'f64', length: 2, values: Float64Array.of(1e-4, 10) },
      },
      run: (k, t, dtype) =>
        k.adamwStep(
          t['p']!, dtype === 'bf16' ? t['residue']! : null, t['m']!, t['v']!, t['g']!, t['control']!, t['schedule']!, E * H * F, 0.9, 0.95, 1e-8, 0.1, 'f32', dtype,
        ),
      outputs: ['p', 'm', 'v'], flops: 0, bytes: 28 * E * H * F,
    },
    {
      name: 'grad_norm', shape: `n=${E * H * F}`, buffers: { sum: { dtype: 'f64', length: 1 }, g: f32(E * H * F, 1) },
      run: (k, t) => k.gradNorm(t['sum']!, t['g']!, E * H * F), outputs: ['sum'], flops: 0, bytes: 4 * E * H * F,
    },
  ];
}

/** The two halves of a layer for one new token of each of B sequences, the newest of `context`. Every expert that a token goes to is read once. */
function stepEntries(sizes: Sizes, context: number): Entry[] {
  const { H, F, E, K, Q, G, D, P, epsilon } = sizes;
  const angles = Array.from({ length: context * D / 2 }, (_, i) => i % 97);
  return [1, 16, 64].flatMap((B): Entry[] => [
    {
      name: 'decode_attention', shape: `B=${B}, context ${context}`,
      buffers: {
        out: x(B * H), keys: x(B * context * G * D, 1), values: x(B * context * G * D, 1), x: x(B * H, 1), start: i32(B, new Int32Array(B).fill(context - 1)),
        cosine: { ...f32(angles.length), values: Float32Array.from(angles, Math.cos) }, sine: { ...f32(angles.length), values: Float32Array.from(angles, Math.sin) },
        norm: x(H, 1), qkv: x(P * H, 0.02), output: x(H * Q * D, 0.02),
      },
      run: (k, t, dtype) =>
        k.decodeAttention(
          t['out']!, t['keys']!, t['values']!, t['x']!, t['start']!, t['cosine']!, t['sine']!, t['norm']!, t['qkv']!, t['output']!,
          B, context, H, Q, G, D, context, epsilon, dtype,
        ),
      outputs: ['out', 'keys', 'values'], flops: 2 * B * (P * H + H * Q * D + 2 * Q * D * context), bytes: 2 * (P * H + H * Q * D + 2 * B * context * G * D),
    },
    {
      name: 'decode_moe', shape: `T=${B}`,
      buffers: { out: x(B * H), x: x(B * H, 1), norm: x(H, 1), router: x(E * H, 0.2), gateUp: x(E * 2 * F * H, 0.02), down: x(E * H * F, 0.02) },
      run: (k, t, dtype) => k.decodeMoe(t['out']!, t['x']!, t['norm']!, t['router']!, t['gateUp']!, t['down']!, B, H, F, E, K, epsilon, dtype),
      outputs: ['out'], flops: 6 * B * K * H * F, bytes: 6 * E * (1 - (1 - K / E) ** B) * H * F,
    },
  ]);
}

/** Buffers of an entry on one device. Inputs are drawn on `device`; with `like`, they are copied from there, to the same values. */
class Bench {
  readonly tensors: Record<string, Tensor> = {};
  readonly #device: Device;
  readonly #held: Tensor[] = [];

  constructor(device: Device, { buffers }: Entry, dtype: 'f32' | 'bf16', workspaceBytes: number, like?: Bench) {
    this.#device = device;
    try {
      device.setWorkspace(this.#hold(device.allocate('u8', workspaceBytes)));
      for (const [at, [name, buffer]] of Object.entries(buffers).entries()) {
        const tensor = this.#hold(device.allocate(buffer.dtype === 'x' ? dtype : buffer.dtype, buffer.length));
        this.tensors[name] = tensor;
        if (buffer.values !== undefined) device.upload(tensor, buffer.values);
        else if (buffer.normal !== undefined && like !== undefined) device.upload(tensor, like.floats(name));
        else if (buffer.normal !== undefined) this.#draw(tensor, at, buffer.normal);
      }
    } catch (error) {
      this.free();
      throw error;
    }
  }

  /** A float buffer as float32. */
  floats(name: string): Float32Array {
    const tensor = this.tensors[name]!;
    const values = new Float32Array(tensor.length);
    if (tensor.dtype === 'f32') this.#device.download(values, tensor);
    else if (tensor.dtype === 'bf16') {
      const wide = this.#device.allocate('f32', tensor.length);
      this.#device.kernels.cast(wide, tensor, tensor.length, 'f32', 'bf16');
      this.#device.download(values, wide);
      this.#device.free(wide);
    } else {
      const other = tensor.dtype === 'f64' ? new Float64Array(tensor.length) : new Int32Array(tensor.length);
      this.#device.download(other, tensor);
      values.set(other);
    }
    return values;
  }

  free(): void {
    this.#device.setWorkspace(null);
    for (const tensor of this.#held.splice(0)) this.#device.free(tensor);
  }

  #hold(tensor: Tensor): Tensor {
    this.#held.push(tensor);
    return tensor;
  }

  #draw(tensor: Tensor, stream: number, deviation: number): void {
    const { kernels } = this.#device;
    if (tensor.dtype === 'f32') return kernels.randomNormal(tensor, tensor.length, 3, stream, 0, deviation);
    const piece = this.#device.allocate('f32', Math.min(tensor.length, 1 << 28));
    for (let from = 0; from < tensor.length; from += piece.length) {
      const length = Math.min(piece.length, tensor.length - from);
      kernels.randomNormal(piece, length, 3, stream, from, deviation);
      kernels.cast(slice(tensor, from, length), piece, length, tensor.dtype as 'bf16', 'f32');
    }
    this.#device.free(piece);
  }
}

/** The largest error over the outputs of one entry at few tokens. */
function compare(gpu: Device, cpu: Device, entry: Entry, sizes: Sizes): number {
  const { B, S } = COMPARED;
  const bytes = (device: Device, dtype: 'f32' | 'bf16'): number => device.workspaceBytes({ T: B * S, S, ...sizes }, dtype);
  const ours = new Bench(gpu, entry, 'bf16', bytes(gpu, 'bf16'));
  const reference = new Bench(cpu, entry, 'f32', bytes(cpu, 'f32'), ours);
  try {
    entry.prepare?.(gpu.kernels, ours.tensors);
    entry.prepare?.(cpu.kernels, reference.tensors);
    entry.run(gpu.kernels, ours.tensors, 'bf16');
    entry.run(cpu.kernels, reference.tensors, 'f32');
    return Math.max(...entry.outputs.map((name) => distance(ours.floats(name), reference.floats(name))));
  } finally {
    ours.free();
    reference.free();
  }
}

/** ||a - b|| / ||b||. NaN is worse than any number. */
function distance(a: Float32Array, b: Float32Array): number {
  let difference = 0;
  let norm = 0;
  for (let i = 0; i < a.length; i++) {
    difference += (a[i]! - b[i]!) ** 2;
    norm += b[i]! ** 2;
  }
  const error = Math.sqrt(difference) / (norm === 0 ? 1 : Math.sqrt(norm));
  return Number.isNaN(error) ? Infinity : error;
}

function measure(
  gpu: Device, cpu: Device, sizes: Sizes, small: Entry, entry: Entry, T: number, S: number, ceilings: Ceilings, peers: readonly Record<string, unknown>[],
): Row & { readonly passed: boolean } {
  const error = compare(gpu, cpu, small, sizes);
  const bench = new Bench(gpu, entry, 'bf16', gpu.workspaceBytes({ T, S, ...sizes }, 'bf16'));
  try {
    entry.prepare?.(gpu.kernels, bench.tensors);
    const times = timeOnDevice(gpu, () => entry.run(gpu.kernels, bench.tensors, 'bf16'));
    const ms = median(times);
    const peerMs = peers.find(({ name, shape }) => name === entry.name && shape === entry.shape)?.['ms'];
    const floorMs = Math.max(entry.flops / ceilings.tflops / 1e9, entry.bytes / ceilings.gbPerSecond / 1e6);
    return {
      name: entry.name, shape: entry.shape, error: significant(error, 2), ms: significant(ms), p95Ms: significant(quantile(times, 0.95)),
      tflops: entry.flops === 0 ? null : significant(entry.flops / ms / 1e9), gbPerSecond: significant(entry.bytes / ms / 1e6),
      shareOfFloor: significant(floorMs / ms, 3), peerMs: typeof peerMs === 'number' ? peerMs : null,
      timesPeer: typeof peerMs === 'number' ? significant(peerMs / ms, 3) : null, passed: error <= TOLERANCE,
    };
  } finally {
    bench.free();
  }
}

export async function benchGpuKernels(options: GpuKernelOptions): Promise<Report> {
  const { sequences: B, sequenceLength: S } = options;
  const sizes = sizesOf(presetOf(options.preset), 'bf16');
  const peers = options.peer === undefined ? [] : peerFigures(options.peer);
  const gpu = Device.open({ ...parseDevice(options.device), threads: 0 });
  const cpu = Device.open({ library: 'cpu', index: 0, threads: 0 });
  try {
    const ceilings = measureCeilings(gpu);
    const small = [...entries(sizes, COMPARED.B, COMPARED.S), ...stepEntries(sizes, COMPARED.S)];
    const rows = [...entries(sizes, B, S), ...stepEntries(sizes, STEP_CONTEXT)].map((entry, at) => measure(gpu, cpu, sizes, small[at]!, entry, B * S, S, ceilings, peers));
    return {
      bench: 'kernels',
      passed: rows.every(({ passed }) => passed),
      summary: {
        ...provenance(),
        device: gpu.description.name, preset: options.preset, precision: 'bf16', batch: `${B} x ${S}`, tolerance: TOLERANCE,
        ceilingTflops: significant(ceilings.tflops), ceilingGbPerSecond: significant(ceilings.gbPerSecond),
      },
      rows,
    };
  } finally {
    gpu.close();
    cpu.close();
  }
}
