// SPDX-License-Identifier: Apache-2.0
// Which processors the workers of a pool of threads shall run on. Only Linux lets a thread choose.
#pragma once

#ifdef __linux__
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <strings.h>
#include <sys/types.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>

namespace hullkit {

// Keeps workers off the caller's processor. A wake-up may leave a worker where the caller runs, and the scheduler can
// take longer than a whole batch to move it: two threads then take the time of one.
class Processors {
 public:
  // By a new worker; tid: its own, as the system counts threads.
  void add_worker(pid_t tid) { tids_.push_back(tid); }

  // Places the workers for a loop of num_threads threads, the caller among them.
  void place(std::vector<std::thread>& workers, int num_threads) {
    const int processor = sched_getcpu();
    cpu_set_t own;
    if (processor < 0 || sched_getaffinity(0, sizeof(own), &own) != 0) return;
    // Where OpenMP binds threads to a processor each, what one of them may use is not what the process may. A caller
    // that somebody else has bound means it.
    const bool bound = openmp_binds_ && CPU_COUNT(&own) < num_threads;
    const auto now = std::chrono::steady_clock::now();
    const bool known =
        processor == processor_ && bound == bound_ && CPU_EQUAL(&own, &own_) && workers.size() == placed_;
    if (known && (!bound || now - looked_at_ < kPatience)) return;
    processor_ = processor;
    bound_ = bound;
    own_ = own;
    placed_ = workers.size();
    looked_at_ = now;
    if (bound) add_other_threads(&own);
    if (CPU_COUNT(&own) > 1) CPU_CLR(processor, &own);
    for (std::thread& worker : workers) pthread_setaffinity_np(worker.native_handle(), sizeof(own), &own);
  }

 private:
  // OpenMP makes its threads as it needs them: they may come after the first look.
  static constexpr std::chrono::seconds kPatience{1};

  static bool openmp_binds() {
    const char* const bind = std::getenv("OMP_PROC_BIND");
    if (bind != nullptr) return strcasecmp(bind, "false") != 0;
    return std::getenv("OMP_PLACES") != nullptr || std::getenv("GOMP_CPU_AFFINITY") != nullptr ||
           std::getenv("KMP_AFFINITY") != nullptr;
  }

  // The processors of all threads of the process but the workers. One that has just begun is not known yet: it has the
  // processors of its maker still.
  void add_other_threads(cpu_set_t* allowed) const {
    DIR* const tasks = opendir("/proc/self/task");
    if (tasks == nullptr) return;
    while (const dirent* const task = readdir(tasks)) {
      const auto tid = static_cast<pid_t>(std::atoi(task->d_name));
      if (tid <= 0 || std::find(tids_.begin(), tids_.end(), tid) != tids_.end()) continue;
      cpu_set_t others;
      if (sched_getaffinity(tid, sizeof(others), &others) == 0) CPU_OR(allowed, allowed, &others);
    }
    closedir(tasks);
  }

  const bool openmp_binds_ = openmp_binds();
  std::vector<pid_t> tids_;
  size_t placed_ = 0;
  cpu_set_t own_{};  // the caller's, and where it ran, when workers were placed
  int processor_ = -1;
  bool bound_ = false;
  std::chrono::steady_clock::time_point looked_at_;
};

}  // namespace hullkit
#endif
