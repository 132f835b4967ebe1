// SPDX-License-Identifier: Apache-2.0
// Columns of a pool's Gram matrix, each computed once, on first touch.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "pool/pool_rows.h"
#include "simd/simd.h"

namespace hullkit {

// Only products not known from another column by symmetry are computed. A pass over the pool is bound by
// reading it, so each computes kMaxDotVectors columns: the others are those of the rows most likely to be asked for
// next. Neither changes a bit of any product.
template <typename T>
class GramColumns {
 public:
  GramColumns(const PoolRows<T>& rows, int num_threads)
      : rows_(rows),
        num_threads_(num_threads),
        columns_(rows.size()),
        pending_(rows.size()),
        pending_sources_(rows.sources()),
        place_(rows.size()),
        packed_(rows) {
    for (int64_t i = 0; i < rows.size(); ++i) pending_[i] = place_[i] = i;
  }

  bool known(int64_t i) const { return columns_[i] != nullptr; }
  const T* known_column(int64_t i) const { return columns_[i]; }

  // [n], entry j is <row i, row j>. scores [n] rank the rows by how soon their columns may be wanted; at most
  // `later` more will be.
  const T* column(int64_t i, const double* scores, int64_t later) {
    if (!known(i)) {
      int64_t wanted[kMaxDotVectors] = {i};
      const int64_t more = std::clamp<int64_t>(later, 0, kMaxDotVectors - 1);
      compute(wanted, 1 + likely_next(i, scores, wanted + 1, more));
    }
    return columns_[i];
  }

 private:
  // Up to `most` rows without a column, other than i, by falling score; returns how many.
  int likely_next(int64_t i, const double* scores, int64_t* next, int64_t most) const {
    int count = 0;
    double to_beat = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < rows_.size() && most > 0; ++j) {
      if (!(scores[j] > to_beat) || j == i || known(j)) continue;
      if (count < most) ++count;
      int at = count - 1;
      for (; at > 0 && scores[j] > scores[next[at - 1]]; --at) next[at] = next[at - 1];
      next[at] = j;
      if (count == most) to_beat = scores[next[count - 1]];
    }
    return count;
  }

  void compute(const int64_t* wanted, int count) {
    const int64_t n = rows_.size(), num_pending = static_cast<int64_t>(pending_.size());
    memory_.emplace_back(new T[count * n]);
    T* columns[kMaxDotVectors];
    for (int k = 0; k < count; ++k) columns[k] = memory_.back().get() + k * n;
    packed_.pack(wanted, count);
    rows_.dots(pending_sources_.data(), num_pending, packed_, columns, num_threads_);
    for (int k = 0; k < count; ++k) {
      T* const column = columns[k];
      for (const int64_t j : known_) {
        if (j < num_pending) column[pending_[j]] = column[j];
        column[j] = columns_[j][wanted[k]];
      }
    }
    for (int k = 0; k < count; ++k) {
      columns_[wanted[k]] = columns[k];
      retire(wanted[k]);
    }
  }

  // Row i needs no more products: its column has them all. The last pending row takes its place. So the first places
  // hold the rows of the same number, but for those of known rows, which hold rows from beyond the last place.
  void retire(int64_t i) {
    known_.push_back(i);
    const int64_t at = place_[i];
    place_[pending_.back()] = at;
    pending_[at] = pending_.back();
    pending_sources_[at] = pending_sources_.back();
    pending_.pop_back();
    pending_sources_.pop_back();
  }

  const PoolRows<T>& rows_;
  int num_threads_;
  std::vector<T*> columns_;                   // null if unknown
  std::vector<std::unique_ptr<T[]>> memory_;  // of the columns of one pass
  std::vector<int64_t> known_;
  std::vector<int64_t> pending_;  // rows without a column
  std::vector<const void*> pending_sources_;
  std::vector<int64_t> place_;  // of a row in pending_
  PackedRows<T> packed_;
};

}  // namespace hullkit
