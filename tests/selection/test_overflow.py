# SPDX-License-Identifier: Apache-2.0
"""Products beyond the arithmetic: each way to them has an error that names what was multiplied."""

from __future__ import annotations

import hullkit
import pytest
import torch

VARIANTS = ["vanilla", "away", "pairwise", "fully_corrective"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("pool", "query", "what"),
    [
        ([[1.0, 0.0], [0.0, 3e19]], [1.0, 1e-20], "itself"),  # the last vertex needs no column
        ([[1e19, 1.5e19], [0.0, 1e18], [3.2e19, 0.0]], [-1e19, 1e19], "the residual"),
        ([[1.0, 0.0], [0.0, -1e30]], [1.0, 1e10], "query"),
    ],
)
def test_frank_wolfe(pool: list[list[float]], query: list[float], what: str, variant: str) -> None:
    arguments = torch.tensor(pool), torch.tensor(query)
    with pytest.raises(ValueError, match=r"overflow in entry 0, candidate .*down") as caught:
        hullkit.frank_wolfe(*arguments, max_support=2, tol=0.0, variant=variant)
    if what != "the residual" or variant == "vanilla":
        assert f"inner products with {what} within" in str(caught.value)


@pytest.mark.parametrize(("scale", "what"), [(1e-10, "the support"), (1e20, "query")])
def test_round_multiplicities(scale: float, what: str) -> None:
    result = hullkit.frank_wolfe(torch.eye(2), torch.ones(2))
    with pytest.raises(ValueError, match=f"pool: expected inner products with {what} within"):
        hullkit.round_multiplicities(1e20 * torch.eye(2), scale * torch.ones(2), result, 4)


def test_sift() -> None:
    pool = torch.tensor([[1.0, 1.0], [1e160, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"products with itself within .* candidate 1;"):
        hullkit.sift(pool, torch.tensor([0.0, 1.0], dtype=torch.float64), 1)


@pytest.mark.parametrize("batch", [None, 3], ids=["one", "a batch"])
@pytest.mark.parametrize("call", ["lmo", "knn"])
def test_a_product_that_could_not_win(call: str, batch: int | None) -> None:
    """It is passed over among many, but seen; the first of two is named."""
    pool, vector = torch.ones(600, 1), torch.full((1,), 2.0)
    if batch is not None:
        vector = vector.expand(batch, 1)
    pool[300] = pool[500] = 3e38 if call == "lmo" else -3e38
    with pytest.raises(ValueError, match="overflow in entry 0, candidate 300;"):
        hullkit.lmo(pool, vector) if call == "lmo" else hullkit.knn(pool, vector, 1)


def test_weights_to_apportion() -> None:
    with pytest.raises(ValueError, match=r"finite values, got nan at position 1$"):
        hullkit.apportion(torch.tensor([0.5, float("nan")], dtype=torch.float64), 3)
    with pytest.raises(ValueError, match=r"finite sum, got inf$"):
        hullkit.apportion(torch.tensor([1e308, 1e308], dtype=torch.float64), 3)


def test_the_lowest_entry_is_named_although_a_later_one_fails_first() -> None:
    torch.set_num_threads(2)
    pool = torch.ones(2, 100_000, 4)
    pool[0, -1] = pool[1, 0] = float("inf")
    lengths = torch.tensor([100_000, 1])
    for _ in range(5):
        with pytest.raises(ValueError, match="in entry 0, candidate 99999"):
            hullkit.lmo(pool, torch.ones(2, 4), lengths=lengths)
