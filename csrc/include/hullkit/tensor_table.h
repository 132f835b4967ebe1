// SPDX-License-Identifier: Apache-2.0
// A list of tensors that one optimizer pass goes over, and the record of everything that changes from pass to pass.
// Kernels read both where Python wrote them: on the CPU through these structs, on the GPU in Triton. Python compares
// its own declaration (python/hullkit/optim/_record.py) with this one as it is imported.
#pragma once

#include "hullkit/fields.h"
#include "hullkit/tensor_view.h"

namespace hullkit {

// One tensor. The tensors of a row share one dense layout: element i in memory is the same element of all.
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
HULLKIT_FIELDS(const TensorRow, param, state1, state2, step, numel, flags)

// The options of an optimizer: ten numbers. What has one name in several has one place, too.
struct AdamOptions {
  double lr, beta1, beta2;
  double log2_beta1, log2_beta2;  // for the GPU, which takes powers by exp2
  double eps;
  double l2;      // weight decay added to the gradient
  double decay;   // decoupled weight decay
  double sign;    // of the gradient: -1 to maximize
  double factor;  // of the gradient: clipping
};
HULLKIT_FIELDS(const AdamOptions, lr, beta1, beta2, log2_beta1, log2_beta2, eps, l2, decay, sign, factor)

struct SGDOptions {
  double lr, momentum;
  double undamped;  // 1 - dampening
  double l2;        // weight decay
  double nesterov;  // 0 or 1
  double unused5, unused6, unused7;
  double sign, factor;  // as in AdamOptions
};
HULLKIT_FIELDS(const SGDOptions, lr, momentum, undamped, l2, nesterov, unused5, unused6, unused7, sign, factor)

struct AccumulateOptions {
  double weight;
  double unused1, unused2, unused3, unused4, unused5, unused6, unused7, unused8, unused9;
};
HULLKIT_FIELDS(const AccumulateOptions, weight, unused1, unused2, unused3, unused4, unused5, unused6, unused7, unused8,
               unused9)

// The words of a record behind the options.
struct RecordControl {
  int64_t limit;   // the most updates that a launch makes: a captured launch is told here
  int64_t broken;  // set by Adam's GPU kernel at a gradient that is not finite
  uint64_t seed;   // of stochastic rounding
};
HULLKIT_FIELDS(const RecordControl, limit, broken, seed)

// The addresses of the gradients, one for each row of the table, follow a record in memory.
template <typename Options>
struct Record {
  Options options;
  RecordControl control;

  const int64_t* grads() const { return reinterpret_cast<const int64_t*>(this + 1); }
};

// Every field is a word of 8 bytes, so that a place among the names is a place in memory.
static_assert(sizeof(TensorRow) == 6 * 8 && sizeof(RecordControl) == 3 * 8);
static_assert(sizeof(AdamOptions) == 10 * 8 && sizeof(SGDOptions) == 10 * 8 && sizeof(AccumulateOptions) == 10 * 8);

struct TensorTable {
  const TensorRow* rows;  // [T]
  const int64_t* grads;   // [T] addresses
  int64_t count;          // T
  DType param_dtype;
  DType grad_dtype;
  DType state_dtype;
};

}  // namespace hullkit
