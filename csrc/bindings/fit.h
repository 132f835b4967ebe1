// SPDX-License-Identifier: Apache-2.0
// Whether the arguments of a call fit together. Operators are called directly too: every size that a kernel relies on
// is looked at here, once a call, before an address is followed. Values in memory are the kernels' to check.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <string>

#include "frank_wolfe/capped_simplex.h"
#include "hullkit/frank_wolfe.h"
#include "hullkit/round_multiplicities.h"

namespace hullkit {

inline constexpr int64_t kMaxTotal = int64_t{1} << 40;  // quotas are float64: their floors are exact up to here

inline std::string shape_of(const TensorView& view) {
  std::ostringstream text;
  text << "(";
  for (int axis = 0; axis < view.rank; ++axis) text << (axis > 0 ? ", " : "") << view.shape[axis];
  text << ")";
  return text.str();
}

// Shapes in messages have a batch dimension, which an unbatched call has got by now.
inline void check_shape(const char* name, const TensorView& view, std::initializer_list<int64_t> expected) {
  if (view.rank == static_cast<int>(expected.size()) && std::equal(expected.begin(), expected.end(), view.shape)) {
    return;
  }
  TensorView wanted;
  for (const int64_t size : expected) wanted.shape[wanted.rank++] = size;
  throw_value_error(name, ": expected shape ", shape_of(wanted), ", got ", shape_of(view));
}

inline void check_dtype(const char* name, const TensorView& view, DType expected, const char* expected_name) {
  HULLKIT_CHECK(view.dtype == expected, name, ": expected dtype ", expected_name, ", got another");
}

// NumPy gives an empty array strides of 0. Nothing is read through them.
inline bool is_empty(const TensorView& view) {
  return std::find(view.shape, view.shape + view.rank, 0) != view.shape + view.rank;
}

inline void check_unit_stride(const char* name, const TensorView& view) {
  if (is_empty(view)) return;
  const int last = view.rank - 1;
  HULLKIT_CHECK(view.shape[last] <= 1 || view.stride[last] == 1, name, ": expected stride 1 along the last dimension, ",
                "got ", view.stride[last]);
}

// What a kernel writes, or reads as one piece: contiguous.
inline void check_contiguous(const char* name, const TensorView& view) {
  if (is_empty(view)) return;
  int64_t stride = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    HULLKIT_CHECK(view.shape[axis] == 1 || view.stride[axis] == stride, name, ": expected a contiguous tensor, got ",
                  "stride ", view.stride[axis], " in dimension ", axis);
    stride *= view.shape[axis];
  }
}

inline void check_int64(const char* name, const TensorView& view, std::initializer_list<int64_t> shape) {
  check_dtype(name, view, DType::kInt64, "int64");
  check_shape(name, view, shape);
  check_contiguous(name, view);
}

inline void check_float64(const char* name, const TensorView& view, std::initializer_list<int64_t> shape) {
  check_dtype(name, view, DType::kFloat64, "float64");
  check_shape(name, view, shape);
  check_contiguous(name, view);
}

// The pool of `batch` problems: rows [batch, n, d] or, for candidates, rows [batch, M, d] that the batch shares.
inline void check_pool(const PoolSpec& pool, int64_t batch) {
  const TensorView& rows = pool.rows;
  HULLKIT_CHECK(rows.rank == 3 && rows.shape[0] == batch, "pool: expected shape (n, d) or (", batch, ", n, d), got ",
                shape_of(rows));
  HULLKIT_CHECK(rows.dtype != DType::kInt64, "pool: expected a floating dtype, got int64");
  HULLKIT_CHECK(rows.shape[1] > 0 && rows.shape[2] > 0, "pool: expected at least one row and one coordinate, got ",
                "shape ", shape_of(rows));
  check_unit_stride("pool", rows);
  const TensorView& lengths = pool.lengths;
  if (lengths.defined()) {
    check_dtype("lengths", lengths, DType::kInt64, "int64");
    check_shape("lengths", lengths, {batch});
  }
  const TensorView& candidates = pool.candidates;
  if (candidates.defined()) {
    HULLKIT_CHECK(candidates.rank == 2 && candidates.shape[0] == batch && candidates.shape[1] > 0,
                  "candidates: expected shape (", batch, ", n) with n >= 1, got ", shape_of(candidates));
    check_dtype("candidates", candidates, DType::kInt64, "int64");
    HULLKIT_CHECK(batch <= 1 || rows.stride[0] == 0,
                  "candidates: expected a pool of shape (M, d) that the batch shares");
  }
}

