# SPDX-License-Identifier: Apache-2.0
"""Embeddings so short that their products vanish: refused, where a choice would be arbitrary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hullkit
import pytest
import torch
from torch import Tensor

CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "lmo": hullkit.lmo,
    "knn": lambda pool, query: hullkit.knn(pool, query, 3),
    "sift": lambda pool, query: hullkit.sift(pool, query, 5),
    "vanilla": hullkit.frank_wolfe,
    "fully_corrective": lambda *given: hullkit.frank_wolfe(*given, variant="fully_corrective"),
    "capped": lambda *given: hullkit.select(*given, 9, max_multiplicity=3),
    "rounded": lambda pool, query: hullkit.round_multiplicities(
        pool, query, hullkit.frank_wolfe(torch.eye(4), torch.ones(2, 4), max_support=3), 5
    ),
}


def problem(dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    query = rows[:5].mean(0) + 0.05 * torch.randn(8, generator=generator, dtype=torch.float64)
    return (rows * scale).to(dtype), (query * scale).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 3e-23),
        (torch.float32, 1e-30),
        (torch.bfloat16, 1e-30),
        (torch.float64, 1e-155),
        (torch.float64, 1e-170),
    ],
)
@pytest.mark.parametrize("name", CALLS)
def test_embeddings_of_no_length(name: str, dtype: torch.dtype, scale: float) -> None:
    if name == "sift" and dtype != torch.float64:
        pytest.skip("products in float64")
    pool, query = problem(dtype, scale)
    message = r"^pool: expected inner products .* got an underflow of all in entry 1; scale .* up"
    with pytest.raises(ValueError, match=message):
        CALLS[name](pool.expand(2, 20, 8), torch.stack([query * 0.0, query]))
    if name in ("lmo", "knn"):  # one pool for all is read once
        with pytest.raises(ValueError, match=message):
            CALLS[name](pool, torch.stack([query * 0.0, query]))


def test_gains_are_squares() -> None:
    pool, query = problem(torch.float64, 1e-100)
    with pytest.raises(
        ValueError, match=r"^pool: expected inner products with query, squared, .*up"
    ):
        hullkit.sift(pool, query, 5)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-18), (torch.float64, 1e-152)])
def test_short_embeddings(dtype: torch.dtype, scale: float) -> None:
    pool, query = problem(torch.float64, 1.0)
    short = problem(dtype, scale)
    assert torch.equal(hullkit.knn(*short, 20).indices, hullkit.knn(pool, query, 20).indices)
    options: dict[str, Any] = {"variant": "fully_corrective", "tol": 0.0}
    wanted = hullkit.frank_wolfe(pool, query, **options)
    found = hullkit.frank_wolfe(*short, **options)
    assert torch.equal(found.indices, wanted.indices)
    torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-4, atol=1e-5)


def test_products_that_are_zero() -> None:
    """Of orthogonal rows, and of zeros, nothing is lost. Nor is it where the other is long."""
    rows = torch.eye(4)[:3]
    for query in (torch.eye(4)[3], torch.zeros(4)):
        assert hullkit.knn(rows, query, 1).indices.tolist() == [0]
        assert hullkit.select(rows, query, 6).counts.sum() == 6
    assert hullkit.knn(rows * 1e-30, torch.tensor([1.0, 3.0, 2.0, 0.0]), 1).indices.tolist() == [1]
    assert hullkit.knn(rows, torch.tensor([1.0, 3.0, 2.0, 0.0]) * 1e-30, 1).indices.tolist() == [1]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["lmo", "knn"])
def test_coordinates_of_one_sign(name: str, sign: float) -> None:
    with pytest.raises(ValueError, match=r"got an underflow of all in entry 0"):
        CALLS[name](torch.full((4, 2), sign * 1e-30), torch.full((2,), -sign * 1e-30))
