// SPDX-License-Identifier: Apache-2.0
// The solvers on a GPU. frank_wolfe and select launch them.
#pragma once

#include "frank_wolfe/choose_solver.h"
#include "hullkit/frank_wolfe.h"

namespace hullkit {

// Solver::kRun and Solver::kActiveSet work on entries first, ..., first + count - 1 of a batch and their Gram matrices
// gram [count, n + 1, gram_stride(n)]. They leave the certificates to finish_on_gram. The Cholesky factors of
// active_set_on_gram lie behind the matrices.
void run_on_gram(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                 const FrankWolfeResult& result, int64_t first, int64_t count, double* gram, void* stream);
void active_set_on_gram(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                        const FrankWolfeResult& result, int64_t first, int64_t count, double* gram, void* stream);
int64_t active_set_workspace_bytes(const PoolSpec& pool, const FrankWolfeParams& params,
                                   const FrankWolfeResult& result);

// Solver::kCorpus: the whole batch, certificates included.
void corpus_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                 const FrankWolfeResult& result, void* workspace, void* stream);
int64_t corpus_workspace_bytes(const PoolSpec& pool, const FrankWolfeResult& result);

// run_on_gram or active_set_on_gram, as `solver` says.
inline void solve_on_gram(Solver solver, const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                          const FrankWolfeResult& result, int64_t first, int64_t count, double* gram, void* stream) {
  const auto solve = solver == Solver::kRun ? run_on_gram : active_set_on_gram;
  solve(pool, query, params, result, first, count, gram, stream);
}

}  // namespace hullkit
