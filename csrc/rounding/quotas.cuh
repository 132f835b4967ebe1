// SPDX-License-Identifier: Apache-2.0
// Quotas of one prompt's weights, with the bits of the CPU's.
#pragma once

#include <cstdint>

namespace hullkit {

struct Quotas {
  const double* weights;
  int64_t size;
  double sum, total;
  bool broken;  // a weight, or their sum, is not finite

  // Summed left to right by every thread alike.
  __device__ Quotas(const double* weights, int64_t size, int64_t total)
      : weights(weights), size(size), sum(0.0), total(static_cast<double>(total)), broken(false) {
#pragma unroll 4
    for (int64_t i = 0; i < size; ++i) {
      broken |= !isfinite(weights[i]);
      sum += fmax(weights[i], 0.0);
    }
    broken |= !isfinite(sum);
  }

  __device__ double operator[](int64_t i) const {
    return total * (sum > 0.0 ? fmax(weights[i], 0.0) / sum : 1.0 / static_cast<double>(size));
  }
};

}  // namespace hullkit
