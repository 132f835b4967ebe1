// SPDX-License-Identifier: Apache-2.0
// The Python face of the core. Only this folder knows pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "hullkit/build_info.h"
#include "hullkit/check.h"
#include "simd/simd.h"

namespace py = pybind11;

namespace hullkit {

void bind_dict_copies(py::module_& module);
void bind_objects(py::module_& module);
void bind_optim(py::module_& module);
void bind_operations(py::module_& module);
void bind_products(py::module_& module);
void bind_with_block(py::module_& module);

namespace {

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
    } catch (const hullkit::NotImplementedError& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    }
  });
  hullkit::bind_operations(module);
  hullkit::bind_optim(module);
  hullkit::bind_products(module);  // adds to what bind_optim makes
  hullkit::bind_dict_copies(module);
  hullkit::bind_objects(module);
  hullkit::bind_with_block(module);
  module.def("build_info", &hullkit::build_info);
}
