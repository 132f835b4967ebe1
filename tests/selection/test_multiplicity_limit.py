# SPDX-License-Identifier: Apache-2.0
"""Counts with a limit, the optimum of small roundings by exhaustion, and what rounding costs."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from _cases import DTYPES, Array, batch, clustered, fixed, specs
from _certificates import assert_counts, kernel_outcome, reconstruction_loss
from hullkit import reference
from hypothesis import given
from hypothesis import strategies as st


def _round(pool: Array, query: Array, outcome: Any, total: int, **options: Any) -> Any:
    support = SimpleNamespace(
        indices=torch.tensor(outcome.indices), weights=torch.tensor(outcome.weights)
    )
    tensors = torch.from_numpy(pool), torch.from_numpy(query)
    counts = hullkit.round_multiplicities(*tensors, support, total, **options)
    assert_counts(counts, total)
    return counts.numpy()


def _compositions(size: int, total: int) -> Array:
    """Every c >= 0 of this size with this sum."""
    bars = np.array(list(combinations(range(total + size - 1), size - 1)))
    ends = np.full((len(bars), 1), total + size - 1)
    return np.diff(np.hstack([-np.ones((len(bars), 1)), bars, ends])) - 1


@pytest.mark.parametrize("limit", [None, 3])
def test_greedy_and_exchange_are_nearly_always_optimal(limit: int | None) -> None:
    """Against every composition, on clustered pools: seldom improvable, and then by little."""
    of_size = {size: _compositions(size, 10) for size in range(4, 7)}
    improvable, excess = 0, []
    for seed in range(150):
        pool, query = clustered(np.random.default_rng(seed), 60, 64)
        outcome = kernel_outcome(pool, query, max_support=6)
        support = pool[outcome.indices]
        compositions = of_size[len(support)]
        differences = query - compositions / 10 @ support
        losses = (differences**2).sum(1)
        if limit is not None:
            losses = losses[compositions.max(1) <= limit]
        counts = _round(pool, query, outcome, 10, max_multiplicity=limit)
        loss = reconstruction_loss(support, query, counts, 10)
        assert loss >= losses.min() - 1e-12
        improvable += loss > losses.min() + 1e-12
        excess.append(np.sqrt(loss / losses.min()) - 1)
    assert improvable <= 15
    assert np.mean(excess) <= 1e-3
    assert max(excess) <= 0.02


@given(
    specs(st.sampled_from(("clustered", "gaussian", "query_inside")), sizes=(3, 63)),
    st.sampled_from((1, 2, 3, 7)),
    st.booleans(),
)
@fixed(150)
def test_limited_counts_equal_the_oracles(spec: Any, limit: int, own: bool) -> None:
    """From weights with the same cap (own), and from weights that know of none."""
    pool, query = spec.build()
    total = min(spec.total, limit * spec.n)
    cap = min(1.0, limit / total) if own else 1.0
    outcome = kernel_outcome(pool, query, variant="fully_corrective", max_weight=cap, max_iters=500)
    total = min(total, limit * len(outcome.indices))
    options = {"exchange_passes": spec.exchange_passes, "max_multiplicity": limit}
    counts = _round(pool, query, outcome, total, **options)
    assert counts.max() <= limit
    expected = reference.round_multiplicities(
        pool[outcome.indices], query, outcome.weights, total, **options
    )
    losses = [
        reconstruction_loss(pool[outcome.indices], query, c, total) for c in (counts, expected)
    ]
    scale = float((pool**2).sum(1).max() + query @ query)
    # Copies, and vertices that tie: as good.
    assert np.array_equal(counts, expected) or abs(losses[0] - losses[1]) <= 1e-12 * scale


def test_weights_at_the_cap_are_whole_quotas() -> None:
    """1 / total, divided by the sum of all, is less in some totals: no unit is lost by that, not
    even to a point that is the query itself."""
    short = 0
    for total in range(2, 60):
        pool, query = clustered(np.random.default_rng(total), total, 17)
        weights = np.append(np.full(total, 1 / total), 0.0)
        outcome = SimpleNamespace(indices=np.arange(total + 1), weights=weights)
        points = np.concatenate([pool, query[None]])
        counts = _round(points, query, outcome, total, max_multiplicity=1, exchange_passes=0)
        assert counts.tolist() == [1] * total + [0]
        short += bool((reference.quotas(weights, total)[:total] < 1).any())
    assert short >= 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [1, 2, 5, 20, 50])
def test_select_with_a_limit(dtype: torch.dtype, limit: int) -> None:
    pool, query = batch(dtype, b=4)
    chosen = hullkit.select(pool, query, 20, max_multiplicity=limit)
    assert_counts(chosen.counts, 20)
    assert int(chosen.counts.max()) <= limit
    variant = "fully_corrective" if limit < 20 else "vanilla"
    result = hullkit.frank_wolfe(
        pool,
        query,
        max_support=40 if limit < 20 else 20,
        variant=variant,
        max_weight=min(1.0, limit / 20),
    )
    for one, other in zip(chosen.result, result, strict=True):
        assert torch.equal(one, other)
    counts = hullkit.round_multiplicities(pool, query, result, 20, max_multiplicity=limit)
    assert torch.equal(chosen.counts, counts)
    if limit >= 20:
        assert torch.equal(chosen.counts, hullkit.select(pool, query, 20).counts)
    for example in chosen.counts:
        schedule = hullkit.reuse_schedule(example[example > 0].tolist(), refresh_interval=limit)
        assert len(schedule) == int((example > 0).sum()), "one pass an example"


@pytest.mark.parametrize("backend", [None, "reference"])
def test_too_few_for_the_limit(backend: str | None) -> None:
    pool, query = batch(torch.float32, b=2, n=9, d=5)
    with pytest.raises(ValueError, match=r"max_multiplicity: .* total / 9 .* 9 candidates, got 2"):
        hullkit.select(pool, query, 20, max_multiplicity=2, backend=backend)
    lengths = torch.tensor([9, 4])
    with pytest.raises(
        ValueError, match=r"max_multiplicity: .* 5 .* over the 4 candidates of entry 1"
    ):
        hullkit.select(pool, query, 20, max_multiplicity=3, lengths=lengths, backend=backend)
    result = hullkit.frank_wolfe(pool, query, max_support=3)
    with pytest.raises(ValueError, match=r"max_multiplicity: .* / 3 .* 3 support points, got 6"):
        hullkit.round_multiplicities(pool, query, result, 20, max_multiplicity=6, backend=backend)
    short = result._replace(indices=torch.tensor([[0, 1, 2], [0, -1, -1]]))
    with pytest.raises(ValueError, match=r"over the 1 support points of entry 1, got 19"):
        hullkit.round_multiplicities(pool, query, short, 20, max_multiplicity=19, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_after_rounding(dtype: torch.dtype) -> None:
    """The residual of the counts, from the rows: right near 0, where products are too coarse."""
    pool, query = batch(dtype, b=6, n=63, d=33)
    query[0] = pool[0, 5]
    query[1] = ((pool[1, 2].double() + pool[1, 7].double()) / 2).to(dtype)
    for limit in (None, 3):
        chosen = hullkit.select(pool, query, 20, max_multiplicity=limit)
        assert chosen.residual_norm is not None
        for b in range(6):
            used = chosen.counts[b] > 0
            rows = pool[b].double()[chosen.rows[b, used]]
            shares = chosen.counts[b, used].double() / 20
            expected = float((query[b].double() - shares @ rows).norm())
            assert abs(float(chosen.residual_norm[b]) - expected) <= 2e-7
    assert float(hullkit.select(pool, query, 20).residual_norm[0]) <= 1e-12
    assert hullkit.select(pool, query, 5, method="knn").residual_norm is None


def test_a_cap_on_a_heavy_row_leaves_much_to_be_added() -> None:
    """Steps grow with the logarithm of the total: one by one, the last total would take hours."""
    rng = np.random.default_rng(0)
    weights = np.array([1.0, 1e-3, 1e-9, 0.0, 0.0, 0.0])
    outcome = SimpleNamespace(indices=np.arange(6), weights=weights)
    for _ in range(10):
        pool, query = rng.standard_normal((6, 4)), rng.standard_normal(4)
        losses = []
        for total in (10**4, 10**6, 2**40):
            limit = total // 2 + 1
            counts = _round(pool, query, outcome, total, max_multiplicity=limit)
            assert counts.max() <= limit
            if total < 2**40:  # where rounding decides nothing
                expected = reference.round_multiplicities(pool, query, weights, total, 2, limit)
                assert np.array_equal(counts, expected)
            losses.append(reconstruction_loss(pool, query, counts, total))
        assert losses[2] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("total", "limit"), [(2**40, 2**40 - 1), (10**12 + 7, 10**12 + 6), (2**40, 2**39 - 1)]
)
@pytest.mark.parametrize("variant", ["vanilla", "pairwise", "fully_corrective"])
def test_a_limit_just_below_the_total_holds(
    total: int, limit: int, variant: str, backend: str | None
) -> None:
    """The limit as a share of the total is 1, or a half, to within 1e-12."""
    pool = torch.eye(4, dtype=torch.float64)
    chosen = hullkit.select(
        pool, pool[1], total, max_multiplicity=limit, variant=variant, backend=backend
    )
    assert int(chosen.counts.sum()) == total
    assert int(chosen.counts.max()) == limit


def test_weights_that_meet_their_bounds_together_leave_together() -> None:
    """The first steps swap a row at the cap for one at 0, and rounding would name one of them."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        pool = rng.standard_normal((40, 16))
        pool /= np.linalg.norm(pool, axis=1, keepdims=True)
        tensors = torch.from_numpy(pool), torch.from_numpy(rng.standard_normal(16) / 4)
        options = {"max_multiplicity": 3, "max_iters": 3}
        ours = hullkit.select(*tensors, 24, **options)
        wanted = hullkit.select(*tensors, 24, backend="reference", **options)
        assert ours.rows.tolist() == wanted.rows.tolist()
        assert ours.counts.tolist() == wanted.counts.tolist()
        assert ours.result.weights.tolist() == pytest.approx(wanted.result.weights.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_residual_far_from_the_origin(dtype: torch.dtype) -> None:
    """It is a small difference of large products, which float32 rounds."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        far = torch.randn(16, generator=generator) * 10
        pool = (torch.randn(4, 16, generator=generator) + far).to(dtype)
        query = (pool.float().mean(0) + 0.05 * torch.randn(16, generator=generator)).to(dtype)
        chosen = hullkit.select(pool, query, 38)
        shares = chosen.counts.double() / 38
        left = query.double() - shares @ pool.double()[chosen.rows.clamp(min=0)]
        assert float(chosen.residual_norm) == pytest.approx(float(left.norm()), rel=1e-5)
