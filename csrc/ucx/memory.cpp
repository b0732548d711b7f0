// Memory that peers can read: allocated here, or the caller's. A GPU's is in device.cpp.
#include <sys/random.h>

#include <algorithm>

#include "ucx/transport.h"

namespace nd {

// `address` 0: to be allocated, and `cookie_address` counts from its first byte.
std::string Transport::map_memory(uint64_t address, uint64_t nbytes, uint64_t cookie_address, LocalMemory* out) {
  if (cuda_) return offer_device(address, nbytes, cookie_address, out);
  std::string error;
  if (address == 0) {
    error = allocate_host(nbytes, &out->handle, &out->address, &out->key);
    out->cookie_address = out->address + cookie_address;
  } else {
    ucp_mem_map_params_t params{};
    params.field_mask = UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_ADDRESS;
    params.length = nbytes;
    params.address = reinterpret_cast<void*>(address);
    const ucs_status_t status = ucx_->ucp_mem_map(context_, &params, &out->handle);
    if (status != UCS_OK) return std::to_string(nbytes) + " bytes: " + why(status);
    error = pack_key(out->handle, &out->key);
    out->address = address;
    out->cookie_address = cookie_address;
  }
  if (!error.empty()) return error;
  out->end = out->address + nbytes;
  error = place_cookie(out);
  if (!error.empty()) ucx_->ucp_mem_unmap(context_, out->handle);
  return error;
}

// Zeroed memory of what peers on this machine can map.
std::string Transport::allocate_host(uint64_t nbytes, ucp_mem_h* handle, uint64_t* address, Bytes* key) {
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS;
  params.length = nbytes;
  params.flags = UCP_MEM_MAP_ALLOCATE;
  ucs_status_t status = ucx_->ucp_mem_map(context_, &params, handle);
  if (status != UCS_OK) return std::to_string(nbytes) + " bytes: " + why(status);
  ucp_mem_attr_t attributes{};
  attributes.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
  status = ucx_->ucp_mem_query(*handle, &attributes);
  *address = reinterpret_cast<uint64_t>(attributes.address);
  take_ucx_log();  // of allocators that it tried before
  if (status == UCS_OK) return pack_key(*handle, key);
  ucx_->ucp_mem_unmap(context_, *handle);
  return "registering memory: " + why(status);
}

// The handle is unmapped if that fails.
std::string Transport::pack_key(ucp_mem_h handle, Bytes* out) {
  void* key = nullptr;
  size_t nbytes = 0;
  const ucs_status_t status = ucx_->ucp_rkey_pack(context_, handle, &key, &nbytes);
  if (status != UCS_OK) {
    ucx_->ucp_mem_unmap(context_, handle);
    return "registering memory: " + why(status);
  }
  out->assign(static_cast<uint8_t*>(key), static_cast<uint8_t*>(key) + nbytes);
  ucx_->ucp_rkey_buffer_release(key);
  return "";
}

std::string Transport::place_cookie(LocalMemory* memory) {
  Cookie& cookie = memory->cookie;
  if (getrandom(cookie.data(), cookie.size(), 0) != static_cast<ssize_t>(cookie.size())) return "no random bytes";
  std::copy(cookie.begin(), cookie.end(), reinterpret_cast<uint8_t*>(memory->cookie_address));
  return "";
}

}  // namespace nd
