// SPDX-License-Identifier: Apache-2.0
// The pool of a selection: B sets of candidate rows. They may differ in length, and they may share their rows.
#pragma once

#include "hullkit/tensor_view.h"

namespace hullkit {

// rows [B, n, d] with unit stride along d; stride 0 along B where one pool serves the whole batch.
// lengths [B] int64, optional: candidates at position lengths[b] and beyond are ignored; 1 <= lengths[b] <= n.
// candidates [B, n] int64, optional: position i of entry b is row candidates[b, i] of a shared pool
// rows [B, M, d] (stride 0 along B); -1 means no candidate. Every index in or out of an operation is a
// position 0..n-1. NaN or Inf in a valid row, or no valid row, is a ValueError.
struct PoolSpec {
  TensorView rows;
  TensorView lengths;
  TensorView candidates;

  PoolSpec entries(int64_t first, int64_t count) const {
    return {rows.entries(first, count), lengths.entries(first, count), candidates.entries(first, count)};
  }
  int64_t batch() const { return rows.shape[0]; }
  int64_t dim() const { return rows.shape[2]; }
  int64_t positions() const { return candidates.defined() ? candidates.shape[1] : rows.shape[1]; }
};

}  // namespace hullkit
