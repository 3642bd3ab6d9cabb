/**
 * Generation from a model's weights: prompts of different lengths side by side, a key/value cache on the device, prefill in
 * pieces, then a token at a time. Holds weights in the compute type only; no gradients. Knows nothing of text: tokens in,
 * tokens out. Used by generate jobs, doctor and the demo. Shape letters: sizes.ts; C = capacity in positions.
 *
 * All sequences of a group take each step together. A prompt that ends inside a piece is padded: what the padding writes into
 * the cache lies behind the prompt's end, is seen by nobody, and is overwritten by the tokens to come. A sequence that has
 * ended steps on until all have; its further tokens are left out.
 *
 * The loop of steps lives on the device: token, position and random counter of each sequence lie there, a step feeds them to
 * itself (nn_advance), and the tokens gather in `history`, which the host reads every so many steps. So a step is the same
 * kernels over the same buffers each time: one graph.
 */
import { NnError } from '../../config/errors.ts';
import type { ModelConfig } from '../../config/presets.ts';
import type { Precision } from '../../config/run-spec.ts';
import { slice } from '../../cuda/device.ts';
import type { Device, DType, Kernels, Tensor } from '../../cuda/device.ts';
import { Arena } from './arena.ts';
import { attentionCachedForward, attentionStep } from './attention.ts';
import type { AttentionCache } from './attention.ts';
import { embeddingForward, headLogits } from './head.ts';
import { combineForward, expertsForward, routeForward } from './moe.ts';
import type { MoeState } from './moe.ts';
import { layoutParameters, viewsOf } from './parameters.ts';
import type { ModelViews, ParameterLayout, PlacedParameter, WeightSource } from './parameters.ts';
import { layOut } from './plan.ts';
import type { MemoryKind, MemoryPlan, Request } from './plan.ts';
import { Replay } from './replay.ts';
import { sizesOf } from './sizes.ts';
import type { BatchSizes, Sizes } from './sizes.ts';

export type { WeightSource } from './parameters.ts';

export interface DecoderOptions {
  readonly model: ModelConfig;
  readonly precision: Precision;
  /** Positions of a sequence: prompt and generated tokens, the last of which needs none. */
  readonly capacity: number;
  /** Sequences generated at once; more prompts are taken in groups of so many. */
  readonly batch: number;
  /** Tokens of all prompts taken in at once. Default 512, on a GPU 4096. */
  readonly prefillTokens?: number | undefined;
  /**
   * Steps after which the host reads the new tokens, at most: the reads begin at 1 step and double. Until then no token is told, and
   * neither an end nor shouldStop is seen. Default 1, on a GPU 32.
   */
  readonly stepsPerRead?: number | undefined;
  /** On a device that records graphs, whether a step becomes one, to the same tokens. Default true. */
  readonly graph?: boolean | undefined;
}

export interface GenerateOptions {
  readonly prompts: readonly (readonly number[])[];
  /** Tokens to generate for each prompt, unless it ends before. */
  readonly maxTokens: number;
  readonly method: 'greedy' | 'sample' | 'top-k' | 'top-p';
  /** Default 1. Greedy takes no notice of it. */
  readonly temperature?: number;
  /** Default 40. */
  readonly topK?: number;
  /** Default 0.95. */
  readonly topP?: number;
  /** Default 0. The same seed, prompts and weights give the same tokens. */
  readonly seed?: number;
  /** Token that ends a sequence (it is not part of the output); null: none does. */
  readonly eos?: number | null;
  /** NTK scaling of RoPE instead of the model's own. */
  readonly ntkAlpha?: number | null;
  /** Called for each token as it is chosen, with the index of its prompt. */
  readonly onToken?: (prompt: number, token: number) => void;
  /** Asked after each step that is read; true ends the generation with what there is. */
  readonly shouldStop?: () => boolean;
}

