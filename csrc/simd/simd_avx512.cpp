// SPDX-License-Identifier: Apache-2.0
#define HULLKIT_SIMD_BYTES 64
#include "simd/simd_impl.h"

namespace hullkit {
const Simd kSimdAvx512 = make_simd("avx512");
}  // namespace hullkit
