// SPDX-License-Identifier: Apache-2.0
// into += weight * grad over a list of tensors, in float32, and sums of squares for a global norm.
#pragma once

#include "hullkit/tensor_table.h"

namespace hullkit {

// table: its parameters are the accumulators, float32. Returns the sum of their squares afterwards. A block is summed
// in float32, blocks in float64, in an order that does not depend on the number of threads.
double accumulate_cpu(const TensorTable& table, double weight, int num_threads);

// The sum of squares of the gradients, in the same way. Nothing is written.
double squared_norm_cpu(const TensorTable& table, int num_threads);

}  // namespace hullkit
