// SPDX-License-Identifier: Apache-2.0
// One query's candidates as kernels read them: addresses of valid rows, widened to the arithmetic type T.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "common/limits.h"
#include "hullkit/pool_spec.h"
#include "simd/simd.h"

namespace hullkit {

// Where the first NaN, or value beyond `largest`, stands; `count` if there is none.
template <typename T>
int64_t first_beyond(T largest, const T* values, int64_t count) {
  int broken = 0;  // no branch on a single element: the compiler vectorises this
  for (int64_t i = 0; i < count; ++i) broken |= !(std::abs(values[i]) <= largest);
  if (!broken) return count;
  int64_t i = 0;
  while (std::abs(values[i]) <= largest) ++i;
  return i;
}

template <typename T>
int64_t first_not_finite(const T* values, int64_t count) {
  return first_beyond(std::numeric_limits<T>::max(), values, count);
}

// The same for products that float64 sums are made of; those of any float32 are finite.
template <typename T>
int64_t first_overflow(const T* products, int64_t count) {
  if constexpr (std::is_same_v<T, double>) {
    return first_beyond(kLargestProduct, products, count);
  } else {
    return first_not_finite(products, count);
  }
}

template <typename T>
class PackedRows;
template <typename T>
class PackedVectors;

// Rows that PoolRows::multiply_tile takes at most.
inline constexpr int64_t kRowsPerTile = 64;

// How many candidates entry `b` has; ValueError if lengths say what cannot be.
int64_t valid_length(const PoolSpec& spec, int64_t b);

struct alignas(64) CacheLine {  // so that no wide load crosses two
  unsigned char bytes[64];
};

// A vector [d] of row `index` of a [B, d] view, widened if need be; checked finite under the name `argument`.
template <typename T>
class QueryVector {
 public:
  QueryVector(const TensorView& view, int64_t index, const char* argument);
  const T* data() const { return data_; }

 private:
  std::vector<T> copy_;
  const T* data_;
};

// Valid candidates of batch entry `b`, in position order.
// reuse = true: rows will be read many times, so narrower ones are widened once where that is small.
template <typename T>
class PoolRows {
 public:
  PoolRows(const PoolSpec& spec, int64_t b, bool reuse);
  // Only the rows at these positions, -1 skipped at the end; used where a support is already known.
  PoolRows(const PoolSpec& spec, int64_t b, const int64_t* positions, int64_t count);

  int64_t size() const { return static_cast<int64_t>(sources_.size()); }
  int64_t dim() const { return dim_; }
  int64_t batch_entry() const { return batch_entry_; }
  // Position 0..n-1 of valid candidate i; increasing in i, so ties may be decided on i.
  int64_t position(int64_t i) const { return all_valid_ ? i : positions_[i]; }

  // out[i] = <row i, vector> for every row, shared among threads where the pool is large enough to pay for that.
  void dots(const T* vector, T* out, int num_threads) const;
  // out[k][t] = <row of sources[t], vector k> for t < count: a pass over some rows.
  void dots(const void* const* sources, int64_t count, const PackedRows<T>& vectors, T* const* out,
            int num_threads) const;
  // out[v kRowsPerTile + i] = <row first + i, vector v> for i < count <= kRowsPerTile and every vector. Rows are
  // widened once for all vectors, and read once from memory.
  void multiply_tile(int64_t first, int64_t count, const PackedVectors<T>& vectors, T* out) const;
  // out[i] = <row i, row i>, with the bits that dots has for it.
  void squares(T* out, int num_threads) const;
  // Where the rows lie, in their own dtype; entries may be dropped or reordered in a copy handed to dots.
  const std::vector<const void*>& sources() const { return sources_; }
  // Row i in the arithmetic type; `buffer` [d] is used if the row must be widened: never if rows are in place.
  const T* row(int64_t i, T* buffer) const;
  bool in_place() const;
  // Throws the ValueError that explains why the product of row i and `argument` is not finite.
  [[noreturn]] void explain_not_finite(int64_t i, const std::string& argument) const;
  // Throws a ValueError if the products of all rows and `vector`, of which `product` is the least or the largest, are
  // lost below the smallest normal number: then they say little of which row is best. Products that are 0 as they
  // should be are none such. entry: whose vector it is.
  void check_not_lost(const T* vector, double product, const char* argument, int64_t entry) const {
    if (std::abs(product) < static_cast<double>(std::numeric_limits<T>::min()))
      explain_if_lost(vector, argument, entry);
  }

 private:
  void add(const PoolSpec& spec, int64_t position, int64_t row);
  void explain_if_lost(const T* vector, const char* argument, int64_t entry) const;
  void dots(const void* const* sources, int64_t count, const T* packed, int num_vectors, T* const* out,
            int num_threads) const;
  // visit(rows, how many, position of the first) for all rows of `sources`, in blocks where they must be widened,
  // shared among threads where the pool is large enough to pay for that.
  template <typename Visit>
  void visit(const void* const* sources, int64_t count, int num_threads, Visit&& visit) const;
  template <typename Visit>
  void visit_part(const void* const* sources, int64_t begin, int64_t end, Visit&& visit) const;
  void keep_widened();

  DType dtype_;
  int64_t batch_entry_;
  int64_t dim_;
  bool all_valid_ = true;
  const char* base_;
  int64_t row_bytes_;
  std::vector<const void*> sources_;
  std::vector<int64_t> positions_;
  std::unique_ptr<T[]> widened_;
};

// Up to kMaxDotVectors rows as a pass over the others reads them. The memory is taken once for many passes.
template <typename T>
class PackedRows {
 public:
  explicit PackedRows(const PoolRows<T>& rows);
  void pack(const int64_t* wanted, int count);
  const T* data() const { return reinterpret_cast<const T*>(lines_.get()); }
  int count() const { return count_; }

 private:
  const PoolRows<T>& rows_;
  std::unique_ptr<CacheLine[]> lines_;
  std::vector<T> widened_;  // [kMaxDotVectors, d] unless rows are in place
  int count_ = 0;
};

// Many vectors [d], for PoolRows::multiply_tile: kMaxDotVectors and kMaxDotVectors of them as SimdOps::pack lays them.
template <typename T>
class PackedVectors {
 public:
  PackedVectors(const T* const* vectors, int64_t count, int64_t dim);
  int64_t count() const { return count_; }
  // v: a multiple of kMaxDotVectors
  const T* from(int64_t v) const { return reinterpret_cast<const T*>(lines_.get() + v / kMaxDotVectors * stride_); }

 private:
  int64_t count_;
  int64_t stride_;  // of one such pack, in lines
  std::unique_ptr<CacheLine[]> lines_;
};

}  // namespace hullkit
