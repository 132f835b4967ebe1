# SPDX-License-Identifier: Apache-2.0
"""Sparse convex reconstruction of a query: Frank-Wolfe and its variants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._arrays import takes_arrays
from .._checks import CAP_SLACK, check_choice, check_device, check_int, check_number
from ..native import operators
from ..native.kernels import VARIANTS
from ..reference import batched
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
    """A sparse convex combination of pool rows that comes close to each query.

    Minimises `f(w) = 1/2 ||query - sum_i w_i pool_i||^2` over `w >= 0, sum w = 1`, with exact line
    search, from the row with the largest inner product with the query. With `max_weight < 1` also
    `w_i <= max_weight`: the vertices are then means of `k = ceil(1 / max_weight)` rows. A tie goes
    to the lowest index.
    Equivalent to: `hullkit.reference.frank_wolfe`.

    variant="vanilla" steps towards the row most aligned with the residual. Steps are cheap, and the
        last digits take thousands of them.
    variant="away" may also step away from the worst row in use. Linear convergence; not with a cap.
    variant="pairwise" moves weight from the worst row in use to the best one. Linear convergence.
    variant="fully_corrective" adds the best row, then minimises f over the rows in use exactly. It
        ends at the optimum, up to rounding, after about as many steps as the optimum has rows.

    Args:
        pool: candidate embeddings, one a row: `(n, d)`, shared by a batch, or `(B, n, d)`. float64,
            float32, float16 or bfloat16; strided views are fine. NumPy, CuPy and JAX arrays are
            read where they lie, and results are of their library.
        query: the prompt's embedding `(d,)`, or `(B, d)`; the pool's dtype and device.
        max_support: the most distinct rows that may ever have weight, >= k; None for no limit. 1
            returns the nearest row. A row that lost its weight still counts.
        max_iters: the most steps, >= 0.
        tol: stop when `||query - iterate|| < tol`, >= 0, in the units of the input. "vanilla" also
            stops, with status STALLED, where the step's direction is shorter than 1e-6 in these
            units: scale shorter embeddings up.
        variant: see above.
        gap_tol: stop when the dual gap is at most this, >= 0; None for never.
        max_weight: the largest weight, > 0 and at least 1 / (number of candidates); 1 for no cap.
        lengths: `(B,)` integers, 0-d unbatched: only the first lengths[b] candidates count.
        candidates: `(B, n)` or `(n,)` integers: rows of a shared pool `(M, d)`, -1 = none. Results
            then name positions in `candidates[b]`. Nothing is gathered into a copy, unless
            the pool lies by columns.
        backend: None for the kernels, "reference" for the float64 oracle in NumPy.
    Returns:
        FrankWolfeResult: indices `(B, S)` int64 by falling weight, then -1; weights `(B, S)`
        float64; for each query `(B,)` support_size, num_iters, status (:class:`hullkit.Status`),
        residual_norm `||query - sum_i w_i pool_i||` and dual_gap, a bound on `f(w) - min f`.
        Without B for an unbatched call.
    Raises:
        TypeError, ValueError: the argument, what was expected and what came; also for NaN and Inf,
            and for lengths or candidates out of range. A CUDA call does not wait for values: there
            such an entry gets status BROKEN, indices -1 and NaN certificates instead, and the
            others are right.
        NotImplementedError: the device has no kernels,
            or n > 4096 on CUDA with another variant than "vanilla", gap_tol or max_weight. With one
            of these n candidates and S places also have to fit into the shared memory of a block:
            at worst `22 n + 32 S + 4 / max_weight` bytes and 4 KiB, of 227 KiB on an H100.

    >>> import hullkit, torch
    >>> result = hullkit.frank_wolfe(torch.eye(3), torch.tensor([0.5, 0.5, 0.0]))
    >>> result.indices[:2], result.weights[:2], hullkit.Status(int(result.status)).name
    (tensor([0, 1]), tensor([0.5000, 0.5000], dtype=torch.float64), 'CONVERGED')

    Numerics: everything after the inner products is float64, and both certificates are recomputed
    from the input. Cost: O(n d) for each row touched, O(n) for each step; on CUDA the whole Gram
    matrix, or for n > 4096 one pass over the pool for each step. Source: Jaggi 2013; arXiv
    2605.30337; Wolfe 1976.
    """
    problem = check_pool_query(pool, query, lengths, candidates)
    check_device("frank_wolfe", problem.pool, backend)
    max_weight = check_max_weight(max_weight, problem.positions())
    options, out = frank_wolfe_options(
        problem, max_support, max_iters, tol, gap_tol, variant, max_weight
    )
    run: Callable[..., None] = operators.frank_wolfe if backend is None else batched.frank_wolfe
    run(*problem, *options, *out)
    return out


def check_max_weight(max_weight: float, positions: int) -> float:
    max_weight = check_number("max_weight", max_weight, 0.0)
    if not 0.0 < max_weight <= 1.0:
        raise ValueError(f"max_weight: expected a number in (0, 1], got {max_weight}")
    if max_weight * positions < 1.0 - CAP_SLACK:
        raise ValueError(
            f"max_weight: expected at least 1 / {positions} for {positions} candidates, "
            f"got {max_weight}"
        )
    return max_weight


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
    max_iters = check_int("max_iters", max_iters, 0)
    tol = check_number("tol", tol, 0.0)
    gap_tol = -math.inf if gap_tol is None else check_number("gap_tol", gap_tol, 0.0)
    check_choice("variant", variant, VARIANTS)
    at_start = 1  # rows touched, and by each iteration:
    by_step = 1
    if max_weight < 1.0:
        if variant == "away":
            raise ValueError(
                "variant: expected 'vanilla', 'pairwise' or 'fully_corrective' with a cap on the "
                "weights, got 'away'"
            )
        at_start = math.ceil((1.0 - CAP_SLACK) / max_weight)
        by_step = at_start if variant == "vanilla" else 1
    width = min(problem.positions(), at_start + by_step * max_iters)
    if max_support is None:
        max_support = problem.positions() + 1  # never reached
    else:
        max_support = check_int("max_support", max_support, at_start)
        width = min(width, max_support)
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
