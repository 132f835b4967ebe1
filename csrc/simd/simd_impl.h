// Included by exactly one translation unit per instruction set, which defines HULLKIT_SIMD_BYTES.
// Everything here has internal linkage: a function compiled for a wide instruction set must never be the
// copy that the linker keeps for all units. For the same reason no header with inline templates comes in.
#pragma once

#include "simd/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hullkit {
namespace {

constexpr int kBytes = HULLKIT_SIMD_BYTES;

template <typename T>
struct WideOf;
template <>
struct WideOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
};
template <>
struct WideOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
};
template <typename T>
using Wide = typename WideOf<T>::type;
typedef float HalfWideFloat __attribute__((vector_size(kBytes / 2)));
typedef int64_t WideIndex __attribute__((vector_size(kBytes)));

template <typename V, typename T>
inline V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V, typename T>
inline void store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

// Explicit, because the compiler's own contraction may differ between two instantiations of one loop.
#if defined(__AVX512F__)
inline Wide<float> multiply_add(Wide<float> a, Wide<float> b, Wide<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline Wide<double> multiply_add(Wide<double> a, Wide<double> b, Wide<double> c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
inline Wide<float> multiply_add(Wide<float> a, Wide<float> b, Wide<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline Wide<double> multiply_add(Wide<double> a, Wide<double> b, Wide<double> c) { return _mm256_fmadd_pd(a, b, c); }
#else
inline Wide<float> multiply_add(Wide<float> a, Wide<float> b, Wide<float> c) { return a * b + c; }
inline Wide<double> multiply_add(Wide<double> a, Wide<double> b, Wide<double> c) { return a * b + c; }
#endif

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));

inline float sum_lanes(Float4 v) {
  const Float4 swapped = __builtin_shufflevector(v, v, 2, 3, 0, 1);
  const Float4 pairs = v + swapped;
  return pairs[0] + pairs[1];
}
inline double sum_lanes(Double2 v) { return v[0] + v[1]; }

template <int kHalf, typename V>
inline auto half(V v) {
  typedef decltype(v[0] + v[0]) T;
  typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  return halves[kHalf];
}

template <typename V>
inline auto sum_halves(V v) {
  return half<0>(v) + half<1>(v);
}

// Upper half onto lower half until 16 bytes are left: shuffles, no detour through memory.
template <typename V>
inline auto sum_lanes(V v) {
  return sum_lanes(sum_halves(v));
}

// out[r] = sum_lanes(sums[r]): the same additions, of four sums at once from 16 bytes on.
inline void store_four(float* out, Float4 a, Float4 b, Float4 c, Float4 d) {
  const Float4 ab = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  const Float4 cd = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
  store(out, __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7));
}
inline void store_four(double* out, Double2 a, Double2 b, Double2 c, Double2 d) {
  store(out, __builtin_shufflevector(a, b, 0, 2) + __builtin_shufflevector(a, b, 1, 3));
  store(out + 2, __builtin_shufflevector(c, d, 0, 2) + __builtin_shufflevector(c, d, 1, 3));
}
template <typename T, typename V>
inline void store_four(T* out, V a, V b, V c, V d) {
  store_four(out, sum_halves(a), sum_halves(b), sum_halves(c), sum_halves(d));
}

// Out of line: dimensions that fill no whole vector are rare, and unrolled code for them is not.
template <typename T>
__attribute__((noinline)) T add_tail(T sum, const T* row, const T* other, int64_t count) {
  for (int64_t t = 0; t < count; ++t) sum += row[t] * other[t];
  return sum;
}

// A value that is used several times is loaded once: GCC would rather make it a memory operand of every use, and a
// line on its way from the outer caches is then waited for as often.
template <typename V>
inline V load_once(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
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

inline Wide<double> load_widened(const double* from) { return load<Wide<double>>(from); }
inline Wide<double> load_widened(const float* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xff, load<HalfWideFloat>(from));  // GCC would convert two halves and join them
#else
  return __builtin_convertvector(load<HalfWideFloat>(from), Wide<double>);
#endif
}

// The same value in every lane; x - 0 is x, which the compiler knows, while x + 0 is not -0 for -0.
inline Wide<double> splat(double x) { return x - Wide<double>{}; }

inline void store_narrowed(double* to, Wide<double> v) { store(to, v); }
inline void store_narrowed(float* to, Wide<double> v) { store(to, __builtin_convertvector(v, HalfWideFloat)); }

template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

inline double largest_lane(Double2 v) { return v[0] > v[1] ? v[0] : v[1]; }
template <typename V>
inline double largest_lane(V v) {
  return largest_lane(larger(half<0>(v), half<1>(v)));
}

// The first lane where a == b, -1 if there is none.
inline int first_equal(Wide<double> a, Wide<double> b) {
#if defined(__AVX512F__)
  const int equal = _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ);
#elif defined(__AVX2__)
  const int equal = _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_EQ_OQ));
#else
  int equal = 0;
  for (int lane = 0; lane < kBytes / 8; ++lane) equal |= (a[lane] == b[lane]) << lane;
#endif
  return equal ? __builtin_ctz(equal) : -1;
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
  for (; j < d; ++j) {
    for (int64_t t = 0; t < count; ++t) out[j] += weights[t] * static_cast<double>(rows[t][j]);
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
#endif
  for (; i < count; ++i) out[i] = widen_one_f16(in[i]);
}

}  // namespace
}  // namespace hullkit

#include "simd/optim_impl.h"

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
              narrow_bf16};
}

}  // namespace
}  // namespace hullkit
