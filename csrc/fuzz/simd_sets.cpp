// SPDX-License-Identifier: Apache-2.0
// Every set of kernels that this processor has, against the same sums written element by element: the order of
// summation that simd.h promises, to the bit. `check_simd NAME` runs that set even where the processor lacks it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "simd/simd.h"

namespace hullkit {
namespace {

std::mt19937_64 random_bits{1};
int64_t checks = 0;

// What a set's name says about its arithmetic.
struct Model {
  std::string name;
  int bytes;
  bool fused;

  template <typename T>
  T multiply_add(T a, T b, T c) const {
    return fused ? std::fma(a, b, c) : a * b + c;
  }

  // Upper half onto lower half.
  template <typename T>
  T sum_lanes(std::vector<T> lanes) const {
    for (size_t half = lanes.size() / 2; half > 0; half /= 2) {
      for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }

  template <typename T>
  T dot(const T* x, const T* y, int64_t d) const {
    const int64_t lanes = bytes / sizeof(T), whole = d / lanes * lanes;
    std::vector<T> sums(lanes);
    for (int64_t j = 0; j < whole; ++j) sums[j % lanes] = multiply_add(x[j], y[j], sums[j % lanes]);
    T sum = sum_lanes(sums);
    for (int64_t j = whole; j < d; ++j) sum += x[j] * y[j];
    return sum;
  }
};

void require(bool promise, const Model& model, const char* what, int64_t size) {
  ++checks;
  if (promise) return;
  std::fprintf(stderr, "%s: %s is another one than the model's at size %lld\n", model.name.c_str(), what,
               static_cast<long long>(size));
  std::exit(1);
}

template <typename T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0 || (a != a && b != b);
}

template <typename T>
std::vector<T> values(int64_t n) {
  std::uniform_real_distribution<double> uniform(-1, 1);
  std::vector<T> made(n);
  for (T& value : made) value = static_cast<T>(uniform(random_bits));
  return made;
}

template <typename T>
void check_dots(const Simd& simd, const Model& model, int64_t d) {
  constexpr int64_t kRows = 9;
  std::vector<std::vector<T>> data;
  std::vector<const T*> rows;
  for (int64_t i = 0; i < kRows + kMaxDotVectors; ++i) rows.push_back(data.emplace_back(values<T>(d)).data());
  const T* const* vectors = rows.data() + kRows;
  const SimdOps<T>& ops = simd.ops<T>();
  for (int count = 1; count <= kMaxDotVectors; ++count) {
    std::vector<T> packed(count * d);
    ops.pack(vectors, count, d, packed.data());
    for (int64_t n = 1; n <= kRows; ++n) {
      std::vector<T> out(count * n);
      std::vector<T*> to;
      for (int k = 0; k < count; ++k) to.push_back(out.data() + k * n);
      ops.dots(rows.data(), n, packed.data(), count, d, to.data());
      for (int k = 0; k < count; ++k) {
        for (int64_t i = 0; i < n; ++i)
          require(same(to[k][i], model.dot(rows[i], vectors[k], d)), model, "a dot product", d);
      }
    }
  }
  std::vector<T> squares(kRows);
  ops.squares(rows.data(), kRows, d, squares.data());
  for (int64_t i = 0; i < kRows; ++i) require(same(squares[i], model.dot(rows[i], rows[i], d)), model, "a square", d);

  const std::vector<double> start = values<double>(d), weights = values<double>(kRows);
  std::vector<double> sums = start;
  ops.add_scaled(sums.data(), rows.data(), weights.data(), kRows, d);
  for (int64_t j = 0; j < d; ++j) {
    double sum = start[j];
    for (int64_t t = 0; t < kRows; ++t) sum = model.multiply_add(weights[t], double{rows[t][j]}, sum);
    require(same(sums[j], sum), model, "a weighted sum", d);
  }

  std::vector<T> difference(d);
  double along, bound = 0, square = 0, product = 0;
  const double norm = ops.subtract(rows[0], start.data(), d, difference.data(), &along);
  for (int64_t j = 0; j < d; ++j) {
    const double delta = double{rows[0][j]} - start[j];
    require(same(difference[j], static_cast<T>(delta)), model, "a difference", d);
    square += delta * delta;
    product += delta * start[j];
    bound += 1e-15 * (delta * delta + std::abs(delta * start[j]));
  }
  require(std::abs(norm - square) <= d * bound && std::abs(along - product) <= d * bound, model, "a norm", d);
}

void check_scores(const Simd& simd, const Model& model, int64_t n) {
  std::vector<double> scores = values<double>(n), target = values<double>(n);
  const double step = 0.3;
  if (n > 5) scores[n - 1] = scores[n / 2] = 3, target[n - 1] = target[n / 2] = 4;  // a tie for the first place
  std::vector<double> moved(n);
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i) {
    moved[i] = model.multiply_add(1.0 - step, scores[i], step * target[i]);
    if (moved[i] > moved[first]) first = i;
  }
  require(simd.advance(scores.data(), target.data(), step, n) == first, model, "the first score", n);
  for (int64_t i = 0; i < n; ++i) require(same(scores[i], moved[i]), model, "a score", n);
  simd.scale(scores.data(), 0.7, n);
  for (int64_t i = 0; i < n; ++i) require(same(scores[i], 0.7 * moved[i]), model, "a scaled value", n);
}

void check_gains(const Simd& simd, const Model& model, int64_t n) {
  constexpr int64_t kVectors = 3;
  std::vector<double> products = values<double>(kVectors * n), variances = values<double>(n),
                      column = values<double>(n);
  const std::vector<double> moves = values<double>(kVectors), bars = values<double>(n);
  std::vector<double> gains(n), expected(n), all = products, spread = variances;
  const double shrink = 0.2, noise = 0.5;
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i) {
    spread[i] = model.multiply_add(-shrink * column[i], column[i], spread[i]);
    double reduction = 0;
    for (int64_t k = 0; k < kVectors; ++k) {
      double& product = all[k * n + i];
      product = model.multiply_add(-moves[k], column[i], product);
      reduction = model.multiply_add(product, product, reduction);
    }
    expected[i] = reduction / (std::max(spread[i], 0.0) + noise) + bars[i];
    if (expected[i] > expected[first]) first = i;
  }
  const int64_t found = simd.condition(products.data(), kVectors, variances.data(), column.data(), moves.data(), shrink,
                                       noise, bars.data(), gains.data(), n);
  require(found == first, model, "the first gain", n);
  for (int64_t i = 0; i < n; ++i) {
    require(same(gains[i], expected[i]) && same(variances[i], spread[i]), model, "a gain", n);
  }
  for (int64_t i = 0; i < kVectors * n; ++i) require(same(products[i], all[i]), model, "a conditioned product", n);
}

