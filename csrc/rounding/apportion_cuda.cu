// SPDX-License-Identifier: Apache-2.0
#include "cuda/primitives/group.cuh"
#include "cuda/primitives/launch.cuh"
#include "hullkit/apportion.h"
#include "rounding/quotas.cuh"

namespace hullkit {
namespace {

constexpr int kThreads = 256;

// One block for each entry. A weight gets one unit more if fewer than `remaining` weights have a larger remainder.
__global__ void __launch_bounds__(kThreads)
    apportion_kernel(const double* weights, int64_t size, int64_t total, int64_t* counts) {
  weights += blockIdx.x * size;
  counts += blockIdx.x * size;
  const Quotas quotas(weights, size, total);
  int64_t remaining = total;
  if (!quotas.broken) {
    for (int64_t i = 0; i < size; ++i) remaining -= static_cast<int64_t>(floor(quotas[i]));
  }
  const bool broken = quotas.broken || remaining < 0 || remaining > size;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    if (broken) {
      counts[i] = -1;
      continue;
    }
    const double quota = quotas[i], whole = floor(quota), remainder = quota - whole;
    int64_t before = 0;
    for (int64_t j = 0; j < size && before < remaining; ++j) {
      const double other = quotas[j] - floor(quotas[j]);
      before += other != remainder ? other > remainder : j < i;
    }
    counts[i] = static_cast<int64_t>(whole) + (before < remaining);
  }
}

}  // namespace

void apportion_cuda(const TensorView& weights, int64_t total, const TensorView& counts, void* stream) {
  launch(apportion_kernel, weights.shape[0], kThreads, 0, stream, static_cast<const double*>(weights.data),
         weights.shape[1], total, static_cast<int64_t*>(counts.data));
}

}  // namespace hullkit
