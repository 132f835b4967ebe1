// The threads that work on one prompt: a warp, or a block of several. Reductions are exact (no sums of floats), so
// their results do not depend on how many threads there are.
#pragma once

#include <cstdint>

namespace hullkit {

// Keys are ordered as the numbers are, -0 and 0 alike; no number has kSmallestKey or kLargestKey.
inline constexpr uint64_t kSmallestKey = 0;
inline constexpr uint64_t kLargestKey = ~uint64_t{0};

__device__ inline uint64_t key_of(double value) {
  const auto bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

__device__ inline double value_of(uint64_t key) {
  return __longlong_as_double(static_cast<long long>(key >> 63 ? key ^ uint64_t{1} << 63 : ~key));
}

struct Best {
  uint64_t key;
  uint32_t index;
};

__device__ inline bool precedes(const Best& a, const Best& b) {
  return a.key != b.key ? a.key < b.key : a.index < b.index;
}

// The least key among the lanes, the lowest index on a tie.
__device__ inline Best warp_least(const Best& best) {
  constexpr uint32_t kAll = 0xffffffffu;
  const auto high = static_cast<uint32_t>(best.key >> 32), low = static_cast<uint32_t>(best.key);
  const uint32_t least_high = __reduce_min_sync(kAll, high);
  const uint32_t lanes = __ballot_sync(kAll, high == least_high);
  if ((lanes & (lanes - 1)) == 0) {  // one has it, as good as always
    const int lane = __ffs(static_cast<int>(lanes)) - 1;
    const uint32_t least_low = __shfl_sync(kAll, low, lane);
    return {static_cast<uint64_t>(least_high) << 32 | least_low, __shfl_sync(kAll, best.index, lane)};
  }
  const uint32_t least_low = __reduce_min_sync(kAll, high == least_high ? low : kAll);
  const bool least = high == least_high && low == least_low;
  const uint32_t index = __reduce_min_sync(kAll, least ? best.index : kAll);
  return {static_cast<uint64_t>(least_high) << 32 | least_low, index};
}

template <bool kOneWarp>
struct Group {
  static constexpr int kMaxWarps = 32;

  __device__ static void sync() {
    if (kOneWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // As warp_least, among all threads; all get the answer.
  __device__ static Best least(Best best) {
    best = warp_least(best);
    if (kOneWarp) return best;
    __shared__ Best of_warps[kMaxWarps];
    __syncthreads();  // whoever still reads the last answer
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    __syncthreads();
    const uint32_t lane = threadIdx.x % 32;
    return warp_least(lane < blockDim.x / 32 ? of_warps[lane] : Best{kLargestKey, 0xffffffffu});
  }

  __device__ static uint32_t least(uint32_t value) {
    if (kOneWarp) return __reduce_min_sync(0xffffffffu, value);
    return static_cast<uint32_t>(least(Best{value, 0}).key);
  }

  // `value` of thread `source`.
  template <typename T>
  __device__ static T from(int source, T value) {
    static_assert(sizeof(T) == sizeof(long long), "");
    if (kOneWarp) return __shfl_sync(0xffffffffu, value, source);
    __shared__ T one;
    __syncthreads();  // whoever still reads the last answer
    if (static_cast<int>(threadIdx.x) == source) one = value;
    __syncthreads();
    return one;
  }

  __device__ static bool any(bool condition) {
    return kOneWarp ? __any_sync(0xffffffffu, condition) : __syncthreads_or(condition);
  }
};

}  // namespace hullkit
