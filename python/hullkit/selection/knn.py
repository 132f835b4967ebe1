"""Nearest rows by inner product."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_device, check_int
from ..native import operators
from ..reference import batched
from ._arrays import takes_arrays
from ._problem import Problem, check_pool_query
from .results import KNNResult

operators.check_arguments("knn", Problem, KNNResult)


@takes_arrays
def knn(
    pool: Tensor,
    query: Tensor,
    k: int,
    *,
    lengths: Tensor | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> KNNResult:
    """The k pool rows with the largest inner product with each query.

    Equivalent to: `(pool @ query).topk(k)`, with the lowest index on a tie.

    Args:
        pool, query, lengths, candidates, backend: as in :func:`lmo`, `query` for `direction`.
        k: 1 <= k <= n.
    Returns:
        KNNResult(indices `(B, k)` int64, values `(B, k)` float64), largest first; where a query has
        fewer than k valid candidates, indices end in -1 and values in -inf.
    Raises:
        As :func:`lmo`; ValueError for k outside 1..n.

    Numerics and broken entries as in :func:`lmo`.
    Cost: B n d multiply-adds and a partial sort of n. On CUDA k <= 2048 for n > 4096; workspace: 16
        bytes for each candidate of a query, and k / 4096 of that, in pieces of at most 512 MiB (or
        16 queries).
    """
    problem = check_pool_query(pool, query, lengths, candidates)
    check_device("knn", problem.pool, backend)
    check_int("k", k, 1, problem.positions)
    out = KNNResult(problem.empty(torch.int64, k), problem.empty(torch.float64, k))
    run = operators.knn if backend is None else batched.knn
    run(*problem, *out)
    return out
