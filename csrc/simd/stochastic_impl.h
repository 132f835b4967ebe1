// Stochastic rounding; included by simd_impl.h, and like it once per instruction set. The same bits as the Triton
// kernels' (triton_kernels/multi_tensor.py). Plain loops that compilers make vectors of.
#pragma once

namespace hullkit {
namespace {

// Philox-2x32 with 7 rounds (Salmon et al., 2011: the fewest that pass every test of BigCrush): 64 random bits for each
// of the elements first..first+n of a tensor at this step.
void noise(uint32_t first, uint32_t step, uint32_t key, int64_t n, uint32_t* low, uint32_t* high) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t x = first + static_cast<uint32_t>(i), y = step, k = key;
    for (int round = 0; round < 7; ++round) {
      const uint64_t product = static_cast<uint64_t>(x) * 0xd256d193u;
      x = static_cast<uint32_t>(product >> 32) ^ y ^ k;
      y = static_cast<uint32_t>(product);
      k += 0x9e3779b9u;
    }
    low[i] = x;
    high[i] = y;
  }
}

// Away from 0 with the probability of the part cut off. random[i] >> shift: 16 random bits at least. Infinity and NaN
// (a quiet one) stay.
void round_bf16(const float* in, const uint32_t* random, int shift, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_from_float(in[i]);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    out[i] = static_cast<uint16_t>((bits + (finite ? (random[i] >> shift) & 0xffffu : 0u)) >> 16);
  }
}

// The same; random[i] >> shift: 24 random bits. float16 keeps 10 bits of 23, and below 2^-14 multiples of 2^-24. What
// does not fit is rounded as ever: to infinity.
void round_f16(const float* in, const uint32_t* random, int shift, uint16_t* out, int64_t n) {
  constexpr float kSteps = 16777216.0f;
  constexpr int64_t kMost = 64;
  float kept[kMost];
  for (int64_t at = 0; at < n; at += kMost) {
    const int64_t count = n - at < kMost ? n - at : kMost;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_from_float(in[at + i]), cut = random[at + i] >> shift;
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
