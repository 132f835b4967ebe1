"""Selectors by name."""

from __future__ import annotations

from typing import Any

import numpy as np
from hullkit import reference


class Selector:
    name = "base"


class KNNSelector(Selector):
    name = "knn"

    def select(self, embeddings: Any, query_embedding: Any, n_points: int) -> Any:
        indices, products = reference.knn(np.float64(embeddings), mean(query_embedding), n_points)
        return indices, products


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


_SELECTORS = {"knn": KNNSelector, "fw": FWSelector}


def get_selector(name: str, **options: Any) -> Any:
    return _SELECTORS[name](**options)
