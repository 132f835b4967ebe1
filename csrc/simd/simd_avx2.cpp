// SPDX-License-Identifier: Apache-2.0
#define HULLKIT_SIMD_BYTES 32
#include "simd/simd_impl.h"

namespace hullkit {
const Simd kSimdAvx2 = make_simd("avx2");
}  // namespace hullkit
