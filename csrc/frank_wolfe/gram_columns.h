// Columns of a pool's Gram matrix, each computed once, on first touch.
#pragma once

#include <memory>
#include <vector>

#include "pool/pool_rows.h"

namespace hullkit {

// Only products not known from another column by symmetry are computed. A pass over the pool is bound by
// reading it, so each computes a second column as well: that of the row most likely to be asked for next.
// Neither changes a bit of any product.
template <typename T>
class GramColumns {
 public:
  GramColumns(const PoolRows<T>& rows, int num_threads)
      : rows_(rows),
        num_threads_(num_threads),
        columns_(rows.size()),
        pending_(rows.size()),
        pending_sources_(rows.sources()),
        vectors_{std::vector<T>(rows.dim()), std::vector<T>(rows.dim())},
        products_{std::vector<T>(rows.size()), std::vector<T>(rows.size())} {
    for (int64_t i = 0; i < rows.size(); ++i) pending_[i] = i;
  }

  bool known(int64_t i) const { return columns_[i] != nullptr; }
  const T* known_column(int64_t i) const { return columns_[i].get(); }

  // [n], entry j is <row i, row j>. scores [n] rank the rows by how soon their columns may be wanted.
  const T* column(int64_t i, const double* scores) {
    if (!known(i)) {
      const int64_t wanted[2] = {i, likely_next(i, scores)};
      compute(wanted, wanted[1] < 0 ? 1 : 2);
    }
    return columns_[i].get();
  }

 private:
  int64_t likely_next(int64_t i, const double* scores) const {
    int64_t next = -1;
    for (const int64_t j : pending_) {
      if (j != i && (next < 0 || scores[j] > scores[next] || (scores[j] == scores[next] && j < next))) next = j;
    }
    return next;
  }

  void compute(const int64_t* wanted, int count) {
    const T* vectors[2];
    T* const products[2] = {products_[0].data(), products_[1].data()};
    for (int k = 0; k < count; ++k) vectors[k] = rows_.row(wanted[k], vectors_[k].data());
    rows_.dots(pending_sources_.data(), static_cast<int64_t>(pending_.size()), vectors, count, products, num_threads_);
    for (int k = 0; k < count; ++k) {
      T* column = new T[rows_.size()];
      columns_[wanted[k]].reset(column);
      for (size_t t = 0; t < pending_.size(); ++t) column[pending_[t]] = products[k][t];
      for (const int64_t j : known_) column[j] = columns_[j][wanted[k]];
    }
    for (int k = 0; k < count; ++k) retire(wanted[k]);
  }

  // Row i needs no more products: its column has them all.
  void retire(int64_t i) {
    known_.push_back(i);
    for (size_t t = 0; t < pending_.size(); ++t) {
      if (pending_[t] != i) continue;
      pending_[t] = pending_.back();
      pending_sources_[t] = pending_sources_.back();
      pending_.pop_back();
      pending_sources_.pop_back();
      return;
    }
  }

  const PoolRows<T>& rows_;
  int num_threads_;
  std::vector<std::unique_ptr<T[]>> columns_;
  std::vector<int64_t> known_;
  std::vector<int64_t> pending_;  // rows without a column
  std::vector<const void*> pending_sources_;
  std::vector<T> vectors_[2];
  std::vector<T> products_[2];
};

}  // namespace hullkit
