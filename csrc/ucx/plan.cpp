#include "ucx/plan.h"

#include <algorithm>
#include <utility>

namespace nd {
namespace {

constexpr uint64_t kMaxRelations = 4 << 20;

bool continues(const Piece& a, const Piece& b) {
  return a.memory == b.memory && a.remote_address + a.nbytes == b.remote_address &&
         a.local_address + a.nbytes == b.local_address;
}

// The span of memory, holes included, that a segment's tokens lie in.
std::pair<uint64_t, uint64_t> bounds(const DigestGeometry& g, const DigestSegment& s) {
  const uint64_t last =
      (g.num_layers - 1) * g.layer_stride + (g.num_parts - 1) * g.part_stride + (s.num_tokens - 1) * g.token_stride;
  return {s.address, s.address + last + g.token_nbytes};
}

}  // namespace

ReadPlan::ReadPlan(std::vector<Piece> pieces, std::vector<Check> checks_in, std::vector<DigestSegment> segments_in)
    : checks(std::move(checks_in)), segments(std::move(segments_in)) {
  uint32_t first = 0;
  for (const Check& check : checks) {
    first_segment.push_back(first);
    first += static_cast<uint32_t>(check.num_segments);
  }
  cut(std::move(pieces));
  relate();
}

void ReadPlan::cut(std::vector<Piece> pieces) {
  const auto by_local = [](const Piece& a, const Piece& b) { return a.local_address < b.local_address; };
  if (!std::is_sorted(pieces.begin(), pieces.end(), by_local)) std::sort(pieces.begin(), pieces.end(), by_local);
  uint64_t end = 0;
  for (size_t i = 0; i < pieces.size();) {
    Piece run = pieces[i++];
    for (; i < pieces.size() && continues(run, pieces[i]); ++i) run.nbytes += pieces[i].nbytes;
    if (run.local_address < end) verify_at_end = true;  // pieces overlap
    end = run.local_address + run.nbytes;
    nbytes += run.nbytes;
    for (uint64_t at = 0; at < run.nbytes; at += kChunkNbytes) {
      const auto part = static_cast<uint32_t>(std::min(kChunkNbytes, run.nbytes - at));
      chunks.push_back({run.remote_address + at, run.local_address + at, part, static_cast<uint32_t>(run.memory)});
    }
  }
}

void ReadPlan::relate() {
  waits_for.assign(checks.size(), 0);
  first_dependent.assign(chunks.size() + 1, 0);
  std::vector<std::pair<uint32_t, uint32_t>> relations;  // (chunk, check)
  const auto ends_before = [](const Chunk& c, uint64_t address) { return c.local_address + c.nbytes <= address; };
  for (uint32_t check = 0; check < checks.size() && !verify_at_end; ++check) {
    for (uint64_t s = 0; s < checks[check].num_segments; ++s) {
      const DigestSegment& segment = segments[first_segment[check] + s];
      if (segment.num_tokens == 0) continue;
      const auto [low, high] = bounds(checks[check].geometry, segment);
      auto chunk = std::lower_bound(chunks.begin(), chunks.end(), low, ends_before);
      for (; chunk != chunks.end() && chunk->local_address < high; ++chunk) {
        relations.emplace_back(static_cast<uint32_t>(chunk - chunks.begin()), check);
      }
    }
    if (relations.size() > kMaxRelations) verify_at_end = true;
  }
  if (verify_at_end) return;
  std::sort(relations.begin(), relations.end());
  relations.erase(std::unique(relations.begin(), relations.end()), relations.end());
  dependents.reserve(relations.size());
  for (const auto& [chunk, check] : relations) {
    dependents.push_back(check);
    ++waits_for[check];
    ++first_dependent[chunk + 1];
  }
  for (size_t i = 1; i < first_dependent.size(); ++i) first_dependent[i] += first_dependent[i - 1];
}

uint64_t ReadPlan::check_nbytes(uint32_t check) const {
  const DigestGeometry& g = checks[check].geometry;
  uint64_t tokens = 0;
  for (uint64_t s = 0; s < checks[check].num_segments; ++s) tokens += segments[first_segment[check] + s].num_tokens;
  return tokens * g.num_layers * g.num_parts * g.token_nbytes;
}

bool ReadPlan::matches(uint32_t check) const {
  const Check& c = checks[check];
  return digest(c.geometry, segments.data() + first_segment[check], c.num_segments) == c.expected;
}

}  // namespace nd
