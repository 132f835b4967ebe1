// SPDX-License-Identifier: Apache-2.0
#include "frank_wolfe/active_set/active_set_cpu.h"
#include "hullkit/frank_wolfe.h"
#include "hullkit/parallel.h"

namespace hullkit {

void frank_wolfe_cpu(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                     const FrankWolfeResult& result, int num_threads) {
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_query(pool.batch(), pool.positions() * pool.dim(), num_threads, [&](int64_t b, int threads) {
      const QueryVector<T> query_vector(query, b, "query");
      const PoolRows<T> rows(pool, b, /*reuse=*/true);
      run_frank_wolfe<T>(rows, query_vector.data(), params, b, threads,
                         [&](const auto& run, Status status) { run.write(result, b, status); });
    });
  });
}

}  // namespace hullkit
