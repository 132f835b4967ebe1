// SPDX-License-Identifier: Apache-2.0
// The optimizers' face to Python: tables and records by address, and their layout by name.
#include <pybind11/pybind11.h>

#include "bindings/field_names.h"
#include "hullkit/accumulate.h"
#include "hullkit/adam.h"
#include "hullkit/adam_product.h"
#include "hullkit/sgd.h"

namespace py = pybind11;

namespace hullkit {
namespace {

// The table [T] of rows, and the record behind which its gradients' addresses lie.
template <typename Options>
TensorTable table(int64_t rows, int64_t count, const Record<Options>& record, int param, int grad, int state) {
  return {reinterpret_cast<const TensorRow*>(rows),
          record.grads(),
          count,
          static_cast<DType>(param),
          static_cast<DType>(grad),
          static_cast<DType>(state)};
}

template <typename Options>
const Record<Options>& record_at(int64_t address) {
  return *reinterpret_cast<const Record<Options>*>(address);
}

}  // namespace

void bind_optim(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> release;
  const py::kw_only by_name;
  const py::arg rows("rows"), count("count"), record("record"), param("param_dtype"), grad("grad_dtype"),
      state("state_dtype"), num_steps("num_steps"), stochastic("stochastic_rounding"), threads("num_threads");
  module.def(
      "adam_cpu",
      [](int64_t rows, int64_t count, int64_t record, int param, int grad, int state, int64_t num_steps,
         bool stochastic_rounding, int num_threads) {
        const auto& [options, control] = record_at<AdamOptions>(record);
        const AdamParams params = {options.lr,
                                   options.beta1,
                                   options.beta2,
                                   options.eps,
                                   options.l2,
                                   options.decay,
                                   options.sign * options.factor,
                                   num_steps,
                                   stochastic_rounding,
                                   control.seed};
        adam_cpu(table(rows, count, record_at<AdamOptions>(record), param, grad, state), params, num_threads);
      },
      by_name, rows, count, record, param, grad, state, num_steps, stochastic, threads, release);
  module.def(
      "sgd_cpu",
      [](int64_t rows, int64_t count, int64_t record, int param, int grad, int state, int64_t num_steps,
         int num_threads) {
        const SGDOptions& options = record_at<SGDOptions>(record).options;
        const SgdParams params = {options.lr, options.momentum,        options.undamped,
                                  options.l2, options.nesterov != 0.0, options.sign * options.factor,
                                  num_steps};
        sgd_cpu(table(rows, count, record_at<SGDOptions>(record), param, grad, state), params, num_threads);
      },
      by_name, rows, count, record, param, grad, state, num_steps, threads, release);
  module.def(
      "accumulate_cpu",
      [](int64_t rows, int64_t count, int64_t record, int grad, int num_threads) {
        const auto& own = record_at<AccumulateOptions>(record);
        const int float32 = static_cast<int>(DType::kFloat32);
        return accumulate_cpu(table(rows, count, own, float32, grad, float32), own.options.weight, num_threads);
      },
      by_name, rows, count, record, grad, threads, release);
  module.def(
      "squared_norm_cpu",  // of the gradients: no option is read
      [](int64_t rows, int64_t count, int64_t record, int grad, int num_threads) {
        return squared_norm_cpu(table(rows, count, record_at<AccumulateOptions>(record), grad, grad, grad),
                                num_threads);
      },
      by_name, rows, count, record, grad, threads, release);

  module.def("adam_product_usable", []() {
#ifdef HULLKIT_WITH_CUDA
    return adam_product_usable();
#else
    return false;
#endif
  });
#ifdef HULLKIT_WITH_CUDA
  module.def(
      "adam_product_cuda",
      [](int64_t rows, int64_t factors, int64_t record, int64_t chunks, int64_t coefficients, int64_t copies,
         int64_t programs, int64_t capacity, int param, bool stochastic_rounding, int64_t stream) {
        const AdamProducts products = {reinterpret_cast<const TensorRow*>(rows),
                                       reinterpret_cast<const ProductFactors*>(factors),
                                       reinterpret_cast<Record<AdamOptions>*>(record),
                                       reinterpret_cast<const ProductChunk*>(chunks),
                                       reinterpret_cast<const float*>(coefficients),
                                       reinterpret_cast<const int64_t*>(copies),
                                       programs,
                                       capacity,
                                       static_cast<DType>(param),
                                       stochastic_rounding};
        adam_product_cuda(products, reinterpret_cast<void*>(stream));
      },
      by_name, rows, py::arg("factors"), record, py::arg("chunks"), py::arg("coefficients"), py::arg("copies"),
      py::arg("programs"), py::arg("capacity"), param, stochastic, py::arg("stream"), release);
#endif
  module.attr("adam_product_tile") = kProductTile;

  py::dict layouts;
  layouts["TensorRow"] = field_names<TensorRow>();
  layouts["AdamOptions"] = field_names<AdamOptions>();
  layouts["SGDOptions"] = field_names<SGDOptions>();
  layouts["AccumulateOptions"] = field_names<AccumulateOptions>();
  layouts["RecordControl"] = field_names<RecordControl>();
  layouts["ProductFactors"] = field_names<ProductFactors>();
  module.attr("layouts") = layouts;
}

}  // namespace hullkit
