/**
 * `bench train --device cuda:N`: a whole training step of a preset in bf16 on random tokens: zeroing, the microbatches, global
 * norm, clipping, AdamW. Both golden models are checked first, in float32 and bf16; timed with the device's events.
 */
import { parameterCount, trainingFlopsPerToken } from '../config/presets.ts';
import { parseRunSpec } from '../config/run-spec.ts';
import type { Recompute } from '../config/run-spec.ts';
import { Device } from '../cuda/device.ts';
import { Trainer } from '../workers/model/trainer.ts';
import { breakDown } from './breakdown.ts';
import { goldenMatches, measureCeilings, parseDevice, peerFigures, presetOf } from './gpu.ts';
import { median, provenance, quantile, significant } from './statistics.ts';
import type { Report, Row } from './statistics.ts';
import { randomBatch } from './train.ts';

export interface GpuTrainOptions {
  readonly device: string;
  readonly preset: string;
  readonly sequences: number;
  readonly sequenceLength: number;
  readonly microBatches: number;
  readonly steps: number;
  readonly recompute: Recompute;
  readonly stateDtype: 'fp32' | 'bf16';
  readonly graph: boolean;
  /** After the timed steps, one more with each kernel timed by itself; without a graph. */
  readonly breakdown?: boolean | undefined;
  readonly peer?: string | undefined;
}

/** Bytes that AdamW moves for a parameter: both halves of the weight, m and v read and written, gradient read. */
const updateBytes = (stateDtype: 'fp32' | 'bf16'): number => 8 + 4 + (stateDtype === 'bf16' ? 8 : 16);

export async function benchGpuTrain(options: GpuTrainOptions): Promise<Report> {
  const model = presetOf(options.preset);
  const where = { ...parseDevice(options.device), threads: 0 };
  const { sequences, sequenceLength, microBatches, recompute, stateDtype } = options;
  const graph = options.graph && options.breakdown !== true;
  const matches = goldenMatches(where);
  // Before our own memory is taken: two such models do not fit beside each other.
  const peer = options.peer === undefined ? null : peerFigures(options.peer).at(-1)!;

  const device = Device.open(where);
  const ceilings = measureCeilings(device);
  const { optimizer } = parseRunSpec({ name: 'bench', model: 'demo', data: { train: 'random' }, steps: 1000, batch: { sequences, sequenceLength }, optimizer: { stateDtype } });
  const trainer = new Trainer(device, {
    model, precision: 'bf16', recompute, sequences, sequenceLength, optimizer, totalSteps: 1000, separateShards: false, graph,
  });
  const microTokens = sequences * sequenceLength;
  const tokens = microTokens * microBatches;
  const batch = randomBatch(microTokens, model.vocabSize);
  const times = { step: [] as number[], compute: [] as number[], update: [] as number[] };
  /** Computes a step's gradients; returns the loss summed over its tokens. */
  const gradients = (): number => {
    let sum = 0;
    trainer.beginStep();
    trainer.beginShard();
    for (let micro = 0; micro < microBatches; micro++) {
      sum += trainer.accumulate(batch, { loss: 1 / tokens, aux: optimizer.auxLossWeight / microBatches }).lossSum;
    }
    trainer.endShard();
    return sum;
  };
  let firstLoss = Number.NaN;
  let rows: Row[] = [];
  try {
    trainer.initialise(0);
    const warmup = 3;
    for (let step = 1; step <= warmup + options.steps; step++) {
      let [compute, update, lossSum] = [0, 0, 0];
      const whole = device.time(() => {
        compute = device.time(() => (lossSum = gradients()));
        update = device.time(() => trainer.applyStep(step));
      });
      if (step === 1) firstLoss = lossSum / tokens;
      if (step <= warmup) continue;
      times.step.push(whole);
      times.compute.push(compute);
      times.update.push(update);
    }
    if (options.breakdown === true) {
      rows = breakDown(device, () => {
        gradients();
        trainer.applyStep(warmup + options.steps + 1);
      });
    }
  } finally {
    trainer.close();
    device.close();
  }
  const parameters = parameterCount(model);
  const [stepMs, computeMs, updateMs] = [median(times.step), median(times.compute), median(times.update)];
  const tflops = (ms: number): number => (trainingFlopsPerToken(model, sequenceLength) * tokens) / ms / 1e9;
  // Random tokens and small weights: the first loss is that of a guess.
  const isSane = Math.abs(firstLoss / Math.log(model.vocabSize) - 1) < 0.05;
  const speed = (ms: number): number => (tokens / ms) * 1000;
  const against = (name: string, ms: number): Record<string, number | null> => {
    const figure = peer?.[name];
    return typeof figure === 'number' ? { [`peer_${name}`]: figure, [`times_peer_${name}`]: significant(speed(ms) / figure, 3) } : {};
  };
  return {
    bench: 'train',
    passed: matches && isSane,
    summary: {
      ...provenance(),
      device: device.description.name, preset: options.preset, parameters, precision: 'bf16', stateDtype, graph,
      batch: `${microBatches} x ${sequences} x ${sequenceLength}`, recompute, keptAttention: trainer.keep.attention, keptGateUp: trainer.keep.gateUp,
      keptH: trainer.keep.h, goldenMatches: matches, firstLoss: significant(firstLoss),
      stepMs: significant(stepMs), stepP95Ms: significant(quantile(times.step, 0.95)), forwardBackwardMs: significant(computeMs), updateMs: significant(updateMs),
      tokensPerSecond: Math.round(speed(stepMs)), microTokensPerSecond: Math.round(speed(computeMs)),
      tflops: significant(tflops(stepMs)), ceilingTflops: significant(ceilings.tflops), shareOfCeiling: significant(tflops(stepMs) / ceilings.tflops, 3),
      updateGbPerSecond: significant((parameters * updateBytes(stateDtype)) / updateMs / 1e6), ceilingGbPerSecond: significant(ceilings.gbPerSecond),
      ...against('tokens_per_s', stepMs), ...against('micro_tokens_per_s', computeMs),
    },
    rows,
  };
}
