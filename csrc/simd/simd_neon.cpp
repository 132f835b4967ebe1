// SPDX-License-Identifier: Apache-2.0
#define HULLKIT_SIMD_BYTES 16
#define HULLKIT_SIMD_NEON
#include "simd/simd_impl.h"

namespace hullkit {
const Simd kSimdNeon = make_simd("neon");
}  // namespace hullkit
