// The thread that digests what has arrived, while the progress thread moves more. Work goes over and comes
// back in batches: on a busy machine the two threads share a core, and each hand-over costs a switch.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

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

  // `plan` stays alive until its result was taken. Begins with the next `flush`, or once a batch is full.
  void submit(Read* read, const ReadPlan* plan, uint32_t check, uint64_t nbytes);
  void flush();

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
  std::vector<Job> batch_;  // the submitter's
  uint64_t batch_nbytes_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Job> jobs_;
  bool stopping_ = false;
  std::atomic<uint64_t> backlog_{0};
  std::thread thread_;
};

}  // namespace nd
