// SPDX-License-Identifier: Apache-2.0
// Sizes at which GPU kernels stop. Headers name these constants, error messages print them.
#pragma once

#include <cstdint>
#include <limits>

namespace hullkit {

// Candidates of a prompt that has a Gram matrix, or points of a support.
inline constexpr int64_t kMaxOnDevice = 4096;

// Neighbours of one query among more than kMaxOnDevice candidates.
inline constexpr int64_t kMaxNeighbours = 2048;

// A float64 product that sums are made of: a few of the largest are finite still.
inline constexpr double kLargestProduct = std::numeric_limits<double>::max() / 16;

}  // namespace hullkit
