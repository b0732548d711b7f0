// The C ABI of the CPU kernels. Sizes are in elements, strides in elements of the tensor, pointers are raw.

#include <cstdlib>
#include <new>

#include "cpu/features.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "export.h"

namespace nd {

Arena::~Arena() { std::free(memory_); }

void* Arena::get(size_t nbytes) {
  if (nbytes > nbytes_) {
    std::free(memory_);
    nbytes_ = (nbytes + 4095) & ~size_t{4095};
    memory_ = std::aligned_alloc(64, nbytes_);
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  return memory_;
}

Arena* thread_arena(ArenaUse which) {
  static thread_local Arena arenas[3];
  return &arenas[which];
}

const Kernels* kernels(int isa) {
#if defined(__x86_64__)
  const CpuFeatures& f = cpu_features();
  if ((isa == kAmx || isa == kBest) && f.amx_bf16) return &kernels_amx;
  if ((isa == kAvx512 || isa == kBest) && f.avx512) return &kernels_avx512;
  if ((isa == kAvx2 || isa == kBest) && f.avx2) return &kernels_avx2;
#endif
  return isa == kPortable || isa == kBest ? &kernels_portable : nullptr;
}

}  // namespace nd

ND_EXPORT bool nd_has_kernels(int isa) { return nd::kernels(isa) != nullptr; }

// status[r]: nd::DrawStatus; tokens[r] is -1 unless it is 0.
ND_EXPORT void nd_draw_rows(int isa, int threads, const float* logits, int64_t row_stride, int64_t rows, int64_t vocab,
                            const nd::DrawSpec* specs, int64_t* tokens, int8_t* status) {
  const nd::Kernels* k = nd::kernels(isa);
  nd::parallel(threads, rows, [=](int64_t r) {
    status[r] = static_cast<int8_t>(k->draw_row(logits + r * row_stride, vocab, specs[r], tokens + r));
  });
}

// Of each row: log of the sum of exponentials, and the best `top_n` [rows, top_n] in the order (higher logit,
// lower id). A row that has NaN or +inf, or nothing but -inf, gives NaN.
ND_EXPORT void nd_top_rows(int isa, int threads, const float* logits, int64_t row_stride, int64_t rows, int64_t vocab,
                           int64_t top_n, double* log_sums, int64_t* ids, float* values) {
  const nd::Kernels* k = nd::kernels(isa);
  nd::parallel(threads, rows, [=](int64_t r) {
    k->top_row(logits + r * row_stride, vocab, top_n, log_sums + r, ids + r * top_n, values + r * top_n);
  });
}

ND_EXPORT void nd_linear(int isa, int threads, const nd::LinearCall* call) { nd::kernels(isa)->linear(*call, threads); }

ND_EXPORT void nd_linear_batch(int isa, int threads, const nd::LinearBatchCall* call) {
  nd::kernels(isa)->linear_batch(*call, threads);
}

ND_EXPORT void nd_select(int isa, int threads, const nd::SelectCall* call) { nd::kernels(isa)->select(*call, threads); }

ND_EXPORT void nd_attend(int isa, int threads, const nd::AttendCall* call) { nd::kernels(isa)->attend(*call, threads); }

ND_EXPORT void nd_write_rows(int isa, int threads, const nd::WriteCall* call) {
  nd::kernels(isa)->write_rows(*call, threads);
}

ND_EXPORT void nd_rms_norm(int isa, int threads, const nd::NormCall* call) {
  nd::kernels(isa)->rms_norm(*call, threads);
}

ND_EXPORT void nd_rope(int isa, int threads, const nd::RopeCall* call) { nd::kernels(isa)->rope(*call, threads); }

ND_EXPORT void nd_silu_mul(int isa, int threads, const nd::GateCall* call) {
  nd::kernels(isa)->silu_mul(*call, threads);
}

ND_EXPORT void nd_sigmoid_mul(int isa, int threads, const nd::SigmoidCall* call) {
  nd::kernels(isa)->sigmoid_mul(*call, threads);
}

ND_EXPORT void nd_delta_net(int isa, int threads, const nd::DeltaCall* call) {
  nd::kernels(isa)->delta_net(*call, threads);
}

ND_EXPORT void nd_linear_experts(int isa, int threads, const nd::ExpertsCall* call) {
  nd::kernels(isa)->linear_experts(*call, threads);
}

ND_EXPORT void nd_combine(int isa, int threads, const nd::CombineCall* call) {
  nd::kernels(isa)->combine(*call, threads);
}

ND_EXPORT void nd_route(int, int threads, const nd::RouteCall* call) { nd::route(*call, threads); }

// order[row]: the pair in that row of the sorted ones; places[pair]: its row; starts[experts + 1].
ND_EXPORT void nd_sort_by_expert(const int64_t* ids, int64_t pairs, int64_t experts, int64_t* starts, int64_t* order,
                                 int64_t* places) {
  nd::sort_by_expert(ids, pairs, experts, starts, order, places);
}

ND_EXPORT void nd_pool_entries(int isa, int threads, const nd::PoolCall* call) {
  nd::kernels(isa)->pool_entries(*call, threads);
}

ND_EXPORT void nd_stream_weights(int isa, int threads, const nd::StreamWeightsCall* call) {
  nd::kernels(isa)->stream_weights(*call, threads);
}

ND_EXPORT void nd_collapse_streams(int isa, int threads, const nd::StreamsCall* call) {
  nd::kernels(isa)->collapse_streams(*call, threads);
}

ND_EXPORT void nd_mix_streams(int isa, int threads, const nd::StreamsCall* call) {
  nd::kernels(isa)->mix_streams(*call, threads);
}

ND_EXPORT void nd_join_parts(int isa, int threads, const nd::JoinCall* call) {
  nd::kernels(isa)->join_parts(*call, threads);
}

ND_EXPORT void nd_pack_rows(int isa, int threads, const nd::PackCall* call) {
  nd::kernels(isa)->pack_rows(*call, threads);
}

ND_EXPORT void nd_unpack_rows(int isa, int threads, const nd::UnpackCall* call) {
  nd::kernels(isa)->unpack_rows(*call, threads);
}
