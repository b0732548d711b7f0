// The kernels that exist once per instruction set, and the table that each set fills in.
//
// kernels.cpp (portable), kernels_avx2.cpp and kernels_avx512.cpp compile the same *.inl files. Callers ask
// for the best table that this processor runs, or for a named one in tests.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nd {

enum DrawStatus : int { kDrawOk = 0, kDrawEmpty = 1, kDrawNotANumber = 2 };

struct DrawSpec {
  uint64_t key;
  double temperature;
  double top_p;
  double min_p;
  int64_t top_k;
};

struct Kernels {
  int (*draw_row)(const float* logits, int64_t vocab, const DrawSpec& spec, int64_t* token);
  void (*top_row)(const float* logits, int64_t vocab, int64_t top_n, double* log_sum, int64_t* ids, float* values);
};

// Scratch memory of one thread: grows to the largest request and is kept until the thread ends.
class Arena {
 public:
  ~Arena();
  void* get(size_t nbytes);  // aligned to 64; what was got before is lost

 private:
  void* memory_ = nullptr;
  size_t nbytes_ = 0;
};

Arena* thread_arena();

enum Isa : int { kBest = -1, kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Null if this processor (or this build) lacks the instructions.
const Kernels* kernels(int isa);

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace nd
