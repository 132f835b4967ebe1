// SPDX-License-Identifier: Apache-2.0
// Every selection operation: its arguments, in the order of its operator, and the kernels they go to.
// Shapes: pool [n, d] or [B, n, d]; query [d] or [B, d]; lengths [] or [B]; candidates [n] or [B, n].
#include <algorithm>
#include <initializer_list>
#include <utility>

#include "bindings/arguments.h"
#include "bindings/fit.h"
#include "bindings/interruptible.h"
#include "hullkit/apportion.h"
#include "hullkit/duplicates.h"
#include "hullkit/knn.h"
#include "hullkit/lmo.h"
#include "hullkit/round_multiplicities.h"
#include "hullkit/select.h"
#include "hullkit/sift.h"
#include "sift/check_params.h"

namespace hullkit {
namespace {

// The first arguments of lmo, knn, frank_wolfe, select and sift.
struct Problem {
  PoolSpec pool;
  TensorView query;
  const TensorView& lead() const { return query; }

  template <typename Visitor>
  void each(Visitor& visit, const char* query_name = "query") {
    visit.shared("pool", pool.rows);
    visit.input(query_name, query);
    visit.optional("lengths", pool.lengths);
    visit.optional("candidates", pool.candidates);
  }
  void check(const char* query_name = "query", bool several = false) const {
    check_pool(pool, query.shape[0]);
    check_query(query_name, pool, query, several);
  }
};

struct Lmo : Problem {
  static constexpr const char* kName = "lmo";
  TensorView index, value;  // [B]

  template <typename Visitor>
  void each_argument(Visitor& visit) {
    each(visit, "direction");
    visit.output("index", index);
    visit.output("value", value);
  }
  void check() const {
    Problem::check("direction");
    check_int64("index", index, {pool.batch()});
    check_float64("value", value, {pool.batch()});
  }
  void cpu(int num_threads) const { lmo_cpu(pool, query, index, value, num_threads); }
#ifdef HULLKIT_WITH_CUDA
  int64_t workspace_bytes() const { return lmo_workspace_bytes(pool); }
  void cuda(void* workspace, void* stream) const { lmo_cuda(pool, query, index, value, workspace, stream); }
#endif
};

struct Knn : Problem {
  static constexpr const char* kName = "knn";
  TensorView indices, values;  // [B, k]

  template <typename Visitor>
  void each_argument(Visitor& visit) {
    each(visit);
    visit.output("indices", indices);
    visit.output("values", values);
  }
  void check() const {
    Problem::check();
    HULLKIT_CHECK(indices.rank == 2 && indices.shape[1] >= 1 && indices.shape[1] <= pool.positions(),
                  "indices: expected shape (", pool.batch(), ", k) with k in 1..", pool.positions(), ", got ",
                  shape_of(indices));
    check_int64("indices", indices, {pool.batch(), indices.shape[1]});
    check_float64("values", values, {pool.batch(), indices.shape[1]});
  }
  void cpu(int num_threads) const { knn_cpu(pool, query, indices, values, num_threads); }
#ifdef HULLKIT_WITH_CUDA
  int64_t workspace_bytes() const { return knn_workspace_bytes(pool, indices); }
  void cuda(void* workspace, void* stream) const { knn_cuda(pool, query, indices, values, workspace, stream); }
#endif
};

struct Duplicates {
  static constexpr const char* kName = "duplicates";
  PoolSpec pool;
  double eps;
  TensorView representatives;  // [B, n]
  const TensorView& lead() const { return representatives; }

  template <typename Visitor>
  void each_argument(Visitor& visit) {
    visit.shared("pool", pool.rows);
    visit.optional("lengths", pool.lengths);
    visit.optional("candidates", pool.candidates);
    visit.option("eps", eps);
    visit.output("representatives", representatives);
  }
  void check() const {
    check_pool(pool, representatives.shape[0]);
    HULLKIT_CHECK(eps > 0.0 && eps <= 2.0, "eps: expected a number in (0, 2], got ", eps);
    check_int64("representatives", representatives, {pool.batch(), pool.positions()});
  }
  void cpu(int num_threads) const { duplicates_cpu(pool, eps, representatives, num_threads); }
#ifdef HULLKIT_WITH_CUDA
  int64_t workspace_bytes() const { return duplicates_workspace_bytes(pool); }
  void cuda(void* workspace, void* stream) const { duplicates_cuda(pool, eps, representatives, workspace, stream); }
#endif
};

struct FrankWolfe : Problem {
  static constexpr const char* kName = "frank_wolfe";
  FrankWolfeParams params;
  FrankWolfeResult result;

