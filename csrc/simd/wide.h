// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set at hand: loads, sums of lanes, comparisons. Included by simd_impl.h, and like it once
// per instruction set.
#pragma once

#include "simd/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(HULLKIT_SIMD_NEON)
#include <arm_neon.h>
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
#elif defined(HULLKIT_SIMD_NEON)
inline Wide<float> multiply_add(Wide<float> a, Wide<float> b, Wide<float> c) { return vfmaq_f32(c, a, b); }
inline Wide<double> multiply_add(Wide<double> a, Wide<double> b, Wide<double> c) { return vfmaq_f64(c, a, b); }
#else
inline Wide<float> multiply_add(Wide<float> a, Wide<float> b, Wide<float> c) { return a * b + c; }
inline Wide<double> multiply_add(Wide<double> a, Wide<double> b, Wide<double> c) { return a * b + c; }
#endif

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));

// Lanes of a, then of b, by number. GCC 11 has another name for it.
template <int... kLanes, typename V>
inline V shuffled(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kLanes...);
#else
  typedef decltype(a < b) Lanes;  // integers as wide as V's elements
  return __builtin_shuffle(a, b, Lanes{kLanes...});
#endif
}

inline float sum_lanes(Float4 v) {
  const Float4 swapped = shuffled<2, 3, 0, 1>(v, v);
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
  const Float4 ab = shuffled<0, 1, 4, 5>(a, b) + shuffled<2, 3, 6, 7>(a, b);
  const Float4 cd = shuffled<0, 1, 4, 5>(c, d) + shuffled<2, 3, 6, 7>(c, d);
  store(out, shuffled<0, 2, 4, 6>(ab, cd) + shuffled<1, 3, 5, 7>(ab, cd));
}
inline void store_four(double* out, Double2 a, Double2 b, Double2 c, Double2 d) {
  store(out, shuffled<0, 2>(a, b) + shuffled<1, 3>(a, b));
  store(out + 2, shuffled<0, 2>(c, d) + shuffled<1, 3>(c, d));
}
template <typename T, typename V>
inline void store_four(T* out, V a, V b, V c, V d) {
  store_four(out, sum_halves(a), sum_halves(b), sum_halves(c), sum_halves(d));
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

}  // namespace
}  // namespace hullkit
