// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "common/dtype.h"
#include "hullkit/accumulate.h"
#include "optim/chunks.h"

namespace hullkit {
namespace {

template <typename T>
double run(const TensorTable& table, bool write, double weight, int num_threads) {
  std::vector<double> squares(num_chunks(table));  // summed in order at the end
  for_each_chunk(table, num_threads, [&](int64_t chunk, int64_t index, int64_t begin, int64_t count) {
    Elements<T> grad(table.grads[index], table.grad_dtype);
    T* const into = write ? reinterpret_cast<T*>(table.rows[index].param) : nullptr;
    for (int64_t at = begin; at < begin + count; at += kBlock) {
      const int64_t n = std::min(kBlock, begin + count - at);
      T* const destination = write ? into + at : nullptr;
      squares[chunk] += simd().ops<T>().accumulate(destination, grad.load(at, n), static_cast<T>(weight), n);
    }
  });
  return std::accumulate(squares.begin(), squares.end(), 0.0);
}

}  // namespace

double accumulate_cpu(const TensorTable& table, double weight, int num_threads) {
  return run<float>(table, /*write=*/true, weight, num_threads);
}

double squared_norm_cpu(const TensorTable& table, int num_threads) {
  double sum = 0.0;
  with_compute_type(table.grad_dtype,
                    [&](auto type) { sum = run<decltype(type)>(table, /*write=*/false, 0.0, num_threads); });
  return sum;
}

}  // namespace hullkit
