# SPDX-License-Identifier: Apache-2.0
"""The selectors of HullFT-shaped code, see hullkit.interop.hullft.

Arrays in and out are NumPy's. float32 embeddings are multiplied in float32, float64 ones in
float64; what follows is float64. So are cosines as a whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arrays import to_numpy
from ..selection import frank_wolfe, knn, sift
from ._arguments import callers_names, floating, integer
from .activeft import sift_values

Array = NDArray[Any]
_NAMES = {"pool": "embeddings", "query": "query_embedding"}


class KNNSelector:
    """The nearest neighbours: :func:`hullkit.knn`.

    Args:
        use_faiss: neighbours by inner products, as of a faiss index; else by cosines. There is no
            faiss in it.

    Cost: O(n d) a call.

    >>> import numpy as np
    >>> from hullkit.interop.hullft import KNNSelector
    >>> indices, values = KNNSelector().select(np.eye(3), np.array([0.7, 0.3, 0.0]), 2)
    >>> indices.tolist()
    [0, 1]
    """

    name = "knn"

    def __init__(self, use_faiss: bool = True) -> None:
        self.use_faiss = bool(use_faiss)

    def select(
        self, embeddings: Array, query_embedding: Array, n_points: int
    ) -> tuple[Array, Array]:
        """The nearest rows.

        Args:
            embeddings: `(n, d)`.
            query_embedding: `(d,)`, or `(k, d)`, of which the mean is taken.
            n_points: rows to return, 1 <= n_points <= n.
        Returns:
            indices `(n_points,)` int64, the nearest first; values `(n_points,)` float32, inner
            products or, without use_faiss, cosines (0 for a row of zeros).
        Raises:
            TypeError, ValueError: shapes that do not fit, NaN and Inf; more points than rows, where
                faiss fills up with -1, which names a row to NumPy.
        """
        pool = floating("embeddings", embeddings)
        query = _mean("query_embedding", query_embedding, pool)
        n_points = integer("n_points", n_points, 1, len(pool))
        if not self.use_faiss:
            pool, query = _directions(pool), _directions(query)
        with callers_names(**_NAMES):
            result = knn(pool, query, n_points)
        return result.indices.numpy(), result.values.numpy().astype(np.float32)


class SIFTSelector:
    """SIFT: :func:`hullkit.sift` with `noise=llambda`, over all embeddings.

    Args:
        llambda: the noise, > 0.
        fast: values are what a choice takes off the variance. Choices are the same.

    Cost: that of :func:`hullkit.sift`.

    >>> import numpy as np
    >>> from hullkit.interop.hullft import SIFTSelector
    >>> SIFTSelector().select(np.eye(3), np.array([0.8, 0.6, 0.0]), 3)[0].tolist()
    [0, 1, 0]
    """

    name = "sift"

    def __init__(self, llambda: float = 0.01, fast: bool = False) -> None:
        self.llambda = float(llambda)
        self.fast = bool(fast)

    def select(
        self, embeddings: Array, query_embedding: Array, n_points: int
    ) -> tuple[Array, Array]:
        """SIFT's choices. Gains that tie go to the lowest index.

        Args:
            embeddings: `(n, d)`.
            query_embedding: `(d,)`, or `(k, d)`, whose variances are summed.
            n_points: choices to make, >= 1.
        Returns:
            indices `(n_points,)` int64 in order of choice, repeats included; values `(n_points,)`
            float32, minus the variance after each choice or, with fast, the fall in variance that
            the choice makes.
        Raises:
            TypeError, ValueError: shapes that do not fit, NaN and Inf; n_points below 1.
        """
        pool = floating("embeddings", embeddings)
        rows = np.atleast_2d(to_numpy("query_embedding", query_embedding))
        queries = floating("query_embedding", rows).to(pool.dtype)[None]
        n_points = integer("n_points", n_points, 1)
        with callers_names(**_NAMES, noise="llambda", total="n_points"):
            result = sift(pool, queries, n_points, noise=self.llambda)
        values = sift_values(result.variance.numpy(), queries.numpy(), self.fast)
        return result.order[0].numpy(), values[0]


class FWSelector:
    """The Frank-Wolfe selector: :func:`hullkit.frank_wolfe`.

    Args:
        max_iter, tol: as `max_iters` and `tol` there.

    Cost: that of :func:`hullkit.frank_wolfe`.

    >>> import numpy as np
    >>> from hullkit.interop.hullft import FWSelector
    >>> indices, weights = FWSelector().select(np.eye(3), np.array([0.7, 0.3, 0.0]), 10)
    >>> indices.tolist()
    [0, 1]
    """

    name = "fw"

    def __init__(self, max_iter: int = 100, tol: float = 1e-4) -> None:
        self.max_iter = int(max_iter)
        self.tol = float(tol)

    def select(
        self, embeddings: Array, query_embedding: Array, n_points: int
    ) -> tuple[Array, Array]:
        """The rows that rebuild the query.

        Args:
            embeddings: `(n, d)`.
            query_embedding: `(d,)`, or `(k, d)`, of which the mean is taken.
            n_points: the most rows, >= 0.
        Returns:
            indices `(m,)` int64 and weights `(m,)` float64, the heaviest first, with m <= n_points.
        Raises:
            TypeError, ValueError: shapes that do not fit, NaN and Inf; n_points below 0.
        """
        pool = floating("embeddings", embeddings)
        n_points = integer("n_points", n_points, 0)
        query = _mean("query_embedding", query_embedding, pool)
        with callers_names(**_NAMES, max_iters="max_iter"):
            result = frank_wolfe(
                pool,
                query,
                # The limit is looked at after a step: a single point is the heavier of two.
                max_support=max(n_points, 2),
                max_iters=self.max_iter,
                tol=self.tol,
            )
        size = min(int(result.support_size), n_points)
        return result.indices.numpy()[:size], result.weights.numpy()[:size]


def _mean(name: str, array: Any, pool: Tensor) -> Tensor:
    query = to_numpy(name, array)
    if query.ndim == 2:
        query = query.mean(axis=0, dtype=np.float64)
    return floating(name, query).to(pool.dtype)


def _directions(rows: Tensor) -> Tensor:
    """Rows of length 1, in float64, whatever their length was; rows of zeros stay."""
    values = rows.double()
    # A square of the largest entries is 1: none is beyond float64, and not all fall to 0.
    largest = torch.from_numpy(np.abs(values.numpy()).max(-1, keepdims=True, initial=0.0))
    scaled = values / largest.where(largest > 0, 1.0)
    return torch.nn.functional.normalize(scaled, dim=-1)
