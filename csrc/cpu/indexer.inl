// The lightning indexer of DeepSeek-V3.2 (section 2.1): scores of all positions in fp32, then the exact best of them.
//
// A score is one chain of additions over the heads, made from products that are the same whatever else is computed, and
// equal scores go to the lower positions: a token's choice is the same in any batch, chunk, and on any number of
// threads. Tokens that see no more than top_k positions take them all and are not scored.
//
// Tokens are done in bands whose scores fit into kBandFloats. In a band, tasks score a token's positions a stretch at a
// time, then tasks choose for a token each.

namespace {

constexpr int64_t kStretch = 1024;                 // positions of a task, a multiple of kTile
constexpr int64_t kBandFloats = int64_t{4} << 20;  // scores held at once, unless one token has more
constexpr int kDigit = 11, kBins = 1 << kDigit;    // of a key, in bits; three digits make a key

struct Seeker {
  int32_t sequence, token;
  int64_t seen;  // positions
  int64_t at;    // of its scores in the band's
};

void unpack_keys(const SelectCall& call, const Packed* keys, int64_t count, Bfloat* out) {
  const Packing packing{call.width, 0};
  for (int64_t i = 0; i < count; ++i) unpack_row(keys + i * call.token_stride, packing, out + i * call.width);
}

}  // namespace

#if defined(ND_AMX)
#include "cpu/indexer_amx.inl"
#endif

