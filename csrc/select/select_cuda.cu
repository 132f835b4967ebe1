#include "common/limits.h"
#include "finish/finish.h"
#include "frank_wolfe/frank_wolfe_cuda.h"
#include "hullkit/round_multiplicities.h"
#include "hullkit/select.h"

namespace hullkit {

void select_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                 const RoundingParams& rounding, const FrankWolfeResult& result, const TensorView& counts,
                 const TensorView& residual_norm, void* workspace, void* stream) {
  if (pool.positions() > kMaxOnDevice) {
    frank_wolfe_corpus_cuda(pool, query, params, result, workspace, stream);
    round_supports(pool, query, result.indices, result.weights, rounding, counts, residual_norm, workspace, stream);
    return;
  }
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), n = pool.positions(), step = gram_batch(batch, n);
  const Supports supports(gram, n, true, n, result.indices, result.weights, rounding, counts, residual_norm);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, {}, first, count, gram, stream);
    frank_wolfe_on_gram(pool, query, params, result, first, count, gram, stream);
    finish_on_gram(pool, query, params.max_weight, result, supports, Finish::kBoth, first, count, stream);
  }
}

}  // namespace hullkit
