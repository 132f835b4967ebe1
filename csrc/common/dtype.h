// SPDX-License-Identifier: Apache-2.0
// From a dtype at run time to an arithmetic type at compile time.
#pragma once

#include "hullkit/tensor_view.h"

namespace hullkit {

// Arithmetic type of an input type: float64 stays, everything else is float32.
inline bool computes_in_double(DType dtype) { return dtype == DType::kFloat64; }

// Calls kernel(T{}) with T the arithmetic type.
template <typename Kernel>
void with_compute_type(DType dtype, Kernel&& kernel) {
  if (computes_in_double(dtype)) {
    kernel(double{});
  } else {
    kernel(float{});
  }
}

}  // namespace hullkit
