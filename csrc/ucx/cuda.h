// The calls of CUDA's driver that moving a GPU's memory takes, from libcuda loaded at run time: nothing here is built
// against CUDA, and a machine without it never loads it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace nd {

struct CudaDriver;

struct IpcHandle {  // CUipcMemHandle
  char bytes[64];
};

// The primary context of one GPU, which is the one that torch uses, and a stream of its own. For one thread.
class Cuda {
 public:
  // Makes the context current for the calling thread. Null with `error` set if there is no such GPU.
  static std::unique_ptr<Cuda> open(int device, std::string* error);
  ~Cuda();

  // Small copies that wait for their end. False with `error` set.
  bool write(uint64_t to, const void* from, size_t nbytes, std::string* error);
  bool read(void* to, uint64_t from, size_t nbytes, std::string* error);

  // How other processes of this machine map the allocation that holds `address`, and where in it that is.
  bool share(uint64_t address, IpcHandle* handle, uint64_t* offset, std::string* error);
  // Another process's allocation in our address space, 0 if that is not possible; for as often `unmap`. What is mapped
  // keeps the GPU's memory taken, even if its owner dies.
  uint64_t map(const IpcHandle& handle, std::string* error);
  void unmap(uint64_t base);

  // Queued one behind the other; `mark` is an event behind all of them, null if CUDA gives none.
  bool copy(uint64_t to, uint64_t from, size_t nbytes, std::string* error);
  void* mark(std::string* error);
  enum class State { kPending, kDone, kFailed };
  State look(void* mark, std::string* error);  // forgets the mark unless it is pending

  // Waits for all that the GPU has been given so far, by anybody in this process.
  void drain();

 private:
  Cuda(const CudaDriver* driver, int device) : driver_(driver), device_(device) {}
  bool failed(const char* what, int result, std::string* error) const;

  const CudaDriver* const driver_;
  const int device_;
  void* context_ = nullptr;
  void* stream_ = nullptr;
  std::vector<void*> spare_;  // events
};

}  // namespace nd
