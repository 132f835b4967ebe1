# SPDX-License-Identifier: Apache-2.0
"""Selectors by name."""

from __future__ import annotations

from typing import Any

import numpy as np
from hullkit import reference


class Selector:
    name = "base"


class KNNSelector(Selector):
    name = "knn"

    def __init__(self, use_faiss: bool = True) -> None:
        self.use_faiss = use_faiss

    def select(self, embeddings: Any, query_embedding: Any, n_points: int) -> Any:
        pool, query = np.float64(embeddings), mean(query_embedding)
        if not self.use_faiss:  # cosines
            pool = pool / np.linalg.norm(pool, axis=1, keepdims=True)
            query = query / np.linalg.norm(query)
        indices, values = reference.knn(pool, query, n_points)
        return indices, np.float32(values)


class SIFTSelector(Selector):
    name = "sift"

    def __init__(self, llambda: float = 0.01, fast: bool = False) -> None:
        self.llambda, self.fast = llambda, fast

    def select(self, embeddings: Any, query_embedding: Any, n_points: int) -> Any:
        pool, queries = np.float64(embeddings), np.float64(query_embedding)
        outcome = reference.sift(pool, queries, n_points, self.llambda)
        left = np.array([(queries**2).sum(), *outcome.variance])
        return outcome.order, np.float32(left[:-1] - left[1:] if self.fast else -left[1:])


class FWSelector(Selector):
    name = "fw"

    def __init__(self, max_iter: int = 100, tol: float = 1e-4) -> None:
        self.max_iter, self.tol = max_iter, tol

    def select(self, embeddings: Any, query_embedding: Any, n_points: int) -> Any:
        # The limit is looked at after a step only: n_points = 1 takes one.
        pool, query, limit = np.float64(embeddings), mean(query_embedding), max(n_points, 2)
        outcome = reference.frank_wolfe(pool, query, limit, self.max_iter, self.tol)
        return outcome.indices[:n_points], outcome.weights[:n_points]


def mean(query_embedding: Any) -> Any:
    query = np.float64(query_embedding)
    return query.mean(0) if query.ndim == 2 else query


_SELECTORS = {"knn": KNNSelector, "sift": SIFTSelector, "fw": FWSelector}


def get_selector(name: str, **options: Any) -> Any:
    return _SELECTORS[name](**options)
