// SPDX-License-Identifier: Apache-2.0
// Linear layers with low-rank parts, all at once (CUDA, Hopper's tensor cores). For each slot k and each result:
//   result[k] = sum over terms of rows[k] factor[k]^T, + bias        or, with `transposed`, of rows[k] factor[k]
// A layer's output has two terms, x W^T and (s x A^T) B^T; the gradient of an input that several layers read has two
// for each of them. So a thin product costs one more step of a sum that is computed anyway, and nothing is read twice.
// Beside an input's gradient the launch computes those of the layers' factors, d_a[k] = d_inner[k]^T x[k].
// Everything is bfloat16; sums are in float32, rounded once. Only d_a may be float32.
#pragma once

#include <cstdint>

#include "hullkit/fields.h"

namespace hullkit {

// [slots, rows, columns] in the device's memory. Elements of a row are neighbours; addresses, and bytes from row to row
// and slot to slot, are multiples of 16. A factor of one slot serves all slots.
struct ProductMatrix {
  int64_t address, slots, rows, columns;
  int64_t slot_stride, row_stride;  // elements
  int64_t bias;                     // of a result: address of [columns], or 0
};
HULLKIT_FIELDS(const ProductMatrix, address, slots, rows, columns, slot_stride, row_stride, bias)

constexpr int kMostResults = 3;
constexpr int kMostTerms = 6;  // of all results together
constexpr int kMostFactors = 3;

// A tile of the kernel has kTileColumns columns of a result and one of kTileRows rows of a slot: those with which a
// launch is expected to be fastest. Texts that share a pass are mostly multiples of 16 long.
constexpr int kTileColumns = 128;
constexpr int kTileRows[] = {96, 104, 112, 128, 160, 200, 208};

struct ProductSums {
  // Host memory: each result, then the pairs (factor, rows) of its terms. A factor is [columns of the result, depth],
  // or [depth, columns] with `transposed`. All results have equally many terms; the i-th terms of all have one depth.
  // With gradients of factors, which need `transposed`, follow x [slots, rows, columns] and for each factor d_inner
  // [slots, rows, rank] and d_a [slots, rank, columns]; all d_inner have one shape, all d_a one shape and strides.
  const ProductMatrix* matrices;
  int64_t num_results, num_terms;  // terms of each result
  bool transposed;
  int64_t num_gradients;
  bool wide_gradients;  // d_a is float32
};

// Whether this build has code for the current device.
bool product_sums_usable();

// Throws std::invalid_argument for matrices that the device's copies cannot take.
void product_sums_cuda(const ProductSums& sums, void* stream);

}  // namespace hullkit
