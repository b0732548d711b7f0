// The kernels that exist once per instruction set, and the table that each set fills in.
//
// kernels.cpp (portable), kernels_avx2.cpp, kernels_avx512.cpp and kernels_amx.cpp (AVX-512, with bfloat16
// products on tiles) compile the same *.inl files. Callers ask for the best table that this processor runs, or for a
// named one in tests.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nd {

enum DrawStatus : int { kDrawOk = 0, kDrawEmpty = 1, kDrawNotANumber = 2 };

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct DrawSpec {
  uint64_t key;
  double temperature;
  double top_p;
  double min_p;
  int64_t top_k;
};

// out[M, N] = x[M, K] * weight[N, K]^T + bias[N]; bias may be null and is of the weight's type. Rows of x, weight
// and out are contiguous.
struct LinearCall {
  const void* x;
  const void* weight;
  const void* bias;
  void* out;
  int64_t x_stride, weight_stride, out_stride;
  int64_t m, n, k;
  Dtype x_dtype, weight_dtype, out_dtype;
};

// Attention of new tokens over the paged cache, as `AttentionBackend.attend` has it. `out` is [T, heads, width],
// contiguous, of q's type. The cache is [blocks, 2, units, block_size, width] with strides in elements, the last 1.
struct AttendCall {
  const void* q;
  void* out;
  const void* cache;
  const int32_t* block_tables;
  const int32_t* query_starts;
  const int32_t* seq_lens;
  int64_t num_seqs, heads, units, width, block_size, window;
  int64_t q_token_stride, q_head_stride, table_stride;
  int64_t block_stride, part_stride, unit_stride, token_stride;
  float scale;
  Dtype q_dtype, cache_dtype;
};

// New keys and values of `num_tokens` tokens go to their slots (block * block_size + offset).
struct WriteCall {
  const void* k;
  const void* v;
  void* cache;
  const int64_t* slots;
  int64_t num_tokens, units, width, block_size;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int64_t block_stride, part_stride, unit_stride, token_stride;
  Dtype dtype, cache_dtype;
};

// Root mean square norm of rows of `width`; the first `split` heads use the first row of weights, the others the
// second. `out` is [tokens, heads, width], contiguous, of x's type.
struct NormCall {
  const void* x;
  const void* weight;
  void* out;
  int64_t tokens, heads, width, split;
  int64_t x_token_stride, x_head_stride, weight_stride;
  float eps;
  Dtype x_dtype, weight_dtype;
};

// out[i] = x[i] * cos[i] + x[(i + width / 2) % width] * sin[i], with tables [tokens, width]; out as in NormCall.
struct RopeCall {
  const void* x;
  const void* cos;
  const void* sin;
  void* out;
  int64_t tokens, heads, width;
  int64_t x_token_stride, x_head_stride, table_stride;
  Dtype x_dtype, table_dtype;
};

// out[tokens, width] = silu(x[:, :width]) * x[:, width:].
struct GateCall {
  const void* x;
  void* out;
  int64_t tokens, width, x_stride;
  Dtype dtype;
};

struct Kernels {
  void (*rms_norm)(const NormCall& call, int threads);
  void (*rope)(const RopeCall& call, int threads);
  void (*silu_mul)(const GateCall& call, int threads);
  void (*attend)(const AttendCall& call, int threads);
  void (*write_rows)(const WriteCall& call, int threads);
  void (*linear)(const LinearCall& call, int threads);
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

// `which`: callers that hold memory while they run others that do use different ones.
enum ArenaUse : int { kInTask = 0, kAroundTasks = 1, kBetweenTasks = 2 };
Arena* thread_arena(ArenaUse which = kInTask);

enum Isa : int { kBest = -1, kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// Null if this processor (or this build) lacks the instructions.
const Kernels* kernels(int isa);

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_amx;

}  // namespace nd
