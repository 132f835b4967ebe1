// SPDX-License-Identifier: Apache-2.0
// A pool and queries of any shape, strides and values, in memory of exactly the size that they need.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

#include "bindings/fit.h"
#include "fuzz/input.h"

namespace hullkit::fuzz {

// Stops the fuzzer, unless what an operation promises holds.
inline void require(bool promise, int line = __builtin_LINE()) {
  if (promise) return;
  std::fprintf(stderr, "line %d: a promise does not hold\n", line);
  std::abort();
}

// A tensor in a buffer of its own, whose end is the end of what its strides reach: a sanitizer sees one step beyond.
class Buffer {
 public:
  Buffer(DType dtype, std::initializer_list<int64_t> shape, int64_t gap = 0) {
    view_.dtype = dtype;
    for (const int64_t size : shape) view_.shape[view_.rank++] = size;
    int64_t stride = 1, last = 0;
    for (int axis = view_.rank - 1; axis >= 0; --axis) {
      view_.stride[axis] = stride;
      last += (view_.shape[axis] - 1) * stride;
      stride = stride * view_.shape[axis] + (axis == view_.rank - 1 ? gap : 0);
    }
    bytes_ = (last + 1) * element_bytes(dtype);
    memory_.reset(new char[bytes_]);
    std::memset(memory_.get(), 0x7f, bytes_);  // a NaN, or an index out of range
    view_.data = memory_.get();
  }

  const TensorView& view() const { return view_; }
  bool same(const Buffer& other) const { return std::memcmp(memory_.get(), other.memory_.get(), bytes_) == 0; }

  template <typename T>
  T get(int64_t i, int64_t j = 0) const {
    return *view_.at<T>(i, j);
  }

 private:
  std::unique_ptr<char[]> memory_;
  int64_t bytes_;
  TensorView view_;
};

inline void store(double value, DType dtype, char* to) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  if (dtype == DType::kFloat64) {
    std::memcpy(to, &value, sizeof(value));
  } else if (dtype == DType::kFloat32) {
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {  // any bits are a half: those of a bfloat16 will do for a float16, too
    const auto half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(to, &half, sizeof(half));
  }
}

// Values that kernels stumble over, most of them small integers: these tie.
inline double value_of(uint8_t byte) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kOdd[] = {0.0,  -0.0, 1e-320, 1e-45, 1e-30, -1e-30, 1e-10,  0.1,
                             1e10, 1e19, -1e19,  3e38,  1e150, 1e300,  -1e300, 1.0 / 3.0};
  if (byte < 224) return static_cast<double>(byte % 9) - 4.0;
  if (byte < 252) return kOdd[byte % 16];
  return byte == 252 ? std::nan("") : byte == 253 ? kInfinity : byte == 254 ? -kInfinity : 65504.0;
}

class Problem {
 public:
  Problem(Input& input, bool several)
      : dtype_(input.one_of({DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16})),
        batch_(input.between(0, 3)),
        rows_(input.one_of<int64_t>({1, 2, 3, 5, 8, 9, 17, 33, 70})),
        dim_(input.one_of<int64_t>({1, 2, 3, 7, 8, 15, 16, 31, 33, 65})),
        vectors_(several && input.flip() ? input.between(1, 3) : 0),
        with_candidates_(input.flip()),
        with_lengths_(input.flip()),
        shared_(with_candidates_ || input.flip()),
        positions_(with_candidates_ ? input.between(1, 20) : rows_),
        pool_(dtype_, {shared_ ? 1 : std::max<int64_t>(batch_, 1), rows_, dim_}, input.between(0, 2)),
        query_(vectors_ == 0 ? Buffer(dtype_, {std::max<int64_t>(batch_, 1), dim_}, input.between(0, 1))
                             : Buffer(dtype_, {std::max<int64_t>(batch_, 1), vectors_, dim_})),
        candidates_(DType::kInt64, {std::max<int64_t>(batch_, 1), positions_}),
        lengths_(DType::kInt64, {std::max<int64_t>(batch_, 1)}) {
    seed_ = 1 + input.byte() + 256 * input.byte();
    const bool plain = input.flip();  // else odd values make almost every call an error
    fill(pool_, plain);
    fill(query_, plain);
    for (int64_t b = 0; b < batch_; ++b) {
      // One in 64 is out of range: such a call must say so.
      const int64_t beyond = (next() % 64 == 0) ? 1 : 0;
      *lengths_.view().at<int64_t>(b) = 1 + static_cast<int64_t>(next() % positions_) + beyond * positions_;
      for (int64_t i = 0; i < positions_; ++i) {
        *candidates_.view().at<int64_t>(b, i) = static_cast<int64_t>(next() % (rows_ + 1 + beyond)) - 1;
      }
    }
  }

  PoolSpec pool() const {
    PoolSpec spec;
    spec.rows = pool_.view();
    spec.rows.shape[0] = batch_;
    if (shared_) spec.rows.stride[0] = 0;
    if (with_candidates_) spec.candidates = of_batch(candidates_);
    if (with_lengths_) spec.lengths = of_batch(lengths_);
    return spec;
  }
  TensorView query() const { return of_batch(query_); }
  int64_t batch() const { return batch_; }
  int64_t positions() const { return positions_; }

  // Whether position i of entry b may be chosen.
  bool valid(int64_t b, int64_t i) const {
    if (i < 0 || i >= (with_lengths_ ? lengths_.get<int64_t>(b) : positions_)) return false;
    return !with_candidates_ || candidates_.get<int64_t>(b, i) >= 0;
  }

 private:
  TensorView of_batch(const Buffer& buffer) const {
    TensorView view = buffer.view();
    view.shape[0] = batch_;
    return view;
  }

  uint32_t next() {
    seed_ = seed_ * 1664525u + 1013904223u;
    return seed_ >> 8;
  }

  void fill(const Buffer& buffer, bool plain) {
    const TensorView& view = buffer.view();
    const int64_t last = view.shape[view.rank - 1];
    int64_t rows = 1;
    for (int axis = 0; axis < view.rank - 1; ++axis) rows *= view.shape[axis];
    const int64_t stride = view.rank > 1 ? view.stride[view.rank - 2] : last;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t entry = view.rank == 3 ? i / view.shape[1] : 0;
      const int64_t at = view.rank == 3 ? entry * view.stride[0] + i % view.shape[1] * stride : i * stride;
      for (int64_t j = 0; j < last; ++j) {
        const uint8_t byte = static_cast<uint8_t>(next());
        const double value = value_of(plain ? byte % 224 : byte);
        store(value, dtype_, static_cast<char*>(view.data) + (at + j) * element_bytes(dtype_));
      }
    }
  }

  const DType dtype_;
  const int64_t batch_, rows_, dim_, vectors_;
  const bool with_candidates_, with_lengths_, shared_;
  const int64_t positions_;
  Buffer pool_, query_, candidates_, lengths_;
  uint32_t seed_;
};

}  // namespace hullkit::fuzz
