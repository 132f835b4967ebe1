// SPDX-License-Identifier: Apache-2.0
#include <utility>
#include <vector>

#include "frank_wolfe/active_set/active_set_cpu.h"
#include "hullkit/parallel.h"
#include "hullkit/select.h"
#include "rounding/rounding.h"

namespace hullkit {

void select_cpu(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                const RoundingParams& rounding_params, const FrankWolfeResult& result, const TensorView& counts,
                const TensorView& residual_norm, int num_threads) {
  const int64_t total = rounding_params.total, max_multiplicity = rounding_params.max_multiplicity;
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_query(pool.batch(), pool.positions() * pool.dim(), num_threads, [&](int64_t b, int threads) {
      const QueryVector<T> query_vector(query, b, "query");
      const PoolRows<T> rows(pool, b, /*reuse=*/true);
      check_room(max_multiplicity, total, rows.size(), "candidates", b);
      run_frank_wolfe<T>(rows, query_vector.data(), params, b, threads, [&](const auto& run, Status status) {
        run.write(result, b, status);
        std::vector<double> products, gram, weights;
        run.support(&products, &gram, &weights);
        check_room(max_multiplicity, total, static_cast<int64_t>(products.size()), "support points", b);
        Rounding rounding(std::move(gram), std::move(products), weights.data(), total, max_multiplicity);
        rounding.run(rounding_params.exchange_passes, counts.at<int64_t>(b), counts.shape[1]);
        *residual_norm.at<double>(b) = run.residual_norm(rounding.shares());
      });
    });
  });
}

}  // namespace hullkit
