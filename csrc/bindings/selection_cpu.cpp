#include "bindings/arguments.h"
#include "hullkit/apportion.h"
#include "hullkit/duplicates.h"
#include "hullkit/knn.h"
#include "hullkit/lmo.h"
#include "hullkit/round_multiplicities.h"
#include "hullkit/select.h"
#include "hullkit/sift.h"

namespace hullkit {
namespace {

using Handle = py::handle;

void bind_choice(py::module_& module) {
  module.def("lmo_cpu", [](Handle pool, Handle direction, Handle lengths, Handle candidates, Handle index, Handle value,
                           int num_threads) {
    const Problem problem(pool, direction, lengths, candidates);
    const TensorView index_view = problem.scalars(index), value_view = problem.scalars(value);
    const py::gil_scoped_release release;
    lmo_cpu(problem.pool, problem.query, index_view, value_view, num_threads);
  });
  module.def("knn_cpu", [](Handle pool, Handle query, Handle lengths, Handle candidates, Handle indices, Handle values,
                           int num_threads) {
    const Problem problem(pool, query, lengths, candidates);
    const TensorView indices_view = problem.vectors(indices), values_view = problem.vectors(values);
    const py::gil_scoped_release release;
    knn_cpu(problem.pool, problem.query, indices_view, values_view, num_threads);
  });
  module.def("duplicates_cpu",
             [](Handle pool, Handle lengths, Handle candidates, double eps, Handle representatives, int num_threads) {
               const TensorView out = batched(view(representatives), 1, 1);
               const PoolSpec spec = pool_of(pool, lengths, candidates, out.shape[0]);
               const py::gil_scoped_release release;
               duplicates_cpu(spec, eps, out, num_threads);
             });
  module.def("frank_wolfe_cpu", [](Handle pool, Handle query, Handle lengths, Handle candidates, int64_t max_support,
                                   int64_t max_iters, double tol, double gap_tol, int64_t variant, double max_weight,
                                   Handle indices, Handle weights, Handle support_size, Handle residual_norm,
                                   Handle dual_gap, Handle num_iters, Handle status, int num_threads) {
    const Problem problem(pool, query, lengths, candidates);
    const FrankWolfeResult result =
        problem.frank_wolfe(indices, weights, support_size, residual_norm, dual_gap, num_iters, status);
    const FrankWolfeParams params{max_support, max_iters, tol, gap_tol, static_cast<Variant>(variant), max_weight};
    const py::gil_scoped_release release;
    frank_wolfe_cpu(problem.pool, problem.query, params, result, num_threads);
  });
  module.def(
      "select_cpu", [](Handle pool, Handle query, Handle lengths, Handle candidates, int64_t max_support,
                       int64_t max_iters, double tol, double gap_tol, int64_t variant, double max_weight, int64_t total,
                       int64_t exchange_passes, int64_t max_multiplicity, Handle indices, Handle weights,
                       Handle support_size, Handle residual_norm, Handle dual_gap, Handle num_iters, Handle status,
                       Handle counts, Handle counts_residual_norm, int num_threads) {
        const Problem problem(pool, query, lengths, candidates);
        const FrankWolfeResult result =
            problem.frank_wolfe(indices, weights, support_size, residual_norm, dual_gap, num_iters, status);
        const FrankWolfeParams params{max_support, max_iters, tol, gap_tol, static_cast<Variant>(variant), max_weight};
        const TensorView counts_view = problem.vectors(counts), norm_view = problem.scalars(counts_residual_norm);
        const py::gil_scoped_release release;
        select_cpu(problem.pool, problem.query, params, {total, exchange_passes, max_multiplicity}, result, counts_view,
                   norm_view, num_threads);
      });
}

void bind_sift(py::module_& module) {
  module.def("sift_cpu", [](Handle pool, Handle query, Handle lengths, Handle candidates, int64_t total, double noise,
                            double alpha, int64_t max_multiplicity, Handle order, Handle variance, Handle indices,
                            Handle counts, Handle num_steps, int num_threads) {
    const Problem problem(pool, query, lengths, candidates);
    const SiftResult result = problem.sift(order, variance, indices, counts, num_steps);
    const py::gil_scoped_release release;
    sift_cpu(problem.pool, problem.query, {total, noise, alpha, max_multiplicity}, result, num_threads);
  });
}

void bind_rounding(py::module_& module) {
  module.def("round_multiplicities_cpu",
             [](Handle pool, Handle query, Handle indices, Handle weights, Handle candidates, int64_t total,
                int64_t exchange_passes, int64_t max_multiplicity, Handle counts, int num_threads) {
               const Problem problem(pool, query, py::none(), candidates);
               const TensorView indices_view = problem.vectors(indices), weights_view = problem.vectors(weights),
                                counts_view = problem.vectors(counts);
               const py::gil_scoped_release release;
               round_multiplicities_cpu(problem.pool, problem.query, indices_view, weights_view,
                                        {total, exchange_passes, max_multiplicity}, counts_view, num_threads);
             });
  module.def("apportion_cpu", [](Handle weights, int64_t total, Handle counts, int num_threads) {
    const TensorView weights_view = batched(view(weights), 1, 1), counts_view = batched(view(counts), 1, 1);
    const py::gil_scoped_release release;
    apportion_cpu(weights_view, total, counts_view, num_threads);
  });
}

}  // namespace

void bind_selection_cpu(py::module_& module) {
  bind_choice(module);
  bind_sift(module);
  bind_rounding(module);
}

}  // namespace hullkit
