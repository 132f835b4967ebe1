// The k pool rows with the largest inner product with the query, largest first, lowest index on a tie.
#pragma once

#include "hullkit/pool_spec.h"

namespace hullkit {

// query [B, d], indices [B, k] int64 (-1 where fewer than k candidates are valid),
// values [B, k] float64 (-inf there). Numerics as in lmo.h.
void knn_cpu(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& values,
             int num_threads);

}  // namespace hullkit
