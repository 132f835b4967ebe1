# SPDX-License-Identifier: Apache-2.0
"""interop.activeft over faiss's own classes: vectors are what `reconstruct` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from _cases import unit
from hullkit.interop.activeft import Retriever

faiss = pytest.importorskip("faiss", reason="faiss is not installed")

DIM = 16


def rows(seed: int, count: int = 300, dim: int = DIM) -> Any:
    return unit(np.random.default_rng(seed).standard_normal((count, dim))).astype(np.float32)


IDS = 7 * np.arange(300)[::-1] + 3


def factory(name: str) -> Callable[[], Any]:
    return lambda: faiss.index_factory(DIM, name, faiss.METRIC_INNER_PRODUCT)


class Mine(faiss.IndexFlatIP):  # type: ignore[misc]
    """A subclass in Python, whose methods are its own."""

    def reconstruct(self, key: int) -> Any:
        return super().reconstruct(int(key))


# Exact by inner product, all of them: the candidates and choices are those of IndexFlatIP.
INDICES: dict[str, Callable[[], Any]] = {
    "IndexFlat": lambda: faiss.IndexFlat(DIM, faiss.METRIC_INNER_PRODUCT),
    "IndexFlatIP": lambda: faiss.IndexFlatIP(DIM),
    "IndexFlatPanorama": factory("FlatIPPanorama4"),
    "subclass": lambda: Mine(DIM),
    "IndexRefineFlat": factory("Flat,RFlat"),
    "IndexIDMap2": factory("IDMap2,Flat"),
    "IndexIDMap2 of Panorama": factory("IDMap2,FlatIPPanorama4"),
    "IndexPreTransform": factory("RR16,Flat"),
}


def filled(name: str) -> Any:
    try:
        index = INDICES[name]()
    except RuntimeError:
        assert "Panorama" in name, "faiss before 1.13 has none"
        pytest.skip("this faiss has no Panorama")
    if not index.is_trained:
        index.train(rows(0))
    if "IDMap2" in name:
        index.add_with_ids(rows(0), IDS)
    else:
        index.add(rows(0))
    return index


@pytest.mark.parametrize("K", [40, None])
@pytest.mark.parametrize("name", list(INDICES))
def test_vectors_are_the_index_s(name: str, K: int | None) -> None:
    index, plain = filled(name), filled("IndexFlatIP")
    queries = rows(1, 3).reshape(3, 1, DIM)
    values, chosen, embeddings, _ = Retriever(index, device="cpu").batch_search(queries, 10, K)
    wanted = Retriever(plain, device="cpu").batch_search(queries, 10, K)
    positions = wanted[1]
    np.testing.assert_array_equal(chosen, IDS[positions] if "IDMap2" in name else positions)
    np.testing.assert_allclose(values, wanted[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(embeddings, rows(0)[positions], rtol=0, atol=1e-6)
    for key, vector in zip(chosen.flat, embeddings.reshape(-1, DIM), strict=True):
        np.testing.assert_allclose(vector, index.reconstruct(int(key)), rtol=0, atol=1e-6)


def test_one_coordinate() -> None:
    """IndexFlat1D sorts its rows for the search."""
    points, queries = rows(2, 50, 1) * np.arange(1, 51)[:, None], np.full((1, 1, 1), 7.2)
    points = points.astype(np.float32)
    index, plain = faiss.IndexFlat1D(True), faiss.IndexFlatL2(1)
    index.add(points)
    plain.add(points)
    options = {"also_query_opposite": False, "device": "cpu"}
    ours = Retriever(index, **options).batch_search(queries, 8, 20)
    wanted = Retriever(plain, **options).batch_search(queries, 8, 20)
    np.testing.assert_array_equal(ours[1], wanted[1])
    np.testing.assert_array_equal(ours[2], points[ours[1]])
