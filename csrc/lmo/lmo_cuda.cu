#include "cuda/scan.cuh"
#include "hullkit/lmo.h"

namespace hullkit {
namespace {

// partial [B, tiles]: the best of every tile.
template <typename E, int kColBlocks>
__global__ void __launch_bounds__(ScanTile<E, kColBlocks>::kThreads)
    lmo_kernel(const DevicePool<E> pool, int64_t batch, int group, int64_t tiles, Best* partial) {
  scan<E, kColBlocks>(pool, batch, group, 1.0, [&](int64_t b, int64_t tile, const uint64_t* keys, int count) {
    if (b % (blockDim.x / 32) != threadIdx.x / 32) return;  // a warp for each direction
    const int lane = threadIdx.x % 32;
    Best best = no_best();
    for (int i = lane; i < count; i += 32) {
      const Best here{keys[i], static_cast<uint32_t>(tile * kScanRows + i), 0};
      if (precedes(here, best)) best = here;
    }
    if (is_warp_least(best)) partial[b * tiles + tile] = best;
  });
}

constexpr int kReduceThreads = 1024;

__global__ void __launch_bounds__(kReduceThreads)
    lmo_reduce_kernel(const Best* partial, int64_t tiles, int64_t* index, double* value) {
  partial += blockIdx.x * tiles;
  Best best = no_best();
  for (int64_t t = threadIdx.x; t < tiles; t += blockDim.x) {
    if (precedes(partial[t], best)) best = partial[t];
  }
  __shared__ Contest::Places places;
  best = Contest(&places).least(best);
  if (threadIdx.x != 0) return;
  const bool broken = best.key == kSmallestKey || best.key == kLargestKey;
  index[blockIdx.x] = broken ? -1 : static_cast<int64_t>(best.index);
  value[blockIdx.x] = broken ? __longlong_as_double(0x7ff8000000000000ll) : value_of(best.key);
}

}  // namespace

int64_t lmo_workspace_bytes(int64_t batch, int64_t positions) {
  return batch * scan_tiles(positions) * static_cast<int64_t>(sizeof(Best));
}

void lmo_cuda(const PoolSpec& pool, const TensorView& direction, const TensorView& index, const TensorView& value,
              void* workspace, void* stream) {
  const int64_t batch = pool.batch(), tiles = scan_tiles(pool.positions()), group = scan_group(pool);
  Best* const partial = static_cast<Best*>(workspace);
  const int64_t blocks = tiles * ((batch + group - 1) / group);
  with_element(pool.rows.dtype, [&](auto element) {
    using E = decltype(element);
    const DevicePool<E> device_pool(pool, direction);
    const auto run = [&](auto kernel, size_t shared) {
      launch(kernel, blocks, ScanTile<E, 1>::kThreads, shared, stream, device_pool, batch, static_cast<int>(group),
             tiles, partial);
    };
    if (group == 16) {
      run(lmo_kernel<E, 2>, kScanBytes<E, 2>);
    } else {
      run(lmo_kernel<E, 1>, kScanBytes<E, 1>);
    }
  });
  launch(lmo_reduce_kernel, batch, kReduceThreads, 0, stream, partial, tiles, static_cast<int64_t*>(index.data),
         static_cast<double*>(value.data));
}

}  // namespace hullkit
