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

// The power of two below a positive number, or some small one if that is denormal.
HULLKIT_DEVICE inline double power_of_two(double number) {
  uint64_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  bits &= uint64_t{0x7ff} << 52;
  std::memcpy(&number, &bits, sizeof(bits));
  return number > 0.0 ? number : 0x1p-1050;
}

}  // namespace hullkit
