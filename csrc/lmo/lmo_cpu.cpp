// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <vector>

#include "hullkit/lmo.h"
#include "hullkit/parallel.h"
#include "pool/pool_rows.h"

namespace hullkit {
namespace {

template <typename T>
void lmo_one(const PoolSpec& pool, const TensorView& direction, int64_t b, int64_t* index, double* value,
             int num_threads) {
  const QueryVector<T> direction_vector(direction, b, "direction");
  const PoolRows<T> rows(pool, b, /*reuse=*/false);
  std::vector<T> products(rows.size());
  rows.dots(direction_vector.data(), products.data(), num_threads);
  int64_t best = 0;
  for (int64_t i = 0; i < rows.size(); ++i) {
    if (!std::isfinite(products[i])) rows.explain_not_finite(i, "direction");
    if (products[i] < products[best]) best = i;
  }
  *index = rows.position(best);
  *value = products[best];
}

}  // namespace

void lmo_cpu(const PoolSpec& pool, const TensorView& direction, const TensorView& index, const TensorView& value,
             int num_threads) {
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_query(pool.batch(), pool.positions() * pool.dim(), num_threads, [&](int64_t b, int threads) {
      lmo_one<T>(pool, direction, b, index.at<int64_t>(b), value.at<double>(b), threads);
    });
  });
}

}  // namespace hullkit
