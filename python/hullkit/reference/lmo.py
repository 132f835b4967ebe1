# SPDX-License-Identifier: Apache-2.0
"""Linear minimisation oracle over the hull of the rows of a pool."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def row_dots(pool: Array, vector: Array) -> Array:
    """<pool_i, vector> for every row, equal rows giving equal bits.

    A plain matrix-vector product does not promise the latter: BLAS sums the rows at the edge of its
    blocks in another order, and then two copies of one vertex do not tie.

    >>> import numpy as np
    >>> row_dots(np.eye(2), np.array([1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    products: Array = np.matmul(pool[:, None, :], vector)[:, 0]
    return products


def lmo(pool: Array, direction: Array) -> tuple[int, float]:
    """argmin_i <direction, pool_i> (lowest index on a tie) and that minimum.

    Args:
        pool: `(n, d)` float64.
        direction: `(d,)` float64.
    Returns:
        The index and the product.

    >>> import numpy as np, hullkit.reference as reference
    >>> reference.lmo(np.eye(2), np.array([1.0, 2.0]))
    (0, 1.0)
    """
    products = row_dots(pool, direction)
    index = int(np.argmin(products))
    return index, float(products[index])
