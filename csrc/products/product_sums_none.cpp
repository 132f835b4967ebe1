// SPDX-License-Identifier: Apache-2.0
// The answer of a build without code for Hopper.
#include <stdexcept>

#include "hullkit/product_sums.h"

namespace hullkit {

bool product_sums_usable() { return false; }

void product_sums_cuda(const ProductSums&, void*) {
  throw std::logic_error("product_sums: built without code for sm_90");
}

}  // namespace hullkit
