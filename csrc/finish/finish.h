// The last launch of what works on Gram matrices.
#pragma once

#include "hullkit/frank_wolfe.h"
#include "rounding/rounding_cuda.h"

namespace hullkit {

enum class Finish { kCertify = 1, kRound = 2, kBoth = 3 };

// Of entries first, ..., first + count - 1: the certificates of `result`, which frank_wolfe_on_gram left open, rounded
// counts of its supports, or both.
void finish_on_gram(const PoolSpec& pool, const TensorView& query, double max_weight, const FrankWolfeResult& result,
                    const Supports& supports, Finish what, int64_t first, int64_t count, void* stream);

}  // namespace hullkit
