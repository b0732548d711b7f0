#include "ucx/cuda.h"

#include <dlfcn.h>
#include <unistd.h>

namespace nd {

struct CudaDriver {  // signatures of cuda.h, with its handles as pointers and CUresult as int
  int (*cuInit)(unsigned flags);
  int (*cuDeviceGet)(int* device, int ordinal);
  int (*cuDevicePrimaryCtxRetain)(void** context, int device);
  int (*cuDevicePrimaryCtxRelease_v2)(int device);
  int (*cuCtxSetCurrent)(void* context);
  int (*cuCtxSynchronize)();
  int (*cuStreamCreate)(void** stream, unsigned flags);
  int (*cuStreamDestroy_v2)(void* stream);
  int (*cuStreamSynchronize)(void* stream);
  int (*cuMemcpyHtoDAsync_v2)(unsigned long long to, const void* from, size_t nbytes, void* stream);
  int (*cuMemcpyDtoHAsync_v2)(void* to, unsigned long long from, size_t nbytes, void* stream);
  int (*cuLaunchHostFunc)(void* stream, void (*function)(void*), void* data);
  int (*cuGetErrorString)(int result, const char** text);
};

namespace {

constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING: no waiting for, and none by, the default stream

template <typename Function>
bool resolve(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

const CudaDriver* load_driver() {
  static const CudaDriver* const driver = []() -> const CudaDriver* {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) return nullptr;
    auto* d = new CudaDriver{};
#define ND_RESOLVE(name) \
  if (!resolve(library, #name, &d->name)) return nullptr;
    ND_RESOLVE(cuInit)
    ND_RESOLVE(cuDeviceGet)
    ND_RESOLVE(cuDevicePrimaryCtxRetain)
    ND_RESOLVE(cuDevicePrimaryCtxRelease_v2)
    ND_RESOLVE(cuCtxSetCurrent)
    ND_RESOLVE(cuCtxSynchronize)
    ND_RESOLVE(cuStreamCreate)
    ND_RESOLVE(cuStreamDestroy_v2)
    ND_RESOLVE(cuStreamSynchronize)
    ND_RESOLVE(cuMemcpyHtoDAsync_v2)
    ND_RESOLVE(cuMemcpyDtoHAsync_v2)
    ND_RESOLVE(cuLaunchHostFunc)
    ND_RESOLVE(cuGetErrorString)
#undef ND_RESOLVE
    return d;
  }();
  return driver;
}

}  // namespace

std::unique_ptr<Cuda> Cuda::open(int device, std::string* error) {
  const CudaDriver* driver = load_driver();
  if (driver == nullptr) {
    *error = "libcuda.so.1 cannot be loaded, or is too old";
    return nullptr;
  }
  std::unique_ptr<Cuda> cuda(new Cuda(driver, device));
  int handle = 0;
  if (cuda->failed("cuInit", driver->cuInit(0), error) ||
      cuda->failed("cuDeviceGet", driver->cuDeviceGet(&handle, device), error) ||
      cuda->failed("cuDevicePrimaryCtxRetain", driver->cuDevicePrimaryCtxRetain(&cuda->context_, handle), error) ||
      cuda->failed("cuCtxSetCurrent", driver->cuCtxSetCurrent(cuda->context_), error) ||
      cuda->failed("cuStreamCreate", driver->cuStreamCreate(&cuda->stream_, kNonBlocking), error)) {
    return nullptr;
  }
  return cuda;
}

Cuda::~Cuda() {
  if (stream_ != nullptr) driver_->cuStreamDestroy_v2(stream_);
  if (context_ != nullptr) driver_->cuDevicePrimaryCtxRelease_v2(device_);
}

bool Cuda::failed(const char* what, int result, std::string* error) const {
  if (result == 0) return false;
  const char* text = nullptr;
  driver_->cuGetErrorString(result, &text);
  *error = std::string(what) + " of GPU " + std::to_string(device_) + ": " +
           (text == nullptr ? std::to_string(result) : text);
  return true;
}

bool Cuda::write(uint64_t to, const void* from, size_t nbytes, std::string* error) {
  return !failed("writing memory", driver_->cuMemcpyHtoDAsync_v2(to, from, nbytes, stream_), error) &&
         !failed("writing memory", driver_->cuStreamSynchronize(stream_), error);
}

bool Cuda::read(void* to, uint64_t from, size_t nbytes, std::string* error) {
  return !failed("reading memory", driver_->cuMemcpyDtoHAsync_v2(to, from, nbytes, stream_), error) &&
         !failed("reading memory", driver_->cuStreamSynchronize(stream_), error);
}

void Cuda::drain() { driver_->cuCtxSynchronize(); }

bool wake_after(void* stream, int fd) {
  const CudaDriver* driver = load_driver();
  const auto wake = [](void* data) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(static_cast<int>(reinterpret_cast<intptr_t>(data)), &one, sizeof one);
  };
  return driver != nullptr && driver->cuLaunchHostFunc(stream, wake, reinterpret_cast<void*>(intptr_t{fd})) == 0;
}

}  // namespace nd
