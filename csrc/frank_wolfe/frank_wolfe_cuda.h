// Frank-Wolfe once the Gram matrices are there; select goes on from the same ones.
#pragma once

#include "hullkit/frank_wolfe.h"

namespace hullkit {

// gram [count, n + 1, gram_stride(n)] of entries first, ..., first + count - 1. Leaves the certificates to
// certify_on_gram.
void frank_wolfe_on_gram(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                         const FrankWolfeResult& result, int64_t first, int64_t count, const double* gram,
                         void* stream);

void certify_on_gram(const PoolSpec& pool, const TensorView& query, const FrankWolfeResult& result, int64_t first,
                     int64_t count, const double* gram, void* stream);

}  // namespace hullkit
