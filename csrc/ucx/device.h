// What a process says of memory on a GPU, so that others can read it: mapped by CUDA where both are on one machine,
// else by UCX with the key that it gave the memory, if it gave one.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "ucx/cuda.h"

namespace nd {

using Identity = std::array<uint8_t, 16>;

Identity this_process();  // random, the same for all of one process
Identity this_machine();  // since its last start

// The first bytes of a GPU memory's key; `host_key_nbytes` of UCX's key of the cookie in the owner's host memory and
// the memory's own UCX key follow.
struct DeviceKey {
  IpcHandle handle;
  uint64_t offset;  // of the memory in its allocation
  uint64_t guard;   // address of the cookie behind the memory
  Identity process, machine;
  uint64_t host_key_nbytes;
};

}  // namespace nd
