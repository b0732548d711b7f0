// A queue between threads with an event descriptor that is readable while something waits in it.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

namespace nd {

template <typename Item>
class Mailbox {
 public:
  explicit Mailbox(int fd) : fd_(fd) {}

  void put(Item item) {
    const std::lock_guard<std::mutex> lock(mutex_);
    items_.push_back(std::move(item));
    if (items_.size() == 1) wake();
  }

  // Moves all items over and leaves `items` empty.
  void put_all(std::vector<Item>* items) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool first = items_.empty() && !items->empty();
    items_.insert(items_.end(), std::make_move_iterator(items->begin()), std::make_move_iterator(items->end()));
    items->clear();
    if (first) wake();
  }

  // Everything that waits, up to `most` items, oldest first.
  std::vector<Item> take(size_t most = SIZE_MAX) {
    if (!any_.load(std::memory_order_acquire)) return {};
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Item> taken;
    if (items_.size() <= most) {
      taken.swap(items_);
      any_.store(false, std::memory_order_relaxed);
    } else {
      const auto end = items_.begin() + static_cast<ptrdiff_t>(most);
      taken.assign(std::make_move_iterator(items_.begin()), std::make_move_iterator(end));
      items_.erase(items_.begin(), end);
    }
    return taken;
  }

  // Like `take`, and make the descriptor quiet if nothing is left.
  std::vector<Item> take_and_quiet(size_t most) {
    std::vector<Item> taken = take(most);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (items_.empty()) {
      uint64_t count;
      [[maybe_unused]] const ssize_t n = read(fd_, &count, sizeof count);
    }
    return taken;
  }

  bool any() const { return any_.load(std::memory_order_acquire); }

 private:
  void wake() {
    any_.store(true, std::memory_order_release);
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(fd_, &one, sizeof one);
  }

  const int fd_;
  std::mutex mutex_;
  std::vector<Item> items_;
  std::atomic<bool> any_{false};
};

}  // namespace nd
