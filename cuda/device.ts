/**
 * The only file that imports koffi: finds and loads a native library, opens a device of it, allocates and copies its memory,
 * and turns statuses into errors. TypeScript above this file does not know whether it computes on a CPU or a GPU. A Device
 * belongs to the thread that opened it; all calls are synchronous. Used by workers/model, workers/thread, bench and doctor.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import koffi from 'koffi';
import { NnError, errorCode } from '../config/errors.ts';
import type { ErrorCode } from '../config/errors.ts';
import { packageRoot } from '../config/schema.ts';
import { ABI_VERSION, Kernels, PROTOTYPES } from './bindings.generated.ts';
import type { Native } from './bindings.generated.ts';
import { refuse } from './check.ts';
import { elementBytes, tensorBytes } from './tensor.ts';
import type { ComputeType, DType, Tensor, TypedArray } from './tensor.ts';

export { reinterpret, slice, tensorBytes } from './tensor.ts';
export type { ComputeType, DType, Tensor, TypedArray } from './tensor.ts';
export type { Kernels } from './bindings.generated.ts';

export type LibraryName = 'cpu' | 'cuda';

/** What a library says of one of its devices, as of now (nn_device_describe). */
export interface DeviceDescription {
  readonly library: LibraryName;
  readonly index: number;
  readonly kind: LibraryName;
  readonly name: string;
  readonly memoryBytes: number;
  readonly freeBytes: number;
  readonly cores?: number;
  /** CPU: the instructions its kernels use. */
  readonly isa?: 'avx512' | 'avx2' | 'plain';
  readonly computeCapability?: string;
  readonly driverVersion?: string;
  readonly runtimeVersion?: string;
  /** Why `auto` came to the CPU although a CUDA library is built: it cannot be used. For doctor and the logs to say. */
  readonly note?: string;
}

export interface DeviceOptions {
  /** `auto`: CUDA where its library is built and finds a GPU, else the CPU. */
  readonly library: 'auto' | LibraryName;
  readonly index: number;
  /** CPU threads to compute with; 0: all cores. */
  readonly threads: number;
}

/** Sizes that decide how much scratch the kernels need: nn_workspace_bytes. */
export interface WorkspaceSizes {
  readonly T: number;
  readonly S: number;
  readonly H: number;
  readonly F: number;
  readonly E: number;
  readonly K: number;
  readonly V: number;
  readonly Q: number;
  readonly G: number;
  readonly D: number;
}

/** Recorded calls, to be launched as one: Device.record. */
export interface Graph {
  readonly handle: number;
}

const STATUS_ARGUMENT = 1;
const STATUS_WORKSPACE = 3;

const STATUS_CODES: Readonly<Record<number, ErrorCode>> = { 2: 'DEVICE_UNSUPPORTED', 4: 'DEVICE_MEMORY', 5: 'DEVICE_UNAVAILABLE', 6: 'DEVICE_FAULT' };

const ARRAY_TYPES: Readonly<Record<DType, readonly string[]>> = {
  f32: ['Float32Array'],
  f64: ['Float64Array'],
  i32: ['Int32Array'],
  i64: ['BigInt64Array'],
  u64: ['BigUint64Array'],
  bf16: ['Uint16Array'],
  u16: ['Uint16Array'],
  u8: ['Uint8Array', 'Buffer'],
};

/** Where a library of this package lies, built or not. */
export function libraryPath(name: LibraryName): string {
  return join(packageRoot(), 'dist', 'native', `libnn_${name}.${process.platform === 'darwin' ? 'dylib' : 'so'}`);
}

const loaded = new Map<string, Native>();

/**
 * Binds every function of a library, once for each path and thread. Throws LIBRARY_INVALID when the file is missing, cannot be
 * loaded, lacks a function, or speaks another version of the ABI.
 */