template <typename T>
void check_updates(const Simd& simd, const Model& model, int64_t n) {
  const SimdOps<T>& ops = simd.ops<T>();
  const std::vector<T> grad = values<T>(n), start = values<T>(n), buffers = values<T>(n);
  const SgdUpdate<T> sgd{T(0.5), T(0.1), T(0.9), T(0.8), T(0.01), true, false, 3};
  std::vector<T> param = start, buffer = buffers;
  ops.sgd(param.data(), grad.data(), buffer.data(), n, sgd);
  for (int64_t i = 0; i < n; ++i) {
    T value = start[i], momentum = buffers[i];
    for (int64_t s = 0; s < sgd.num_steps; ++s) {
      const T total = model.multiply_add(value, sgd.l2, grad[i] * sgd.scale);
      momentum = model.multiply_add(total, sgd.undamped, momentum * sgd.momentum);
      value = model.multiply_add(model.multiply_add(momentum, sgd.momentum, total), -sgd.lr, value);
    }
    require(same(param[i], value) && same(buffer[i], momentum), model, "a step of SGD", n);
  }

  const std::vector<T> sizes{T(0.1), T(0.05)}, dampings{T(1e-8), T(1e-8)};
  const AdamUpdate<T> adam{T(0.5), T(0.1), T(0.9), T(0.1), T(0), T(0.99), false, sizes.data(), dampings.data(), 2};
  std::vector<T> mean = values<T>(n), square(n, T(0.25)), means = mean, squares = square;
  param = start;
  ops.adam(param.data(), grad.data(), mean.data(), square.data(), n, adam);
  for (int64_t i = 0; i < n; ++i) {
    T value = start[i];
    for (int64_t s = 0; s < adam.num_steps; ++s) {
      const T g = grad[i] * adam.scale;
      means[i] = model.multiply_add(g - means[i], adam.blend1, means[i]);
      squares[i] = model.multiply_add(g * adam.rest2, g, squares[i] * adam.beta2);
      value = value * adam.keep - sizes[s] * means[i] / (std::sqrt(squares[i]) + dampings[s]);
    }
    require(same(mean[i], means[i]) && same(square[i], squares[i]), model, "a moment of Adam", n);
    // Quotients may be estimates: half a unit in the last place more than the rounded one.
    require(std::abs(param[i] - value) <= 4 * std::numeric_limits<T>::epsilon(), model, "a step of Adam", n);
  }

  std::vector<T> into = start;
  const T total = ops.accumulate(into.data(), grad.data(), T(0.3), n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    require(same(into[i], model.multiply_add(grad[i], T(0.3), start[i])), model, "an accumulated gradient", n);
    sum += double{into[i]} * into[i];
  }
  require(std::abs(total - sum) <= n * sum * std::numeric_limits<T>::epsilon(), model, "a sum of squares", n);
}

