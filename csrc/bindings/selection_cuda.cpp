#include "bindings/arguments.h"
#include "common/limits.h"
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

void* pointer(int64_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

// As the functions of selection_cpu.cpp, with a workspace and a stream in place of threads.
void bind_selection_cuda(py::module_& module) {
  module.def("lmo_workspace_bytes", &lmo_workspace_bytes);
  module.def("knn_workspace_bytes", &knn_workspace_bytes);
  module.def("gram_workspace_bytes", &gram_workspace_bytes);
  module.def("active_set_workspace_bytes", &active_set_workspace_bytes);
  module.def("corpus_workspace_bytes", &corpus_workspace_bytes);
  module.def("lmo_cuda", [](Handle pool, Handle direction, Handle lengths, Handle candidates, Handle index,
                            Handle value, int64_t workspace, int64_t stream) {
    const Problem problem(pool, direction, lengths, candidates);
    lmo_cuda(problem.pool, problem.query, problem.scalars(index), problem.scalars(value), pointer(workspace),
             pointer(stream));
  });
  module.def("knn_cuda", [](Handle pool, Handle query, Handle lengths, Handle candidates, Handle indices, Handle values,
                            int64_t workspace, int64_t stream) {
    const Problem problem(pool, query, lengths, candidates);
    knn_cuda(problem.pool, problem.query, problem.vectors(indices), problem.vectors(values), pointer(workspace),
             pointer(stream));
  });
  module.def("duplicates_cuda", [](Handle pool, Handle lengths, Handle candidates, double eps, Handle representatives,
                                   int64_t workspace, int64_t stream) {
    const TensorView out = batched(view(representatives), 1, 1);
    duplicates_cuda(pool_of(pool, lengths, candidates, out.shape[0]), eps, out, pointer(workspace), pointer(stream));
  });
  module.def(
      "frank_wolfe_cuda", [](Handle pool, Handle query, Handle lengths, Handle candidates, int64_t max_support,
                             int64_t max_iters, double tol, double gap_tol, int64_t variant, double max_weight,
                             Handle indices, Handle weights, Handle support_size, Handle residual_norm, Handle dual_gap,
                             Handle num_iters, Handle status, int64_t workspace, int64_t stream) {
        const Problem problem(pool, query, lengths, candidates);
        const FrankWolfeResult result =
            problem.frank_wolfe(indices, weights, support_size, residual_norm, dual_gap, num_iters, status);
        const FrankWolfeParams params{max_support, max_iters, tol, gap_tol, static_cast<Variant>(variant), max_weight};
        const auto run = problem.pool.positions() > kMaxOnDevice ? frank_wolfe_corpus_cuda : frank_wolfe_cuda;
        run(problem.pool, problem.query, params, result, pointer(workspace), pointer(stream));
      });
  module.def("select_cuda", [](Handle pool, Handle query, Handle lengths, Handle candidates, int64_t max_support,
                               int64_t max_iters, double tol, double gap_tol, int64_t variant, double max_weight,
                               int64_t total, int64_t exchange_passes, int64_t max_multiplicity, Handle indices,
                               Handle weights, Handle support_size, Handle residual_norm, Handle dual_gap,
                               Handle num_iters, Handle status, Handle counts, Handle counts_residual_norm,
                               int64_t workspace, int64_t stream) {
    const Problem problem(pool, query, lengths, candidates);
    const FrankWolfeResult result =
        problem.frank_wolfe(indices, weights, support_size, residual_norm, dual_gap, num_iters, status);
    const FrankWolfeParams params{max_support, max_iters, tol, gap_tol, static_cast<Variant>(variant), max_weight};
    select_cuda(problem.pool, problem.query, params, {total, exchange_passes, max_multiplicity}, result,
                problem.vectors(counts), problem.scalars(counts_residual_norm), pointer(workspace), pointer(stream));
  });
  module.def("sift_workspace_bytes", &sift_workspace_bytes);
  module.def("sift_cuda", [](Handle pool, Handle query, Handle lengths, Handle candidates, int64_t total, double noise,
                             double alpha, int64_t max_multiplicity, Handle order, Handle variance, Handle indices,
                             Handle counts, Handle num_steps, int64_t workspace, int64_t stream) {
    const Problem problem(pool, query, lengths, candidates);
    sift_cuda(problem.pool, problem.query, {total, noise, alpha, max_multiplicity},
              problem.sift(order, variance, indices, counts, num_steps), pointer(workspace), pointer(stream));
  });
  module.def("round_multiplicities_cuda",
             [](Handle pool, Handle query, Handle indices, Handle weights, Handle candidates, int64_t total,
                int64_t exchange_passes, int64_t max_multiplicity, Handle counts, int64_t workspace, int64_t stream) {
               const Problem problem(pool, query, py::none(), candidates);
               round_multiplicities_cuda(problem.pool, problem.query, problem.vectors(indices),
                                         problem.vectors(weights), {total, exchange_passes, max_multiplicity},
                                         problem.vectors(counts), pointer(workspace), pointer(stream));
             });
  module.def("apportion_cuda", [](Handle weights, int64_t total, Handle counts, int64_t, int64_t stream) {
    apportion_cuda(batched(view(weights), 1, 1), total, batched(view(counts), 1, 1), pointer(stream));
  });
}

}  // namespace hullkit