export function loadLibrary(path: string): Native {
  const known = loaded.get(path);
  if (known !== undefined) return known;
  const how = path === libraryPath('cuda') ? 'npm run build, which needs nvcc for CUDA' : 'npm run build';
  const invalid = (problem: string, cause?: unknown): NnError =>
    new NnError('LIBRARY_INVALID', `native library ${path} ${problem}; build it with: ${how}`, { path }, cause);
  if (!existsSync(path)) throw invalid('is missing');
  let library: ReturnType<typeof koffi.load>;
  try {
    library = koffi.load(path);
  } catch (error) {
    throw invalid(`cannot be loaded (${(error as Error).message})`, error);
  }
  const bind = (name: string, prototype: string): unknown => {
    try {
      return library.func(prototype);
    } catch (error) {
      throw invalid(`lacks the function ${name}`, error);
    }
  };
  // The version comes first: a library of another version may well lack functions, and its age is the better message.
  const version = (bind('nn_abi_version', PROTOTYPES.nn_abi_version) as () => number)();
  if (version !== ABI_VERSION) throw invalid(`has ABI version ${version}, but this build needs ${ABI_VERSION}`);
  const native = Object.fromEntries(Object.entries(PROTOTYPES).map(([name, prototype]) => [name, bind(name, prototype)])) as unknown as Native;
  loaded.set(path, native);
  return native;
}

/** What the last failing call on a context (0: of this thread) had to say. */
function errorMessage(native: Native, context: number): string {
  const text = new Uint8Array(1024);
  const status = native.nn_error_message(context, text, text.length);
  return status === 0 ? textOf(text) : `no message (status ${status})`;
}

const textOf = (bytes: Uint8Array): string => {
  const end = bytes.indexOf(0);
  return Buffer.from(bytes.subarray(0, end === -1 ? bytes.length : end)).toString('utf8');
};

function throwStatus(native: Native, context: number, call: string, status: number): never {
  const said = errorMessage(native, context);
  const code = STATUS_CODES[status];
  if (code !== undefined) throw new NnError(code, said === '' ? `${call} failed` : `${call}: ${said}`, { kernel: call });
  const kind = status === STATUS_ARGUMENT ? 'impossible argument' : status === STATUS_WORKSPACE ? 'workspace too small' : `status ${status}`;
  throw new Error(`${call}: ${kind}: ${said}`);
}

function describe({ native, name, note }: Choice, index: number): DeviceDescription {
  const text = new Uint8Array(4096);
  const status = native.nn_device_describe(text, index, text.length);
  if (status !== 0) throwStatus(native, 0, 'nn_device_describe', status);
  const described = JSON.parse(textOf(text)) as Omit<DeviceDescription, 'library' | 'index' | 'note'>;
  return { library: name, index, ...described, ...(note === undefined ? {} : { note }) };
}

function deviceCount(native: Native): number {
  const count = new Int32Array(1);
  const status = native.nn_device_count(count);
  if (status !== 0) throwStatus(native, 0, 'nn_device_count', status);
  return count[0]!;
}

/** Why nn_device_count has just counted none, '' where the library has nothing to say. */
const whyNone = (native: Native): string => errorMessage(native, 0);

/** Why describeDevices finds none: no driver, one too old, no GPU. '' where there is nothing to say. Throws LIBRARY_INVALID. */
export function whyNoDevice(library: LibraryName): string {
  const native = loadLibrary(libraryPath(library));
  return deviceCount(native) === 0 ? whyNone(native) : '';
}

interface Choice {
  readonly name: LibraryName;
  readonly native: Native;
  readonly note?: string;
}

/** `auto` resolved: CUDA where its library is built, loads and finds a GPU. One that does not load is noted, as the CPU can do it all. */
function choose(library: 'auto' | LibraryName): Choice {
  if (library !== 'auto') return { name: library, native: loadLibrary(libraryPath(library)) };
  let note: string | undefined;
  if (existsSync(libraryPath('cuda'))) {
    try {
      const native = loadLibrary(libraryPath('cuda'));
      if (deviceCount(native) > 0) return { name: 'cuda', native };
    } catch (error) {
      if (!['LIBRARY_INVALID', 'DEVICE_UNAVAILABLE'].includes(errorCode(error) ?? '')) throw error;
      note = (error as Error).message;
    }
  }
  return { name: 'cpu', native: loadLibrary(libraryPath('cpu')), ...(note === undefined ? {} : { note }) };
}

/** Every device of a library. Throws LIBRARY_INVALID. */
export function describeDevices(library: 'auto' | LibraryName): DeviceDescription[] {
  const choice = choose(library);
  return Array.from({ length: deviceCount(choice.native) }, (_, index) => describe(choice, index));
}

/** Bytes of host memory that can be taken without swapping, inside the limit of a container. */
export function hostFreeBytes(): number {
  try {
    return describeDevices('cpu')[0]!.freeBytes;
  } catch (error) {
    if (errorCode(error) !== 'LIBRARY_INVALID') throw error;
    // Knows of a container's limit, but not what the other processes in it use.
    return process.availableMemory();
  }
}

