// into += weight * grad over a list of tensors, in float32, and sums of squares for a global norm.
#pragma once

#include "hullkit/tensor_table.h"

namespace hullkit {

// table: float32 accumulators as parameters. Returns the sum of squares of the accumulators afterwards: float32
// within a block, float64 across, in an order that does not depend on the number of threads.
double accumulate_cpu(const TensorTable& table, double weight, int num_threads);

// The same sum over the gradients.
double squared_norm_cpu(const TensorTable& table, int num_threads);

}  // namespace hullkit
