// Frank-Wolfe once the Gram matrices are there; select goes on from the same ones.
#pragma once

#include "hullkit/frank_wolfe.h"

namespace hullkit {

// gram [count, n + 1, gram_stride(n)] of entries first, ..., first + count - 1. Leaves the certificates to
// finish_on_gram.
void frank_wolfe_on_gram(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                         const FrankWolfeResult& result, int64_t first, int64_t count, double* gram, void* stream);

// Does for it what active_set.h describes: everything but the vanilla variant without gap_tol and cap. The factors lie
// behind the Gram matrices (active_set_workspace_bytes).
void active_set_on_gram(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                        const FrankWolfeResult& result, int64_t first, int64_t count, double* gram, void* stream);

}  // namespace hullkit