// query [batch, d], or [batch, m, d] where several are allowed.
inline void check_query(const char* name, const PoolSpec& pool, const TensorView& query, bool several = false) {
  const int last = query.rank - 1;
  HULLKIT_CHECK(query.rank == 2 || (several && query.rank == 3 && query.shape[1] > 0), name,
                ": expected shape (d,), (B, d)", several ? " or (B, m, d) with m >= 1" : "", ", got ", shape_of(query));
  HULLKIT_CHECK(query.shape[last] == pool.dim(), name, ": expected d = ", pool.dim(), " coordinates, got ",
                query.shape[last]);
  HULLKIT_CHECK(query.dtype == pool.rows.dtype, name, ": expected the pool's dtype, got another");
  check_unit_stride(name, query);
}

// Vertices that a run may touch: each needs a place.
inline int64_t most_touched(const FrankWolfeParams& params, int64_t positions) {
  const bool capped = params.max_weight < 1.0;
  // A cap below 1 / positions is refused, so this is small.
  const auto start = static_cast<int64_t>(least_support(params.max_weight));
  const int64_t step = capped && params.variant == Variant::kVanilla ? start : 1;
  const int64_t fit = std::max<int64_t>(positions - start, 0) / step + 1;  // more iterations touch nothing new
  return std::min({params.max_support, positions, start + std::min(params.max_iters, fit) * step});
}

inline void check_options(const FrankWolfeParams& params, int64_t positions) {
  HULLKIT_CHECK(params.max_support >= 1, "max_support: expected an int >= 1, got ", params.max_support);
  HULLKIT_CHECK(params.max_iters >= 0, "max_iters: expected an int >= 0, got ", params.max_iters);
  HULLKIT_CHECK(params.tol >= 0.0, "tol: expected a number >= 0, got ", params.tol);
  HULLKIT_CHECK(!std::isnan(params.gap_tol), "gap_tol: expected a number, got NaN");
  const auto variant = static_cast<int64_t>(params.variant);
  HULLKIT_CHECK(variant >= 0 && variant <= static_cast<int64_t>(Variant::kFullyCorrective),
                "variant: expected a code in 0..3, got ", variant);
  // A short entry of the batch says itself that it has too few candidates.
  HULLKIT_CHECK(params.max_weight > 0.0 && least_support(params.max_weight) <= static_cast<double>(positions),
                "max_weight: expected at least 1 / ", positions, ", got ", params.max_weight);
  if (params.max_weight >= 1.0) return;
  HULLKIT_CHECK(params.variant != Variant::kAway, "variant: expected another than away with max_weight < 1");
  HULLKIT_CHECK(static_cast<double>(params.max_support) >= least_support(params.max_weight),
                "max_support: expected at least 1 / max_weight, got ", params.max_support);
}

inline void check_total(int64_t total) {
  HULLKIT_CHECK(total >= 1 && total <= kMaxTotal, "total: expected an int in 1..", kMaxTotal, ", got ", total);
}

inline void check_options(const RoundingParams& params) {
  check_total(params.total);
  HULLKIT_CHECK(params.exchange_passes >= 0, "exchange_passes: expected an int >= 0, got ", params.exchange_passes);
  HULLKIT_CHECK(params.max_multiplicity >= 1, "max_multiplicity: expected an int >= 1, got ", params.max_multiplicity);
}

// Rounding needs a support over which the total fits: weights at most max_multiplicity / total see to that.
inline void check_options(const FrankWolfeParams& params, const RoundingParams& rounding) {
  const auto total = static_cast<double>(rounding.total), most = static_cast<double>(rounding.max_multiplicity);
  HULLKIT_CHECK(most >= total || params.max_weight * total <= most * (1.0 + kCapSlack), "max_weight: expected at most ",
                "max_multiplicity / total = ", most / total, ", got ", params.max_weight);
}

inline void check_result(const FrankWolfeResult& result, const FrankWolfeParams& params, const PoolSpec& pool) {
  const int64_t batch = pool.batch(), least = most_touched(params, pool.positions());
  HULLKIT_CHECK(result.indices.rank == 2 && result.indices.shape[1] >= least, "indices: expected shape (", batch,
                ", S) with S >= ", least, ", got ", shape_of(result.indices));
  const int64_t places = result.indices.shape[1];
  check_int64("indices", result.indices, {batch, places});
  check_float64("weights", result.weights, {batch, places});
  check_int64("support_size", result.support_size, {batch});
  check_float64("residual_norm", result.residual_norm, {batch});
  check_float64("dual_gap", result.dual_gap, {batch});
  check_int64("num_iters", result.num_iters, {batch});
  check_int64("status", result.status, {batch});
}

}  // namespace hullkit
