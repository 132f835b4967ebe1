// SPDX-License-Identifier: Apache-2.0
// Gram matrices of a batch: where Frank-Wolfe and rounding on the GPU get their products from.
#pragma once

#include <cstdint>

#include "cuda/primitives/pieces.h"
#include "hullkit/pool_spec.h"

namespace hullkit {

// Products from one row of a Gram matrix to the next: n candidates and, last, the query; rows start where memory
// transactions of 32 bytes do.
inline int64_t gram_stride(int64_t n) { return (n + 4) / 4 * 4; }
inline int64_t gram_bytes_of_one(int64_t n) { return (n + 1) * gram_stride(n) * static_cast<int64_t>(sizeof(double)); }

// Entries that are done at a time, and the memory for their matrices.
inline int64_t gram_batch(int64_t batch, int64_t n) { return entries_of_piece(batch, gram_bytes_of_one(n)); }
inline int64_t gram_workspace_bytes(int64_t batch, int64_t n) { return gram_batch(batch, n) * gram_bytes_of_one(n); }

// gram [count, n + 1, gram_stride(n)] of entries first, ..., first + count - 1; the row of a missing candidate is 0.
// `support` [B, S], optional: its positions are the candidates, n = S. query [B, m, d]: the last m rows are its
// vectors', and all but one of them count as candidates do.
void gram_cuda(const PoolSpec& pool, const TensorView& query, const TensorView& support, int64_t first, int64_t count,
               double* gram, void* stream);

}  // namespace hullkit
