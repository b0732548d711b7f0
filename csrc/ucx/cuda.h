// The few calls of CUDA's driver that moving a GPU's memory takes, from libcuda loaded at run time: nothing here is
// built against CUDA, and a machine without it never loads it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace nd {

struct CudaDriver;

// The primary context of one GPU, which is the one that torch uses, and a stream of its own. For one thread.
class Cuda {
 public:
  // Makes the context current for the calling thread. Null with `error` set if there is no such GPU.
  static std::unique_ptr<Cuda> open(int device, std::string* error);
  ~Cuda();

  // Small copies that wait for their end. False with `error` set.
  bool write(uint64_t to, const void* from, size_t nbytes, std::string* error);
  bool read(void* to, uint64_t from, size_t nbytes, std::string* error);

  // Waits for all that the GPU has been given so far, by anybody in this process.
  void drain();

 private:
  Cuda(const CudaDriver* driver, int device) : driver_(driver), device_(device) {}
  bool failed(const char* what, int result, std::string* error) const;

  const CudaDriver* const driver_;
  const int device_;
  void* context_ = nullptr;
  void* stream_ = nullptr;
};

// Makes the eventfd `fd` readable once the GPU has done what `stream` was given so far. In the stream's context.
bool wake_after(void* stream, int fd);

}  // namespace nd
