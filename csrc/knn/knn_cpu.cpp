// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "hullkit/knn.h"
#include "hullkit/parallel.h"
#include "pool/pool_rows.h"

namespace hullkit {
namespace {

template <typename T>
void knn_one(const PoolSpec& pool, const TensorView& query, int64_t b, int64_t k, int64_t* indices, double* values,
             int num_threads) {
  const QueryVector<T> query_vector(query, b, "query");
  const PoolRows<T> rows(pool, b, /*reuse=*/false);
  const int64_t n = rows.size();
  std::vector<T> products(n);
  rows.dots(query_vector.data(), products.data(), num_threads);
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(products[i])) rows.explain_not_finite(i, "query");
  }
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  const int64_t found = std::min(k, n);
  std::partial_sort(order.begin(), order.begin() + found, order.end(), [&](int64_t i, int64_t j) {
    return products[i] != products[j] ? products[i] > products[j] : i < j;
  });
  for (int64_t t = 0; t < k; ++t) {
    indices[t] = t < found ? rows.position(order[t]) : -1;
    values[t] = t < found ? products[order[t]] : -std::numeric_limits<double>::infinity();
  }
}

}  // namespace

void knn_cpu(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& values,
             int num_threads) {
  const int64_t k = indices.shape[1];
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_query(pool.batch(), pool.positions() * pool.dim(), num_threads, [&](int64_t b, int threads) {
      knn_one<T>(pool, query, b, k, indices.at<int64_t>(b), values.at<double>(b), threads);
    });
  });
}

}  // namespace hullkit
