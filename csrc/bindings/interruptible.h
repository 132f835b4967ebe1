// SPDX-License-Identifier: Apache-2.0
// Runs the core without the GIL, so that Ctrl-C is heard: see hullkit/interrupt.h.
#pragma once

#include <pybind11/pybind11.h>

#include "hullkit/interrupt.h"

namespace hullkit {

// Throws what a handler of Python's raised while run() was under way.
template <typename Run>
void interruptible(Run&& run) {
  namespace py = pybind11;
  const py::gil_scoped_release release;
  run_interruptibly(
      [] {
        const py::gil_scoped_acquire hold;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      },
      run);
}

}  // namespace hullkit
