// SPDX-License-Identifier: Apache-2.0
// The k largest of products that come in the order of their rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "hullkit/interrupt.h"
#include "hullkit/parallel.h"

namespace hullkit {

// Keeps a few more than k at a time. Memory and time grow with k, not with the number of products that are passed over.
template <typename T>
class Nearest {
 public:
  struct Neighbour {
    T value;
    int64_t row;
  };

  explicit Nearest(int64_t k) : k_(k) {}

  void take(int64_t first, const T* products, int64_t count) {
    constexpr int64_t kBlock = 16;
    for (int64_t begin = 0; begin < count && broken_ < 0; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, count);
      int looks = 0;  // no branch on a single product: the compiler vectorises this
      for (int64_t i = begin; i < end; ++i) looks |= !(products[i] <= bar_ && products[i] >= -kLargest);
      if (looks) look(first, products, begin, end);
    }
  }
  int64_t broken() const { return broken_; }
  int64_t bytes() const { return most() * static_cast<int64_t>(sizeof(Neighbour)); }

  // The k, or as many as there are, best first.
  const std::vector<Neighbour>& sorted(int num_threads) {
    if (static_cast<int64_t>(kept_.size()) > k_) cut();
    sort(num_threads);
    return kept_;
  }

 private:
  static constexpr T kLargest = std::numeric_limits<T>::max();
  static constexpr int64_t kRun = int64_t{1} << 15;  // sorted by one call, which nothing stops

  // Rows differ, so this is an order of all: no algorithm has a choice. Lowest index on a tie.
  static bool precedes(const Neighbour& a, const Neighbour& b) {
    return a.value != b.value ? a.value > b.value : a.row < b.row;
  }

  int64_t most() const { return 2 * k_ + 256; }

  void look(int64_t first, const T* products, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!std::isfinite(products[i])) {
        broken_ = first + i;
        return;
      }
      if (products[i] > bar_) kept_.push_back({products[i], first + i});
    }
    if (static_cast<int64_t>(kept_.size()) >= most()) cut();
  }

  // A row to come has a higher index than all that are kept: it must be better than the last of k.
  void cut() {
    stop_if_asked();
    std::nth_element(kept_.begin(), kept_.begin() + k_ - 1, kept_.end(), precedes);
    kept_.resize(k_);
    bar_ = kept_.back().value;
  }

  void sort(int num_threads) {
    const auto size = static_cast<int64_t>(kept_.size());
    const auto begin = [&](std::vector<Neighbour>& of, int64_t i) { return of.begin() + std::min(i, size); };
    parallel_for((size + kRun - 1) / kRun, num_threads,
                 [&](int64_t r) { std::sort(begin(kept_, r * kRun), begin(kept_, (r + 1) * kRun), precedes); });
    std::vector<Neighbour> merged(size > kRun ? size : 0);
    for (int64_t run = kRun; run < size; run *= 2) {
      parallel_for((size + 2 * run - 1) / (2 * run), num_threads, [&](int64_t r) {
        const auto left = begin(kept_, 2 * r * run), middle = begin(kept_, (2 * r + 1) * run);
        std::merge(left, middle, middle, begin(kept_, (2 * r + 2) * run), begin(merged, 2 * r * run), precedes);
      });
      kept_.swap(merged);
    }
  }

  int64_t k_;
  T bar_ = -std::numeric_limits<T>::infinity();
  std::vector<Neighbour> kept_;
  int64_t broken_ = -1;
};

}  // namespace hullkit
