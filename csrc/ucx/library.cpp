#include "ucx/library.h"

#include <dlfcn.h>
#include <ucs/debug/log_def.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace nd {
namespace {

constexpr unsigned kApiMajor = 1, kApiMinor = 13;

thread_local std::string t_last_log;

// UCX prints to the standard output by default. A dying peer is no news for a log line: the text travels
// in the PeerDown or ReadResult it belongs to. Fatal errors still go UCX's way.
ucs_log_func_rc_t on_ucx_log(const char*, unsigned, const char*, ucs_log_level_t level,
                             const ucs_log_component_config_t*, const char* format, va_list args) {
  if (level == UCS_LOG_LEVEL_FATAL) return UCS_LOG_FUNC_RC_CONTINUE;
  if (level <= UCS_LOG_LEVEL_WARN) {
    char text[256];
    std::vsnprintf(text, sizeof text, format, args);
    t_last_log = text;
  }
  return UCS_LOG_FUNC_RC_STOP;
}

// Left alone, UCX patches mmap, munmap, madvise and others in libc's code while it is loaded, for the sake of
// a registration cache that we do not use: every thread of the process would pay. Only a variable of the
// environment stops it, so there is one while the library loads. An operator's own setting stays.
class HandsOffLibc {
 public:
  HandsOffLibc() : ours_(getenv(kVariable) == nullptr) {
    if (ours_) setenv(kVariable, "n", 0);
  }
  ~HandsOffLibc() {
    if (ours_) unsetenv(kVariable);
  }

 private:
  static constexpr const char* kVariable = "UCX_MEM_EVENTS";
  const bool ours_;
};

// In the order of their dependencies: the wheel's libraries do not find one another by themselves.
void load_siblings(const std::string& path) {
  const std::string folder = path.substr(0, path.rfind('/') + 1);
  for (const char* name : {"libucs.so.0", "libuct.so.0"}) dlopen((folder + name).c_str(), RTLD_NOW | RTLD_LOCAL);
}

template <typename Function>
bool resolve(void* handle, const char* name, Function* function, std::string* error) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  if (*function == nullptr) *error = std::string("no symbol ") + name;
  return *function != nullptr;
}

std::unique_ptr<UcxLibrary> open_library(const std::string& path, std::string* error) {
  const HandsOffLibc hands_off;
  load_siblings(path);
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    *error = dlerror();
    return nullptr;
  }
  auto library = std::make_unique<UcxLibrary>();
#define ND_RESOLVE(name) \
  if (!resolve(handle, #name, &library->name, error)) return nullptr;
  ND_UCP_SYMBOLS(ND_RESOLVE)
#undef ND_RESOLVE
  if (!resolve(handle, "ucs_status_string", &library->ucs_status_string, error)) return nullptr;
  unsigned major = 0, minor = 0, release = 0;
  library->ucp_get_version(&major, &minor, &release);
  if (major != kApiMajor || minor < kApiMinor) {
    *error = path + ": UCX " + library->version() + " is older than 1.13";
    return nullptr;
  }
  decltype(&::ucs_log_push_handler) push_handler = nullptr;
  if (!resolve(handle, "ucs_log_push_handler", &push_handler, error)) return nullptr;
  push_handler(on_ucx_log);
  return library;
}

}  // namespace

std::string UcxLibrary::version() const {
  unsigned major = 0, minor = 0, release = 0;
  ucp_get_version(&major, &minor, &release);
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(release);
}

const UcxLibrary* load_ucx(const std::string& path, std::string* error) {
  static std::mutex mutex;
  static auto* loaded = new std::map<std::string, std::unique_ptr<UcxLibrary>>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& library = (*loaded)[path];
  if (!library) library = open_library(path, error);
  return library.get();
}

std::string take_ucx_log() { return std::exchange(t_last_log, {}); }

}  // namespace nd