namespace {

// scores[i] of positions [low, high) of a token.
template <typename T>
void score_positions(const SelectCall& call, const Seeker& seeker, int64_t low, int64_t high, float* scores) {
  const int64_t padded = whole_pairs(call.width);
  using E = typename Unpacked<T>::type;
  const size_t unpacked = std::is_same_v<T, Packed> ? kTile * call.width * sizeof(E) : 0;
  float* memory = static_cast<float*>(thread_arena()->get(call.heads * (padded + kTile) * sizeof(float) + unpacked));
  Rows rows{};
  rows.count = call.heads, rows.q_padded = padded;
  rows.q = memory, rows.scores = memory + call.heads * padded;
  for (int64_t head = 0; head < call.heads; ++head) {
    float* to = memory + head * padded;
    load_arranged(call.q, seeker.token * call.q_token_stride + head * call.q_head_stride, call.q_dtype, call.width,
                  Element<E>::kSplit, to);
    for (int64_t d = 0; d < padded; ++d) to[d] *= call.scale;
  }
  const float* weights = call.weights + seeker.token * call.weights_stride;
  const int32_t* table = call.block_tables + seeker.sequence * call.table_stride;
  for (int64_t first = low; first < high; first += kTile) {
    const int64_t last = std::min(high, first + kTile);
    for (int64_t position = first; position < last;) {
      const int64_t end = std::min(last, (position / call.block_size + 1) * call.block_size);
      const T* keys = static_cast<const T*>(call.cache) + table[position / call.block_size] * call.block_stride +
                      position % call.block_size * call.token_stride;
      if constexpr (std::is_same_v<T, Packed>) {
        E* tile = reinterpret_cast<E*>(rows.scores + call.heads * kTile);
        unpack_keys(call, keys, end - position, tile);
        score_run<E>(rows, tile, call.width, end - position, call.width, position - first);
      } else {
        score_run<T>(rows, keys, call.token_stride, end - position, call.width, position - first);
      }
      position = end;
    }
    for (int64_t i = last - first; i < kTile; ++i) {
      for (int64_t head = 0; head < call.heads; ++head) rows.scores[head * kTile + i] = 0.0f;
    }
    float sums[kTile];
    for (int i = 0; i < kTile; i += F::W) {
      V sum = F::zero();
      for (int64_t head = 0; head < call.heads; ++head) {
        const V score = F::max(F::load(rows.scores + head * kTile + i), F::zero());
        sum = F::fma(F::set1(weights[head]), score, sum);
      }
      F::store(sums + i, sum);
    }
    std::memcpy(scores + first - low, sums, (last - first) * sizeof(float));
  }
}

// An integer in the order of floats; both zeros are one.
inline uint32_t key_of(float score) {
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The `want`-th highest of `count` keys, and in `equal` how many of those equal to it belong to the best `want`.
inline uint32_t bound_of(const uint32_t* keys, int64_t count, int64_t want, int64_t* equal) {
  uint32_t bound = 0, known = 0;
  for (int shift = 32 - kDigit; known != ~uint32_t{0}; shift = std::max(0, shift - kDigit)) {
    int32_t bins[kBins] = {};
    for (int64_t i = 0; i < count; ++i) {
      if ((keys[i] & known) == bound) ++bins[keys[i] >> shift & (kBins - 1)];
    }
    int bin = kBins - 1;
    for (; bins[bin] < want; --bin) want -= bins[bin];
    bound |= static_cast<uint32_t>(bin) << shift;
    known |= static_cast<uint32_t>(kBins - 1) << shift;
  }
  *equal = want;
  return bound;
}

void choose_positions(const SelectCall& call, const Seeker& seeker, const float* scores) {
  int32_t* out = call.positions + seeker.token * call.top_k;
  const int64_t count = std::min(seeker.seen, call.top_k);
  call.counts[seeker.token] = static_cast<int32_t>(count);
  for (int64_t i = count; i < call.top_k; ++i) out[i] = -1;
  if (count == seeker.seen) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(i);
    return;
  }
  uint32_t* keys = static_cast<uint32_t*>(thread_arena()->get(seeker.seen * sizeof(uint32_t)));
  for (int64_t i = 0; i < seeker.seen; ++i) keys[i] = key_of(scores[i]);
  int64_t equal;
  const uint32_t bound = bound_of(keys, seeker.seen, count, &equal);
  for (int64_t i = 0, n = 0; n < count; ++i) {
    if (keys[i] > bound || (keys[i] == bound && equal-- > 0)) out[n++] = static_cast<int32_t>(i);
  }
}

template <typename T>
void select_band(const SelectCall& call, const Seeker* seekers, int64_t count, float* scores, int threads) {
  struct Stretch {
    const Seeker* seeker;
    int64_t low;
  };
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most += seekers[i].seen / kStretch + 1;
  Stretch* stretches = static_cast<Stretch*>(thread_arena(kAroundTasks)->get(most * sizeof(Stretch)));
  int64_t n = 0;
  for (const Seeker* s = seekers; s < seekers + count; ++s) {
    for (int64_t low = 0; s->seen > call.top_k && low < s->seen; low += kStretch) stretches[n++] = {s, low};
  }
  const auto score = [&](int64_t i) {
    const Seeker& s = *stretches[i].seeker;
    const int64_t low = stretches[i].low;
    const int64_t high = std::min(s.seen, low + kStretch);
#if defined(ND_AMX)
    if (amx_fits(call)) return score_positions_amx(call, s, low, high, scores + s.at + low);
#endif
    score_positions<T>(call, s, low, high, scores + s.at + low);
  };
  parallel(threads, n, score);
  parallel(n ? threads : 1, count, [&](int64_t i) { choose_positions(call, seekers[i], scores + seekers[i].at); });
}

template <typename T>
void select_of(const SelectCall& call, int threads) {
  const int64_t num_tokens = call.query_starts[call.num_seqs] - call.query_starts[0];
  int64_t longest = 0;
  for (int64_t s = 0; s < call.num_seqs; ++s) longest = std::max<int64_t>(longest, call.seq_lens[s]);
  const int64_t floats = std::max(longest, std::min(kBandFloats, longest * num_tokens));
  const size_t nbytes = (floats + 1) * sizeof(float) + num_tokens * sizeof(Seeker);
  float* scores = static_cast<float*>(thread_arena(kBetweenTasks)->get(nbytes));
  Seeker* seekers = reinterpret_cast<Seeker*>(scores + (floats + 1) / 2 * 2);
  int64_t n = 0, used = 0;
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    const int32_t end = call.query_starts[s + 1];
    for (int32_t token = call.query_starts[s]; token < end; ++token) {
      const int64_t seen = call.seq_lens[s] - (end - token) + 1, needed = seen > call.top_k ? seen : 0;
      if (used + needed > floats) {
        select_band<T>(call, seekers, n, scores, threads);
        n = used = 0;
      }
      seekers[n++] = {static_cast<int32_t>(s), token, seen, used};
      used += needed;
    }
  }
  select_band<T>(call, seekers, n, scores, threads);
}

void select_positions(const SelectCall& call, int threads) {
  if (call.cache_dtype == kFloat32) return select_of<float>(call, threads);
  if (call.cache_dtype == kBfloat16) return select_of<Bfloat>(call, threads);
  if (call.cache_dtype == kPacked) return select_of<Packed>(call, threads);
  select_of<Half>(call, threads);
}

}  // namespace
