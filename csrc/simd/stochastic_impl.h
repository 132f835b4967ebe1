// SPDX-License-Identifier: Apache-2.0
// Stochastic rounding; included by simd_impl.h, and like it once per instruction set. The same bits as the Triton
// kernels' (triton_kernels/multi_tensor.py). Plain loops that compilers make vectors of.
#pragma once

namespace hullkit {
namespace {

// 32 random bits for each of the elements first..first+n of a tensor: a hash of counter and key.
void noise(uint32_t first, uint32_t key, int64_t n, uint32_t* random) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t x = (first + static_cast<uint32_t>(i)) ^ key;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    random[i] = x;
  }
}

// Away from 0 with the probability of the part cut off. Infinity and NaN stay.
inline uint16_t round_one_bf16(float value, uint32_t bits) {
  const uint32_t word = bits_from_float(value);
  return static_cast<uint16_t>((word + (value == value ? bits : 0u)) >> 16);
}

void round_bf16(const float* in, const uint32_t* random, RandomBits bits, uint16_t* out, int64_t n) {
  switch (bits) {
    case RandomBits::kUpper:
      for (int64_t i = 0; i < n; ++i) out[i] = round_one_bf16(in[i], random[i] >> 16);
      break;
    case RandomBits::kLowByte:
      for (int64_t i = 0; i < n; ++i) out[i] = round_one_bf16(in[i], ((random[i] << 8) & 0xff00u) | 0x80u);
      break;
    case RandomBits::kSecondByte:
      for (int64_t i = 0; i < n; ++i) out[i] = round_one_bf16(in[i], (random[i] & 0xff00u) | 0x80u);
      break;
  }
}

// The same with the upper 24 bits. float16 keeps 10 bits of 23, and below 2^-14 multiples of 2^-24. What
// does not fit is rounded as ever: to infinity.
void round_f16(const float* in, const uint32_t* random, uint16_t* out, int64_t n) {
  constexpr float kSteps = 16777216.0f;
  constexpr int64_t kMost = 64;
  float kept[kMost];
  for (int64_t at = 0; at < n; at += kMost) {
    const int64_t count = n - at < kMost ? n - at : kMost;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_from_float(in[at + i]), cut = random[at + i] >> 8;
      const uint32_t magnitude = bits & 0x7fffffffu;
      const uint32_t rounded = magnitude >= 0x477fe000u ? bits : (bits + (cut >> 11)) & 0xffffe000u;
      const bool small = magnitude < 0x38800000u;
      const float steps = float_from_bits(small ? magnitude : 0u) * kSteps + static_cast<float>(cut) * (1.0f / kSteps);
      const float floor = static_cast<float>(static_cast<int32_t>(steps)) * (1.0f / kSteps);
      kept[i] = float_from_bits(small ? bits_from_float(floor) | (bits & 0x80000000u) : rounded);
    }
    narrow_f16(kept, out + at, count);
  }
}

}  // namespace
}  // namespace hullkit
