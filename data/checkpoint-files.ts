/**
 * Writes a run's checkpoints, and finds them: a checkpoint is complete or absent. It is written into a temporary directory
 * beside its place, synced, and renamed; a process that dies or a disk that fills up leaves all older ones as they were.
 * Knows no device and no queue. Called by workers (write) and the orchestrator (list, newest good). The reader lies in
 * checkpoint-reader.ts and is exported from here too.
 *
 *   runs/<id>/checkpoints/step-<n>/                  config/branches.ts has its name on other branches than the first
 *     config.json generation_config.json            Hugging Face MixtralForCausalLM
 *     model.safetensors, or above 5 GB              weights in the run's precision
 *       model-00001-of-0000N.safetensors + model.safetensors.index.json
 *     tokenizer.json tokenizer_config.json          when the run names a tokenizer
 *     training/state.json                           step, precision, what the run says of itself
 *     training/{m,v}.safetensors                    Adam's moments, float32
 *     training/weights.safetensors                  float32 master weights, unless the model's are float32 already
 *     manifest.json                                 size and sha-256 of each file; written last
 */
import { mkdirSync, readFileSync, readdirSync } from 'node:fs';
import { rename, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { checkpointName, parseCheckpointName } from '../config/branches.ts';
import { NnError, errorCode } from '../config/errors.ts';
import { elementCount, parameterShapes } from '../config/presets.ts';
import type { ModelConfig, ParameterShape } from '../config/presets.ts';
import type { Precision } from '../config/run-spec.ts';
import { FILES, verifyCheckpoint } from './checkpoint-reader.ts';
import type { TrainingKind, TrainingState } from './checkpoint-reader.ts';
import { fileError, forgetTemporary, onFile, removeAbandoned, syncDirectory, systemCode, temporaryName } from './files.ts';
import { encodeHuggingFaceConfig, generationConfig, huggingFaceConfig, tokenizerConfig } from './hugging-face.ts';
import { MANIFEST, ManifestBuilder, encodeJson, readManifest, writeSmall } from './manifest.ts';
import { writeSafetensors } from './safetensors.ts';
import type { PlannedTensor } from './safetensors.ts';

export { CheckpointReader, verifyCheckpoint } from './checkpoint-reader.ts';
export type { TrainingKind, TrainingState, WeightSource } from './checkpoint-reader.ts';
export { huggingFaceConfig, modelFromHuggingFace } from './hugging-face.ts';

/** Weights beyond this are cut into several files, as Hugging Face does. */
export const SHARD_BYTES = 5_000_000_000;

/** Where a checkpoint's contents come from: a replica. `read` is asked for one tensor at a time. */
export interface CheckpointSource {
  readonly model: ModelConfig;
  readonly step: number;
  readonly precision: Precision;
  /** tokenizer.json to copy, or null. */
  readonly tokenizer: string | null;
  /** Fills `into` with a parameter's float32 master weights or moments. */
  read(kind: TrainingKind, name: string, into: Float32Array): void;
  /** What the run says of itself: name, seed, spec hash; JSON. */
  readonly runInfo: Readonly<Record<string, unknown>>;
}

export interface WriteOptions {
  /** Most bytes of one file of weights. */
  readonly shardBytes?: number;
  /** Whether master weights and optimizer state are written, without which no run can go on from here. */
  readonly withTraining?: boolean;
}

/** Splits tensors, in order, into files of at most `shardBytes` (a larger tensor has a file of its own). */
function planShards(tensors: readonly PlannedTensor[], shardBytes: number): { file: string; tensors: PlannedTensor[] }[] {
  const shards: PlannedTensor[][] = [];
  let room = 0;
  for (const tensor of tensors) {
    const bytes = elementCount(tensor.shape) * (tensor.dtype === 'BF16' ? 2 : 4);
    if (shards.length === 0 || bytes > room) {
      shards.push([]);
      room = shardBytes;
    }
    shards.at(-1)!.push(tensor);
    room -= bytes;
  }
  const five = (value: number): string => String(value).padStart(5, '0');
  return shards.map((part, index) => ({
    file: shards.length === 1 ? FILES.weights : `model-${five(index + 1)}-of-${five(shards.length)}.safetensors`,
    tensors: part,
  }));
}

const planned = (shapes: readonly ParameterShape[], dtype: PlannedTensor['dtype']): PlannedTensor[] => shapes.map(({ name, shape }) => ({ name, dtype, shape }));

/** Writes all files of a checkpoint into an empty directory, the manifest last, each synced. */
function fillDirectory(directory: string, source: CheckpointSource, { shardBytes, withTraining }: Required<WriteOptions>): number {
  const manifest = new ManifestBuilder();
  const shapes = parameterShapes(source.model);
  const small = (file: string, contents: Uint8Array): void => {
    const hash = manifest.file(file);
    writeSmall(join(directory, file), contents);
    hash.update(contents);
    hash.end();
  };
  const json = (file: string, value: unknown): void => small(file, encodeJson(value));
  const tensors = (file: string, plan: readonly PlannedTensor[], kind: TrainingKind): void => {
    const hash = manifest.file(file);
    writeSafetensors(join(directory, file), plan, (name, into) => source.read(kind, name, into), { observe: (bytes) => hash.update(bytes) });
    hash.end();
  };

  small(FILES.config, encodeHuggingFaceConfig(huggingFaceConfig(source.model, { precision: source.precision })));
  json(FILES.generation, generationConfig());
  const dtype = source.precision === 'bf16' ? 'BF16' : 'F32';
  const shards = planShards(planned(shapes, dtype), shardBytes);
  for (const shard of shards) tensors(shard.file, shard.tensors, 'weight');
  if (shards.length > 1) {
    const total_size = shapes.reduce((sum, { shape }) => sum + elementCount(shape) * (dtype === 'BF16' ? 2 : 4), 0);
    json(FILES.index, { metadata: { total_size }, weight_map: Object.fromEntries(shards.flatMap((shard) => shard.tensors.map(({ name }) => [name, shard.file]))) });
  }
  if (source.tokenizer !== null) {
    const path = source.tokenizer;
    small(FILES.tokenizer, onFile(path, () => readFileSync(path)));
    json(FILES.tokenizerConfig, tokenizerConfig());
  }
  if (withTraining) {
    onFile(directory, () => mkdirSync(join(directory, 'training')));
    if (dtype !== 'F32') tensors(FILES.training.weight, planned(shapes, 'F32'), 'weight');
    tensors(FILES.training.m, planned(shapes, 'F32'), 'm');
    tensors(FILES.training.v, planned(shapes, 'F32'), 'v');
    const state: TrainingState = { version: 1, step: source.step, precision: source.precision, run: source.runInfo };
    json(FILES.state, state);
    syncDirectory(join(directory, 'training'));
  }
  writeSmall(join(directory, MANIFEST), encodeJson(manifest.manifest()));
  syncDirectory(directory);
  return manifest.bytes;
}

/** Whether `directory` holds the checkpoint that lies in `temporary`, undamaged. */
async function holdsTheSame(directory: string, temporary: string): Promise<boolean> {
  try {
    await verifyCheckpoint(directory);
    return JSON.stringify(readManifest(directory)) === JSON.stringify(readManifest(temporary));
  } catch (error) {
    if (errorCode(error) === 'CHECKPOINT_INVALID') return false;
    throw error;
  }
}

/** Gives a finished and synced temporary directory its name. One that is there already stays if it is the same, and else is replaced. */
export async function placeCheckpoint(temporary: string, directory: string): Promise<void> {
  try {
    await rename(temporary, directory);
  } catch (error) {
    if (!['ENOTEMPTY', 'EEXIST', 'ENOTDIR'].includes(systemCode(error) ?? '')) throw error;
    if (await holdsTheSame(directory, temporary)) {
      await rm(temporary, { recursive: true, force: true });
      return;
    }
    const aside = temporaryName(directory, 'replaced');
    await rename(directory, aside);
    await rename(temporary, directory);
    await rm(aside, { recursive: true, force: true });
    forgetTemporary(aside);
  }
  syncDirectory(dirname(directory));
}

/**
 * Writes version `source.step` as `directory`, complete or not at all. The same checkpoint, written before, stays; a damaged
 * or other one of that name is replaced. Returns its bytes. Throws DISK_FULL (the temporary is removed), FILE_NOT_FOUND
 * for a tokenizer that is not there, and what `source.read` throws.
 */
export async function writeCheckpoint(
  directory: string,
  source: CheckpointSource,
  { shardBytes = SHARD_BYTES, withTraining = true }: WriteOptions = {},
): Promise<{ bytes: number }> {
  const parent = dirname(directory);
  onFile(parent, () => mkdirSync(parent, { recursive: true }));
  removeAbandoned(parent);
  const temporary = temporaryName(directory);
  try {
    onFile(directory, () => mkdirSync(temporary));
    const bytes = fillDirectory(temporary, source, { shardBytes, withTraining });
    await placeCheckpoint(temporary, directory);
    return { bytes };
  } catch (error) {
    await rm(temporary, { recursive: true, force: true });
    throw fileError(error, directory);
  } finally {
    forgetTemporary(temporary);
  }
}

/** A checkpoint by name; whether it is good is another question. */
export interface NamedCheckpoint {
  readonly directory: string;
  readonly step: number;
  /** The branch of the run that it was written on (config/branches.ts). */
  readonly branch: number;
}

export const checkpointDirectory = (runDirectory: string, step: number, branch = 0): string => join(runDirectory, 'checkpoints', checkpointName(step, branch));

/** The run's checkpoints, newest first; temporary ones are not among them. A run without any has an empty list. */
export function listCheckpoints(runDirectory: string): NamedCheckpoint[] {
  let names: string[];
  try {
    names = readdirSync(join(runDirectory, 'checkpoints'));
  } catch (error) {
    if (systemCode(error) === 'ENOENT') return [];
    throw fileError(error, runDirectory);
  }
  return names
    .flatMap((name) => {
      const parts = parseCheckpointName(name);
      return parts === null ? [] : [{ directory: join(runDirectory, 'checkpoints', name), ...parts }];
    })
    .sort((a, b) => b.step - a.step || b.branch - a.branch);
}

/** The newest undamaged checkpoint, and the newer ones that are damaged, each with what is wrong. */
export interface NewestGood {
  readonly checkpoint: NamedCheckpoint | null;
  readonly damaged: readonly (NamedCheckpoint & { readonly error: NnError })[];
}

/** Looks for the newest checkpoint (that `wanted` wants) whose every byte is as it was written. Changes nothing. */
export async function newestGood(runDirectory: string, wanted: (checkpoint: NamedCheckpoint) => boolean = () => true): Promise<NewestGood> {
  const damaged: (NamedCheckpoint & { error: NnError })[] = [];
  for (const checkpoint of listCheckpoints(runDirectory).filter(wanted)) {
    try {
      const { step } = await verifyCheckpoint(checkpoint.directory);
      if (step === checkpoint.step) return { checkpoint, damaged };
      throw new NnError('CHECKPOINT_INVALID', `${checkpoint.directory}: holds step ${step}, not what its name says`, { path: checkpoint.directory });
    } catch (error) {
      const code = errorCode(error);
      if (code !== 'CHECKPOINT_INVALID' && code !== 'FILE_NOT_FOUND') throw error;
      damaged.push({ ...checkpoint, error: error as NnError });
    }
  }
  return { checkpoint: null, damaged };
}
