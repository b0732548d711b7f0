#include <immintrin.h>

#include "cpu/digest.h"

namespace nd {
namespace {

inline __m512i terms(__m512i words, __m512i keys, __m512i mixed) {
  const __m512i sum = _mm512_add_epi32(words, _mm512_xor_si512(keys, mixed));
  return _mm512_mul_epu32(sum, _mm512_srli_epi64(sum, 32));
}

}  // namespace

uint64_t digest_rows_avx512(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed,
                            const uint64_t* keys, size_t num_words) {
  __m512i a = _mm512_setzero_si512(), b = a;
  const size_t in_sixteens = num_words & ~size_t{15};
  for (size_t t = 0; t < num_tokens; ++t, seed += kDigestC1) {
    const __m512i mix = _mm512_set1_epi64(static_cast<long long>(digest_mix(seed)));
    const uint8_t* row = rows + t * token_stride;
    size_t w = 0;
    for (; w < in_sixteens; w += 16) {
      a = _mm512_add_epi64(a, terms(_mm512_loadu_si512(row + w * 8), _mm512_loadu_si512(keys + w), mix));
      b = _mm512_add_epi64(b, terms(_mm512_loadu_si512(row + w * 8 + 64), _mm512_loadu_si512(keys + w + 8), mix));
    }
    for (; w < num_words; w += 8) {
      const size_t left = num_words - w;
      const auto mask = static_cast<__mmask8>(left >= 8 ? 0xFF : (1u << left) - 1);
      const __m512i words = _mm512_maskz_loadu_epi64(mask, row + w * 8);
      const __m512i key = _mm512_maskz_loadu_epi64(mask, keys + w);
      a = _mm512_add_epi64(a, _mm512_maskz_mov_epi64(mask, terms(words, key, mix)));
    }
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(a, b)));
}

}  // namespace nd
