// SPDX-License-Identifier: Apache-2.0
// The last launch of frank_wolfe, round_multiplicities and select on Gram matrices. It certifies a result, rounds it,
// or does both side by side. It uses their kernels (frank_wolfe/certify.cuh, rounding/round.cuh); their launchers use
// it.
#pragma once

#include "hullkit/frank_wolfe.h"
#include "rounding/rounding_cuda.h"

namespace hullkit {

enum class Finish { kCertify = 1, kRound = 2, kBoth = 3 };

// For entries first, ..., first + count - 1: the certificates of `result`, which the solver left open, the counts of
// `supports`, or both.
void finish_on_gram(const PoolSpec& pool, const TensorView& query, double max_weight, const FrankWolfeResult& result,
                    const Supports& supports, Finish what, int64_t first, int64_t count, void* stream);

}  // namespace hullkit
