#include <utility>
#include <vector>

#include "frank_wolfe/frank_wolfe_run.h"
#include "hullkit/parallel.h"
#include "hullkit/select.h"
#include "rounding/rounding.h"

namespace hullkit {

void select_cpu(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params, int64_t total,
                int64_t exchange_passes, const FrankWolfeResult& result, const TensorView& counts, int num_threads) {
  with_compute_type(pool.rows.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_query(pool.batch(), num_threads, [&](int64_t b, int threads) {
      const QueryVector<T> query_vector(query, b, "query");
      const PoolRows<T> rows(pool, b, /*reuse=*/true);
      FrankWolfeRun<T> run(rows, query_vector.data(), params, threads);
      const Status status = run.run();
      run.write(result, b, status);
      std::vector<double> products, gram, weights;
      run.support(&products, &gram, &weights);
      Rounding rounding(std::move(gram), std::move(products), weights.data(), total);
      rounding.run(exchange_passes, counts.at<int64_t>(b), counts.shape[1]);
    });
  });
}

}  // namespace hullkit
