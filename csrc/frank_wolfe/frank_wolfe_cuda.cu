#include "cuda/gram/gram.h"
#include "finish/finish.h"
#include "frank_wolfe/frank_wolfe_cuda.h"

namespace hullkit {

void frank_wolfe_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                      const FrankWolfeResult& result, void* workspace, void* stream) {
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), n = pool.positions(), step = gram_batch(batch, n);
  const Supports supports(gram, n, true, n, result.indices, result.weights, {}, {}, {});
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, {}, first, count, gram, stream);
    frank_wolfe_on_gram(pool, query, params, result, first, count, gram, stream);
    finish_on_gram(pool, query, params.max_weight, result, supports, Finish::kCertify, first, count, stream);
  }
}

}  // namespace hullkit
