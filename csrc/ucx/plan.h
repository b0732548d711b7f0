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

constexpr uint64_t kChunkNbytes = 512 << 10;

struct ReadPlan {
  std::vector<Chunk> chunks;  // by local address
  std::vector<Check> checks;
  std::vector<DigestSegment> segments;    // of all checks, in order
  std::vector<uint32_t> first_segment;    // per check
  std::vector<uint32_t> waits_for;        // per check: chunks not there yet; counted down by the reader
  std::vector<uint32_t> dependents;       // checks by chunk ...
  std::vector<uint32_t> first_dependent;  // ... starting here; one more entry than chunks
  bool verify_at_end = false;             // the checks' memory is too interleaved: they wait for all chunks
  uint64_t nbytes = 0;

  ReadPlan(std::vector<Piece> pieces, std::vector<Check> checks, std::vector<DigestSegment> segments);

  uint64_t check_nbytes(uint32_t check) const;
  bool matches(uint32_t check) const;  // reads local memory

 private:
  void cut(std::vector<Piece> pieces);
  void relate();
};

}  // namespace nd
