/* context.c: the library, device and memory sections of nn.h for the CPU.
 *
 * Owns the context's life, the choice of instruction set and what the machine says about itself. Knows no kernel. "Device
 * memory" is the process's own memory, on huge pages where the system has them.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "internal.h"

#define HUGE_PAGE_BYTES ((int64_t)2 << 20)

static _Thread_local char thread_error[NN_ERROR_TEXT_BYTES];

nn_status nn_fail(nn_context *context, nn_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(context != NULL ? context->error : thread_error, NN_ERROR_TEXT_BYTES, format, arguments);
  va_end(arguments);
  return status;
}

/* ---- waiting threads ------------------------------------------------------------------------------------------------- */

#if defined(__GLIBC__)
/* By default GNU's OpenMP spins for some 10 ms where a thread waits for the others. On a machine with anything else to do the
 * thread waited for then does not get its core back: measured beside one busy process, a training step took 1900 ms instead of
 * 460. Its only knob is the environment, read when it is loaded: this library is linked with -z initfirst, so that this runs
 * before. Where it does not (another C library), set GOMP_SPINCOUNT=1000 for the process. */
__attribute__((constructor)) static void spin_briefly(void) {
  if (getenv("OMP_WAIT_POLICY") == NULL) setenv("GOMP_SPINCOUNT", "1000", 0);
}
#endif

/* ---- the machine ---------------------------------------------------------------------------------------------------- */

static const char *const isa_names[] = {"plain", "avx2", "avx512"};

static nn_isa detect_isa(void) {
  nn_isa best = NN_ISA_PLAIN;
#if NN_HAS_X86
  __builtin_cpu_init(); /* asks the operating system too, whether it saves the wide registers */
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = NN_ISA_AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
      best = NN_ISA_AVX512;
  }
#endif
  const char *wish = getenv("CUDA_NN_ISA");
  for (int isa = 0; wish != NULL && isa < (int)best; isa++)
    if (strcmp(wish, isa_names[isa]) == 0) return (nn_isa)isa;
  return best;
}

/* The number after `key` in a file of "key: number kB" lines, in bytes; -1 when it is not there. */
static int64_t read_kilobytes(const char *path, const char *key) {
  FILE *file = fopen(path, "r");
  if (file == NULL) return -1;
  char line[256];
  long long value = -1;
  while (value < 0 && fgets(line, sizeof line, file) != NULL)
    if (strncmp(line, key, strlen(key)) == 0) sscanf(line + strlen(key), ": %lld", &value);
  fclose(file);
  return value < 0 ? -1 : value * 1024;
}

/* A number alone in a file; -1 when there is none ("max"). */
static int64_t read_number(const char *path) {
  FILE *file = fopen(path, "r");
  if (file == NULL) return -1;
  long long value = -1;
  if (fscanf(file, "%lld", &value) != 1) value = -1;
  fclose(file);
  return value;
}

static int64_t memory_bytes(void) {
#if defined(__APPLE__)
  int64_t bytes = 0;
  size_t length = sizeof bytes;
  return sysctlbyname("hw.memsize", &bytes, &length, NULL, 0) == 0 ? bytes : 0;
#else
  int64_t bytes = (int64_t)sysconf(_SC_PHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE);
  int64_t limit = read_number("/sys/fs/cgroup/memory.max");
  return limit > 0 && limit < bytes ? limit : bytes;
#endif
}

/* What can be taken without swapping, inside the limit of a container. */
static int64_t free_bytes(void) {
#if defined(__linux__)
  int64_t available = read_kilobytes("/proc/meminfo", "MemAvailable");
  if (available < 0) available = memory_bytes();
  int64_t limit = read_number("/sys/fs/cgroup/memory.max"), used = read_number("/sys/fs/cgroup/memory.current");
  if (limit > 0 && used >= 0) {
    /* The page cache of files counts as used but gives way. */
    int64_t room = nn_max64(0, limit - used), cache = 0;
    FILE *file = fopen("/sys/fs/cgroup/memory.stat", "r");
    char line[128];
    long long value;
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
      if (sscanf(line, "inactive_file %lld", &value) == 1) cache = value;
    if (file != NULL) fclose(file);
    available = nn_min64(available, room + cache);
  }
  return available;
#else
  return memory_bytes();
#endif
}

