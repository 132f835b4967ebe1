// Questions about Python objects that are asked hundreds of times a step, where Python takes too long.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace hullkit {
namespace {

bool same_items(PyObject* first, PyObject* second) {
  PyObject *key = nullptr, *value = nullptr, *other_key = nullptr, *other_value = nullptr;
  Py_ssize_t position = 0, other_position = 0;
  if (PyDict_GET_SIZE(first) != PyDict_GET_SIZE(second)) return false;
  while (PyDict_Next(first, &position, &key, &value)) {
    if (!PyDict_Next(second, &other_position, &other_key, &other_value)) return false;
    if (key != other_key || value != other_value) return false;
  }
  return true;
}

}  // namespace

void bind_objects(py::module_& module) {
  // Whether the values of these dicts, one dict after the other, are the very objects of `known`.
  module.def("same_objects", [](const py::list& dicts, const py::list& known) {
    PyObject* const list = known.ptr();
    const Py_ssize_t count = PyList_GET_SIZE(list);
    Py_ssize_t at = 0;
    for (const py::handle dict : dicts) {
      PyObject* value = nullptr;
      Py_ssize_t position = 0;
      if (!PyDict_Check(dict.ptr())) throw py::type_error("expected a list of dicts");
      while (PyDict_Next(dict.ptr(), &position, nullptr, &value)) {
        if (at == count || PyList_GET_ITEM(list, at) != value) return false;
        ++at;
      }
    }
    return at == count;
  });
  // The places of pairs of dicts that do not have the very same keys and values in one order.
  module.def("unlike_dicts", [](const py::list& pairs) {
    py::list unlike;
    for (Py_ssize_t at = 0; at < PyList_GET_SIZE(pairs.ptr()); ++at) {
      PyObject* const pair = PyList_GET_ITEM(pairs.ptr(), at);
      if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 || !PyDict_Check(PyTuple_GET_ITEM(pair, 0)) ||
          !PyDict_Check(PyTuple_GET_ITEM(pair, 1))) {
        throw py::type_error("expected a list of pairs of dicts");
      }
      if (!same_items(PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1))) unlike.append(at);
    }
    return unlike;
  });
}

}  // namespace hullkit
