// SPDX-License-Identifier: Apache-2.0
// The arithmetic every CPU kernel is made of, once per instruction set, chosen at run time.
#pragma once

#include <cstdint>

namespace hullkit {

// The coefficients of fused optimizer updates, in the arithmetic type; see adam.h and sgd.h.
template <typename T>
struct AdamUpdate {
  // exp_avg is old + (1 - beta1) * (new - old), or new - beta1 * (new - old) if beta1 < 0.5 (fast1), as in torch:
  // float32 holds the smaller factor more exactly.
  T scale, blend1, beta2, rest2, l2, keep;  // blend1 = 1 - beta1, or -beta1 if fast1; rest2 = 1 - beta2
  bool fast1;
  const T* sizes;     // [num_steps] lr / bias1 * sqrt(bias2)
  const T* dampings;  // [num_steps] eps * sqrt(bias2)
  int64_t num_steps;
};

template <typename T>
struct SgdUpdate {
  T scale, lr, momentum, undamped, l2;
  bool nesterov, fresh;
  int64_t num_steps;
};

// As many vectors as a pass over the rows can multiply with before it is bound by arithmetic: four rows, three
// vectors and their twelve sums fill the sixteen registers of AVX2.
inline constexpr int kMaxDotVectors = 3;

// The arrays of `condition` are whole vectors of every instruction set: it has no loop for what is left of one.
inline constexpr int64_t kGainBlock = 8;

// Every dot product is summed in an order that depends on d alone: the same two vectors give the same bits
// whatever stands beside them, and <x, y> == <y, x>.
template <typename T>
struct SimdOps {
  // The vectors [num_vectors, d] in the order in which dots reads them; a single vector is packed as it is. Left where
  // they are, vectors and rows a multiple of 4096 bytes apart evict one another from the innermost cache.
  void (*pack)(const T* const* vectors, int num_vectors, int64_t d, T* packed);
  // out[k][i] = <rows[i], vectors[k]> for i < n and k < num_vectors <= kMaxDotVectors, in one pass over the rows.
  void (*dots)(const T* const* rows, int64_t n, const T* packed, int num_vectors, int64_t d, T* const* out);
  // out[i] = <rows[i], rows[i]>, with the bits that dots has for it.
  void (*squares)(const T* const* rows, int64_t n, int64_t d, T* out);
  // out[j] += weights[t] * rows[t][j], for t = 0 .. count - 1 in this order.
  void (*add_scaled)(double* out, const T* const* rows, const double* weights, int64_t count, int64_t d);
  // difference = vector - x, *along = <vector - x, x>; returns ||vector - x||^2.
  double (*subtract)(const T* vector, const double* x, int64_t d, T* difference, double* along);
  void (*adam)(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, int64_t n, const AdamUpdate<T>& update);
  // buffer may be null: no momentum.
  void (*sgd)(T* param, const T* grad, T* buffer, int64_t n, const SgdUpdate<T>& update);
  // into += weight * grad, and the sum of squares of into; into may be null: of grad.
  T (*accumulate)(T* into, const T* grad, T weight, int64_t n);
};

// Which of an element's 32 random bits round a value: the upper half, or a byte of the lower.
enum class RandomBits { kUpper, kLowByte, kSecondByte };

struct Simd {
  const char* name;
  SimdOps<float> f32;
  SimdOps<double> f64;
  // scores[i] = (1 - step) * scores[i] + step * target[i].
  // Returns the position of the largest score, the lowest on a tie.
  int64_t (*advance)(double* scores, const double* target, double step, int64_t n);
  void (*scale)(double* values, double factor, int64_t n);
  // Conditions on one observation and scores the next, element by element, in one pass:
  //   products[k][i] -= moves[k] * column[i],  variances[i] -= shrink * column[i]^2,
  //   gains[i] = sum_k products[k][i]^2 / (max(variances[i], 0) + noise) + bars[i].
  // products [num_vectors, n]; n is a multiple of kGainBlock. Returns the position of the largest gain, the lowest on a
  // tie.
  int64_t (*condition)(double* products, int64_t num_vectors, double* variances, const double* column,
                       const double* moves, double shrink, double noise, const double* bars, double* gains, int64_t n);
  void (*widen_f16)(const uint16_t* in, float* out, int64_t count);
  void (*widen_bf16)(const uint16_t* in, float* out, int64_t count);
  void (*narrow_f16)(const float* in, uint16_t* out, int64_t count);
  void (*narrow_bf16)(const float* in, uint16_t* out, int64_t count);
  // Stochastic rounding: 32 random bits for each of n elements, and halves rounded with some of these.
  void (*noise)(uint32_t first, uint32_t key, int64_t n, uint32_t* random);
  void (*round_f16)(const float* in, const uint32_t* random, uint16_t* out, int64_t n);
  void (*round_bf16)(const float* in, const uint32_t* random, RandomBits bits, uint16_t* out, int64_t n);

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
#elif defined(HULLKIT_ARM64)
extern const Simd kSimdNeon;
#endif

// The sets that this processor and operating system support, the best one last.
struct AvailableSimds {
  const Simd* sets[3];
  int count;
};
AvailableSimds available_simds();

// The best of them; HULLKIT_SIMD=portable|avx2|avx512|neon chooses another one.
const Simd& simd();

}  // namespace hullkit
