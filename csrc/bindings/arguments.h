// SPDX-License-Identifier: Apache-2.0
// How an operation's arguments arrive from Python, and how Python learns their names.
//
// An operation lists its arguments once, in each_argument(visit) (operations.cpp). Visitors go over this list:
// Signature writes the operator's schema and the arguments' names, from which Python defines the operator and checks
// its own records as it is imported; Reader reads the values of a call in that order; Batched gives every tensor its
// batch dimension; Apart looks at where outputs lie. So an argument has one name and one place on both sides.
//
// The methods of a visitor are the roles that an argument can have:
//   shared    a tensor that a batch may share: the pool
//   input     a tensor, one entry for each problem of the batch
//   optional  an input that may be absent
//   output    a tensor that the operation writes
//   option    a number
//   options, outputs   all fields of a struct (hullkit/fields.h)
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>
#include <vector>

#include "bindings/read_tensor.h"
#include "hullkit/pool_spec.h"

namespace hullkit {

namespace py = pybind11;

template <typename Visitor>
class ArgumentVisitor {
 public:
  template <typename Options>
  void options(Options& options) {
    each_field(options, [this](const char* name, auto& value) { self().option(name, value); });
  }
  template <typename Outputs>
  void outputs(Outputs& outputs) {
    each_field(outputs, [this](const char* name, TensorView& view) { self().output(name, view); });
  }

 private:
  Visitor& self() { return static_cast<Visitor&>(*this); }
};

// "lmo(Tensor pool, ..., Tensor(a!) index) -> ()", and the names alone.
class Signature : public ArgumentVisitor<Signature> {
 public:
  void shared(const char* name, TensorView&) { add("Tensor", name); }
  void input(const char* name, TensorView&) { add("Tensor", name); }
  void optional(const char* name, TensorView&) { add("Tensor?", name); }
  void output(const char* name, TensorView&) { add(std::string("Tensor(") + letter_++ + "!)", name); }
  template <typename Value>
  void option(const char* name, Value&) {
    add(std::is_floating_point_v<Value> ? "float" : "int", name);
  }

  std::string schema(const std::string& operation) const { return operation + "(" + list_ + ") -> ()"; }
  py::tuple names() const { return py::cast(names_); }

 private:
  void add(const std::string& type, const char* name) {
    list_ += (list_.empty() ? "" : ", ") + type + " " + name;
    names_.emplace_back(name);
  }

  std::string list_;
  std::vector<std::string> names_;
  char letter_ = 'a';
};

// Reads the values of one call. By hand: a call passes a dozen tensors, and pybind11's own conversion of them costs
// more than a kernel's start.
class Reader : public ArgumentVisitor<Reader> {
 public:
  explicit Reader(const py::args& arguments) : arguments_(arguments.ptr()) {}

  void shared(const char* name, TensorView& view) { read(name, view, true); }
  void input(const char* name, TensorView& view) { read(name, view, true); }
  void optional(const char* name, TensorView& view) { read(name, view, true); }
  void output(const char* name, TensorView& view) { read(name, view, false); }
  template <typename Value>
  void option(const char* name, Value& value) {
    PyObject* const object = next(name);
    if constexpr (std::is_same_v<Value, py::object>) {
      value = py::reinterpret_borrow<py::object>(object);
    } else if constexpr (std::is_floating_point_v<Value>) {
      value = PyFloat_AsDouble(object);
    } else {
      value = static_cast<Value>(PyLong_AsLongLong(object));
    }
    if (PyErr_Occurred()) throw py::error_already_set();
  }

  // After the last argument.
  void end() const {
    if (at_ != PyTuple_GET_SIZE(arguments_)) throw py::type_error("expected " + std::to_string(at_) + " arguments");
  }

 private:
  PyObject* next(const char* name) {
    if (at_ == PyTuple_GET_SIZE(arguments_)) throw py::type_error(std::string(name) + ": expected a value, got none");
    return PyTuple_GET_ITEM(arguments_, at_++);
  }

  // An absent tensor arrives as None.
  void read(const char* name, TensorView& view, bool freed) {
    PyObject* const object = next(name);
    if (object != Py_None) read_tensor(name, object, freed, view);
  }

  PyObject* const arguments_;
  Py_ssize_t at_ = 0;
};

// Gives the tensors of an unbatched call a batch of one, and a shared pool [M, d] one of stride 0.
class Batched : public ArgumentVisitor<Batched> {
 public:
  // lead: a tensor of one dimension in an unbatched call.
  explicit Batched(const TensorView& lead) : unbatched_(lead.rank == 1), batch_(unbatched_ ? 1 : lead.shape[0]) {}

  void shared(const char*, TensorView& view) {
    if (view.rank == 2) prepend(view);
  }
  void input(const char*, TensorView& view) {
    if (unbatched_) prepend(view);
  }
  void optional(const char*, TensorView& view) {
    if (unbatched_ && view.defined()) prepend(view);
  }
  void output(const char*, TensorView& view) {
    if (unbatched_) prepend(view);
  }
  template <typename Value>
  void option(const char*, Value&) {}

 private:
  void prepend(TensorView& view) const {
    for (int i = view.rank; i > 0; --i) {
      view.shape[i] = view.shape[i - 1];
      view.stride[i] = view.stride[i - 1];
    }
    ++view.rank;
    view.shape[0] = batch_;
    view.stride[0] = 0;
  }

  bool unbatched_;
  int64_t batch_;
};

// Refuses outputs that share memory: each would be written over by another. They are contiguous.
class Apart : public ArgumentVisitor<Apart> {
 public:
  void shared(const char*, TensorView&) {}
  void input(const char*, TensorView&) {}
  void optional(const char*, TensorView&) {}
  void output(const char* name, TensorView& view) {
    int64_t bytes = element_bytes(view.dtype);
    for (int axis = 0; axis < view.rank; ++axis) bytes *= view.shape[axis];
    if (bytes == 0) return;
    const char* const begin = static_cast<const char*>(view.data);
    for (int i = 0; i < count_; ++i) {
      HULLKIT_CHECK(begin + bytes <= pieces_[i].begin || pieces_[i].end <= begin, name,
                    ": expected memory of its own, got a part of that of ", pieces_[i].name);
    }
    pieces_[count_++] = {name, begin, begin + bytes};
  }
  template <typename Value>
  void option(const char*, Value&) {}

 private:
  struct Piece {
    const char* name;
    const char* begin;
    const char* end;
  };
  Piece pieces_[16];  // select has the most outputs: nine
  int count_ = 0;
};

}  // namespace hullkit
