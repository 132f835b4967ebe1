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

void round_multiplicities_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& indices,
                               const TensorView& weights, const RoundingParams& rounding, const TensorView& counts,
                               void* workspace, void* stream) {
  round_supports(pool, query, indices, weights, rounding, counts, {}, workspace, stream);
}

}  // namespace hullkit
