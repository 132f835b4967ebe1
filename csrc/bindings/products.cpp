// SPDX-License-Identifier: Apache-2.0
// The face of product_sums to Python: matrices by address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <vector>

#include "bindings/field_names.h"
#include "hullkit/product_sums.h"

namespace py = pybind11;

namespace hullkit {

void bind_products(py::module_& module) {
  module.def("product_sums_usable", &product_sums_usable);
  module.def(
      "product_sums_cuda",
      [](int64_t matrices, int64_t num_results, int64_t num_terms, bool transposed, int64_t num_gradients,
         bool wide_gradients, int64_t stream) {
        const auto* first = reinterpret_cast<const ProductMatrix*>(matrices);
        const ProductSums sums = {first, num_results, num_terms, transposed, num_gradients, wide_gradients};
        product_sums_cuda(sums, reinterpret_cast<void*>(stream));
      },
      py::kw_only(), py::arg("matrices"), py::arg("num_results"), py::arg("num_terms"), py::arg("transposed"),
      py::arg("num_gradients"), py::arg("wide_gradients"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  module.attr("most_product_results") = kMostResults;
  module.attr("most_product_terms") = kMostTerms;
  module.attr("most_product_gradients") = kMostFactors;
  module.attr("product_tile_columns") = kTileColumns;
  module.attr("product_tile_rows") = py::tuple(py::cast(std::vector<int>(std::begin(kTileRows), std::end(kTileRows))));
  module.attr("layouts")["ProductMatrix"] = field_names<ProductMatrix>();
}

}  // namespace hullkit
