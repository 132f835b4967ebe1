// SPDX-License-Identifier: Apache-2.0
// k SGD updates with one gradient. For each, with g the gradient times `scale`:
//   g_t = g + l2 * p
//   b   = momentum * b + undamped * g_t      (the first update of a fresh row: b = g_t)
//   p   = p - lr * (g_t + momentum * b  if nesterov, else b)
// Numerics as in adam.h.
#pragma once

#include "hullkit/tensor_table.h"

namespace hullkit {

struct SgdParams {
  double lr, momentum;
  double undamped;  // 1 - dampening
  double l2;        // weight decay
  bool nesterov;
  double scale;  // clipping factor, negative to maximize
  int64_t num_steps;
};

// table: param and, with momentum, its buffer in state1.
void sgd_cpu(const TensorTable& table, const SgdParams& params, int num_threads);

}  // namespace hullkit
