// Linear minimisation oracle over the hull of each pool:
//   index[b] = argmin_i <direction[b], pool[b, i]>,  value[b] = that minimum; lowest index on a tie.
// `direction` is a gradient: pass minus the residual to find the vertex most aligned with the residual.
#pragma once

#include "hullkit/pool_spec.h"

namespace hullkit {

// direction [B, d], index [B] int64, value [B] float64.
// Products accumulate in float32 (float64 for float64 input), in an order that depends on d alone.
void lmo_cpu(const PoolSpec& pool, const TensorView& direction, const TensorView& index, const TensorView& value,
             int num_threads);

}  // namespace hullkit