/** One opened device: its memory and its kernels. */
export class Device {
  readonly kernels: Kernels;
  readonly #native: Native;
  readonly #choice: Choice;
  readonly #index: number;
  #context: number;
  #description: DeviceDescription;
  /** Addresses that are allocated, so that close() leaves nothing and a second free is noticed. */
  readonly #allocations = new Set<number>();
  readonly #address = new BigUint64Array(1);
  readonly #graphs = new Set<number>();
  #isRecording = false;

  /** Throws LIBRARY_INVALID, DEVICE_UNAVAILABLE (no such device, too old, or its driver refuses) or DEVICE_MEMORY. */
  static open(options: DeviceOptions): Device {
    const choice = choose(options.library);
    const { name, native } = choice;
    const count = deviceCount(native);
    if (!(Number.isInteger(options.index) && options.index >= 0 && options.index < count)) {
      const why = whyNone(native);
      const there = count === 0 ? `there is none${why === '' ? '' : ` (${why})`}` : `there ${count === 1 ? 'is 1' : `are ${count}`}, counted from 0`;
      throw new NnError('DEVICE_UNAVAILABLE', `${name} device ${options.index} is not there: ${there}`, { library: name, index: options.index });
    }
    return new Device(choice, options.index, options.threads);
  }

  private constructor(choice: Choice, index: number, threads: number) {
    const { native } = choice;
    this.#native = native;
    this.#choice = choice;
    this.#index = index;
    const status = native.nn_context_create(this.#address, index, threads);
    if (status !== 0) throwStatus(native, 0, 'nn_context_create', status);
    this.#context = Number(this.#address[0]);
    this.#description = describe(choice, index);
    this.kernels = new Kernels(native, this.#context, (kernel, failed) => throwStatus(native, this.#context, kernel, failed));
  }

  /** The device as it was when it was opened. */
  get description(): DeviceDescription {
    return this.#description;
  }

  /** Bytes that can be allocated now. */
  freeBytes(): number {
    this.#description = describe(this.#choice, this.#index);
    return this.#description.freeBytes;
  }

  /** Device memory that is not cleared. Throws DEVICE_MEMORY. A length of 0 has an address too. */
  allocate(dtype: DType, length: number): Tensor {
    this.#refuseWhileRecording('allocate');
    if (!(Number.isSafeInteger(length) && length >= 0)) throw new Error(`allocate: ${length} is no length`);
    this.#call('nn_allocate', this.#native.nn_allocate(this.#context, this.#address, Math.max(1, length) * elementBytes(dtype)));
    const address = Number(this.#address[0]);
    this.#allocations.add(address);
    return { address, dtype, length };
  }

  /** Gives back what allocate gave. Anything else, a slice for instance, is a bug. */
  free(tensor: Tensor): void {
    this.#refuseWhileRecording('free');
    if (!this.#allocations.delete(tensor.address)) throw new Error('free: this memory was not allocated here, or was freed before');
    this.#call('nn_free', this.#native.nn_free(this.#context, tensor.address));
  }

  /** Copies all of `from` to the start of `to`. The element types must agree (bf16 travels as Uint16Array). */
  upload(to: Tensor, from: TypedArray): void {
    this.#refuseWhileRecording('upload');
    this.#checkCopy('upload', to, from);
    this.#call('nn_copy_to_device', this.#native.nn_copy_to_device(this.#context, to.address, from, from.byteLength));
  }

  /** Waits for the device, then fills all of `into` from the start of `from`. */
  download(into: TypedArray, from: Tensor): void {
    this.#refuseWhileRecording('download');
    this.#checkCopy('download', from, into);
    this.#call('nn_copy_to_host', this.#native.nn_copy_to_host(this.#context, into, from.address, into.byteLength));
  }

  /** Waits for everything that was queued; throws DEVICE_FAULT if any of it failed. */
  synchronize(): void {
    this.#refuseWhileRecording('synchronize');
    this.#call('nn_synchronize', this.#native.nn_synchronize(this.#context));
  }

  /** Lends device memory to the kernels as scratch; null takes it back. */
  setWorkspace(tensor: Tensor | null): void {
    const [address, bytes] = tensor === null ? [0, 0] : [tensor.address, tensorBytes(tensor)];
    this.#call('nn_set_workspace', this.#native.nn_set_workspace(this.#context, address, bytes));
  }

  /** Scratch with which every kernel works for these sizes, in bytes. */
  workspaceBytes({ T, S, H, F, E, K, V, Q, G, D }: WorkspaceSizes, dtype: ComputeType): number {
    const bytes = new BigInt64Array(1);
    const status = this.#native.nn_workspace_bytes(this.#context, bytes, T, S, H, F, E, K, V, Q, G, D, dtype === 'f32' ? 0 : 1);
    this.#call('nn_workspace_bytes', status);
    return Number(bytes[0]);
  }

  /** The float32 multiply-adds a second, times two, that the device's registers allow, measured for about so many seconds. */
  peakFlops(seconds: number): number {
    const flops = new Float64Array(1);
    this.#call('nn_peak_flops', this.#native.nn_peak_flops(this.#context, flops, seconds));
    return flops[0]!;
  }

  /** Whether this device records graphs. One that does not gains nothing from them. */
  get recordsGraphs(): boolean {
    return this.#choice.name === 'cuda';
  }

  /**
   * Records the kernels that `calls` calls, without running them. Addresses, sizes and scalars are those of the recording;
   * nothing may be copied to or from the host, allocated or waited for. Throws DEVICE_UNSUPPORTED where !recordsGraphs.
   */
  record(calls: () => void): Graph {
    this.#refuseWhileRecording('record');
    this.#call('nn_graph_begin', this.#native.nn_graph_begin(this.#context));
    this.#isRecording = true;
    const end = (): number => {
      this.#isRecording = false;
      return this.#native.nn_graph_end(this.#context, this.#address);
    };
    try {
      calls();
    } catch (error) {
      // The recording must end, or the queue is of no more use; the first error is the one to tell.
      if (end() === 0) this.#native.nn_graph_destroy(this.#context, Number(this.#address[0]));
      throw error;
    }
    this.#call('nn_graph_end', end());
    const handle = Number(this.#address[0]);
    this.#graphs.add(handle);
    return { handle };
  }

  /** Queues everything that was recorded. */
  launch({ handle }: Graph): void {
    if (!this.#graphs.has(handle)) throw new Error('launch: this graph was not recorded here, or was discarded before');
    this.#call('nn_graph_launch', this.#native.nn_graph_launch(this.#context, handle));
  }

  /** Gives a graph's memory back. */
  discard({ handle }: Graph): void {
    if (!this.#graphs.delete(handle)) throw new Error('discard: this graph was not recorded here, or was discarded before');
    this.#call('nn_graph_destroy', this.#native.nn_graph_destroy(this.#context, handle));
  }

  /** Runs `calls` and waits; the milliseconds that the device was at it, by its own clock. */
  time(calls: () => void): number {
    const elapsed = new Float64Array(1);
    this.#call('nn_timer_start', this.#native.nn_timer_start(this.#context, this.#address));
    const timer = Number(this.#address[0]);
    try {
      calls();
    } finally {
      this.#call('nn_timer_stop', this.#native.nn_timer_stop(this.#context, elapsed, timer));
    }
    return elapsed[0]!;
  }

  /** Frees what is still allocated and closes the device. Closing twice is allowed. */
  close(): void {
    if (this.#context === 0) return;
    for (const handle of this.#graphs) this.#call('nn_graph_destroy', this.#native.nn_graph_destroy(this.#context, handle));
    this.#graphs.clear();
    for (const address of this.#allocations) this.#call('nn_free', this.#native.nn_free(this.#context, address));
    this.#allocations.clear();
    const status = this.#native.nn_context_destroy(this.#context);
    this.#context = 0;
    if (status !== 0) throwStatus(this.#native, 0, 'nn_context_destroy', status);
  }

  #call(name: string, status: number): void {
    if (status !== 0) throwStatus(this.#native, this.#context, name, status);
  }

  #refuseWhileRecording(what: string): void {
    if (this.#isRecording) throw new Error(`${what}: a graph is being recorded, which only kernels may be part of`);
  }

  #checkCopy(what: string, tensor: Tensor, host: TypedArray): void {
    if (!ArrayBuffer.isView(host)) refuse(what, 'the host side', host, 'typed array', tensor.length);
    if (!(ARRAY_TYPES[tensor.dtype] ?? []).includes(host.constructor.name)) refuse(what, 'the host side', host, `host ${tensor.dtype}`, tensor.length);
    if (host.length > tensor.length) refuse(what, 'the device side', tensor, tensor.dtype, host.length);
  }
}
