// SPDX-License-Identifier: Apache-2.0
// Candidates that are nearly the same vertex. In index order, candidate i joins the first representative r with
//   <x_r, x_i> > (1 - eps) ||x_r|| ||x_i||
// or becomes a representative itself. So every member is close to its representative. Two members may be at twice that
// angle from each other, but no chain of neighbours joins distant vertices. Lengths are not compared.
#pragma once

#include "hullkit/pool_spec.h"

namespace hullkit {

// Rounding of two norms and two products is below it, so that a row's product with its equal exceeds the bound.
inline constexpr double kLeastEps = 0x1p-50;

// 0 < eps <= 2; one below kLeastEps counts as kLeastEps. representatives [B, n] int64: a position, at most the
// candidate's own; -1 for no candidate. Numerics: products as in lmo.h, the comparison in float64. Equal rows have
// equal products, so they are duplicates for every eps; rows whose squared norm is 0 have none. Cost: O(n r d) for r
// representatives, and memory of a few numbers for each row.
void duplicates_cpu(const PoolSpec& pool, double eps, const TensorView& representatives, int num_threads);

// The same on a GPU, for up to kMaxOnDevice candidates (common/limits.h), from their Gram matrix; for more the
// workspace query throws NotImplementedError. An entry with NaN or Inf, or with lengths or candidates out of range,
// gets -1 everywhere. Workspace: (n + 1)^2 float64 an entry, at most 512 MiB or one entry at a time.
void duplicates_cuda(const PoolSpec& pool, double eps, const TensorView& representatives, void* workspace,
                     void* stream);
int64_t duplicates_workspace_bytes(const PoolSpec& pool);

}  // namespace hullkit
