"""Greedy choice of training sequences under a Gaussian process: SIFT."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_cap, check_device, check_positive, check_total
from ..native import operators
from ..reference import batched
from ._arrays import takes_arrays
from ._problem import Problem, check_pool_query
from .results import SIFTResult


class SIFTOptions(NamedTuple):
    """Checked options as the operator takes them."""

    total: int
    noise: float
    alpha: float  # 0: never stop before `total`
    max_multiplicity: int


operators.check_arguments("sift", Problem, SIFTOptions, SIFTResult)


@takes_arrays
def sift(
    pool: Tensor,
    query: Tensor,
    total: int,
    *,
    noise: float = 0.01,
    alpha: float | None = None,
    max_multiplicity: int | None = None,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> SIFTResult:
    """The greedy choice of what tells most about each query (SIFT).

    Under a Gaussian process with kernel `k(x, y) = <x, y>` and observation noise: with k_S the
    kernel conditioned on the multiset S chosen so far, each step adds the row that maximises
    `k_S(query, pool_i)^2 / (k_S(pool_i, pool_i) + noise)`, which is by how much the query's
    variance `k_S(query, query)` falls. A row may be chosen again; ties go to the lowest index.
    Equivalent to: `hullkit.reference.sift`, for every query.

    Args:
        pool, lengths, candidates, backend: as in :func:`lmo`.
        query: `(d,)` or `(B, d)`; or `(B, m, d)`, prompts of m vectors each, whose gains and
            variances are sums over the vectors (a vector of zeros counts for nothing; one such
            prompt is `vectors[None]`; for their mean pass `query.mean(1)`).
        total: steps to take, >= 1.
        noise: variance of an observation, > 0, in the squared units of the input.
        alpha: stop after step t if `sqrt(variance) > 1 / (alpha t)`: where more updates would not
            help, judged by what is uncertain still. > 0, None to take all steps.
        max_multiplicity: how often a row may be chosen, >= 1; None for no limit.
    Returns:
        SIFTResult with S = min(total, n):
        order `(B, total)` int64: the rows in order of choice, then -1 where alpha stopped it;
        variance `(B, total)` float64: the query's after each step, then the last one;
        indices, counts `(B, S)` int64: the distinct rows in order of their first choice, and how
        often each was chosen, then -1 and 0; num_steps `(B,)` int64.
        Without the leading B for an unbatched call.
    Raises:
        As :func:`lmo`, but a broken entry on a CUDA device gets order and indices -1, counts and
        num_steps 0 and variance NaN; ValueError for options out of range, and for a
        max_multiplicity that total exceeds with all candidates chosen so often.
        NotImplementedError: more than 4096 candidates on a CUDA device.

    Numerics: inner products as in :func:`lmo`, everything after them in float64; a variance is
    right to within the rounding of `||query||^2`. float64 input follows the oracle's choices.
    Cost: O(n d) for each distinct choice (a column of the pool's Gram matrix, computed once);
    O(n (m + min(t, n))) for step t, O(n m) where it repeats the one before. Memory: at most
    2 n min(total, 2 n) values for each query in flight (one a thread). On CUDA the whole Gram
    matrix is computed, on tensor cores; workspace: 8 (n + m) (n + m + min(total, 64)) bytes a
    query, in pieces of at most 512 MiB (or one query).
    Source: Huebotter et al., arXiv 2410.08020.
    """
    problem = check_pool_query(pool, query, lengths, candidates, several=True)
    check_device("sift", problem.pool, backend)
    check_total(total)
    noise = check_positive("noise", noise)
    alpha = 0.0 if alpha is None else check_positive("alpha", alpha)  # 1 / (0 t): never
    cap = check_cap(max_multiplicity, problem.positions, total)
    order = problem.empty(torch.int64, total)
    indices = problem.empty(torch.int64, min(total, problem.positions))
    out = SIFTResult(
        order=order,
        variance=torch.empty_like(order, dtype=torch.float64),
        indices=indices,
        counts=torch.empty_like(indices),
        num_steps=problem.empty(torch.int64),
    )
    run = operators.sift if backend is None else batched.sift
    run(*problem, *SIFTOptions(total, noise, alpha, cap), *out)
    return out
