# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours by inner product."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .lmo import Array, row_dots


def knn(pool: Array, query: Array, k: int) -> tuple[NDArray[np.int64], Array]:
    """The k rows with the largest inner product, largest first (lowest index on a tie).

    Args:
        pool: `(n, d)` float64.
        query: `(d,)` float64.
        k: rows to return, 1 <= k <= n.
    Returns:
        indices `(k,)` int64 and values `(k,)` float64.

    >>> import numpy as np, hullkit.reference as reference
    >>> pool, query = np.eye(3), np.array([0.7, 0.3, 0.0])
    >>> reference.knn(pool, query, 2)[0].tolist()
    [0, 1]
    """
    products = row_dots(pool, query)
    order = np.argsort(-products, kind="stable")[:k]
    return order, products[order]
