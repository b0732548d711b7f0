// Memory on a GPU: how it is offered, opened and read. See device.h.
#include "ucx/device.h"

#include <sys/random.h>

#include <cstdio>
#include <cstring>

#include "ucx/transport.h"

namespace nd {
namespace {

constexpr uint32_t kMaxCopies = 256;  // queued at once: what calls and errors wait for

}  // namespace

Identity this_process() {
  static const Identity identity = [] {
    Identity random{};
    [[maybe_unused]] const ssize_t n = getrandom(random.data(), random.size(), 0);
    return random;
  }();
  return identity;
}

Identity this_machine() {
  Identity identity{};
  std::FILE* file = std::fopen("/proc/sys/kernel/random/boot_id", "re");
  if (file == nullptr) return identity;
  char text[64] = {};
  size_t digits = 0;
  if (std::fgets(text, sizeof text, file) != nullptr) {
    for (const char* c = text; *c != 0 && digits < 2 * identity.size(); ++c) {
      const int digit = *c >= '0' && *c <= '9' ? *c - '0' : *c >= 'a' && *c <= 'f' ? *c - 'a' + 10 : -1;
      if (digit < 0) continue;
      identity[digits / 2] = static_cast<uint8_t>(identity[digits / 2] << 4 | digit);
      ++digits;
    }
  }
  std::fclose(file);
  return identity;
}

// A GPU's memory, with a cookie behind it and the same one in the host's memory: reading that one over UCX proves that
// the owner lives and arms the detection of its death.
std::string Transport::offer_device(uint64_t address, uint64_t nbytes, uint64_t guard, LocalMemory* out) {
  std::string error = allocate_host(sizeof(Cookie), &out->handle, &out->cookie_address, &out->key);
  if (!error.empty()) return error;
  error = place_cookie(out);
  DeviceKey offered{};
  offered.guard = guard;
  offered.process = this_process();
  offered.machine = this_machine();
  offered.host_key_nbytes = out->key.size();
  if (error.empty() && cuda_->share(address, &offered.handle, &offered.offset, &error)) {
    cuda_->write(guard, out->cookie.data(), out->cookie.size(), &error);
  }
  if (!error.empty()) {
    ucx_->ucp_mem_unmap(context_, out->handle);
    return error;
  }
  out->address = address;
  out->end = address + nbytes;
  const Bytes ucx_key = key_of_device(address, nbytes, out);
  Bytes key(reinterpret_cast<uint8_t*>(&offered), reinterpret_cast<uint8_t*>(&offered + 1));
  key.insert(key.end(), out->key.begin(), out->key.end());
  key.insert(key.end(), ucx_key.begin(), ucx_key.end());
  out->key = std::move(key);
  return "";
}

// UCX's key for peers on other machines; none if this libucp does not know GPUs.
Bytes Transport::key_of_device(uint64_t address, uint64_t nbytes, LocalMemory* out) {
  ucp_mem_map_params_t params{};
  params.field_mask =
      UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = reinterpret_cast<void*>(address);
  params.length = nbytes;
  params.memory_type = UCS_MEMORY_TYPE_CUDA;
  Bytes key;
  ucp_context_attr_t known{};
  known.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  if (ucx_->ucp_context_query(context_, &known) != UCS_OK || !(known.memory_types & UCS_BIT(UCS_MEMORY_TYPE_CUDA))) {
    return key;
  }
  if (ucx_->ucp_mem_map(context_, &params, &out->device_handle) != UCS_OK) {
    out->device_handle = nullptr;
  } else if (!pack_key(out->device_handle, &key).empty()) {
    key.clear();
  }
  take_ucx_log();
  return key;
}

// After this `memory->key` is the one of the cookie; the memory itself is mapped, or has a key of its own.
std::string Transport::open_device(Peer* peer, Memory* memory) {
  const Bytes& key = memory->remote.key;
  DeviceKey offered;
  if (key.size() < sizeof offered) return "remote key refused: too short";
  std::memcpy(&offered, key.data(), sizeof offered);
  const uint8_t* host_key = key.data() + sizeof offered;
  const size_t nbytes = key.size() - sizeof offered;
  if (offered.host_key_nbytes == 0 || offered.host_key_nbytes > nbytes) return "remote key refused: cut";
  std::string error = unpack_key(peer, host_key, &memory->key);
  if (!error.empty()) return error;
  memory->guard = offered.guard;
  if (offered.process == this_process()) {
    memory->on_device = memory->remote.base;
    return "";
  }
  const bool is_near = offered.machine == this_machine();
  std::string why_not = "it is on another machine";
  if (is_near) memory->opened = cuda_->map(offered.handle, &why_not);
  if (memory->opened != 0) {
    memory->on_device = memory->opened + offered.offset;
    return "";
  }
  if (offered.host_key_nbytes == nbytes) return why_not + ", and the owner's UCX knows no GPUs";
  if (is_near) memory->why_not_mapped = why_not;
  error = unpack_key(peer, host_key + offered.host_key_nbytes, &memory->device_key);
  return error.empty() ? "" : why_not + "; " + error;
}

// One turn's chunks of a mapped memory, as copies one behind the other and an event behind them.
Transport::Turn Transport::copy_on_device(Read* read) {
  Copies copies{nullptr, read, static_cast<uint32_t>(read->next_chunk), 0, 0};
  std::string error;
  while (copies.nbytes < pace_.chunk_nbytes && copies.count < kMaxCopies && error.empty() &&
         read->next_chunk < read->plan.chunks.size()) {
    const Chunk& chunk = read->plan.chunks[read->next_chunk];
    const Memory& memory = read->peer->memories[chunk.memory];
    if (memory.on_device == 0 || nbytes_in_flight_ + copies.nbytes + chunk.nbytes > pace_.in_flight_nbytes) break;
    if (!cuda_->copy(chunk.local_address, memory.on_device + (chunk.remote_address - memory.remote.base), chunk.nbytes,
                     &error)) {
      break;
    }
    ++read->next_chunk;
    ++copies.count;
    copies.nbytes += chunk.nbytes;
  }
  if (copies.count > 0) {
    copies.mark = cuda_->mark(&error);
    if (copies.mark == nullptr) cuda_->drain();
    ++read->peer->ops;
    ++read->ops;
    ++ops_in_flight_;
    nbytes_in_flight_ += copies.nbytes;
    copies_.push_back(copies);
  }
  if (!error.empty()) fail(read->peer, error);
  return copies.count > 0 ? Turn::kHandedOver : Turn::kNothing;
}

// Copies end in the order in which they were queued.
bool Transport::take_copied() {
  bool any = false;
  while (!copies_.empty()) {
    const Copies copies = copies_.front();
    std::string error;
    const Cuda::State state = copies.mark == nullptr ? Cuda::State::kDone : cuda_->look(copies.mark, &error);
    if (state == Cuda::State::kPending) break;
    copies_.pop_front();
    Read* read = copies.read;
    --read->peer->ops;
    --read->ops;
    --ops_in_flight_;
    nbytes_in_flight_ -= copies.nbytes;
    if (state == Cuda::State::kFailed) fail(read->peer, error);
    for (uint32_t i = 0; i < copies.count && !read->ended && state == Cuda::State::kDone; ++i) {
      chunk_done(read, copies.first_chunk + i);
    }
    unsettle(read);
    any = true;
  }
  return any;
}

}  // namespace nd
