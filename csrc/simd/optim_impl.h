// SPDX-License-Identifier: Apache-2.0
// The optimizers' arithmetic; included by simd_impl.h, and like it once per instruction set.
#pragma once

namespace hullkit {
namespace {

inline Wide<float> square_root(Wide<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(-1, x);  // all lanes; the plain form warns of an uninitialized operand in GCC 12
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(HULLKIT_SIMD_NEON)
  return vsqrtq_f32(x);
#else
  for (int lane = 0; lane < kBytes / 4; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

inline Wide<double> square_root(Wide<double> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(-1, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#elif defined(HULLKIT_SIMD_NEON)
  return vsqrtq_f64(x);
#else
  for (int lane = 0; lane < kBytes / 8; ++lane) x[lane] = __builtin_sqrt(x[lane]);
  return x;
#endif
}

#if defined(__AVX512F__)
using Divisors = __mmask16;  // one bit for each lane

inline Divisors outside(Wide<float> b, float low, float high) {
  return static_cast<Divisors>(~(_mm512_cmp_ps_mask(b, Wide<float>{} + low, _CMP_GE_OQ) &
                                 _mm512_cmp_ps_mask(b, Wide<float>{} + high, _CMP_LE_OQ)));
}
inline bool any(Divisors lanes) { return lanes != 0; }
inline Wide<float> choose(Divisors lanes, Wide<float> yes, Wide<float> no) {
  return _mm512_mask_blend_ps(lanes, no, yes);
}
inline Wide<float> estimate(Wide<float> b) { return _mm512_maskz_rcp14_ps(-1, b); }
#elif defined(__AVX2__)
using Divisors = __m256;  // all bits of each lane

inline Divisors outside(Wide<float> b, float low, float high) {
  return _mm256_or_ps(_mm256_cmp_ps(b, Wide<float>{} + low, _CMP_NGE_UQ),
                      _mm256_cmp_ps(b, Wide<float>{} + high, _CMP_NLE_UQ));
}
inline bool any(Divisors lanes) { return _mm256_movemask_ps(lanes) != 0; }
inline Wide<float> choose(Divisors lanes, Wide<float> yes, Wide<float> no) { return _mm256_blendv_ps(no, yes, lanes); }
inline Wide<float> estimate(Wide<float> b) {
  const Wide<float> first = _mm256_rcp_ps(b);
  return multiply_add(first, multiply_add(-first, b, Wide<float>{} + 1.0f), first);
}
#endif

// a / b for b >= 0, to about half a unit in the last place. Square roots keep the divider busy, so quotients go to
// the multipliers: an estimate of 1 / b, refined by what is left of a. Where b is so small that 1 / b or what is left
// of a leaves the normal numbers (0, denormal), or so large (infinite), that lane alone is divided.
inline Wide<float> quotient(Wide<float> a, Wide<float> b) {
#if defined(__AVX2__)
  constexpr float kLow = 0x1p-80f, kHigh = 0x1p80f;
  const Wide<float> inverse = estimate(b);
  const Wide<float> first = a * inverse;
  const Wide<float> refined = multiply_add(multiply_add(-first, b, a), inverse, first);
  const Divisors divided = outside(b, kLow, kHigh);
  if (__builtin_expect(!any(divided), 1)) return refined;
  return choose(divided, a / b, refined);
#else
  return a / b;
#endif
}

inline Wide<double> quotient(Wide<double> a, Wide<double> b) { return a / b; }

// The place of the gradient among the arrays of a step. It is only read: it may be memory that nobody may write to,
// or that others write.
constexpr int kGradient = 1;

// Calls block(elements) for whole blocks of U vectors, then for single vectors, then once for the rest, which it
// gets as one vector in a buffer: every element takes the same arithmetic wherever it stands.
// Arrays [kArrays] are read and written at an offset.
template <typename T, int kArrays, int U, typename Block, typename Single>
inline void over_vectors(T* const (&arrays)[kArrays], int64_t n, Block&& block, Single&& single) {
  constexpr int kLanes = kBytes / sizeof(T);
  int64_t i = 0;
  for (; i + U * kLanes <= n; i += U * kLanes) block(arrays, i);
  for (; i + kLanes <= n; i += kLanes) single(arrays, i);
  if (i == n) return;
  T buffers[kArrays][kLanes] = {};
  T* padded[kArrays];
  for (int a = 0; a < kArrays; ++a) {
    padded[a] = buffers[a];
    if (arrays[a] != nullptr) __builtin_memcpy(buffers[a], arrays[a] + i, (n - i) * sizeof(T));
  }
  single(padded, 0);
  for (int a = 0; a < kArrays; ++a) {
    if (arrays[a] != nullptr && a != kGradient) __builtin_memcpy(arrays[a] + i, buffers[a], (n - i) * sizeof(T));
  }
}

// U vectors at once: square roots and divisions of one overlap with those of the others.
template <typename T, int U, bool kDecays>
inline void adam_vectors(T* const (&arrays)[4], int64_t at, const AdamUpdate<T>& update) {
  using V = Wide<T>;
  constexpr int kLanes = kBytes / sizeof(T);
  V param[U], grad[U], exp_avg[U], exp_avg_sq[U];
  for (int u = 0; u < U; ++u) {
    param[u] = load<V>(arrays[0] + at + u * kLanes);
    grad[u] = load<V>(arrays[1] + at + u * kLanes) * update.scale;
    exp_avg[u] = load<V>(arrays[2] + at + u * kLanes);
    exp_avg_sq[u] = load<V>(arrays[3] + at + u * kLanes);
  }
  const V blend1 = V{} + update.blend1, beta2 = V{} + update.beta2, rest2 = V{} + update.rest2;
  const V l2 = V{} + update.l2, keep = V{} + update.keep;
  for (int64_t s = 0; s < update.num_steps; ++s) {
    const V size = V{} + update.sizes[s], damping = V{} + update.dampings[s];
    for (int u = 0; u < U; ++u) {
      const V total = kDecays && update.l2 != 0 ? multiply_add(param[u], l2, grad[u]) : grad[u];
      exp_avg[u] = multiply_add(total - exp_avg[u], blend1, update.fast1 ? total : exp_avg[u]);
      exp_avg_sq[u] = multiply_add(total * rest2, total, exp_avg_sq[u] * beta2);
      const V change = quotient(size * exp_avg[u], square_root(exp_avg_sq[u]) + damping);
      param[u] = (kDecays ? param[u] * keep : param[u]) - change;
    }
  }
  for (int u = 0; u < U; ++u) {
    store(arrays[0] + at + u * kLanes, param[u]);
    store(arrays[2] + at + u * kLanes, exp_avg[u]);
    store(arrays[3] + at + u * kLanes, exp_avg_sq[u]);
  }
}

template <typename T, bool kDecays>
void adam_run(T* const (&arrays)[4], int64_t n, const AdamUpdate<T>& update) {
  constexpr int kUnroll = 2;
  over_vectors<T, 4, kUnroll>(
      arrays, n, [&](auto& a, int64_t at) { adam_vectors<T, kUnroll, kDecays>(a, at, update); },
      [&](auto& a, int64_t at) { adam_vectors<T, 1, kDecays>(a, at, update); });
}

template <typename T>
void adam(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, int64_t n, const AdamUpdate<T>& update) {
  T* const arrays[4] = {param, const_cast<T*>(grad), exp_avg, exp_avg_sq};
  if (update.l2 == 0 && update.keep == 1) {
    adam_run<T, false>(arrays, n, update);
  } else {
    adam_run<T, true>(arrays, n, update);
  }
}

template <typename T, int U, bool kBuffer>
inline void sgd_vectors(T* const (&arrays)[3], int64_t at, const SgdUpdate<T>& update) {
  using V = Wide<T>;
  constexpr int kLanes = kBytes / sizeof(T);
  const V momentum = V{} + update.momentum, l2 = V{} + update.l2, lr = V{} + update.lr;
  V param[U], grad[U], buffer[U] = {};
  for (int u = 0; u < U; ++u) {
    param[u] = load<V>(arrays[0] + at + u * kLanes);
    grad[u] = load<V>(arrays[1] + at + u * kLanes) * update.scale;
    if (kBuffer && !update.fresh) buffer[u] = load<V>(arrays[2] + at + u * kLanes);
  }
  for (int64_t s = 0; s < update.num_steps; ++s) {
    // A fresh buffer takes the gradient undamped.
    const V share = V{} + (update.fresh && s == 0 ? T{1} : update.undamped);
    for (int u = 0; u < U; ++u) {
      const V total = update.l2 != 0 ? multiply_add(param[u], l2, grad[u]) : grad[u];  // infinity times 0 is NaN
      buffer[u] = multiply_add(total, share, buffer[u] * momentum);
      const V ahead = update.nesterov ? multiply_add(buffer[u], momentum, total) : buffer[u];
      param[u] = multiply_add(ahead, -lr, param[u]);
    }
  }
  for (int u = 0; u < U; ++u) {
    store(arrays[0] + at + u * kLanes, param[u]);
    if (kBuffer) store(arrays[2] + at + u * kLanes, buffer[u]);
  }
}

template <typename T, bool kBuffer>
void sgd_run(T* const (&arrays)[3], int64_t n, const SgdUpdate<T>& update) {
  constexpr int kUnroll = 4;
  over_vectors<T, 3, kUnroll>(
      arrays, n, [&](auto& a, int64_t at) { sgd_vectors<T, kUnroll, kBuffer>(a, at, update); },
      [&](auto& a, int64_t at) { sgd_vectors<T, 1, kBuffer>(a, at, update); });
}

template <typename T>
void sgd(T* param, const T* grad, T* buffer, int64_t n, const SgdUpdate<T>& update) {
  T* const arrays[3] = {param, const_cast<T*>(grad), buffer};
  if (buffer != nullptr) {
    sgd_run<T, true>(arrays, n, update);
  } else {
    sgd_run<T, false>(arrays, n, update);
  }
}

// into += weight * grad if into is given; returns the sum of squares of into, else of grad.
template <typename T>
T accumulate(T* into, const T* grad, T weight, int64_t n) {
  using V = Wide<T>;
  constexpr int kLanes = kBytes / sizeof(T);
  constexpr int kUnroll = 4;
  V sums[kUnroll] = {};
  int64_t i = 0;
  const auto at = [&](int64_t j, V* sum) {
    V value = load<V>(grad + j);
    if (into != nullptr) {
      value = multiply_add(value, V{} + weight, load<V>(into + j));
      store(into + j, value);
    }
    *sum = multiply_add(value, value, *sum);
  };
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) at(i + u * kLanes, &sums[u]);
  }
  for (; i + kLanes <= n; i += kLanes) at(i, &sums[0]);
  T total = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) {
    T value = grad[i];
    if (into != nullptr) {
      const V sum = multiply_add(V{} + value, V{} + weight, V{} + into[i]);
      value = into[i] = sum[0];
    }
    total += value * value;
  }
  return total;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// To nearest, ties to even; NaN stays NaN.
void narrow_bf16(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_from_float(in[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out[i] = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
  }
}

inline uint16_t narrow_one_f16(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds beyond 65504
  if (magnitude < 0x38800000u) {
    // Subnormal: the float addition rounds to a multiple of 2^-24.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bits_from_float(shifted) - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

void narrow_f16(const float* in, uint16_t* out, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
  }
#elif defined(HULLKIT_SIMD_NEON)
  for (; i + 4 <= count; i += 4) vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
#endif
  for (; i < count; ++i) out[i] = narrow_one_f16(in[i]);
}

}  // namespace
}  // namespace hullkit
