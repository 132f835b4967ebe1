// SPDX-License-Identifier: Apache-2.0
// Frank-Wolfe for the sparse convex reconstruction of a query:
//   minimise f(w) = 1/2 ||query - sum_i w_i pool_i||^2 over the probability simplex, exact line search,
// or over the capped simplex {0 <= w_i <= max_weight, sum w = 1}.
// See Jaggi 2013 for the method; HullFT (arXiv 2605.30337) for its use here; Lacoste-Julien and Jaggi 2015 for the
// variants that keep an active set; Wolfe 1976 for the fully corrective one, the minimum-norm point.
#pragma once

#include "hullkit/fields.h"
#include "hullkit/pool_spec.h"

namespace hullkit {

enum class Status : int64_t {
  kConverged = 0,   // ||query - iterate|| < tol
  kMaxSupport = 1,  // max_support distinct vertices touched, or a capped vanilla step would touch more
  kMaxIters = 2,    // max_iters steps taken
  kStalled = 3,  // no step improves the iterate: the LMO answered the iterate itself (||vertex - iterate||^2 < 1e-12)
                 // or, for the variants with an active set, nothing gains more than rounding
  kBroken = 4,   // CUDA only, where nobody can raise: NaN or Inf, no candidate or fewer than 1 / max_weight, lengths
                 // or candidates out of range
  kGapTol = 5,   // dual gap <= gap_tol
};

enum class Variant : int64_t {
  kVanilla = 0,          // a step goes towards the LMO's answer
  kAway = 1,             // a step goes there, or away from the worst vertex of the active set; not with a cap
  kPairwise = 2,         // a step moves weight from the worst vertex of the active set to the best one below its cap
  kFullyCorrective = 3,  // the best vertex joins the active set, over which f is then minimised exactly
};

inline constexpr double kStalledSquaredNorm = 1e-12;

// A vertex is touched when its weight first may become positive, and it stays touched if its weight falls back to 0.
// max_support counts it once, the result lists it, and taking it up again counts for nothing.
struct FrankWolfeParams {
  int64_t max_support;  // >= 1, >= 1 / max_weight; 1 returns the nearest vertex
  int64_t max_iters;    // >= 0
  double tol;           // on ||query - iterate||, in the units of the input
  double gap_tol;       // on the dual gap, in the input's units squared; negative: off
  Variant variant;
  double max_weight;  // > 0; >= 1: no cap
};
HULLKIT_FIELDS(FrankWolfeParams, max_support, max_iters, tol, gap_tol, variant, max_weight)

// Every touched vertex needs a place: S >= min(max_support, number of valid candidates, 1 + max_iters). With a cap,
// k = ceil(1 / max_weight) vertices are touched at the start instead of 1, and up to k by a vanilla step.
struct FrankWolfeResult {
  TensorView indices;        // [B, S] int64, by falling weight (lowest index on a tie), -1 = padding
  TensorView weights;        // [B, S] float64, 0 = padding
  TensorView support_size;   // [B] int64, vertices touched, weight 0 included
  TensorView residual_norm;  // [B] float64, ||query - iterate||
  TensorView dual_gap;       // [B] float64, max <gradient, iterate - x> over all x that weights allow, >= f(w) - f*
  TensorView num_iters;      // [B] int64, steps taken
  TensorView status;         // [B] int64
};
HULLKIT_FIELDS(FrankWolfeResult, indices, weights, support_size, residual_norm, dual_gap, num_iters, status)

// Numerics: inner products accumulate in float32 (float64 for float64 input) in an order that depends on
// d alone; everything after them (weights, step sizes, scores) is float64. Residual and gap are recomputed
// from the input at the end, so they certify the weights returned, not the recurrence that led there.
// Cost: O(n d) for each vertex touched. An iteration takes O(n), with a cap O(n k), and a fully corrective one with m
// vertices in its active set O(n m + m^2). Memory: at most 4 n S values a query,
// where S counts touched vertices, and m^2 for the fully corrective factor.
// The fully corrective variant updates a float64 Cholesky factor of its active set's Gram matrix as vertices come and
// go. Vertices that nearly depend on each other (to 2e-14 of their squared norms for float64, else 1e-6) take more than
// one iteration.
void frank_wolfe_cpu(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                     const FrankWolfeResult& result, int num_threads);

// The same on a GPU; the output is contiguous. Two ways, chosen by choose_solver.h:
//
// Up to kMaxOnDevice candidates (common/limits.h): one launch computes the Gram matrices of all prompts on tensor cores
// (products and sums in float64, in float32 for half-precision input), a second runs their loops. Certificates are
// recomputed from the weights and the Gram matrix. The residual of half-precision input, and a residual below 1e-3 of
// the query's length, is recomputed from the input itself.
// Workspace: (n + 1)^2 float64 an entry, at most 512 MiB or one entry at a time. Variant::kFullyCorrective adds
// S (S + 1) / 2 float64 for each of these. The variants with an active set, a cap and gap_tol keep weights, scores and
// lists in the shared memory of a block: 22 n + 4 S bytes, for Variant::kFullyCorrective 22 n + 32 S, for a capped
// kVanilla 30 n + 4 S, and 4 / max_weight + 4 KiB. More than the device has for a block (227 KiB on an H100) is a
// NotImplementedError from the workspace query.
//
// More candidates, for the vanilla variant without gap_tol and cap: no Gram matrix. Every iteration is one pass over
// the pool for up to 16 prompts that share it without lengths or candidates, else for one prompt. max_iters + 2 passes
// are launched; a pass that none of its prompts needs ends at once. float64 and float32 rows are multiplied with the
// float64 residual in float64. Half-precision rows are multiplied with the residual rounded to 22 (float16) or 24 bits
// (bfloat16), in float32. So a vertex is best to within 2^-21 (2^-23) ||residual|| max_i ||pool_i||, and the rounding
// of the sum. Steps, stopping tests, weights and the residual norm are float64 in every case. Workspace: 16 (d + S)
// bytes an entry, and 16 KiB for parts of the LMO's answer; nothing grows with B n.
//
// More candidates than that with another variant, gap_tol or cap: NotImplementedError from the workspace query.
void frank_wolfe_cuda(const PoolSpec& pool, const TensorView& query, const FrankWolfeParams& params,
                      const FrankWolfeResult& result, void* workspace, void* stream);
int64_t frank_wolfe_workspace_bytes(const PoolSpec& pool, const FrankWolfeParams& params,
                                    const FrankWolfeResult& result);

}  // namespace hullkit