/** What Decoder.measure saw. */
export interface Measured {
  /** Milliseconds of taking in the prompts and choosing the first tokens. */
  readonly prefillMs: number;
  /** Milliseconds of one step, the mean. */
  readonly stepMs: number;
  /** The newest tokens of each prompt, at most stepsPerRead. */
  readonly tokens: readonly (readonly number[])[];
  /** Whether the last step's logits are all finite. */
  readonly isFinite: boolean;
  /** Bytes of the memory plan. */
  readonly plannedBytes: number;
}

const PREFILL_TOKENS = { cpu: 512, cuda: 4096 } as const;
/** NN_DECODE_TOKENS of nn.h: sequences that the kernels of a step take at most. */
const DECODE_TOKENS = 64;
const STEPS_PER_READ = { cpu: 1, cuda: 32 } as const;

/** Options with nothing left to the device. */
type PlannedOptions = DecoderOptions & { readonly prefillTokens: number; readonly stepsPerRead: number };

/** Bytes and places of a decoder's memory. Pure. */
export function decoderPlan(options: PlannedOptions, workspaceBytes = 0): MemoryPlan {
  const { model, precision, capacity, batch, stepsPerRead } = options;
  const { H, F, E, K, V, Q, G, D, P, L, dtype } = sizesOf(model, precision);
  const rows = rowsOf(options);
  const N = rows * K;
  const buffer = (kind: MemoryKind, name: string, type: DType, length: number): Request => ({ name, kind, dtype: type, length, from: 0, to: Infinity });
  const activation = (name: string, type: DType, length: number): Request => buffer('activations', name, type, length);
  return layOut(
    [
      buffer('weights', 'weights', dtype, layoutParameters(model).flatLength),
      buffer('workspace', 'workspace', 'u8', workspaceBytes),
      buffer('tables', 'cosine', 'f32', capacity * (D / 2)),
      buffer('tables', 'sine', 'f32', capacity * (D / 2)),
      buffer('tables', 'position', 'i32', rows),
      buffer('tables', 'tokens', 'i32', rows),
      ...['start', 'counter', 'row', 'token'].map((name) => buffer('tables', name, 'i32', batch)),
      buffer('tables', 'step', 'i32', 1),
      buffer('tables', 'history', 'i32', stepsPerRead * batch),
      ...Array.from({ length: L }, (_, layer) => [
        buffer('cache', `keys.${layer}`, dtype, batch * capacity * G * D),
        buffer('cache', `values.${layer}`, dtype, batch * capacity * G * D),
      ]).flat(),
    ],
    [
      activation('x', dtype, rows * H), activation('delta', dtype, rows * H), activation('normed1', dtype, rows * H), activation('reciprocal1', 'f32', rows),
      activation('qkv', dtype, rows * P), activation('attention', dtype, rows * Q * D), activation('normed2', dtype, rows * H),
      activation('reciprocal2', 'f32', rows), activation('logits', 'f32', rows * E), activation('probability', 'f32', rows * E), activation('weight', 'f32', N),
      activation('index', 'i32', N), activation('offsets', 'i32', E + 1), activation('load', 'i32', E), activation('slotToken', 'i32', N),
      activation('slotWeight', 'f32', N), activation('slotOf', 'i32', N), activation('h', dtype, N * F), activation('slots', dtype, N * H),
      activation('last', dtype, batch * H), activation('head.logits', 'f32', batch * V),
    ],
  );
}

const rowsOf = ({ batch, prefillTokens }: PlannedOptions): number => Math.max(batch, prefillTokens);

export class Decoder {
  readonly #device: Device;
  readonly #kernels: Kernels;
  readonly #options: PlannedOptions;
  readonly #sizes: Sizes;
  readonly #layout: ParameterLayout;
  readonly #arena: Arena;
  readonly #flat: Tensor;
  readonly #weights: ModelViews;
  readonly #state: MoeState;
  readonly #caches: readonly AttentionCache[];
  readonly #step: Replay;
  /** NTK alpha that the RoPE tables hold now. */
  #alphaOf = Number.NaN;

