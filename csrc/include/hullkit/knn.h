// The k pool rows with the largest inner product with the query, largest first, lowest index on a tie.
#pragma once

#include "hullkit/pool_spec.h"

namespace hullkit {

// query [B, d], indices [B, k] int64 (-1 where fewer than k candidates are valid),
// values [B, k] float64 (-inf there). Numerics as in lmo.h.
void knn_cpu(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& values,
             int num_threads);

// The same on a GPU, for n <= 4096 or k <= 2048; broken entries as in lmo.h. workspace: knn_workspace_bytes,
// at most 512 MiB or 16 entries.
void knn_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& values,
              void* workspace, void* stream);
int64_t knn_workspace_bytes(const PoolSpec& pool, const TensorView& indices);

}  // namespace hullkit
