/**
 * A CUDA library that is the real one but for one call: the N-th copy to the host is preceded by a kernel that writes where it must
 * not, which leaves the GPU's context broken until its process ends. It happens once: the file FAULT_MARK says that it has. For
 * the test that a sticky CUDA error costs one process and no bit; built by nvcc when that test runs.
 *
 *   FAULT_AT  number of the copy to the host at which it happens      FAULT_MARK  path of the file
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { libraryPath } from '../../cuda/device.ts';

const SOURCE = String.raw`
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <cuda_runtime.h>
extern "C" int nn_abi_version();
__attribute__((used)) int (*const needed)() = nn_abi_version; // or the linker leaves the real library out
__global__ void write_nowhere(int *nowhere) { *nowhere = 1; }
extern "C" __attribute__((visibility("default"))) int nn_copy_to_host(void *context, void *destination, const void *source, int64_t bytes) {
  typedef int (*Copy)(void *, void *, const void *, int64_t);
  static Copy real = (Copy)dlsym(RTLD_NEXT, "nn_copy_to_host");
  static long long calls = 0, at = getenv("FAULT_AT") ? atoll(getenv("FAULT_AT")) : -1;
  const char *mark = getenv("FAULT_MARK");
  if (real == NULL) return 5;
  if (++calls == at && mark && access(mark, F_OK) != 0) {
    FILE *file = fopen(mark, "w");
    if (file) fclose(file);
    write_nowhere<<<1, 1>>>((int *)0x10);
    cudaDeviceSynchronize();
  }
  return real(context, destination, source, bytes);
}
`;

/** Builds it in `directory`; its path. Throws what nvcc says. */
export function buildFaultyLibrary(directory: string): string {
  const [source, library] = [join(directory, 'faulty.cu'), join(directory, 'libnn_faulty.so')];
  writeFileSync(source, SOURCE);
  const flags = ['-std=c++17', '-gencode=arch=compute_80,code=compute_80', '-Xcompiler', '-fPIC', '-shared'];
  execFileSync('nvcc', [...flags, '-o', library, source, libraryPath('cuda'), '-ldl'], { stdio: 'pipe' });
  return library;
}