  /** Throws DEVICE_MEMORY, with the bytes needed and there, before it allocates anything. Weights come by loadWeights. */
  constructor(device: Device, given: DecoderOptions) {
    const { kind } = device.description;
    const options = { ...given, prefillTokens: given.prefillTokens ?? PREFILL_TOKENS[kind], stepsPerRead: given.stepsPerRead ?? STEPS_PER_READ[kind] };
    const { model, precision, capacity } = options;
    const rows = rowsOf(options);
    this.#device = device;
    this.#kernels = device.kernels;
    this.#options = options;
    this.#sizes = sizesOf(model, precision);
    this.#layout = layoutParameters(model);
    const workspaceBytes = device.workspaceBytes({ T: rows, S: rows, ...this.#sizes }, this.#sizes.dtype);
    this.#arena = new Arena(device, decoderPlan(options, workspaceBytes), 'take fewer prompts at once, fewer tokens, or a larger device');
    const at = (name: string): Tensor => this.#arena.tensor(name);
    this.#step = new Replay(device, options.graph !== false);
    this.#flat = at('weights');
    this.#weights = viewsOf(model, this.#layout, this.#flat);
    this.#state = {
      sum: at('x'), reciprocal2: at('reciprocal2'), normed2: at('normed2'), logits: at('logits'), probability: at('probability'), weight: at('weight'),
      index: at('index'), offsets: at('offsets'), load: at('load'), slotToken: at('slotToken'), slotWeight: at('slotWeight'), slotOf: at('slotOf'),
      gateUp: null, h: at('h'),
    };
    this.#caches = this.#weights.layers.map((_, layer) => ({ keys: at(`keys.${layer}`), values: at(`values.${layer}`), start: at('start'), capacity }));
  }

  /** Takes all weights from a source, rounding them to the compute type. What the source lacks, it throws for. */
  loadWeights(source: WeightSource): void {
    const host = new Float32Array(this.#longest());
    this.#fill(({ name, length }, _index, target) => {
      const values = host.subarray(0, length);
      source.read(name, values);
      this.#device.upload(target, values);
    });
  }

