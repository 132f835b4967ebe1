// SPDX-License-Identifier: Apache-2.0
// What many dicts hold at one moment. A model has thousands; as many copies made in Python would start its garbage
// collector, which takes longer than they do. Here they are one object for the collector.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace hullkit {
namespace {

// Keys and values are kept alive, and compared as objects.
class DictCopies {
 public:
  explicit DictCopies(const py::list& dicts) {
    for (const py::handle dict : dicts) {
      if (!PyDict_Check(dict.ptr())) throw py::type_error("dicts: expected a list of dicts");
      dicts_.push_back(py::reinterpret_borrow<py::object>(dict));
      PyObject *key = nullptr, *value = nullptr;
      for (Py_ssize_t position = 0; PyDict_Next(dict.ptr(), &position, &key, &value);) {
        items_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
      }
      ends_.push_back(items_.size());
    }
  }

  // (dict, copy) of those that do not hold the very same keys and values in one order. The order of an OrderedDict is
  // not seen.
  py::list changed() const {
    py::list found;
    for (size_t at = 0; at < dicts_.size(); ++at) {
      if (same(at)) continue;
      py::dict copy;
      for (size_t i = begin(at); i < ends_[at]; ++i) copy[items_[i].first] = items_[i].second;
      found.append(py::make_tuple(dicts_[at], copy));
    }
    return found;
  }

  // Shows every object that is held to the garbage collector.
  int visit(visitproc visitor, void* argument) const {
    int stop = 0;
    for (size_t i = 0; stop == 0 && i < dicts_.size(); ++i) stop = visitor(dicts_[i].ptr(), argument);
    for (size_t i = 0; stop == 0 && i < items_.size(); ++i) {
      stop = visitor(items_[i].first.ptr(), argument);
      if (stop == 0) stop = visitor(items_[i].second.ptr(), argument);
    }
    return stop;
  }

  void clear() {
    const DictCopies held(std::move(*this));  // objects go when this one is empty
    dicts_.clear(), items_.clear(), ends_.clear();
  }

  // The values, in order, but for those of these types and under these keys.
  py::list values(const py::object& types, const py::object& keys) const {
    if (!PyAnySet_Check(types.ptr()) || !PyAnySet_Check(keys.ptr())) {
      throw py::type_error("types, keys: expected sets");
    }
    const auto contains = [](const py::object& set, PyObject* object) {
      const int found = PySet_Contains(set.ptr(), object);
      if (found < 0) throw py::error_already_set();
      return found == 1;
    };
    py::list found;
    for (const auto& [key, value] : items_) {
      if (!contains(types, reinterpret_cast<PyObject*>(Py_TYPE(value.ptr()))) && !contains(keys, key.ptr())) {
        found.append(value);
      }
    }
    return found;
  }

 private:
  size_t begin(size_t at) const { return at == 0 ? 0 : ends_[at - 1]; }

  bool same(size_t at) const {
    PyObject *key = nullptr, *value = nullptr;
    size_t i = begin(at);
    if (static_cast<size_t>(PyDict_GET_SIZE(dicts_[at].ptr())) != ends_[at] - i) return false;
    for (Py_ssize_t position = 0; PyDict_Next(dicts_[at].ptr(), &position, &key, &value); ++i) {
      if (items_[i].first.ptr() != key || items_[i].second.ptr() != value) return false;
    }
    return true;
  }

  std::vector<py::object> dicts_;
  std::vector<std::pair<py::object, py::object>> items_;  // of all dicts, one after the other
  std::vector<size_t> ends_;
};

// The copies behind a Python object; null until its constructor has run. The collector may come before the object has
// a layout, of which pybind11's own functions would read.
DictCopies* copies_of(PyObject* self) {
  const auto* const instance = reinterpret_cast<const py::detail::instance*>(self);
  if (!instance->simple_layout || !instance->simple_holder_constructed) return nullptr;
  return static_cast<DictCopies*>(instance->simple_value_holder[0]);
}

// Copies may hold what holds them, such as the module of a model that keeps its own snapshot.
void collect_cycles(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const DictCopies* const copies = copies_of(self);
    return copies == nullptr ? 0 : copies->visit(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (DictCopies* const copies = copies_of(self)) copies->clear();
    return 0;
  };
}

}  // namespace

void bind_dict_copies(py::module_& module) {
  py::class_<DictCopies>(module, "DictCopies", py::is_final(), py::custom_type_setup(&collect_cycles))
      .def(py::init<py::list>(), py::arg("dicts"))
      .def("changed", &DictCopies::changed)
      .def("values", &DictCopies::values, py::arg("types"), py::arg("keys"));
}

}  // namespace hullkit
