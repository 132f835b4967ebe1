# SPDX-License-Identifier: Apache-2.0
"""Convex weights to integer counts, the reconstruction formed anew for every candidate move."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .apportion import quotas
from .lmo import Array


def round_multiplicities(
    support: Array,
    query: Array,
    weights: Array,
    total: int,
    exchange_passes: int = 2,
    max_multiplicity: int | None = None,
) -> NDArray[np.int64]:
    """Counts c >= 0 with sum c = total and small L(c) = ||query - (c / total) @ support||^2.

    Floors of the quotas; then units where L becomes smallest (lowest index on a tie), of many left
    a share of 1 / (16 len(support)) at once; then passes that move a unit from i to j, in index
    order, if that lowers L by more than 1e-14. Rows with units as a pass begins may give in it, as
    long as they have some; a row that gets its first unit in a pass may give in the next.

    Args:
        support: `(m, d)` float64, the rows that have weight.
        query: `(d,)` float64.
        weights: `(m,)` float64.
        total: units to spread, >= 1.
        exchange_passes: the most passes, >= 0.
        max_multiplicity: the largest count, at least total / m; None for no limit.
    Returns:
        counts `(m,)` int64 with sum total.

    >>> import numpy as np, hullkit.reference as reference
    >>> pool, query = np.eye(3), np.array([0.7, 0.3, 0.0])
    >>> reference.round_multiplicities(pool[:2], query, np.array([0.7, 0.3]), 10).tolist()
    [7, 3]
    """
    most = total if max_multiplicity is None else max_multiplicity

    def loss(counts: NDArray[np.int64]) -> float:
        """total^2 L(c): shares would be rounded, so that ties in exact data broke at random."""
        difference = total * query - counts @ support
        return float(difference @ difference)

    def moved(
        counts: NDArray[np.int64], source: int | None, target: int, units: int = 1
    ) -> NDArray[np.int64]:
        counts = counts.copy()
        if source is not None:
            counts[source] -= units
        counts[target] += units
        return counts

    size = len(support)
    # Weights at a cap are whole quotas, but for rounding.
    slack = 1 + 1e-13 if most < total else 1.0
    counts = np.minimum(np.floor(quotas(weights, total) * slack).astype(np.int64), most)
    while (remaining := total - int(counts.sum())) > 0:
        units = max(1, remaining // (16 * size))
        room = counts <= most - units
        losses = [loss(moved(counts, None, i, units)) if room[i] else np.inf for i in range(size)]
        counts = moved(counts, None, int(np.argmin(losses)), units)
    for _ in range(exchange_passes):
        current = loss(counts)
        any_moved = False
        for i in np.flatnonzero(counts > 0).tolist():
            for j in range(size):
                # The published procedure does not ask for counts[i] > 0 here, and can go negative.
                if j == i or counts[i] == 0 or counts[j] == most:
                    continue
                candidate = moved(counts, i, j)
                candidate_loss = loss(candidate)
                if candidate_loss + 1e-14 * total**2 < current:
                    counts, current, any_moved = candidate, candidate_loss, True
        if not any_moved:
            break
    return counts
