# SPDX-License-Identifier: Apache-2.0
"""activeft's `Retriever` over a faiss index: its interface, hullkit's kernels, one call a batch.

Needs faiss, which brings the index, and nothing of activeft.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._arrays import to_numpy
from ..selection import sift
from ._arguments import callers_names, check_index, integer, reconstructed

__all__ = ["RetrievalTime", "Retriever"]

Array = NDArray[np.float32]
Indices = NDArray[np.int64]


class RetrievalTime(NamedTuple):
    """Where the time of a search went.

    Attributes:
        faiss: seconds in the index.
        sift: seconds of choice after that.

    >>> from hullkit.interop.activeft import RetrievalTime
    >>> RetrievalTime(faiss=0.002, sift=0.001).faiss
    0.002
    """

    faiss: float
    sift: float


class Retriever:
    """Preselects candidates by a faiss index and chooses among them by :func:`hullkit.sift`.

    Equivalent to: `activeft.sift.Retriever`, but for choices that the rounding of its float32
    kernel decides. A batch's answers come in the order of its queries (there as workers finish),
    and more than 1000 candidates are chosen from together.

    Args:
        index: any faiss index that can reconstruct its vectors.
        acquisition_function: must be None, there for its place among the arguments.
        llambda: `noise` of :func:`hullkit.sift`.
        fast: values are gains (what each choice takes off the variance), as SIFT-Fast's are; the
            choices are the exact ones in any case.
        also_query_opposite: candidates are those of largest absolute inner product, found by a
            search for the opposite of the mean query, too, each once. Inner-product indices only.
        only_faiss: return the N nearest of the index.
        device: where to choose; None for CUDA if there is any, else the CPU.

    Raises:
        TypeError: an index that is none of faiss. NotImplementedError: an `acquisition_function`.

    >>> import faiss, numpy as np
    >>> from hullkit.interop.activeft import Retriever
    >>> index = faiss.IndexFlatIP(3)
    >>> index.add(np.eye(3, dtype="float32"))
    >>> _, rows, _, _ = Retriever(index).search(np.array([[0.8, 0.6, 0]], dtype="float32"), N=3)
    >>> rows.tolist()
    [0, 1, 0]
    """

    def __init__(
        self,
        index: Any,
        acquisition_function: None = None,
        llambda: float = 0.01,
        fast: bool = False,
        also_query_opposite: bool = True,
        only_faiss: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if acquisition_function is not None:
            raise NotImplementedError(
                "acquisition_function: expected None, which is SIFT, "
                f"got {type(acquisition_function).__name__}"
            )
        check_index(index)
        self.index = index
        self.llambda = llambda
        self.fast = fast
        self.also_query_opposite = also_query_opposite
        self.only_faiss = only_faiss
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def search(
        self, query: Any, N: int, K: int | None = None, mean_pooling: bool = False, threads: int = 1
    ) -> tuple[Array, Indices, Array, RetrievalTime]:
        """:meth:`batch_search` for one prompt: query `(m, d)`; results without the leading B."""
        query = to_numpy("query", query)
        if query.ndim != 2 or query.shape[1] != self.index.d:
            raise ValueError(f"query: expected shape (m, {self.index.d}), got {query.shape}")
        values, indices, embeddings, seconds = self.batch_search(
            query[None], N, K, mean_pooling, threads
        )
        return values[0], indices[0], embeddings[0], seconds

    def batch_search(
        self,
        queries: Any,
        N: int,
        K: int | None = None,
        mean_pooling: bool = False,
        threads: int = 1,
    ) -> tuple[Array, Indices, Array, RetrievalTime]:
        """N choices, repeats included, for each prompt.

        Args:
            queries: `(B, m, d)`, prompts of m embeddings each, whose variances are summed.
            N: choices of a prompt, at least 1. K: candidates of a prompt, the nearest of the mean
                query, at least 1; None for the whole index.
            mean_pooling: choose for the mean of a prompt's embeddings.
            threads: faiss's in this call; hullkit runs on `torch.get_num_threads()`.
        Returns:
            values `(B, N)` float32, minus the variance after each choice; indices `(B, N)` int64 in
            the index; embeddings `(B, N, d)` float32; seconds spent in faiss and on the choice.
        Raises:
            TypeError, ValueError: the argument, what was expected and what came; an empty index.
        """
        import faiss

        queries = to_numpy("queries", queries, np.float32)
        if queries.ndim != 3 or queries.shape[2] != self.index.d:
            raise ValueError(f"queries: expected shape (B, m, {self.index.d}), got {queries.shape}")
        if not np.isfinite(queries).all():
            raise ValueError("queries: expected finite numbers, got NaN or infinity")
        N, threads = integer("N", N, 1), integer("threads", threads, 1)
        if self.index.ntotal == 0:
            raise ValueError("index: expected at least one vector, got none")
        K = self.index.ntotal if K is None else integer("K", K, 1)
        means = queries.mean(axis=1)
        start = time.perf_counter()
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        try:
            products, indices, pool, rows = self._candidates(means, K, faiss)
        finally:
            faiss.omp_set_num_threads(before)
        found = time.perf_counter()
        if self.only_faiss:
            embeddings = pool[rows[:, :N]]
            embeddings[rows[:, :N] < 0] = np.nan
            return products[:, :N], indices[:, :N], embeddings, RetrievalTime(found - start, 0.0)
        ours = {"pool": "index", "candidates": "index", "query": "queries"}
        with callers_names(**ours, total="N", noise="llambda"):
            result = sift(
                torch.from_numpy(pool).to(self.device),
                torch.from_numpy(means if mean_pooling else queries).to(self.device),
                N,
                noise=self.llambda,
                candidates=torch.from_numpy(rows).to(self.device),
            )
        order = result.order.cpu().numpy()
        broken = (order < 0).any(axis=1)
        if broken.any():  # on a CPU `sift` has raised
            raise ValueError(
                "index: expected at least one candidate, and finite vectors, in entry "
                f"{int(broken.argmax())}, got none or NaN or infinity"
            )
        vectors = means[:, None] if mean_pooling else queries
        values = sift_values(result.variance.cpu().numpy(), vectors, self.fast)
        embeddings = pool[np.take_along_axis(rows, order, axis=1)]
        indices = np.take_along_axis(indices, order, axis=1)
        seconds = RetrievalTime(found - start, time.perf_counter() - found)
        return values, indices, embeddings, seconds

    def _candidates(
        self, means: Array, k: int, faiss: Any
    ) -> tuple[Array, Indices, Array, Indices]:
        """The k candidates of each mean: products (distances), positions in the index, and a pool
        with rows of it. A position is -1 where faiss found no more."""
        if self.also_query_opposite and self.index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(
                "also_query_opposite: expected False for an index that is not of inner products, "
                "got True"
            )
        stored = _stored_vectors(self.index, faiss) if self.device.type == "cpu" else None
        opposite = self.also_query_opposite and (stored is None or k < len(stored))
        if opposite:
            means = np.concatenate([means, -means])  # one search: faiss is faster on more at once
        if stored is None:
            instead = "hullkit.interop.faiss.select takes embeddings"
            products, indices, vectors = reconstructed(self.index, means, k, instead)
            pool = vectors.reshape(-1, self.index.d)
            rows = np.where(indices == -1, -1, np.arange(len(pool)).reshape(indices.shape))
        else:
            products, indices = self.index.search(means, k)
            pool, rows = stored, indices
        if opposite:
            products, indices, rows = (
                np.concatenate(np.split(part, 2), axis=1) for part in (products, indices, rows)
            )
        elif self.also_query_opposite:
            # Not where nothing was found: faiss's -3e38 would be the nearest.
            products = np.where(indices == -1, products, np.abs(products))
        if self.also_query_opposite:
            nearest = np.argsort(-products, axis=1, kind="stable")
            products, indices, rows = (
                np.take_along_axis(part, nearest, axis=1) for part in (products, indices, rows)
            )
            again = _repeats(indices)
            indices, rows = np.where(again, -1, indices), np.where(again, -1, rows)
            nearest = np.argsort(again, axis=1, kind="stable")[:, :k]
            products, indices, rows = (
                np.take_along_axis(part, nearest, axis=1) for part in (products, indices, rows)
            )
        return products, indices, pool, rows


def _repeats(ids: Indices) -> NDArray[np.bool_]:
    """Which of a prompt's ids it has met before."""
    again = np.ones(ids.shape, dtype=bool)
    for own, repeated in zip(ids, again, strict=True):
        repeated[np.unique(own, return_index=True)[1]] = False
    return again


def sift_values(variance: NDArray[np.float64], queries: NDArray[Any], fast: bool) -> Array:
    """activeft's value of each choice: minus the variance after it or, fast, what it takes off.

    variance (B, N), of prompts (B, m, d).
    """
    if not fast:
        return (-variance).astype(np.float32)
    prior = (queries.astype(np.float64) ** 2).sum(axis=(1, 2))
    return -np.diff(variance, prepend=prior[:, None], axis=1).astype(np.float32)


def _stored_vectors(index: Any, faiss: Any) -> Array | None:
    """The vectors of a flat index (n, d), where they lie.

    None for any other class, subclasses too: how they store vectors is theirs to choose.
    """
    row_major = (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2)
    flat = faiss.downcast_index(index)
    if type(index) not in (faiss.Index, *row_major) or type(flat) not in row_major:
        return None
    values: Array = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d)
    return values.reshape(flat.ntotal, flat.d)
