# SPDX-License-Identifier: Apache-2.0
"""Largest-remainder apportionment."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .lmo import Array


def quotas(weights: Array, total: int) -> Array:
    """total * w_i / sum w, `(m,)` float64; negative weights count as 0, all zero as uniform.

    >>> import numpy as np, hullkit.reference as reference
    >>> reference.quotas(np.array([0.5, 0.5]), 4).tolist()
    [2.0, 2.0]
    """
    weights = np.maximum(weights, 0.0)
    # Left to right, as the kernels sum: one last bit decides the floor of a whole quota.
    weight_sum = np.cumsum(weights)[-1]
    shares = weights / weight_sum if weight_sum > 0 else np.full(len(weights), 1 / len(weights))
    return total * shares


def apportion(weights: Array, total: int) -> NDArray[np.int64]:
    """Floors of the quotas, then one more for the largest remainders (lowest index on a tie).

    Args:
        weights: `(m,)` float64; negative ones count as 0, all zero as uniform.
        total: units to spread, >= 1.
    Returns:
        counts `(m,)` int64 with sum total.

    >>> import numpy as np, hullkit.reference as reference
    >>> reference.apportion(np.array([0.5, 0.3, 0.2]), 4).tolist()
    [2, 1, 1]
    """
    quota = quotas(weights, total)
    counts = np.floor(quota).astype(np.int64)
    order = np.argsort(-(quota - counts), kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts
