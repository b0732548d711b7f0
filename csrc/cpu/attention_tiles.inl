// Attention of some query rows over one span of positions, in tiles: see attention.inl.

namespace {

constexpr int kTile = 64;
constexpr int64_t kSpan = 512;  // a multiple of kTile
constexpr int64_t kMaxRows = 48;
constexpr float kNone = -1e30f;  // highest score of a row that has seen nothing
#if defined(ND_ISA_AVX512)
constexpr int kKeysN = 4;
#else
constexpr int kKeysN = 2;
#endif
constexpr int kKeysM = 4;

struct Rows {
  int64_t count;           // tokens * group
  int64_t group;           // query heads per KV head
  int64_t first_position;  // of the first token
  int64_t q_padded;        // width of a key in whole pairs
  int64_t padded;          // width of a value in whole pairs
  const float* q;          // [count, q_padded], arranged and scaled
  float* scores;           // [count, kTile]
  float* highest;          // [count]
  float* total;            // [count]
  float* out;              // [count, padded], arranged
  void* tile;              // [kTile, width] of chosen or unpacked keys or values; float8: of a run, as floats

  int64_t position(int64_t row) const { return first_position + row / group; }
};

struct Keys {
  const AttendCall& call;
  int64_t sequence, head;
  const int32_t* chosen;  // the positions to see, in order; null is all

  // Keys (part 0) or values (part 1) of a position; block-mates follow at token_stride.
  template <typename T>
  const T* at(int part, int64_t position) const {
    const int64_t block = call.block_tables[sequence * call.table_stride + position / call.block_size];
    return static_cast<const T*>(call.cache) + block * call.block_stride + part * call.part_stride +
           head * call.unit_stride + position % call.block_size * call.token_stride;
  }

  // Copies the keys or values of [first, last), of the chosen ones if there are such, into `tile`, rows of `width`;
  // rows further on are on their way meanwhile.
  template <typename T>
  const typename Unpacked<T>::type* gather(int part, int64_t first, int64_t last, int64_t width, void* tile) const {
    using E = typename Unpacked<T>::type;
    constexpr int kAhead = 8;
    const Packing packing{call.value_width, call.width - call.value_width};
    const int64_t nbytes = std::is_same_v<T, Packed> ? packing.nbytes() : width * static_cast<int64_t>(sizeof(T));
    const auto row = [&](int64_t i) { return at<T>(part, chosen != nullptr ? chosen[i] : i); };
    E* to = static_cast<E*>(tile);
    for (int64_t i = first; i < last; ++i, to += width) {
      if (i + kAhead < last) {
        const char* next = reinterpret_cast<const char*>(row(i + kAhead));
        for (int64_t b = 0; b < nbytes; b += 64) __builtin_prefetch(next + b, 0, 2);
      }
      if constexpr (std::is_same_v<T, Packed>) {
        unpack_row(row(i), packing, to);
      } else {
        std::memcpy(to, row(i), nbytes);
      }
    }
    return static_cast<const E*>(tile);
  }

