#include "ucx/plan.h"

#include <algorithm>
#include <cstring>
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

bool same_shape(const DigestGeometry& a, const DigestGeometry& b) {
  return a.num_layers == b.num_layers && a.num_parts == b.num_parts && a.layer_stride == b.layer_stride &&
         a.part_stride == b.part_stride && a.token_stride == b.token_stride && a.token_nbytes == b.token_nbytes;
}

// Do walks over layers, then parts, then members visit memory in ascending order?
bool is_nested(const DigestGeometry& g) {
  return g.token_stride == g.token_nbytes && (g.num_layers == 1 || g.num_parts * g.part_stride <= g.layer_stride);
}

}  // namespace

ReadPlan::ReadPlan(const Pace& pace, std::vector<Piece> pieces, std::vector<Check> checks_in,
                   std::vector<DigestSegment> segments_in)
    : checks(std::move(checks_in)), segments(std::move(segments_in)) {
  uint32_t first = 0;
  for (const Check& check : checks) {
    first_segment.push_back(first);
    first += static_cast<uint32_t>(check.num_segments);
  }
  cut(pace, std::move(pieces));
  relate();
}

void ReadPlan::cut(const Pace& pace, std::vector<Piece> pieces) {
  const auto by_local = [](const Piece& a, const Piece& b) { return a.local_address < b.local_address; };
  if (!std::is_sorted(pieces.begin(), pieces.end(), by_local)) std::sort(pieces.begin(), pieces.end(), by_local);
  uint64_t end = 0;
  for (size_t i = 0; i < pieces.size();) {
    Piece run = pieces[i++];
    while (i < pieces.size() && continues(run, pieces[i]) && run.nbytes + pieces[i].nbytes <= pace.chunk_nbytes) {
      run.nbytes += pieces[i++].nbytes;
    }
    if (run.local_address < end) verify_at_end = true;  // pieces overlap
    end = run.local_address + run.nbytes;
    nbytes += run.nbytes;
    for (uint64_t at = 0; at < run.nbytes; at += pace.max_chunk_nbytes) {
      const auto part = static_cast<uint32_t>(std::min(pace.max_chunk_nbytes, run.nbytes - at));
      chunks.push_back({run.remote_address + at, run.local_address + at, part, static_cast<uint32_t>(run.memory)});
    }
  }
}

void ReadPlan::relate() {
  waits_for.assign(checks.size(), 0);
  sums.assign(checks.size(), 0);
  segments_summed.assign(checks.size(), 0);
  first_dependent.assign(chunks.size() + 1, 0);
  first_family.assign(chunks.size() + 1, 0);
  std::vector<std::pair<uint32_t, uint32_t>> relations;  // (chunk, check)
  const auto ends_before = [](const Chunk& c, uint64_t address) { return c.local_address + c.nbytes <= address; };
  for (uint32_t check = 0; check < checks.size() && !verify_at_end; ++check) {
    const DigestGeometry& g = checks[check].geometry;
    for (uint64_t s = 0; s < checks[check].num_segments; ++s) {
      const auto index = static_cast<uint32_t>(first_segment[check] + s);
      if (segments[index].num_tokens == 0) continue;
      const auto [low, high] = bounds(g, segments[index]);
      auto chunk = std::lower_bound(chunks.begin(), chunks.end(), low, ends_before);
      if (is_nested(g)) members.push_back({low, index, check});
      for (; chunk != chunks.end() && chunk->local_address < high; ++chunk) {
        relations.emplace_back(static_cast<uint32_t>(chunk - chunks.begin()), check);
      }
    }
    if (relations.size() > kMaxRelations) verify_at_end = true;
  }
  if (verify_at_end) return;
  std::sort(relations.begin(), relations.end());
  relations.erase(std::unique(relations.begin(), relations.end()), relations.end());
  for (const auto& [chunk, check] : relations) {
    dependents.push_back(check);
    ++waits_for[check];
    ++first_dependent[chunk + 1];
  }
  for (size_t i = 1; i < first_dependent.size(); ++i) first_dependent[i] += first_dependent[i - 1];
  find_families();
}

