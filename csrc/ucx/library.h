// libucp, loaded at run time: the wheel's, or a system one (with verbs) named in the configuration.
//
// Compiled against the headers of one version, called in any from 1.13 on: every structure passed carries a
// mask of the fields that are set, and only fields that 1.13 knows are used.
#pragma once

#include <ucp/api/ucp.h>

#include <string>

namespace nd {

struct UcxLibrary {
#define ND_UCP_SYMBOLS(X)       \
  X(ucp_get_version)            \
  X(ucp_init_version)           \
  X(ucp_cleanup)                \
  X(ucp_context_query)          \
  X(ucp_config_read)            \
  X(ucp_config_modify)          \
  X(ucp_config_release)         \
  X(ucp_worker_create)          \
  X(ucp_worker_destroy)         \
  X(ucp_worker_get_address)     \
  X(ucp_worker_release_address) \
  X(ucp_worker_get_efd)         \
  X(ucp_worker_arm)             \
  X(ucp_worker_progress)        \
  X(ucp_mem_map)                \
  X(ucp_mem_unmap)              \
  X(ucp_mem_query)              \
  X(ucp_rkey_pack)              \
  X(ucp_rkey_buffer_release)    \
  X(ucp_rkey_destroy)           \
  X(ucp_rkey_ptr)               \
  X(ucp_ep_create)              \
  X(ucp_ep_close_nbx)           \
  X(ucp_ep_flush_nbx)           \
  X(ucp_ep_print_info)          \
  X(ucp_ep_rkey_unpack)         \
  X(ucp_get_nbx)                \
  X(ucp_request_check_status)   \
  X(ucp_request_free)
#define ND_DECLARE(name) decltype(&::name) name = nullptr;
  ND_UCP_SYMBOLS(ND_DECLARE)
#undef ND_DECLARE
  decltype(&::ucs_status_string) ucs_status_string = nullptr;

  std::string version() const;
};

// The library at `path`, kept loaded for the life of the process. Null with `error` set if it cannot be
// loaded or is too old. UCX's own log lines are kept off the standard streams (see `take_ucx_log`).
const UcxLibrary* load_ucx(const std::string& path, std::string* error);

// The last error or warning that UCX logged on this thread, and forget it.
std::string take_ucx_log();

}  // namespace nd
