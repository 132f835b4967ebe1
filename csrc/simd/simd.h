// The arithmetic every CPU kernel is made of, once per instruction set, chosen at run time.
#pragma once

#include <cstdint>

namespace hullkit {

// As many vectors as a pass over the rows can multiply with before it is bound by arithmetic: four rows, three
// vectors and their twelve sums fill the sixteen registers of AVX2.
inline constexpr int kMaxDotVectors = 3;

// Every dot product is summed in an order that depends on d alone: the same two vectors give the same bits
// whatever stands beside them, and <x, y> == <y, x>.
template <typename T>
struct SimdOps {
  // out[k][i] = <rows[i], vectors[k]> for i < n and k < num_vectors <= kMaxDotVectors, in one pass over the rows.
  void (*dots)(const T* const* rows, int64_t n, const T* const* vectors, int num_vectors, int64_t d, T* const* out);
  // scores[i] = (1 - step) * scores[i] + step * (base[i] - column[i]).
  // Returns the position of the largest score, the lowest on a tie.
  int64_t (*advance)(double* scores, const T* column, double step, const double* base, int64_t n);
  // out[j] += weight * row[j]
  void (*add_scaled)(double* out, const T* row, double weight, int64_t d);
};

struct Simd {
  const char* name;
  SimdOps<float> f32;
  SimdOps<double> f64;
  void (*widen_f16)(const uint16_t* in, float* out, int64_t count);
  void (*widen_bf16)(const uint16_t* in, float* out, int64_t count);

  template <typename T>
  const SimdOps<T>& ops() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32;
    } else {
      return f64;
    }
  }
};

extern const Simd kSimdPortable;
#ifdef HULLKIT_X86
extern const Simd kSimdAvx2;
extern const Simd kSimdAvx512;
#endif

// The widest set this processor and operating system support; HULLKIT_SIMD=portable|avx2|avx512 lowers it.
const Simd& simd();

}  // namespace hullkit
