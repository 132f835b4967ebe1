# SPDX-License-Identifier: Apache-2.0
"""One pool for many queries, which a CPU reads once for a group of them: each gets the bits that it
gets alone, and the error."""

from __future__ import annotations

import math

import hullkit
import pytest
import torch
from _cases import DTYPES
from torch import Tensor


def problem(dtype: torch.dtype, n: int, d: int, b: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + d)
    pool, query = (torch.randn(size, d, generator=generator).to(dtype) for size in (n, b))
    return pool, query


def assert_alone(pool: Tensor, query: Tensor, k: int, lengths: Tensor | None = None) -> None:
    nearest = hullkit.knn(pool, query, k, lengths=lengths)
    least = hullkit.lmo(pool, query, lengths=lengths)
    for b, one in enumerate(query):
        length = None if lengths is None else lengths[b]
        for together, alone in (
            (nearest, hullkit.knn(pool, one, k, lengths=length)),
            (least, hullkit.lmo(pool, one, lengths=length)),
        ):
            assert all(map(torch.equal, (part[b] for part in together), alone))


# Tiles have 64 rows; 3000 rows of 300 queries are more than one round; queries of d = 5000 are more
# than one group, and two of them leave a pack of three unfilled.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "b", "k"),
    [(1, 1, 2, 1), (63, 17, 4, 63), (65, 129, 5, 9), (3000, 33, 300, 40), (70, 5000, 50, 3)],
)
def test_bits_of_each_query_alone(dtype: torch.dtype, n: int, d: int, b: int, k: int) -> None:
    pool, query = problem(dtype, n, d, b)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert_alone(pool, query, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beyond_lengths_are_not_looked_at(dtype: torch.dtype) -> None:
    pool, query = problem(dtype, 200, 20, 7)
    lengths = torch.tensor([64, 1, 130, 65, 63, 128, 2])
    pool[130:] = math.nan
    pool[129] = math.inf
    lengths[2] = 129
    assert_alone(pool, query, 30, lengths)


def test_ties_are_in_the_order_of_rows() -> None:
    """Across tiles, rounds and runs of the sort: products are small integers."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(-2, 3, (100_000, 3), generator=generator).float()
    query = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    values, rows = (query @ pool.T).sort(dim=1, descending=True, stable=True)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for k in (1, 2, 500, 40_000, 99_999, 100_000):
            for nearest in (
                hullkit.knn(pool, query, k),
                hullkit.knn(pool.expand(3, -1, -1).contiguous(), query, k),
            ):
                assert torch.equal(nearest.indices, rows[:, :k])
                assert torch.equal(nearest.values, values[:, :k].double())
        assert torch.equal(hullkit.lmo(pool, -query).index, rows[:, 0])


def test_the_first_entry_that_is_wrong_is_named() -> None:
    pool, query = problem(torch.float32, 70, 8, 6)
    huge, broken = pool.clone(), query.clone()
    huge[3] = 3e38
    broken[4, 2] = math.nan
    with pytest.raises(ValueError, match=r"query: expected finite values, got nan at \[4, 2\]"):
        hullkit.knn(pool, broken, 3)
    with pytest.raises(ValueError, match=r"direction: .*got nan at \[4, 2\]"):
        hullkit.lmo(pool, broken)
    lengths = torch.tensor([70, 70, 71, 70, 0, 70])
    with pytest.raises(ValueError, match=r"lengths\[2\] <= 70, got 71"):
        hullkit.knn(pool, broken, 3, lengths=lengths)
    with pytest.raises(ValueError, match=r"pool: .*got an overflow in entry 0, candidate 3"):
        hullkit.lmo(huge, 9 * broken.abs(), lengths=lengths)
    pool[69, 1] = -math.inf
    lengths = torch.tensor([69, 3, 70, 70, 9, 70])
    with pytest.raises(ValueError, match=r"got -inf in entry 2, candidate 69, coordinate 1"):
        hullkit.knn(pool, query, 3, lengths=lengths)
