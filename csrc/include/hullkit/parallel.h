// SPDX-License-Identifier: Apache-2.0
// A small std::thread pool. Not OpenMP: a second OpenMP runtime beside torch's can crash the process.
#pragma once

#include <cstdint>
#include <functional>

namespace hullkit {

// Calls task(i) once for every 0 <= i < count on up to num_threads threads (the caller is one of them).
// Which thread runs which i is unspecified, so tasks must not depend on it. If tasks throw, the exception
// of the lowest i is rethrown after all have ended. A call from inside a task, or while another thread
// is using the pool, runs serially on the calling thread. Safe after fork().
void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t)>& task);

// Below this many multiply-adds a pass over rows takes less time than waking a thread.
inline constexpr int64_t kMinParallelWork = int64_t{1} << 21;

// Calls query(b, threads) once for every 0 <= b < batch. work: the multiply-adds of one query's pass over its rows.
// One thread a query while there are enough queries to go round, or while a query alone would not be shared; else one
// query at a time with all threads to itself.
template <typename Query>
void for_each_query(int64_t batch, int64_t work, int num_threads, Query&& query) {
  if (batch < num_threads && (batch == 1 || work >= kMinParallelWork)) {
    for (int64_t b = 0; b < batch; ++b) query(b, num_threads);
  } else {
    parallel_for(batch, num_threads, [&](int64_t b) { query(b, 1); });
  }
}

}  // namespace hullkit
