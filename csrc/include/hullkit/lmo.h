// SPDX-License-Identifier: Apache-2.0
// Linear minimisation oracle over the hull of each pool:
//   index[b] = argmin_i <direction[b], pool[b, i]>,  value[b] = that minimum; lowest index on a tie.
// `direction` is a gradient: pass minus the residual to find the vertex most aligned with the residual.
#pragma once

#include "hullkit/pool_spec.h"

namespace hullkit {

// direction [B, d], index [B] int64, value [B] float64.
// Numerics: products accumulate in float32 (float64 for float64 input), in an order that depends on d alone.
// Cost: B n d multiply-adds; a pool that the batch shares is read once for a group of directions (pool/products.h).
void lmo_cpu(const PoolSpec& pool, const TensorView& direction, const TensorView& index, const TensorView& value,
             int num_threads);

// The same on a GPU: one pass over the pool for every 16 directions that share it. An entry with NaN or Inf, without a
// candidate, or with lengths or candidates out of range is broken: it gets index -1 and value NaN.
void lmo_cuda(const PoolSpec& pool, const TensorView& direction, const TensorView& index, const TensorView& value,
              void* workspace, void* stream);
int64_t lmo_workspace_bytes(const PoolSpec& pool);

}  // namespace hullkit
