// SPDX-License-Identifier: Apache-2.0
// How a kernel's copies see the matrices of `product_sums`: as boxes (compute capability 9.0).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "hullkit/product_sums.h"

namespace hullkit {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function; null without one. The driver is not linked: builds run on machines that have none.
inline Encode encode_function() {
  static const Encode found = []() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    cudaGetLastError();  // the next launch would report it
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// Boxes of a matrix, with a swizzle of as many bytes as a row of a box has: 128 or 32.
inline CUtensorMap encode(const ProductMatrix& matrix, int box_columns, int box_rows) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t sizes[3] = {size(matrix.columns), size(matrix.rows), size(matrix.slots)};
  const cuuint64_t strides[2] = {size(2 * matrix.row_stride), size(2 * matrix.slot_stride)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t every[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult error = encode_function()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, reinterpret_cast<void*>(matrix.address), sizes, strides, box, every,
      CU_TENSOR_MAP_INTERLEAVE_NONE, 2 * box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::invalid_argument(
        "product_sums: expected addresses and distances that are multiples of 16 bytes, got a matrix of " +
        std::to_string(matrix.slots) + " x " + std::to_string(matrix.rows) + " x " + std::to_string(matrix.columns) +
        " at " + std::to_string(matrix.address) + ", " + std::to_string(matrix.slot_stride) + " and " +
        std::to_string(matrix.row_stride) + " elements from slot to slot and row to row (the driver's error is " +
        std::to_string(error) + ")");
  }
  return map;
}

}  // namespace hullkit
