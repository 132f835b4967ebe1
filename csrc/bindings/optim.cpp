// The optimizers' face to Python: addresses of tables, and numbers.
#include <pybind11/pybind11.h>

#include "hullkit/accumulate.h"
#include "hullkit/adam.h"
#include "hullkit/sgd.h"

namespace py = pybind11;

namespace hullkit {
namespace {

// Addresses of rows [T, 6] and gradients [T], both int64, and dtype codes.
TensorTable table(int64_t rows, int64_t count, int64_t grads, int param, int grad, int state) {
  return {reinterpret_cast<const TensorRow*>(rows),
          reinterpret_cast<const int64_t*>(grads),
          count,
          static_cast<DType>(param),
          static_cast<DType>(grad),
          static_cast<DType>(state)};
}

}  // namespace

void bind_optim(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> release;
  module.def(
      "adam_cpu",
      [](int64_t rows, int64_t count, int64_t grads, int param, int grad, int state, double lr, double beta1,
         double beta2, double eps, double l2, double decay, double scale, int64_t num_steps, bool stochastic_rounding,
         uint64_t seed, int num_threads) {
        const AdamParams params = {lr, beta1, beta2, eps, l2, decay, scale, num_steps, stochastic_rounding, seed};
        adam_cpu(table(rows, count, grads, param, grad, state), params, num_threads);
      },
      release);
  module.def(
      "sgd_cpu",
      [](int64_t rows, int64_t count, int64_t grads, int param, int grad, int state, double lr, double momentum,
         double undamped, double l2, bool nesterov, double scale, int64_t num_steps, int num_threads) {
        const SgdParams params = {lr, momentum, undamped, l2, nesterov, scale, num_steps};
        sgd_cpu(table(rows, count, grads, param, grad, state), params, num_threads);
      },
      release);
  module.def(
      "accumulate_cpu",
      [](int64_t rows, int64_t count, int64_t grads, int grad, double weight, int num_threads) {
        const int float32 = static_cast<int>(DType::kFloat32);
        return accumulate_cpu(table(rows, count, grads, float32, grad, float32), weight, num_threads);
      },
      release);
  module.def(
      "squared_norm_cpu",
      [](int64_t rows, int64_t count, int64_t grads, int grad, int num_threads) {
        return squared_norm_cpu(table(rows, count, grads, grad, grad, grad), num_threads);
      },
      release);
}

}  // namespace hullkit
