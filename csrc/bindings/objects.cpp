// SPDX-License-Identifier: Apache-2.0
// Questions about Python objects that are asked hundreds of times a step, where Python takes too long.
//
// An optimizer keeps a table of addresses. Between two steps a user may replace, move, cut or transpose any tensor, in
// place too. So every step looks at every tensor: its class, and its address, dtype, device, shape and strides as
// DLPack's C functions show them. `python/hullkit/optim/_layouts.py` says the same in Python, for a torch without
// those.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/dlpack.h"

namespace py = pybind11;

namespace hullkit {
namespace {

const DlExchange* exchange_of(const py::object& capsule) {
  const void* const table = PyCapsule_GetPointer(capsule.ptr(), kExchangeName);
  if (table == nullptr) throw py::error_already_set();
  return static_cast<const DlExchange*>(table);
}

bool usable_exchange(const py::object& capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), kExchangeName)) return false;
  const DlExchange* const table = exchange_of(capsule);
  return table->major == kExchangeMajor && table->share != nullptr && table->borrow != nullptr;
}

// Some objects as they were when added, in order.
class Record {
 public:
  explicit Record(const py::object& capsule) : exchange_(exchange_of(capsule)) {}

  // Whether the object is a tensor that has an address; else nothing is added.
  bool add(PyObject* object) {
    DlTensor view;
    if (!borrow(object, &view)) return false;
    size_t bytes = view.dtype_bits / 8;
    for (int32_t axis = 0; axis < view.ndim; ++axis) bytes *= static_cast<size_t>(view.shape[axis]);
    entries_.push_back({Py_TYPE(object), view, bytes});
    numbers_.insert(numbers_.end(), view.shape, view.shape + view.ndim);
    numbers_.insert(numbers_.end(), view.strides, view.strides + view.ndim);
    return true;
  }

  size_t size() const { return entries_.size(); }
  int element_bits(size_t entry) const { return entries_[entry].view.dtype_bits; }
  size_t bytes(size_t entry) const { return entries_[entry].bytes; }
  void* address(size_t entry) const { return entries_[entry].view.data; }
  void set_address(size_t entry, void* address) { entries_[entry].view.data = address; }

  // Where the elements of an entry that lie side by side begin and end.
  std::pair<uintptr_t, uintptr_t> stretch(size_t entry) const {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address(entry));
    return {begin, begin + entries_[entry].bytes};
  }

  // Compares one object after the other.
  class Reader {
   public:
    explicit Reader(const Record& record) : record_(record) {}

    // Whether the next entry is as this object is now, but for the address.
    bool next(PyObject* object, void** address) {
      if (at_ == record_.size()) return false;
      const Entry& entry = record_.entries_[at_];
      const DlTensor& then = entry.view;
      DlTensor now;
      if (Py_TYPE(object) != entry.type || !record_.borrow(object, &now)) return false;
      if (now.ndim != then.ndim || now.dtype_code != then.dtype_code || now.dtype_bits != then.dtype_bits ||
          now.device_type != then.device_type || now.device_index != then.device_index) {
        return false;
      }
      const int64_t* const numbers = record_.numbers_.data() + number_;
      for (int32_t axis = 0; axis < now.ndim; ++axis) {
        if (now.shape[axis] != numbers[axis] || now.strides[axis] != numbers[now.ndim + axis]) return false;
      }
      number_ += 2 * static_cast<size_t>(now.ndim);
      ++at_;
      *address = now.data;
      return true;
    }

    bool next_unmoved(PyObject* object) {
      void* address = nullptr;
      return next(object, &address) && address == record_.address(at_ - 1);
    }

   private:
    const Record& record_;
    size_t at_ = 0;
    size_t number_ = 0;
  };

 private:
  struct Entry {
    PyTypeObject* type;
    DlTensor view;  // its shape and strides are in numbers_
    size_t bytes;
  };

  bool borrow(PyObject* object, DlTensor* view) const {
    if (exchange_->borrow(object, view) != 0) {
      PyErr_Clear();
      return false;
    }
    if (view->ndim > 0 && view->strides == nullptr) return false;
    if (view->data != nullptr) return true;
    return std::find(view->shape, view->shape + view->ndim, 0) != view->shape + view->ndim;  // empty
  }

  const DlExchange* exchange_;
  std::vector<Entry> entries_;
  std::vector<int64_t> numbers_;
};

