// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/limits.h"
#include "cuda/gram/gram.h"
#include "cuda/primitives/device_pool.cuh"
#include "cuda/primitives/launch.cuh"
#include "hullkit/duplicates.h"

namespace hullkit {
namespace {

constexpr int kThreads = 256;

// A block for each entry. Candidate i is its own representative until one before it takes it.
__global__ void __launch_bounds__(kThreads) duplicates_kernel(const DevicePool pool, double eps, int64_t first,
                                                              const double* gram, int64_t stride, int64_t* out) {
  extern __shared__ __align__(16) char shared[];
  const int n = static_cast<int>(pool.size);
  const int64_t b = first + blockIdx.x;
  double* const squares = reinterpret_cast<double*>(shared);
  int* const representative = reinterpret_cast<int*>(squares + n);
  gram += int64_t{blockIdx.x} * (n + 1) * stride;
  const int64_t length = pool.length(b);
  bool broken = false;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const int64_t row = pool.row(b, i, length);
    representative[i] = row >= 0 ? i : -1;
    squares[i] = row >= 0 ? gram[i * stride + i] : 0.0;
    broken |= row == DevicePool::kBroken || !isfinite(squares[i]);
  }
  broken = __syncthreads_or(broken);
  for (int r = 0; r < n && !broken; ++r) {
    if (representative[r] != r) continue;
#pragma unroll 1
    for (int i = r + 1 + static_cast<int>(threadIdx.x); i < n; i += kThreads) {
      if (representative[i] != i) continue;
      if (gram[r * stride + i] > (1.0 - eps) * sqrt(squares[r]) * sqrt(squares[i])) representative[i] = r;
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kThreads) out[b * n + i] = broken ? -1 : representative[i];
}

}  // namespace

int64_t duplicates_workspace_bytes(const PoolSpec& pool) {
  const int64_t n = pool.positions();
  HULLKIT_SUPPORTED(n <= kMaxOnDevice, "pool: expected at most ", kMaxOnDevice, " candidates on a CUDA device, got ", n,
                    ". Move the inputs with .cpu(), or pass candidates");
  return gram_workspace_bytes(pool.batch(), n);
}

void duplicates_cuda(const PoolSpec& pool, double eps, const TensorView& representatives, void* workspace,
                     void* stream) {
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), n = pool.positions(), step = gram_batch(batch, n);
  TensorView any_row = pool.rows;  // Gram matrices have a query, here one that nobody asks for
  any_row.rank = 2;
  any_row.shape[1] = pool.rows.shape[2];
  any_row.stride[1] = pool.rows.stride[2];
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, any_row, {}, first, count, gram, stream);
    launch(duplicates_kernel, count, kThreads, n * (sizeof(double) + sizeof(int)), stream, DevicePool(pool, any_row),
           std::max(eps, kLeastEps), first, static_cast<const double*>(gram), gram_stride(n),
           static_cast<int64_t*>(representatives.data));
  }
}

}  // namespace hullkit
