# SPDX-License-Identifier: Apache-2.0
"""SIFT: the posterior kernel of everything, conditioned on one observation after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .lmo import Array, row_dots


class SIFTOutcome(NamedTuple):
    """The answer of :func:`sift`.

    Attributes:
        order: `(t,)` int64, the rows in order of choice, repeats included; t <= total.
        variance: `(t,)` float64, the query's variance after each of these steps.

    >>> import numpy as np, hullkit.reference as reference
    >>> reference.sift(np.eye(3), np.array([0.8, 0.6, 0.0]), 3).variance.round(3).tolist()
    [0.366, 0.01, 0.007]
    """

    order: NDArray[np.int64]
    variance: Array


def sift(
    pool: Array,
    query: Array,
    total: int,
    noise: float = 0.01,
    alpha: float | None = None,
    max_multiplicity: int | None = None,
) -> SIFTOutcome:
    """Takes `total` times the row after which the variance of the query is least (lowest index on a
    tie). Stops after step t if sqrt(variance) > 1 / (alpha t).

    Args:
        pool: `(n, d)` float64.
        query: `(d,)` float64, or `(m, d)`: m vectors, whose variances are summed.
        total: the most steps, >= 1.
        noise: the variance of an observation, > 0.
        alpha: > 0; None to take all steps.
        max_multiplicity: how often one row may be taken; None for no limit.
    Returns:
        A SIFTOutcome.
    Raises:
        ValueError: max_multiplicity times n is below total.

    >>> import numpy as np, hullkit.reference as reference
    >>> reference.sift(np.eye(3), np.array([0.8, 0.6, 0.0]), 3).order.tolist()
    [0, 1, 0]
    """
    n = len(pool)
    if max_multiplicity is not None and max_multiplicity * n < total:
        raise ValueError(
            f"max_multiplicity: expected at least total / {n} for total = {total} and {n} "
            f"candidates, got {max_multiplicity}"
        )
    points = np.concatenate([pool, np.atleast_2d(query)])
    kernel = np.stack([row_dots(points, point) for point in points])
    order: list[int] = []
    variance: list[float] = []
    while len(order) < total:
        variances = np.maximum(kernel.diagonal()[:n], 0.0)
        gains = (kernel[n:, :n] ** 2).sum(axis=0) / (variances + noise)
        if max_multiplicity is not None:
            gains[np.bincount(order, minlength=n)[:n] >= max_multiplicity] = -np.inf
        chosen = int(np.argmax(gains))
        column = kernel[:, chosen].copy()
        kernel = kernel - np.outer(column, column) / (variances[chosen] + noise)
        order.append(chosen)
        variance.append(max(float(kernel.diagonal()[n:].sum()), 0.0))
        if alpha is not None and np.sqrt(variance[-1]) > 1.0 / (alpha * len(order)):
            break
    return SIFTOutcome(np.array(order, dtype=np.int64), np.array(variance))
