// SPDX-License-Identifier: Apache-2.0
// How a residual is handed to the pass. Rows of float64 and float32 are multiplied with it in float64. Tensor cores
// multiply halves with halves only, so for half-precision rows the residual becomes halves, too. It is scaled so that
// its largest coordinate is about 2^kExponent: then no float16 vanishes and no product overflows. It is split into
// pieces of 11 bits (float16) or 8 bits (bfloat16), 22 and 24 bits in all: as good as the float32 sums of these
// products.
#pragma once

#include "cuda/primitives/device_pool.cuh"

namespace hullkit {

template <typename E>
struct Residual {
  using Column = double;
  static constexpr int kPieces = 1, kExponent = 0;
  static constexpr bool kScaled = false;
  __device__ static double round(double value) { return value; }
};
template <>
struct Residual<Float16> {
  using Column = Float16;
  static constexpr int kPieces = 2, kExponent = 14;
  static constexpr bool kScaled = true;
  __device__ static Float16 round(double value) { return {ptx::to_f16(static_cast<float>(value))}; }
};
template <>
struct Residual<BFloat16> {
  using Column = BFloat16;
  static constexpr int kPieces = 3, kExponent = 0;
  static constexpr bool kScaled = true;
  __device__ static BFloat16 round(double value) { return {ptx::to_bf16(static_cast<float>(value))}; }
};

}  // namespace hullkit