/* The CPU's name without control characters, quotes and backslashes, so that it can stand in JSON. */
static void cpu_name(char *name, size_t capacity) {
  snprintf(name, capacity, "CPU");
#if defined(__APPLE__)
  size_t length = capacity;
  sysctlbyname("machdep.cpu.brand_string", name, &length, NULL, 0);
#else
  FILE *file = fopen("/proc/cpuinfo", "r");
  char line[256];
  while (file != NULL && fgets(line, sizeof line, file) != NULL) {
    char *colon = strchr(line, ':');
    if (strncmp(line, "model name", 10) != 0 || colon == NULL) continue;
    snprintf(name, capacity, "%.*s", (int)strcspn(colon + 1, "\n") - (colon[1] == ' '), colon + 1 + (colon[1] == ' '));
    break;
  }
  if (file != NULL) fclose(file);
#endif
  for (char *c = name; *c != '\0'; c++)
    if (*c == '"' || *c == '\\' || (unsigned char)*c < 0x20) *c = ' ';
}

/* ---- library and devices -------------------------------------------------------------------------------------------- */

int32_t nn_abi_version(void) { return NN_ABI_VERSION; }

nn_status nn_device_count(int32_t *count) {
  *count = 1;
  return NN_OK;
}

nn_status nn_device_describe(char *json, int32_t device, int64_t capacity) {
  if (device != 0) return nn_fail(NULL, NN_ERROR_DEVICE, "the CPU library has device 0 only, not %d", device);
  char name[128];
  cpu_name(name, sizeof name);
  int length = snprintf(json, capacity > 0 ? (size_t)capacity : 0,
                        "{\"kind\":\"cpu\",\"name\":\"%s\",\"memoryBytes\":%lld,\"freeBytes\":%lld,\"cores\":%d,\"isa\":\"%s\"}",
                        name, (long long)memory_bytes(), (long long)free_bytes(), omp_get_num_procs(),
                        isa_names[detect_isa()]);
  if (length >= capacity) return nn_fail(NULL, NN_ERROR_ARGUMENT, "nn_device_describe: needs a capacity of %d", length + 1);
  return NN_OK;
}

/* Aligned memory, on huge pages where that is worth it and the system can; NULL when there is none. */
static void *allocate(int64_t bytes, int64_t alignment) {
  void *memory = NULL;
  if (bytes >= HUGE_PAGE_BYTES) alignment = HUGE_PAGE_BYTES;
  if (posix_memalign(&memory, (size_t)alignment, (size_t)nn_max64(bytes, 1)) != 0) return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= HUGE_PAGE_BYTES) (void)madvise(memory, (size_t)bytes, MADV_HUGEPAGE); /* advice: without it, only slower */
#endif
  return memory;
}

nn_status nn_context_create(uint64_t *context, int32_t device, int32_t threads) {
  *context = 0;
  if (device != 0) return nn_fail(NULL, NN_ERROR_DEVICE, "the CPU library has device 0 only, not %d", device);
  if (threads < 0) return nn_fail(NULL, NN_ERROR_ARGUMENT, "nn_context_create: threads is %d", threads);
  nn_context *made = calloc(1, sizeof *made);
  if (made == NULL) return nn_fail(NULL, NN_ERROR_MEMORY, "no memory for a context");
#ifdef _OPENMP
  made->threads = (int)nn_min64(threads > 0 ? threads : omp_get_num_procs(), NN_MAX_THREADS);
#else
  made->threads = 1;
#endif
  made->isa = detect_isa();
  made->scratch = allocate(made->threads * NN_THREAD_SCRATCH_BYTES, 4096);
  if (made->scratch == NULL) {
    free(made);
    return nn_fail(NULL, NN_ERROR_MEMORY, "no memory for the scratch of %d threads", threads);
  }
  *context = (uint64_t)(uintptr_t)made;
  return NN_OK;
}

