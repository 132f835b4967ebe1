// The only tensor type that crosses into the core: a plain description of memory someone else owns.
#pragma once

#include <cstdint>

namespace hullkit {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3, kInt64 = 4 };

inline constexpr int kMaxRank = 4;

// Strides count elements, not bytes; they may be 0 (a pool shared by a batch) or arbitrary.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};

  bool defined() const { return data != nullptr; }

  template <typename T>
  T* at(int64_t i) const {
    return static_cast<T*>(data) + i * stride[0];
  }
  template <typename T>
  T* at(int64_t i, int64_t j) const {
    return static_cast<T*>(data) + i * stride[0] + j * stride[1];
  }
};

}  // namespace hullkit
