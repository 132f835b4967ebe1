# SPDX-License-Identifier: Apache-2.0
"""Rounding in float64: the oracle's counts; and what holds of counts whatever made them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from _cases import DTYPES, GENERIC, TIED, TOTALS, Array, Spec, clustered, fixed, specs, unit
from _certificates import (
    assert_counts,
    exchange_meets_a_tie,
    kernel_outcome,
    length_scale,
    reconstruction_loss,
)
from hullkit import reference
from hypothesis import given
from hypothesis import strategies as st

EXAMPLES = 110  # for each of 11 generic and 8 tied families, and up to four numbers of passes each
_COPIES = ("duplicates", "all_equal")  # a random support of theirs holds one vertex twice


def _kernel(
    pool: Array, query: Array, indices: Any, weights: Array, total: int, passes: int
) -> Any:
    result = SimpleNamespace(indices=torch.tensor(indices), weights=torch.tensor(weights))
    counts = hullkit.round_multiplicities(
        torch.from_numpy(pool), torch.from_numpy(query), result, total, exchange_passes=passes
    )
    assert_counts(counts, total)
    return counts.numpy()


def _support(spec: Spec, pool: Array, query: Array, own: bool) -> tuple[Any, Array]:
    """Frank-Wolfe's own support and weights, or weights that have nothing to do with the query."""
    if own:
        outcome = kernel_outcome(pool, query, **spec.options)
        return outcome.indices, outcome.weights
    rng = np.random.default_rng(spec.seed)
    size = min(spec.n, 1 + spec.seed % 20)
    return rng.permutation(spec.n)[:size], rng.dirichlet(np.ones(size)) - 0.1 / size


def _same_or_tie(spec: Spec, own: bool) -> bool:
    """Equal to the oracle after every pass; False if they part where rounding decides."""
    pool, query = spec.build()
    indices, weights = _support(spec, pool, query, own)
    support = pool[indices]
    before = None
    for passes in range(spec.exchange_passes + 1):
        counts = _kernel(pool, query, indices, weights, spec.total, passes)
        expected = reference.round_multiplicities(support, query, weights, spec.total, passes)
        assert_counts(expected, spec.total)
        if not np.array_equal(counts, expected):
            message = f"pass {passes}:\nkernel {counts}\noracle {expected}"
            if before is None:
                losses = [
                    reconstruction_loss(support, query, c, spec.total) for c in (counts, expected)
                ]
                tie = 1e-13 * length_scale(pool, query) ** 2
                assert abs(losses[0] - losses[1]) < tie, message
            else:
                assert exchange_meets_a_tie(support, query, before, spec.total), message
            return False
        before = counts
    return True


@pytest.mark.parametrize("family", GENERIC)
def test_exact(family: str) -> None:
    ran = []

    @fixed(EXAMPLES)
    @given(specs(family), st.just(True) if family in _COPIES else st.booleans())
    def check(spec: Spec, own: bool) -> None:
        assert _same_or_tie(spec, own)
        ran.append(spec)

    check()
    assert len(ran) >= EXAMPLES


@pytest.mark.parametrize("family", [*TIED, *_COPIES])
def test_exact_or_tie(family: str) -> None:
    same = []

    @fixed(EXAMPLES)
    @given(specs(family), st.booleans())
    def check(spec: Spec, own: bool) -> None:
        same.append(_same_or_tie(spec, own))

    check()
    assert len(same) >= EXAMPLES
    assert sum(same) >= 0.8 * len(same)


