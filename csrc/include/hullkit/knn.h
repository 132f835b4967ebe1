// SPDX-License-Identifier: Apache-2.0
// The k pool rows with the largest inner product with the query, largest first, lowest index on a tie.
#pragma once

#include "hullkit/pool_spec.h"

namespace hullkit {

// query [B, d]; indices [B, k] int64 and values [B, k] float64. An entry with fewer than k valid candidates ends in
// index -1 and value -inf.
// Numerics and cost: as in lmo.h, and a sort of k. Memory: a few times k neighbours for each query in flight.
void knn_cpu(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& values,
             int num_threads);

// The same on a GPU, for n <= kMaxOnDevice or k <= kMaxNeighbours (common/limits.h); else the workspace query throws
// NotImplementedError. Broken entries as in lmo.h. Workspace: at most 512 MiB, or that of 16 entries.
void knn_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& values,
              void* workspace, void* stream);
int64_t knn_workspace_bytes(const PoolSpec& pool, const TensorView& indices);

}  // namespace hullkit
