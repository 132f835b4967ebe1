// SPDX-License-Identifier: Apache-2.0
// Largest-remainder apportionment (Hamilton): counts_i is the floor of the quota total * w_i / sum w, plus
// one for the largest remainders (lowest index on a tie) until the counts sum to total.
#pragma once

#include "hullkit/tensor_view.h"

namespace hullkit {

// weights [B, S] float64, counts [B, S] int64, total >= 1. A negative weight counts as 0; weights that are all 0 count
// as equal. Quotas and remainders are float64. Cost: O(S log S) an entry.
void apportion_cpu(const TensorView& weights, int64_t total, const TensorView& counts, int num_threads);

// The same on a GPU, with contiguous weights and counts. An entry that is not finite, or whose quotas float64 cannot
// sum to total, gets counts of -1.
void apportion_cuda(const TensorView& weights, int64_t total, const TensorView& counts, void* stream);

// quotas[i] = total * weights[i] / sum(weights), summed left to right so that every caller rounds alike.
void quotas(const double* weights, int64_t count, int64_t total, double* quotas);

}  // namespace hullkit
