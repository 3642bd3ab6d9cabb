/**
 * A copy of the built package whose CUDA library sees GPUs that are not there: cuda/kernels/context.cu as it is, linked with a CUDA
 * runtime of twenty lines that reads what it should say from the environment, and without kernels. For tests of refusals on machines
 * without a GPU; it needs nvcc to compile context.cu. Also a driver (libcuda.so.1) that is too old for the real library.
 *
 *   FAKE_GPU_COUNT  GPUs there (1)      FAKE_GPU_CAPABILITY  10 * major + minor (90)      FAKE_GPU_FREE  bytes free of 8 GiB (1 GiB)
 *   FAKE_GPU_FAULT  set: waiting for the GPU returns cudaErrorIllegalAddress, as after a kernel that wrote where it must not
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { packageRoot } from '../../config/schema.ts';
import { PROTOTYPES } from '../../cuda/bindings.generated.ts';
import { libraryPath } from '../../cuda/device.ts';
import type { LibraryName } from '../../cuda/device.ts';

const RUNTIME = String.raw`
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
static unsigned long long number(const char *name, unsigned long long otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, NULL, 10) : otherwise;
}
static size_t free_bytes() { return (size_t)number("FAKE_GPU_FREE", 1ull << 30); }
extern "C" {
#define SAY __attribute__((visibility("default"))) cudaError_t
SAY cudaGetDeviceCount(int *count) { *count = (int)number("FAKE_GPU_COUNT", 1); return *count > 0 ? cudaSuccess : cudaErrorNoDevice; }
SAY cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Pretended GPU");
  int capability = (int)number("FAKE_GPU_CAPABILITY", 90);
  p->major = capability / 10, p->minor = capability % 10, p->multiProcessorCount = 4;
  return cudaSuccess;
}
SAY cudaMemGetInfo(size_t *available, size_t *total) { *available = free_bytes(), *total = 8ull << 30; return cudaSuccess; }
SAY cudaMalloc(void **memory, size_t bytes) { *memory = bytes > free_bytes() ? NULL : calloc(1, bytes); return *memory ? cudaSuccess : cudaErrorMemoryAllocation; }
SAY cudaFree(void *memory) { free(memory); return cudaSuccess; }
SAY cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) { memcpy(to, from, bytes); return cudaSuccess; }
SAY cudaStreamSynchronize(cudaStream_t) { return getenv("FAKE_GPU_FAULT") ? cudaErrorIllegalAddress : cudaSuccess; }
SAY cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { *stream = NULL; return cudaSuccess; }
SAY cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
SAY cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
SAY cudaSetDevice(int) { return cudaSuccess; }
SAY cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
SAY cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
SAY cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorIllegalAddress ? "cudaErrorIllegalAddress" : error == cudaErrorNoDevice ? "cudaErrorNoDevice" : "another error";
}
const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
void **__cudaRegisterFatBinary(void *) { return NULL; }
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
char __cudaInitModule(void **) { return 1; }
}
`;

/** What context.cu defines; all else answers NN_ERROR_UNSUPPORTED, but for the workspace, of which none is needed. */
const REAL = [
  'nn_abi_version', 'nn_device_count', 'nn_device_describe', 'nn_context_create', 'nn_context_destroy', 'nn_error_message', 'nn_allocate', 'nn_free',
  'nn_set_workspace', 'nn_copy_to_device', 'nn_copy_to_host', 'nn_copy', 'nn_synchronize',
];

/** Undefined where what it takes to build these libraries is there. */
export function whyNoFakeGpu(): string | undefined {
  if (process.platform !== 'linux') return 'this is not Linux';
  return spawnSync('nvcc', ['--version'], { stdio: 'ignore' }).status === 0 ? undefined : 'no nvcc on the PATH';
}

/** Copies the built package to `directory`, with another library in the place of one of its own; the path of its command line. */
export function packageWithLibrary(directory: string, library: string, name: LibraryName = 'cuda'): string {
  const root = packageRoot();
  const native = join(root, 'dist', 'native');
  mkdirSync(join(directory, 'dist', 'native'), { recursive: true });
  cpSync(join(root, 'package.json'), join(directory, 'package.json'));
  cpSync(join(root, 'dist'), join(directory, 'dist'), { recursive: true, filter: (from) => from !== native });
  symlinkSync(join(root, 'node_modules'), join(directory, 'node_modules'));
  for (const each of ['cpu', 'cuda'] as const) {
    const from = each === name ? library : libraryPath(each);
    if (existsSync(from)) symlinkSync(from, join(directory, 'dist', 'native', `libnn_${each}.so`));
  }
  return join(directory, 'dist', 'cli', 'main.js');
}

/** Builds the CUDA library without kernels on the pretended runtime. */
export function buildFakeGpuLibrary(directory: string): string {
  const path = (name: string): string => join(directory, name);
  const others = Object.keys(PROTOTYPES).filter((name) => !REAL.includes(name));
  const answer = (name: string): string =>
    name === 'nn_workspace_bytes' ? `int ${name}(void *context, long long *bytes) { (void)context; *bytes = 0; return 0; }` : `int ${name}(void) { return 2; }`;
  writeFileSync(path('runtime.cpp'), RUNTIME);
  writeFileSync(path('others.c'), others.map(answer).join('\n'));
  const flags = ['-std=c++17', '-gencode=arch=compute_80,code=sm_80', '-Xcompiler', '-fPIC', '-cudart', 'none'];
  const sources = [join(packageRoot(), 'cuda', 'kernels', 'context.cu'), path('runtime.cpp'), path('others.c')];
  execFileSync('nvcc', [...flags, '-shared', '-o', path('libnn_fake.so'), ...sources], { stdio: 'pipe' });
  return path('libnn_fake.so');
}

/** A libcuda.so.1 in `directory` that says it is CUDA 11.4's: for LD_LIBRARY_PATH. */
export function buildOldDriver(directory: string): void {
  writeFileSync(join(directory, 'driver.c'), 'int cuDriverGetVersion(int *version) { *version = 11040; return 0; }\nint cuInit(unsigned flags) { (void)flags; return 0; }\n');
  execFileSync(process.env['CC'] ?? 'cc', ['-shared', '-fPIC', '-o', join(directory, 'libcuda.so.1'), join(directory, 'driver.c')]);
}
