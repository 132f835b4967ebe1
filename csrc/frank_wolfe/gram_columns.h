// Columns of a pool's Gram matrix, each computed once, on first touch.
#pragma once

#include <algorithm>
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
        packed_(rows),
        products_(kMaxDotVectors * rows.size()) {
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
    for (const int64_t j : pending_) {
      if (j == i || most == 0) continue;
      if (count == most) {
        if (!(scores[j] > scores[next[count - 1]])) continue;
      } else {
        ++count;
      }
      int at = count - 1;
      for (; at > 0 && scores[j] > scores[next[at - 1]]; --at) next[at] = next[at - 1];
      next[at] = j;
    }
    return count;
  }

  void compute(const int64_t* wanted, int count) {
    const int64_t n = rows_.size();
    packed_.pack(wanted, count);
    T* products[kMaxDotVectors];
    for (int k = 0; k < count; ++k) products[k] = products_.data() + k * n;
    rows_.dots(pending_sources_.data(), static_cast<int64_t>(pending_.size()), packed_, products, num_threads_);
    memory_.emplace_back(new T[count * n]);
    for (int k = 0; k < count; ++k) {
      T* const column = columns_[wanted[k]] = memory_.back().get() + k * n;
      for (size_t t = 0; t < pending_.size(); ++t) column[pending_[t]] = products[k][t];
      for (const int64_t j : known_) column[j] = columns_[j][wanted[k]];
    }
    for (int k = 0; k < count; ++k) retire(wanted[k]);
  }

  // Row i needs no more products: its column has them all. The last pending row takes its place.
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
  std::vector<T> products_;  // [kMaxDotVectors, n] of one pass
};

}  // namespace hullkit
