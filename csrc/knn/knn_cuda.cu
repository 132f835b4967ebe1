// SPDX-License-Identifier: Apache-2.0
// A pass over the pool leaves a key for each candidate; then rounds of a tournament: blocks sort kSorted of them and
// keep the first k, until one block has all that is left.
#include <algorithm>
#include <utility>

#include "common/limits.h"
#include "cuda/primitives/launch.cuh"
#include "cuda/primitives/pieces.h"
#include "cuda/scan/scan_pass.cuh"
#include "hullkit/knn.h"

namespace hullkit {
namespace {

// A block sorts all candidates of a small prompt; of a large one it keeps at most half of what it sorted, so that
// every round leaves fewer.
constexpr int kSorted = static_cast<int>(kMaxOnDevice);
static_assert(2 * kMaxNeighbours <= kSorted, "a round halves what is left");
constexpr int kSortThreads = 1024;

// from [B, size]: each block sorts kSorted; to [B, blocks * k]: the first k of each, or the answer of the last round.
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const Best* from, int64_t size, int64_t blocks, int64_t k, Best* to, int64_t* indices, double* values) {
  extern __shared__ __align__(16) char shared[];
  uint64_t* const keys = reinterpret_cast<uint64_t*>(shared);
  uint32_t* const places = reinterpret_cast<uint32_t*>(keys + kSorted);
  const int64_t b = blockIdx.x / blocks, block = blockIdx.x % blocks, first = block * kSorted;
  from += b * size + first;
  const int64_t count = size - first < kSorted ? size - first : kSorted;
  int width = 32;  // a power of two that holds them
  while (width < count) width *= 2;
  for (int i = threadIdx.x; i < width; i += kSortThreads) {
    const Best here = i < count ? from[i] : no_best();
    keys[i] = here.key;
    places[i] = here.index;
  }
  for (int length = 2; length <= width; length *= 2) {  // bitonic
    for (int apart = length / 2; apart > 0; apart /= 2) {
      __syncthreads();
      for (int t = threadIdx.x; t < width / 2; t += kSortThreads) {
        const int i = t / apart * 2 * apart + t % apart, j = i + apart;
        const Best low{keys[i], places[i], 0}, high{keys[j], places[j], 0};
        const bool rising = (i & length) == 0;
        if (rising ? precedes(high, low) : precedes(low, high)) {
          keys[i] = high.key;
          places[i] = high.index;
          keys[j] = low.key;
          places[j] = low.index;
        }
      }
    }
  }
  __syncthreads();
  const bool broken = keys[0] == kSmallestKey || keys[0] == kLargestKey;  // a broken candidate, or none at all
  for (int64_t i = threadIdx.x; i < k; i += kSortThreads) {
    const bool inside = i < width;
    if (blocks > 1) {
      to[(b * blocks + block) * k + i] = inside ? Best{keys[i], places[i], 0} : no_best();
      continue;
    }
    const bool none = !inside || keys[i] == kLargestKey;
    indices[b * k + i] = broken || none ? -1 : static_cast<int64_t>(places[i]);
    values[b * k + i] = broken ? __longlong_as_double(0x7ff8000000000000ll)
                        : none ? __longlong_as_double(0xfff0000000000000ll)  // -inf
                               : -value_of(keys[i]);
  }
}

int64_t sort_blocks(int64_t size) { return (size + kSorted - 1) / kSorted; }

int64_t kept(int64_t positions, int64_t k) { return positions > kSorted ? sort_blocks(positions) * k : 0; }

int64_t piece(int64_t batch, int64_t positions, int64_t k) {
  const auto bytes = static_cast<int64_t>(sizeof(Best)) * (positions + kept(positions, k));
  return entries_of_piece(batch, bytes, kScanGroup);  // whole groups share their pass
}

// One piece: workspace for its keys, and for those that rounds of the tournament keep.
void run_piece(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& values,
               Best* workspace, void* stream) {
  const int64_t batch = pool.batch(), k = indices.shape[1];
  Best *from = workspace, *to = from + batch * pool.positions();
  const DevicePool device_pool(pool, query);
  const ScanPass pass(pool, device_pool, {device_pool.query, device_pool.query_stride, 0, false}, -1.0, from,
                      Keep::kAll);
  pass(nullptr, stream);
  int64_t size = pool.positions();
  for (bool last = false; !last;) {
    const int64_t sorted_blocks = sort_blocks(size);
    last = sorted_blocks == 1;
    launch(sort_kernel, batch * sorted_blocks, kSortThreads, kSorted * (sizeof(uint64_t) + sizeof(uint32_t)), stream,
           static_cast<const Best*>(from), size, sorted_blocks, k, to, static_cast<int64_t*>(indices.data),
           static_cast<double*>(values.data));
    size = sorted_blocks * k;
    std::swap(from, to);
  }
}

}  // namespace

int64_t knn_workspace_bytes(const PoolSpec& pool, const TensorView& indices) {
  const int64_t batch = pool.batch(), positions = pool.positions(), k = indices.shape[1];
  HULLKIT_SUPPORTED(positions <= kMaxOnDevice || k <= kMaxNeighbours, "k: expected at most ", kMaxNeighbours,
                    " for more than ", kMaxOnDevice, " candidates on a CUDA device, got ", k);
  return piece(batch, positions, k) * (positions + kept(positions, k)) * static_cast<int64_t>(sizeof(Best));
}

void knn_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& values,
              void* workspace, void* stream) {
  const int64_t batch = pool.batch(), step = piece(batch, pool.positions(), indices.shape[1]);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = std::min(step, batch - first);
    run_piece(pool.entries(first, count), query.entries(first, count), indices.entries(first, count),
              values.entries(first, count), static_cast<Best*>(workspace), stream);
  }
}

}  // namespace hullkit
