# SPDX-License-Identifier: Apache-2.0
"""From convex weights to integer counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._arrays import takes_arrays
from .._checks import (
    check_cap,
    check_device,
    check_floating,
    check_int,
    check_integers,
    check_total,
)
from ..native import operators
from ..reference import batched
from ._problem import check_pool_query
from .apportion import as_float64

if TYPE_CHECKING:
    from .results import FrankWolfeResult


class RoundingOptions(NamedTuple):
    """Checked options as the operators take them."""

    total: int
    exchange_passes: int
    max_multiplicity: int


operators.check_arguments(
    "round_multiplicities",
    *("pool", "query", "indices", "weights", "candidates"),
    RoundingOptions,
    "counts",
)


@takes_arrays
def round_multiplicities(
    pool: Tensor,
    query: Tensor,
    result: FrankWolfeResult,
    total: int,
    *,
    exchange_passes: int = 2,
    max_multiplicity: int | None = None,
    candidates: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Integer counts that reconstruct the query about as well as convex weights do.

    Finds `c >= 0` with `sum c = total` and small `L(c) = ||query - sum_i (c_i / total) s_i||^2`,
    where s_i are the rows in `result`. It starts from the floors of `total * w_i / sum w`, adds
    single units greedily until the sum is reached, and then makes `exchange_passes` passes that
    move single units where L falls by more than 1e-14. Only rows with units as a pass begins give
    in it. A tie goes to the lowest index. Where a cap leaves 32 m units or more to be added for m
    rows, 1 / (16 m) of them are added at once.
    Equivalent to: `hullkit.reference.round_multiplicities`.

    Args:
        pool, query, candidates, backend: as in the call of :func:`hullkit.frank_wolfe` that made
            `result`: pool `(n, d)` or `(B, n, d)`, query `(d,)` or `(B, d)`.
        result: a FrankWolfeResult, or anything with `indices (B, S)` (-1 = padding, at the end) and
            `weights (B, S)`. Negative weights count as 0; if all are 0 they count as uniform.
        total: the sum of the counts, 1 <= total <= 2**40.
        exchange_passes: >= 0.
        max_multiplicity: the largest count, >= 1 and at least total / (number of rows); None for
            none.
    Returns:
        counts `(B, S)` int64, aligned with `result.indices`, 0 for padding; `(S,)` for an unbatched
        call.
    Raises:
        TypeError, ValueError: the argument, what was expected and what came; also for NaN and Inf,
            for candidates or indices of the result out of range, and for -1 before one of them. A
            CUDA call does not wait for values: there such an entry gets counts of -1 instead (0
            where its support is padding alone), and the others are right.
        NotImplementedError: the device has no kernels, or S > 4096 on CUDA.

    >>> import hullkit, torch
    >>> pool, query = torch.eye(3), torch.tensor([0.7, 0.3, 0.0])
    >>> hullkit.round_multiplicities(pool, query, hullkit.frank_wolfe(pool, query), 10)[:2]
    tensor([7, 3])

    Numerics: the Gram matrix of the rows as in :func:`hullkit.lmo`, everything after it in float64.
    Cost: O(m^2 d) for m rows, O(m) for a greedy unit or block of units, O(m^2) for an
    exchange pass.
    Source: HullFT, arXiv 2605.30337, without its negative counts.
    """
    problem = check_pool_query(pool, query, None, candidates)
    check_device("round_multiplicities", problem.pool, backend)
    total = check_total(total)
    exchange_passes = check_int("exchange_passes", exchange_passes, 0)
    leading = problem.query.shape[:-1]
    for field in ("indices", "weights"):
        if not hasattr(result, field):
            raise TypeError(
                f"result: expected a FrankWolfeResult, got {type(result).__name__} without {field}"
            )
    weights = check_floating("result.weights", result.weights)
    shape = weights.shape
    if shape[:-1] != leading or len(shape) != len(leading) + 1 or shape[-1] == 0:
        raise ValueError(
            f"result.weights: expected shape {(*leading, 'S')} with S >= 1, got {tuple(shape)}"
        )
    most = problem.positions() - 1
    indices = check_integers("result.indices", result.indices, tuple(shape), pool, most)
    if weights.device != pool.device:
        raise ValueError(
            f"result.weights: expected the pool's device {pool.device}, got {weights.device}"
        )
    cap = check_cap(max_multiplicity, shape[-1], total, "support points")
    counts = problem.empty(torch.int64, shape[-1])
    run = operators.round_multiplicities if backend is None else batched.round_multiplicities
    run(
        problem.pool,
        problem.query,
        indices.contiguous(),
        as_float64(weights),
        problem.candidates,
        *RoundingOptions(total, exchange_passes, cap),
        counts,
    )
    return counts
