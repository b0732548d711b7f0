// What one read has to do, worked out before it is queued: bounded contiguous chunks, and for every check
// the number of chunks it waits for.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/digest.h"

namespace nd {

struct Piece {
  uint64_t memory;  // index into the peer's memories
  uint64_t remote_address;
  uint64_t local_address;
  uint64_t nbytes;
};

struct Check {
  DigestGeometry geometry;
  uint64_t expected;
  uint64_t num_segments;
};

struct Chunk {
  uint64_t remote_address;
  uint64_t local_address;
  uint32_t nbytes;
  uint32_t memory;
};

// Segments of one shape that take turns in memory: the units of a block, say. Ordered by address.
struct Family {
  uint32_t chunk;
  uint32_t first_member, num_members;  // of `members`
};

struct Member {
  uint64_t address;
  uint32_t segment, check;
};

// How much is moved at a time.
struct Pace {
  uint64_t chunk_nbytes;      // pieces are joined up to this, and it is a read's turn
  uint64_t max_chunk_nbytes;  // pieces are cut above this
  uint64_t in_flight_nbytes;  // in UCX's hands: what a new read waits behind
};

constexpr Pace kHostPace{512 << 10, 2 << 20, 8 << 20};
// NVLink is at half its speed with copies of 4 MiB one by one, and a whole block of keys and values is one copy.
constexpr Pace kDevicePace{16 << 20, 32 << 20, 256 << 20};

struct ReadPlan {
  std::vector<Chunk> chunks;  // by local address
  std::vector<Check> checks;
  std::vector<DigestSegment> segments;    // of all checks, in order
  std::vector<uint32_t> first_segment;    // per check
  std::vector<uint32_t> waits_for;        // per check: chunks not there yet; counted down by the reader
  std::vector<uint32_t> dependents;       // checks by chunk ...
  std::vector<uint32_t> first_dependent;  // ... starting here; one more entry than chunks
  bool verify_at_end = false;             // the checks' memory is too interleaved: they wait for all chunks
  std::vector<Member> members;            // segments that can be digested while their chunk is copied
  std::vector<Family> families;           // of those, by address ...
  std::vector<uint32_t> first_family;     // ... and where each chunk's begin; one more entry than chunks
  std::vector<uint64_t> sums;             // per check: of the segments that `copy` has digested ...
  std::vector<uint32_t> segments_summed;  // ... and how many those are
  uint64_t nbytes = 0;

  ReadPlan(const Pace& pace, std::vector<Piece> pieces, std::vector<Check> checks, std::vector<DigestSegment> segments);

  // Copies a chunk from memory of this address space and digests its families on the way.
  void copy(uint32_t chunk, const uint8_t* source);

  uint64_t check_nbytes(uint32_t check) const;
  bool is_summed(uint32_t check) const { return segments_summed[check] == checks[check].num_segments; }
  bool matches(uint32_t check) const;  // reads local memory, unless `is_summed`

 private:
  void cut(const Pace& pace, std::vector<Piece> pieces);
  void relate();
  void find_families();
};

}  // namespace nd
