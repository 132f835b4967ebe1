// SPDX-License-Identifier: Apache-2.0
// SIFT: greedy choice of the candidates that most reduce the posterior variance of a prompt under a Gaussian process
// with a linear kernel, k(x, y) = <x, y>, and observation noise (Huebotter et al., arXiv 2410.08020). Step by step,
// with k_S the kernel conditioned on the multiset S chosen so far,
//   choose i maximising  sum_j k_S(query_j, pool_i)^2 / (k_S(pool_i, pool_i) + noise),  lowest index on a tie.
// The sum is how much the variance sum_j k_S(query_j, query_j) falls by this choice. A candidate may be chosen again.
#pragma once

#include "hullkit/fields.h"
#include "hullkit/pool_spec.h"

namespace hullkit {

struct SiftParams {
  int64_t total;             // steps, >= 1
  double noise;              // variance of an observation, > 0, in the squared units of the input
  double alpha;              // stop after step t if sqrt(variance) > 1 / (alpha t); 0: never
  int64_t max_multiplicity;  // a candidate is chosen at most so often, >= 1
};
HULLKIT_FIELDS(SiftParams, total, noise, alpha, max_multiplicity)

// S >= min(total, number of valid candidates): every chosen candidate has a place.
struct SiftResult {
  TensorView order;      // [B, total] int64, in order of choice, repeats included; -1 from where it stopped
  TensorView variance;   // [B, total] float64, of the prompt after each step; stays as it is from where it stopped
  TensorView indices;    // [B, S] int64, distinct choices in order of their first; -1 = padding
  TensorView counts;     // [B, S] int64, how often each was chosen; 0 = padding
  TensorView num_steps;  // [B] int64
};
HULLKIT_FIELDS(SiftResult, order, variance, indices, counts, num_steps)

// query [B, d], or [B, m, d]: prompts of m vectors, whose variances add up.
// Fewer than total / max_multiplicity valid candidates are a ValueError, and so are gains beyond float64.
// Numerics: everything is float64. Where rows nearly depend on one another, conditioning magnifies the rounding of
// ||query||^2 by up to max ||row||^2 / noise; so products in float32 would not do. Inner products accumulate in an
// order that depends on d alone. Cost: O(n d) for each candidate chosen: one column of the pool's Gram matrix, computed
// once. Step t costs O(n (m + min(t, n))), and O(n m) if it chooses as the step before. Memory: at most n min(total, n)
// float64 a query, twice that where total > n; and a copy of the rows in float64 where this has at most 32 MiB.
void sift_cpu(const PoolSpec& pool, const TensorView& query, const SiftParams& params, const SiftResult& result,
              int num_threads);

// The same on a GPU, for n + m - 1 <= kMaxOnDevice (common/limits.h); for more the workspace query throws
// NotImplementedError. One launch computes the Gram matrices of all prompts on tensor cores, a second takes their
// steps, a block for each prompt. Products of half-precision rows accumulate in float32 here. An entry that the CPU
// would refuse gets order and indices -1, counts and num_steps 0 and variance NaN. The output is contiguous.
void sift_cuda(const PoolSpec& pool, const TensorView& query, const SiftParams& params, const SiftResult& result,
               void* workspace, void* stream);
int64_t sift_workspace_bytes(const PoolSpec& pool, const TensorView& query, const SiftParams& params);

}  // namespace hullkit
