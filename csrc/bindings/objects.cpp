// Questions about Python objects that are asked hundreds of times a step, where Python takes too long.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace hullkit {
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
}

}  // namespace hullkit
