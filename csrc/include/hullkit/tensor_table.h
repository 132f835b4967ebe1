// A list of tensors that one optimizer pass goes over. The Triton kernels read the same table.
#pragma once

#include "hullkit/tensor_view.h"

namespace hullkit {

// What one row holds. Tensors of a row share one dense layout: element i in memory is the same element of all.
struct TensorRow {
  int64_t param;   // address
  int64_t state1;  // address of Adam's exp_avg, SGD's momentum buffer; 0 for none
  int64_t state2;  // address of Adam's exp_avg_sq; 0 for none
  int64_t step;    // address of a float32 counter of updates; 0 for none
  int64_t numel;
  int64_t flags;  // bit 0: fresh, state1 is yet to be set; the rest: a salt for stochastic rounding
  bool fresh() const { return (flags & 1) != 0; }
  uint32_t salt() const { return static_cast<uint32_t>(flags >> 1); }
};
static_assert(sizeof(TensorRow) == 6 * sizeof(int64_t), "rows are read as [T, 6] int64");

struct TensorTable {
  const TensorRow* rows;  // [T]
  const int64_t* grads;   // [T] addresses
  int64_t count;          // T
  DType param_dtype;
  DType grad_dtype;
  DType state_dtype;
};

}  // namespace hullkit
