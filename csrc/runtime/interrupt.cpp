// SPDX-License-Identifier: Apache-2.0
#include "hullkit/interrupt.h"

#include <time.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

namespace hullkit {

class Interruption {
 public:
  explicit Interruption(const std::function<void()>& ask) : ask_(ask), asked_at_(now()) {}

  void look() {
    if (!stopped_.load(std::memory_order_relaxed) && std::this_thread::get_id() == caller_) ask();
    if (stopped_.load(std::memory_order_relaxed)) throw Interrupted{};
  }

  // By the caller, once no other thread works for the operation.
  void rethrow() const {
    if (reason_) std::rethrow_exception(reason_);
  }

 private:
  static constexpr int64_t kBetween = 50'000'000;  // nanoseconds

  // Linux's coarse clock moves every few milliseconds, and reading it takes a few nanoseconds.
#ifdef CLOCK_MONOTONIC_COARSE
  static constexpr clockid_t kClock = CLOCK_MONOTONIC_COARSE;
#else
  static constexpr clockid_t kClock = CLOCK_MONOTONIC;
#endif
  static int64_t now() {
    timespec time{};
    clock_gettime(kClock, &time);
    return int64_t{1'000'000'000} * time.tv_sec + time.tv_nsec;
  }

  void ask() {
    if (now() - asked_at_ < kBetween) return;
    try {
      ask_();
    } catch (...) {
      reason_ = std::current_exception();
      stopped_.store(true, std::memory_order_relaxed);
    }
    asked_at_ = now();
  }

  const std::function<void()>& ask_;
  const std::thread::id caller_ = std::this_thread::get_id();
  std::atomic<bool> stopped_{false};
  std::exception_ptr reason_;  // written and read by the caller alone
  int64_t asked_at_;
};

namespace {

thread_local Interruption* current = nullptr;

// Also after an exception, and for a call from a handler that ask() runs.
class Adopted {
 public:
  explicit Adopted(Interruption* interruption) : outer_(current) { current = interruption; }
  Adopted(const Adopted&) = delete;
  Adopted& operator=(const Adopted&) = delete;
  ~Adopted() { current = outer_; }

 private:
  Interruption* const outer_;
};

}  // namespace

void run_interruptibly(const std::function<void()>& ask, const std::function<void()>& task) {
  Interruption interruption(ask);
  const Adopted adopted(&interruption);
  try {
    task();
  } catch (...) {
    interruption.rethrow();  // also where another thread met an error first: what `ask` threw must not get lost
    throw;
  }
}

void stop_if_asked() {
  if (current != nullptr) current->look();
}

Interruption* current_interruption() { return current; }
void adopt_interruption(Interruption* interruption) { current = interruption; }

}  // namespace hullkit
