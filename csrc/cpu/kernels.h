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

// kFloat8: e4m3fn, in caches of keys and values alone. kPacked: bytes of rows in 8 bits with their own scales
// (packed.inl), in caches of latents and of indexers' keys alone.
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat8 = 3, kPacked = 4 };

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

// `count` products of one shape without bias; each next one's tensors begin so many elements later.
struct LinearBatchCall {
  LinearCall first;
  int64_t count, x_step, weight_step, out_step;
};

// Attention of new tokens over the paged cache, as `AttentionBackend.attend` has it. `out` is [T, heads, width],
// contiguous, of q's type. The cache is [blocks, 2, units, block_size, width] with strides in elements, the last 1.
// Keys are `width` wide, values (and `out`) `value_width`; a stride of 0 between the two parts makes a value the first
// columns of its key, one of 0 between units shares keys among them. `selected`: the positions each new token sees,
// [T, selected_stride], ascending, the first selected_counts[t] of a row; null is all up to its own. `log_sums`, unless
// null: the logarithm of each sum of exponentials, [T, heads]. In a packed cache the value is the row's latent and what
// else a key has is its rope part; strides are in bytes. `scale`: of scores; `value_scale`: of results. Both hold the
// scales of a float8 cache.
struct AttendCall {
  const void* q;
  void* out;
  const void* cache;
  float scale, value_scale;
  const int32_t* block_tables;
  const int32_t* query_starts;
  const int32_t* seq_lens;
  const int32_t* selected;
  const int32_t* selected_counts;
  float* log_sums;
  int64_t num_seqs, heads, units, width, value_width, block_size, window, first;
  int64_t q_token_stride, q_head_stride, table_stride, selected_stride;
  int64_t block_stride, part_stride, unit_stride, token_stride;
  Dtype q_dtype, cache_dtype;
};

// The `top_k` best positions of each new token by a lightning indexer (DeepSeek-V3.2, section 2.1): those with the
// highest sum over heads of weights[h] * max(0, q[h] . key * scale) among the positions up to its own; of equal ones
// the lower positions. Ascending in `positions` [T, top_k], the rest -1; their number in `counts` [T]. The cache is
// [blocks, block_size, width]; in a packed one a key is a latent alone, and strides are in bytes.
struct SelectCall {
  const void* q;
  const float* weights;
  const void* cache;
  const int32_t* block_tables;
  const int32_t* query_starts;
  const int32_t* seq_lens;
  int32_t* positions;
  int32_t* counts;
  int64_t num_seqs, heads, width, block_size, top_k;
  int64_t q_token_stride, q_head_stride, weights_stride, table_stride;
  int64_t block_stride, token_stride;
  float scale;
  Dtype q_dtype, cache_dtype;
};

// New keys and values of `num_tokens` tokens go to their slots (block * block_size + offset). `parts`: 1 is keys alone.
// Where the types differ, what is stored is key / k_scale and value / v_scale; kFloat8 takes its nearest number.
struct WriteCall {
  const void* k;
  const void* v;
  void* cache;
  float k_scale, v_scale;
  const int64_t* slots;
  int64_t num_tokens, parts, units, width, block_size;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int64_t block_stride, part_stride, unit_stride, token_stride;
  Dtype dtype, cache_dtype;
};

// Rows [num_tokens, latent + rope] go to their slots in a packed cache. Strides in bytes there.
struct PackCall {
  const void* rows;
  void* cache;
  const int64_t* slots;
  int64_t num_tokens, latent, rope, block_size;
  int64_t row_stride, block_stride, token_stride;
  Dtype dtype;
};