// A family's members fit between two of its runs' starts, and families do not overlap: then all runs of a
// chunk can be walked in ascending order. What does not fit in is digested after the copy.
void ReadPlan::find_families() {
  const auto by_address = [](const Member& a, const Member& b) { return a.address < b.address; };
  if (!std::is_sorted(members.begin(), members.end(), by_address)) {
    std::sort(members.begin(), members.end(), by_address);
  }
  uint32_t chunk = 0;
  uint64_t end = 0;  // of what the families so far span
  for (uint32_t first = 0, next; first < members.size(); first = next) {
    const DigestGeometry& g = checks[members[first].check].geometry;
    const uint64_t tokens = segments[members[first].segment].num_tokens, run = tokens * g.token_nbytes;
    const uint64_t room = g.num_parts > 1 ? g.part_stride : g.num_layers > 1 ? g.layer_stride : run;
    for (next = first + 1; next < members.size(); ++next) {
      const Member& m = members[next];
      if (!same_shape(g, checks[m.check].geometry) || segments[m.segment].num_tokens != tokens ||
          m.address < members[next - 1].address + run || m.address + run > members[first].address + room) {
        break;
      }
    }
    const uint64_t begin = members[first].address;
    const uint64_t high = bounds(g, segments[members[next - 1].segment]).second;
    while (chunk < chunks.size() && chunks[chunk].local_address + chunks[chunk].nbytes <= begin) ++chunk;
    if (chunk == chunks.size()) break;
    if (begin < end || run > room || begin < chunks[chunk].local_address ||
        high > chunks[chunk].local_address + chunks[chunk].nbytes) {
      continue;
    }
    families.push_back({chunk, first, next - first});
    ++first_family[chunk + 1];
    end = high;
  }
  for (size_t i = 1; i < first_family.size(); ++i) first_family[i] += first_family[i - 1];
}

void ReadPlan::copy(uint32_t chunk, const uint8_t* source) {
  const Chunk& c = chunks[chunk];
  const auto local = [](uint64_t address) { return reinterpret_cast<void*>(address); };
  uint64_t at = c.local_address;
  for (uint32_t f = first_family[chunk]; f < first_family[chunk + 1]; ++f) {
    const Member* first = &members[families[f].first_member];
    const Member* last = first + families[f].num_members;
    const DigestGeometry& g = checks[first->check].geometry;
    const uint64_t run = segments[first->segment].num_tokens * g.token_nbytes;
    for (uint64_t row = 0; row < g.num_layers * g.num_parts; ++row) {
      const uint64_t offset = row / g.num_parts * g.layer_stride + row % g.num_parts * g.part_stride;
      for (const Member* m = first; m != last; ++m) {
        const uint64_t start = m->address + offset;
        if (start > at) std::memcpy(local(at), source + (at - c.local_address), start - at);
        sums[m->check] +=
            copy_and_digest_run(g, segments[m->segment], row, local(start), source + (start - c.local_address));
        at = start + run;
      }
    }
    for (const Member* m = first; m != last; ++m) ++segments_summed[m->check];
  }
  std::memcpy(local(at), source + (at - c.local_address), c.local_address + c.nbytes - at);
  copy_fence();
}

uint64_t ReadPlan::check_nbytes(uint32_t check) const {
  const DigestGeometry& g = checks[check].geometry;
  uint64_t tokens = 0;
  for (uint64_t s = 0; s < checks[check].num_segments; ++s) tokens += segments[first_segment[check] + s].num_tokens;
  return tokens * g.num_layers * g.num_parts * g.token_nbytes;
}

bool ReadPlan::matches(uint32_t check) const {
  const Check& c = checks[check];
  if (is_summed(check)) return sums[check] == c.expected;
  return digest(c.geometry, segments.data() + first_segment[check], c.num_segments) == c.expected;
}

}  // namespace nd
