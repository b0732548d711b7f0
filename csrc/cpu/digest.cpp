#include "cpu/digest.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "cpu/features.h"
#include "export.h"

namespace nd {
namespace {

constexpr size_t kTableWords = 2048;
using KeyTable = std::array<uint64_t, kTableWords>;

KeyTable make_keys(uint64_t first_word) {
  KeyTable table;
  for (size_t w = 0; w < kTableWords; ++w) table[w] = digest_mix((first_word + w + 1) * kDigestC3);
  return table;
}

DigestRows best_rows() {
#if defined(__x86_64__)
  if (cpu_features().avx512) return digest_rows_avx512;
  if (cpu_features().avx2) return digest_rows_avx2;
#endif
  return digest_rows_portable;
}

std::atomic<DigestRows> g_rows{nullptr};

DigestRows chosen_rows() {
  DigestRows rows = g_rows.load(std::memory_order_relaxed);
  if (rows == nullptr) {
    rows = best_rows();
    g_rows.store(rows, std::memory_order_relaxed);
  }
  return rows;
}

uint64_t digest_tails(const uint8_t* tails, size_t token_stride, size_t num_tokens, uint64_t seed, uint64_t key,
                      size_t nbytes) {
  uint64_t sum = 0;
  for (size_t t = 0; t < num_tokens; ++t) {
    uint64_t word = 0;
    std::memcpy(&word, tails + t * token_stride, nbytes);
    sum += digest_term(word, key ^ digest_mix(seed + t * kDigestC1));
  }
  return sum;
}

const KeyTable& first_keys() {
  static const KeyTable keys = make_keys(0);
  return keys;
}

// Words [first_word, first_word + up to kTableWords) of every token of a run; `keys` holds theirs.
uint64_t digest_columns(const DigestGeometry& g, const DigestSegment& s, uint64_t row, const uint8_t* run,
                        uint64_t first_word, const uint64_t* keys, DigestRows rows) {
  const uint64_t offset = first_word * 8;
  const uint64_t nbytes = std::min<uint64_t>(g.token_nbytes - offset, kTableWords * 8);
  const uint64_t num_words = nbytes / 8, tail = nbytes % 8;
  const uint64_t seed = s.first_position * kDigestC1 + row * kDigestC2 + 1;
  uint64_t sum = 0;
  if (num_words) sum += rows(run + offset, g.token_stride, s.num_tokens, seed, keys, num_words);
  if (tail) {
    const uint8_t* tails = run + offset + num_words * 8;
    sum += digest_tails(tails, g.token_stride, s.num_tokens, seed, keys[num_words], tail);
  }
  return sum;
}

// The words behind the first table, whose keys are made as they are needed.
uint64_t digest_rest(const DigestGeometry& g, const DigestSegment& s, uint64_t row, const uint8_t* run) {
  uint64_t sum = 0;
  for (uint64_t word = kTableWords; word * 8 < g.token_nbytes; word += kTableWords) {
    const KeyTable keys = make_keys(word);
    sum += digest_columns(g, s, row, run, word, keys.data(), chosen_rows());
  }
  return sum;
}

}  // namespace

uint64_t digest_rows_portable(const uint8_t* rows, size_t token_stride, size_t num_tokens, uint64_t seed,
                              const uint64_t* keys, size_t num_words) {
  uint64_t sum = 0;
  for (size_t t = 0; t < num_tokens; ++t, seed += kDigestC1) {
    const uint64_t mixed = digest_mix(seed);
    const uint8_t* row = rows + t * token_stride;
    for (size_t w = 0; w < num_words; ++w) {
      uint64_t word;
      std::memcpy(&word, row + w * 8, 8);
      sum += digest_term(word, keys[w] ^ mixed);
    }
  }
  return sum;
}

uint64_t digest_run(const DigestGeometry& g, const DigestSegment& s, uint64_t row, const void* run) {
  return digest_columns(g, s, row, static_cast<const uint8_t*>(run), 0, first_keys().data(), chosen_rows()) +
         (g.token_nbytes > kTableWords * 8 ? digest_rest(g, s, row, static_cast<const uint8_t*>(run)) : 0);
}

uint64_t copy_and_digest_run(const DigestGeometry& g, const DigestSegment& s, uint64_t row, void* to,
                             const void* from) {
#if defined(__x86_64__)
  const bool fits = g.token_nbytes % 32 == 0 && g.token_nbytes <= kTableWords * 8;
  if (fits && reinterpret_cast<uintptr_t>(to) % 32 == 0 && cpu_features().avx2) {
    const uint64_t seed = s.first_position * kDigestC1 + row * kDigestC2 + 1;
    return copy_and_digest_rows_avx2(static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), s.num_tokens, seed,
                                     first_keys().data(), g.token_nbytes / 8);
  }
#endif
  std::memcpy(to, from, s.num_tokens * g.token_nbytes);
  return digest_run(g, s, row, to);
}

void copy_fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

uint64_t digest(const DigestGeometry& g, const DigestSegment* segments, size_t num_segments) {
  uint64_t sum = 0;
  for (size_t i = 0; i < num_segments; ++i) {
    for (uint64_t layer = 0; layer < g.num_layers; ++layer) {
      for (uint64_t part = 0; part < g.num_parts; ++part) {
        const uint64_t run = segments[i].address + layer * g.layer_stride + part * g.part_stride;
        sum += digest_run(g, segments[i], layer * g.num_parts + part, reinterpret_cast<const void*>(run));
      }
    }
  }
  return sum;
}

}  // namespace nd

ND_EXPORT uint64_t nd_digest(const nd::DigestGeometry* geometry, const nd::DigestSegment* segments,
                             size_t num_segments) {
  return nd::digest(*geometry, segments, num_segments);
}

// digests[b, u] of every unit of every block. A unit lies at `offsets[u]` in its block; `blocks` holds one
// segment per block, whose address is the block's start.
ND_EXPORT void nd_digest_blocks(const nd::DigestGeometry* units, const uint64_t* offsets, size_t num_units,
                                const nd::DigestSegment* blocks, size_t num_blocks, uint64_t* digests) {
  for (size_t b = 0; b < num_blocks; ++b) {
    for (size_t u = 0; u < num_units; ++u) {
      nd::DigestSegment segment = blocks[b];
      segment.address += offsets[u];
      digests[b * num_units + u] = nd::digest(units[u], &segment, 1);
    }
  }
}

// Choose an implementation by level (0 portable, 1 AVX2, 2 AVX-512), for tests and figures. False if this
// processor cannot run it.
ND_EXPORT bool nd_digest_use(int level) {
  nd::DigestRows rows = nullptr;
  if (level == 0) rows = nd::digest_rows_portable;
#if defined(__x86_64__)
  if (level == 1 && nd::cpu_features().avx2) rows = nd::digest_rows_avx2;
  if (level == 2 && nd::cpu_features().avx512) rows = nd::digest_rows_avx512;
#endif
  if (rows == nullptr) return false;
  nd::g_rows.store(rows, std::memory_order_relaxed);
  return true;
}
