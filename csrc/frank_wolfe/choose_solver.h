// SPDX-License-Identifier: Apache-2.0
// Which solver takes a Frank-Wolfe problem. The workspace query and the launchers of frank_wolfe and select all ask
// here, so that they cannot disagree.
#pragma once

#include "common/limits.h"
#include "hullkit/frank_wolfe.h"

namespace hullkit {

enum class Solver {
  kRun,        // run/: the vanilla variant over the simplex
  kActiveSet,  // active_set/: the other variants and a cap on the weights; on a GPU gap_tol too
  kCorpus,     // corpus/: what kRun does, on a GPU, for more candidates than a Gram matrix has room for
};

inline Solver choose_solver_cpu(const FrankWolfeParams& params) {
  return params.variant == Variant::kVanilla && params.max_weight >= 1.0 ? Solver::kRun : Solver::kActiveSet;
}

inline Solver choose_solver_cuda(const FrankWolfeParams& params, int64_t positions) {
  const bool small = positions <= kMaxOnDevice;
  if (choose_solver_cpu(params) == Solver::kRun && params.gap_tol < 0.0) return small ? Solver::kRun : Solver::kCorpus;
  HULLKIT_SUPPORTED(small, "pool: expected at most ", kMaxOnDevice,
                    " candidates on a CUDA device for a variant other than 'vanilla', gap_tol, max_weight or "
                    "max_multiplicity, got ",
                    positions, ". Pass candidates (of hullkit.knn, for instance), or move the inputs with .cpu()");
  return Solver::kActiveSet;
}

}  // namespace hullkit
