// SPDX-License-Identifier: Apache-2.0
// With y = sum_i (c_i / N) s_i and h = G c - N b, where G is the support's Gram matrix and b_i = <s_i, q>:
//   N^2 (L(c + e_i) - L(c))       = 2 h_i + G_ii
//   N^2 (L(c - e_i + e_j) - L(c)) = 2 (h_j - h_i) + G_ii + G_jj - 2 G_ij
// so a candidate move is O(1), and a move made is O(m).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "hullkit/apportion.h"
#include "hullkit/check.h"
#include "hullkit/interrupt.h"

namespace hullkit {

inline constexpr double kMinImprovement = 1e-14;

// One point gets 1 / (kParts m) of what is left to a support of m points at once, or one unit. Much is left where a
// cap takes from a heavy point: the number of steps grows with the logarithm of it.
inline constexpr int64_t kParts = 16;

// Weights at a cap are quotas of max_multiplicity but for rounding, which must not take a unit from them.
inline double slack(int64_t max_multiplicity, int64_t total) { return max_multiplicity < total ? 1.0 + 1e-13 : 1.0; }

// Whether entry b's `count` rows can take the total.
inline void check_room(int64_t max_multiplicity, int64_t total, int64_t count, const char* rows, int64_t b) {
  const int64_t least = (total + count - 1) / count;
  HULLKIT_CHECK(max_multiplicity >= least, "max_multiplicity: expected at least ", least, " for a total of ", total,
                " over the ", count, " ", rows, " of entry ", b, ", got ", max_multiplicity);
}

class Rounding {
 public:
  // gram [m, m], products [m] = <s_i, q>, weights [m]; m * max_multiplicity >= total
  Rounding(std::vector<double> gram, std::vector<double> products, const double* weights, int64_t total,
           int64_t max_multiplicity)
      : size_(static_cast<int64_t>(products.size())),
        total_(static_cast<double>(total)),
        max_multiplicity_(max_multiplicity),
        gram_(std::move(gram)),
        slope_(std::move(products)),
        diagonal_(size_),
        counts_(size_) {
    for (int64_t i = 0; i < size_; ++i) diagonal_[i] = gram_[i * (size_ + 1)];
    std::vector<double> quota(size_);
    quotas(weights, size_, total, quota.data());
    for (double& h : slope_) h *= -total_;
    remaining_ = total;
    for (int64_t i = 0; i < size_; ++i) {
      const double whole =
          std::min(std::floor(quota[i] * slack(max_multiplicity, total)), static_cast<double>(max_multiplicity));
      counts_[i] = static_cast<int64_t>(whole);
      remaining_ -= counts_[i];
      if (whole > 0.0) add_to_slope(i, whole);
    }
    for (const double h : slope_) {
      HULLKIT_CHECK(std::abs(h) <= kLargestProduct, "pool: expected inner products with query, times total = ", total,
                    ", within the range of float64, got an overflow; scale the embeddings down");
    }
  }

  // Writes counts [width], 0 beyond the support.
  void run(int64_t exchange_passes, int64_t* counts, int64_t width) {
    complete();
    for (int64_t pass = 0; pass < exchange_passes && exchange(); ++pass) {
    }
    for (int64_t i = 0; i < width; ++i) counts[i] = i < size_ ? counts_[i] : 0;
  }

  // [m] counts / total
  std::vector<double> shares() const {
    std::vector<double> shares(counts_.begin(), counts_.end());
    for (double& share : shares) share /= total_;
    return shares;
  }

 private:
  void complete() {
    for (int64_t step = 0, units; remaining_ > 0; remaining_ -= units, ++step) {
      if (step % 16 == 0) stop_if_asked();
      units = std::max<int64_t>(1, remaining_ / (kParts * size_));
      int64_t best = 0;
      double best_change = std::numeric_limits<double>::infinity();
      for (int64_t i = 0; i < size_; ++i) {
        const double change = 2.0 * slope_[i] + static_cast<double>(units) * diagonal_[i];  // for each unit
        if (change < best_change && counts_[i] <= max_multiplicity_ - units) {
          best = i;
          best_change = change;
        }
      }
      counts_[best] += units;
      add_to_slope(best, static_cast<double>(units));
    }
  }

  // One pass; false if it moved nothing.
  bool exchange() {
    const double threshold = -kMinImprovement * total_ * total_;
    const std::vector<int64_t> at_start = counts_;
    bool moved = false;
    for (int64_t i = 0; i < size_; ++i) {
      if (at_start[i] == 0) continue;
      // Asked again before every move: the published procedure does not, and its counts can turn negative.
      for (int64_t j = 0; counts_[i] > 0 && (j = next_receiver(i, j, threshold)) < size_; ++j) {
        stop_if_asked();
        --counts_[i];
        ++counts_[j];
        add_to_slope(i, -1.0);
        add_to_slope(j, 1.0);
        moved = true;
      }
    }
    return moved;
  }

  // The first j >= begin to which a unit of i should go, size_ if there is none. Whole blocks are dismissed
  // by their smallest change, which the compiler vectorises; the loop over single candidates it cannot.
  int64_t next_receiver(int64_t i, int64_t begin, double threshold) const {
    constexpr int64_t kBlock = 16;
    const double* row = gram_.data() + i * size_;
    const double own = row[i] - 2.0 * slope_[i];
    const auto change = [&](int64_t j) { return 2.0 * slope_[j] + diagonal_[j] - 2.0 * row[j] + own; };
    int64_t j = begin;
    while (j < size_) {
      if (j + kBlock <= size_) {
        int below = 0;
        for (int64_t t = 0; t < kBlock; ++t) below |= change(j + t) < threshold;
        if (!below) {
          j += kBlock;
          continue;
        }
      }
      const int64_t end = std::min(j + kBlock, size_);
      for (; j < end; ++j) {
        if (j != i && change(j) < threshold && counts_[j] < max_multiplicity_) return j;
      }
    }
    return size_;
  }

  void add_to_slope(int64_t i, double units) {
    const double* row = gram_.data() + i * size_;
    for (int64_t j = 0; j < size_; ++j) slope_[j] += units * row[j];
  }

  int64_t size_;
  double total_;
  int64_t max_multiplicity_;
  std::vector<double> gram_;      // [m, m]
  std::vector<double> slope_;     // [m] h = G c - N b
  std::vector<double> diagonal_;  // [m] G_ii
  std::vector<int64_t> counts_;
  int64_t remaining_;
};

}  // namespace hullkit