  template <typename Visitor>
  void each_argument(Visitor& visit) {
    each(visit);
    visit.options(params);
    visit.outputs(result);
  }
  void check() const {
    Problem::check();
    check_options(params, pool.positions());
    check_result(result, params, pool);
  }
  void cpu(int num_threads) const { frank_wolfe_cpu(pool, query, params, result, num_threads); }
#ifdef HULLKIT_WITH_CUDA
  int64_t workspace_bytes() const { return frank_wolfe_workspace_bytes(pool, params, result); }
  void cuda(void* workspace, void* stream) const { frank_wolfe_cuda(pool, query, params, result, workspace, stream); }
#endif
};

struct Select : Problem {
  static constexpr const char* kName = "select";
  FrankWolfeParams params;
  RoundingParams rounding;
  FrankWolfeResult result;
  TensorView counts;                // [B, S]
  TensorView counts_residual_norm;  // [B]

  template <typename Visitor>
  void each_argument(Visitor& visit) {
    each(visit);
    visit.options(params);
    visit.options(rounding);
    visit.outputs(result);
    visit.output("counts", counts);
    visit.output("counts_residual_norm", counts_residual_norm);
  }
  void check() const {
    Problem::check();
    check_options(params, pool.positions());
    check_options(rounding);
    check_options(params, rounding);
    check_result(result, params, pool);
    check_int64("counts", counts, {pool.batch(), result.indices.shape[1]});
    check_float64("counts_residual_norm", counts_residual_norm, {pool.batch()});
  }
  void cpu(int num_threads) const {
    select_cpu(pool, query, params, rounding, result, counts, counts_residual_norm, num_threads);
  }
#ifdef HULLKIT_WITH_CUDA
  int64_t workspace_bytes() const { return select_workspace_bytes(pool, params, result); }
  void cuda(void* workspace, void* stream) const {
    select_cuda(pool, query, params, rounding, result, counts, counts_residual_norm, workspace, stream);
  }
#endif
};

struct Sift : Problem {  // query [d], [B, d] or [B, m, d]
  static constexpr const char* kName = "sift";
  SiftParams params;
  SiftResult result;

  template <typename Visitor>
  void each_argument(Visitor& visit) {
    each(visit);
    visit.options(params);
    visit.outputs(result);
  }
  void check() const {
    Problem::check("query", /*several=*/true);
    check_params(params);
    check_total(params.total);
    const int64_t batch = pool.batch(), least = std::min(params.total, pool.positions());
    check_int64("order", result.order, {batch, params.total});
    check_float64("variance", result.variance, {batch, params.total});
    HULLKIT_CHECK(result.indices.rank == 2 && result.indices.shape[1] >= least, "indices: expected shape (", batch,
                  ", S) with S >= ", least, ", got ", shape_of(result.indices));
    check_int64("indices", result.indices, {batch, result.indices.shape[1]});
    check_int64("counts", result.counts, {batch, result.indices.shape[1]});
    check_int64("num_steps", result.num_steps, {batch});
  }
  void cpu(int num_threads) const { sift_cpu(pool, query, params, result, num_threads); }
#ifdef HULLKIT_WITH_CUDA
  int64_t workspace_bytes() const { return sift_workspace_bytes(pool, query, params); }
  void cuda(void* workspace, void* stream) const { sift_cuda(pool, query, params, result, workspace, stream); }
#endif
};

struct RoundMultiplicities {
  static constexpr const char* kName = "round_multiplicities";
  PoolSpec pool;
  TensorView query, indices, weights;  // [B, d], [B, S], [B, S]
  RoundingParams rounding;
  TensorView counts;  // [B, S]
  const TensorView& lead() const { return query; }

  template <typename Visitor>
  void each_argument(Visitor& visit) {
    visit.shared("pool", pool.rows);
    visit.input("query", query);
    visit.input("indices", indices);
    visit.input("weights", weights);
    visit.optional("candidates", pool.candidates);
    visit.options(rounding);
    visit.output("counts", counts);
  }
  void check() const {
    check_pool(pool, query.shape[0]);
    check_query("query", pool, query);
    check_options(rounding);
    HULLKIT_CHECK(indices.rank == 2 && indices.shape[1] >= 1, "indices: expected shape (", pool.batch(),
                  ", S) with S >= 1, got ", shape_of(indices));
    check_int64("indices", indices, {pool.batch(), indices.shape[1]});
    check_float64("weights", weights, {pool.batch(), indices.shape[1]});
    check_int64("counts", counts, {pool.batch(), indices.shape[1]});
  }
  void cpu(int num_threads) const {
    round_multiplicities_cpu(pool, query, indices, weights, rounding, counts, num_threads);
  }
#ifdef HULLKIT_WITH_CUDA
  int64_t workspace_bytes() const { return round_multiplicities_workspace_bytes(pool, indices); }
  void cuda(void* workspace, void* stream) const {
    round_multiplicities_cuda(pool, query, indices, weights, rounding, counts, workspace, stream);
  }
#endif
};

struct Apportion {
  static constexpr const char* kName = "apportion";
  TensorView weights;  // [B, S]
  int64_t total;
  TensorView counts;  // [B, S]
  const TensorView& lead() const { return weights; }

