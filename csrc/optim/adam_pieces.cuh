// SPDX-License-Identifier: Apache-2.0
// Pieces of 16 bytes of parameters and of their moments: read, updated (adam_update.cuh), rounded.
#pragma once

#include <cstring>

#include "optim/adam_update.cuh"

namespace hullkit {

// What parameters are. Moments of halves are bfloat16, others float32; all but bfloat16 parameters have copies.
enum class Kind { kBfloat16, kFloat16, kFloat32 };

__device__ inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

struct Piece {
  uint4 param, exp_avg, exp_avg_sq;
};

__device__ inline uint32_t word(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// An element of 16 bytes.
template <Kind kKind>
__device__ inline float element(const uint4& vector, int i) {
  if constexpr (kKind == Kind::kFloat32) {
    return __uint_as_float(word(vector, i));
  } else {
    const uint16_t bits = static_cast<uint16_t>(word(vector, i / 2) >> (i % 2 * 16));
    return kKind == Kind::kBfloat16 ? from_bf16(bits) : ptx::from_f16(bits);
  }
}

// What becomes of updated elements: they are written as they are, or rounded. `element` is the first one's place.
template <Kind kKind, bool kStochastic>
struct Rounded {
  uint4 param, exp_avg, exp_avg_sq;

  template <int kN>
  __device__ Rounded(const Moving<kN>& x, int64_t element, uint32_t key) {
    if constexpr (kKind == Kind::kFloat32) {
      memcpy(&param, x.param, sizeof(param));
      memcpy(&exp_avg, x.exp_avg, sizeof(exp_avg));
      memcpy(&exp_avg_sq, x.exp_avg_sq, sizeof(exp_avg_sq));
    } else {
      uint32_t params[4], means[4], squares[4];
      const uint32_t begin = static_cast<uint32_t>(element) ^ key;  // an element's lower bits are its place among kN
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int low = 2 * i, high = 2 * i + 1;
        if constexpr (kStochastic) {
          const uint32_t one = mix(begin ^ low), two = mix(begin ^ high);
          if constexpr (kKind == Kind::kBfloat16) {
            params[i] = upper_halves(rounded_bf16(x.param[low], one >> 16), rounded_bf16(x.param[high], two >> 16));
          } else {
            params[i] = pair(round_f16(x.param[low], one >> 8), round_f16(x.param[high], two >> 8));
          }
          // Without a look for NaN, which would be the last of a query: its gradient is told of.
          means[i] = upper_halves(__float_as_uint(x.exp_avg[low]) + ((one << 8 & 0xFF00u) | 0x80u),
                                  __float_as_uint(x.exp_avg[high]) + ((two << 8 & 0xFF00u) | 0x80u));
          squares[i] = upper_halves(__float_as_uint(x.exp_avg_sq[low]) + ((one & 0xFF00u) | 0x80u),
                                    __float_as_uint(x.exp_avg_sq[high]) + ((two & 0xFF00u) | 0x80u));
        } else {
          params[i] = kKind == Kind::kBfloat16 ? ptx::to_bf16_pair(x.param[low], x.param[high])
                                               : pair(ptx::to_f16(x.param[low]), ptx::to_f16(x.param[high]));
          means[i] = ptx::to_bf16_pair(x.exp_avg[low], x.exp_avg[high]);
          squares[i] = ptx::to_bf16_pair(x.exp_avg_sq[low], x.exp_avg_sq[high]);
        }
      }
      param = make_uint4(params[0], params[1], params[2], params[3]);
      exp_avg = make_uint4(means[0], means[1], means[2], means[3]);
      exp_avg_sq = make_uint4(squares[0], squares[1], squares[2], squares[3]);
    }
  }

 private:
  __device__ static uint32_t upper_halves(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7632); }
  __device__ static uint32_t pair(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }
};

}  // namespace hullkit
