// The C face of the UCX transport; common/kvtransfer/ucx.py is its only caller and mirrors these structures.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "export.h"
#include "ucx/transport.h"

namespace {

using nd::Transport;

struct NdMemory {  // ours
  uint64_t address;
  uint64_t cookie_address;
  uint8_t cookie[16];
  uint32_t key_nbytes;
  uint8_t key[1004];
};

struct NdRemote {  // a peer's
  uint64_t base;
  uint64_t cookie_address;
  uint8_t cookie[16];
  const uint8_t* key;
  uint64_t key_nbytes;
  uint64_t on_device;
};

struct NdEvent {
  uint32_t kind;
  uint32_t status;
  uint64_t id;
  uint64_t nbytes;
  double seconds;
  double read_seconds;
  char message[216];
};

void put_text(const std::string& text, char* out, size_t capacity) { std::snprintf(out, capacity, "%s", text.c_str()); }

bool put_memory(bool ok, const nd::LocalMemory& memory, std::string reason, NdMemory* out, char* error,
                size_t error_nbytes) {
  if (ok && memory.key.size() > sizeof out->key) {
    ok = false;
    reason = "a remote key of " + std::to_string(memory.key.size()) + " bytes";
  }
  put_text(reason, error, error_nbytes);
  if (!ok) return false;
  out->address = memory.address;
  out->cookie_address = memory.cookie_address;
  std::copy(memory.cookie.begin(), memory.cookie.end(), out->cookie);
  out->key_nbytes = static_cast<uint32_t>(memory.key.size());
  std::copy(memory.key.begin(), memory.key.end(), out->key);
  return true;
}

}  // namespace

// A transport, or null with the reason in `error`.
// `device`: the GPU that all memory is on, -1 for the host's.
ND_EXPORT Transport* nd_ucx_open(const char* library, const char* tls, const char* net_devices, const char* posix_dir,
                                 int device, char* error, size_t error_nbytes) {
  std::string reason;
  auto transport = Transport::open({library, tls, net_devices, posix_dir, device}, &reason);
  put_text(reason, error, error_nbytes);
  return transport.release();
}

ND_EXPORT void nd_ucx_close(Transport* transport) { delete transport; }

ND_EXPORT int nd_ucx_wakeup_fd(Transport* transport) { return transport->wakeup_fd(); }

ND_EXPORT void nd_ucx_version(Transport* transport, char* out, size_t capacity) {
  put_text(transport->version(), out, capacity);
}

// Copies the worker's address if it fits; returns its size.
ND_EXPORT size_t nd_ucx_address(Transport* transport, uint8_t* out, size_t capacity) {
  const nd::Bytes& address = transport->address();
  if (address.size() <= capacity) std::copy(address.begin(), address.end(), out);
  return address.size();
}

ND_EXPORT bool nd_ucx_allocate(Transport* transport, uint64_t nbytes, NdMemory* out, char* error, size_t error_nbytes) {
  nd::LocalMemory memory;
  std::string reason;
  const bool ok = transport->allocate(nbytes, &memory, &reason);
  return put_memory(ok, memory, reason, out, error, error_nbytes);
}

// The caller's memory from `address` to the end of the guard, which begins behind what peers may read.
ND_EXPORT bool nd_ucx_register(Transport* transport, uint64_t address, uint64_t guard, uint64_t guard_nbytes,
                               NdMemory* out, char* error, size_t error_nbytes) {
  nd::LocalMemory memory;
  std::string reason;
  const bool ok = transport->register_memory(address, guard, guard_nbytes, &memory, &reason);
  return put_memory(ok, memory, reason, out, error, error_nbytes);
}

ND_EXPORT void nd_ucx_connect(Transport* transport, uint64_t peer_id, const uint8_t* address, size_t address_nbytes,
                              const NdRemote* memories, size_t num_memories) {
  std::vector<nd::RemoteMemory> remote;
  for (size_t i = 0; i < num_memories; ++i) {
    const NdRemote& m = memories[i];
    nd::RemoteMemory memory{m.base, m.cookie_address, {}, nd::Bytes(m.key, m.key + m.key_nbytes), m.on_device != 0};
    std::copy(std::begin(m.cookie), std::end(m.cookie), memory.cookie.begin());
    remote.push_back(std::move(memory));
  }
  transport->connect(peer_id, nd::Bytes(address, address + address_nbytes), std::move(remote));
}

ND_EXPORT void nd_ucx_disconnect(Transport* transport, uint64_t peer_id) { transport->disconnect(peer_id); }

// Places of the peer's memories, up to `capacity`; returns how many. None: they are not held.
ND_EXPORT size_t nd_ucx_hold(Transport* transport, uint64_t peer_id, uint64_t* places, size_t capacity) {
  const std::vector<uint64_t> held = transport->hold(peer_id);
  if (held.size() > capacity) {
    transport->release(peer_id);
    return 0;
  }
  std::copy(held.begin(), held.end(), places);
  return held.size();
}

ND_EXPORT void nd_ucx_release(Transport* transport, uint64_t peer_id) { transport->release(peer_id); }

// All arrays are copied. Pieces are within the peer's memories: the caller has looked.
ND_EXPORT void nd_ucx_read(Transport* transport, uint64_t peer_id, uint64_t read_id, const nd::Piece* pieces,
                           size_t num_pieces, const nd::Check* checks, size_t num_checks,
                           const nd::DigestSegment* segments, size_t num_segments) {
  const nd::Clock::time_point now = nd::Clock::now();
  nd::ReadPlan plan(transport->pace(), {pieces, pieces + num_pieces}, {checks, checks + num_checks},
                    {segments, segments + num_segments});
  transport->read(peer_id, read_id, std::move(plan), now);
}

// Up to `capacity` events, oldest first; returns how many.
ND_EXPORT size_t nd_ucx_poll(Transport* transport, NdEvent* out, size_t capacity) {
  const std::vector<nd::Event> events = transport->poll(capacity);
  for (const nd::Event& e : events) {
    *out = {
        static_cast<uint32_t>(e.kind), static_cast<uint32_t>(e.status), e.id, e.nbytes, e.seconds, e.read_seconds, {}};
    put_text(e.message, out->message, sizeof out->message);
    ++out;
  }
  return events.size();
}

ND_EXPORT void nd_ucx_describe(Transport* transport, uint64_t peer_id, char* out, size_t capacity) {
  put_text(transport->describe(peer_id), out, capacity);
}
