/**
 * `bench decode`: greedy decoding of a preset with random weights, at several batches and contexts: milliseconds of a step by the
 * device's clock, and the share that reading the weights once would take. Both golden models are checked first.
 */
import type { ModelConfig } from '../config/presets.ts';
import { Device } from '../cuda/device.ts';
import { checkGolden } from '../workers/model/golden.ts';
import { Decoder } from '../workers/model/decoder.ts';
import { join } from 'node:path';
import { packageRoot } from '../config/schema.ts';
import { goldenMatches, measureCeilings, parseDevice, peerFigures, presetOf } from './gpu.ts';
import { provenance, significant } from './statistics.ts';
import type { Report, Row } from './statistics.ts';
import { randomBatch } from './train.ts';

interface DecodeOptions {
  readonly device: string;
  readonly preset: string;
  readonly threads: number;
  readonly steps: number;
  readonly graph: boolean;
  /** Also takes in a prompt of so many tokens, with NTK alpha 8, and goes on from there. */
  readonly prompt?: number | undefined;
  readonly peer?: string | undefined;
}

const SHAPES = [[1, 1024], [1, 8192], [64, 1024]] as const;

/** Bytes of weights that a step must read: for one sequence its own experts, for many all of them; and the cache up to `position`. */
function stepBytes({ layers, hiddenSize: H, ffnSize: F, experts, expertsPerToken, vocabSize, queryHeads, kvHeads, headSize }: ModelConfig, B: number, position: number, bytes: number): number {
  const touched = Math.min(experts, B * expertsPerToken);
  const attention = H * (queryHeads + 2 * kvHeads) * headSize + H * queryHeads * headSize;
  const cache = B * position * 2 * kvHeads * headSize;
  return (layers * (touched * 3 * H * F + attention + experts * H + cache) + vocabSize * H) * bytes;
}

const randomPrompts = (B: number, length: number, vocabSize: number): number[][] => {
  const { inputs } = randomBatch(B * length, vocabSize);
  return Array.from({ length: B }, (_, b) => Array.from(inputs.subarray(b * length, (b + 1) * length)));
};

export async function benchDecode(options: DecodeOptions): Promise<Report> {
  const model = presetOf(options.preset);
  const where = { ...parseDevice(options.device), threads: options.threads };
  const isGpu = where.library === 'cuda';
  const golden = (name: string): boolean => checkGolden(join(packageRoot(), 'test', 'golden', `${name}.safetensors`), where).passed;
  const matches = isGpu ? goldenMatches(where) : ['mqa-top2', 'spec-shaped'].every(golden);
  const peers = options.peer === undefined ? [] : peerFigures(options.peer);
  const device = Device.open(where);
  try {
    const ceilings = isGpu ? measureCeilings(device) : null;
    const precision = isGpu ? 'bf16' : 'fp32';
    const row = (B: number, context: number, position: number, ms: number, more: Record<string, number>): Row => {
      const gbPerSecond = stepBytes(model, B, position, isGpu ? 2 : 4) / ms / 1e6;
      const peer = peers.find(({ batch, context: other }) => batch === B && other === context)?.['tokens_per_s'];
      return {
        name: `batch ${B}, context ${context}`, ms: significant(ms), tokensPerSecond: significant((B / ms) * 1000), gbPerSecond: significant(gbPerSecond),
        shareOfCeiling: ceilings === null ? null : significant(gbPerSecond / ceilings.gbPerSecond, 3),
        peerTokensPerSecond: typeof peer === 'number' ? peer : null, timesPeer: typeof peer === 'number' ? significant((B / ms) * 1000 / peer, 3) : null, ...more,
      };
    };
    const measure = (shape: ModelConfig, B: number, capacity: number, length: number, steps: number): { ms: number; prefillMs: number } => {
      const decoder = new Decoder(device, { model: shape, precision, capacity, batch: B, graph: options.graph });
      try {
        decoder.initialise(0);
        const prompts = randomPrompts(B, length, model.vocabSize);
        decoder.timePrefill(prompts.map((prompt) => prompt.slice(0, 64))); // loads the kernels' code
        return { prefillMs: decoder.timePrefill(prompts), ms: decoder.timeSteps(prompts, steps) };
      } finally {
        decoder.close();
      }
    };
    const rows = SHAPES.map(([B, context]): Row => {
      const length = context / 2;
      const { ms, prefillMs } = measure(model, B, context, length, Math.min(options.steps, length - 8));
      return row(B, context, length, ms, { prefillTokensPerSecond: significant((B * length * 1000) / prefillMs) });
    });
    if (options.prompt !== undefined) {
      const { ms, prefillMs } = measure({ ...model, ntkAlpha: 8 }, 1, options.prompt + options.steps + 16, options.prompt, options.steps);
      rows.push(row(1, options.prompt, options.prompt, ms, { prefillTokensPerSecond: significant((options.prompt * 1000) / prefillMs) }));
    }
    return {
      bench: 'decode',
      passed: matches,
      summary: {
        ...provenance(),
        device: device.description.name, preset: options.preset, precision, graph: options.graph && device.recordsGraphs, goldenMatches: matches,
        ceilingGbPerSecond: ceilings === null ? null : significant(ceilings.gbPerSecond),
      },
      rows,
    };
  } finally {
    device.close();
  }
}
