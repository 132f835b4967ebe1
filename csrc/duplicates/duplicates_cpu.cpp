// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "hullkit/duplicates.h"
#include "hullkit/parallel.h"
#include "pool/pool_rows.h"
#include "simd/simd.h"

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
  std::vector<int64_t> representative(n, -1);
  std::vector<int64_t> open(n);  // rows without a representative
  std::iota(open.begin(), open.end(), int64_t{0});
  std::vector<const void*> sources = rows.sources();  // aligned with open
  PackedRows<T> packed(rows);
  std::vector<T> products(kMaxDotVectors * n);
  // A pass over the open rows compares them with the first few. What it found is needed by no later one.
  while (!open.empty()) {
    const auto size = static_cast<int64_t>(open.size());
    const int count = static_cast<int>(std::min<int64_t>(kMaxDotVectors, size));
    packed.pack(open.data(), count);
    T* columns[kMaxDotVectors];
    for (int k = 0; k < count; ++k) columns[k] = products.data() + k * n;
    rows.dots(sources.data(), size, packed, columns, num_threads);
    for (int k = 0; k < count; ++k) {
      const int64_t r = open[k];
      if (representative[r] >= 0) continue;  // a copy of another of the few
      representative[r] = r;
      for (int64_t t = k + 1; t < size; ++t) {
        const int64_t i = open[t];
        if (representative[i] < 0 && columns[k][t] > (1.0 - eps) * norms[r] * norms[i]) representative[i] = r;
      }
    }
    int64_t left = 0;
    for (int64_t t = count; t < size; ++t) {
      if (representative[open[t]] >= 0) continue;
      open[left] = open[t];
      sources[left++] = sources[t];
    }
    open.resize(left);
    sources.resize(left);
  }
  for (int64_t i = 0; i < width; ++i) out[i] = -1;
  for (int64_t i = 0; i < n; ++i) out[rows.position(i)] = rows.position(representative[i]);
}

}  // namespace

void duplicates_cpu(const PoolSpec& pool, double eps, const TensorView& representatives, int num_threads) {
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_query(pool.batch(), pool.positions() * pool.dim(), num_threads, [&](int64_t b, int threads) {
      duplicates_one<T>(pool, b, std::max(eps, kLeastEps), representatives.shape[1], representatives.at<int64_t>(b),
                        threads);
    });
  });
}

}  // namespace hullkit
