#include <algorithm>

#include "ucx/transport.h"

namespace nd {
namespace {

constexpr uint32_t kMaxOps = 64;
constexpr uint64_t kMaxBacklog = 4 << 20;     // bytes read and not yet digested
constexpr uint64_t kInlineNbytes = 32 << 10;  // checks that cost less than waking the verifier
constexpr uint32_t kSubmitted = UINT32_MAX;   // in `waits_for`

double seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

}  // namespace

// -- in turn ----------------------------------------------------------------------------------------

void Transport::activate(Read* read) {
  if (read->plan.chunks.empty()) {
    read->first_issue = read->last_byte = Clock::now();
    all_chunks_done(read);
    unsettle(read);
  } else {
    active_.push_back(read);
  }
}

void Transport::stop(Read* read) {
  read->ended = true;
  active_.erase(std::remove(active_.begin(), active_.end(), read), active_.end());
}

// Each active read gets its turn: a large chunk or some small ones. Returns after one copy, so that calls, completions
// and errors are looked at between copies; network reads are only handed to UCX and do not stop the round.
bool Transport::issue() {
  if (active_.empty() || verifier_->backlog() > kMaxBacklog) return false;
  bool any = false, copied = false;
  std::vector<Read*> full;  // had to wait for UCX: they keep their place
  for (size_t turns = active_.size(); turns > 0 && !active_.empty() && !copied; --turns) {
    Read* read = active_.front();
    active_.pop_front();
    const Turn turn = take_turn(read);
    copied = turn == Turn::kCopied;
    any |= turn != Turn::kNothing;
    if (read->ended || read->next_chunk == read->plan.chunks.size()) continue;
    if (turn == Turn::kNothing) {
      full.push_back(read);
    } else {
      active_.push_back(read);
    }
  }
  active_.insert(active_.begin(), full.begin(), full.end());
  return any;
}

Transport::Turn Transport::take_turn(Read* read) {
  if (read->next_chunk == 0) read->first_issue = Clock::now();
  const Memory& next = read->peer->memories[read->plan.chunks[read->next_chunk].memory];
  if (next.on_device != 0 && ops_in_flight_ < kMaxOps && !read->peer->failed) return copy_on_device(read);
  Turn turn = Turn::kNothing;
  uint64_t taken = 0;
  while (taken < pace_.chunk_nbytes && read->next_chunk < read->plan.chunks.size() && !read->ended &&
         !read->peer->failed) {
    const auto index = static_cast<uint32_t>(read->next_chunk);
    const Chunk& chunk = read->plan.chunks[index];
    const Memory& memory = read->peer->memories[chunk.memory];
    if (memory.mapped != nullptr) {
      ++read->next_chunk;
      copy(read, memory, index);
      turn = Turn::kCopied;
    } else {
      if (ops_in_flight_ >= kMaxOps || nbytes_in_flight_ + chunk.nbytes > pace_.in_flight_nbytes) break;
      ++read->next_chunk;
      get(read->peer, read, index, reinterpret_cast<void*>(chunk.local_address), chunk.remote_address, chunk.nbytes,
          memory.device_key != nullptr ? memory.device_key : memory.key);
      if (turn == Turn::kNothing) turn = Turn::kHandedOver;
    }
    taken += chunk.nbytes;
  }
  return turn;
}

void Transport::copy(Read* read, const Memory& memory, uint32_t chunk) {
  const Chunk& c = read->plan.chunks[chunk];
  const uint8_t* source = memory.mapped + (c.remote_address - memory.remote.base);
  read->plan.copy(chunk, source);
  chunk_done(read, chunk);
}

// -- UCX operations ---------------------------------------------------------------------------------

void Transport::get(Peer* peer, Read* read, uint32_t chunk, void* local, uint64_t remote, uint64_t nbytes,
                    ucp_rkey_h key) {
  auto* op = new Op{this, peer, read, chunk};
  ++peer->ops;
  if (read != nullptr) {
    ++read->ops;
    ++ops_in_flight_;
    nbytes_in_flight_ += nbytes;
  }
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = on_op_done;
  param.user_data = op;
  if (cuda_ && read != nullptr) {
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    param.memory_type = UCS_MEMORY_TYPE_CUDA;
  }
  param.memh = local_handle(reinterpret_cast<uint64_t>(local), nbytes);
  if (param.memh != nullptr) param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
  track(ucx_->ucp_get_nbx(peer->endpoint, local, nbytes, remote, key, &param), op);
}

void Transport::flush(Peer* peer) {
  auto* op = new Op{this, peer, nullptr, 0};
  ++peer->ops;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = on_op_done;
  param.user_data = op;
  track(ucx_->ucp_ep_flush_nbx(peer->endpoint, &param), op);
}

void Transport::track(ucs_status_ptr_t request, Op* op) {
  if (request == nullptr) {
    op_done(op, UCS_OK);
  } else if (UCS_PTR_IS_ERR(request)) {
    op_done(op, UCS_PTR_STATUS(request));
  }
}

void Transport::on_op_done(void* request, ucs_status_t status, void* data) {
  auto* op = static_cast<Op*>(data);
  Transport* transport = op->transport;
  transport->ucx_->ucp_request_free(request);
  transport->op_done(op, status);
}

void Transport::op_done(Op* op, ucs_status_t status) {
  Peer* peer = op->peer;
  Read* read = op->read;
  --peer->ops;
  if (status != UCS_OK) fail(peer, why(status));
  if (read != nullptr) {
    --read->ops;
    --ops_in_flight_;
    nbytes_in_flight_ -= read->plan.chunks[op->chunk].nbytes;
    if (status == UCS_OK && !read->ended) chunk_done(read, op->chunk);
    unsettle(read);
  } else if (--peer->handshakes == 0 && !peer->failed && peer->state == Peer::State::kConnecting) {
    end_handshake(peer);
  }
  delete op;
}

// Network hardware wants to know the registration of the memory it writes to.
ucp_mem_h Transport::local_handle(uint64_t address, uint64_t nbytes) const {
  for (const LocalMemory& memory : memories_) {
    if (memory.address > address || address + nbytes > memory.end) continue;
    return cuda_ ? memory.device_handle : memory.handle;
  }
  return nullptr;
}

// -- from the last byte to the result ---------------------------------------------------------------

void Transport::chunk_done(Read* read, uint32_t chunk) {
  ReadPlan& plan = read->plan;
  read->nbytes_done += plan.chunks[chunk].nbytes;
  const bool last = ++read->chunks_done == plan.chunks.size();
  if (last) read->last_byte = Clock::now();
  for (uint32_t i = plan.first_dependent[chunk]; i < plan.first_dependent[chunk + 1] && !read->ended; ++i) {
    const uint32_t check = plan.dependents[i];
    if (--plan.waits_for[check] == 0) verify(read, check);
  }
  if (last) all_chunks_done(read);
  unsettle(read);
}

void Transport::all_chunks_done(Read* read) {
  for (uint32_t check = 0; check < read->plan.checks.size() && !read->ended; ++check) {
    if (read->plan.waits_for[check] != kSubmitted) verify(read, check);
  }
}

void Transport::verify(Read* read, uint32_t check) {
  read->plan.waits_for[check] = kSubmitted;
  const uint64_t nbytes = read->plan.check_nbytes(check);
  if (read->plan.is_summed(check) || nbytes <= kInlineNbytes || one_core_) {
    check_done(read, check, read->plan.matches(check));
  } else {
    ++read->jobs;
    verifier_->submit(read, &read->plan, check, nbytes);
  }
}

void Transport::check_done(Read* read, uint32_t check, bool matches) {
  ++read->checks_done;
  if (matches || read->ended) return;
  stop(read);
  read->status = ReadStatus::kMismatch;
  read->message = "digest " + std::to_string(check) + " of " + std::to_string(read->plan.checks.size()) +
                  " does not match the bytes read";
}

bool Transport::take_verified() {
  const std::vector<Verified> done = verified_.take();
  for (const Verified& v : done) {
    --v.read->jobs;
    check_done(v.read, v.check, v.matches);
    unsettle(v.read);
  }
  return !done.empty();
}

void Transport::unsettle(Read* read) {
  if (!std::exchange(read->unsettled, true)) unsettled_.push_back(read);
}

// Reads of a closing peer are left to `bury`: their memory is safe only when its endpoint is gone.
bool Transport::settle() {
  bool any = false;
  for (Read* read : std::exchange(unsettled_, {})) {
    read->unsettled = false;
    if (read->peer->state == Peer::State::kClosing || read->peer->failed) continue;
    const ReadPlan& plan = read->plan;
    const bool complete = read->chunks_done == plan.chunks.size() && read->checks_done == plan.checks.size();
    if (read->ops > 0 || read->jobs > 0 || !(complete || read->ended)) continue;
    post(*read);
    read->peer->reads.erase(read->order);
    any = true;
  }
  return any;
}

void Transport::post(const Read& read) {
  const bool moved = read.last_byte != Clock::time_point{};
  events_.put({EventKind::kRead, read.status, read.id, read.nbytes_done, seconds(Clock::now() - read.queued_at),
               moved ? seconds(read.last_byte - read.first_issue) : 0.0, read.message});
}

}  // namespace nd
