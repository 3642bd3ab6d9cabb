/**
 * What the benchmarks on a GPU share: which device is meant, the two ceilings that every share is of, the check that comes before
 * any timing, and peers' figures. Knows no benchmark.
 */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { NnError } from '../config/errors.ts';
import { PRESETS } from '../config/presets.ts';
import type { ModelConfig, PresetName } from '../config/presets.ts';
import { packageRoot } from '../config/schema.ts';
import { Device } from '../cuda/device.ts';
import type { DeviceOptions, Tensor } from '../cuda/device.ts';
import { checkGolden } from '../workers/model/golden.ts';
import { median } from './statistics.ts';

/** What this GPU was seen to do at most. */
export interface Ceilings {
  /** A bf16 product of 8192 cubed. */
  readonly tflops: number;
  /** A copy within the device's memory, bytes read plus bytes written. */
  readonly gbPerSecond: number;
}

/** Reads `cpu` or `cuda:N`. Throws USAGE. */
export function parseDevice(text: string): { library: 'cpu' | 'cuda'; index: number } {
  const match = /^(?:cpu|cuda:(\d{1,3}))$/.exec(text);
  if (match === null) throw new NnError('USAGE', `--device is ${JSON.stringify(text)}, but must be cpu or cuda:N`);
  return match[1] === undefined ? { library: 'cpu', index: 0 } : { library: 'cuda', index: Number(match[1]) };
}

/** Throws USAGE. */
export function presetOf(name: string): ModelConfig {
  if (!(name in PRESETS)) throw new NnError('USAGE', `there is no preset "${name}"; there are ${Object.keys(PRESETS).join(', ')}`);
  return PRESETS[name as PresetName];
}

/** Milliseconds of one call: `samples` times, each the mean of so many calls that they take some milliseconds. Warms up first. */
export function timeOnDevice(device: Device, call: () => void, samples = 9, sampleMs = 4): number[] {
  call();
  const once = device.time(call);
  const calls = Math.max(1, Math.min(1000, Math.ceil(sampleMs / Math.max(once, 1e-3))));
  const several = (): void => {
    for (let index = 0; index < calls; index++) call();
  };
  device.time(several);
  return Array.from({ length: samples }, () => device.time(several) / calls);
}

/** Measures both ceilings, on random numbers: a product of zeros runs faster. Allocates, and frees, 2.6 GB. */
export function measureCeilings(device: Device): Ceilings {
  const size = 8192;
  const elements = size * size;
  const held: Tensor[] = [];
  const hold = (tensor: Tensor): Tensor => (held.push(tensor), tensor);
  try {
    device.setWorkspace(hold(device.allocate('u8', 256 << 20)));
    const source = hold(device.allocate('f32', elements));
    const [a, b, c] = [0, 1, 2].map(() => hold(device.allocate('bf16', elements))) as [Tensor, Tensor, Tensor];
    for (const [stream, tensor] of [a, b].entries()) {
      device.kernels.randomNormal(source, elements, 1, stream, 0, 1);
      device.kernels.cast(tensor, source, elements, 'bf16', 'f32');
    }
    const productMs = median(timeOnDevice(device, () => device.kernels.gemm(c, a, b, size, size, size, 0, 1, 'bf16', 'bf16'), 9, 20));
    const bytes = 2 ** 30;
    const [from, to] = [0, 1].map(() => hold(device.allocate('u8', bytes))) as [Tensor, Tensor];
    const copyMs = median(timeOnDevice(device, () => device.kernels.copy(to, from, bytes), 9, 20));
    return { tflops: (2 * size ** 3) / productMs / 1e9, gbPerSecond: (2 * bytes) / copyMs / 1e6 };
  } finally {
    device.setWorkspace(null);
    for (const tensor of held) device.free(tensor);
  }
}

/** Whether both golden models are reproduced, in float32 and in bf16; the failing checks on stderr. */
export function goldenMatches(options: DeviceOptions): boolean {
  let passed = true;
  for (const name of ['mqa-top2', 'spec-shaped']) {
    for (const precision of ['fp32', 'bf16'] as const) {
      const report = checkGolden(join(packageRoot(), 'test', 'golden', `${name}.safetensors`), options, precision);
      for (const row of report.rows) {
        if (!row.passed) process.stderr.write(`bench: ${name} in ${precision}: ${row.what} is off by ${row.error.toExponential(2)} (${row.worst ?? ''}), allowed ${row.tolerance}\n`);
      }
      passed &&= report.passed;
    }
  }
  return passed;
}

/** Every JSON object that a peer program prints on a line of its own. Throws USAGE when there is none. */
export function peerFigures(command: string): Record<string, unknown>[] {
  const result = spawnSync('sh', ['-c', command], { encoding: 'utf8', timeout: 600_000, maxBuffer: 1 << 22 });
  const figures = (result.stdout ?? '')
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => JSON.parse(line) as Record<string, unknown>);
  if (figures.length > 0) return figures;
  throw new NnError('USAGE', `the peer \`${command}\` printed no JSON line: ${(result.stderr ?? '').trim().split('\n').at(-1) ?? ''}`);
}
