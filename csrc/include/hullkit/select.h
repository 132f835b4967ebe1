// SPDX-License-Identifier: Apache-2.0
// frank_wolfe and round_multiplicities in one call: the same bits as one after the other, without computing the
// support's Gram matrix a second time.
#pragma once

#include "hullkit/frank_wolfe.h"
#include "hullkit/round_multiplicities.h"

namespace hullkit {

// params.max_weight is rounding.max_multiplicity / rounding.total. counts [B, S] int64 are aligned with result.indices.
// residual_norm [B] float64 is ||query - sum_i (c_i / total) s_i||, what the counts leave of the query; that of the
// weights is in `result`. The CPU computes it from the rows. On a GPU it is the root of a difference of products: there
// it is right to 1e-8 of the norms involved, for half types to 1e-3.
void select_cpu(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                const RoundingParams& rounding, const FrankWolfeResult& result, const TensorView& counts,
                const TensorView& residual_norm, int num_threads);

// The same on a GPU; see frank_wolfe.h. Where frank_wolfe has no Gram matrix, round_multiplicities computes that of the
// support in the same workspace.
void select_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                 const RoundingParams& rounding, const FrankWolfeResult& result, const TensorView& counts,
                 const TensorView& residual_norm, void* workspace, void* stream);
int64_t select_workspace_bytes(const PoolSpec& pool, const FrankWolfeParams& params, const FrankWolfeResult& result);

}  // namespace hullkit
