/**
 * `bench decode`: greedy decoding of a preset with random weights, at several batches and contexts: milliseconds of a step by the
 * device's clock, and the share that reading the weights once would take. Both golden models are checked first. With a prompt, also
 * taking in so many tokens with NTK alpha 8, and what comes after them. Every row fails whose logits are not finite or whose tokens
 * are outside the vocabulary; DEVICE_MEMORY is thrown where a plan does not fit.
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
  /** [sequences, context] to measure at half of the context. */
  readonly shapes?: readonly (readonly [number, number])[] | undefined;
}

const SHAPES = [[1, 1024], [1, 8192], [64, 1024]] as const;
/** What takes a model that was trained at 32,768 positions to 262,144. */
const LONG_NTK_ALPHA = 8;
/** Newest tokens of each sequence that are looked at. */
const STEPS_READ = 32;

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
    const measure = (name: string, shape: ModelConfig, B: number, context: number, length: number, steps: number): Row & { readonly passed: boolean } => {
      const decoder = new Decoder(device, { model: shape, precision, capacity: Math.max(context, length + steps + 16), batch: B, graph: options.graph, stepsPerRead: STEPS_READ });
      try {
        decoder.initialise(0);
        const prompts = randomPrompts(B, length, model.vocabSize);
        decoder.measure(prompts.map((prompt) => prompt.slice(0, 64)), 1); // loads the kernels' code
        const { prefillMs, stepMs, tokens, isFinite, plannedBytes } = decoder.measure(prompts, steps);
        const isProduced = tokens.every((each) => each.length === Math.min(STEPS_READ, steps + 5) && each.every((token) => token >= 0 && token < model.vocabSize));
        const gbPerSecond = stepBytes(model, B, length, isGpu ? 2 : 4) / stepMs / 1e6;
        const peer = peers.find(({ batch, context: other }) => batch === B && other === context)?.['tokens_per_s'];
        return {
          name, ms: significant(stepMs), tokensPerSecond: significant((B / stepMs) * 1000), gbPerSecond: significant(gbPerSecond),
          shareOfCeiling: ceilings === null ? null : significant(gbPerSecond / ceilings.gbPerSecond, 3),
          peerTokensPerSecond: typeof peer === 'number' ? peer : null, timesPeer: typeof peer === 'number' ? significant(((B / stepMs) * 1000) / peer, 3) : null,
          prefillTokensPerSecond: significant((B * length * 1000) / prefillMs), plannedGb: significant(plannedBytes / 1e9, 3),
          newest: tokens[0]!.slice(-4).join(' '), passed: isProduced && isFinite,
        };
      } finally {
        decoder.close();
      }
    };
    const rows = (options.shapes ?? SHAPES).map(([B, context]) => {
      const length = context / 2;
      return measure(`batch ${B}, context ${context}`, model, B, context, length, Math.min(options.steps, length - 8));
    });
    if (options.prompt !== undefined) {
      const { prompt, steps } = options;
      rows.push(measure(`a prompt of ${prompt}, NTK alpha ${LONG_NTK_ALPHA}`, { ...model, ntkAlpha: LONG_NTK_ALPHA }, 1, prompt, prompt, steps));
    }
    return {
      bench: 'decode',
      passed: matches && rows.every(({ passed }) => passed),
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
