// A thread pool for short parallel loops called many times a second.
//
// One loop runs at a time; the caller takes part in it. A caller that finds the pool busy, or in use by a loop
// it is itself inside, runs its loop alone. Helpers that find no work spin for some microseconds (the next
// loop of a decode step follows at once) and then sleep in the kernel: an idle process uses no CPU.
//
//     helper:  asleep -> woken by a new generation -> enters (active + 1) -> if the loop is still open takes
//              tasks -> leaves (active - 1) -> spins -> asleep
//     caller:  opens the loop -> takes tasks -> closes it -> waits until nobody is inside
#pragma once

#include <cstdint>
#include <type_traits>

namespace nd {

using TaskFn = void (*)(void* ctx, int64_t task);

void parallel_for(int threads, int64_t tasks, TaskFn fn, void* ctx);

// Calls body(task) for 0 <= task < tasks on up to `threads` threads.
template <typename Body>
void parallel(int threads, int64_t tasks, Body&& body) {
  using Plain = typename std::remove_reference<Body>::type;
  parallel_for(
      threads, tasks, [](void* ctx, int64_t task) { (*static_cast<Plain*>(ctx))(task); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace nd
