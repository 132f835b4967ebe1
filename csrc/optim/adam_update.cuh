// SPDX-License-Identifier: Apache-2.0
// Adam's updates of single elements on a GPU, in float32: the arithmetic of `_moved_often` in triton_kernels/adam.py
// and the rounding of triton_kernels/multi_tensor.py, operation by operation, where their reasons are. Without weight
// decay. A test compares the bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/primitives/ptx.cuh"

namespace hullkit {

// What all elements of a launch share. An update has two coefficients: its step size, and what its root is damped by.
struct AdamSteps {
  float beta1, rest1, beta2, rest2;
  int num_steps;
  float2 first, second;  // the coefficients of the first two updates
  const float2* all;     // of every update
  bool pairs;            // whether two updates may share one reciprocal
};

// Some elements of one thread. All take an update together, so that none waits for its own last result.
template <int kCount>
struct Moving {
  float param[kCount], exp_avg[kCount], exp_avg_sq[kCount], grad[kCount];
};

// Moments of a half. No square overflows, and both are of the bounded gradient.
__device__ inline void move_moments(float& exp_avg, float& exp_avg_sq, float grad, const AdamSteps& steps) {
  const float bounded = __fmaf_rn(grad, 0.0f, fmaxf(fminf(grad, 1e17f), -1e17f));
  exp_avg = __fmaf_rn(exp_avg, steps.beta1, __fmul_rn(bounded, steps.rest1));
  exp_avg_sq = __fmaf_rn(exp_avg_sq, steps.beta2, __fmul_rn(__fmul_rn(bounded, steps.rest2), bounded));
}

// Two updates of halves, which share one reciprocal.
template <int kCount>
__device__ inline void move_twice(Moving<kCount>& x, float2 one, float2 two, const AdamSteps& steps) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    move_moments(x.exp_avg[i], x.exp_avg_sq[i], x.grad[i], steps);
    const float move = __fmul_rn(one.x, x.exp_avg[i]);
    const float root = __fadd_rn(ptx::approximate_root(x.exp_avg_sq[i]), one.y);
    move_moments(x.exp_avg[i], x.exp_avg_sq[i], x.grad[i], steps);
    const float next_move = __fmul_rn(two.x, x.exp_avg[i]);
    const float next_root = __fadd_rn(ptx::approximate_root(x.exp_avg_sq[i]), two.y);
    float inverse = ptx::approximate_inverse_root(__fmul_rn(root, next_root));
    inverse = __fmul_rn(inverse, inverse);
    const float moves = __fmaf_rn(next_move, root, __fmul_rn(move, next_root));
    x.param[i] = __fmaf_rn(-moves, inverse, x.param[i]);
  }
}

template <int kCount>
__device__ inline void move_halves(Moving<kCount>& x, const AdamSteps& steps) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x.exp_avg_sq[i] = ptx::least_or_nan(x.exp_avg_sq[i], 3e38f);
  int step = 0;
  if (steps.pairs && steps.num_steps > 1) {
    move_twice(x, steps.first, steps.second, steps);
    for (step = 2; step + 1 < steps.num_steps; step += 2) {
      move_twice(x, __ldg(steps.all + step), __ldg(steps.all + step + 1), steps);
    }
  }
  for (; step < steps.num_steps; ++step) {
    const float2 one = __ldg(steps.all + step);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      move_moments(x.exp_avg[i], x.exp_avg_sq[i], x.grad[i], steps);
      const float root = __fadd_rn(ptx::approximate_root(x.exp_avg_sq[i]), one.y);
      float inverse = __int_as_float(0x7EF311C7 - __float_as_int(root));
      const float rest = __fmaf_rn(-root, inverse, 1.0f);
      inverse = __fmaf_rn(__fmaf_rn(rest, rest, rest), inverse, inverse);
      inverse = __fmaf_rn(__fmaf_rn(-root, inverse, 1.0f), inverse, inverse);
      x.param[i] = __fmaf_rn(__fmul_rn(-one.x, x.exp_avg[i]), inverse, x.param[i]);
    }
  }
}

template <int kCount>
__device__ inline void move_floats(Moving<kCount>& x, const AdamSteps& steps) {
  const bool low = steps.beta1 < 0.5f;
  const float blend = low ? -steps.beta1 : steps.rest1;
  for (int step = 0; step < steps.num_steps; ++step) {
    const float2 one = step == 0 ? steps.first : step == 1 ? steps.second : __ldg(steps.all + step);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float grad = x.grad[i], start = low ? grad : x.exp_avg[i];
      x.exp_avg[i] = __fmaf_rn(__fadd_rn(grad, -x.exp_avg[i]), blend, start);
      x.exp_avg_sq[i] = __fmaf_rn(__fmul_rn(grad, steps.rest2), grad, __fmul_rn(x.exp_avg_sq[i], steps.beta2));
      const float root = fminf(__fadd_rn(ptx::approximate_root(x.exp_avg_sq[i]), one.y), 3e38f);
      float inverse = ptx::approximate_inverse_root(root);
      inverse = __fmul_rn(inverse, inverse);
      inverse = __fmaf_rn(__fmaf_rn(-root, inverse, 1.0f), inverse, inverse);
      x.param[i] = __fmaf_rn(__fmul_rn(-one.x, x.exp_avg[i]), inverse, x.param[i]);
    }
  }
}

// Stochastic rounding: random bits of an element, and what is rounded with them.
__device__ inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

// The key of a tensor of fewer than 2^32 elements.
__device__ inline uint32_t noise_key(uint64_t seed, uint32_t salt, float step) {
  constexpr uint32_t kMore = 0x9E3779B9u;
  uint32_t key = mix(static_cast<uint32_t>(seed) + kMore);
  key = mix((key ^ static_cast<uint32_t>(seed >> 32)) + kMore);
  key = mix((key ^ salt) + kMore);
  key = mix((key ^ static_cast<uint32_t>(step)) + kMore);
  return mix(key + kMore);
}

// The upper half of this word is the bfloat16.
__device__ inline uint32_t rounded_bf16(float value, uint32_t bits) {
  uint32_t word = __float_as_uint(value);
  if (value == value) word += bits;
  return word;
}

__device__ inline uint16_t round_f16(float value, uint32_t bits) {
  const uint32_t word = __float_as_uint(value);
  const bool large = (word & 0x7FFFFFFFu) >= 0x477FE000u;
  const uint32_t kept = large ? word : (word + (bits >> 11)) & 0xFFFFE000u;
  float small = floorf(fabsf(value) * 16777216.0f + static_cast<float>(bits) * (1.0f / 16777216.0f));
  small *= 1.0f / 16777216.0f;
  if (value < 0.0f) small = -small;
  return ptx::to_f16(fabsf(value) < 6.103515625e-05f ? small : __uint_as_float(kept));
}

}  // namespace hullkit
