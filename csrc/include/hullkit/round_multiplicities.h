// SPDX-License-Identifier: Apache-2.0
// Rounds convex weights to an integer multiset: counts c >= 0, sum c = total, with small
//   L(c) = ||query - sum_i (c_i / total) s_i||^2   over the support points s_i.
// Floors of the quotas total * w_i / sum w come first, then greedy completion, then exchange passes (HullFT, arXiv
// 2605.30337), as in exact experimental design.
#pragma once

#include "hullkit/fields.h"
#include "hullkit/pool_spec.h"

namespace hullkit {

struct RoundingParams {
  int64_t total;             // >= 1
  int64_t exchange_passes;   // >= 0
  int64_t max_multiplicity;  // of one support point; total: no limit
};
HULLKIT_FIELDS(RoundingParams, total, exchange_passes, max_multiplicity)

// query [B, d]; indices [B, S] int64 with -1 for padding; weights [B, S] float64, read as in apportion.h; counts [B, S]
// int64, 0 where padded.
// Completion gives each unit to the point where L becomes smallest; the lowest index wins a tie. An exchange moves a
// unit from i to j only while c_i > 0, and only if that lowers L by more than 1e-14. The donors of a pass are the
// counts that are positive as it starts. No count exceeds max_multiplicity, and max_multiplicity times the number of
// support points is at least total. Floors are cut to it, and nothing is added to a count that has reached it. If
// max_multiplicity < total, floors are those of quotas larger by 1e-13 of themselves: a weight at its cap is a whole
// quota, whatever rounding made of it. Numerics: the support's Gram matrix accumulates in float32 (float64 for float64
// input), the rest in float64. Cost: O(m^2 d) for the Gram matrix of m support points, O(m) for a greedy unit, O(m^2)
// for an exchange pass.
void round_multiplicities_cpu(const PoolSpec& pool, const TensorView& query, const TensorView& indices,
                              const TensorView& weights, const RoundingParams& rounding, const TensorView& counts,
                              int num_threads);

// The same on a GPU, for S <= kMaxOnDevice (common/limits.h); for more the workspace query throws NotImplementedError.
// indices, weights and counts are contiguous. An entry that cannot be rounded gets counts of -1: NaN or Inf, an index
// out of range, too few points for max_multiplicity. Workspace: (S + 1)^2 float64 an entry, at most 512 MiB or one
// entry.
void round_multiplicities_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& indices,
                               const TensorView& weights, const RoundingParams& rounding, const TensorView& counts,
                               void* workspace, void* stream);
int64_t round_multiplicities_workspace_bytes(const PoolSpec& pool, const TensorView& indices);

}  // namespace hullkit