  // Calls body(first, count) for the runs of [low, high) that lie in one block each.
  template <typename Body>
  void runs(int64_t low, int64_t high, Body&& body) const {
    while (low < high) {
      const int64_t end = std::min(high, (low / call.block_size + 1) * call.block_size);
      body(low, end - low);
      low = end;
    }
  }
};

template <typename T, int MT, int NT>
void score_tile(const Rows& rows, int64_t row, const T* keys, int64_t stride, int64_t width, float* scores) {
  float sums[MT * NT];
  tile_sums<T, MT, NT>(rows.q + row * rows.q_padded, rows.q_padded, keys, stride, width, sums);
  for (int i = 0; i < MT; ++i) {
    for (int j = 0; j < NT; ++j) scores[(row + i) * kTile + j] = sums[i * NT + j];
  }
}

// scores[row, column + j] = q . key j of a run.
template <typename T>
void score_run(const Rows& rows, const T* keys, int64_t stride, int64_t count, int64_t width, int64_t column) {
  for (int64_t row = 0; row < rows.count;) {
    const int64_t left = rows.count - row;
    const int64_t mt = left >= kKeysM ? kKeysM : left;
    int64_t j = 0;
    for (; j < count; j += j + kKeysN <= count ? kKeysN : 1) {
      const T* key = keys + j * stride;
      float* to = rows.scores + column + j;
      if (j + kKeysN <= count) {
        if (mt == 4) score_tile<T, 4, kKeysN>(rows, row, key, stride, width, to);
        if (mt == 3) score_tile<T, 3, kKeysN>(rows, row, key, stride, width, to);
        if (mt == 2) score_tile<T, 2, kKeysN>(rows, row, key, stride, width, to);
        if (mt == 1) score_tile<T, 1, kKeysN>(rows, row, key, stride, width, to);
      } else {
        for (int64_t i = 0; i < mt; ++i) score_tile<T, 1, 1>(rows, row + i, key, stride, width, to);
      }
    }
    row += mt;
  }
}

// out[row] += scores[row, column + j] * value j of a run, MT rows and one pair of the width.
template <typename T, int MT>
void mix_pair(const Rows& rows, int64_t row, const T* values, int64_t stride, int64_t count, int64_t column, int64_t d,
              int64_t valid) {
  V acc[MT][2];
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
    acc[m][0] = F::load(rows.out + (row + m) * rows.padded + d);
    acc[m][1] = F::load(rows.out + (row + m) * rows.padded + d + F::W);
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* value = values + j * stride + d;
    T rest[kPair];
    if (valid < kPair) {
      std::memset(rest, 0, sizeof(rest));
      std::memcpy(rest, value, valid * sizeof(T));
      value = rest;
    }
    const V v0 = Element<T>::pair0(value), v1 = Element<T>::pair1(value);
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) {
      const V p = F::set1(rows.scores[(row + m) * kTile + column + j]);
      acc[m][0] = F::fma(p, v0, acc[m][0]);
      acc[m][1] = F::fma(p, v1, acc[m][1]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
    F::store(rows.out + (row + m) * rows.padded + d, acc[m][0]);
    F::store(rows.out + (row + m) * rows.padded + d + F::W, acc[m][1]);
  }
}

template <typename T>
void mix_run(const Rows& rows, const T* values, int64_t stride, int64_t count, int64_t width, int64_t column) {
  for (int64_t row = 0; row < rows.count;) {
    const int64_t left = rows.count - row;
    const int64_t mt = left >= 4 ? 4 : left;
    for (int64_t d = 0; d < width; d += kPair) {
      const int64_t valid = std::min<int64_t>(kPair, width - d);
      if (mt == 4) mix_pair<T, 4>(rows, row, values, stride, count, column, d, valid);
      if (mt == 3) mix_pair<T, 3>(rows, row, values, stride, count, column, d, valid);
      if (mt == 2) mix_pair<T, 2>(rows, row, values, stride, count, column, d, valid);
      if (mt == 1) mix_pair<T, 1>(rows, row, values, stride, count, column, d, valid);
    }
    row += mt;
  }
}

// Scores become weights: exp(score - highest), zero for what a row does not see; out and total are rescaled.
// `first` is the tile's first position; columns [low, high) of it hold scores.
void soften(const Rows& rows, int64_t first, int64_t low, int64_t high, int64_t window) {
  for (int64_t row = 0; row < rows.count; ++row) {
    float* scores = rows.scores + row * kTile;
    const int64_t position = rows.position(row);
    const int64_t seen_low = window ? std::max(low, position + 1 - window - first) : low;
    const int64_t seen_high = std::min(high, position + 1 - first);
    for (int64_t i = 0; i < std::min<int64_t>(seen_low, kTile); ++i) scores[i] = -INFINITY;
    for (int64_t i = std::max<int64_t>(seen_high, 0); i < kTile; ++i) scores[i] = -INFINITY;
    V top = F::load(scores);
    for (int i = F::W; i < kTile; i += F::W) top = F::max(top, F::load(scores + i));
    const float highest = std::max(rows.highest[row], F::largest(top));
    const V shift = F::set1(-highest);
    V sum = F::zero();
    for (int i = 0; i < kTile; i += F::W) {
      const V p = exp_v(F::add(F::load(scores + i), shift));
      F::store(scores + i, p);
      sum = F::add(sum, p);
    }
    float decay;
    {
      float lanes[F::W];
      F::store(lanes, exp_v(F::set1(rows.highest[row] - highest)));
      decay = lanes[0];
    }
    rows.highest[row] = highest;
    rows.total[row] = rows.total[row] * decay + F::sum(sum);
    if (decay != 1.0f) {
      float* out = rows.out + row * rows.padded;
      for (int64_t d = 0; d < rows.padded; d += F::W) F::store(out + d, F::mul(F::load(out + d), F::set1(decay)));
    }
  }
}

// Blocks lie anywhere, so the processor does not foresee the next one.
template <typename T>
void prefetch_run(const T* rows, int64_t stride, int64_t count) {
  const char* p = reinterpret_cast<const char*>(rows);
  for (int64_t i = 0; i < count * stride * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(p + i, 0, 2);
}

// A run of float8 as floats in the order of pairs, filled up to whole ones.
inline void unpack_run(const Float8* from, int64_t stride, int64_t count, int64_t width, float* to) {
  for (int64_t j = 0; j < count; ++j, from += stride) {
    for (int64_t d = 0; d < width; d += kPair, to += kPair) {
      const Float8* pair = from + d;
      Float8 rest[kPair];
      if (width - d < kPair) {
        std::memset(rest, 0, sizeof(rest));
        std::memcpy(rest, pair, width - d);
        pair = rest;
      }
      F::store(to, Element<Float8>::pair0(pair));
      F::store(to + F::W, Element<Float8>::pair1(pair));
    }
  }
}

// score_run and mix_run of a run in the cache. Float8 is unpacked first where more rows than one step's take it: the
// same sums in the same order, and each number is converted once.
template <typename T>
void score_cached(const Rows& rows, const T* keys, int64_t stride, int64_t count, int64_t width, int64_t column) {
  if constexpr (std::is_same_v<T, Float8>) {
    if (rows.count > kKeysM) {
      float* tile = static_cast<float*>(rows.tile);
      unpack_run(keys, stride, count, width, tile);
      return score_run<float>(rows, tile, rows.q_padded, count, rows.q_padded, column);
    }
  }
  score_run<T>(rows, keys, stride, count, width, column);
}

template <typename T>
void mix_cached(const Rows& rows, const T* values, int64_t stride, int64_t count, int64_t width, int64_t column) {
  if constexpr (std::is_same_v<T, Float8>) {
    if (rows.count > kKeysM) {
      float* tile = static_cast<float*>(rows.tile);
      unpack_run(values, stride, count, width, tile);
      return mix_run<float>(rows, tile, rows.padded, count, rows.padded, column);
    }
  }
  mix_run<T>(rows, values, stride, count, width, column);
}

// Attention of `rows` over positions [low, high) of one span, from nothing.
template <typename T>
void attend_span(const Keys& keys, const Rows& rows, int64_t low, int64_t high) {
  const AttendCall& call = keys.call;
  for (int64_t row = 0; row < rows.count; ++row) rows.highest[row] = kNone, rows.total[row] = 0.0f;
  std::memset(rows.out, 0, rows.count * rows.padded * sizeof(float));
  for (int64_t first = low / kTile * kTile; first < high; first += kTile) {
    const int64_t from = std::max(low, first), to = std::min(high, first + kTile);
    if (std::is_same_v<T, Packed> || keys.chosen != nullptr) {
      using E = typename Unpacked<T>::type;
      const E* tile = keys.gather<T>(0, from, to, call.width, rows.tile);
      score_run<E>(rows, tile, call.width, to - from, call.width, from - first);
      soften(rows, first, from - first, to - first, call.window);
      const bool shared = call.part_stride == 0;  // a value is the first columns of its key
      if (!shared) tile = keys.gather<T>(1, from, to, call.value_width, rows.tile);
      mix_run<E>(rows, tile, shared ? call.width : call.value_width, to - from, call.value_width, from - first);
      continue;
    }
    if constexpr (!std::is_same_v<T, Packed>) {
      keys.runs(from, to, [&](int64_t position, int64_t count) {
        prefetch_run(keys.at<T>(1, position), call.token_stride, count);
        score_cached<T>(rows, keys.at<T>(0, position), call.token_stride, count, call.width, position - first);
      });
      soften(rows, first, from - first, to - first, call.window);
      keys.runs(from, to, [&](int64_t position, int64_t count) {
        if (position + kTile < high) prefetch_run(keys.at<T>(0, position + kTile), call.token_stride, count);
        mix_cached<T>(rows, keys.at<T>(1, position), call.token_stride, count, call.value_width, position - first);
      });
    }
  }
}

// Adds one span's result to what the spans before it gave.
void join(int64_t count, int64_t padded, float* highest, float* total, float* out, const float* span_highest,
          const float* span_total, const float* span_out) {
  for (int64_t row = 0; row < count; ++row) {
    const float top = std::max(highest[row], span_highest[row]);
    float lanes[F::W];
    F::store(lanes, exp_v(F::set1(highest[row] - top)));
    const float a = lanes[0];
    F::store(lanes, exp_v(F::set1(span_highest[row] - top)));
    const float b = lanes[0];
    highest[row] = top;
    total[row] = total[row] * a + span_total[row] * b;
    for (int64_t d = row * padded; d < (row + 1) * padded; d += F::W) {
      F::store(out + d, F::fma(F::load(span_out + d), F::set1(b), F::mul(F::load(out + d), F::set1(a))));
    }
  }
}

}  // namespace