nn_status nn_context_destroy(nn_context *context) {
  if (context == NULL) return NN_OK;
  free(context->scratch);
  free(context);
  return NN_OK;
}

nn_status nn_error_message(nn_context *context, char *text, int64_t capacity) {
  if (capacity > 0) snprintf(text, (size_t)capacity, "%s", context != NULL ? context->error : thread_error);
  return NN_OK;
}

/* ---- memory --------------------------------------------------------------------------------------------------------- */

nn_status nn_allocate(nn_context *context, uint64_t *address, int64_t bytes) {
  *address = 0;
  NN_REQUIRE(context, bytes >= 0);
  /* Linux promises more than it has: without this check the process would be killed at the first use instead. */
  int64_t available = bytes >= HUGE_PAGE_BYTES ? free_bytes() : INT64_MAX;
  void *memory = bytes <= available ? allocate(bytes, 256) : NULL;
  if (memory == NULL)
    return nn_fail(context, NN_ERROR_MEMORY, "%lld bytes of memory asked for, %lld free", (long long)bytes,
                   (long long)free_bytes());
  *address = (uint64_t)(uintptr_t)memory;
  return NN_OK;
}

nn_status nn_free(nn_context *context, uint64_t address) {
  if (context->workspace == (char *)(uintptr_t)address) context->workspace = NULL, context->workspace_bytes = 0;
  free((void *)(uintptr_t)address);
  return NN_OK;
}

nn_status nn_set_workspace(nn_context *context, uint64_t address, int64_t bytes) {
  NN_REQUIRE(context, bytes >= 0 && address % 256 == 0);
  context->workspace = (char *)(uintptr_t)address;
  context->workspace_bytes = address == 0 ? 0 : bytes;
  return NN_OK;
}

nn_status nn_workspace_bytes(nn_context *context, int64_t *bytes, int64_t T, int64_t S, int64_t H, int64_t F, int64_t E,
                             int64_t K, int64_t V, int64_t Q, int64_t G, int64_t D, nn_dtype dtype) {
  NN_REQUIRE(context, T >= 0 && S >= 0 && H >= 0 && F >= 0 && E >= 0 && K >= 0 && V >= 0 && Q >= 0 && G >= 0 && D >= 0);
  NN_REQUIRE_F32(context, dtype);
  nn_sizes sizes = {T, S, H, F, E, K, V, Q, G, D};
  int64_t need = nn_rows_workspace_bytes(&sizes);
  need = nn_max64(need, nn_moe_workspace_bytes(&sizes));
  need = nn_max64(need, nn_linear_cross_entropy_workspace_bytes(&sizes));
  need = nn_max64(need, nn_sample_workspace_bytes(context, &sizes));
  need += nn_decode_step_workspace_bytes(&sizes);
  *bytes = (need + 4095) & ~(int64_t)4095;
  return NN_OK;
}

nn_status nn_copy_to_device(nn_context *context, void *destination, const void *source, int64_t bytes) {
  NN_REQUIRE(context, bytes >= 0);
  if (bytes > 0) memcpy(destination, source, (size_t)bytes);
  return NN_OK;
}

nn_status nn_copy_to_host(nn_context *context, void *destination, const void *source, int64_t bytes) {
  return nn_copy_to_device(context, destination, source, bytes);
}

nn_status nn_copy(nn_context *context, void *destination, const void *source, int64_t bytes) {
  return nn_copy_to_device(context, destination, source, bytes);
}

nn_status nn_synchronize(nn_context *context) {
  (void)context;
  return NN_OK;
}
