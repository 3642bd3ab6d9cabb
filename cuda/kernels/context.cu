/* context.cu: devices, contexts, memory and failures of the CUDA library. Knows no kernel. The CUDA runtime is linked in statically
 * and opens the driver at run time, so that this library loads, and says what is missing, on a machine without one.
 */
#include <stdarg.h>
#include <string.h>

#include "common.cuh"

static thread_local char thread_error[512];
static thread_local int thread_device = -1;

nn_status nn_fail(nn_context *context, nn_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(context ? context->error : thread_error, sizeof thread_error, format, arguments);
  va_end(arguments);
  return status;
}

/* An error that a launch or an allocation may return and survive; every other one stays until the process ends. */
static nn_status status_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return NN_OK;
    case cudaErrorMemoryAllocation: return NN_ERROR_MEMORY;
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorInitializationError:
    case cudaErrorStubLibrary:
    case cudaErrorDevicesUnavailable:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorSystemNotReady: return NN_ERROR_DEVICE;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion: return NN_ERROR_UNSUPPORTED;
    default: return NN_ERROR_FAULT;
  }
}

static const char *advice_for(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver: { /* also what CUDA says where there is no driver; its version is then 0 */
      int version = 0;
      cudaDriverGetVersion(&version);
      return version == 0 ? " (this machine has no NVIDIA driver)" : " (install a newer NVIDIA driver: this library needs one for CUDA 13)";
    }
    case cudaErrorStubLibrary: return " (a stub of libcuda was loaded instead of the driver's)";
    case cudaErrorNoKernelImageForDevice: return " (this GPU is older than compute capability 8.0)";
    default: return "";
  }
}

nn_status nn_cuda_status(nn_context *context, cudaError_t error, const char *where) {
  if (error == cudaSuccess) return NN_OK;
  return nn_fail(context, status_of(error), "%s: %s: %s%s", where, cudaGetErrorName(error), cudaGetErrorString(error),
                 advice_for(error));
}

nn_status nn_enter(nn_context *context, const char *where) {
  if (thread_device == context->device) return NN_OK;
  nn_status status = nn_cuda_status(context, cudaSetDevice(context->device), where);
  if (status == NN_OK) thread_device = context->device;
  return status;
}

