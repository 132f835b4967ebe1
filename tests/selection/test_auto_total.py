# SPDX-License-Identifier: Apache-2.0
"""select(total="auto"): the oracle's totals and counts, and what holds on any pool."""

from __future__ import annotations

from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from _cases import DTYPES, batch, fixed, specs
from _certificates import assert_counts
from hullkit import reference
from hypothesis import given
from hypothesis import strategies as st


def test_the_rule_by_hand() -> None:
    assert reference.ladder(50) == [5, 10, 20, 30, 50]
    assert reference.ladder(13) == [2, 3, 6, 8, 13]
    assert reference.ladder(3) == [1, 2, 3]
    assert reference.ladder(1) == [1]
    # 1 / (0.1 T) is 2, 1, 1/2, 1/3, 1/5
    for residual, total in ((2.5, 5), (2.0, 10), (0.6, 20), (0.5, 30), (0.3, 50), (0.0, 50)):
        assert reference.auto_total(residual, 50, 0.1) == total


@pytest.mark.parametrize("cap", [None, 2])
@pytest.mark.parametrize("max_total", [1, 7, 50])
def test_hull_equals_the_oracles_by_hand(max_total: int, cap: int | None) -> None:
    pool, query = batch(torch.float64, b=24, n=120, d=40)
    query *= torch.linspace(0.2, 3.0, 24, dtype=torch.float64)[:, None]  # far and near
    alpha = 4 / max_total  # 0.08 for 50, the defaults
    given = {} if max_total == 50 else {"max_total": max_total, "alpha": alpha}
    chosen = hullkit.select(pool, query, "auto", max_multiplicity=cap, **given)
    assert chosen.total is not None
    capped = cap is not None and cap < max_total
    for b in range(24):
        rows, target = pool[b].numpy(), query[b].numpy()
        outcome = reference.frank_wolfe(
            rows,
            target,
            max_support=2 * max_total if capped else max_total,
            variant="fully_corrective" if capped else "vanilla",
            max_weight=min(1.0, (cap or max_total) / max_total),
        )
        total = reference.auto_total(outcome.residual_norm, max_total, alpha)
        counts = reference.round_multiplicities(
            rows[outcome.indices], target, outcome.weights, total, max_multiplicity=cap
        )
        assert int(chosen.total[b]) == total
        np.testing.assert_array_equal(chosen.rows[b, : len(counts)], outcome.indices)
        np.testing.assert_array_equal(chosen.counts[b, : len(counts)], counts)
        assert (chosen.counts[b, len(counts) :] == 0).all()
    assert len(chosen.total.unique()) >= min(4, len(reference.ladder(max_total)))


@pytest.mark.parametrize("options", [{}, {"max_multiplicity": 2}, {"noise": 0.3}])
def test_sift_stops_by_its_own_rule(options: dict[str, Any]) -> None:
    pool, query = batch(torch.float64, b=6)
    chosen = hullkit.select(pool, query, "auto", method="sift", **options)
    stopped = hullkit.select(pool, query, 50, method="sift", alpha=0.08, **options)
    assert chosen.total is not None
    assert torch.equal(chosen.counts, stopped.counts)
    assert torch.equal(chosen.total, chosen.counts.sum(1))
    assert stopped.total is None
    assert chosen.total.min() < 50
    other = hullkit.select(pool, query, "auto", method="sift", alpha=0.5, max_total=9, **options)
    expected = hullkit.sift(pool, query, 9, alpha=0.5, **options)
    assert torch.equal(other.counts, expected.counts)


@given(
    specs(st.sampled_from(("clustered", "gaussian", "query_inside", "duplicates", "mixed_norms"))),
    st.sampled_from((None, 1, 2, 7)),
    st.sampled_from((1e-3, 0.02, 0.1, 1.0, 30.0)),
)
@fixed(150)
def test_properties(spec: Any, cap: int | None, alpha: float) -> None:
    """The total is on the ladder and first there; the counts are those of the two calls."""
    pool, query = spec.tensors()
    max_total = min(spec.total, spec.n * (cap or spec.total))
    options = {"max_multiplicity": cap, "exchange_passes": spec.exchange_passes}
    chosen = hullkit.select(pool, query, "auto", max_total=max_total, alpha=alpha, **options)
    assert chosen.total is not None
    assert chosen.residual_norm is None
    result, total = chosen.result, int(chosen.total)
    assert isinstance(result, hullkit.FrankWolfeResult)
    ladder = reference.ladder(max_total)
    assert total == reference.auto_total(float(result.residual_norm), max_total, alpha)
    assert total in ladder
    assert_counts(chosen.counts, total)
    assert int(chosen.counts.max()) <= (cap or total)
    whole = hullkit.select(pool, query, max_total, **options)
    for one, other in zip(result, whole.result, strict=True):
        assert torch.equal(one, other)
    counts = hullkit.round_multiplicities(pool, query, result, total, **options)
    assert torch.equal(chosen.counts, counts)
    more = hullkit.select(pool, query, "auto", max_total=max_total, alpha=alpha / 2, **options)
    assert more.total is not None
    assert int(more.total) >= total, "a smaller alpha never stops earlier"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 3])
def test_every_prompt_of_a_batch_has_its_own(dtype: torch.dtype, cap: int | None) -> None:
    pool, query = batch(dtype, b=12)
    query = query * torch.linspace(0.3, 4.0, 12)[:, None].to(dtype)
    options: dict[str, Any] = {"max_total": 20, "max_multiplicity": cap, "merge_duplicates": 1e-3}
    together = hullkit.select(pool, query, "auto", **options)
    assert together.total is not None
    assert len(together.total.unique()) >= 3
    assert torch.equal(together.counts.sum(1), together.total)
    for b in range(12):
        alone = hullkit.select(pool[b], query[b], "auto", **options)
        for field in ("indices", "counts", "rows", "total"):
            assert torch.equal(getattr(alone, field), getattr(together, field)[b])
    by_oracle = hullkit.select(pool, query, "auto", backend="reference", **options)
    if dtype is torch.float64:
        assert torch.equal(by_oracle.counts, together.counts)
        assert torch.equal(by_oracle.total, together.total)


def test_arrays_come_back_in_kind() -> None:
    pool, query = batch(torch.float32)
    chosen = hullkit.select(pool.numpy(), query.numpy(), "auto", candidates=None)
    assert isinstance(chosen.total, np.ndarray)
    np.testing.assert_array_equal(chosen.total, chosen.counts.sum(1))