// `tensor.grad` of one tensor after the other. The search for the attribute takes a third of the time, and finds the
// same for all tensors of a class that leaves it to torch: a class is searched once.
class GradReader {
 public:
  py::object operator()(PyObject* tensor) {
    PyTypeObject* const type = Py_TYPE(tensor);
    if (type != type_) {
      type_ = type;
      descriptor_ = py::object();
      if (type->tp_getattro == PyObject_GenericGetAttr) {
        descriptor_ = py::reinterpret_steal<py::object>(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name()));
        if (!descriptor_) throw py::error_already_set();
        if (Py_TYPE(descriptor_.ptr()) != &PyGetSetDescr_Type) descriptor_ = py::object();  // someone's own
      }
    }
    PyObject* const grad =
        descriptor_ ? PyGetSetDescr_Type.tp_descr_get(descriptor_.ptr(), tensor, reinterpret_cast<PyObject*>(type))
                    : PyObject_GetAttr(tensor, name());
    if (grad == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(grad);
  }

 private:
  static PyObject* name() {
    static PyObject* const grad = PyUnicode_InternFromString("grad");
    return grad;
  }

  PyTypeObject* type_ = nullptr;
  py::object descriptor_;
};

// Holds tensors in C++ too, for which torch then swaps no other one. A tensor that only Python holds takes torch
// several times as long to look at.
class Holder {
 public:
  void hold(const DlExchange* exchange, PyObject* tensor) {
    DlManagedTensor* shared = nullptr;
    if (exchange->share(tensor, &shared) != 0) PyErr_Clear();
    if (shared != nullptr) held_.emplace_back(shared);
  }

 private:
  struct Release {
    void operator()(DlManagedTensor* tensor) const { tensor->release(tensor); }
  };
  std::vector<std::unique_ptr<DlManagedTensor, Release>> held_;
};

class Layouts {
 public:
  // swappable: torch may swap the tensors for others, which it does only where nobody else holds them or refers to
  // them weakly. Looking at them takes longer then.
  Layouts(const py::object& capsule, const py::object& is_neg, const py::list& tensors, bool hold, bool swappable)
      : record_(capsule), is_neg_(is_neg), swappable_(swappable) {
    const DlExchange* const exchange = exchange_of(capsule);
    for (const py::handle tensor : tensors) {
      if (!record_.add(tensor.ptr())) throw py::type_error("expected tensors with memory of their own");
      if (hold && !swappable) holder_.hold(exchange, tensor.ptr());
      objects_.push_back(tensor.ptr());
    }
    list_addresses();
  }

  bool unmoved(const py::list& tensors, bool same_objects) const {
    const size_t count = record_.size();
    if (tensors.size() != count) return false;
    Record::Reader reader(record_);
    for (size_t i = 0; i < count; ++i) {
      PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
      if ((same_objects && tensor != objects_[i]) || !reader.next_unmoved(tensor)) return false;
    }
    return true;
  }

