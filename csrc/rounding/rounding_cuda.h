// SPDX-License-Identifier: Apache-2.0
// Rounding once the products are there: of a support alone, or of a whole pool it was chosen from.
#pragma once

#include "cuda/gram/gram.h"
#include "hullkit/round_multiplicities.h"

namespace hullkit {

// gram [count, n + 1, gram_stride(n)] of entries first, ..., the query last. by_position: n counts the candidates of a
// prompt, and point s of a support is candidate indices[b, s]; else it is candidate s. Indices are less than
// `positions`.
struct Supports {
  Supports(const double* gram, int64_t n, bool by_position, int64_t positions, const TensorView& indices,
           const TensorView& weights, const RoundingParams& rounding, const TensorView& counts,
           const TensorView& residual_norm)
      : gram(gram),
        n(n),
        stride(gram_stride(n)),
        by_position(by_position),
        positions(positions),
        indices(static_cast<const int64_t*>(indices.data)),
        weights(static_cast<const double*>(weights.data)),
        width(indices.shape[1]),
        total(rounding.total),
        exchange_passes(rounding.exchange_passes),
        max_multiplicity(rounding.max_multiplicity),
        counts(static_cast<int64_t*>(counts.data)),
        residual_norm(static_cast<double*>(residual_norm.data)) {}

  const double* gram;
  int64_t n, stride;
  bool by_position;
  int64_t positions;
  const int64_t* indices;  // [B, width]
  const double* weights;   // [B, width]
  int64_t width, total, exchange_passes, max_multiplicity;
  int64_t* counts;        // [B, width]
  double* residual_norm;  // [B], of the counts; may be null
};

// round_multiplicities_cuda, which also writes the norm of the residual that the counts leave.
void round_supports(const PoolSpec& pool, const TensorView& query, const TensorView& indices, const TensorView& weights,
                    const RoundingParams& rounding, const TensorView& counts, const TensorView& residual_norm,
                    void* workspace, void* stream);

}  // namespace hullkit
