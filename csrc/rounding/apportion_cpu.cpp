// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "hullkit/apportion.h"
#include "hullkit/check.h"
#include "hullkit/parallel.h"

namespace hullkit {

void quotas(const double* weights, int64_t count, int64_t total, double* quotas) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    HULLKIT_CHECK(std::isfinite(weights[i]), "weights: expected finite values, got ", weights[i], " at position ", i);
    quotas[i] = std::max(weights[i], 0.0);
    sum += quotas[i];
  }
  HULLKIT_CHECK(std::isfinite(sum), "weights: expected a finite sum, got ", sum);
  for (int64_t i = 0; i < count; ++i) {
    const double share = sum > 0.0 ? quotas[i] / sum : 1.0 / static_cast<double>(count);
    quotas[i] = static_cast<double>(total) * share;
  }
}

void apportion_cpu(const TensorView& weights, int64_t total, const TensorView& counts, int num_threads) {
  const int64_t size = weights.shape[1];
  parallel_for(weights.shape[0], num_threads, [&](int64_t b) {
    std::vector<double> quota(size);
    quotas(weights.at<double>(b), size, total, quota.data());
    int64_t* count = counts.at<int64_t>(b);
    int64_t remaining = total;
    for (int64_t i = 0; i < size; ++i) {
      count[i] = static_cast<int64_t>(std::floor(quota[i]));
      remaining -= count[i];
      quota[i] -= static_cast<double>(count[i]);
    }
    HULLKIT_CHECK(remaining >= 0 && remaining <= size, "total: expected quotas of ", size,
                  " weights that float64 can sum to it, got ", total);
    std::vector<int64_t> order(size);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::partial_sort(order.begin(), order.begin() + remaining, order.end(),
                      [&](int64_t i, int64_t j) { return quota[i] != quota[j] ? quota[i] > quota[j] : i < j; });
    for (int64_t t = 0; t < remaining; ++t) ++count[order[t]];
  });
}

}  // namespace hullkit
