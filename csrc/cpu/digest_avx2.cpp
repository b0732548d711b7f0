#include <immintrin.h>

#include "cpu/digest.h"

// The next loop runs a few times: unrolling or vectorising it only costs.
#if defined(__clang__)
#define ND_SHORT_LOOP _Pragma("clang loop unroll(disable) vectorize(disable)")
#else
#define ND_SHORT_LOOP _Pragma("GCC unroll 1")
#endif

namespace nd {
namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i terms(__m256i words, __m256i keys, __m256i mixed) {
  const __m256i sum = _mm256_add_epi32(words, _mm256_xor_si256(keys, mixed));
  return _mm256_mul_epu32(sum, _mm256_srli_epi64(sum, 32));
}

inline uint64_t lane_sum(__m256i v) {
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

// Rows of exactly 4 * kVectors words, the usual head sizes: nothing but the sum in the loop.
template <int kVectors>
uint64_t fixed_rows(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed, const uint64_t* keys) {
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (size_t t = 0; t < num_tokens; ++t, rows += token_stride, seed += kDigestC1) {
    const __m256i mix = _mm256_set1_epi64x(static_cast<long long>(digest_mix(seed)));
    for (int v = 0; v < kVectors; ++v) {
      sums[v % 4] = _mm256_add_epi64(sums[v % 4], terms(load(rows + v * 32), load(keys + v * 4), mix));
    }
  }
  return lane_sum(_mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3])));
}

uint64_t any_rows(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed, const uint64_t* keys,
                  size_t num_words) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  uint64_t rest = 0;
  const size_t in_sixteens = num_words & ~size_t{15}, in_fours = num_words & ~size_t{3};
  for (size_t t = 0; t < num_tokens; ++t, seed += kDigestC1) {
    const uint64_t mixed = digest_mix(seed);
    const __m256i mix = _mm256_set1_epi64x(static_cast<long long>(mixed));
    const uint8_t* row = rows + t * token_stride;
    size_t w = 0;
    for (; w < in_sixteens; w += 16) {
      a = _mm256_add_epi64(a, terms(load(row + w * 8), load(keys + w), mix));
      b = _mm256_add_epi64(b, terms(load(row + w * 8 + 32), load(keys + w + 4), mix));
      c = _mm256_add_epi64(c, terms(load(row + w * 8 + 64), load(keys + w + 8), mix));
      d = _mm256_add_epi64(d, terms(load(row + w * 8 + 96), load(keys + w + 12), mix));
    }
    ND_SHORT_LOOP
    for (; w < in_fours; w += 4) a = _mm256_add_epi64(a, terms(load(row + w * 8), load(keys + w), mix));
    ND_SHORT_LOOP
    for (; w < num_words; ++w) {
      uint64_t word;
      __builtin_memcpy(&word, row + w * 8, 8);
      rest += digest_term(word, keys[w] ^ mixed);
    }
  }
  return lane_sum(_mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d))) + rest;
}

constexpr size_t kAhead = 2048;  // bytes that the source is fetched ahead: stores past the caches leave it time

template <int kVectors>
uint64_t fixed_copy(uint8_t* to, const uint8_t* from, size_t num_tokens, uint64_t seed, const uint64_t* keys) {
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (size_t t = 0; t < num_tokens; ++t, to += kVectors * 32, from += kVectors * 32, seed += kDigestC1) {
    const __m256i mix = _mm256_set1_epi64x(static_cast<long long>(digest_mix(seed)));
    for (int v = 0; v < kVectors; ++v) {
      if (v % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead + v * 32, _MM_HINT_T0);
      const __m256i words = load(from + v * 32);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + v * 32), words);
      sums[v % 4] = _mm256_add_epi64(sums[v % 4], terms(words, load(keys + v * 4), mix));
    }
  }
  return lane_sum(_mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3])));
}

uint64_t any_copy(uint8_t* to, const uint8_t* from, size_t num_tokens, uint64_t seed, const uint64_t* keys,
                  size_t num_words) {
  __m256i sum = _mm256_setzero_si256();
  for (size_t t = 0; t < num_tokens; ++t, seed += kDigestC1) {
    const __m256i mix = _mm256_set1_epi64x(static_cast<long long>(digest_mix(seed)));
    for (size_t w = 0; w < num_words; w += 4, to += 32, from += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
      const __m256i words = load(from);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), words);
      sum = _mm256_add_epi64(sum, terms(words, load(keys + w), mix));
    }
  }
  return lane_sum(sum);
}

}  // namespace

uint64_t copy_and_digest_rows_avx2(uint8_t* to, const uint8_t* from, size_t num_tokens, uint64_t seed,
                                   const uint64_t* keys, size_t num_words) {
  switch (num_words) {
    case 16:
      return fixed_copy<4>(to, from, num_tokens, seed, keys);
    case 32:
      return fixed_copy<8>(to, from, num_tokens, seed, keys);
    default:
      return any_copy(to, from, num_tokens, seed, keys, num_words);
  }
}

uint64_t digest_rows_avx2(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed,
                          const uint64_t* keys, size_t num_words) {
  switch (num_words) {
    case 16:
      return fixed_rows<4>(rows, token_stride, num_tokens, seed, keys);
    case 32:
      return fixed_rows<8>(rows, token_stride, num_tokens, seed, keys);
    case 64:
      return fixed_rows<16>(rows, token_stride, num_tokens, seed, keys);
    default:
      return any_rows(rows, token_stride, num_tokens, seed, keys, num_words);
  }
}

}  // namespace nd
