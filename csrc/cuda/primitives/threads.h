// SPDX-License-Identifier: Apache-2.0
// How a prompt's candidates are dealt out to the threads that work on it.
#pragma once

#include <cstdint>

namespace hullkit {

// Whole warps for n candidates, `per_thread` to a thread: candidate k * threads + t is thread t's k-th.
inline int threads_for(int64_t n, int per_thread) {
  const int64_t by_warp = int64_t{32} * per_thread;
  return static_cast<int>((n + by_warp - 1) / by_warp * 32);
}

}  // namespace hullkit