  /** The weights of a run's version 0, as Trainer.initialise draws them: for benchmarks. */
  initialise(seed: number): void {
    this.#fill(({ shape, length }, index, target) => {
      if (shape.length >= 2) this.#kernels.randomNormal(target, length, seed, index, 0, 0.02);
      else this.#device.upload(target, new Float32Array(length).fill(1));
    });
  }

  /**
   * The generated tokens of each prompt, without the prompt. Throws DATA_INVALID for an empty prompt, a token outside the
   * vocabulary, or more positions than the decoder has.
   */
  generate(options: GenerateOptions): number[][] {
    const { prompts, maxTokens } = options;
    for (const [index, prompt] of prompts.entries()) this.#checkTokens(prompt, `prompt ${index}`, maxTokens);
    const outputs: number[][] = [];
    for (let first = 0; first < prompts.length; first += this.#options.batch) {
      outputs.push(...this.#generateGroup(prompts.slice(first, first + this.#options.batch), first, options));
      if (options.shouldStop?.() === true) while (outputs.length < prompts.length) outputs.push([]);
    }
    return outputs.slice(0, prompts.length);
  }

  /** The logits [tokens.length, V] of one sequence, fed through the cache in pieces of `pieceLength`: for checks and scoring. */
  logits(tokens: readonly number[], pieceLength: number, ntkAlpha: number | null = null): Float32Array {
    this.#checkTokens(tokens, 'the sequence', 1);
    const { V } = this.#sizes;
    this.#begin(ntkAlpha);
    const all = new Float32Array(tokens.length * V);
    for (let from = 0; from < tokens.length; from += pieceLength) {
      const piece = tokens.slice(from, from + pieceLength);
      this.#forward([piece], [from]);
      for (let i = 0; i < piece.length; i++) {
        this.#gatherLast(0, i);
        this.#headOf(this.#arena.tensor('last'), 1);
        this.#device.download(all.subarray((from + i) * V, (from + i + 1) * V), this.#arena.tensor('head.logits'));
      }
    }
    return all;
  }

  /**
   * For benchmarks: takes the prompts in, makes a few greedy steps, then `count` timed ones, by the device's clock; nothing is read
   * back in between. Throws like generate.
   */
  measure(prompts: readonly (readonly number[])[], count: number): Measured {
    const warmup = 4;
    for (const [index, prompt] of prompts.entries()) this.#checkTokens(prompt, `prompt ${index}`, warmup + count + 1);
    const { batch, stepsPerRead } = this.#options;
    if (prompts.length > batch) throw new Error(`measure: ${prompts.length} prompts, but ${batch} are generated at once`);
    const options: GenerateOptions = { prompts, maxTokens: warmup + count + 1, method: 'greedy' };
    const B = prompts.length;
    this.#begin(null);
    const prefillMs = this.#device.time(() => this.#takeIn(prompts, 0, options));
    for (let step = 0; step < warmup; step++) this.#takeStep(B, options);
    const elapsed = this.#device.time(() => {
      for (let step = 0; step < count; step++) this.#takeStep(B, options);
    });
    const made = 1 + warmup + count;
    const history = new Int32Array(stepsPerRead * B);
    this.#device.download(history, this.#arena.tensor('history'));
    const read = Math.min(made, stepsPerRead);
    const tokens = prompts.map((_, b) => Array.from({ length: read }, (__, at) => history[((made - read + at) % stepsPerRead) * B + b]!));
    const logits = new Float32Array(B * this.#sizes.V);
    this.#device.download(logits, this.#arena.tensor('head.logits'));
    return { prefillMs, stepMs: elapsed / count, tokens, isFinite: logits.every(Number.isFinite), plannedBytes: this.#arena.bytes };
  }

  /** Gives the memory back; the decoder is of no use afterwards. */
  close(): void {
    this.#step.close();
    this.#device.setWorkspace(null);
    this.#arena.free();
  }

  #checkTokens(tokens: readonly number[], where: string, maxTokens: number): void {
    const { capacity, model } = this.#options;
    const refuse = (problem: string): never => {
      throw new NnError('DATA_INVALID', `${where} ${problem}`);
    };
    if (tokens.length === 0) refuse('is empty: generation needs at least one token to start from');
    const bad = tokens.find((token) => !(Number.isInteger(token) && token >= 0 && token < model.vocabSize));
    if (bad !== undefined) refuse(`has the token ${bad}, but the model's vocabulary has ${model.vocabSize}`);
    const positions = tokens.length + Math.max(0, maxTokens - 1);
    if (positions > capacity) refuse(`of ${tokens.length} tokens and ${maxTokens} new ones take ${positions} positions, but there are ${capacity}`);
  }

  /** One group of prompts, `first` being the index of its first prompt. */
  #generateGroup(prompts: readonly (readonly number[])[], first: number, options: GenerateOptions): number[][] {
    const { maxTokens, eos = null, onToken, shouldStop } = options;
    const outputs: number[][] = prompts.map(() => []);
    if (maxTokens < 1) return outputs;
    const B = prompts.length;
    const isEnded = prompts.map(() => false);
    this.#takeIn(prompts, first, options);
    let done = 0; // steps that were read
    for (let steps = 1; ; steps = Math.min(2 * steps, this.#options.stepsPerRead, maxTokens - done)) {
      // The first of all steps is taken already: what the prompts' last tokens led to.
      for (let step = done === 0 ? 1 : 0; step < steps; step++) this.#takeStep(B, options);
      const history = this.#readHistory(B, steps);
      done += steps;
      for (let step = 0; step < steps; step++) {
        for (const [b, output] of outputs.entries()) {
          if (isEnded[b] === true) continue;
          const token = history[step * B + b]!;
          if (token === eos) isEnded[b] = true;
          else {
            output.push(token);
            onToken?.(first + b, token);
            isEnded[b] = output.length === maxTokens;
          }
        }
        if (isEnded.every(Boolean) || shouldStop?.() === true) return outputs;
      }
    }
  }

  /** Feeds the prompts and chooses the first token of each. Prompts of later groups draw other random numbers. */
  #takeIn(prompts: readonly (readonly number[])[], first: number, options: GenerateOptions): void {
    const at = (name: string): Tensor => this.#arena.tensor(name);
    const group = first / this.#options.batch;
    this.#begin(options.ntkAlpha ?? null);
    this.#prefill(prompts);
    // The position of each sequence's newest token; nn_advance then makes it that of the token to come.
    this.#device.upload(at('start'), Int32Array.from(prompts, ({ length }) => length - 1));
    this.#device.upload(at('counter'), Int32Array.from(prompts, ({ length }) => length - 1 + group * this.#options.capacity));
    this.#device.upload(at('step'), Int32Array.of(0));
    this.#queueChoice(prompts.length, options);
  }

  /** One step of the loop: feeds the newest tokens, chooses the next. Waits for nothing. */
  #takeStep(B: number, options: GenerateOptions): void {
    const { method, temperature, topK, topP, seed } = options;
    this.#step.run(JSON.stringify([B, method, temperature, topK, topP, seed]), () => {
      this.#queueLayers(this.#arena.tensor('token'), this.#arena.tensor('start'), { B, S: 1, T: B });
      this.#headOf(this.#arena.tensor('x'), B);
      this.#queueChoice(B, options);
    });
  }

  /** Waits for `steps` steps, and has the next begin at the front of the history. */
  #readHistory(B: number, steps: number): Int32Array {
    const history = new Int32Array(steps * B);
    this.#device.download(history, this.#arena.tensor('history'));
    this.#device.upload(this.#arena.tensor('step'), Int32Array.of(0));
    return history;
  }

  /** Lends the workspace and sees to the RoPE tables. */
  #begin(ntkAlpha: number | null): void {
    const { model, capacity } = this.#options;
    this.#device.setWorkspace(this.#arena.tensor('workspace'));
    const alpha = ntkAlpha ?? model.ntkAlpha;
    if (alpha === this.#alphaOf) return;
    this.#kernels.ropeFreqs(this.#arena.tensor('cosine'), this.#arena.tensor('sine'), capacity, this.#sizes.D, model.ropeTheta, alpha);
    this.#alphaOf = alpha;
  }

  /** Feeds the prompts in pieces and leaves the logits of each prompt's last token. */
  #prefill(prompts: readonly (readonly number[])[]): void {
    const longest = prompts.reduce((most, { length }) => Math.max(most, length), 0);
    const pieceLength = Math.max(1, Math.floor(rowsOf(this.#options) / prompts.length));
    for (let from = 0; from < longest; from += pieceLength) {
      const S = Math.min(pieceLength, longest - from);
      this.#forward(prompts.map((prompt) => Array.from({ length: S }, (_, i) => prompt[from + i] ?? 0)), prompts.map(() => from));
      for (const [b, { length }] of prompts.entries()) if (length > from && length <= from + S) this.#gatherLast(b, b * S + length - 1 - from);
    }
    this.#headOf(this.#arena.tensor('last'), prompts.length);
  }

  /** Runs S tokens of each sequence, the first of which stands at start[b], through all layers. Leaves x [B*S, H]. */
  #forward(tokens: readonly (readonly number[])[], start: readonly number[]): void {
    const B = tokens.length;
    const S = tokens[0]!.length;
    const at = (name: string): Tensor => this.#arena.tensor(name);
    this.#device.upload(at('tokens'), Int32Array.from(tokens.flat()));
    this.#device.upload(at('start'), Int32Array.from(start));
    this.#device.upload(at('position'), Int32Array.from({ length: B * S }, (_, row) => start[Math.floor(row / S)]! + (row % S)));
    this.#queueLayers(at('tokens'), at('position'), { B, S, T: B * S });
  }

  /** Embedding and all layers for tokens [T] at positions [T]. Leaves x [T, H]. */
  #queueLayers(tokens: Tensor, position: Tensor, batch: BatchSizes): void {
    const at = (name: string): Tensor => this.#arena.tensor(name);
    const rope = { cosine: at('cosine'), sine: at('sine'), position, positions: this.#options.capacity };
    const attention = { reciprocal1: at('reciprocal1'), normed1: at('normed1'), qkv: at('qkv'), attention: at('attention') };
    const [x, delta, slots] = [at('x'), at('delta'), at('slots')];
    const { H, F, E, K, epsilon, dtype } = this.#sizes;
    const isStep = batch.S === 1 && batch.B <= DECODE_TOKENS;
    embeddingForward(this.#kernels, x, tokens, this.#weights, batch, this.#sizes);
    for (const [layer, weights] of this.#weights.layers.entries()) {
      if (isStep) {
        attentionStep(this.#kernels, delta, this.#caches[layer]!, x, weights, rope, batch.B, this.#sizes);
        this.#kernels.decodeMoe(x, delta, weights.moeNorm, weights.router, weights.gateUp, weights.down, batch.T, H, F, E, K, epsilon, dtype);
        continue;
      }
      attentionCachedForward(this.#kernels, delta, attention, this.#caches[layer]!, x, weights, rope, batch, this.#sizes);
      routeForward(this.#kernels, this.#state, x, delta, weights, batch, this.#sizes);
      expertsForward(this.#kernels, this.#state, weights, batch, this.#sizes);
      combineForward(this.#kernels, x, slots, this.#state, weights, batch, this.#sizes);
    }
  }

  /** last[b] = x[row]: a lookup with x as the table. */
  #gatherLast(b: number, row: number): void {
    const { H, dtype } = this.#sizes;
    const index = slice(this.#arena.tensor('row'), b, 1);
    const x = this.#arena.tensor('x');
    this.#device.upload(index, Int32Array.of(row));
    this.#kernels.embeddingForward(slice(this.#arena.tensor('last'), b * H, H), index, x, 1, H, x.length / H, dtype);
  }

  /** Leaves the logits of `rows` last hidden states. */
  #headOf(x: Tensor, rows: number): void {
    const scratch = { normed: this.#arena.tensor('normed1'), reciprocal: this.#arena.tensor('reciprocal1') };
    headLogits(this.#kernels, this.#arena.tensor('head.logits'), scratch, x, this.#weights, rows, this.#sizes);
  }

  /** Chooses a token for each sequence from the logits, and moves the loop's state one step on. */
  #queueChoice(B: number, options: GenerateOptions): void {
    const { method, temperature = 1, topK = 40, topP = 0.95, seed = 0 } = options;
    const at = (name: string): Tensor => this.#arena.tensor(name);
    const { V } = this.#sizes;
    const [token, logits, counter] = [at('token'), at('head.logits'), at('counter')];
    if (method === 'greedy') this.#kernels.argmax(token, logits, B, V, 'f32');
    else if (method === 'sample') this.#kernels.sample(token, logits, counter, B, V, temperature, seed, 'f32');
    else if (method === 'top-k') this.#kernels.topkSample(token, logits, counter, B, V, Math.min(topK, V), temperature, seed, 'f32');
    else this.#kernels.toppSample(token, logits, counter, B, V, topP, temperature, seed, 'f32');
    this.#kernels.advance(at('history'), at('start'), counter, at('step'), token, B, this.#options.stepsPerRead);
  }

  #longest(): number {
    return this.#layout.parameters.reduce((most, { length }) => Math.max(most, length), 0);
  }

  /** Has `write` fill each parameter as float32 and rounds it to the compute type. */
  #fill(write: (parameter: PlacedParameter, index: number, target: Tensor) => void): void {
    const { dtype } = this.#sizes;
    const staging = dtype === 'f32' ? null : this.#device.allocate('f32', this.#longest());
    try {
      for (const [index, parameter] of this.#layout.parameters.entries()) {
        const place = slice(this.#flat, parameter.offset, parameter.length);
        write(parameter, index, staging ?? place);
        if (staging !== null) this.#kernels.cast(place, staging, parameter.length, dtype, 'f32');
      }
    } finally {
      if (staging !== null) this.#device.free(staging);
    }
  }
}
