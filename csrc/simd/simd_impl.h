// SPDX-License-Identifier: Apache-2.0
// The selections' loops. Included by exactly one translation unit per instruction set, which defines
// HULLKIT_SIMD_BYTES. Everything here has internal linkage: a function compiled for a wide instruction set must never
// be the copy that the linker keeps for all units. For the same reason no header with inline templates comes in.
#pragma once

#include "simd/wide.h"

namespace hullkit {
namespace {

// Out of line: dimensions that fill no whole vector are rare, and unrolled code for them is not.
template <typename T>
__attribute__((noinline)) T add_tail(T sum, const T* row, const T* other, int64_t count) {
  for (int64_t t = 0; t < count; ++t) sum += row[t] * other[t];
  return sum;
}

template <typename T>
void pack(const T* const* vectors, int num_vectors, int64_t d, T* packed) {
  using V = Wide<T>;
  constexpr int kLanes = kBytes / sizeof(T);
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
    for (int k = 0; k < num_vectors; ++k, packed += kLanes) store(packed, load<V>(vectors[k] + j));
  }
  for (int k = 0; k < num_vectors; ++k) {
    for (int64_t t = j; t < d; ++t) *packed++ = vectors[k][t];
  }
}

// R rows times K vectors at once: enough independent sums to keep the multipliers busy. Each product has one
// chain of sums whatever R and K are, so its bits do not depend on them.
template <typename T, int R, int K>
inline void dot_block(const T* const* rows, const T* packed, int64_t d, T* const* out, int64_t first) {
  using V = Wide<T>;
  constexpr int kLanes = kBytes / sizeof(T);
  V sums[R][K] = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes, packed += K * kLanes) {
    V shared[K];
    for (int k = 0; k < K; ++k) shared[k] = load<V>(packed + k * kLanes);
    for (int r = 0; r < R; ++r) {
      const V row = load_once<V>(rows[r] + j);
      for (int k = 0; k < K; ++k) sums[r][k] = multiply_add(row, shared[k], sums[r][k]);
    }
  }
#pragma GCC unroll 3
  for (int k = 0; k < K; ++k) {
    T* const to = out[k] + first;
    if constexpr (R == 4) {
      store_four(to, sums[0][k], sums[1][k], sums[2][k], sums[3][k]);
    } else {
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) to[r] = sum_lanes(sums[r][k]);
    }
    if (j < d) {
      for (int r = 0; r < R; ++r) to[r] = add_tail(to[r], rows[r] + j, packed + k * (d - j), d - j);
    }
  }
}

// Four rows at a time: with more, the rows and the vectors compete for the innermost cache where d * sizeof(T) is a
// multiple of its 4096-byte stride.
template <typename T, int K>
void dot_blocks(const T* const* rows, int64_t n, const T* packed, int64_t d, T* const* out) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) dot_block<T, 4, K>(rows + i, packed, d, out, i);
  switch (n - i) {
    case 3:
      return dot_block<T, 3, K>(rows + i, packed, d, out, i);
    case 2:
      return dot_block<T, 2, K>(rows + i, packed, d, out, i);
    case 1:
      return dot_block<T, 1, K>(rows + i, packed, d, out, i);
  }
}

template <typename T>
void dots(const T* const* rows, int64_t n, const T* packed, int num_vectors, int64_t d, T* const* out) {
  switch (num_vectors) {
    case 1:
      return dot_blocks<T, 1>(rows, n, packed, d, out);
    case 2:
      return dot_blocks<T, 2>(rows, n, packed, d, out);
    case kMaxDotVectors:
      return dot_blocks<T, 3>(rows, n, packed, d, out);
  }
}

template <typename T, int R>
inline void square_block(const T* const* rows, int64_t d, T* out) {
  using V = Wide<T>;
  constexpr int kLanes = kBytes / sizeof(T);
  V sums[R] = {};
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) {
    for (int r = 0; r < R; ++r) {
      const V row = load_once<V>(rows[r] + j);
      sums[r] = multiply_add(row, row, sums[r]);
    }
  }
  if constexpr (R == 4) {
    store_four(out, sums[0], sums[1], sums[2], sums[3]);
  } else {
    for (int r = 0; r < R; ++r) out[r] = sum_lanes(sums[r]);
  }
  if (j < d) {
    for (int r = 0; r < R; ++r) out[r] = add_tail(out[r], rows[r] + j, rows[r] + j, d - j);
  }
}

template <typename T>
void squares(const T* const* rows, int64_t n, int64_t d, T* out) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) square_block<T, 4>(rows + i, d, out + i);
  for (; i < n; ++i) square_block<T, 1>(rows + i, d, out + i);
}

int64_t advance(double* scores, const double* target, double step, int64_t n) {
  using V = Wide<double>;
  constexpr int kLanes = kBytes / sizeof(double);
  constexpr int kUnroll = 2;
  const V keep = splat(1.0 - step);
  const V move = splat(step);
  V best_lanes[kUnroll];
  for (V& lanes : best_lanes) lanes = splat(-__builtin_inf());
  int64_t i = 0;
  const auto advance_at = [&](int64_t at) {
    const V score = multiply_add(keep, load<V>(scores + at), move * load<V>(target + at));
    store(scores + at, score);
    return score;
  };
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) best_lanes[u] = larger(best_lanes[u], advance_at(i + u * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) best_lanes[0] = larger(best_lanes[0], advance_at(i));
  double best = largest_lane(larger(best_lanes[0], best_lanes[1]));
  for (; i < n; ++i) {
    // The arithmetic of the vector loop, so that equal rows tie wherever they stand.
    scores[i] = multiply_add(keep, splat(scores[i]), move * splat(target[i]))[0];
    best = scores[i] > best ? scores[i] : best;
  }
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const int at = first_equal(load<V>(scores + i), splat(best));
    if (at >= 0) return i + at;
  }
  while (i + 1 < n && scores[i] != best) ++i;
  return i;
}

