# SPDX-License-Identifier: Apache-2.0
"""Candidates that are nearly the same vertex."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .lmo import Array, row_dots

LEAST_EPS = 2.0**-50  # rounding of two norms and two products is below it


def duplicates(pool: Array, eps: float) -> NDArray[np.int64]:
    """representative[i]: the first representative whose cosine with i exceeds 1 - eps, else i.

    An eps below `LEAST_EPS` counts as that: equal rows are near copies for every eps.

    Args:
        pool: `(n, d)` float64.
        eps: in units of cosine, 0 < eps <= 2.
    Returns:
        representatives `(n,)` int64.

    >>> import numpy as np, hullkit.reference as reference
    >>> reference.duplicates(np.ones((3, 2)), eps=0.1).tolist()
    [0, 0, 0]
    """
    eps = max(eps, LEAST_EPS)
    squares = np.array([row_dots(row[None], row)[0] for row in pool])
    representatives: list[int] = []
    out = np.empty(len(pool), np.int64)
    for i, row in enumerate(pool):
        products = row_dots(pool[representatives], row) if representatives else np.empty(0)
        close = products > (1 - eps) * np.sqrt(squares[representatives]) * np.sqrt(squares[i])
        if close.any():
            out[i] = representatives[int(np.argmax(close))]
        else:
            representatives.append(i)
            out[i] = i
    return out
