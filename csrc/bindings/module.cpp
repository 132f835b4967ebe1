// The Python face of the core: integers in, nothing out. Only this folder knows pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "hullkit/apportion.h"
#include "hullkit/build_info.h"
#include "hullkit/check.h"
#include "hullkit/frank_wolfe.h"
#include "hullkit/knn.h"
#include "hullkit/lmo.h"
#include "hullkit/round_multiplicities.h"
#include "hullkit/select.h"
#include "simd/simd.h"

namespace py = pybind11;

namespace hullkit {

void bind_objects(py::module_& module);
void bind_optim(py::module_& module);

namespace {

// A tensor arrives as (address, dtype code, shape, strides in elements), an absent one as None.
// Read by hand: a call passes a dozen of them and pybind11's own conversion costs more than the kernel's start.
TensorView view(py::handle object) {
  TensorView view;
  if (object.is_none()) return view;
  PyObject* const tuple = object.ptr();
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 4) {
    throw py::type_error("expected a tensor as (address, dtype, shape, strides)");
  }
  view.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
  view.dtype = static_cast<DType>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, 1)));
  PyObject* const shape = PyTuple_GET_ITEM(tuple, 2);
  PyObject* const stride = PyTuple_GET_ITEM(tuple, 3);
  if (!PyTuple_Check(shape) || !PyTuple_Check(stride) || PyTuple_GET_SIZE(shape) != PyTuple_GET_SIZE(stride) ||
      PyTuple_GET_SIZE(shape) > kMaxRank) {
    throw py::type_error("expected a shape and strides of one length, at most 4");
  }
  view.rank = static_cast<int>(PyTuple_GET_SIZE(shape));
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
    view.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride, i));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return view;
}

// `tensor` with `batch` in front if it has `rank` dimensions: an unbatched argument, or one shared by a batch.
TensorView batched(TensorView tensor, int rank, int64_t batch) {
  if (!tensor.defined() || tensor.rank != rank) return tensor;
  for (int i = rank; i > 0; --i) {
    tensor.shape[i] = tensor.shape[i - 1];
    tensor.stride[i] = tensor.stride[i - 1];
  }
  tensor.rank = rank + 1;
  tensor.shape[0] = batch;
  tensor.stride[0] = 0;
  return tensor;
}

// The arguments every selection shares, and its outputs, with a batch dimension.
struct Problem {
  Problem(py::handle rows, py::handle query_tensor, py::handle lengths, py::handle candidates)
      : query(batched(view(query_tensor), 1, 1)),
        batch(query.shape[0]),
        pool{batched(view(rows), 2, batch), batched(view(lengths), 0, batch), batched(view(candidates), 1, batch)} {}

  TensorView scalars(py::handle tensor) const { return batched(view(tensor), 0, batch); }
  TensorView vectors(py::handle tensor) const { return batched(view(tensor), 1, batch); }

  FrankWolfeResult frank_wolfe(py::handle indices, py::handle weights, py::handle support_size,
                               py::handle residual_norm, py::handle dual_gap, py::handle num_iters,
                               py::handle status) const {
    return {vectors(indices),  vectors(weights),   scalars(support_size), scalars(residual_norm),
            scalars(dual_gap), scalars(num_iters), scalars(status)};
  }

  TensorView query;
  int64_t batch;
  PoolSpec pool;
};

using Handle = py::handle;

void bind_selection(py::module_& module) {
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
  module.def("frank_wolfe_cpu",
             [](Handle pool, Handle query, Handle lengths, Handle candidates, int64_t max_support, int64_t max_iters,
                double tol, Handle indices, Handle weights, Handle support_size, Handle residual_norm, Handle dual_gap,
                Handle num_iters, Handle status, int num_threads) {
               const Problem problem(pool, query, lengths, candidates);
               const FrankWolfeResult result =
                   problem.frank_wolfe(indices, weights, support_size, residual_norm, dual_gap, num_iters, status);
               const py::gil_scoped_release release;
               frank_wolfe_cpu(problem.pool, problem.query, {max_support, max_iters, tol}, result, num_threads);
             });
  module.def("select_cpu", [](Handle pool, Handle query, Handle lengths, Handle candidates, int64_t max_support,
                              int64_t max_iters, double tol, int64_t total, int64_t exchange_passes, Handle indices,
                              Handle weights, Handle support_size, Handle residual_norm, Handle dual_gap,
                              Handle num_iters, Handle status, Handle counts, int num_threads) {
    const Problem problem(pool, query, lengths, candidates);
    const FrankWolfeResult result =
        problem.frank_wolfe(indices, weights, support_size, residual_norm, dual_gap, num_iters, status);
    const TensorView counts_view = problem.vectors(counts);
    const py::gil_scoped_release release;
    select_cpu(problem.pool, problem.query, {max_support, max_iters, tol}, total, exchange_passes, result, counts_view,
               num_threads);
  });
}

void bind_rounding(py::module_& module) {
  module.def("round_multiplicities_cpu",
             [](Handle pool, Handle query, Handle indices, Handle weights, Handle candidates, int64_t total,
                int64_t exchange_passes, Handle counts, int num_threads) {
               const Problem problem(pool, query, py::none(), candidates);
               const TensorView indices_view = problem.vectors(indices), weights_view = problem.vectors(weights),
                                counts_view = problem.vectors(counts);
               const py::gil_scoped_release release;
               round_multiplicities_cpu(problem.pool, problem.query, indices_view, weights_view, total, exchange_passes,
                                        counts_view, num_threads);
             });
  module.def("apportion_cpu", [](Handle weights, int64_t total, Handle counts, int num_threads) {
    const TensorView weights_view = batched(view(weights), 1, 1), counts_view = batched(view(counts), 1, 1);
    const py::gil_scoped_release release;
    apportion_cpu(weights_view, total, counts_view, num_threads);
  });
}

py::dict build_info() {
  const CudaInfo cuda = cuda_info();
  py::dict info;
  info["version"] = HULLKIT_VERSION;
  info["compiler"] = HULLKIT_COMPILER;
  info["simd"] = simd().name;
  info["cuda"] = cuda.compiled;
  info["cuda_runtime"] = cuda.runtime;
  info["cuda_architectures"] = cuda.architectures;
  info["cuda_devices"] = cuda.devices;
  info["cuda_problem"] = cuda.problem;
  return info;
}

}  // namespace
}  // namespace hullkit

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native kernels of hullkit. Private: use the functions of the hullkit package.";
  module.attr("__version__") = HULLKIT_VERSION;
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const hullkit::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  hullkit::bind_selection(module);
  hullkit::bind_rounding(module);
  hullkit::bind_optim(module);
  hullkit::bind_objects(module);
  module.def("build_info", &hullkit::build_info);
}