  template <typename Visitor>
  void each_argument(Visitor& visit) {
    visit.input("weights", weights);
    visit.option("total", total);
    visit.output("counts", counts);
  }
  void check() const {
    check_total(total);
    HULLKIT_CHECK(weights.rank == 2, "weights: expected shape (S,) or (B, S), got ", shape_of(weights));
    check_float64("weights", weights, {weights.shape[0], weights.shape[1]});
    check_int64("counts", counts, {weights.shape[0], weights.shape[1]});
  }
  void cpu(int num_threads) const { apportion_cpu(weights, total, counts, num_threads); }
#ifdef HULLKIT_WITH_CUDA
  int64_t workspace_bytes() const { return 0; }
  void cuda(void*, void* stream) const { apportion_cuda(weights, total, counts, stream); }
#endif
};

// Where a CPU call runs, and a GPU call.
struct Threads {
  int num_threads;
};
HULLKIT_FIELDS(Threads, num_threads)
struct Launch {
  py::object allocate;  // (bytes) -> tensor
  int64_t stream;       // its address
};
HULLKIT_FIELDS(Launch, allocate, stream)

// Reads a call: the operation's arguments, then those of `where`; throws unless they fit together.
template <typename Op, typename Where>
Op read(const py::args& arguments, Where& where) {
  Op operation{};
  Reader reader(arguments);
  operation.each_argument(reader);
  reader.options(where);
  reader.end();
  Batched batched(operation.lead());
  operation.each_argument(batched);
  operation.check();
  Apart apart;
  operation.each_argument(apart);
  return operation;
}

// An operation as Python sees it.
struct Operation {
  std::string schema;   // of its operator
  py::tuple arguments;  // their names
  py::object cpu;       // (*arguments, num_threads)
  py::object cuda;      // (*arguments, allocate, address of the stream); None without CUDA
};

template <typename Op>
void bind(py::dict& operations) {
  Op operation{};
  Signature signature;
  operation.each_argument(signature);
  py::object cuda = py::none();
  const py::cpp_function cpu([](const py::args& arguments) {
    Threads threads{};
    const Op call = read<Op>(arguments, threads);
    interruptible([&] { call.cpu(threads.num_threads); });
  });
#ifdef HULLKIT_WITH_CUDA
  cuda = py::cpp_function([](const py::args& arguments) {
    Launch launch{};
    const Op call = read<Op>(arguments, launch);
    // torch's allocator gives memory that is freed here to later work of this stream alone.
    const py::object workspace = launch.allocate(call.workspace_bytes());
    const auto address = workspace.attr("data_ptr")().cast<int64_t>();
    interruptible([&] { call.cuda(reinterpret_cast<void*>(address), reinterpret_cast<void*>(launch.stream)); });
  });
#endif
  operations[Op::kName] = Operation{signature.schema(Op::kName), signature.names(), cpu, cuda};
}

// Names to the numbers that cross for them.
template <typename Enum>
py::dict codes(std::initializer_list<std::pair<const char*, Enum>> members) {
  py::dict codes;
  for (const auto& [name, code] : members) codes[name] = static_cast<int64_t>(code);
  return codes;
}

}  // namespace

void bind_operations(py::module_& module) {
  py::class_<Operation>(module, "Operation")
      .def_readonly("schema", &Operation::schema)
      .def_readonly("arguments", &Operation::arguments)
      .def_readonly("cpu", &Operation::cpu)
      .def_readonly("cuda", &Operation::cuda);
  py::dict operations;
  bind<Lmo>(operations);
  bind<Knn>(operations);
  bind<Duplicates>(operations);
  bind<FrankWolfe>(operations);
  bind<Select>(operations);
  bind<Sift>(operations);
  bind<RoundMultiplicities>(operations);
  bind<Apportion>(operations);
  module.attr("operations") = operations;
  module.def("name_dtypes", [](const py::dict& codes) { dtype_codes() = codes.inc_ref().ptr(); });
  module.attr("dtypes") = codes<DType>({{"float64", DType::kFloat64},
                                        {"float32", DType::kFloat32},
                                        {"float16", DType::kFloat16},
                                        {"bfloat16", DType::kBFloat16},
                                        {"int64", DType::kInt64}});
  module.attr("statuses") = codes<Status>({{"CONVERGED", Status::kConverged},
                                           {"MAX_SUPPORT", Status::kMaxSupport},
                                           {"MAX_ITERS", Status::kMaxIters},
                                           {"STALLED", Status::kStalled},
                                           {"BROKEN", Status::kBroken},
                                           {"GAP_TOL", Status::kGapTol}});
  module.attr("variants") = codes<Variant>({{"vanilla", Variant::kVanilla},
                                            {"away", Variant::kAway},
                                            {"pairwise", Variant::kPairwise},
                                            {"fully_corrective", Variant::kFullyCorrective}});
}

}  // namespace hullkit
