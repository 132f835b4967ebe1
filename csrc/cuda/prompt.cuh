// How a prompt's candidates are dealt out to the threads that work on it.
#pragma once

#include <cstdint>

namespace hullkit {

inline constexpr int kPerThread = 8;
inline constexpr int64_t kMaxOnDevice = 4096;  // candidates of a prompt, or points of a support

// Threads for n <= kMaxOnDevice candidates: candidate k * threads + t is thread t's k-th.
inline int prompt_threads(int64_t n) {
  const int64_t warps = (n + 32 * kPerThread - 1) / (32 * kPerThread);
  return static_cast<int>(warps < 1 ? 32 : warps * 32);
}

}  // namespace hullkit
