// How tensors arrive from Python.
#pragma once

#include <pybind11/pybind11.h>

#include "hullkit/frank_wolfe.h"
#include "hullkit/sift.h"

namespace hullkit {

namespace py = pybind11;

// A tensor arrives as (address, dtype code, shape, strides in elements), an absent one as None.
// Read by hand: a call passes a dozen of them and pybind11's own conversion costs more than the kernel's start.
inline TensorView view(py::handle object) {
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
inline TensorView batched(TensorView tensor, int rank, int64_t batch) {
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

inline PoolSpec pool_of(py::handle rows, py::handle lengths, py::handle candidates, int64_t batch) {
  return {batched(view(rows), 2, batch), batched(view(lengths), 0, batch), batched(view(candidates), 1, batch)};
}

// The arguments every selection shares, and its outputs, with a batch dimension.
struct Problem {
  Problem(py::handle rows, py::handle query_tensor, py::handle lengths, py::handle candidates)
      : query(batched(view(query_tensor), 1, 1)),
        batch(query.shape[0]),
        pool(pool_of(rows, lengths, candidates, batch)) {}

  TensorView scalars(py::handle tensor) const { return batched(view(tensor), 0, batch); }
  TensorView vectors(py::handle tensor) const { return batched(view(tensor), 1, batch); }

  FrankWolfeResult frank_wolfe(py::handle indices, py::handle weights, py::handle support_size,
                               py::handle residual_norm, py::handle dual_gap, py::handle num_iters,
                               py::handle status) const {
    return {vectors(indices),  vectors(weights),   scalars(support_size), scalars(residual_norm),
            scalars(dual_gap), scalars(num_iters), scalars(status)};
  }

  SiftResult sift(py::handle order, py::handle variance, py::handle indices, py::handle counts,
                  py::handle num_steps) const {
    return {vectors(order), vectors(variance), vectors(indices), vectors(counts), scalars(num_steps)};
  }

  TensorView query;  // [B, d], or [B, m, d] where an operation takes several vectors a prompt
  int64_t batch;
  PoolSpec pool;
};

}  // namespace hullkit
