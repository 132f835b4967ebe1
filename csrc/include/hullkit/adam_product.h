// SPDX-License-Identifier: Apache-2.0
// k Adam updates of matrices whose gradients are products, which are never written to memory (CUDA).
//   grad = a^T b, rounded to bfloat16; then as adam.h, without weight decay and clipping
// a [T, M] and b [T, N], of bfloat16, are the two tensors that a linear layer's backward pass multiplies, over T
// tokens. The product is a short sum for each element of a large result: alone it would wait for memory as Adam does,
// and both would move each gradient once more.
#pragma once

#include "hullkit/tensor_table.h"

namespace hullkit {

// The factors of one gradient. Rows begin at multiples of 16 bytes, and their elements are neighbours.
struct ProductFactors {
  int64_t a, b;                // addresses
  int64_t a_stride, b_stride;  // elements from row to row
  int64_t tokens;              // T
  int64_t columns;             // N, a multiple of 8; M, likewise, is the row's numel / N
};
HULLKIT_FIELDS(const ProductFactors, a, b, a_stride, b_stride, tokens, columns)

// The tiles of one program: every `stride`th of one matrix. So programs that run together work side by side.
struct ProductChunk {
  int32_t row, first, count, stride;
};

struct AdamProducts {
  const TensorRow* rows;          // [T]
  const ProductFactors* factors;  // [T]
  Record<AdamOptions>* record;
  const ProductChunk* chunks;  // [programs]
  const float* coefficients;   // [T, capacity, 2]: what adam_coefficients_kernel made
  const int64_t* copies;       // [T] where bfloat16 copies of new parameters go that are not bfloat16 themselves
  int64_t programs, capacity;
  DType param_dtype;         // float32, or a half, whose moments are bfloat16
  bool stochastic_rounding;  // of halves
};

// Elements on both sides of a tile.
constexpr int kProductTile = 128;

// Whether this build has code for the current device, and the device the shared memory that a block takes.
bool adam_product_usable();

// All pointers are the device's.
void adam_product_cuda(const AdamProducts& products, void* stream);

}  // namespace hullkit
