// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/gram/gram.h"
#include "finish/finish.h"
#include "frank_wolfe/frank_wolfe_cuda.h"
#include "hullkit/select.h"

namespace hullkit {

int64_t select_workspace_bytes(const PoolSpec& pool, const FrankWolfeParams& params, const FrankWolfeResult& result) {
  const int64_t bytes = frank_wolfe_workspace_bytes(pool, params, result);
  if (choose_solver_cuda(params, pool.positions()) != Solver::kCorpus) return bytes;
  return std::max(bytes, round_multiplicities_workspace_bytes(pool, result.indices));
}

void select_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                 const RoundingParams& rounding, const FrankWolfeResult& result, const TensorView& counts,
                 const TensorView& residual_norm, void* workspace, void* stream) {
  const Solver solver = choose_solver_cuda(params, pool.positions());
  if (solver == Solver::kCorpus) {
    corpus_cuda(pool, query, params, result, workspace, stream);
    round_supports(pool, query, result.indices, result.weights, rounding, counts, residual_norm, workspace, stream);
    return;
  }
  double* const gram = static_cast<double*>(workspace);
  const int64_t batch = pool.batch(), n = pool.positions(), step = gram_batch(batch, n);
  const Supports supports(gram, n, true, n, result.indices, result.weights, rounding, counts, residual_norm);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = step < batch - first ? step : batch - first;
    gram_cuda(pool, query, {}, first, count, gram, stream);
    solve_on_gram(solver, pool, query, params, result, first, count, gram, stream);
    finish_on_gram(pool, query, params.max_weight, result, supports, Finish::kBoth, first, count, stream);
  }
}

}  // namespace hullkit
