// SPDX-License-Identifier: Apache-2.0
// A tensor of torch to a TensorView, by the methods that Python would call: the core links no torch, and a call from
// here takes half of the time that Python's own takes.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "hullkit/check.h"
#include "hullkit/tensor_view.h"

namespace hullkit {

// {torch.float64: 0, ...}: Python tells once which dtypes the codes stand for.
inline PyObject*& dtype_codes() {
  static PyObject* codes = nullptr;
  return codes;
}

// Made once, so that a look-up compares addresses.
struct TensorNames {
  PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* const dtype = PyUnicode_InternFromString("dtype");
  PyObject* const shape = PyUnicode_InternFromString("shape");
  PyObject* const stride = PyUnicode_InternFromString("stride");
  PyObject* const storage_offset = PyUnicode_InternFromString("storage_offset");
  PyObject* const untyped_storage = PyUnicode_InternFromString("untyped_storage");
  PyObject* const nbytes = PyUnicode_InternFromString("nbytes");
};

inline const TensorNames& tensor_names() {
  static const TensorNames names;
  return names;
}

namespace from_python {

namespace py = pybind11;

inline py::object owned(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

inline py::object call(const py::object& object, PyObject* method) {
  return owned(PyObject_CallMethodNoArgs(object.ptr(), method));
}

inline int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline int64_t integer(const py::object& object) { return integer(object.ptr()); }

inline DType dtype(const char* name, const py::object& tensor) {
  const py::object dtype = owned(PyObject_GetAttr(tensor.ptr(), tensor_names().dtype));
  PyObject* const code = PyDict_GetItemWithError(dtype_codes(), dtype.ptr());
  if (code == nullptr) {
    if (PyErr_Occurred()) throw py::error_already_set();
    throw py::type_error(std::string(name) + ": expected dtype float64, float32, float16, bfloat16 or int64, got " +
                         py::str(dtype).cast<std::string>());
  }
  return static_cast<DType>(integer(code));
}

}  // namespace from_python

// `freed`: whether the storage may have been freed or cut behind the tensor, as FSDP and offloading do. It is asked for
// inputs alone, which are the user's: to ask for every output takes a tenth of a small selection's time.
inline void read_tensor(const char* name, PyObject* object, bool freed, TensorView& view) {
  using namespace from_python;
  const py::object tensor = py::reinterpret_borrow<py::object>(object);
  const TensorNames& names = tensor_names();
  view.data = reinterpret_cast<void*>(integer(call(tensor, names.data_ptr)));
  view.dtype = dtype(name, tensor);
  const py::object shape = owned(PyObject_GetAttr(object, names.shape)), stride = call(tensor, names.stride);
  // Below kMaxRank: an unbatched call's tensors get a dimension more.
  const Py_ssize_t rank = PyTuple_Check(shape.ptr()) && PyTuple_Check(stride.ptr()) ? PyTuple_GET_SIZE(shape.ptr()) : 0;
  HULLKIT_CHECK(rank < kMaxRank, name, ": expected at most ", kMaxRank - 1, " dimensions, got ", rank);
  view.rank = static_cast<int>(rank);
  int64_t elements = 1, last = 0;
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = integer(PyTuple_GET_ITEM(shape.ptr(), i));
    view.stride[i] = integer(PyTuple_GET_ITEM(stride.ptr(), i));
    elements *= view.shape[i];
    last += (view.shape[i] - 1) * view.stride[i];
  }
  if (elements == 0) {  // without elements a tensor is not absent
    static char nothing;
    view.data = &nothing;
    return;
  }
  bool whole = view.data != nullptr;
  if (whole && freed) {
    const int64_t bytes = integer(call(call(tensor, names.untyped_storage), names.nbytes));
    whole = integer(call(tensor, names.storage_offset)) + last < bytes / element_bytes(view.dtype);
  }
  HULLKIT_CHECK(whole, name, ": expected a tensor with memory for all of its elements, got a storage that was freed ",
                "or cut");
}

}  // namespace hullkit
