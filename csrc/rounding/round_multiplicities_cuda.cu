// SPDX-License-Identifier: Apache-2.0
#include "common/limits.h"
#include "finish/finish.h"
#include "hullkit/round_multiplicities.h"

namespace hullkit {

void round_supports(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& weights,
                    const RoundingParams& rounding, const TensorView& counts, const TensorView& residual_norm,
                    void* workspace, void* stream) {
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), width = indices.shape[1], step = gram_batch(batch, width);
  const Supports supports(gram, width, false, pool.positions(), indices, weights, rounding, counts, residual_norm);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, indices, first, count, gram, stream);
    finish_on_gram(pool, query, 1.0, {}, supports, Finish::kRound, first, count, stream);
  }
}

int64_t round_multiplicities_workspace_bytes(const PoolSpec& pool, const TensorView& indices) {
  const int64_t width = indices.shape[1];
  HULLKIT_SUPPORTED(width <= kMaxOnDevice, "result.indices: expected a support of at most ", kMaxOnDevice,
                    " points on a CUDA device, got ", width);
  return gram_workspace_bytes(pool.batch(), width);
}

void round_multiplicities_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& indices,
                               const TensorView& weights, const RoundingParams& rounding, const TensorView& counts,
                               void* workspace, void* stream) {
  round_supports(pool, query, indices, weights, rounding, counts, {}, workspace, stream);
}

}  // namespace hullkit
