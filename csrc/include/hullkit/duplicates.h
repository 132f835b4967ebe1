// Candidates that are nearly the same vertex. In index order each one either joins the first representative r with
//   <x_r, x_i> > (1 - eps) ||x_r|| ||x_i||
// or becomes a representative itself. So every member is that close to its representative, members may be at twice the
// angle from each other, and no chain of neighbours joins what is far apart. Lengths are not compared.
#pragma once

#include "hullkit/pool_spec.h"

namespace hullkit {

// 0 < eps <= 2. representatives [B, n] int64: a position, at most the candidate's own; -1 for what is no candidate.
// Numerics: products as in lmo.h, the comparison in float64. Equal rows have equal products, so they are duplicates for
// every eps; rows of length 0 have none. Cost: O(n r d) for r representatives.
void duplicates_cpu(const PoolSpec& pool, double eps, const TensorView& representatives, int num_threads);

// The same on a GPU, for up to 4096 candidates, from their Gram matrix; an entry with NaN or Inf, or with lengths or
// candidates out of range, gets -1 everywhere. workspace: gram_workspace_bytes.
void duplicates_cuda(const PoolSpec& pool, double eps, const TensorView& representatives, void* workspace,
                     void* stream);
int64_t duplicates_workspace_bytes(const PoolSpec& pool);

}  // namespace hullkit
