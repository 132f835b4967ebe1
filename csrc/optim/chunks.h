// SPDX-License-Identifier: Apache-2.0
// A list of tensors cut into chunks, and chunks as the arithmetic wants them.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "hullkit/parallel.h"
#include "hullkit/tensor_table.h"
#include "simd/simd.h"

namespace hullkit {

// Small enough that many threads share one large tensor, and that what is read in a chunk stays in its cache.
inline constexpr int64_t kChunk = int64_t{1} << 18;
// Elements widened at a time where dtypes differ from the arithmetic.
inline constexpr int64_t kBlock = 512;

// Calls chunk(index, row, begin, count) for every chunk of every tensor; index numbers them in order.
template <typename Chunk>
int64_t for_each_chunk(const TensorTable& table, int num_threads, Chunk&& chunk) {
  struct Place {
    int64_t row, begin;
  };
  std::vector<Place> places;
  for (int64_t row = 0; row < table.count; ++row) {
    for (int64_t begin = 0; begin < table.rows[row].numel; begin += kChunk) places.push_back({row, begin});
  }
  parallel_for(static_cast<int64_t>(places.size()), num_threads, [&](int64_t index) {
    const auto [row, begin] = places[index];
    chunk(index, row, begin, std::min(kChunk, table.rows[row].numel - begin));
  });
  return static_cast<int64_t>(places.size());
}

inline int64_t num_chunks(const TensorTable& table) {
  int64_t count = 0;
  for (int64_t row = 0; row < table.count; ++row) count += (table.rows[row].numel + kChunk - 1) / kChunk;
  return count;
}

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;
}

// Elements begin..begin+count of a tensor in the arithmetic type T: where they lie, or widened into a buffer.
template <typename T>
class Elements {
 public:
  Elements(int64_t address, DType dtype) : address_(address), dtype_(dtype) {}

  T* load(int64_t begin, int64_t count) {
    if (address_ == 0) return nullptr;
    if (dtype_ == dtype_of<T>()) return at<T>(begin);
    float* const widened = floats();
    switch (dtype_) {
      case DType::kFloat16:
        simd().widen_f16(at<uint16_t>(begin), widened, count);
        break;
      case DType::kBFloat16:
        simd().widen_bf16(at<uint16_t>(begin), widened, count);
        break;
      case DType::kFloat32:
        std::copy_n(at<float>(begin), count, buffer_);
        return buffer_;
      default:  // float64 into float32
        std::copy_n(at<double>(begin), count, buffer_);
        return buffer_;
    }
    if (std::is_same_v<T, double>) std::copy_n(widened, count, buffer_);
    return buffer_;
  }

  // Puts a loaded block back, rounded to nearest.
  void store(int64_t begin, int64_t count) {
    if (address_ == 0 || dtype_ == dtype_of<T>()) return;
    float* const widened = floats();
    if (std::is_same_v<T, double>) std::copy_n(buffer_, count, widened);
    switch (dtype_) {
      case DType::kFloat16:
        return simd().narrow_f16(widened, at<uint16_t>(begin), count);
      case DType::kBFloat16:
        return simd().narrow_bf16(widened, at<uint16_t>(begin), count);
      case DType::kFloat32:
        std::copy_n(buffer_, count, at<float>(begin));
        return;
      default:
        std::copy_n(buffer_, count, at<double>(begin));
    }
  }

  // Puts a loaded block of halves back, rounded with random bits; float16 has the upper ones alone.
  void store_stochastically(int64_t begin, int64_t count, const uint32_t* random, RandomBits bits) {
    if (dtype_ == DType::kFloat16) {
      simd().round_f16(floats(), random, at<uint16_t>(begin), count);
    } else {
      simd().round_bf16(floats(), random, bits, at<uint16_t>(begin), count);
    }
  }

  template <typename U>
  U* at(int64_t begin) const {
    return reinterpret_cast<U*>(address_) + begin;
  }

 private:
  float* floats() {
    if constexpr (std::is_same_v<T, float>) {
      return buffer_;
    } else {
      return floats_;
    }
  }

  int64_t address_;
  DType dtype_;
  T buffer_[kBlock];
  float floats_[std::is_same_v<T, double> ? kBlock : 1];
};

// Elements at a time: all of a chunk where nothing needs widening.
template <typename T>
int64_t block_size(const TensorTable& table, bool stateful) {
  const bool plain = table.param_dtype == dtype_of<T>() && table.grad_dtype == dtype_of<T>() &&
                     (!stateful || table.state_dtype == dtype_of<T>());
  return plain ? kChunk : kBlock;
}

}  // namespace hullkit
