#include "ucx/cuda.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <mutex>

// Signatures of cuda.h, with its handles as pointers and CUresult as int.
#define ND_CUDA_SYMBOLS(X)                                                                         \
  X(cuInit, unsigned flags)                                                                        \
  X(cuDeviceGet, int* device, int ordinal)                                                         \
  X(cuDevicePrimaryCtxRetain, void** context, int device)                                          \
  X(cuDevicePrimaryCtxRelease_v2, int device)                                                      \
  X(cuCtxSetCurrent, void* context)                                                                \
  X(cuCtxSynchronize, void)                                                                        \
  X(cuStreamCreate, void** stream, unsigned flags)                                                 \
  X(cuStreamDestroy_v2, void* stream)                                                              \
  X(cuStreamSynchronize, void* stream)                                                             \
  X(cuMemcpyHtoDAsync_v2, unsigned long long to, const void* from, size_t nbytes, void* stream)    \
  X(cuMemcpyDtoHAsync_v2, void* to, unsigned long long from, size_t nbytes, void* stream)          \
  X(cuMemcpyDtoDAsync_v2, unsigned long long to, unsigned long long from, size_t n, void* stream)  \
  X(cuMemGetAddressRange_v2, unsigned long long* base, size_t* nbytes, unsigned long long address) \
  X(cuIpcGetMemHandle, IpcHandle* handle, unsigned long long address)                              \
  X(cuIpcOpenMemHandle_v2, unsigned long long* base, IpcHandle handle, unsigned flags)             \
  X(cuIpcCloseMemHandle, unsigned long long base)                                                  \
  X(cuEventCreate, void** event, unsigned flags)                                                   \
  X(cuEventRecord, void* event, void* stream)                                                      \
  X(cuEventQuery, void* event)                                                                     \
  X(cuEventDestroy_v2, void* event)                                                                \
  X(cuGetErrorString, int result, const char** text)

namespace nd {

struct CudaDriver {
#define ND_DECLARE(name, ...) int (*name)(__VA_ARGS__) = nullptr;
  ND_CUDA_SYMBOLS(ND_DECLARE)
#undef ND_DECLARE
};

namespace {

constexpr unsigned kNonBlocking = 1;     // CU_STREAM_NON_BLOCKING: no waiting for, and none by, the default stream
constexpr unsigned kNoTiming = 2;        // CU_EVENT_DISABLE_TIMING
constexpr unsigned kLazyPeerAccess = 1;  // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
constexpr int kNotReady = 600;           // CUDA_ERROR_NOT_READY

// What this process has mapped: a handle is opened once, whoever needs it. Small pools share an allocation, and a peer
// may be reached anew while it is still being let go.
struct Mapped {
  IpcHandle handle;
  int device;
  uint64_t base;
  uint32_t count;
};
std::mutex g_mapped_mutex;
auto* const g_mapped = new std::vector<Mapped>;

template <typename Function>
bool resolve(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

const CudaDriver* load_driver() {
  static const CudaDriver* const driver = []() -> const CudaDriver* {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) return nullptr;
    auto* loaded = new CudaDriver;
#define ND_RESOLVE(name, ...) \
  if (!resolve(library, #name, &loaded->name)) return nullptr;
    ND_CUDA_SYMBOLS(ND_RESOLVE)
#undef ND_RESOLVE
    return loaded;
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
  for (void* event : spare_) driver_->cuEventDestroy_v2(event);
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

bool Cuda::share(uint64_t address, IpcHandle* handle, uint64_t* offset, std::string* error) {
  unsigned long long base = 0;
  size_t nbytes = 0;
  if (failed("finding memory", driver_->cuMemGetAddressRange_v2(&base, &nbytes, address), error)) return false;
  *offset = address - base;
  if (!failed("sharing memory", driver_->cuIpcGetMemHandle(handle, address), error)) return true;
  *error += " (memory must come from cudaMalloc: no expandable segments, no cudaMallocAsync)";
  return false;
}

uint64_t Cuda::map(const IpcHandle& handle, std::string* error) {
  const std::lock_guard<std::mutex> lock(g_mapped_mutex);
  const auto same = [&](const Mapped& m) {
    return m.device == device_ && std::memcmp(&m.handle, &handle, sizeof handle) == 0;
  };
  const auto found = std::find_if(g_mapped->begin(), g_mapped->end(), same);
  if (found != g_mapped->end()) {
    ++found->count;
    return found->base;
  }
  unsigned long long base = 0;
  const int result = driver_->cuIpcOpenMemHandle_v2(&base, handle, kLazyPeerAccess);
  if (failed("mapping a peer's memory", result, error)) return 0;
  g_mapped->push_back({handle, device_, base, 1});
  return base;
}

void Cuda::unmap(uint64_t base) {
  const std::lock_guard<std::mutex> lock(g_mapped_mutex);
  const auto same = [&](const Mapped& m) { return m.device == device_ && m.base == base; };
  const auto found = std::find_if(g_mapped->begin(), g_mapped->end(), same);
  if (found == g_mapped->end() || --found->count > 0) return;
  driver_->cuIpcCloseMemHandle(base);
  g_mapped->erase(found);
}

bool Cuda::copy(uint64_t to, uint64_t from, size_t nbytes, std::string* error) {
  return !failed("copying", driver_->cuMemcpyDtoDAsync_v2(to, from, nbytes, stream_), error);
}

void* Cuda::mark(std::string* error) {
  void* event = nullptr;
  if (!spare_.empty()) {
    event = spare_.back();
    spare_.pop_back();
  } else if (failed("cuEventCreate", driver_->cuEventCreate(&event, kNoTiming), error)) {
    return nullptr;
  }
  if (!failed("cuEventRecord", driver_->cuEventRecord(event, stream_), error)) return event;
  spare_.push_back(event);
  return nullptr;
}

Cuda::State Cuda::look(void* mark, std::string* error) {
  const int result = driver_->cuEventQuery(mark);
  if (result == kNotReady) return State::kPending;
  spare_.push_back(mark);
  return failed("copying", result, error) ? State::kFailed : State::kDone;
}

void Cuda::drain() { driver_->cuCtxSynchronize(); }

}  // namespace nd
