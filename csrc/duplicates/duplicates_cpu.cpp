// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "hullkit/duplicates.h"
#include "hullkit/parallel.h"
#include "pool/gram_columns.h"
#include "pool/pool_rows.h"

namespace hullkit {
namespace {

template <typename T>
std::vector<double> norms_of(const PoolRows<T>& rows, int num_threads) {
  std::vector<T> squares(rows.size());
  rows.squares(squares.data(), num_threads);
  const int64_t broken = first_not_finite(squares.data(), rows.size());
  if (broken < rows.size()) rows.explain_not_finite(broken, "itself");
  // The product of two squared norms underflows or overflows long before the product of two norms.
  std::vector<double> norms(squares.begin(), squares.end());
  for (double& norm : norms) norm = std::sqrt(norm);
  return norms;
}

template <typename T>
void duplicates_one(const PoolSpec& pool, int64_t b, double eps, int64_t width, int64_t* out, int num_threads) {
  const PoolRows<T> rows(pool, b, /*reuse=*/true);
  const int64_t n = rows.size();
  const std::vector<double> norms = norms_of(rows, num_threads);
  GramColumns<T> columns(rows, num_threads);
  std::vector<int64_t> representative(n, -1);
  std::vector<double> likely(n);  // the first ones not yet spoken for are asked for next
  for (int64_t i = 0; i < n; ++i) likely[i] = -static_cast<double>(i);
  for (int64_t r = 0; r < n; ++r) {
    if (representative[r] >= 0) continue;
    representative[r] = r;
    const T* const column = columns.column(r, likely.data(), n - r - 1);
    for (int64_t i = r + 1; i < n; ++i) {
      if (representative[i] >= 0 || !(column[i] > (1.0 - eps) * norms[r] * norms[i])) continue;
      representative[i] = r;
      likely[i] = -std::numeric_limits<double>::infinity();
    }
  }
  for (int64_t i = 0; i < width; ++i) out[i] = -1;
  for (int64_t i = 0; i < n; ++i) out[rows.position(i)] = rows.position(representative[i]);
}

}  // namespace

void duplicates_cpu(const PoolSpec& pool, double eps, const TensorView& representatives, int num_threads) {
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_query(pool.batch(), num_threads, [&](int64_t b, int threads) {
      duplicates_one<T>(pool, b, std::max(eps, kLeastEps), representatives.shape[1], representatives.at<int64_t>(b),
                        threads);
    });
  });
}

}  // namespace hullkit
