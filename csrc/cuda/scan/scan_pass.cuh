// SPDX-License-Identifier: Apache-2.0
// One pass over the candidates of every entry, for their products with one direction.
#pragma once

#include "cuda/primitives/device_pool.cuh"
#include "cuda/primitives/group.cuh"

namespace hullkit {

// Directions that are multiplied with rows. Strides are of bytes.
struct Directions {
  const char* data;
  int64_t stride, piece_stride;
  bool residuals;  // one residual is `pieces` columns (residual.cuh), their sum; if false, one column of elements

  __device__ const char* at(int64_t b, int piece) const { return data + b * stride + piece * piece_stride; }
};

// How a pass is laid out: `groups` of up to `group` entries, each with so many blocks, which take its tiles in turn.
struct ScanPlan {
  int64_t groups, blocks;
  int group;
  bool resident;  // all columns stay in shared memory, else they are loaded anew for every tile
  size_t shared;
};

// Entries that share a pass. Columns left empty cost next to nothing beside the rows.
inline constexpr int kScanGroup = 16;
inline constexpr int64_t kScanRows = 128;
inline constexpr int64_t kMaxScanBlocks = 1024;  // of a group

// Blocks of a group at most.
inline int64_t scan_blocks(int64_t positions) {
  const int64_t tiles = (positions + kScanRows - 1) / kScanRows;
  return tiles < kMaxScanBlocks ? tiles : kMaxScanBlocks;
}

inline int64_t scan_best_bytes(int64_t batch, int64_t positions) {
  return batch * scan_blocks(positions) * static_cast<int64_t>(sizeof(Best));
}

enum class Keep { kBest, kAll };

// Leaves keys of sign * product. kAll: one for every candidate, out [B, n]. kBest: the least of each part of the
// candidates, the first on a tie, out [B, partials()]. A pass is laid out once and launched for every direction.
class ScanPass {
 public:
  ScanPass(const PoolSpec& pool, const DevicePool& device_pool, const Directions& directions, double sign, Best* out,
           Keep keep);

  int64_t partials() const { return plan_.blocks; }

  // active [B], optional: a group without an active entry is left out.
  void operator()(const int* active, void* stream) const;

 private:
  using Kernel = void (*)(DevicePool, Directions, int64_t, ScanPlan, double, const int*, Best*);

  template <typename T>
  void lay_out(const PoolSpec& pool, Kernel kernel);

  Kernel kernel_;
  int threads_;
  ScanPlan plan_;
  DevicePool device_pool_;
  Directions directions_;
  int64_t batch_;
  double sign_;
  Best* out_;
};

// The best of `count` partial ones; all threads of the block get it. Its key is kSmallestKey if a candidate is broken,
// kLargestKey if there is none.
__device__ inline Best best_of(const Best* partial, int64_t count) {
  __shared__ Contest::Places places;
  Best best = no_best();
  for (int64_t t = threadIdx.x; t < count; t += blockDim.x) {
    const Best here = partial[t];
    if (precedes(here, best)) best = here;
  }
  return Contest(&places).least(best);
}

}  // namespace hullkit