// Halves have no order of summation: all sets give the portable one's bits. A NaN may be another NaN.
void check_halves(const Simd& simd, const Model& model) {
  const Simd& plain = kSimdPortable;
  std::vector<uint16_t> halves(65536 + 5), narrow(halves.size()), plainly(halves.size());
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  const int64_t n = halves.size();
  std::vector<float> wide(n), wide_plainly(n), any(n);
  std::vector<uint32_t> noise(n), noise_plainly(n);
  for (float& value : any) {
    const uint32_t bits = static_cast<uint32_t>(random_bits());
    // Around what float16 holds, or any float at all.
    if (bits & 1) value = std::ldexp(static_cast<float>(bits) - 2147483648.0f, static_cast<int>(bits % 48) - 60);
    if (!(bits & 1)) std::memcpy(&value, &bits, sizeof(value));
  }
  simd.noise(77, 1234567, n, noise.data());
  plain.noise(77, 1234567, n, noise_plainly.data());
  require(noise == noise_plainly, model, "noise", n);
  const auto is_nan = [](uint16_t half, int mantissa) { return (half & 0x7fff) > (0x7fff >> mantissa << mantissa); };
  const auto compare = [&](const char* what, int mantissa) {
    for (int64_t i = 0; i < n; ++i) {
      require(narrow[i] == plainly[i] || (is_nan(narrow[i], mantissa) && is_nan(plainly[i], mantissa)), model, what, i);
    }
  };
  for (const auto& [widen, narrow_to, round, mantissa] : {std::tuple{&Simd::widen_f16, &Simd::narrow_f16, false, 10},
                                                          std::tuple{&Simd::widen_bf16, &Simd::narrow_bf16, true, 7}}) {
    (simd.*widen)(halves.data(), wide.data(), n);
    (plain.*widen)(halves.data(), wide_plainly.data(), n);
    for (int64_t i = 0; i < n; ++i) require(same(wide[i], wide_plainly[i]), model, "a widened half", i);
    for (const std::vector<float>& from : {wide, any}) {
      (simd.*narrow_to)(from.data(), narrow.data(), n);
      (plain.*narrow_to)(from.data(), plainly.data(), n);
      compare("a narrowed half", mantissa);
      for (const RandomBits bits : {RandomBits::kUpper, RandomBits::kLowByte, RandomBits::kSecondByte}) {
        if (round) simd.round_bf16(from.data(), noise.data(), bits, narrow.data(), n);
        if (round) plain.round_bf16(from.data(), noise.data(), bits, plainly.data(), n);
        if (!round) simd.round_f16(from.data(), noise.data(), narrow.data(), n);
        if (!round) plain.round_f16(from.data(), noise.data(), plainly.data(), n);
        compare("a half rounded at random", mantissa);
      }
    }
  }
}

void check(const Simd& simd) {
  const std::string name = simd.name;
  const Model model{name, name == "avx2" ? 32 : name == "avx512" ? 64 : 16, name != "portable"};
  std::vector<int64_t> sizes;
  for (int64_t size = 1; size <= 70; ++size) sizes.push_back(size);
  sizes.insert(sizes.end(), {127, 128, 151, 1000});
  checks = 0;
  for (const int64_t size : sizes) {
    check_dots<float>(simd, model, size);
    check_dots<double>(simd, model, size);
    check_scores(simd, model, size);
    check_gains(simd, model, size * kGainBlock);
    check_updates<float>(simd, model, size);
    check_updates<double>(simd, model, size);
  }
  check_halves(simd, model);
  std::printf("%s: %lld checks\n", simd.name, static_cast<long long>(checks));
}

}  // namespace
}  // namespace hullkit

int main(int count, char** names) {
  using namespace hullkit;
  if (count == 1) {
    const AvailableSimds available = available_simds();
    for (int i = 0; i < available.count; ++i) check(*available.sets[i]);
    return 0;
  }
  for (const Simd* simd : {&kSimdPortable,
#if defined(HULLKIT_X86)
                           &kSimdAvx2, &kSimdAvx512
#elif defined(HULLKIT_ARM64)
                           &kSimdNeon
#endif
       }) {
    if (names[1] == std::string(simd->name)) return check(*simd), 0;
  }
  std::fprintf(stderr, "%s: expected a set of kernels of this build\n", names[1]);
  return 2;
}
