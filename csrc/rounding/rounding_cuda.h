// Rounding once the products are there: of a support alone, or of a whole pool it was chosen from.
#pragma once

#include "hullkit/pool_spec.h"

namespace hullkit {

// gram [count, n + 1, gram_stride(n)] of entries first, ..., the query last. by_position: n counts the candidates of a
// prompt, and point s of a support is candidate indices[b, s]; else it is candidate s. Indices are less than
// `positions`.
void round_on_gram(const double* gram, int64_t n, bool by_position, int64_t positions, const TensorView& indices,
                   const TensorView& weights, int64_t total, int64_t exchange_passes, const TensorView& counts,
                   int64_t first, int64_t count, void* stream);

}  // namespace hullkit
