#include <immintrin.h>

#include "cpu/digest.h"

namespace nd {
namespace {

inline __m256i terms(const uint8_t* words, const uint64_t* keys, __m256i mixed) {
  const __m256i key = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys)), mixed);
  const __m256i sum = _mm256_add_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), key);
  return _mm256_mul_epu32(sum, _mm256_srli_epi64(sum, 32));
}

}  // namespace

uint64_t digest_rows_avx2(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed,
                          const uint64_t* keys, size_t num_words) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  uint64_t rest = 0;
  const size_t in_sixteens = num_words & ~size_t{15}, in_fours = num_words & ~size_t{3};
  for (size_t t = 0; t < num_tokens; ++t, seed += kDigestC1) {
    const uint64_t mixed = digest_mix(seed);
    const __m256i mix = _mm256_set1_epi64x(static_cast<long long>(mixed));
    const uint8_t* row = rows + t * token_stride;
    size_t w = 0;
    for (; w < in_sixteens; w += 16) {
      a = _mm256_add_epi64(a, terms(row + w * 8, keys + w, mix));
      b = _mm256_add_epi64(b, terms(row + w * 8 + 32, keys + w + 4, mix));
      c = _mm256_add_epi64(c, terms(row + w * 8 + 64, keys + w + 8, mix));
      d = _mm256_add_epi64(d, terms(row + w * 8 + 96, keys + w + 12, mix));
    }
    for (; w < in_fours; w += 4) a = _mm256_add_epi64(a, terms(row + w * 8, keys + w, mix));
    for (; w < num_words; ++w) {
      uint64_t word;
      __builtin_memcpy(&word, row + w * 8, 8);
      rest += digest_term(word, keys[w] ^ mixed);
    }
  }
  a = _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d));
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), a);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + rest;
}

}  // namespace nd
