#include "ucx/transport.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <future>
#include <tuple>

namespace nd {
namespace {

constexpr std::chrono::seconds kAllocateTimeout{300}, kCloseTimeout{5}, kHoldTimeout{1};
constexpr std::chrono::microseconds kSpin{50};      // without a move, before it sleeps
constexpr std::chrono::milliseconds kNap{1};        // while peers connect or close
constexpr std::chrono::milliseconds kPatience{20};  // with a peer that does not answer at once
constexpr uint64_t kAlign = 64;

// What UCX sends and takes over TCP at a time. Reads are emulated there: the owner copies into such a segment,
// sends it, and the reader copies it out. UCX's 8 KiB cost each side a system call and a turn of its progress
// for every two pages; from 512 KiB on, segments fall out of the second-level cache between two copies.
constexpr std::pair<const char*, const char*> kTcpSettings[] = {{"TCP_TX_SEG_SIZE", "256k"},
                                                                {"TCP_RX_SEG_SIZE", "256k"}};

// Has the operator said where segments lie, or whether they keep their names?
bool operator_names_segments() {
  return getenv("UCX_POSIX_DIR") != nullptr || getenv("UCX_POSIX_USE_PROC_LINK") != nullptr;
}

// Threads made while this lives leave every signal to Python's own thread.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_{};
};

}  // namespace

struct Transport::MemoryCall {
  uint64_t address;  // 0: to be allocated
  uint64_t nbytes;   // in all
  uint64_t cookie_address;
  std::promise<std::pair<LocalMemory, std::string>> done;
};

// `met` by the first of two: the caller that waits no longer, or the thread that answers. What nobody waits for is not
// held, since nobody would release it.
struct Transport::HoldCall {
  uint64_t peer_id;
  std::atomic<bool> met{false};
  std::promise<std::vector<uint64_t>> done;
};

// -- the callers' side ------------------------------------------------------------------------------

Transport::Transport(const Settings& settings, int event_fd, int call_fd)
    : settings_(settings),
      pace_(settings.on_device() ? kDevicePace : kHostPace),
      event_fd_(event_fd),
      call_fd_(call_fd),
      events_(event_fd),
      calls_(call_fd),
      verified_(call_fd) {}

std::unique_ptr<Transport> Transport::open(const Settings& settings, std::string* error) {
  const int event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), call_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  std::unique_ptr<Transport> transport(new Transport(settings, event_fd, call_fd));
  if (event_fd < 0 || call_fd < 0) {
    *error = "eventfd: too many open files";
    return nullptr;
  }
  if (!transport->start(error)) return nullptr;
  return transport;
}

bool Transport::start(std::string* error) {
  ucx_ = load_ucx(settings_.library, error);
  if (ucx_ == nullptr) return false;
  const SignalsBlocked blocked;
  std::promise<std::string> opened;
  thread_ = std::thread([this, &opened] {
    pthread_setname_np(pthread_self(), "nd-ucx");
    const std::string failure = open_ucx();
    opened.set_value(failure);
    if (failure.empty()) run();
  });
  *error = opened.get_future().get();
  return error->empty();
}

Transport::~Transport() {
  if (thread_.joinable()) {
    calls_.put(StopCall{});
    thread_.join();
  }
  if (event_fd_ >= 0) ::close(event_fd_);
  if (call_fd_ >= 0) ::close(call_fd_);
}

bool Transport::allocate(uint64_t nbytes, LocalMemory* out, std::string* error) {
  auto call = std::make_shared<MemoryCall>();
  const uint64_t usable = (nbytes + kAlign - 1) / kAlign * kAlign;
  call->cookie_address = usable;
  call->nbytes = usable + sizeof(Cookie);
  return memory_call(std::move(call), out, error);
}

bool Transport::register_memory(uint64_t address, uint64_t guard, uint64_t guard_nbytes, LocalMemory* out,
                                std::string* error) {
  auto call = std::make_shared<MemoryCall>();
  call->address = address;
  call->cookie_address = guard;
  call->nbytes = guard + guard_nbytes - address;
  return memory_call(std::move(call), out, error);
}

bool Transport::memory_call(std::shared_ptr<MemoryCall> call, LocalMemory* out, std::string* error) {
  auto done = call->done.get_future();
  calls_.put(std::move(call));
  if (done.wait_for(kAllocateTimeout) != std::future_status::ready) {
    *error = "registering memory did not end in time";
    return false;
  }
  std::tie(*out, *error) = done.get();
  return error->empty();
}

