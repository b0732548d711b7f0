#include "ucx/verifier.h"

namespace nd {

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
  backlog_.fetch_add(nbytes, std::memory_order_release);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back({read, plan, check, nbytes});
  }
  wake_.notify_one();
}

void Verifier::run() {
  pthread_setname_np(pthread_self(), "nd-verify");
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    const Job job = jobs_.front();
    jobs_.pop_front();
    lock.unlock();
    const bool matches = job.plan->matches(job.check);
    backlog_.fetch_sub(job.nbytes, std::memory_order_release);
    done_->put({job.read, job.check, matches});
    lock.lock();
  }
}

}  // namespace nd
