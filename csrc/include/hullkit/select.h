// frank_wolfe and round_multiplicities in one call: the same bits as one after the other, without computing the
// support's Gram matrix a second time.
#pragma once

#include "hullkit/frank_wolfe.h"

namespace hullkit {

// counts [B, S] int64, aligned with result.indices; total and exchange_passes as in round_multiplicities.h.
void select_cpu(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params, int64_t total,
                int64_t exchange_passes, const FrankWolfeResult& result, const TensorView& counts, int num_threads);

// The same on a GPU; see frank_wolfe.h. More than 4096 candidates: workspace for frank_wolfe_corpus_cuda and for
// round_multiplicities_cuda of the support, one after the other.
void select_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params, int64_t total,
                 int64_t exchange_passes, const FrankWolfeResult& result, const TensorView& counts, void* workspace,
                 void* stream);

}  // namespace hullkit
