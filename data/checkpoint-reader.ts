/**
 * Reads a checkpoint directory: one that checkpoint-files.ts wrote, or a plain Hugging Face Mixtral directory, sharded or
 * not, in float32, bfloat16 or float16. Everything but the tensors' values is checked on opening, and with `verify` those
 * too. Knows no device and no training. Called by trainers and decoders (as WeightSource), the doctor, the orchestrator.
 */
import { existsSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { NnError, errorCode } from '../config/errors.ts';
import { parameterShapes } from '../config/presets.ts';
import type { ModelConfig, ParameterShape } from '../config/presets.ts';
import type { Precision } from '../config/run-spec.ts';
import { quote } from './files.ts';
import { modelFromHuggingFace } from './hugging-face.ts';
import { checkSizes, readManifest, verifyManifest, verifyManifestNow, verifyManifestOnce } from './manifest.ts';
import type { Manifest } from './manifest.ts';
import { SafetensorsFile } from './safetensors.ts';

/** Where a trainer or decoder gets weights from. */
export interface WeightSource {
  readonly model: ModelConfig;
  has(name: string): boolean;
  /** Fills `into` (the tensor's elements, row by row) with float32 values. */
  read(name: string, into: Float32Array): void;
}

/** Which of the three float32 copies of the parameters: the master weights, or Adam's moments. */
export type TrainingKind = 'weight' | 'm' | 'v';

/** training/state.json. */
export interface TrainingState {
  readonly version: 1;
  readonly step: number;
  readonly precision: Precision;
  /** What the writer said of the run: name, seed, spec hash. */
  readonly run: Readonly<Record<string, unknown>>;
}

/** The files of a checkpoint, in one place for writer and reader. */
export const FILES = {
  config: 'config.json',
  generation: 'generation_config.json',
  weights: 'model.safetensors',
  index: 'model.safetensors.index.json',
  tokenizer: 'tokenizer.json',
  tokenizerConfig: 'tokenizer_config.json',
  state: 'training/state.json',
  training: { weight: 'training/weights.safetensors', m: 'training/m.safetensors', v: 'training/v.safetensors' },
} as const;

const invalid = (directory: string, problem: string, cause?: unknown): NnError =>
  new NnError('CHECKPOINT_INVALID', `${directory}: ${problem}`, { path: directory }, cause);

/** A JSON file of the directory. Throws CHECKPOINT_INVALID when it is missing or no JSON. */
function readJson(directory: string, file: string): unknown {
  try {
    return JSON.parse(readFileSync(join(directory, file), 'utf8'));
  } catch (error) {
    throw invalid(directory, error instanceof SyntaxError ? `${file} is no JSON: it is damaged` : `${file} is missing or cannot be read`, error);
  }
}

/** Opens a tensor file of the directory; a missing one is damage here. */
function openTensors(directory: string, file: string): SafetensorsFile {
  try {
    return SafetensorsFile.open(join(directory, file));
  } catch (error) {
    throw errorCode(error) === 'FILE_NOT_FOUND' ? invalid(directory, `${file} is missing or cannot be read`, error) : error;
  }
}

/** Up to three names, and how many more. */
const someOf = (names: readonly string[]): string =>
  names.slice(0, 3).map(quote).join(', ') + (names.length > 3 ? ` and ${names.length - 3} more` : '');

/** Throws CHECKPOINT_INVALID, naming tensors, unless the files hold exactly the model's, each of its shape and a float type. */
function requireTensors(where: string, shapes: readonly ParameterShape[], tensors: ReadonlyMap<string, SafetensorsFile>): void {
  const wanted = new Set(shapes.map(({ name }) => name));
  const missing = shapes.filter(({ name }) => !tensors.has(name)).map(({ name }) => name);
  if (missing.length > 0) throw invalid(where, `tensor ${someOf(missing)} is missing`);
  const extra = [...tensors.keys()].filter((name) => !wanted.has(name));
  if (extra.length > 0) throw invalid(where, `tensor ${someOf(extra)} is not of this model`);
  for (const { name, shape } of shapes) {
    const entry = tensors.get(name)!.entry(name);
    if (entry.shape.length !== shape.length || entry.shape.some((size, axis) => size !== shape[axis])) {
      throw invalid(where, `tensor ${quote(name)} has shape [${entry.shape.slice(0, 8).join(', ')}], but its config wants [${shape.join(', ')}]`);
    }
    if (entry.dtype !== 'F32' && entry.dtype !== 'BF16' && entry.dtype !== 'F16') throw invalid(where, `tensor ${quote(name)} is ${entry.dtype}, but F32, BF16 or F16 is wanted`);
  }
}

/** The file of each tensor, of one model.safetensors or of the shards that the index names. `opened` gets every file. */
function openWeights(directory: string, opened: SafetensorsFile[]): Map<string, SafetensorsFile> {
  const tensors = new Map<string, SafetensorsFile>();
  const open = (file: string): SafetensorsFile => {
    const shard = openTensors(directory, file);
    opened.push(shard);
    return shard;
  };
  if (!existsSync(join(directory, FILES.index))) {
    const file = open(FILES.weights);
    for (const name of file.tensors.keys()) tensors.set(name, file);
    return tensors;
  }
  const index = readJson(directory, FILES.index) as { weight_map?: unknown } | null;
  const map = index?.weight_map;
  if (typeof map !== 'object' || map === null || Array.isArray(map)) throw invalid(directory, `${FILES.index} has no weight_map: it is damaged`);
  const shards = new Map<string, SafetensorsFile>();
  for (const [name, file] of Object.entries(map)) {
    if (typeof file !== 'string' || !/^[\w.-]+\.safetensors$/.test(file)) throw invalid(directory, `${FILES.index} names no file of this directory for tensor ${quote(name)}`);
    const shard = shards.get(file) ?? open(file);
    shards.set(file, shard);
    if (!shard.tensors.has(name)) throw invalid(directory, `tensor ${quote(name)} is missing from ${file}, where ${FILES.index} has it`);
    tensors.set(name, shard);
  }
  for (const [file, shard] of shards) {
    const stray = [...shard.tensors.keys()].filter((name) => tensors.get(name) !== shard);
    if (stray.length > 0) throw invalid(directory, `tensor ${someOf(stray)} of ${file} is not in ${FILES.index}`);
  }
  return tensors;
}

function readState(directory: string): TrainingState {
  const state = readJson(directory, FILES.state) as Partial<TrainingState> | null;
  const good =
    state?.version === 1 && Number.isSafeInteger(state.step) && state.step! >= 0 && (state.precision === 'fp32' || state.precision === 'bf16') && typeof state.run === 'object' && state.run !== null;
  if (!good) throw invalid(directory, `${FILES.state} is not of the form that it should have: it is damaged`);
  return state as TrainingState;
}

/** The manifest, after the cheap checks: the directory is there, and complete as far as sizes tell. */
function checkDirectory(directory: string): Manifest | null {
  const found = statSync(directory, { throwIfNoEntry: false });
  if (found === undefined || !found.isDirectory()) {
    throw new NnError('FILE_NOT_FOUND', `${directory}: ${found === undefined ? 'no such directory' : 'is a file, but a checkpoint directory is wanted'}`, { path: directory });
  }
  if (!existsSync(join(directory, FILES.config))) throw invalid(directory, `${FILES.config} is missing: this is no checkpoint, or it is incomplete`);
  const manifest = readManifest(directory);
  if (manifest === null && existsSync(join(directory, 'training'))) throw invalid(directory, 'manifest.json is missing: the checkpoint is incomplete');
  if (manifest !== null) checkSizes(directory, manifest);
  return manifest;
}

/** An open checkpoint. All reads are synchronous; it holds a descriptor for each tensor file until `close`. */
export class CheckpointReader implements WeightSource {
  readonly directory: string;
  readonly model: ModelConfig;
  /** What the weights are stored in: bf16 when all of them are. */
  readonly precision: Precision;
  /** The version; null in a directory that says nothing of training. */
  readonly step: number | null;
  /** training/state.json, or null. */
  readonly state: TrainingState | null;
  /** Whether master weights and optimizer state are there, so that a run can go on from here. */
  readonly hasTraining: boolean;
  /** tokenizer.json of this directory, or null. */
  readonly tokenizer: string | null;
  readonly #opened: SafetensorsFile[];
  readonly #weights: ReadonlyMap<string, SafetensorsFile>;
  readonly #training: Readonly<Record<TrainingKind, ReadonlyMap<string, SafetensorsFile>>> | null;

  private constructor(directory: string, opened: SafetensorsFile[]) {
    this.directory = directory;
    this.#opened = opened;
    this.model = modelFromHuggingFace(readJson(directory, FILES.config), join(directory, FILES.config));
    const shapes = parameterShapes(this.model);
    this.#weights = openWeights(directory, opened);
    requireTensors(directory, shapes, this.#weights);
    this.precision = shapes.every(({ name }) => this.#weights.get(name)!.entry(name).dtype === 'BF16') ? 'bf16' : 'fp32';
    this.tokenizer = existsSync(join(directory, FILES.tokenizer)) ? join(directory, FILES.tokenizer) : null;
    this.hasTraining = existsSync(join(directory, 'training'));
    this.state = this.hasTraining ? readState(directory) : null;
    this.step = this.state?.step ?? null;
    this.#training = this.hasTraining ? this.#openTraining(shapes) : null;
  }

  /**
   * Opens and checks a directory; with `verify` every file is hashed and compared with the manifest first (blocking; a
   * directory without one has nothing to compare), with `once` only if this thread did not do so before, or a file has changed
   * since. `check` is called every few milliseconds meanwhile and may throw. Throws FILE_NOT_FOUND, or CHECKPOINT_INVALID naming
   * file or tensor.
   */
  static open(directory: string, { verify, check }: { verify: boolean | 'once'; check?: () => void }): CheckpointReader {
    const manifest = checkDirectory(directory);
    if (verify !== false && manifest !== null) (verify === 'once' ? verifyManifestOnce : verifyManifestNow)(directory, manifest, check);
    const opened: SafetensorsFile[] = [];
    try {
      return new CheckpointReader(directory, opened);
    } catch (error) {
      for (const file of opened) file.close();
      throw error;
    }
  }

  /** Throws CHECKPOINT_INVALID, naming the size, unless the tensors fit `model`; what scales RoPE may differ. */
  requireModel(model: ModelConfig): void {
    for (const size of ['vocabSize', 'hiddenSize', 'layers', 'queryHeads', 'kvHeads', 'headSize', 'experts', 'expertsPerToken', 'ffnSize'] as const) {
      if (this.model[size] !== model[size]) throw invalid(this.directory, `its model has ${size} ${this.model[size]}, but ${model[size]} is wanted`);
    }
  }

  has(name: string): boolean {
    return this.#weights.has(name);
  }

  /** Fills `into` with the model's weights, as stored: in a bf16 run they are the rounded ones. */
  read(name: string, into: Float32Array): void {
    const file = this.#weights.get(name);
    if (file === undefined) throw invalid(this.directory, `tensor ${quote(name)} is missing`);
    file.readFloats(name, into);
  }

  /** Fills `into` with float32 master weights or a moment. Throws CHECKPOINT_INVALID where `hasTraining` is false. */
  readTraining(kind: TrainingKind, name: string, into: Float32Array): void {
    const file = this.#training?.[kind].get(name);
    if (file === undefined) throw invalid(this.directory, `has no optimizer state (tensor ${quote(name)} of ${FILES.training[kind]}); a run cannot go on from it`);
    file.readFloats(name, into);
  }

  close(): void {
    for (const file of this.#opened) file.close();
  }

  #openTraining(shapes: readonly ParameterShape[]): Record<TrainingKind, Map<string, SafetensorsFile>> {
    const open = (kind: TrainingKind): Map<string, SafetensorsFile> => {
      const file = openTensors(this.directory, FILES.training[kind]);
      this.#opened.push(file);
      const tensors = new Map([...file.tensors.keys()].map((name) => [name, file]));
      requireTensors(join(this.directory, FILES.training[kind]), shapes, tensors);
      return tensors;
    };
    // A float32 model is its own master copy, and is not written twice.
    const own = this.state!.precision === 'fp32' && !existsSync(join(this.directory, FILES.training.weight));
    return { weight: own ? new Map(this.#weights) : open('weight'), m: open('m'), v: open('v') };
  }
}

/**
 * Checks everything about a checkpoint, each byte too when it has a manifest, in slices that leave the thread free for
 * other work. Returns its step. Throws what CheckpointReader.open does.
 */
export async function verifyCheckpoint(directory: string): Promise<{ step: number | null }> {
  const manifest = checkDirectory(directory);
  if (manifest !== null) await verifyManifest(directory, manifest);
  const reader = CheckpointReader.open(directory, { verify: false });
  reader.close();
  return { step: reader.step };
}
