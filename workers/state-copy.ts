/**
 * A version of a replica in host memory: weights and Adam's moments copied off the training buffers, so that training goes on
 * while a checkpoint's files are written. The compute thread fills it (replica.ts), the writer thread reads it (writer.ts); the
 * memory is shared and used again for the next copy. Knows layouts, but neither devices, files nor jobs.
 *
 *   one buffer each for weight, m, v: the flat layout of model/parameters.ts, float32, or bf16 for moments that are kept so
 */
import type { CheckpointSource } from '../data/checkpoint-files.ts';
import { decodeBf16 } from '../data/safetensors.ts';
import { layoutParameters } from './model/parameters.ts';
import type { StateKind, Trainer } from './model/trainer.ts';

/** Elements that are copied between two looks at the signals: about 10 ms on a CPU. */
const PIECE_ELEMENTS = 1 << 24;

const KINDS: readonly StateKind[] = ['weight', 'm', 'v'];

/** Memory that takes a replica's state, of one shape. */
export interface CopyMemory {
  readonly dtypes: Readonly<Record<StateKind, 'f32' | 'bf16'>>;
  readonly buffers: Readonly<Record<StateKind, SharedArrayBuffer>>;
}

/** A copied version, with all that its checkpoint says; can be sent between threads, which then share the memory. */
export interface StateCopy extends Omit<CheckpointSource, 'read'> {
  readonly memory: CopyMemory;
}

type Source = Pick<Trainer, 'flatLength' | 'stateDtype' | 'readFlat'>;

/** Bytes of a copy of the trainer's state. */
export const copyBytes = (trainer: Pick<Source, 'flatLength' | 'stateDtype'>): number =>
  KINDS.reduce((sum, kind) => sum + trainer.flatLength * (trainer.stateDtype(kind) === 'f32' ? 4 : 2), 0);

/** Memory for copies of this trainer's state. */
export function allocateCopy(trainer: Pick<Source, 'flatLength' | 'stateDtype'>): CopyMemory {
  const of = <Value>(make: (kind: StateKind) => Value): Record<StateKind, Value> => ({ weight: make('weight'), m: make('m'), v: make('v') });
  const dtypes = of((kind) => trainer.stateDtype(kind));
  return { dtypes, buffers: of((kind) => new SharedArrayBuffer(trainer.flatLength * (dtypes[kind] === 'f32' ? 4 : 2))) };
}

/** Copies the state as it is now. `check` is called before each piece and may throw; the memory then holds nothing of use. */
export function copyState(trainer: Source, { dtypes, buffers }: CopyMemory, check: () => void): void {
  for (const kind of KINDS) {
    for (let offset = 0; offset < trainer.flatLength; offset += PIECE_ELEMENTS) {
      check();
      const length = Math.min(PIECE_ELEMENTS, trainer.flatLength - offset);
      trainer.readFlat(kind, offset, viewOf(dtypes[kind], buffers[kind], offset, length));
    }
  }
}

/** The copy as the source of a checkpoint. `check` is called before each tensor and may throw. */
export function sourceOf({ memory, ...rest }: StateCopy, check: () => void): CheckpointSource {
  const places = new Map(layoutParameters(rest.model).parameters.map((parameter) => [parameter.name, parameter]));
  return {
    ...rest,
    read: (kind, name, into) => {
      check();
      const { offset, length } = places.get(name)!;
      const values = viewOf(memory.dtypes[kind], memory.buffers[kind], offset, length);
      if (values instanceof Float32Array) into.set(values);
      else decodeBf16(values, into);
    },
  };
}

const viewOf = (dtype: 'f32' | 'bf16', buffer: SharedArrayBuffer, offset: number, length: number): Float32Array | Uint16Array =>
  dtype === 'f32' ? new Float32Array(buffer, offset * 4, length) : new Uint16Array(buffer, offset * 2, length);