void Transport::connect(uint64_t peer_id, Bytes address, std::vector<RemoteMemory> memories) {
  show(peer_id, "connecting");
  calls_.put(ConnectCall{peer_id, std::move(address), std::move(memories)});
}

void Transport::disconnect(uint64_t peer_id) { calls_.put(DisconnectCall{peer_id}); }

void Transport::read(uint64_t peer_id, uint64_t read_id, ReadPlan plan, Clock::time_point queued_at) {
  calls_.put(ReadCall{peer_id, std::unique_ptr<Read>(new Read{read_id, std::move(plan), queued_at})});
}

std::vector<uint64_t> Transport::hold(uint64_t peer_id) {
  auto call = std::make_shared<HoldCall>();
  call->peer_id = peer_id;
  auto done = call->done.get_future();
  calls_.put(call);
  if (done.wait_for(kHoldTimeout) != std::future_status::ready && !call->met.exchange(true)) return {};
  return done.get();
}

void Transport::release(uint64_t peer_id) { calls_.put(ReleaseCall{peer_id}); }

// -- the progress thread ----------------------------------------------------------------------------

std::string Transport::open_ucx() {
  if (settings_.on_device()) {  // UCX looks at the context of this thread
    std::string error;
    cuda_ = Cuda::open(settings_.device, &error);
    if (!cuda_) return error;
  }
  ucp_config_t* config = nullptr;
  if (ucx_->ucp_config_read(nullptr, nullptr, &config) != UCS_OK) return "UCX configuration: " + take_ucx_log();
  const auto set = [&](const char* name, const std::string& value) {
    return value.empty() || ucx_->ucp_config_modify(config, name, value.c_str()) == UCS_OK;
  };
  // Registration caches would patch malloc's system calls in the whole process; ours is registered by hand.
  // (Older libraries do not know these names.)
  for (const char* name : {"RCACHE_ENABLE", "MEMTYPE_CACHE"}) ucx_->ucp_config_modify(config, name, "n");
  for (const auto& [name, value] : kTcpSettings) {
    if (getenv((std::string("UCX_") + name).c_str()) == nullptr) ucx_->ucp_config_modify(config, name, value);
  }
  // Without RNDV_THRESH=inf, endpoints that detect dead peers would leave CMA for TCP. Memory comes from
  // what peers on this host can map, and is zeroed in every case.
  const bool valid = set("TLS", settings_.tls) && set("NET_DEVICES", settings_.net_devices) &&
                     set("POSIX_DIR", operator_names_segments() ? "" : settings_.posix_dir) &&
                     set("RNDV_THRESH", "inf") && set("ALLOC_PRIO", "md:posix,md:sysv,mmap");
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP;
  ucs_status_t status = UCS_ERR_INVALID_PARAM;
  if (valid) status = ucx_->ucp_init_version(1, 13, &params, config, &context_);
  ucx_->ucp_config_release(config);
  if (status != UCS_OK) return "UCX with TLS '" + settings_.tls + "': " + why(status);
  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SINGLE;
  status = ucx_->ucp_worker_create(context_, &worker, &worker_);
  if (status == UCS_OK) status = ucx_->ucp_worker_get_efd(worker_, &ucx_fd_);
  ucp_address_t* address = nullptr;
  size_t nbytes = 0;
  if (status == UCS_OK) status = ucx_->ucp_worker_get_address(worker_, &address, &nbytes);
  if (status != UCS_OK) {
    const std::string reason = why(status);
    if (worker_ != nullptr) ucx_->ucp_worker_destroy(worker_);
    ucx_->ucp_cleanup(context_);
    return "UCX with TLS '" + settings_.tls + "': " + reason;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(address);
  address_.assign(bytes, bytes + nbytes);
  ucx_->ucp_worker_release_address(worker_, address);
  cpu_set_t cores;
  one_core_ = sched_getaffinity(0, sizeof cores, &cores) == 0 && CPU_COUNT(&cores) == 1;
  verifier_ = std::make_unique<Verifier>(&verified_);
  take_ucx_log();  // of transports that are not there
  return "";
}

std::string Transport::why(ucs_status_t status) const {
  const std::string detail = take_ucx_log();
  const std::string name = ucx_->ucs_status_string(status);
  return detail.empty() ? name : name + " (" + detail + ")";
}

void Transport::run() {
  Clock::time_point last_move = Clock::now(), last_step = last_move;
  while (!stopping_) {
    const bool progressed = ucx_->ucp_worker_progress(worker_) != 0;
    bool stepped = take_calls();
    stepped |= take_verified();
    stepped |= take_copied();
    stepped |= issue();
    stepped |= settle();
    stepped |= tend_peers();
    const Clock::time_point now = Clock::now();
    if (stepped) last_step = now;
    // UCX calls itself busy, and its descriptor readable, for as long as a peer does not answer a connection.
    const bool only_connecting = connecting_ && ops_in_flight_ == 0 && now - last_step > kPatience;
    if ((stepped || progressed) && !only_connecting) {
      last_move = now;
      continue;
    }
    verifier_->flush();
    if (!copies_.empty()) continue;  // a millisecond or two
    if (only_connecting) {
      wait(kNap.count(), false);
    } else if (now - last_move > kSpin) {
      sleep();
    }
  }
  shut_down();
}

bool Transport::take_calls() {
  std::vector<Call> calls = calls_.take();
  for (Call& call : calls) std::visit([this](auto& c) { handle(c); }, call);
  return !calls.empty();
}

void Transport::handle(std::shared_ptr<MemoryCall>& call) {
  LocalMemory memory;
  const std::string error = map_memory(call->address, call->nbytes, call->cookie_address, &memory);
  if (error.empty()) memories_.push_back(memory);
  call->done.set_value({memory, error});
}

void Transport::handle(ConnectCall& call) {
  auto& peer = peers_[call.peer_id];
  peer = std::make_unique<Peer>(Peer{call.peer_id});
  for (RemoteMemory& memory : call.memories) peer->memories.push_back(Memory{std::move(memory)});
  begin_connect(peer.get(), call.address);
}

void Transport::handle(DisconnectCall& call) {
  const auto found = peers_.find(call.peer_id);
  if (found == peers_.end() || found->second->state == Peer::State::kClosing) return;
  close(found->second.get(), false);
}

void Transport::handle(ReadCall& call) {
  const auto found = peers_.find(call.peer_id);
  Read* read = call.read.get();
  if (found == peers_.end() || found->second->state == Peer::State::kClosing) {
    read->status = ReadStatus::kFailed;
    read->message = "not connected to this peer";
    return post(*read);
  }
  Peer* peer = found->second.get();
  read->peer = peer;
  read->order = next_order_++;
  peer->reads.emplace(read->order, std::move(call.read));
  if (peer->state == Peer::State::kReady) activate(read);
}

void Transport::handle(std::shared_ptr<HoldCall>& call) {
  if (call->met.exchange(true)) return;
  const auto found = peers_.find(call->peer_id);
  std::vector<uint64_t> places;
  if (found != peers_.end() && found->second->state == Peer::State::kReady && !found->second->failed) {
    for (const Memory& memory : found->second->memories) {
      if (memory.on_device != 0) places.push_back(memory.on_device);
    }
    if (places.size() == found->second->memories.size()) {
      ++found->second->ops;  // it is not buried before the release
    } else {
      places.clear();
    }
  }
  call->done.set_value(std::move(places));
}

void Transport::handle(ReleaseCall& call) {
  const auto found = peers_.find(call.peer_id);
  if (found != peers_.end()) --found->second->ops;
}

void Transport::handle(StopCall&) { stopping_ = true; }

void Transport::sleep() {
  if (calls_.any() || verified_.any() || ucx_->ucp_worker_arm(worker_) != UCS_OK) return;
  wait(connecting_ || closing_ ? kNap.count() : -1, true);
}

void Transport::wait(int timeout_ms, bool for_ucx) {
  pollfd fds[2] = {{call_fd_, POLLIN, 0}, {ucx_fd_, POLLIN, 0}};
  ::poll(fds, for_ucx ? 2 : 1, timeout_ms);
  if (fds[0].revents != 0) {
    uint64_t count;
    [[maybe_unused]] const ssize_t n = ::read(call_fd_, &count, sizeof count);
  }
}

void Transport::shut_down() {
  for (auto& [id, peer] : peers_) {
    if (peer->state != Peer::State::kClosing) close(peer.get(), false);
  }
  const Clock::time_point deadline = Clock::now() + kCloseTimeout;
  while (!peers_.empty() && Clock::now() < deadline) {
    verifier_->flush();
    ucx_->ucp_worker_progress(worker_);
    take_verified();
    take_copied();
    tend_peers();
  }
  verifier_.reset();
  if (!peers_.empty()) return;  // something may still be written: better to leak the memory than to free it
  for (const LocalMemory& memory : memories_) {
    ucx_->ucp_mem_unmap(context_, memory.handle);
    if (memory.device_handle != nullptr) ucx_->ucp_mem_unmap(context_, memory.device_handle);
  }
  ucx_->ucp_worker_destroy(worker_);
  ucx_->ucp_cleanup(context_);
  cuda_.reset();
}

}  // namespace nd
