// SPDX-License-Identifier: Apache-2.0
// The only tensor type that crosses into the core: a plain description of memory someone else owns.
#pragma once

#include <cstdint>

#include "hullkit/check.h"

namespace hullkit {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3, kInt64 = 4 };

inline int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
  }
  throw_value_error("dtype: unknown code ", static_cast<int>(dtype));
}

inline constexpr int kMaxRank = 4;

// Strides count elements, not bytes; they may be 0 (a pool shared by a batch) or arbitrary.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};

  bool defined() const { return data != nullptr; }

  // Entries first, ..., first + count - 1 of a batch.
  TensorView entries(int64_t first, int64_t count) const {
    if (!defined()) return *this;
    TensorView part = *this;
    part.data = static_cast<char*>(data) + first * stride[0] * element_bytes(dtype);
    part.shape[0] = count;
    return part;
  }

  // Entry i of a batch: a dimension less.
  TensorView entry(int64_t i) const {
    TensorView part = *this;
    part.data = static_cast<char*>(data) + i * stride[0] * element_bytes(dtype);
    part.rank = rank - 1;
    for (int axis = 0; axis < part.rank; ++axis) {
      part.shape[axis] = shape[axis + 1];
      part.stride[axis] = stride[axis + 1];
    }
    return part;
  }

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
