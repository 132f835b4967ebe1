// SPDX-License-Identifier: Apache-2.0
#define HULLKIT_SIMD_BYTES 16
#include "simd/simd_impl.h"

namespace hullkit {
const Simd kSimdPortable = make_simd("portable");
}  // namespace hullkit
