/**
 * A library that is the real one but for one call. CUDA: the N-th copy to the host is preceded by a kernel that writes where it must
 * not, which leaves the GPU's context broken until its process ends. CPU: that copy and all after it say that the device has a
 * fault, which is the same to everything above. It happens once: the file FAULT_MARK says that it has. For the test that a
 * sticky error costs one process and no bit; built when that test runs, by nvcc or the C compiler.
 *
 *   FAULT_AT  number of the copy to the host at which it happens      FAULT_MARK  path of the file
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { libraryPath } from '../../cuda/device.ts';
import type { LibraryName } from '../../cuda/device.ts';

const HEAD = String.raw`
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef __cplusplus
extern "C" {
#endif
int nn_abi_version(void);
__attribute__((used)) int (*const nn_needed)(void) = nn_abi_version; // or the linker leaves the real library out
__attribute__((visibility("default"))) int nn_copy_to_host(void *context, void *destination, const void *source, int64_t bytes);
#ifdef __cplusplus
}
#endif
typedef int (*Copy)(void *, void *, const void *, int64_t);
/* Whether this is the call at which it happens. */
static int is_time(void) {
  static long long calls = 0;
  const char *at = getenv("FAULT_AT"), *mark = getenv("FAULT_MARK");
  if (++calls != (at ? atoll(at) : -1) || mark == NULL || access(mark, F_OK) == 0) return 0;
  FILE *file = fopen(mark, "w");
  if (file) fclose(file);
  return 1;
}
`;

const SOURCES = {
  cuda: String.raw`${HEAD}
#include <cuda_runtime.h>
__global__ void write_nowhere(int *nowhere) { *nowhere = 1; }
int nn_copy_to_host(void *context, void *destination, const void *source, int64_t bytes) {
  static Copy real = (Copy)dlsym(RTLD_NEXT, "nn_copy_to_host");
  if (real == NULL) return 5;
  if (is_time()) {
    write_nowhere<<<1, 1>>>((int *)0x10);
    cudaDeviceSynchronize();
  }
  return real(context, destination, source, bytes);
}
`,
  cpu: String.raw`${HEAD}
int nn_copy_to_host(void *context, void *destination, const void *source, int64_t bytes) {
  static int is_broken = 0;
  Copy real = (Copy)dlsym(RTLD_NEXT, "nn_copy_to_host");
  if (real == NULL) return 5;
  is_broken |= is_time();
  return is_broken ? 6 : real(context, destination, source, bytes);
}
`,
} as const;

/** Builds it in `directory`; its path. Throws what the compiler says. */
export function buildFaultyLibrary(directory: string, name: LibraryName): string {
  const [source, library] = [join(directory, name === 'cuda' ? 'faulty.cu' : 'faulty.c'), join(directory, `libnn_faulty_${name}.so`)];
  writeFileSync(source, SOURCES[name]);
  const ends = ['-o', library, source, libraryPath(name), '-ldl'];
  if (name === 'cuda') execFileSync('nvcc', ['-std=c++17', '-gencode=arch=compute_80,code=compute_80', '-Xcompiler', '-fPIC', '-shared', ...ends], { stdio: 'pipe' });
  else execFileSync(process.env['CC'] ?? 'cc', ['-O1', '-fPIC', '-shared', ...ends], { stdio: 'pipe' });
  return library;
}
