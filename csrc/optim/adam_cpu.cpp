// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>

#include "common/dtype.h"
#include "hullkit/adam.h"
#include "hullkit/check.h"
#include "optim/chunks.h"

namespace hullkit {
namespace {

uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// The key of one tensor's noise at one step, as the Triton kernel has it. first: an element, whose upper half counts.
uint32_t noise_key(uint64_t seed, uint32_t salt, uint32_t step, int64_t first) {
  constexpr uint32_t kIncrement = 0x9e3779b9u;
  uint32_t key = mix(static_cast<uint32_t>(seed) + kIncrement);
  key = mix((key ^ static_cast<uint32_t>(seed >> 32)) + kIncrement);
  key = mix((key ^ salt) + kIncrement);
  key = mix((key ^ step) + kIncrement);
  return mix((key ^ static_cast<uint32_t>(static_cast<uint64_t>(first) >> 32)) + kIncrement);
}

// Coefficients that all elements of a tensor share, for k updates from `step` on.
template <typename T>
struct Coefficients {
  Coefficients(const AdamParams& params, double from) : step(from) {
    for (int64_t i = 1; i <= params.num_steps; ++i) {
      const double root2 = std::sqrt(1.0 - std::pow(params.beta2, step + static_cast<double>(i)));
      const double bias1 = 1.0 - std::pow(params.beta1, step + static_cast<double>(i));
      sizes.push_back(static_cast<T>(params.lr * root2 / bias1));
      // Not 0 where eps is not: 0 / 0 is NaN. The quotient knows denormal divisors.
      const T damping = static_cast<T>(params.eps * root2);
      dampings.push_back(params.eps > 0.0 ? std::max(damping, std::numeric_limits<T>::denorm_min()) : damping);
    }
  }
  double step;
  std::vector<T> sizes, dampings;
};

template <typename T>
void run(const TensorTable& table, const AdamParams& params, int num_threads) {
  std::vector<Coefficients<T>> coefficients;  // one for every number of steps taken
  std::vector<size_t> which(table.count);
  for (int64_t row = 0; row < table.count; ++row) {
    const double step = *reinterpret_cast<const float*>(table.rows[row].step);
    size_t at = 0;
    while (at < coefficients.size() && coefficients[at].step != step) ++at;
    if (at == coefficients.size()) coefficients.emplace_back(params, step);
    which[row] = at;
  }
  const int64_t block = params.stochastic_rounding ? kBlock : block_size<T>(table, true);
  for_each_chunk(table, num_threads, [&](int64_t, int64_t index, int64_t begin, int64_t count) {
    const TensorRow& row = table.rows[index];
    const Coefficients<T>& own = coefficients[which[index]];
    const bool fast1 = params.beta1 < 0.5;
    const AdamUpdate<T> update = {static_cast<T>(params.scale),
                                  static_cast<T>(fast1 ? -params.beta1 : 1.0 - params.beta1),
                                  static_cast<T>(params.beta2),
                                  static_cast<T>(1.0 - params.beta2),
                                  static_cast<T>(params.l2),
                                  static_cast<T>(1.0 - params.lr * params.decay),
                                  fast1,
                                  own.sizes.data(),
                                  own.dampings.data(),
                                  params.num_steps};
    Elements<T> param(row.param, table.param_dtype), grad(table.grads[index], table.grad_dtype);
    Elements<T> exp_avg(row.state1, table.state_dtype), exp_avg_sq(row.state2, table.state_dtype);
    const auto step = static_cast<uint32_t>(own.step + static_cast<double>(params.num_steps));
    const uint32_t key = noise_key(params.seed, row.salt(), step, begin);
    uint32_t random[kBlock];
    for (int64_t at = begin; at < begin + count; at += block) {
      const int64_t n = std::min(block, begin + count - at);
      simd().ops<T>().adam(param.load(at, n), grad.load(at, n), exp_avg.load(at, n), exp_avg_sq.load(at, n), n, update);
      if constexpr (std::is_same_v<T, float>) {
        if (params.stochastic_rounding) {
          simd().noise(static_cast<uint32_t>(at), key, n, random);
          param.store_stochastically(at, n, random, RandomBits::kUpper);
          exp_avg.store_stochastically(at, n, random, RandomBits::kLowByte);
          exp_avg_sq.store_stochastically(at, n, random, RandomBits::kSecondByte);
          continue;
        }
      }
      param.store(at, n);
      exp_avg.store(at, n);
      exp_avg_sq.store(at, n);
    }
  });
  for (int64_t row = 0; row < table.count; ++row) {
    const double step = coefficients[which[row]].step + static_cast<double>(params.num_steps);
    *reinterpret_cast<float*>(table.rows[row].step) = static_cast<float>(step);
  }
}

}  // namespace

void adam_cpu(const TensorTable& table, const AdamParams& params, int num_threads) {
  const auto half = [](DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; };
  HULLKIT_CHECK(!params.stochastic_rounding || (half(table.param_dtype) && table.state_dtype == DType::kBFloat16),
                "stochastic_rounding: expected half-precision parameters and bfloat16 moments, got another dtype");
  with_compute_type(table.param_dtype, [&](auto type) { run<decltype(type)>(table, params, num_threads); });
}

}  // namespace hullkit
