// Frank-Wolfe for the sparse convex reconstruction of a query:
//   minimise f(w) = 1/2 ||query - sum_i w_i pool_i||^2 over the probability simplex, exact line search.
// See Jaggi 2013 for the method; HullFT (arXiv 2605.30337) for its use here.
#pragma once

#include "hullkit/pool_spec.h"

namespace hullkit {

enum class Status : int64_t {
  kConverged = 0,   // ||query - iterate|| < tol
  kMaxSupport = 1,  // max_support distinct vertices touched
  kMaxIters = 2,    // max_iters steps taken
  kStalled = 3,     // the LMO answered the iterate itself: ||vertex - iterate||^2 < 1e-12
  kBroken = 4,      // CUDA only, where nobody can raise: NaN or Inf, no candidate, lengths or candidates out of range
};

inline constexpr double kStalledSquaredNorm = 1e-12;

struct FrankWolfeParams {
  int64_t max_support;  // >= 1; 1 returns the nearest vertex
  int64_t max_iters;    // >= 0
  double tol;           // on ||query - iterate||, in the units of the input
};

// S >= min(max_support, max_iters + 1, number of valid candidates): every touched vertex has a place.
struct FrankWolfeResult {
  TensorView indices;        // [B, S] int64, by falling weight (lowest index on a tie), -1 = padding
  TensorView weights;        // [B, S] float64, 0 = padding
  TensorView support_size;   // [B] int64, vertices touched, weight 0 included
  TensorView residual_norm;  // [B] float64, ||query - iterate||
  TensorView dual_gap;       // [B] float64, max_i <gradient, iterate - pool_i> >= f(w) - f*
  TensorView num_iters;      // [B] int64, steps taken
  TensorView status;         // [B] int64
};

// Numerics: inner products accumulate in float32 (float64 for float64 input) in an order that depends on
// d alone; everything after them (weights, step sizes, scores) is float64. Residual and gap are recomputed
// from the input at the end, so they certify the weights returned, not the recurrence that led there.
// Cost: O(n d) for each vertex touched, O(n) for each iteration. Memory: at most 4 n S values a query.
void frank_wolfe_cpu(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                     const FrankWolfeResult& result, int num_threads);

// The same on a GPU, for up to 4096 candidates: the Gram matrices of all prompts in one launch on tensor cores
// (products and sums in float64, in float32 for half-precision input), their loops in a second. Residuals are
// recomputed from the input, dual gaps from the Gram matrix. workspace: gram_workspace_bytes; the output is contiguous.
void frank_wolfe_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                      const FrankWolfeResult& result, void* workspace, void* stream);
int64_t gram_workspace_bytes(int64_t batch, int64_t positions);  // (n + 1)^2 float64 an entry, at most 512 MiB or one

}  // namespace hullkit
