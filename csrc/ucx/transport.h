// One-sided reads over UCX, with one progress thread that owns the UCX worker.
//
//   peer:  connecting -> ready -> closing -> gone      (closing from anywhere; lost or given up)
//   read:  waiting (peer connecting) -> active (in turn with others) -> last byte -> last digest -> result
//
// All calls into UCX are made on the progress thread, and all bytes are written by it or, for UCX's network
// transports, below it. A closing peer has its endpoint closed by force; its reads end only once every
// operation of theirs has completed, so that no late byte can land in their memory. Other threads talk to
// it through mailboxes. At rest it sleeps on UCX's event descriptor and its own.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "ucx/device.h"
#include "ucx/library.h"
#include "ucx/mailbox.h"
#include "ucx/plan.h"
#include "ucx/verifier.h"

namespace nd {

using Clock = std::chrono::steady_clock;
using Bytes = std::vector<uint8_t>;
using Cookie = std::array<uint8_t, 16>;

enum class EventKind : uint32_t { kRead = 0, kPeerDown = 1 };
enum class ReadStatus : uint32_t { kOk = 0, kMismatch = 1, kFailed = 2, kFenced = 3 };

struct Event {
  EventKind kind;
  ReadStatus status;
  uint64_t id;
  uint64_t nbytes;
  double seconds;
  double read_seconds;
  std::string message;
};

struct Settings {
  std::string library, tls, net_devices, posix_dir;
  int device = -1;  // the GPU that all memory is on, -1 for the host's

  bool on_device() const { return device >= 0; }
};

// A peer's memory as it describes it: its first byte, and behind the last one a cookie that proves the key.
struct RemoteMemory {
  uint64_t base;
  uint64_t cookie_address;
  Cookie cookie;
  Bytes key;
  bool on_device;
};

// `handle` and `cookie_address` of a GPU's memory: its cookie in the host's.
struct LocalMemory {
  uint64_t address = 0;
  uint64_t cookie_address = 0;
  Cookie cookie{};
  Bytes key;
  uint64_t end = 0;
  ucp_mem_h handle = nullptr;
  ucp_mem_h device_handle = nullptr;
};

struct Peer;

struct Read {
  uint64_t id;
  ReadPlan plan;
  Clock::time_point queued_at;
  Clock::time_point first_issue{}, last_byte{};
  Peer* peer = nullptr;
  size_t next_chunk = 0, chunks_done = 0, checks_done = 0;
  uint64_t nbytes_done = 0;
  uint32_t ops = 0, jobs = 0;  // outstanding: UCX operations, checks at the verifier
  bool ended = false;          // mismatch, or the peer is closing: nothing more is begun
  bool unsettled = false;      // in `unsettled_`
  uint64_t order = 0;          // of arrival at its peer
  ReadStatus status = ReadStatus::kOk;
  std::string message{};
};

struct Memory {
  RemoteMemory remote;
  ucp_rkey_h key = nullptr;
  const uint8_t* mapped = nullptr;  // where `remote.base` is in our own address space, if it can be mapped
  Cookie received{};
  // Of a GPU's memory, whose `key` is that of its cookie in the host's: `on_device` is where `remote.base` is in our
  // address space, in an allocation that is mapped at `opened` if it is another process's; else `device_key` is UCX's.
  uint64_t on_device = 0, opened = 0, guard = 0;
  ucp_rkey_h device_key = nullptr;
  std::string why_not_mapped{};  // though it is on this machine
};

// Chunks of one read that were queued for a GPU's copies at once.
struct Copies {
  void* mark;
  Read* read;
  uint32_t first_chunk, count;
  uint64_t nbytes;
};

struct Peer {
  enum class State { kConnecting, kReady, kClosing };
  uint64_t id;
  std::vector<Memory> memories{};
  State state = State::kConnecting;
  Clock::time_point deadline{};
  ucp_ep_h endpoint = nullptr;
  void* close_request = nullptr;
  uint32_t ops = 0;         // outstanding UCX operations, of reads and of the handshake
  uint32_t handshakes = 0;  // of those, still to end before the peer is ready
  bool failed = false;      // seen by a callback; the main loop closes it
  bool lost = false;        // closing for that reason: PeerDown follows
  std::string message{};
  std::map<uint64_t, std::unique_ptr<Read>> reads{};  // by order of arrival
};

class Transport {
 public:
  // Null, with `error` set, if UCX does not start with these settings.
  static std::unique_ptr<Transport> open(const Settings& settings, std::string* error);
  ~Transport();  // closes

  int wakeup_fd() const { return event_fd_; }
  const Bytes& address() const { return address_; }
  std::string version() const { return ucx_->version(); }

  // Zeroed, 64-byte aligned, readable by peers until close. Waits for the progress thread.
  bool allocate(uint64_t nbytes, LocalMemory* out, std::string* error);
  // The caller's memory, which outlives the transport. `guard`: `guard_nbytes` of it, behind what peers may read, that
  // are the transport's own.
  bool register_memory(uint64_t address, uint64_t guard, uint64_t guard_nbytes, LocalMemory* out, std::string* error);
  const Pace& pace() const { return pace_; }
  void connect(uint64_t peer_id, Bytes address, std::vector<RemoteMemory> memories);
  void disconnect(uint64_t peer_id);
  void read(uint64_t peer_id, uint64_t read_id, ReadPlan plan, Clock::time_point queued_at);
  // Where a ready peer's memories are in our GPU's address space, kept there until as many `release`s; none if it is
  // not ready, or one of them is not there. Waits for the progress thread.
  std::vector<uint64_t> hold(uint64_t peer_id);
  void release(uint64_t peer_id);
  std::vector<Event> poll(size_t most) { return events_.take_and_quiet(most); }
  std::string describe(uint64_t peer_id);

