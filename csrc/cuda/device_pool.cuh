// A PoolSpec as kernels read it. Values nobody on the host may look at without waiting for the device (lengths,
// candidates, NaN) are checked here: what is out of range makes an entry broken, and is never followed.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cuda/ptx.cuh"
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

template <typename E>
struct DevicePool {
  static constexpr int64_t kNone = -1;    // not a candidate
  static constexpr int64_t kBroken = -2;  // lengths or candidates out of range

  // query [B, d] or [B, m, d]. `support` [B, S]: only the positions it names are rows, -1 none.
  DevicePool(const PoolSpec& pool, const TensorView& query_view, const TensorView& support_view = {})
      : rows(static_cast<const E*>(pool.rows.data)),
        query(static_cast<const E*>(query_view.data)),
        lengths(static_cast<const int64_t*>(pool.lengths.data)),
        candidates(static_cast<const int64_t*>(pool.candidates.data)),
        support(static_cast<const int64_t*>(support_view.data)),
        batch_stride(pool.rows.stride[0]),
        row_stride(pool.rows.stride[1]),
        query_stride(query_view.stride[0]),
        vector_stride(query_view.rank == 3 ? query_view.stride[1] : 0),
        vectors(query_view.rank == 3 ? query_view.shape[1] : 1),
        length_stride(pool.lengths.stride[0]),
        candidates_stride(pool.candidates.stride[0]),
        candidate_stride(pool.candidates.stride[1]),
        support_stride(support_view.stride[0]),
        num_rows(pool.rows.shape[1]),
        positions(pool.positions()),
        size(support_view.defined() ? support_view.shape[1] : pool.positions()),
        dim(pool.dim()),
        aligned((reinterpret_cast<uintptr_t>(rows) | reinterpret_cast<uintptr_t>(query) |
                 (batch_stride | row_stride | query_stride | vector_stride) * sizeof(E)) %
                    16 ==
                0) {}

  // The row of the pool that is candidate i < size of entry b; kNone or kBroken if there is none.
  __device__ int64_t row(int64_t b, int64_t i) const {
    if (support != nullptr) {
      i = support[b * support_stride + i];
      if (i < -1 || i >= positions) return kBroken;
      if (i == -1) return kNone;
    }
    if (lengths != nullptr) {
      const int64_t length = lengths[b * length_stride];
      if (length < 1 || length > positions) return kBroken;
      if (i >= length) return kNone;
    }
    if (candidates == nullptr) return i;
    const int64_t candidate = candidates[b * candidates_stride + i * candidate_stride];
    if (candidate < -1 || candidate >= num_rows) return kBroken;
    return candidate;
  }

  __device__ const E* row_at(int64_t b, int64_t row) const { return rows + b * batch_stride + row * row_stride; }
  __device__ const E* query_at(int64_t b, int64_t vector = 0) const {
    return query + b * query_stride + vector * vector_stride;
  }

  const E* rows;
  const E* query;
  const int64_t* lengths;
  const int64_t* candidates;
  const int64_t* support;
  int64_t batch_stride, row_stride, query_stride, vector_stride, vectors, length_stride, candidates_stride,
      candidate_stride, support_stride;
  int64_t num_rows, positions, size, dim;
  bool aligned;  // all rows and queries, to 16 bytes
};

}  // namespace hullkit
