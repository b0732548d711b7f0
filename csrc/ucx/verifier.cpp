#include "ucx/verifier.h"

namespace nd {
namespace {

constexpr uint64_t kBatchNbytes = 1 << 20;

}  // namespace

Verifier::Verifier(Mailbox<Verified>* done) : done_(done), thread_([this] { run(); }) {}

Verifier::~Verifier() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Verifier::submit(Read* read, const ReadPlan* plan, uint32_t check, uint64_t nbytes) {
  batch_.push_back({read, plan, check, nbytes});
  batch_nbytes_ += nbytes;
  backlog_.fetch_add(nbytes, std::memory_order_release);
  if (batch_nbytes_ >= kBatchNbytes) flush();
}

void Verifier::flush() {
  if (batch_.empty()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.insert(jobs_.end(), batch_.begin(), batch_.end());
  }
  wake_.notify_one();
  batch_.clear();
  batch_nbytes_ = 0;
}

void Verifier::run() {
  pthread_setname_np(pthread_self(), "nd-verify");
  std::vector<Job> jobs;
  std::vector<Verified> results;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    jobs.swap(jobs_);
    lock.unlock();
    uint64_t nbytes = 0;
    for (const Job& job : jobs) {
      results.push_back({job.read, job.check, job.plan->matches(job.check)});
      nbytes += job.nbytes;
    }
    backlog_.fetch_sub(nbytes, std::memory_order_release);
    done_->put_all(&results);
    jobs.clear();
    lock.lock();
  }
}

}  // namespace nd
