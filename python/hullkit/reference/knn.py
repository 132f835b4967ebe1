"""Nearest neighbours by inner product."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .lmo import Array, row_dots


def knn(pool: Array, query: Array, k: int) -> tuple[NDArray[np.int64], Array]:
    """The k rows with the largest inner product, largest first (lowest index on a tie)."""
    products = row_dots(pool, query)
    order = np.argsort(-products, kind="stable")[:k]
    return order, products[order]
