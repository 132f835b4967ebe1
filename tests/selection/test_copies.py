# SPDX-License-Identifier: Apache-2.0
"""Pools that lie by columns have to be copied: only the rows in use are, and once for a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hullkit
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

M, D, N = 5000, 16, 12


class Largest(TorchDispatchMode):
    """The most numbers that any operation of torch wrote to a tensor of its own."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.numbers = max(self.numbers, out.numel())
        return out


def by_columns() -> Tensor:
    return torch.randn(D, M, generator=torch.Generator().manual_seed(0)).T


CALLS: dict[str, Callable[..., Any]] = {
    "lmo": hullkit.lmo,
    "knn": lambda pool, query, **o: hullkit.knn(pool, query, 3, **o),
    "frank_wolfe": hullkit.frank_wolfe,
    "sift": lambda pool, query, **o: hullkit.sift(pool, query, 5, **o),
    "select": lambda pool, query, **o: hullkit.select(pool, query, 5, **o),
    "select, merged": lambda pool, query, **o: hullkit.select(
        pool, query, 5, merge_duplicates=0.1, **o
    ),
    "select, auto": lambda pool, query, **o: hullkit.select(
        pool, query, "auto", max_total=9, max_multiplicity=2, **o
    ),
    "duplicates": lambda pool, _, **o: hullkit.duplicates(pool, eps=0.1, **o),
    "round_multiplicities": lambda pool, query, candidates: hullkit.round_multiplicities(
        pool, query, hullkit.frank_wolfe(pool, query, candidates=candidates), 5,
        candidates=candidates,
    ),
}  # fmt: skip


def leaves(result: Any) -> list[Tensor]:
    if not isinstance(result, tuple):
        return [result] if isinstance(result, Tensor) else []
    return [leaf for part in result for leaf in leaves(part)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batched", [False, True])
def test_candidates_of_a_pool_by_columns(call: str, batched: bool) -> None:
    pool, generator = by_columns(), torch.Generator().manual_seed(1)
    candidates = torch.randint(0, M, (3, N), generator=generator)
    candidates[:, 4] = candidates[:, 7]
    candidates[1, 2:5] = -1
    query = torch.randn(3, D, generator=generator)
    if not batched:
        candidates, query = candidates[1], query[1]
    by_rows = pool.contiguous()
    with Largest() as largest:
        wanted = CALLS[call](by_rows, query, candidates=candidates)
    assert largest.numbers < candidates.numel() * D  # nothing is gathered
    with Largest() as largest:
        chosen = CALLS[call](pool, query, candidates=candidates)
    assert largest.numbers <= candidates.numel() * D
    pairs = list(zip(leaves(chosen), leaves(wanted), strict=True))
    assert pairs
    assert all(torch.equal(one, other) for one, other in pairs)


def test_what_is_no_row_is_named_as_ever() -> None:
    pool, query = by_columns(), torch.ones(2, D)
    candidates = torch.zeros(2, N, dtype=torch.int64)
    for wrong in (M, -2):
        candidates[1, 3] = wrong
        with pytest.raises(ValueError, match=rf"rows 0\.\.{M - 1} .*, got {wrong} at \[1, 3\]"):
            hullkit.knn(pool, query, 3, candidates=candidates)
        # Beyond lengths anything may stand.
        lengths = torch.tensor([N, 3])
        with Largest() as largest:
            found = hullkit.knn(pool, query, 3, candidates=candidates, lengths=lengths)
        assert found.indices[1].tolist() == [0, 1, 2]
        assert largest.numbers <= candidates.numel() * D
    with pytest.raises(ValueError, match="expected at least one candidate in entry 0"):
        hullkit.lmo(pool, query, candidates=torch.full((2, N), -1))
    pool[9, 2] = math.nan
    with pytest.raises(ValueError, match="got nan in entry 1, candidate 3, coordinate 2"):
        hullkit.lmo(pool, query, candidates=candidates.masked_fill(candidates < 0, 9))
    none = torch.zeros(0, N, dtype=torch.int64)
    with Largest() as largest:
        assert hullkit.lmo(pool, query[:0], candidates=none).index.shape == (0,)
    assert largest.numbers <= D


def test_a_pool_by_columns_for_the_whole_batch_is_copied_once() -> None:
    pool, query = by_columns(), torch.randn(8, D)
    with Largest() as largest:
        found = hullkit.knn(pool.expand(8, M, D), query, 5)
    assert largest.numbers <= M * D
    assert torch.equal(found.indices, hullkit.knn(pool.contiguous(), query, 5).indices)