 private:
  struct MemoryCall;
  struct ConnectCall {
    uint64_t peer_id;
    Bytes address;
    std::vector<RemoteMemory> memories;
  };
  struct DisconnectCall {
    uint64_t peer_id;
  };
  struct ReadCall {
    uint64_t peer_id;
    std::unique_ptr<Read> read;
  };
  struct HoldCall;
  struct ReleaseCall {
    uint64_t peer_id;
  };
  struct StopCall {};
  using Call = std::variant<std::shared_ptr<MemoryCall>, ConnectCall, DisconnectCall, ReadCall,
                            std::shared_ptr<HoldCall>, ReleaseCall, StopCall>;

  // What a UCX completion needs to know.
  struct Op {
    Transport* transport;
    Peer* peer;
    Read* read;  // null for the handshake
    uint32_t chunk;
  };

  Transport(const Settings& settings, int event_fd, int call_fd);

  // transport.cpp: the thread
  bool start(std::string* error);
  std::string open_ucx();
  void run();
  bool take_calls();
  void handle(std::shared_ptr<MemoryCall>& call);
  void handle(ConnectCall& call);
  void handle(DisconnectCall& call);
  void handle(ReadCall& call);
  void handle(std::shared_ptr<HoldCall>& call);
  void handle(ReleaseCall& call);
  void handle(StopCall& call);
  void sleep();
  void wait(int timeout_ms, bool for_ucx);
  void shut_down();
  bool memory_call(std::shared_ptr<MemoryCall> call, LocalMemory* out, std::string* error);
  std::string why(ucs_status_t status) const;

  // memory.cpp
  std::string map_memory(uint64_t address, uint64_t nbytes, uint64_t cookie_address, LocalMemory* out);
  std::string allocate_host(uint64_t nbytes, ucp_mem_h* handle, uint64_t* address, Bytes* key);
  std::string pack_key(ucp_mem_h handle, Bytes* out);
  std::string place_cookie(LocalMemory* memory);

  // peers.cpp
  void begin_connect(Peer* peer, const Bytes& address);
  std::string open_memory(Peer* peer, Memory* memory);
  std::string unpack_key(Peer* peer, const uint8_t* packed, ucp_rkey_h* key);
  bool has_cookie(const Memory& memory);
  void end_handshake(Peer* peer);
  void fail(Peer* peer, std::string message);
  void close(Peer* peer, bool lost);
  bool tend_peers();
  void bury(Peer* peer);
  std::string lane(const Peer& peer) const;
  void show(uint64_t peer_id, std::string lane);

  // device.cpp
  std::string offer_device(uint64_t address, uint64_t nbytes, uint64_t guard, LocalMemory* out);
  Bytes key_of_device(uint64_t address, uint64_t nbytes, LocalMemory* out);
  std::string open_device(Peer* peer, Memory* memory);
  enum class Turn { kNothing, kHandedOver, kCopied };
  Turn copy_on_device(Read* read);
  bool take_copied();

  // reads.cpp
  void activate(Read* read);
  void stop(Read* read);
  bool issue();
  Turn take_turn(Read* read);
  void copy(Read* read, const Memory& memory, uint32_t chunk);
  void get(Peer* peer, Read* read, uint32_t chunk, void* local, uint64_t remote, uint64_t nbytes, ucp_rkey_h key);
  void flush(Peer* peer);
  void track(ucs_status_ptr_t request, Op* op);
  void op_done(Op* op, ucs_status_t status);
  void chunk_done(Read* read, uint32_t chunk);
  void all_chunks_done(Read* read);
  void verify(Read* read, uint32_t check);
  void check_done(Read* read, uint32_t check, bool matches);
  bool take_verified();
  void unsettle(Read* read);
  bool settle();
  void post(const Read& read);
  static void on_op_done(void* request, ucs_status_t status, void* op);
  static void on_endpoint_error(void* transport, ucp_ep_h endpoint, ucs_status_t status);
  ucp_mem_h local_handle(uint64_t address, uint64_t nbytes) const;

  const Settings settings_;
  const Pace pace_;
  const int event_fd_, call_fd_;
  Mailbox<Event> events_;
  Mailbox<Call> calls_;
  Mailbox<Verified> verified_;
  std::mutex lanes_mutex_;
  std::unordered_map<uint64_t, std::string> lanes_;  // what `describe` says
  Bytes address_;

  // The progress thread's own from here on.
  const UcxLibrary* ucx_ = nullptr;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int ucx_fd_ = -1;
  std::unique_ptr<Cuda> cuda_;  // with settings_.device
  std::deque<Copies> copies_;   // under way on the GPU
  std::vector<LocalMemory> memories_;
  std::map<uint64_t, std::unique_ptr<Peer>> peers_;
  std::deque<Read*> active_;      // with chunks left to begin, in turn
  std::vector<Read*> unsettled_;  // something of theirs ended: they may be complete
  uint64_t next_order_ = 0;
  uint32_t ops_in_flight_ = 0;  // of reads
  uint64_t nbytes_in_flight_ = 0;
  bool connecting_ = false, closing_ = false;  // some peer is: `tend_peers` has something to look at
  bool stopping_ = false;
  bool one_core_ = false;  // a second thread would only take turns with this one
  std::unique_ptr<Verifier> verifier_;
  std::thread thread_;
};

}  // namespace nd
