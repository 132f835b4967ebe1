// SPDX-License-Identifier: Apache-2.0
// The touched vertices of one Frank-Wolfe run and their weights: what becomes of them once the run is over.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "frank_wolfe/capped_simplex.h"
#include "hullkit/check.h"
#include "hullkit/frank_wolfe.h"
#include "pool/gram_columns.h"
#include "pool/pool_rows.h"
#include "simd/simd.h"

namespace hullkit {

template <typename T>
class Support {
 public:
  // A vector minus the iterate, from the vectors themselves.
  struct Difference {
    std::vector<T> vector;
    double squared;  // its norm
    double iterate;  // its product with the iterate
  };

  Support(const PoolRows<T>& rows, const T* query) : rows_(rows), query_(query) {}

  Difference minus_iterate(const T* vector) const { return minus_iterate(vector, touched, weights); }

  double squared_norm(const T* vector) const {
    T product;
    T* const out = &product;
    simd().ops<T>().dots(&vector, 1, vector, 1, rows_.dim(), &out);
    return product;
  }

  double query_squared() const {
    const T squared = static_cast<T>(squared_norm(query_));
    HULLKIT_CHECK(first_overflow(&squared, 1) == 1,
                  "query: expected a squared norm within the range of the arithmetic, got an overflow in entry ",
                  rows_.batch_entry(), "; scale the embeddings down");
    return squared;
  }

  double own_product(int64_t i) const {
    std::vector<T> buffer(rows_.dim());
    const T product = static_cast<T>(squared_norm(rows_.row(i, buffer.data())));
    if (first_overflow(&product, 1) == 0) rows_.explain_not_finite(i, "itself");
    return product;
  }

  // The input of rounding, for the support in the order of the result: products with the query (from base), the Gram
  // matrix row by row, and weights. All are known by now and have the bits of a new computation.
  void products(const std::vector<double>& base, const GramColumns<T>& columns, std::vector<double>* products,
                std::vector<double>* gram, std::vector<double>* sorted_weights) const {
    const std::vector<int64_t> order = by_weight();
    const size_t m = order.size();
    products->resize(m);
    gram->resize(m * m);
    sorted_weights->resize(m);
    for (size_t s = 0; s < m; ++s) {
      const int64_t i = touched[order[s]];
      (*products)[s] = base[i];
      (*sorted_weights)[s] = weights[order[s]];
      for (size_t t = 0; t <= s; ++t) {
        const int64_t j = touched[order[t]];
        (*gram)[s * m + t] = (*gram)[t * m + s] = product(columns, i, j);
      }
    }
  }

  // ||query - sum_s other_weights[s] s|| over the support in the order of the result.
  double residual_norm(const std::vector<double>& other_weights) const {
    std::vector<int64_t> vertices;
    for (const int64_t t : by_weight()) vertices.push_back(touched[t]);
    return std::sqrt(minus_iterate(query_, vertices, other_weights).squared);
  }

  // Fills entry b of the result; the certificates are recomputed from the input.
  void write(const FrankWolfeResult& result, int64_t b, int64_t num_iters, Status status, const CappedSimplex& simplex,
             int num_threads) const {
    const std::vector<int64_t> order = by_weight();
    for (int64_t t = 0; t < result.indices.shape[1]; ++t) {
      const bool used = t < static_cast<int64_t>(order.size());
      *result.indices.at<int64_t>(b, t) = used ? rows_.position(touched[order[t]]) : -1;
      *result.weights.at<double>(b, t) = used ? weights[order[t]] : 0.0;
    }
    *result.support_size.at<int64_t>(b) = static_cast<int64_t>(touched.size());
    const Difference residual = minus_iterate(query_);
    std::vector<T> scores(rows_.size());
    rows_.dots(residual.vector.data(), scores.data(), num_threads);
    const int64_t broken = first_not_finite(scores.data(), rows_.size());
    // A support of one asks for no norm, so it is an answer without a gap where norms overflow.
    const bool asked = status != Status::kMaxSupport || touched.size() > 1;
    if (broken < rows_.size() && asked) rows_.explain_not_finite(broken, "the residual");
    double best = 0.0;
    if (simplex.size == 1) {
      best = *std::max_element(scores.begin(), scores.end());
    } else {
      std::partial_sort(scores.begin(), scores.begin() + simplex.size, scores.end(), std::greater<T>());
      for (int64_t r = 0; r < simplex.size; ++r)
        best += (r + 1 < simplex.size ? simplex.cap : simplex.last) * scores[r];
    }
    *result.residual_norm.at<double>(b) = std::sqrt(residual.squared);
    *result.dual_gap.at<double>(b) = best - residual.iterate;
    *result.num_iters.at<int64_t>(b) = num_iters;
    *result.status.at<int64_t>(b) = static_cast<int64_t>(status);
  }

  std::vector<int64_t> touched;
  std::vector<double> weights;  // aligned with touched

 private:
  // Places in touched by falling weight, lowest index on a tie.
  std::vector<int64_t> by_weight() const {
    std::vector<int64_t> order(touched.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [this](int64_t i, int64_t j) {
      return weights[i] != weights[j] ? weights[i] > weights[j] : touched[i] < touched[j];
    });
    return order;
  }

  // <x_i, x_j> of two touched vertices; the last one touched may be without a column.
  double product(const GramColumns<T>& columns, int64_t i, int64_t j) const {
    if (columns.known(i)) return columns.known_column(i)[j];
    return i == j ? own_product(i) : columns.known_column(j)[i];
  }

  Difference minus_iterate(const T* vector, const std::vector<int64_t>& vertices,
                           const std::vector<double>& shares) const {
    const SimdOps<T>& ops = simd().ops<T>();
    std::vector<double> sum(rows_.dim());  // the iterate
    if (rows_.in_place()) {
      std::vector<const T*> sources;
      for (const int64_t i : vertices) sources.push_back(rows_.row(i, nullptr));
      ops.add_scaled(sum.data(), sources.data(), shares.data(), static_cast<int64_t>(sources.size()), rows_.dim());
    } else {
      std::vector<T> buffer(rows_.dim());
      for (size_t t = 0; t < vertices.size(); ++t) {
        const T* const vertex = rows_.row(vertices[t], buffer.data());
        ops.add_scaled(sum.data(), &vertex, &shares[t], 1, rows_.dim());
      }
    }
    Difference difference{std::vector<T>(rows_.dim()), 0.0, 0.0};
    difference.squared = ops.subtract(vector, sum.data(), rows_.dim(), difference.vector.data(), &difference.iterate);
    return difference;
  }

  const PoolRows<T>& rows_;
  const T* query_;
};

}  // namespace hullkit
