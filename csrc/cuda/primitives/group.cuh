// SPDX-License-Identifier: Apache-2.0
// The threads of a block that work on one prompt. Reductions are exact (no sums of floats), so their results do not
// depend on how many threads there are.
#pragma once

#include <cstdint>

#include "cuda/primitives/ptx.cuh"

namespace hullkit {

inline constexpr int kMaxWarps = 32;

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

struct alignas(16) Best {
  uint64_t key;
  uint32_t index;
  uint32_t note;  // travels with the index
};

inline constexpr uint32_t kNoIndex = 0xffffffffu;
__device__ inline Best no_best() { return {kLargestKey, kNoIndex, 0}; }

__device__ inline bool precedes(const Best& a, const Best& b) {
  return a.key != b.key ? a.key < b.key : a.index < b.index;
}

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Whether this lane has the least key of its warp, the lowest index on a tie; no two lanes have the same index but
// those without any, of which the first counts.
__device__ inline bool is_warp_least(const Best& best) {
  const auto high = static_cast<uint32_t>(best.key >> 32);
  bool least = high == __reduce_min_sync(kAllLanes, high);
  uint32_t lanes = __ballot_sync(kAllLanes, least);
  if ((lanes & (lanes - 1)) != 0) {  // several, as good as never
    const auto low = static_cast<uint32_t>(best.key);
    const uint32_t least_low = __reduce_min_sync(kAllLanes, least ? low : kAllLanes);
    least &= low == least_low;
    const uint32_t least_index = __reduce_min_sync(kAllLanes, least ? best.index : kAllLanes);
    least &= best.index == least_index;
    lanes = __ballot_sync(kAllLanes, least);
    least &= (lanes & ((1u << threadIdx.x % 32) - 1)) == 0;
  }
  return least;
}

// Where the threads of a block meet. Every warp has a place in each of two sets, used in turn: whoever writes one set
// has passed the barrier at which all were done with reading it, so a search takes one barrier.
class Contest {
 public:
  struct Places {
    Best of_warps[2][kMaxWarps];
  };
  __device__ explicit Contest(Places* places)
      : set_(ptx::shared_address(places->of_warps[0])), other_set_(ptx::shared_address(places->of_warps[1])) {}

  // The least key among all threads, the lowest index on a tie; all get the answer.
  __device__ Best least(const Best& best) {
    const uint32_t set = meet(best, is_warp_least(best));
    if (warps() <= 2) {
      const Best first = read(set, 0), last = read(set, warps() - 1);
      return precedes(last, first) ? last : first;
    }
    const int lane = static_cast<int>(threadIdx.x % 32);
    const Best mine = lane < warps() ? read(set, lane) : no_best();
    return read(set, __ffs(static_cast<int>(__ballot_sync(kAllLanes, is_warp_least(mine)))) - 1);
  }

  // The least number among all threads; all get it.
  __device__ uint32_t least(uint32_t value) {
    value = __reduce_min_sync(kAllLanes, value);
    const int lane = static_cast<int>(threadIdx.x % 32);
    const uint32_t set = meet({0, value, 0}, lane == 0);
    return __reduce_min_sync(kAllLanes, lane < warps() ? read(set, lane).index : value);
  }

 private:
  __device__ static int warps() { return static_cast<int>(blockDim.x / 32); }

  // Every warp's winner leaves its candidate in the current set, from which all threads read the answer.
  __device__ uint32_t meet(const Best& best, bool winner) {
    const uint32_t set = set_;
    set_ = other_set_;
    other_set_ = set;
    ptx::store_shared_16_if(
        winner, place(set, threadIdx.x / 32),
        {static_cast<uint32_t>(best.key), static_cast<uint32_t>(best.key >> 32), best.index, best.note});
    __syncthreads();
    return set;
  }

  __device__ static uint32_t place(uint32_t set, int warp) { return set + warp * static_cast<uint32_t>(sizeof(Best)); }
  __device__ static Best read(uint32_t set, int warp) {
    const uint4 words = ptx::load_shared_16(place(set, warp));
    return {static_cast<uint64_t>(words.y) << 32 | words.x, words.z, words.w};
  }

  uint32_t set_, other_set_;
};

}  // namespace hullkit
