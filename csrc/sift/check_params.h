// SPDX-License-Identifier: Apache-2.0
// The options of SIFT, checked once for the CPU and the GPU: the operator is called with any.
#pragma once

#include <cmath>

#include "hullkit/check.h"
#include "hullkit/sift.h"

namespace hullkit {

inline void check_params(const SiftParams& params) {
  HULLKIT_CHECK(params.total >= 1, "total: expected an int >= 1, got ", params.total);
  HULLKIT_CHECK(std::isfinite(params.noise) && params.noise > 0.0, "noise: expected a finite number > 0, got ",
                params.noise);
  HULLKIT_CHECK(std::isfinite(params.alpha) && params.alpha >= 0.0, "alpha: expected a finite number >= 0, got ",
                params.alpha);
  HULLKIT_CHECK(params.max_multiplicity >= 1, "max_multiplicity: expected an int >= 1, got ", params.max_multiplicity);
}

}  // namespace hullkit