@pytest.mark.parametrize("total", TOTALS)
def test_copies_in_the_support_resolve_to_the_first(total: int) -> None:
    """Greedy units never go to a later copy while the quotas' floors are all 0."""
    rng = np.random.default_rng(total)
    distinct, query = clustered(rng, 5, 17)
    pool = np.concatenate([distinct, distinct, distinct])
    weights = np.full(len(pool), 1.0)
    expected = np.zeros(len(pool), np.int64)
    if total < len(pool):
        counts = _kernel(pool, query, np.arange(len(pool)), weights, total, 0)
        expected[:5] = _kernel(distinct, query, np.arange(5), np.full(5, 1e-3), total, 0)
        if total < 5:
            np.testing.assert_array_equal(counts, expected)
        assert counts[5:].sum() == 0
    else:
        _kernel(pool, query, np.arange(len(pool)), weights, total, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("exchange_passes", [0, 1, 2, 5])
def test_single_support_point_takes_all(
    dtype: torch.dtype, total: int, exchange_passes: int
) -> None:
    pool, query = Spec("clustered", 63, 17, 1, 1.0, {}, 1, 0).tensors(dtype)
    result = hullkit.frank_wolfe(pool, query, max_support=1)
    counts = hullkit.round_multiplicities(
        pool, query, result, total, exchange_passes=exchange_passes
    )
    assert counts.tolist() == [total]


def _published_setting(seed: int) -> tuple[Array, Array]:
    """Pools on which the published exchange, which never rechecks its donors, goes negative."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, 384))
    pool = unit(centres[rng.integers(12, size=200)] + 0.6 * rng.standard_normal((200, 384)))
    query = unit(centres[:3].mean(0) + 0.3 * rng.standard_normal(384))
    return pool, query


def test_counts_never_turn_negative() -> None:
    """n = 200, d = 384, total 50, 160 pools: counts stay >= 0 and sum to the total."""
    moved = 0
    excess = []
    for seed in range(160):
        pool, query = _published_setting(seed)
        outcome = kernel_outcome(pool, query, max_support=50)
        support = pool[outcome.indices]

        def loss(counts: Any, support: Array = support, query: Array = query) -> float:
            return reconstruction_loss(support, query, counts, 50)

        before, one, two = (
            _kernel(pool, query, outcome.indices, outcome.weights, 50, passes)
            for passes in (0, 1, 2)
        )
        assert loss(one) <= loss(before)
        assert loss(two) <= loss(one)
        moved += not np.array_equal(before, two)
        if seed % 8 == 0:
            np.testing.assert_array_equal(
                two, reference.round_multiplicities(support, query, outcome.weights, 50, 2)
            )
        plain = hullkit.apportion(torch.from_numpy(outcome.weights), 50).numpy()
        excess.append(loss(two) - loss(plain))
    assert moved >= 40, "the exchange must have had something to do"
    assert np.mean(excess) < 0, "better than largest remainders on average"
    assert max(excess) <= 1e-3


def test_donors_run_dry() -> None:
    """Weights far from the best ones: a pass empties its donors, one of them before its end."""
    emptied = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pool, query = clustered(rng, 20, 384)
        weights = rng.dirichlet(np.full(20, 0.3))
        before = _kernel(pool, query, np.arange(20), weights, 20, 0)
        after = _kernel(pool, query, np.arange(20), weights, 20, 2)
        expected = reference.round_multiplicities(pool, query, weights, 20, 2)
        np.testing.assert_array_equal(after, expected)
        emptied += int(((before > 0) & (after == 0)).sum())
    assert emptied >= 60


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [-1.0, -2.0, 0.0]])
def test_nothing_positive_counts_as_uniform(weights: list[float]) -> None:
    pool, query = clustered(np.random.default_rng(0), 3, 17)
    counts = _kernel(pool, query, [0, 1, 2], np.array(weights), 9, 0)
    np.testing.assert_array_equal(counts, [3, 3, 3])
    exact = reference.round_multiplicities(pool, query, np.array(weights), 9, 2)
    np.testing.assert_array_equal(_kernel(pool, query, [0, 1, 2], np.array(weights), 9, 2), exact)


@pytest.mark.parametrize("total", [1, 7, 50])
def test_padding_gets_nothing(total: int) -> None:
    pool, query = Spec("clustered", 63, 17, 2, 1.0, {}, 1, 0).tensors()
    result = hullkit.frank_wolfe(pool, query, max_support=7)
    padded = SimpleNamespace(
        indices=torch.cat([result.indices, torch.full((4,), -1)]),
        weights=torch.cat([result.weights, torch.zeros(4, dtype=torch.float64)]),
    )
    counts = hullkit.round_multiplicities(pool, query, padded, total)
    expected = hullkit.round_multiplicities(pool, query, result, total)
    assert counts.tolist() == [*expected.tolist(), 0, 0, 0, 0]


@pytest.mark.parametrize("indices", [[0, -1, 2], [-1, 0, 2], [-1, -1, -1]])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_padding_is_at_the_end(device: str, backend: str | None, indices: list[int]) -> None:
    pool, query = torch.eye(3, device=device), torch.ones(3, device=device)
    rows = torch.tensor([indices, [2, 0, -1]], device=device)
    weights = torch.full((2, 3), 0.5, dtype=torch.float64, device=device)
    support = SimpleNamespace(indices=rows, weights=weights)
    pool, query = pool.expand(2, 3, 3), query.expand(2, 3)
    if device == "cuda" and backend is None:  # where no call waits for values
        counts = hullkit.round_multiplicities(pool, query, support, 10)
        mark = -1 if max(indices) >= 0 else 0  # padding alone stays padding
        assert counts.tolist() == [[mark] * 3, [5, 5, 0]]
        return
    wanted = r"expected a row in entry 0, got only padding, -1$"
    if max(indices) >= 0:
        wanted = r"expected -1 behind another one, got . at \[0, .\]"
    with pytest.raises(ValueError, match=rf"^result\.indices: {wanted}"):
        hullkit.round_multiplicities(pool, query, support, 10, backend=backend)


def test_large_totals() -> None:
    pool, query = Spec("clustered", 63, 17, 2, 1.0, {}, 1, 0).tensors()
    result = hullkit.frank_wolfe(pool, query, max_support=7)
    for total in (10**6, 2**31 + 1, 2**40):
        counts = hullkit.round_multiplicities(pool, query, result, total, exchange_passes=0)
        assert_counts(counts, total)
        quota = result.weights * total
        assert ((counts - quota).abs() <= len(quota)).all()


def test_exact_data_break_no_tie_by_rounding() -> None:
    """Integer rows have many ties, and neither kernel nor oracle rounds there: both take the lowest
    index, where shares of the total would be rounded."""
    rng = np.random.default_rng(0)
    for total in (3, 7, 20, 49) * 100:
        pool = rng.integers(-1, 2, (8, 3)).astype(np.float64)
        query = rng.integers(-1, 2, 3).astype(np.float64)
        weights = rng.integers(0, 3, 8) / 8.0
        support = SimpleNamespace(indices=torch.arange(8), weights=torch.from_numpy(weights))
        ours = hullkit.round_multiplicities(
            torch.from_numpy(pool), torch.from_numpy(query), support, total
        )
        wanted = reference.round_multiplicities(pool, query, weights, total)
        assert ours.tolist() == wanted.tolist()


def test_a_support_that_names_a_place_without_a_candidate() -> None:
    support = SimpleNamespace(indices=torch.tensor([1, 0]), weights=torch.full((2,), 0.5).double())
    with pytest.raises(ValueError, match=r"^candidates: expected a row at position 0 .* got -1$"):
        hullkit.round_multiplicities(
            torch.eye(2), torch.ones(2), support, 4, candidates=torch.tensor([-1, 1])
        )
