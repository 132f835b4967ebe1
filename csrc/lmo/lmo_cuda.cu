// SPDX-License-Identifier: Apache-2.0
#include "cuda/primitives/launch.cuh"
#include "cuda/scan/scan_pass.cuh"
#include "hullkit/lmo.h"

namespace hullkit {
namespace {

constexpr int kReduceThreads = 256;

__global__ void __launch_bounds__(kReduceThreads)
    lmo_reduce_kernel(const Best* partial, int64_t count, int64_t* index, double* value) {
  const Best best = best_of(partial + blockIdx.x * count, count);
  if (threadIdx.x != 0) return;
  const bool broken = best.key == kSmallestKey || best.key == kLargestKey;
  index[blockIdx.x] = broken ? -1 : static_cast<int64_t>(best.index);
  value[blockIdx.x] = broken ? __longlong_as_double(0x7ff8000000000000ll) : value_of(best.key);
}

}  // namespace

int64_t lmo_workspace_bytes(const PoolSpec& pool) { return scan_best_bytes(pool.batch(), pool.positions()); }

void lmo_cuda(const PoolSpec& pool, const TensorView& direction, const TensorView& index, const TensorView& value,
              void* workspace, void* stream) {
  Best* const partial = static_cast<Best*>(workspace);
  const DevicePool device_pool(pool, direction);
  const ScanPass pass(pool, device_pool, {device_pool.query, device_pool.query_stride, 0, false}, 1.0, partial,
                      Keep::kBest);
  pass(nullptr, stream);
  launch(lmo_reduce_kernel, pool.batch(), kReduceThreads, 0, stream, static_cast<const Best*>(partial), pass.partials(),
         static_cast<int64_t*>(index.data), static_cast<double*>(value.data));
}

}  // namespace hullkit
