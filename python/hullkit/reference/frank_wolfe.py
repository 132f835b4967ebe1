# SPDX-License-Identifier: Apache-2.0
"""Frank-Wolfe over the hull of a pool, all products formed anew each iteration."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .active_set import active_set
from .lmo import Array, lmo, row_dots


class FrankWolfeOutcome(NamedTuple):
    """The answer of :func:`frank_wolfe`.

    Attributes:
        indices: `(m,)` int64, the touched vertices by falling weight (lowest index on a tie).
        weights: `(m,)` float64, with sum 1.
        residual_norm: the length of `query - weights @ pool[indices]`.
        dual_gap: an upper bound on how far the objective is from its minimum.
        num_iters: steps taken.
        status: the name of a :class:`hullkit.Status`.

    >>> import numpy as np, hullkit.reference as reference
    >>> reference.frank_wolfe(np.eye(2), np.array([1.0, 0.0])).status
    'CONVERGED'
    """

    indices: NDArray[np.int64]
    weights: Array
    residual_norm: float
    dual_gap: float
    num_iters: int
    status: str


def frank_wolfe(
    pool: Array,
    query: Array,
    max_support: int | None = None,
    max_iters: int = 250,
    tol: float = 1e-5,
    gap_tol: float | None = None,
    variant: str = "vanilla",
    max_weight: float = 1.0,
) -> FrankWolfeOutcome:
    """Minimises 1/2 ||query - w @ pool||^2 over the simplex with exact line search.

    Stops when the residual norm falls below tol, when max_support distinct vertices were touched,
    after max_iters steps, when the dual gap is at most gap_tol, or when the LMO answers the iterate
    itself. The other variants, and weights of at most max_weight, are active_set's.

    Args:
        pool: `(n, d)` float64.
        query: `(d,)` float64.
        max_support, max_iters, tol, gap_tol, variant, max_weight: as in
            :func:`hullkit.frank_wolfe`.
    Returns:
        A FrankWolfeOutcome.

    >>> import numpy as np, hullkit.reference as reference
    >>> pool, query = np.eye(3), np.array([0.7, 0.3, 0.0])
    >>> outcome = reference.frank_wolfe(pool, query)
    >>> outcome.indices.tolist(), outcome.weights.round(3).tolist()
    ([0, 1], [0.7, 0.3])
    """
    options = (max_support, max_iters, tol, -np.inf if gap_tol is None else gap_tol)
    if variant != "vanilla" or max_weight < 1.0:
        return FrankWolfeOutcome(*active_set(pool, query, *options, variant, max_weight))
    first, _ = lmo(pool, -query)
    weights = np.zeros(len(pool))
    weights[first] = 1.0
    iterate = pool[first].copy()
    touched = {first}
    num_iters = 0
    status = "MAX_SUPPORT" if max_support == 1 else "MAX_ITERS"
    while status == "MAX_ITERS" and num_iters < max_iters:
        residual = query - iterate
        if np.linalg.norm(residual) < tol:
            status = "CONVERGED"
            break
        vertex, _ = lmo(pool, -residual)
        direction = pool[vertex] - iterate
        if residual @ direction <= options[-1]:
            status = "GAP_TOL"
            break
        length_squared = direction @ direction
        if length_squared < 1e-12:
            status = "STALLED"
            break
        step = min(max(residual @ direction / length_squared, 0.0), 1.0)
        weights *= 1.0 - step
        weights[vertex] += step
        iterate = iterate + step * direction
        touched.add(vertex)
        num_iters += 1
        if len(touched) == max_support:
            status = "MAX_SUPPORT"
    indices = np.array(sorted(touched))
    indices = indices[np.argsort(-weights[indices], kind="stable")]
    residual = query - weights[indices] @ pool[indices]
    gap = row_dots(pool, residual).max() - residual @ (query - residual)
    return FrankWolfeOutcome(
        indices, weights[indices], float(np.linalg.norm(residual)), float(gap), num_iters, status
    )