int64_t condition(double* products, int64_t num_vectors, double* variances, const double* column, const double* moves,
                  double shrink, double noise, const double* bars, double* gains, int64_t n) {
  using V = Wide<double>;
  constexpr int kLanes = kBytes / sizeof(double);
  const V shrinks = splat(-shrink), noises = splat(noise), zero = {};
  V best_lanes = splat(-__builtin_inf());
  for (int64_t i = 0; i < n; i += kLanes) {
    const V change = load<V>(column + i);
    const V variance = multiply_add(shrinks * change, change, load<V>(variances + i));
    store(variances + i, variance);
    V reduction = zero;
    for (int64_t k = 0; k < num_vectors; ++k) {
      double* const at = products + k * n + i;
      const V product = multiply_add(splat(-moves[k]), change, load<V>(at));
      store(at, product);
      reduction = multiply_add(product, product, reduction);
    }
    const V gain = reduction / (larger(variance, zero) + noises) + load<V>(bars + i);
    store(gains + i, gain);
    best_lanes = larger(best_lanes, gain);
  }
  const V best = splat(largest_lane(best_lanes));
  for (int64_t i = 0; i < n; i += kLanes) {
    const int at = first_equal(load<V>(gains + i), best);
    if (at >= 0) return i + at;
  }
  return 0;  // NaN only
}

void scale(double* values, double factor, int64_t n) {
  using V = Wide<double>;
  constexpr int kLanes = kBytes / sizeof(double);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(values + i, splat(factor) * load<V>(values + i));
  for (; i < n; ++i) values[i] *= factor;
}

template <typename T>
void add_scaled(double* out, const T* const* rows, const double* weights, int64_t count, int64_t d) {
  using V = Wide<double>;
  constexpr int kLanes = kBytes / sizeof(double);
  constexpr int kUnroll = 8;
  int64_t j = 0;
  for (; j + kUnroll * kLanes <= d; j += kUnroll * kLanes) {
    V sums[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sums[u] = load<V>(out + j + u * kLanes);
    for (int64_t t = 0; t < count; ++t) {
      const V weight = splat(weights[t]);
      for (int u = 0; u < kUnroll; ++u) sums[u] = multiply_add(weight, load_widened(rows[t] + j + u * kLanes), sums[u]);
    }
    for (int u = 0; u < kUnroll; ++u) store(out + j + u * kLanes, sums[u]);
  }
  for (; j + kLanes <= d; j += kLanes) {
    V sum = load<V>(out + j);
    for (int64_t t = 0; t < count; ++t) sum = multiply_add(splat(weights[t]), load_widened(rows[t] + j), sum);
    store(out + j, sum);
  }
  for (; j < d; ++j) {  // the arithmetic of the vector loop, so that equal columns get equal sums wherever they stand
    V sum = splat(out[j]);
    for (int64_t t = 0; t < count; ++t) {
      sum = multiply_add(splat(weights[t]), splat(static_cast<double>(rows[t][j])), sum);
    }
    out[j] = sum[0];
  }
}

template <typename T>
double subtract(const T* vector, const double* x, int64_t d, T* difference, double* along) {
  using V = Wide<double>;
  constexpr int kLanes = kBytes / sizeof(double);
  constexpr int kUnroll = 4;
  V squares[kUnroll] = {}, products[kUnroll] = {};
  int64_t j = 0;
  for (; j + kUnroll * kLanes <= d; j += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      const V other = load<V>(x + j + u * kLanes);
      const V delta = load_widened(vector + j + u * kLanes) - other;
      squares[u] = multiply_add(delta, delta, squares[u]);
      products[u] = multiply_add(delta, other, products[u]);
      store_narrowed(difference + j + u * kLanes, delta);
    }
  }
  double square = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
  *along = sum_lanes((products[0] + products[1]) + (products[2] + products[3]));
  for (; j < d; ++j) {
    const double delta = static_cast<double>(vector[j]) - x[j];
    square += delta * delta;
    *along += delta * x[j];
    difference[j] = static_cast<T>(delta);
  }
  return square;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

void widen_bf16(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = float_from_bits(static_cast<uint32_t>(in[i]) << 16);
}

inline float widen_one_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal halves are normal floats
  return sign ? -magnitude : magnitude;
}

void widen_f16(const uint16_t* in, float* out, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
#elif defined(HULLKIT_SIMD_NEON)
  for (; i + 4 <= count; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in + i))));
#endif
  for (; i < count; ++i) out[i] = widen_one_f16(in[i]);
}

}  // namespace
}  // namespace hullkit

#include "simd/optim_impl.h"
#include "simd/stochastic_impl.h"

namespace hullkit {
namespace {

constexpr Simd make_simd(const char* name) {
  return Simd{name,
              {pack<float>, dots<float>, squares<float>, add_scaled<float>, subtract<float>, adam<float>, sgd<float>,
               accumulate<float>},
              {pack<double>, dots<double>, squares<double>, add_scaled<double>, subtract<double>, adam<double>,
               sgd<double>, accumulate<double>},
              advance,
              scale,
              condition,
              widen_f16,
              widen_bf16,
              narrow_f16,
              narrow_bf16,
              noise,
              round_f16,
              round_bf16};
}

}  // namespace
}  // namespace hullkit