  py::object addresses(const py::list& tensors, bool of_gradients) {
    const size_t count = record_.size();
    if (tensors.size() != count) return py::none();
    GradReader grad;
    Record::Reader reader(record_);
    now_.resize(count);
    seen_.resize(count);
    bool moved = false;
    for (size_t i = 0; i < count; ++i) {
      auto tensor = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(tensors.ptr(), i));
      if (of_gradients) tensor = grad(tensor.ptr());
      if (!reader.next(tensor.ptr(), &now_[i])) return py::none();
      if (!seen_[i] || PyWeakref_GET_OBJECT(seen_[i].ptr()) != tensor.ptr()) {
        if (negated(tensor.ptr())) return py::none();
        if (!swappable_) seen_[i] = py::weakref(tensor);
      }
      moved |= now_[i] != record_.address(i);
    }
    if (moved) {
      for (size_t i = 0; i < count; ++i) record_.set_address(i, now_[i]);
      stretches_.clear();
      list_addresses();
    }
    return addresses_;
  }

  // The place of one of the others that shares memory with one of these, but for one that is the same at the same
  // place; -1: none does. All are dense, and these share none among themselves.
  py::ssize_t overlapped_by(const Layouts& others) {
    if (stretches_.empty()) {
      for (size_t i = 0; i < record_.size(); ++i) {
        if (record_.bytes(i) != 0) stretches_.push_back(record_.stretch(i));
      }
      std::sort(stretches_.begin(), stretches_.end());
    }
    for (size_t i = 0; i < others.record_.size(); ++i) {
      if (others.record_.bytes(i) == 0) continue;
      const auto [begin, end] = others.record_.stretch(i);
      const auto next = std::lower_bound(stretches_.begin(), stretches_.end(), std::make_pair(end, uintptr_t{0}));
      if (next == stretches_.begin() || std::prev(next)->second <= begin) continue;
      const bool itself = i < record_.size() && record_.stretch(i) == others.record_.stretch(i);
      if (!itself || record_.element_bits(i) != others.record_.element_bits(i)) return static_cast<py::ssize_t>(i);
    }
    return -1;
  }

 private:
  // DLPack does not show the bit by which a view says that its memory holds the negatives. A tensor has it from its
  // beginning, so only tensors not seen before are asked.
  bool negated(PyObject* tensor) const {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg_.ptr(), &tensor, 1, nullptr));
    if (!answer) throw py::error_already_set();
    return answer.ptr() != Py_False;
  }

  void list_addresses() {
    addresses_ = py::list(record_.size());
    for (size_t i = 0; i < record_.size(); ++i) addresses_[i] = reinterpret_cast<uintptr_t>(record_.address(i));
  }

  Record record_;
  Holder holder_;
  py::object is_neg_;
  const bool swappable_;
  std::vector<PyObject*> objects_;  // compared, never followed
  std::vector<py::object> seen_;    // weak references to the tensors latest asked for, none negated
  std::vector<void*> now_;
  std::vector<std::pair<uintptr_t, uintptr_t>> stretches_;  // in order of address, once asked for
  py::list addresses_;  // one object as long as nothing moves: whoever knows it need not look into it
};

class StateLayouts {
 public:
  StateLayouts(const py::object& capsule, const py::dict& state) : record_(capsule) {
    const DlExchange* const exchange = exchange_of(capsule);
    each_value(state, [&](PyObject* param, PyObject* key, PyObject* value) {
      const bool recorded = record_.add(value);
      slots_.push_back({param, py::reinterpret_borrow<py::object>(key), recorded ? nullptr : value});
      if (recorded) holder_.hold(exchange, value);
      return true;
    });
  }

  bool unmoved(const py::dict& state) const {
    Record::Reader reader(record_);
    size_t at = 0;
    const bool same = each_value(state, [&](PyObject* param, PyObject* key, PyObject* value) {
      if (at == slots_.size()) return false;
      const Slot& slot = slots_[at++];
      if (slot.param != param || slot.key.ptr() != key) return false;
      return slot.other != nullptr ? slot.other == value : reader.next_unmoved(value);
    });
    return same && at == slots_.size();
  }

 private:
  struct Slot {
    PyObject* param;  // compared, never followed, as other
    py::object key;
    PyObject* other;  // the value, if it is no tensor
  };

  // state: a dict for each parameter, and other values that users keep there. Stops where visit returns false.
  template <typename Visit>
  static bool each_value(const py::dict& state, Visit&& visit) {
    PyObject *param = nullptr, *own = nullptr, *key = nullptr, *value = nullptr;
    for (Py_ssize_t outer = 0; PyDict_Next(state.ptr(), &outer, &param, &own);) {
      if (!PyDict_Check(own)) {
        if (!visit(param, param, own)) return false;
        continue;
      }
      for (Py_ssize_t inner = 0; PyDict_Next(own, &inner, &key, &value);) {
        if (!visit(param, key, value)) return false;
      }
    }
    return true;
  }

  Record record_;
  std::vector<Slot> slots_;
  Holder holder_;
};

}  // namespace

void bind_objects(py::module_& module) {
  module.def("usable_exchange", &usable_exchange);
  py::class_<Layouts>(module, "Layouts")
      .def(py::init<py::object, py::object, py::list, bool, bool>())
      .def("unmoved", &Layouts::unmoved)
      .def("addresses", &Layouts::addresses)
      .def("overlapped_by", &Layouts::overlapped_by);
  py::class_<StateLayouts>(module, "StateLayouts")
      .def(py::init<py::object, py::dict>())
      .def("unmoved", &StateLayouts::unmoved);
}

}  // namespace hullkit
