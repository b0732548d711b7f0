// What DeepSeek-V4 does beside matrix products and attention: pooling of tokens into compressed entries (section
// 2.3), and the mixing of several residual streams (manifold-constrained hyper-connections, section 2.2). All in
// fp32, every row alone and in one order.

namespace {

// One entry: of each column the mean of its tokens' values, weighted by the softmax over them of gate + bias.
void pool_entry(const PoolCall& call, int64_t entry, float* memory) {
  const int64_t width = call.width, padded = whole_pairs(width);
  float *highest = memory, *total = highest + padded, *sum = total + padded;
  float *gate = sum + padded, *value = gate + padded;
  for (int64_t d = 0; d < padded; ++d) highest[d] = kNone, total[d] = sum[d] = gate[d] = value[d] = 0.0f;
  const int64_t* slots = call.slots + entry * call.tokens;
  const auto at = [&](int64_t token) {
    return slots[token] / call.block_size * call.block_stride + slots[token] % call.block_size * call.token_stride +
           (token >= call.tokens - call.own ? call.own_shift : 0);
  };
  const auto load_gate = [&](int64_t token) {
    load_row(call.cache, at(token) + call.gate_column, call.dtype, width, gate);
    const float* bias = call.bias + token * width;
    for (int64_t d = 0; d < width; ++d) gate[d] += bias[d];
  };
  for (int64_t token = 0; token < call.tokens; ++token) {
    if (slots[token] < 0) continue;
    load_gate(token);
    for (int64_t d = 0; d < padded; d += F::W) F::store(highest + d, F::max(F::load(highest + d), F::load(gate + d)));
  }
  for (int64_t token = 0; token < call.tokens; ++token) {
    if (slots[token] < 0) continue;
    load_gate(token);
    load_row(call.cache, at(token), call.dtype, width, value);
    for (int64_t d = 0; d < padded; d += F::W) {
      const V weight = exp_v(F::add(F::load(gate + d), F::mul(F::load(highest + d), F::set1(-1.0f))));
      F::store(total + d, F::add(F::load(total + d), weight));
      F::store(sum + d, F::fma(weight, F::load(value + d), F::load(sum + d)));
    }
  }
  for (int64_t d = 0; d < padded; d += F::W) F::store(sum + d, F::div(F::load(sum + d), F::load(total + d)));
  std::memcpy(call.out + entry * width, sum, width * sizeof(float));
}

void pool_entries(const PoolCall& call, int threads) {
  const auto task = [&](int64_t entry) {
    pool_entry(call, entry, static_cast<float*>(thread_arena()->get(5 * whole_pairs(call.width) * sizeof(float))));
  };
  parallel(call.entries * call.tokens * call.width > 32768 ? threads : 1, call.entries, task);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Rows and columns of the matrix come to sum to one (Sinkhorn and Knopp 1967), the columns last.
void balance(float* matrix, int64_t streams, int64_t steps, float eps) {
  const auto lines = [&](int64_t line, int64_t item) {
    for (int64_t i = 0; i < streams; ++i) {
      float sum = 0.0f;
      for (int64_t j = 0; j < streams; ++j) sum += matrix[i * line + j * item];
      const float inverse = 1.0f / (sum + eps);
      for (int64_t j = 0; j < streams; ++j) matrix[i * line + j * item] *= inverse;
    }
  };
  for (int64_t step = 0; step < steps; ++step) {
    if (step > 0) lines(streams, 1);
    lines(1, streams);
  }
}

void stream_weights(const StreamWeightsCall& call, int threads) {
  const int64_t streams = call.streams, width = call.comb == nullptr ? streams : (2 + streams) * streams;
  each_row(threads, call.tokens, width * (call.steps + 1), width, [&](int64_t token, float*) {
    const float *mix = call.mix + token * width, *base = call.base;
    for (int64_t s = 0; s < streams; ++s) {
      call.pre[token * streams + s] = sigmoid(mix[s] * call.scale[0] + base[s]) + call.eps;
    }
    if (call.comb == nullptr) return;
    for (int64_t s = 0; s < streams; ++s) {
      call.post[token * streams + s] = 2.0f * sigmoid(mix[streams + s] * call.scale[1] + base[streams + s]);
    }
    float* comb = call.comb + token * streams * streams;
    for (int64_t i = 0; i < streams; ++i) {
      const int64_t at = (2 + i) * streams;
      float highest = -INFINITY, sum = 0.0f;
      for (int64_t j = 0; j < streams; ++j) {
        comb[i * streams + j] = mix[at + j] * call.scale[2] + base[at + j];
        highest = std::max(highest, comb[i * streams + j]);
      }
      for (int64_t j = 0; j < streams; ++j) sum += comb[i * streams + j] = std::exp(comb[i * streams + j] - highest);
      for (int64_t j = 0; j < streams; ++j) comb[i * streams + j] = comb[i * streams + j] / sum + call.eps;
    }
    balance(comb, streams, call.steps, call.eps);
  });
}

constexpr int64_t kPiece = 256;  // columns of a token's streams that are mixed at a time

// Calls body(first column, number of them, that piece of each stream: [streams, kPiece]) along a token's streams.
template <typename Body>
void each_piece(const StreamsCall& call, int64_t token, float* pieces, Body&& body) {
  for (int64_t first = 0; first < call.width; first += kPiece) {
    const int64_t count = std::min(kPiece, call.width - first);
    for (int64_t s = 0; s < call.streams; ++s) {
      load_row(call.x, (token * call.streams + s) * call.width + first, call.dtype, count, pieces + s * kPiece);
    }
    body(first, count);
  }
}

// y[token] = sum over s of weights[token, s] * x[token, s].
void collapse_streams(const StreamsCall& call, int threads) {
  const int64_t streams = call.streams;
  const auto row = [&](int64_t token, float* pieces) {
    float* out = pieces + streams * kPiece;
    each_piece(call, token, pieces, [&](int64_t first, int64_t count) {
      for (int64_t d = 0; d < kPiece; d += F::W) {
        V sum = F::zero();
        for (int64_t s = 0; s < streams; ++s) {
          sum = F::fma(F::set1(call.weights[token * streams + s]), F::load(pieces + s * kPiece + d), sum);
        }
        F::store(out + d, sum);
      }
      store_row(call.y, token * call.width + first, call.dtype, count, out);
    });
  };
  each_row(threads, call.tokens, streams * call.width, (streams + 1) * kPiece, row);
}

// x[token, k] = weights[token, k] * y[token] + sum over j of comb[token, j, k] * x[token, j].
void mix_streams(const StreamsCall& call, int threads) {
  const int64_t streams = call.streams;
  const auto row = [&](int64_t token, float* pieces) {
    float *added = pieces + streams * kPiece, *out = added + kPiece;
    const float* comb = call.comb + token * streams * streams;
    each_piece(call, token, pieces, [&](int64_t first, int64_t count) {
      load_row(call.y, token * call.width + first, call.dtype, count, added);
      for (int64_t k = 0; k < streams; ++k) {
        for (int64_t d = 0; d < kPiece; d += F::W) {
          V sum = F::mul(F::set1(call.weights[token * streams + k]), F::load(added + d));
          for (int64_t j = 0; j < streams; ++j) {
            sum = F::fma(F::set1(comb[j * streams + k]), F::load(pieces + j * kPiece + d), sum);
          }
          F::store(out + d, sum);
        }
        store_row(call.x, (token * streams + k) * call.width + first, call.dtype, count, out);
      }
    });
  };
  each_row(threads, call.tokens, streams * call.width, (streams + 2) * kPiece, row);
}

// a[token, head] = (e^sum_a * a + e^sum_b * b) / (e^sum_a + e^sum_b + e^sink), b left out where counts[token] is 0.
void join_parts(const JoinCall& call, int threads) {
  const int64_t padded = whole_pairs(call.width);
  each_row(threads, call.tokens * call.heads, call.width, 2 * padded, [&](int64_t row, float* a) {
    float* b = a + padded;
    const bool both = call.b != nullptr && call.counts[row / call.heads] > 0;
    const float sink = call.sinks[row % call.heads], sum_a = call.sums_a[row], sum_b = both ? call.sums_b[row] : 0.0f;
    const float top = std::max(std::max(sum_a, sink), both ? sum_b : sum_a);
    const float share_a = std::exp(sum_a - top), share_b = both ? std::exp(sum_b - top) : 0.0f;
    const float all = share_a + share_b + std::exp(sink - top);
    const V weight_a = F::set1(share_a / all), weight_b = F::set1(share_b / all);
    load_row(call.a, row * call.width, call.dtype, call.width, a);
    for (int64_t d = 0; d < padded; d += F::W) F::store(a + d, F::mul(F::load(a + d), weight_a));
    if (both) {
      load_row(call.b, row * call.width, call.dtype, call.width, b);
      for (int64_t d = 0; d < padded; d += F::W) F::store(a + d, F::fma(F::load(b + d), weight_b, F::load(a + d)));
    }
    store_row(call.a, row * call.width, call.dtype, call.width, a);
  });
}

}  // namespace
