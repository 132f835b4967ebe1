"""Choosing training sequences for a prompt: LMO, Frank-Wolfe, nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_device, check_int, check_number
from ..native import operators
from ..native.kernels import VARIANTS
from ..reference import batched
from ._arrays import takes_arrays
from ._problem import Problem, check_pool_query
from .results import FrankWolfeResult


class FrankWolfeOptions(NamedTuple):
    """Checked options as the operators take them."""

    max_support: int
    max_iters: int
    tol: float
    gap_tol: float  # -inf: off
    variant: int
    max_weight: float


operators.check_arguments("frank_wolfe", Problem, FrankWolfeOptions, FrankWolfeResult)


@takes_arrays
def frank_wolfe(
    pool: Tensor,
    query: Tensor,
    *,
    max_support: int | None = None,
    max_iters: int = 250,
    tol: float = 1e-5,
    variant: str = "vanilla",
    gap_tol: float | None = None,
    max_weight: float = 1.0,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> FrankWolfeResult:
    """Sparse convex reconstruction of each query from its pool.

    Minimises `f(w) = 1/2 ||query - sum_i w_i pool_i||^2` over the simplex by Frank-Wolfe with exact
    line search, from the vertex with the largest inner product with the query; with
    `max_weight < 1` over the capped simplex `{0 <= w_i <= max_weight, sum w = 1}`, whose vertices
    are means of `k = ceil(1 / max_weight)` rows. All ties go to the lowest index.
    Equivalent to: `hullkit.reference.frank_wolfe`, for every query.

    variant="vanilla": towards the LMO's answer, the vertex with the largest inner product with the
    residual. Each step is cheap; the last digits take thousands of them.
    variant="away": that, or away from the worst vertex in use, whichever promises more; a step as
    long as it can be drops that vertex. Linear convergence. Not with max_weight.
    variant="pairwise": weight from the worst vertex in use to the best one (with max_weight: from
    row to row, the best below its cap). Linear convergence.
    variant="fully_corrective": the best row joins those in use, then f is minimised over these
    exactly (the minimum-norm point, Wolfe 1976; rows at max_weight stay there while that is best).
    Ends at the optimum, up to rounding, after about as many steps as it has vertices.

    Args:
        pool, query, lengths, candidates, backend: as in :func:`lmo`, `query` for `direction`.
        max_support: stop once this many distinct rows were touched, or before a step of k rows
            would touch more; >= k, None for no limit. 1 returns the nearest vertex. A row is
            touched when its weight first may become positive. If it is dropped since it still
            counts (its weight is 0), and to take it up again counts nothing.
        max_iters: >= 0 steps at most.
        tol: stop when `||query - iterate|| < tol`, in the units of the input; >= 0.
        variant: see above.
        gap_tol: stop when the dual gap is at most this, >= 0 (the gap as it is in the loop: that of
            the result is recomputed, and may differ by rounding); None for never.
        max_weight: largest weight, > 0 and at least 1 / (number of valid candidates); 1 for no cap.
    Returns:
        FrankWolfeResult with S = min(max_support, n, max_iters + 1), with max_weight < 1
        min(max_support, n, k + max_iters) or, vanilla, min(max_support, n, k (1 + max_iters)):
        indices `(B, S)` int64: the touched rows by falling weight, then -1;
        weights `(B, S)` float64 >= 0 that sum to 1; support_size `(B,)`: vertices touched;
        residual_norm `(B,)` float64: `||query - sum_i w_i pool_i||`;
        dual_gap `(B,)` float64: `max <gradient, iterate - x>` over all x that the weights allow
            (the pool's rows, or means of k of them), a bound on `f(w) - min f`;
        num_iters `(B,)` int64; status `(B,)` int64, see :class:`Status`.
        Without the leading B for an unbatched call.
    Raises:
        As :func:`lmo`, but a broken entry on a CUDA device gets status BROKEN, indices -1 and NaN
        certificates, as has one with fewer than k candidates; ValueError for options out of range;
        NotImplementedError on CUDA for n > 4096 with another variant, gap_tol or max_weight.

    Numerics: inner products as in :func:`lmo`, everything after them in float64; residual_norm and
    dual_gap are recomputed from the input at the end. float64 input follows the oracle's path, but
    for ties that rounding decides: a pairwise step makes the scores of its two vertices equal, and
    where nothing gains more than rounding, any may be next. Certificates hold on every path.
    Cost: O(n d) for each vertex touched (a column of the pool's Gram matrix, computed once), O(n)
    for each iteration; O(n m + m^2) for a fully corrective one with m vertices in use, O(n k) for a
    capped vanilla one. Memory: at most 4 n S values for each query in flight (one a thread), and
    S^2 / 2 for the fully corrective variant's Cholesky factor, float64 like everything it solves.
    On CUDA with n <= 4096 the whole Gram matrix is computed, on tensor cores, and certificates come
    from it and the weights (the residual_norm of half types, and where it is below 1e-3 ||query||,
    from the input); workspace: 8 (n + 1)^2 bytes a query, in pieces of at most 512 MiB (or one
    query), and 4 S^2 for the fully corrective variant. With more candidates, up to a whole corpus,
    nothing grows with B n: every iteration is one pass over the pool, for up to 16 queries that
    share it without lengths or candidates, else for one; `num_iters + 2` passes in all (of the
    query with the most; one more if it stalled), and `max_iters + 2` launches of them, which end at
    once where no query needs them. Workspace: about 16 (d + S) bytes a query, and at most 16 KiB
    more. There float32 rows meet the residual in float64, so float32 input follows the float64
    oracle's path on the same values; halves meet it rounded to 22 (float16) or 24 bits (bfloat16)
    and sum in float32, so a vertex is the best to within about 2^-21 ||residual|| max ||pool_i||,
    and so is the dual gap. Steps and norms are float64.
    Source: Jaggi 2013; HullFT, arXiv 2605.30337; Lacoste-Julien and Jaggi 2015; Wolfe 1976.
    """
    problem = check_pool_query(pool, query, lengths, candidates)
    check_device("frank_wolfe", problem.pool, backend)
    check_max_weight(max_weight, problem.positions)
    options, out = frank_wolfe_options(
        problem, max_support, max_iters, tol, gap_tol, variant, float(max_weight)
    )
    run: Callable[..., None] = operators.frank_wolfe if backend is None else batched.frank_wolfe
    run(*problem, *options, *out)
    return out


def check_max_weight(max_weight: float, positions: int) -> None:
    check_number("max_weight", max_weight, 0.0)
    if not 0.0 < max_weight <= 1.0:
        raise ValueError(f"max_weight: expected a number in (0, 1], got {max_weight}")
    if max_weight * positions < 1.0 - 1e-12:
        raise ValueError(
            f"max_weight: expected at least 1 / {positions} for {positions} candidates, "
            f"got {max_weight}"
        )


def frank_wolfe_options(
    problem: Problem,
    max_support: int | None,
    max_iters: int,
    tol: float,
    gap_tol: float | None,
    variant: str,
    max_weight: float,
) -> tuple[FrankWolfeOptions, FrankWolfeResult]:
    """Checked options, and the outputs to fill."""
    check_int("max_iters", max_iters, 0)
    tol = check_number("tol", tol, 0.0)
    gap_tol = -math.inf if gap_tol is None else check_number("gap_tol", gap_tol, 0.0)
    check_choice("variant", variant, tuple(VARIANTS))
    at_start = 1  # rows touched, and by each iteration:
    by_step = 1
    if max_weight < 1.0:
        if variant == "away":
            raise ValueError(
                "variant: expected 'vanilla', 'pairwise' or 'fully_corrective' with a cap on the "
                "weights, got 'away'"
            )
        at_start = math.ceil((1.0 - 1e-12) / max_weight)
        by_step = at_start if variant == "vanilla" else 1
    width = min(problem.positions, at_start + by_step * max_iters)
    if max_support is None:
        max_support = problem.positions + 1  # never reached
    else:
        width = min(width, check_int("max_support", max_support, at_start))
    indices = problem.empty(torch.int64, width)
    count = problem.empty(torch.int64)
    length = torch.empty_like(count, dtype=torch.float64)
    out = FrankWolfeResult(  # empty_like: half the cost of empty or less, and there are seven
        indices=indices,
        weights=torch.empty_like(indices, dtype=torch.float64),
        support_size=count,
        residual_norm=length,
        dual_gap=torch.empty_like(length),
        num_iters=torch.empty_like(count),
        status=torch.empty_like(count),
    )
    options = FrankWolfeOptions(
        max_support=max_support,
        max_iters=max_iters,
        tol=tol,
        gap_tol=gap_tol,
        variant=VARIANTS[variant],
        max_weight=max_weight,
    )
    return options, out