extern "C" {

int32_t nn_abi_version(void) { return NN_ABI_VERSION; }

nn_status nn_device_count(int32_t *count) {
  if (count == NULL) return nn_fail(NULL, NN_ERROR_ARGUMENT, "nn_device_count: count is NULL");
  int found = 0;
  cudaError_t error = cudaGetDeviceCount(&found);
  if (error != cudaSuccess) {
    cudaGetLastError();
    nn_fail(NULL, NN_OK, "no usable GPU: %s: %s%s", cudaGetErrorName(error), cudaGetErrorString(error), advice_for(error));
    found = 0;
  }
  *count = found;
  return NN_OK;
}

static nn_status check_device(int32_t device, cudaDeviceProp *properties) {
  int32_t count = 0;
  nn_device_count(&count);
  if (count == 0) {
    char why[400];
    snprintf(why, sizeof why, "%s", thread_error);
    return nn_fail(NULL, NN_ERROR_DEVICE, "GPU %d: %s", device, why[0] ? why : "no GPU in this machine");
  }
  if (device < 0 || device >= count)
    return nn_fail(NULL, NN_ERROR_DEVICE, "GPU %d does not exist: this machine has %d (0 to %d)", device, count, count - 1);
  cudaError_t error = cudaGetDeviceProperties(properties, device);
  if (error != cudaSuccess) return nn_cuda_status(NULL, error, "nn_device_describe");
  return NN_OK;
}

nn_status nn_device_describe(char *json, int32_t device, int64_t capacity) {
  if (json == NULL || capacity < 1) return nn_fail(NULL, NN_ERROR_ARGUMENT, "nn_device_describe: no room for the answer");
  cudaDeviceProp properties;
  NN_TRY(check_device(device, &properties));
  int driver = 0, runtime = 0, previous = -1;
  size_t free_bytes = 0, total_bytes = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  cudaGetDevice(&previous);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaMemGetInfo(&free_bytes, &total_bytes);
  if (previous >= 0) cudaSetDevice(previous);
  if (error != cudaSuccess) return nn_cuda_status(NULL, error, "nn_device_describe");
  int length = snprintf(json, (size_t)capacity,
                        "{\"kind\":\"cuda\",\"name\":\"%s\",\"memoryBytes\":%llu,\"freeBytes\":%llu,\"cores\":%d,"
                        "\"computeCapability\":\"%d.%d\",\"driverVersion\":\"%d.%d\",\"runtimeVersion\":\"%d.%d\"}",
                        properties.name, (unsigned long long)total_bytes, (unsigned long long)free_bytes,
                        properties.multiProcessorCount, properties.major, properties.minor, driver / 1000, driver % 1000 / 10,
                        runtime / 1000, runtime % 1000 / 10);
  if (length >= capacity) return nn_fail(NULL, NN_ERROR_ARGUMENT, "nn_device_describe: needs %d bytes", length + 1);
  return NN_OK;
}

nn_status nn_context_create(uint64_t *out, int32_t device, int32_t threads) {
  (void)threads;
  if (out == NULL) return nn_fail(NULL, NN_ERROR_ARGUMENT, "nn_context_create: context is NULL");
  *out = 0;
  cudaDeviceProp properties;
  NN_TRY(check_device(device, &properties));
  if (properties.major < 8)
    return nn_fail(NULL, NN_ERROR_UNSUPPORTED, "GPU %d (%s) has compute capability %d.%d; this library needs 8.0 or newer", device,
                   properties.name, properties.major, properties.minor);
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return nn_cuda_status(NULL, error, "nn_context_create");
  thread_device = device;
  cudaStream_t stream;
  error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return nn_cuda_status(NULL, error, "nn_context_create");
  nn_context *context = new nn_context();
  context->device = device;
  context->stream = stream;
  context->multiprocessors = properties.multiProcessorCount;
  context->capability = 10 * properties.major + properties.minor;
  *out = (uint64_t)(uintptr_t)context;
  return NN_OK;
}

nn_status nn_context_destroy(nn_context *context) {
  NN_ENTER(context, true);
  cudaError_t error = cudaStreamDestroy(context->stream);
  delete context;
  return nn_cuda_status(NULL, error, "nn_context_destroy");
}

nn_status nn_error_message(nn_context *context, char *text, int64_t capacity) {
  if (text == NULL || capacity < 1) return NN_ERROR_ARGUMENT;
  snprintf(text, (size_t)capacity, "%s", context ? context->error : thread_error);
  return NN_OK;
}

nn_status nn_allocate(nn_context *context, uint64_t *address, int64_t bytes) {
  NN_ENTER(context, address != NULL && bytes >= 0);
  void *memory = NULL;
  cudaError_t error = cudaMalloc(&memory, bytes > 0 ? (size_t)bytes : 256);
  if (error == cudaErrorMemoryAllocation) {
    size_t free_bytes = 0, total_bytes = 0;
    cudaGetLastError();
    cudaMemGetInfo(&free_bytes, &total_bytes);
    return nn_fail(context, NN_ERROR_MEMORY, "GPU %d: %lld bytes wanted, %llu of %llu are free", context->device, (long long)bytes,
                   (unsigned long long)free_bytes, (unsigned long long)total_bytes);
  }
  NN_CUDA(context, error);
  *address = (uint64_t)(uintptr_t)memory;
  return NN_OK;
}

nn_status nn_free(nn_context *context, uint64_t address) {
  NN_ENTER(context, true);
  NN_CUDA(context, cudaFree((void *)(uintptr_t)address));
  return NN_OK;
}

nn_status nn_set_workspace(nn_context *context, uint64_t address, int64_t bytes) {
  NN_ENTER(context, bytes >= 0 && address % 256 == 0);
  context->workspace = (char *)(uintptr_t)address;
  context->workspace_bytes = bytes;
  return NN_OK;
}

nn_status nn_copy_to_device(nn_context *context, void *destination, const void *source, int64_t bytes) {
  NN_ENTER(context, bytes >= 0);
  if (bytes == 0) return NN_OK;
  NN_CUDA(context, cudaMemcpyAsync(destination, source, (size_t)bytes, cudaMemcpyHostToDevice, context->stream));
  return NN_OK;
}

nn_status nn_copy_to_host(nn_context *context, void *destination, const void *source, int64_t bytes) {
  NN_ENTER(context, bytes >= 0);
  if (bytes > 0)
    NN_CUDA(context, cudaMemcpyAsync(destination, source, (size_t)bytes, cudaMemcpyDeviceToHost, context->stream));
  NN_CUDA(context, cudaStreamSynchronize(context->stream));
  return NN_OK;
}

nn_status nn_copy(nn_context *context, void *destination, const void *source, int64_t bytes) {
  NN_ENTER(context, bytes >= 0);
  if (bytes == 0) return NN_OK;
  NN_CUDA(context, cudaMemcpyAsync(destination, source, (size_t)bytes, cudaMemcpyDeviceToDevice, context->stream));
  return NN_OK;
}

nn_status nn_synchronize(nn_context *context) {
  NN_ENTER(context, true);
  NN_CUDA(context, cudaStreamSynchronize(context->stream));
  return NN_OK;
}

} /* extern "C" */
