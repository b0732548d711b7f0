// The digest of published KV, as defined in common/kvcache/digest.py: an order-free sum of keyed products.
//
// One digest covers [num_layers, num_parts] x tokens x token_nbytes bytes. Tokens come in segments, each a
// run of consecutive positions at an address; layers, parts and tokens lie at constant strides. A last
// word that is not full counts as filled up with zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nd {

struct DigestSegment {
  uint64_t address;  // of layer 0, part 0, first token
  uint64_t first_position;
  uint64_t num_tokens;
};

struct DigestGeometry {
  uint64_t num_layers;
  uint64_t num_parts;
  uint64_t layer_stride;  // bytes, as are all strides
  uint64_t part_stride;
  uint64_t token_stride;
  uint64_t token_nbytes;
};

uint64_t digest(const DigestGeometry& geometry, const DigestSegment* segments, size_t num_segments);

// What one (layer, part) of a segment adds to its digest: the tokens at `run`. `row` is layer * num_parts + part.
uint64_t digest_run(const DigestGeometry& geometry, const DigestSegment& segment, uint64_t row, const void* run);

// The same while copying the run from `from` to `to`: what is digested is what is stored. Tokens lie without
// gaps. Written past the caches where that is possible: call `copy_fence` before anyone is told of the bytes.
uint64_t copy_and_digest_run(const DigestGeometry& geometry, const DigestSegment& segment, uint64_t row, void* to,
                             const void* from);
void copy_fence();

// A run of tokens of one (layer, part): the term sum over `num_words` full words of each. `seed` is the
// unmixed key of the first token; the next token's is `seed + kDigestC1`.
using DigestRows = uint64_t (*)(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed,
                                const uint64_t* keys, size_t num_words);

constexpr uint64_t kDigestC1 = 0x9E3779B97F4A7C15;
constexpr uint64_t kDigestC2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kDigestC3 = 0x165667B19E3779F9;

static constexpr uint64_t digest_mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

static inline uint64_t digest_term(uint64_t word, uint64_t key) {
  const uint32_t low = static_cast<uint32_t>(word) + static_cast<uint32_t>(key);
  const uint32_t high = static_cast<uint32_t>(word >> 32) + static_cast<uint32_t>(key >> 32);
  return uint64_t{low} * high;
}

uint64_t digest_rows_portable(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed,
                              const uint64_t* keys, size_t num_words);
uint64_t digest_rows_avx2(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed,
                          const uint64_t* keys, size_t num_words);
// Copies as well. `to` is aligned to 32 bytes, `num_words` is a multiple of 4, tokens have no gaps.
uint64_t copy_and_digest_rows_avx2(uint8_t* to, const uint8_t* from, size_t num_tokens, uint64_t seed,
                                   const uint64_t* keys, size_t num_words);
uint64_t digest_rows_avx512(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed,
                            const uint64_t* keys, size_t num_words);

}  // namespace nd
