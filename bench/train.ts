/**
 * `bench train`: a whole training step of a preset on random tokens: zeroing, forward, backward, global norm, clipping,
 * AdamW. The golden models are checked first. Reports tokens/s, GFLOP/s and the share of the machine's FMA peak, the matrix
 * product at 1024 cubed on one core, and the ratio to a peer program run before and after on the same cores.
 */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { NnError } from '../config/errors.ts';
import { PRESETS, parameterCount, trainingFlopsPerToken } from '../config/presets.ts';
import type { PresetName } from '../config/presets.ts';
import { parseRunSpec } from '../config/run-spec.ts';
import { packageRoot } from '../config/schema.ts';
import { Device } from '../cuda/device.ts';
import { checkGolden } from '../workers/model/golden.ts';
import { Trainer } from '../workers/model/trainer.ts';
import { peakGflops, timeSquareProduct } from './kernels.ts';
import { median, provenance, quantile, significant } from './statistics.ts';
import type { Report } from './statistics.ts';

interface TrainOptions {
  readonly preset: string;
  readonly threads: number;
  readonly sequences: number;
  readonly sequenceLength: number;
  readonly steps: number;
  readonly peer?: string;
}

/** Runs a peer program and returns the tokens/s of its JSON line. */
function peerTokensPerSecond(command: string): number {
  const result = spawnSync('sh', ['-c', command], { encoding: 'utf8', timeout: 600_000, maxBuffer: 1 << 20 });
  const line = (result.stdout ?? '').trim().split('\n').at(-1) ?? '';
  let figure: unknown;
  try {
    figure = (JSON.parse(line) as { tokens_per_s?: unknown }).tokens_per_s;
  } catch (error) {
    throw new NnError('USAGE', `the peer \`${command}\` printed no JSON line: ${(result.stderr ?? '').trim().split('\n').at(-1) ?? line}`, {}, error);
  }
  if (typeof figure !== 'number') throw new NnError('USAGE', `the peer \`${command}\` printed no tokens_per_s: ${line}`);
  return figure;
}

/** Random token ids and the ids that follow them, from a small fixed generator. */
export function randomBatch(tokens: number, vocabSize: number): { inputs: Int32Array; targets: Int32Array } {
  let state = 12345;
  const next = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * vocabSize);
  };
  return { inputs: Int32Array.from({ length: tokens }, next), targets: Int32Array.from({ length: tokens }, next) };
}

export async function benchTrain(options: TrainOptions): Promise<Report> {
  if (!(options.preset in PRESETS)) throw new NnError('USAGE', `there is no preset "${options.preset}"; there are ${Object.keys(PRESETS).join(', ')}`);
  const model = PRESETS[options.preset as PresetName];
  const { sequences, sequenceLength } = options;
  const spec = parseRunSpec({ name: 'bench', model: options.preset as PresetName, data: { train: 'random' }, steps: 1000, batch: { sequences, sequenceLength } });

  const golden = ['mqa-top2', 'spec-shaped'].map((name) =>
    checkGolden(join(packageRoot(), 'test', 'golden', `${name}.safetensors`), { library: 'cpu', index: 0, threads: options.threads }),
  );
  const matches = golden.every((report) => report.passed);
  const before = options.peer === undefined ? null : peerTokensPerSecond(options.peer);

  const device = Device.open({ library: 'cpu', index: 0, threads: options.threads });
  const trainer = new Trainer(device, {
    model, precision: spec.precision, recompute: spec.recompute, sequences, sequenceLength,
    optimizer: spec.optimizer, totalSteps: spec.steps, separateShards: false,
  });
  const tokens = sequences * sequenceLength;
  const batch = randomBatch(tokens, model.vocabSize);
  const parts = { computeMs: [] as number[], updateMs: [] as number[] };
  const times: number[] = [];
  try {
    trainer.initialise(0);
    const warmup = 3;
    for (let step = 1; step <= warmup + options.steps; step++) {
      const start = performance.now();
      trainer.beginStep();
      trainer.beginShard();
      trainer.accumulate(batch, { loss: 1 / tokens, aux: spec.optimizer.auxLossWeight });
      trainer.endShard();
      const computed = performance.now();
      trainer.applyStep(step);
      device.synchronize();
      const end = performance.now();
      if (step <= warmup) continue;
      times.push(end - start);
      parts.computeMs.push(computed - start);
      parts.updateMs.push(end - computed);
    }
  } finally {
    trainer.close();
    device.close();
  }
  const after = options.peer === undefined ? null : peerTokensPerSecond(options.peer);

  const stepMs = median(times);
  const tokensPerSecond = (tokens / stepMs) * 1000;
  const gflops = (trainingFlopsPerToken(model, sequenceLength) * tokensPerSecond) / 1e9;
  const peak = peakGflops(options.threads);
  const product = timeSquareProduct(1024, 1);
  const peerSpeed = before === null || after === null ? null : Math.max(before, after);
  return {
    bench: 'train',
    passed: matches,
    summary: {
      ...provenance(),
      preset: options.preset, parameters: parameterCount(model), threads: options.threads, batch: `${sequences}x${sequenceLength}`,
      goldenMatches: matches,
      stepMs: significant(stepMs), stepP95Ms: significant(quantile(times, 0.95)),
      forwardBackwardMs: significant(median(parts.computeMs)), updateMs: significant(median(parts.updateMs)),
      tokensPerSecond: Math.round(tokensPerSecond), gflops: significant(gflops), fmaPeakGflops: significant(peak), shareOfPeak: significant(gflops / peak, 3),
      gemm1024Gflops: significant(product.gflops), gemm1024ShareOfPeak: significant(product.shareOfPeak, 3),
      peerTokensPerSecond: peerSpeed, timesPeer: peerSpeed === null ? null : significant(tokensPerSecond / peerSpeed, 3),
    },
    rows: [],
  };
}
