// SPDX-License-Identifier: Apache-2.0
// Arithmetic that active_set.h shares between a CPU and a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "frank_wolfe/active_set/cholesky.h"

namespace hullkit {

HULLKIT_DEVICE inline double larger(double a, double b) { return a > b ? a : b; }
HULLKIT_DEVICE inline double smaller(double a, double b) { return a < b ? a : b; }

// The square root or up to 7 % more: half the exponent. A threshold needs no more, and a GPU is slow at roots.
HULLKIT_DEVICE inline double root(double squared) {
  uint64_t bits;
  std::memcpy(&bits, &squared, sizeof(bits));
  bits = (bits >> 1) + (uint64_t{1023} << 51);
  std::memcpy(&squared, &bits, sizeof(bits));
  return squared;
}

}  // namespace hullkit
