// SPDX-License-Identifier: Apache-2.0
#include "common/dtype.h"
#include "hullkit/sgd.h"
#include "optim/chunks.h"

namespace hullkit {

void sgd_cpu(const TensorTable& table, const SgdParams& params, int num_threads) {
  with_compute_type(table.param_dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t block = block_size<T>(table, params.momentum != 0.0);
    for_each_chunk(table, num_threads, [&](int64_t, int64_t index, int64_t begin, int64_t count) {
      const TensorRow& row = table.rows[index];
      const SgdUpdate<T> update = {static_cast<T>(params.scale),
                                   static_cast<T>(params.lr),
                                   static_cast<T>(params.momentum),
                                   static_cast<T>(params.undamped),
                                   static_cast<T>(params.l2),
                                   params.nesterov,
                                   row.fresh(),
                                   params.num_steps};
      Elements<T> param(row.param, table.param_dtype), grad(table.grads[index], table.grad_dtype);
      Elements<T> buffer(row.state1, table.state_dtype);
      for (int64_t at = begin; at < begin + count; at += block) {
        const int64_t n = std::min(block, begin + count - at);
        simd().ops<T>().sgd(param.load(at, n), grad.load(at, n), buffer.load(at, n), n, update);
        param.store(at, n);
        buffer.store(at, n);
      }
    });
  });
}

}  // namespace hullkit
