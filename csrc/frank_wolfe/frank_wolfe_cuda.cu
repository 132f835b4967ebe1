// SPDX-License-Identifier: Apache-2.0
#include "cuda/gram/gram.h"
#include "finish/finish.h"
#include "frank_wolfe/frank_wolfe_cuda.h"

namespace hullkit {

int64_t frank_wolfe_workspace_bytes(const PoolSpec& pool, const FrankWolfeParams& params,
                                    const FrankWolfeResult& result) {
  switch (choose_solver_cuda(params, pool.positions())) {
    case Solver::kRun:
      return gram_workspace_bytes(pool.batch(), pool.positions());
    case Solver::kActiveSet:
      return active_set_workspace_bytes(pool, params, result);
    case Solver::kCorpus:
      return corpus_workspace_bytes(pool, result);
  }
  return 0;
}

void frank_wolfe_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                      const FrankWolfeResult& result, void* workspace, void* stream) {
  const int64_t batch = pool.batch(), n = pool.positions();
  const Solver solver = choose_solver_cuda(params, n);
  if (solver == Solver::kCorpus) return corpus_cuda(pool, query, params, result, workspace, stream);
  double* const gram = static_cast<double*>(workspace);
  const int64_t step = gram_batch(batch, n);
  const Supports supports(gram, n, true, n, result.indices, result.weights, {}, {}, {});
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, {}, first, count, gram, stream);
    solve_on_gram(solver, pool, query, params, result, first, count, gram, stream);
    finish_on_gram(pool, query, params.max_weight, result, supports, Finish::kCertify, first, count, stream);
  }
}

}  // namespace hullkit
