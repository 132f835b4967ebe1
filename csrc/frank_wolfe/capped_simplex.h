// SPDX-License-Identifier: Apache-2.0
// {w : 0 <= w_i <= cap, sum w = 1}: what Frank-Wolfe's weights range over.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "hullkit/frank_wolfe.h"

namespace hullkit {

// What rounding may take from a cap: 1 / 49 of 49 candidates is enough, though 49 times that is less than 1 in floating
// point. Less than 1 / total of any total: a cap of max_multiplicity / total needs ceil(total / max_multiplicity)
// weights, as the integers say.
inline constexpr double kCapSlack = 0x1p-42;

// Weights that a cap > 0 needs to sum to 1.
inline double least_support(double max_weight) {
  return max_weight >= 1.0 ? 1.0 : std::ceil((1.0 - kCapSlack) / max_weight);
}

// A vertex has `size` weights that are not 0: each is the cap, and the last is the rest up to 1. For max_weight >= 1
// there is no cap: this is the simplex, and only a weight of 1 ever meets its bound.
struct CappedSimplex {
  explicit CappedSimplex(double max_weight)
      : size(static_cast<int64_t>(least_support(max_weight))),
        cap(size == 1 ? std::numeric_limits<double>::infinity() : max_weight),
        last(size == 1 ? 1.0 : std::min(1.0 - static_cast<double>(size - 1) * max_weight, max_weight)) {}

  int64_t size;  // at most as many as there are candidates
  double cap;
  double last;
};

}  // namespace hullkit