// The rows of whole blocks of a packed cache, in the order of `block_ids`: out[num_blocks * block_size, latent + rope].
struct UnpackCall {
  const void* cache;
  const int64_t* block_ids;
  void* out;
  int64_t num_blocks, latent, rope, block_size;
  int64_t block_stride, token_stride;
  Dtype dtype;
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

// out[i] = x[i] * cos[i] + x[(i + width / 2) % width] * sin[i], with tables [tokens, width]; of x's type.
// `interleaved`: even elements of x make the first half and odd ones the second before they turn. `out` may be `x`.
struct RopeCall {
  const void* x;
  const void* cos;
  const void* sin;
  void* out;
  int64_t tokens, heads, width;
  int64_t x_token_stride, x_head_stride, out_token_stride, out_head_stride, table_stride;
  Dtype x_dtype, table_dtype;
  int32_t interleaved;
};

// out[tokens, width] = silu(min(gate, limit)) * clamp(up, -limit, limit), of rows [gate | up]. Limit 0: none.
struct GateCall {
  const void* x;
  void* out;
  int64_t tokens, width, x_stride;
  Dtype dtype;
  float limit;
};

// out[tokens, width] = x * sigmoid(gate); the gate has 1 or `width` columns.
struct SigmoidCall {
  const void* x;
  const void* gate;
  void* out;
  int64_t tokens, width, gate_width, x_stride, gate_stride;
  Dtype x_dtype, gate_dtype;
};

// `experts` matrices [N, K], each over its own rows of x: out[r] = x[r] * weight[e]^T for starts[e] <= r < starts[e +
// 1].
struct ExpertsCall {
  const void* x;
  const void* weight;
  const int64_t* starts;
  void* out;
  int64_t x_stride, expert_stride, weight_stride, out_stride;
  int64_t experts, n, k;
  Dtype x_dtype, weight_dtype, out_dtype;
};

// out[t] = sum over j of weights[t, j] * y[places[t, j]], added in the order of j in fp32; out is contiguous.
struct CombineCall {
  const void* y;
  const int64_t* places;
  const float* weights;
  void* out;
  int64_t tokens, top_k, width, y_stride;
  Dtype dtype;
};

// A gated delta net between its projections, see `common.kernels.delta_ops`. q, k, v, z, b and a are parts of rows that
// are `token_stride` apart; in a row, what belongs to one key head (a *unit*, with its `per_unit` value heads) lies
// together, and units are a stride apart. All of these, `weight`, `conv` and `out` are of `dtype`.
// taps [units, conv_width, 2 key_width + per_unit * value_width]; conv [blocks, conv_width - 1, units, channels of a
// unit], the oldest first; state [blocks, heads, key_width, value_width]. Both are updated in place. `out` is [tokens,
// heads, value_width], contiguous.
struct DeltaCall {
  const void* q;
  const void* k;
  const void* v;
  const void* z;
  const void* b;
  const void* a;
  const float* taps;
  const float* rate;
  const float* dt_bias;
  const void* weight;
  void* conv;
  float* state;
  const int64_t* blocks;
  const int32_t* query_starts;
  void* out;
  int64_t num_seqs, units, per_unit, key_width, value_width, conv_width;
  int64_t token_stride, qk_unit_stride, v_unit_stride, z_unit_stride, gate_unit_stride;
  int64_t conv_block_stride, conv_part_stride, conv_unit_stride, state_block_stride, state_head_stride;
  float eps;
  Dtype dtype;
};

enum Scoring : int32_t { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

// The experts of each token and their weights, see `common.moe.routing`. ids and weights are [tokens, top_k],
// contiguous; `given`: ids are read and not chosen.
struct RouteCall {
  const float* logits;
  const float* bias;
  int64_t* ids;
  float* weights;
  int64_t tokens, experts, top_k, groups, topk_groups, stride;
  Scoring scoring;
  int32_t normalized, given;
  float scale;
};

// Compressed entries of DeepSeek-V4, [entries, width] fp32: of each column the mean of `tokens` values, weighted by the
// softmax of their gates plus bias [tokens, width]. slots [entries, tokens] are block * block_size + offset in the
// cache, -1 for a token that is left out. A row holds values from its start and gates from `gate_column` on; of the
// last `own` tokens both begin `own_shift` columns later. Strides in elements.
struct PoolCall {
  const void* cache;
  const int64_t* slots;
  const float* bias;
  float* out;
  int64_t entries, tokens, own, width, block_size;
  int64_t gate_column, own_shift, block_stride, token_stride;
  Dtype dtype;
};

// Weights of hyper-connections from rows of `mix`: pre [tokens, streams], post [tokens, streams] and comb [tokens,
// streams, streams]; with comb null, pre alone.
struct StreamWeightsCall {
  const float* mix;
  const float* scale;
  const float* base;
  float* pre;
  float* post;
  float* comb;
  int64_t tokens, streams, steps;
  float eps;
};

// x [tokens, streams, width] and y [tokens, width], contiguous and of one type: see collapse_streams and mix_streams.
struct StreamsCall {
  void* x;
  void* y;
  const float* weights;
  const float* comb;
  int64_t tokens, streams, width;
  Dtype dtype;
};

// Attention over two disjoint sets of rows, a and b [tokens, heads, width], becomes one, in `a`: see join_parts. `b`
// and what belongs to it may be null.
struct JoinCall {
  void* a;
  const void* b;
  const float* sums_a;
  const float* sums_b;
  const float* sinks;
  const int32_t* counts;
  int64_t tokens, heads, width;
  Dtype dtype;
};

struct Kernels {
  void (*rms_norm)(const NormCall& call, int threads);
  void (*rope)(const RopeCall& call, int threads);
  void (*silu_mul)(const GateCall& call, int threads);
  void (*sigmoid_mul)(const SigmoidCall& call, int threads);
  void (*combine)(const CombineCall& call, int threads);
  void (*attend)(const AttendCall& call, int threads);
  void (*write_rows)(const WriteCall& call, int threads);
  void (*linear)(const LinearCall& call, int threads);
  void (*linear_batch)(const LinearBatchCall& call, int threads);
  void (*linear_experts)(const ExpertsCall& call, int threads);
  void (*select)(const SelectCall& call, int threads);
  void (*delta_net)(const DeltaCall& call, int threads);
  int (*draw_row)(const float* logits, int64_t vocab, const DrawSpec& spec, int64_t* token);
  void (*top_row)(const float* logits, int64_t vocab, int64_t top_n, double* log_sum, int64_t* ids, float* values);
  void (*pool_entries)(const PoolCall& call, int threads);
  void (*stream_weights)(const StreamWeightsCall& call, int threads);
  void (*collapse_streams)(const StreamsCall& call, int threads);
  void (*mix_streams)(const StreamsCall& call, int threads);
  void (*join_parts)(const JoinCall& call, int threads);
  void (*pack_rows)(const PackCall& call, int threads);
  void (*unpack_rows)(const UnpackCall& call, int threads);
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

// The same on every instruction set (route.cpp).
void route(const RouteCall& call, int threads);
void sort_by_expert(const int64_t* ids, int64_t pairs, int64_t experts, int64_t* starts, int64_t* order,
                    int64_t* places);

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_amx;

}  // namespace nd
