// SPDX-License-Identifier: Apache-2.0
// A PoolSpec as kernels read it. Values nobody on the host may look at without waiting for the device (lengths,
// candidates, NaN) are checked here: what is out of range makes an entry broken, and is never followed.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cuda/primitives/ptx.cuh"
#include "hullkit/pool_spec.h"

namespace hullkit {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ inline double to_double(double value) { return value; }
__device__ inline double to_double(float value) { return value; }
__device__ inline double to_double(Float16 value) { return ptx::from_f16(value.bits); }
__device__ inline double to_double(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// Calls kernel(E{}) with E the type of the elements.
template <typename Kernel>
void with_element(DType dtype, Kernel&& kernel) {
  switch (dtype) {
    case DType::kFloat64:
      return kernel(double{});
    case DType::kFloat32:
      return kernel(float{});
    case DType::kFloat16:
      return kernel(Float16{});
    case DType::kBFloat16:
      return kernel(BFloat16{});
    default:
      throw std::invalid_argument("expected a floating dtype");
  }
}

// The same on the device, where threads of a warp always agree on it: one kernel reads rows of all types.
template <typename Task>
__device__ void with_element_on_device(DType dtype, Task&& task) {
  switch (dtype) {
    case DType::kFloat64:
      return task(double{});
    case DType::kFloat32:
      return task(float{});
    case DType::kFloat16:
      return task(Float16{});
    default:
      return task(BFloat16{});
  }
}

// Addresses are of bytes, and so are strides of rows and queries: what their elements are is `dtype`.
struct DevicePool {
  static constexpr int64_t kNone = -1;    // not a candidate
  static constexpr int64_t kBroken = -2;  // lengths or candidates out of range

  // query [B, d] or [B, m, d]. `support` [B, S]: only the positions it names are rows, -1 none.
  DevicePool(const PoolSpec& pool, const TensorView& query_view, const TensorView& support_view = {})
      : rows(static_cast<const char*>(pool.rows.data)),
        query(static_cast<const char*>(query_view.data)),
        lengths(static_cast<const int64_t*>(pool.lengths.data)),
        candidates(static_cast<const int64_t*>(pool.candidates.data)),
        support(static_cast<const int64_t*>(support_view.data)),
        batch_stride(pool.rows.stride[0] * element_bytes(pool.rows.dtype)),
        row_stride(pool.rows.stride[1] * element_bytes(pool.rows.dtype)),
        query_stride(query_view.stride[0] * element_bytes(query_view.dtype)),
        vector_stride(query_view.rank == 3 ? query_view.stride[1] * element_bytes(query_view.dtype) : 0),
        vectors(query_view.rank == 3 ? query_view.shape[1] : 1),
        length_stride(pool.lengths.stride[0]),
        candidates_stride(pool.candidates.stride[0]),
        candidate_stride(pool.candidates.stride[1]),
        support_stride(support_view.stride[0]),
        num_rows(pool.rows.shape[1]),
        positions(pool.positions()),
        size(support_view.defined() ? support_view.shape[1] : pool.positions()),
        dim(pool.dim()),
        dtype(pool.rows.dtype),
        aligned((reinterpret_cast<uintptr_t>(rows) | reinterpret_cast<uintptr_t>(query) | batch_stride | row_stride |
                 query_stride | vector_stride) %
                    16 ==
                0) {}

  // How many positions of entry b may be candidates; kBroken if that is out of range.
  __device__ int64_t length(int64_t b) const {
    if (lengths == nullptr) return positions;
    const int64_t length = lengths[b * length_stride];
    return length < 1 || length > positions ? kBroken : length;
  }

  // The row of the pool at position i of entry b, whose length is known; kNone or kBroken if there is none.
  __device__ int64_t row(int64_t b, int64_t i, int64_t length) const {
    if (length == kBroken) return kBroken;
    if (i >= length) return kNone;
    if (candidates == nullptr) return i;
    const int64_t candidate = candidates[b * candidates_stride + i * candidate_stride];
    return candidate < -1 || candidate >= num_rows ? kBroken : candidate;
  }

  __device__ int64_t row(int64_t b, int64_t i) const { return row(b, i, length(b)); }

  // The row of point s < size. Points are those of the support if there is one, else all positions.
  __device__ int64_t row_of_point(int64_t b, int64_t s) const {
    if (support == nullptr) return row(b, s);
    const int64_t i = support[b * support_stride + s];
    if (i < -1 || i >= positions) return kBroken;
    return i == -1 ? kNone : row(b, i);
  }

  __device__ bool rough() const { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }  // float32 products

  __device__ const char* row_at(int64_t b, int64_t row) const { return rows + b * batch_stride + row * row_stride; }
  __device__ const char* query_at(int64_t b, int64_t vector = 0) const {
    return query + b * query_stride + vector * vector_stride;
  }

  const char* rows;
  const char* query;
  const int64_t* lengths;
  const int64_t* candidates;
  const int64_t* support;
  int64_t batch_stride, row_stride, query_stride, vector_stride, vectors, length_stride, candidates_stride,
      candidate_stride, support_stride;
  int64_t num_rows, positions, size, dim;
  DType dtype;
  bool aligned;  // all rows and queries, to 16 bytes
};

}  // namespace hullkit
