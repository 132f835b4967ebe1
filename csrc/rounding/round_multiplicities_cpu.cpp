// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "hullkit/parallel.h"
#include "hullkit/round_multiplicities.h"
#include "pool/pool_rows.h"
#include "rounding/rounding.h"

namespace hullkit {
namespace {

template <typename T>
void round_one(const PoolSpec& pool, const TensorView& query, int64_t b, const int64_t* indices, int64_t width,
               const double* weights, const RoundingParams& params, int64_t* counts) {
  const auto [total, exchange_passes, max_multiplicity] = params;
  const QueryVector<T> query_vector(query, b, "query");
  const PoolRows<T> rows(pool, b, indices, width);
  const int64_t m = rows.size();
  check_room(max_multiplicity, total, m, "support points", b);
  std::vector<double> products(m);
  std::vector<T> column(m), next_column(m);
  rows.dots(query_vector.data(), column.data(), 1);
  for (int64_t i = 0; i < m; ++i) {
    if (!std::isfinite(column[i])) rows.explain_not_finite(i, "query");
    products[i] = column[i];
  }
  rows.check_not_lost(query_vector.data(), *std::max_element(products.begin(), products.end()), "query", b);
  // The lower triangle, two columns a pass; <x, y> and <y, x> have the same bits.
  std::vector<double> gram(m * m);
  PackedRows<T> packed(rows);
  for (int64_t j = 0; j < m; j += 2) {
    const int num_columns = j + 1 < m ? 2 : 1;
    const int64_t wanted[2] = {j, j + 1};
    packed.pack(wanted, num_columns);
    T* const out[2] = {column.data(), next_column.data()};
    rows.dots(rows.sources().data() + j, m - j, packed, out, 1);
    for (int k = 0; k < num_columns; ++k) {
      for (int64_t i = j; i < m; ++i) {
        if (!std::isfinite(out[k][i - j])) rows.explain_not_finite(i, "the support");
        gram[i * m + j + k] = gram[(j + k) * m + i] = out[k][i - j];
      }
    }
  }

  Rounding rounding(std::move(gram), std::move(products), weights, total, max_multiplicity);
  rounding.run(exchange_passes, counts, width);
}

}  // namespace

void round_multiplicities_cpu(const PoolSpec& pool, const TensorView& query, const TensorView& indices,
                              const TensorView& weights, const RoundingParams& rounding, const TensorView& counts,
                              int num_threads) {
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(pool.batch(), num_threads, [&](int64_t b) {
      round_one<T>(pool, query, b, indices.at<int64_t>(b), indices.shape[1], weights.at<double>(b), rounding,
                   counts.at<int64_t>(b));
    });
  });
}

}  // namespace hullkit
