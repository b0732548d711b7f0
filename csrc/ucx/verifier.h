// The thread that digests what has arrived, while the progress thread moves more.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

#include "ucx/mailbox.h"
#include "ucx/plan.h"

namespace nd {

struct Read;

struct Verified {
  Read* read;
  uint32_t check;
  bool matches;
};

class Verifier {
 public:
  // Results are put into `done`.
  explicit Verifier(Mailbox<Verified>* done);
  ~Verifier();  // drops what is queued

  // `plan` stays alive until its result was taken.
  void submit(Read* read, const ReadPlan* plan, uint32_t check, uint64_t nbytes);

  // Bytes submitted and not yet digested. Small enough, they are still in the cache when their turn comes.
  uint64_t backlog() const { return backlog_.load(std::memory_order_acquire); }

 private:
  struct Job {
    Read* read;
    const ReadPlan* plan;
    uint32_t check;
    uint64_t nbytes;
  };

  void run();

  Mailbox<Verified>* const done_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job> jobs_;
  bool stopping_ = false;
  std::atomic<uint64_t> backlog_{0};
  std::thread thread_;
};

}  // namespace nd
