// SPDX-License-Identifier: Apache-2.0
// k Adam updates with one gradient. For t = step + 1, ..., step + k, with g the gradient times `scale`:
//   g_t = g + l2 * p
//   m   = beta1 * m + (1 - beta1) * g_t
//   v   = beta2 * v + (1 - beta2) * g_t^2
//   p   = (1 - lr * decay) * p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// Every element is read once, updated k times in registers, written once.
// Arithmetic is float64 for float64 parameters, else float32; coefficients are computed in float64. Half-precision
// parameters and moments are rounded once, at the end. The result does not depend on the number of threads.
#pragma once

#include "hullkit/tensor_table.h"

namespace hullkit {

struct AdamParams {
  double lr, beta1, beta2, eps;
  double l2;     // weight decay added to the gradient
  double decay;  // decoupled weight decay
  double scale;  // clipping factor, negative to maximize
  int64_t num_steps;
  bool stochastic_rounding;  // half-precision parameters and moments go up or down at random, right on average
  uint64_t seed;             // of this noise, a hash of the seed, the tensor's salt, the element and the step
};

// table: param, exp_avg, exp_avg_sq, step. Steps are advanced by num_steps.
void adam_cpu(const TensorTable& table, const AdamParams& params, int num_threads);

}  // namespace hullkit
