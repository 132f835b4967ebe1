// One pass over every entry's candidates: products with its direction, as keys of which the least is wanted.
#pragma once

#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace hullkit {

// 64 rows and 8 or 16 directions in a tile.
template <typename E, int kColBlocks>
using ScanTile = Tile<E, 4, 1, kColBlocks, 4, 128>;
inline constexpr int kScanRows = 64;
template <typename E, int kColBlocks>
inline constexpr int kScanBytes = ScanTile<E, kColBlocks>::shared_bytes(kScanRows + ScanTile<E, kColBlocks>::kCols);

inline int64_t scan_tiles(int64_t positions) { return (positions + kScanRows - 1) / kScanRows; }

// Entries that share their candidates also share the pass, so many at a time; others take one each.
inline int64_t scan_group(const PoolSpec& pool) {
  const bool shared = pool.rows.stride[0] == 0 && !pool.lengths.defined() && !pool.candidates.defined();
  return !shared ? 1 : pool.batch() <= 8 ? 8 : 16;
}

// Calls consume(b, tile, keys, count) in every block, for each of its directions: keys [kScanRows] in shared memory,
// `count` of them. A key is that of sign * product; kSmallestKey: broken, kLargestKey: no candidate.
template <typename E, int kColBlocks, typename Consume>
__device__ void scan(const DevicePool<E>& pool, int64_t batch, int group, double sign, Consume&& consume) {
  using T = ScanTile<E, kColBlocks>;
  constexpr int kKeyStride = kScanRows + 1;
  static_assert(T::kCols * kKeyStride * sizeof(uint64_t) <= kScanBytes<E, kColBlocks>, "keys reuse that memory");
  static_assert(T::kRows * T::kThreads / 32 == kScanRows, "");
  extern __shared__ __align__(16) char shared[];
  __shared__ const E* sources[kScanRows + T::kCols];
  __shared__ uint64_t states[kScanRows];  // kSmallestKey or kLargestKey where there is no row

  const int64_t groups = (batch + group - 1) / group;
  const int64_t b0 = blockIdx.x % groups * group, tile_at = blockIdx.x / groups;
  const int members = static_cast<int>(batch - b0 < group ? batch - b0 : group);
  const int64_t first = tile_at * kScanRows;
  const int count = static_cast<int>(pool.size - first < kScanRows ? pool.size - first : kScanRows);
  for (int t = threadIdx.x; t < kScanRows + T::kCols; t += T::kThreads) {
    if (t < kScanRows) {
      const int64_t row = t < count ? pool.row(b0, first + t) : DevicePool<E>::kNone;
      sources[t] = row >= 0 ? pool.row_at(b0, row) : nullptr;
      states[t] = row == DevicePool<E>::kBroken ? kSmallestKey : kLargestKey;
    } else {
      sources[t] = t - kScanRows < members ? pool.query_at(b0 + t - kScanRows) : nullptr;
    }
  }
  __syncthreads();
  const int begin = threadIdx.x / 32 * T::kRows;  // this warp's rows
  T tile;
  tile.template run<kScanRows + T::kCols>(shared, sources, pool.aligned, pool.dim, begin, kScanRows, 1);
  uint64_t* const keys = reinterpret_cast<uint64_t*>(shared);
  tile.for_each([&](int i, int col, double sum) {
    const int row = begin + i;
    const uint64_t key = isfinite(sum) ? key_of(sign * sum) : kSmallestKey;
    keys[col * kKeyStride + row] = sources[row] != nullptr ? key : states[row];
  });
  __syncthreads();
  for (int member = 0; member < members; ++member) consume(b0 + member, tile_at, keys + member * kKeyStride, count);
}

}  // namespace hullkit
