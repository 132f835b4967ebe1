// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>

#include "hullkit/lmo.h"
#include "pool/products.h"

namespace hullkit {
namespace {

// The least of the products, of the lowest index on a tie.
template <typename T>
class Least {
 public:
  void take(int64_t first, const T* products, int64_t count) {
    constexpr int64_t kBlock = 16;
    for (int64_t begin = 0; begin < count && broken_ < 0; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, count);
      int looks = 0;  // no branch on a single product: the compiler vectorises this
      for (int64_t i = begin; i < end; ++i) looks |= !(products[i] >= value_ && products[i] <= kLargest);
      if (looks) look(first, products, begin, end);
    }
  }
  int64_t broken() const { return broken_; }
  int64_t bytes() const { return sizeof(*this); }
  int64_t row() const { return row_; }
  T value() const { return value_; }

 private:
  static constexpr T kLargest = std::numeric_limits<T>::max();

  void look(int64_t first, const T* products, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!std::isfinite(products[i])) {
        broken_ = first + i;
        return;
      }
      if (products[i] < value_) {
        value_ = products[i];
        row_ = first + i;
      }
    }
  }

  T value_ = std::numeric_limits<T>::infinity();
  int64_t row_ = -1;
  int64_t broken_ = -1;
};

}  // namespace

void lmo_cpu(const PoolSpec& pool, const TensorView& direction, const TensorView& index, const TensorView& value,
             int num_threads) {
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    finish_products<T>(pool, direction, "direction", num_threads, Least<T>(),
                       [&](int64_t b, const Least<T>& least, const PoolRows<T>& rows, const T* vector, int) {
                         rows.check_not_lost(vector, least.value(), "direction", b);
                         *index.at<int64_t>(b) = rows.position(least.row());
                         *value.at<double>(b) = least.value();
                       });
  });
}

}  // namespace hullkit
