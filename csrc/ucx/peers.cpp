#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "ucx/transport.h"

namespace nd {
namespace {

constexpr std::chrono::seconds kConnectTimeout{10};

// Which of UCX's shared-memory transports mapped this address, from the name of what is mapped there.
std::string mapping_at(const void* address) {
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return "shm";
  std::string kind = "shm";
  char line[1024];
  const auto wanted = reinterpret_cast<uint64_t>(address);
  while (std::fgets(line, sizeof line, maps) != nullptr) {
    unsigned long long low = 0, high = 0;
    if (std::sscanf(line, "%llx-%llx", &low, &high) != 2 || wanted < low || wanted >= high) continue;
    if (std::strstr(line, "posix") != nullptr) kind = "posix";
    if (std::strstr(line, "/SYSV") != nullptr) kind = "sysv";
    if (std::strstr(line, "xpmem") != nullptr) kind = "xpmem";
    break;
  }
  std::fclose(maps);
  return kind;
}

// The transport of the lane that carries ucp_get, out of `ucp_ep_print_info`'s text: the first lane for bulk
// remote memory access, else for any, else the one for messages, over which UCX emulates it. A GPU's memory is no
// business of lanes that map or copy the host's.
std::string lane_in(const std::string& info, bool on_device) {
  constexpr const char* kHostOnly[] = {"cma", "knem", "xpmem", "posix", "sysv", "self"};
  for (const char* role : {" rma_bw", " rma", " am"}) {
    std::istringstream lines(info);
    for (std::string line; std::getline(lines, line);) {
      const size_t lane = line.find("lane["), colon = line.find(':', lane);
      if (lane == std::string::npos || colon == std::string::npos || line.find(role) == std::string::npos) continue;
      const size_t second = line.find(':', colon + 1);  // "lane[1]:  4:cma/memory.0 md[3] -> ..."
      const size_t slash = line.find('/', second);
      if (second == std::string::npos || slash == std::string::npos) continue;
      const std::string name = line.substr(second + 1, slash - second - 1);
      const bool is_hosts = std::find(std::begin(kHostOnly), std::end(kHostOnly), name) != std::end(kHostOnly);
      if (!on_device || !is_hosts) return name;
    }
  }
  return "unknown";
}

}  // namespace

void Transport::begin_connect(Peer* peer, const Bytes& address) {
  peer->deadline = Clock::now() + kConnectTimeout;
  connecting_ = true;
  ucp_ep_params_t params{};
  params.field_mask =
      UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = on_endpoint_error;
  params.err_handler.arg = this;
  const ucs_status_t status = ucx_->ucp_ep_create(worker_, &params, &peer->endpoint);
  if (status != UCS_OK) {
    peer->endpoint = nullptr;
    return fail(peer, why(status));
  }
  for (Memory& memory : peer->memories) {
    const std::string error = open_memory(peer, &memory);
    if (!error.empty()) return fail(peer, error);
  }
  peer->handshakes = static_cast<uint32_t>(peer->memories.size()) + 1;
  for (Memory& memory : peer->memories) {
    if (peer->failed) return;
    get(peer, nullptr, 0, memory.received.data(), memory.remote.cookie_address, memory.received.size(), memory.key);
  }
  flush(peer);
}

std::string Transport::open_memory(Peer* peer, Memory* memory) {
  if (memory->remote.on_device != settings_.on_device()) {
    return memory->remote.on_device ? "its memory is a GPU's and ours is the host's"
                                    : "its memory is the host's and ours is a GPU's";
  }
  if (cuda_) return open_device(peer, memory);
  const std::string error = unpack_key(peer, memory->remote.key.data(), &memory->key);
  void* mapped = nullptr;
  if (error.empty() && ucx_->ucp_rkey_ptr(memory->key, memory->remote.base, &mapped) == UCS_OK) {
    memory->mapped = static_cast<const uint8_t*>(mapped);
  }
  return error;
}

std::string Transport::unpack_key(Peer* peer, const uint8_t* packed, ucp_rkey_h* key) {
  const ucs_status_t status = ucx_->ucp_ep_rkey_unpack(peer->endpoint, packed, key);
  if (status == UCS_OK) return "";
  *key = nullptr;
  return "remote key refused: " + why(status);
}

// Every memory's cookie was read: the peer lives, its error detection is armed, and its keys lead to the
// memory they claim. Only now may a mapping be touched. A GPU of this machine that cannot be mapped is read by a
// network card or not at all.
void Transport::end_handshake(Peer* peer) {
  for (const Memory& memory : peer->memories) {
    if (!has_cookie(memory)) return fail(peer, "the remote key does not lead to the memory it claims");
  }
  const std::string over = lane(*peer);
  const bool by_host = over.find("tcp") != std::string::npos || over.find("unknown") != std::string::npos;
  for (const Memory& memory : peer->memories) {
    if (!by_host || memory.why_not_mapped.empty()) continue;
    return fail(peer, memory.why_not_mapped + ", and UCX would copy it by way of the host");
  }
  peer->state = Peer::State::kReady;
  show(peer->id, over);
  for (auto& [order, read] : peer->reads) activate(read.get());
}

bool Transport::has_cookie(const Memory& memory) {
  const Cookie& cookie = memory.remote.cookie;
  if (memory.received != cookie) return false;
  if (memory.mapped != nullptr) {
    return std::memcmp(memory.mapped + (memory.remote.cookie_address - memory.remote.base), cookie.data(),
                       cookie.size()) == 0;
  }
  if (memory.on_device == 0) return true;
  Cookie there{};
  std::string error;
  return cuda_->read(there.data(), memory.on_device + (memory.guard - memory.remote.base), there.size(), &error) &&
         there == cookie;
}

std::string Transport::lane(const Peer& peer) const {
  std::string names;
  const auto add = [&names](const std::string& name) {
    if (names.find(name) == std::string::npos) names += (names.empty() ? "" : "+") + name;
  };
  bool get = peer.memories.empty();
  for (const Memory& memory : peer.memories) {
    if (memory.mapped != nullptr) add(mapping_at(memory.mapped));
    if (memory.on_device != 0) add("cuda_ipc");
    get |= memory.mapped == nullptr && memory.on_device == 0;
  }
  if (get) {
    char* text = nullptr;
    size_t nbytes = 0;
    std::FILE* stream = open_memstream(&text, &nbytes);
    if (stream == nullptr) return "unknown";
    ucx_->ucp_ep_print_info(peer.endpoint, stream);
    std::fclose(stream);
    add(lane_in(std::string(text, nbytes), settings_.on_device()));
    std::free(text);
  }
  return names;
}

void Transport::show(uint64_t peer_id, std::string lane) {
  const std::lock_guard<std::mutex> lock(lanes_mutex_);
  lanes_[peer_id] = std::move(lane);
}

std::string Transport::describe(uint64_t peer_id) {
  const std::lock_guard<std::mutex> lock(lanes_mutex_);
  const auto found = lanes_.find(peer_id);
  return found == lanes_.end() ? "gone" : found->second;
}

void Transport::on_endpoint_error(void* arg, ucp_ep_h endpoint, ucs_status_t status) {
  auto* transport = static_cast<Transport*>(arg);
  for (auto& [id, peer] : transport->peers_) {
    if (peer->endpoint == endpoint) return transport->fail(peer.get(), transport->why(status));
  }
}

// Callable from within UCX: the main loop does the closing.
void Transport::fail(Peer* peer, std::string message) {
  if (peer->failed || peer->state == Peer::State::kClosing) return;
  peer->failed = true;
  peer->message = std::move(message);
  closing_ = true;
}

void Transport::close(Peer* peer, bool lost) {
  peer->state = Peer::State::kClosing;
  peer->lost = lost;
  closing_ = true;
  for (auto& [order, read] : peer->reads) {
    stop(read.get());
    read->status = lost ? ReadStatus::kFailed : ReadStatus::kFenced;
    read->message = peer->message;
  }
  if (peer->endpoint == nullptr) return;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  const ucs_status_ptr_t request = ucx_->ucp_ep_close_nbx(peer->endpoint, &param);
  if (UCS_PTR_IS_PTR(request)) peer->close_request = request;
}

// Moves connecting and closing peers on. True if one went.
bool Transport::tend_peers() {
  if (!connecting_ && !closing_) return false;
  connecting_ = closing_ = false;
  bool any = false;
  const Clock::time_point now = Clock::now();
  for (auto next = peers_.begin(); next != peers_.end();) {
    Peer* peer = (next++)->second.get();
    if (peer->state == Peer::State::kConnecting && now > peer->deadline) fail(peer, "no answer while connecting");
    if (peer->failed && peer->state != Peer::State::kClosing) close(peer, true);
    if (peer->state == Peer::State::kConnecting) connecting_ = true;
    if (peer->state != Peer::State::kClosing) continue;
    if (peer->close_request != nullptr && ucx_->ucp_request_check_status(peer->close_request) != UCS_INPROGRESS) {
      ucx_->ucp_request_free(std::exchange(peer->close_request, nullptr));
    }
    const bool verifying =
        std::any_of(peer->reads.begin(), peer->reads.end(), [](const auto& entry) { return entry.second->jobs > 0; });
    if (peer->close_request != nullptr || peer->ops > 0 || verifying) {
      closing_ = true;
    } else {
      bury(peer);
      any = true;
    }
  }
  return any;
}

// The endpoint is closed and every operation has completed: the memory of its reads is the caller's again.
void Transport::bury(Peer* peer) {
  for (Memory& memory : peer->memories) {
    if (memory.key != nullptr) ucx_->ucp_rkey_destroy(memory.key);
    if (memory.device_key != nullptr) ucx_->ucp_rkey_destroy(memory.device_key);
    if (memory.opened != 0) cuda_->unmap(memory.opened);
  }
  for (auto& [order, read] : peer->reads) {
    unsettled_.erase(std::remove(unsettled_.begin(), unsettled_.end(), read.get()), unsettled_.end());
    post(*read);
  }
  {
    const std::lock_guard<std::mutex> lock(lanes_mutex_);
    lanes_.erase(peer->id);
  }
  if (peer->lost) events_.put({EventKind::kPeerDown, ReadStatus::kFailed, peer->id, 0, 0.0, 0.0, peer->message});
  peers_.erase(peer->id);
}

}  // namespace nd
