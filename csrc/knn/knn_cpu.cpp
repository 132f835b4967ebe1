// SPDX-License-Identifier: Apache-2.0
#include <limits>

#include "hullkit/knn.h"
#include "knn/nearest.h"
#include "pool/products.h"

namespace hullkit {

void knn_cpu(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& values,
             int num_threads) {
  const int64_t k = indices.shape[1];
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    finish_products<T>(pool, query, "query", num_threads, Nearest<T>(k),
                       [&](int64_t b, Nearest<T>& nearest, const PoolRows<T>& rows, const T* vector, int threads) {
                         const auto& sorted = nearest.sorted(threads);
                         rows.check_not_lost(vector, sorted.front().value, "query", b);
                         const auto found = static_cast<int64_t>(sorted.size());
                         for (int64_t t = 0; t < k; ++t) {
                           *indices.at<int64_t>(b, t) = t < found ? rows.position(sorted[t].row) : -1;
                           *values.at<double>(b, t) =
                               t < found ? sorted[t].value : -std::numeric_limits<double>::infinity();
                         }
                       });
  });
}

}  // namespace hullkit
