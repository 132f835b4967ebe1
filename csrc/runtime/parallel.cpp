// SPDX-License-Identifier: Apache-2.0
#include "hullkit/parallel.h"

#include <pthread.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "hullkit/interrupt.h"
#include "runtime/processors.h"

namespace hullkit {
namespace {

thread_local bool inside_task = false;

// One loop in flight. Threads take indices from `next`; the last to finish wakes the caller.
struct Loop {
  const std::function<void(int64_t)>* task;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  int64_t error_index = -1;
  std::exception_ptr error;
  Interruption* const interruption = current_interruption();

  void work() {
    inside_task = true;
    adopt_interruption(interruption);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        stop_if_asked();
        (*task)(i);
      } catch (const Interrupted&) {
        next.store(count, std::memory_order_relaxed);  // nobody starts another
        record(i, std::current_exception());
      } catch (...) {
        record(i, std::current_exception());
      }
    }
    inside_task = false;
  }

  // By the caller while it waits for the others. A handler that this runs may come back here: it then works alone.
  void look() {
    inside_task = true;
    try {
      stop_if_asked();
    } catch (const Interrupted&) {
      next.store(count, std::memory_order_relaxed);
      record(count, std::current_exception());
    }
    inside_task = false;
  }

 private:
  void record(int64_t i, std::exception_ptr thrown) {
    const std::lock_guard<std::mutex> lock(error_mutex);
    if (error_index < 0 || i < error_index) {
      error_index = i;
      error = std::move(thrown);
    }
  }
};

class Pool {
 public:
  // Returns false, with nothing run, if another loop is using the pool.
  bool run(Loop& loop, int num_workers) {
    const std::unique_lock<std::mutex> in_use(in_use_, std::try_to_lock);
    if (!in_use.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      num_workers = grow(num_workers);
#ifdef __linux__
      processors_.place(threads_, num_workers + 1);
#endif
      loop_ = &loop;
      wanted_ = num_workers;
      busy_ = 0;
    }
    wake_.notify_all();
    loop.work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // a worker that has not woken by now finds nothing left to do
    while (!done_.wait_for(lock, kPatience, [this] { return busy_ == 0; })) {
      lock.unlock();
      loop.look();
      lock.lock();
    }
    loop_ = nullptr;
    return true;
  }

 private:
  static constexpr std::chrono::milliseconds kPatience{50};

  // Makes threads up to num_workers; returns how many there are. The system may refuse to make more.
  int grow(int num_workers) {
    try {
      while (static_cast<int>(threads_.size()) < num_workers) {
        threads_.emplace_back([this] { serve(); });
      }
    } catch (const std::system_error&) {
    }
    return std::min(num_workers, static_cast<int>(threads_.size()));
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
#ifdef __linux__
    processors_.add_worker(static_cast<pid_t>(syscall(SYS_gettid)));
#endif
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++busy_;
      Loop* const loop = loop_;
      lock.unlock();
      loop->work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex in_use_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> threads_;
  Loop* loop_ = nullptr;
  int wanted_ = 0;
  int busy_ = 0;
#ifdef __linux__
  Processors processors_;
#endif
};

// Never destroyed: its threads live as long as the process. A forked child has none of them, so it starts
// a pool of its own and leaves the parent's memory alone.
Pool* pool_instance = nullptr;
std::once_flag pool_once;

Pool& pool() {
  std::call_once(pool_once, [] {
    pool_instance = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool_instance = new Pool; });
  });
  return *pool_instance;
}

}  // namespace

void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t)>& task) {
  Loop loop;
  loop.task = &task;
  loop.count = count;
  const int num_workers = static_cast<int>(num_threads < count ? num_threads : count) - 1;
  if (inside_task || num_workers < 1 || !pool().run(loop, num_workers)) {
    const bool nested = inside_task;
    loop.work();
    inside_task = nested;
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace hullkit
