#include "cuda/gram.h"
#include "cuda/prompt.cuh"
#include "frank_wolfe/frank_wolfe_cuda.h"
#include "hullkit/round_multiplicities.h"
#include "hullkit/select.h"
#include "rounding/rounding_cuda.h"

namespace hullkit {

void select_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params, int64_t total,
                 int64_t exchange_passes, const FrankWolfeResult& result, const TensorView& counts, void* workspace,
                 void* stream) {
  if (pool.positions() > kMaxOnDevice) {
    frank_wolfe_corpus_cuda(pool, query, params, result, workspace, stream);
    round_multiplicities_cuda(pool, query, result.indices, result.weights, total, exchange_passes, counts, workspace,
                              stream);
    return;
  }
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), n = pool.positions(), step = gram_batch(batch, n);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, {}, first, count, gram, stream);
    frank_wolfe_on_gram(pool, query, params, result, first, count, gram, stream);
    round_on_gram(gram, n, true, n, result.indices, result.weights, total, exchange_passes, counts, first, count,
                  stream);
  }
}

}  // namespace hullkit
