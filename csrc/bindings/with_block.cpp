// SPDX-License-Identifier: Apache-2.0
// Work that goes on to its end, whatever raises meanwhile: a call, and the ends of a with-block.
//
// Python runs signal handlers between two bytecodes and as some functions of C return. What a
// handler raises comes out there: also as `__exit__` is called, before its first line, where no
// `try` can catch it. So both ends of the block are functions of C++, which Python does not
// interrupt, and they call the methods of the Python class that derives from WithBlock:
//
//   _claim()   what must not be cut short: handlers are held back
//   _enter()   the work, interrupted by any signal at once; returns what `with ... as` gives
//   _leave()   undoes both, as far as they got. Handlers are held back, and it is called again
//              until it returns, so it must be able to begin again where it was cut short.
#include <pybind11/pybind11.h>
#include <signal.h>

#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace py = pybind11;

namespace hullkit {
namespace {

// No error of _leave, or of a handler, comes this often, unless it comes for ever.
constexpr int kMostAttempts = 100;

// Whether Python lets only its main thread change handlers.
bool refuses_thread(const py::error_already_set& error) {
  return error.matches(PyExc_ValueError) &&
         std::string(error.what()).find("signal only works in main thread") != std::string::npos;
}

// Python's handlers of signals, replaced for a time by one that notes what has arrived.
class HeldSignals {
 public:
  // May be cut short by a handler that raises, and called again.
  void hold() {
    // Python runs handlers in the main thread only, and lets only it change them.
    const py::module_ threading = py::module_::import("threading");
    if (!threading.attr("get_ident")().equal(threading.attr("main_thread")().attr("ident"))) {
      return;
    }
    if (!note_) {
      note_ = py::cpp_function([arrived = arrived_](int signum, const py::object&) { arrived->push_back(signum); });
      // Not `signal`: its functions are Python's, and look for an enum's member in every handler.
      signals_ = py::module_::import("_signal");
    }
    const py::object getsignal = signals_.attr("getsignal");
    for (int signum = 1; signum < NSIG; ++signum) {
      const py::object number = py::int_(signum);
      PyObject* const argument = number.ptr();
      const auto handler =
          py::reinterpret_steal<py::object>(PyObject_Vectorcall(getsignal.ptr(), &argument, 1, nullptr));
      if (!handler) throw py::error_already_set();
      if (handler.is(note_) || !PyCallable_Check(handler.ptr())) continue;
      replaced_[signum] = handler;  // first: setting may be cut short
      try {
        set(signum, note_);
      } catch (const py::error_already_set& error) {
        // `threading` may have been imported first by another thread than Python's main one.
        if (!refuses_thread(error)) throw;
        replaced_.clear();
        return;
      }
    }
  }

  // The handlers are back, and those whose signal has arrived are run. May be cut short likewise.
  void release() {
    while (!replaced_.empty()) {
      const auto first = replaced_.begin();
      if (signals_.attr("getsignal")(first->first).is(note_)) set(first->first, first->second);
      replaced_.erase(first);
    }
    while (!arrived_->empty()) {
      const int signum = arrived_->front();
      arrived_->erase(arrived_->begin());
      const py::object handler = signals_.attr("getsignal")(signum);
      if (!PyCallable_Check(handler.ptr())) continue;  // an earlier one has switched it off
      PyFrameObject* const frame = PyEval_GetFrame();
      handler(signum, frame ? py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(frame)) : py::none());
    }
  }

 private:
  // Python's function forgets whether system calls go on after the signal (`siginterrupt`).
  void set(int signum, const py::object& handler) {
    struct sigaction before = {}, after = {};
    const bool known = sigaction(signum, nullptr, &before) == 0;
    signals_.attr("signal")(signum, handler);
    if (known && sigaction(signum, nullptr, &after) == 0 && after.sa_flags != before.sa_flags) {
      after.sa_flags = before.sa_flags;
      sigaction(signum, &after, nullptr);
    }
  }

  py::object note_, signals_;
  std::map<int, py::object> replaced_;
  // Shared with the function, which may outlive this: somebody may have asked for the handler.
  std::shared_ptr<std::vector<int>> arrived_ = std::make_shared<std::vector<int>>();
};

// Sets the context of `latest`, as Python does for an error raised while another one is handled.
void set_context(const py::error_already_set& latest, const std::exception_ptr& earlier) {
  try {
    if (earlier) std::rethrow_exception(earlier);
  } catch (const py::error_already_set& error) {
    PyObject* const value = latest.value().ptr();
    py::object at = error.value();
    while (at && at.ptr() != value) {
      at = py::reinterpret_steal<py::object>(PyException_GetContext(at.ptr()));
    }
    if (!at) PyException_SetContext(value, error.value().inc_ref().ptr());
  } catch (...) {
  }
}

class WithBlock {
 public:
  py::object enter(const py::object& self) {
    if (entered_) {
      PyErr_SetString(PyExc_RuntimeError,
                      "expected a with-block of its own for each call, got one that was entered before");
      throw py::error_already_set();
    }
    entered_ = true;
    try {
      signals_.hold();
      self.attr("_claim")();
      signals_.release();
      return self.attr("_enter")();
    } catch (...) {
      leave(self, std::current_exception());
      throw;
    }
  }

  // Raises the latest error, or else the one that is given.
  void leave(const py::object& self, std::exception_ptr error) {
    bool left = false;
    for (int attempt = 0; !left && attempt < kMostAttempts; ++attempt) {
      try {
        signals_.hold();
        self.attr("_leave")();
        signals_.release();
        left = true;
      } catch (const py::error_already_set& latest) {
        set_context(latest, error);
        error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
  }

 private:
  bool entered_ = false;
  HeldSignals signals_;
};

// The result of `work`, which no handler cuts short. Handlers of signals that have arrived meanwhile run afterwards.
py::object uninterrupted(const py::function& work) {
  HeldSignals signals;
  py::object result;
  std::exception_ptr error;
  try {
    signals.hold();
    result = work();
  } catch (const py::error_already_set&) {
    error = std::current_exception();
  }
  bool released = false;
  for (int attempt = 0; !released && attempt < kMostAttempts; ++attempt) {
    try {
      signals.release();
      released = true;
    } catch (const py::error_already_set& latest) {
      set_context(latest, error);
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
  return result;
}

}  // namespace

void bind_with_block(py::module_& module) {
  module.def("uninterrupted", &uninterrupted);
  py::class_<WithBlock>(module, "WithBlock")
      .def(py::init<>())
      .def("__enter__", [](const py::object& self) { return self.cast<WithBlock&>().enter(self); })
      .def("__exit__", [](const py::object& self, const py::args&) { self.cast<WithBlock&>().leave(self, nullptr); });
}

}  // namespace hullkit
