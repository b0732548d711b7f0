#include "cpu/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <mutex>
#include <thread>

namespace nd {
namespace {

constexpr int kMaxHelpers = 255;
constexpr int kSpins = 400;  // some 10 microseconds

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long futex(std::atomic<uint32_t>* word, int op, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, nullptr, nullptr, 0);
}

struct Pool {
  std::mutex busy;
  TaskFn fn = nullptr;
  void* ctx = nullptr;
  int64_t tasks = 0;
  int threads = 0;
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<bool> open{false};
  alignas(64) std::atomic<int> active{0};
  alignas(64) std::atomic<uint32_t> generation{0};
  std::atomic<uint32_t> sleepers{0};
  int helpers = 0;
};

Pool* pool = new Pool;  // never freed: helpers may outlive static destructors

void take_tasks(Pool* p) {
  for (int64_t i = p->next.fetch_add(1); i < p->tasks; i = p->next.fetch_add(1)) p->fn(p->ctx, i);
}

uint32_t wait_for_change(Pool* p, uint32_t seen) {
  for (int i = 0; i < kSpins; ++i) {
    uint32_t now = p->generation.load(std::memory_order_acquire);
    if (now != seen) return now;
    relax();
  }
  p->sleepers.fetch_add(1);
  while (p->generation.load() == seen) futex(&p->generation, FUTEX_WAIT_PRIVATE, seen);
  p->sleepers.fetch_sub(1);
  return p->generation.load();
}

void helper_loop(Pool* p, int index, uint32_t seen) {
  for (;;) {
    seen = wait_for_change(p, seen);
    p->active.fetch_add(1);
    if (p->open.load() && index < p->threads) take_tasks(p);
    p->active.fetch_sub(1);
  }
}

void ensure_helpers(Pool* p, int threads) {
  int wanted = threads - 1 < kMaxHelpers ? threads - 1 : kMaxHelpers;
  for (; p->helpers < wanted; ++p->helpers) {
    std::thread(helper_loop, p, p->helpers + 1, p->generation.load()).detach();
  }
}

// Threads do not survive a fork: the child starts with a pool of its own.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void parallel_for(int threads, int64_t tasks, TaskFn fn, void* ctx) {
  Pool* p = pool;
  if (threads <= 1 || tasks <= 1 || !p->busy.try_lock()) {
    for (int64_t i = 0; i < tasks; ++i) fn(ctx, i);
    return;
  }
  ensure_helpers(p, threads);
  p->fn = fn;
  p->ctx = ctx;
  p->tasks = tasks;
  p->threads = threads;
  p->next.store(0);
  p->open.store(true);
  p->generation.fetch_add(1);
  if (p->sleepers.load() > 0) futex(&p->generation, FUTEX_WAKE_PRIVATE, INT_MAX);
  take_tasks(p);
  p->open.store(false);
  for (int i = 0; p->active.load() > 0; ++i) {
    if (i < 2000) {
      relax();
    } else {
      sched_yield();
    }
  }
  p->busy.unlock();
}

}  // namespace nd
