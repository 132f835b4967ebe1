# SPDX-License-Identifier: Apache-2.0
"""Frank-Wolfe in float64: the oracle's path, step for step."""

from __future__ import annotations

import hullkit
import numpy as np
import pytest
import torch
from _cases import GENERIC, TIED, Spec, clustered, fixed, specs
from _certificates import (
    assert_exact,
    assert_same_path_or_tie,
    differences,
    kernel_outcome,
    length_scale,
    oracle_outcome,
)
from hypothesis import given
from hypothesis import strategies as st

EXAMPLES = 120  # for each of 11 generic and 8 tied families: 2,280


@pytest.mark.parametrize("family", GENERIC)
def test_exact(family: str) -> None:
    ran = []

    @fixed(EXAMPLES)
    @given(specs(family))
    def check(spec: Spec) -> None:
        assert_exact(*spec.build(), **spec.options)
        ran.append(spec)

    check()
    assert len(ran) >= EXAMPLES


@pytest.mark.parametrize("family", TIED)
def test_exact_or_tie(family: str) -> None:
    same = []

    @fixed(EXAMPLES)
    @given(specs(family))
    def check(spec: Spec) -> None:
        same.append(assert_same_path_or_tie(*spec.build(), **spec.options))

    check()
    assert len(same) >= EXAMPLES
    assert sum(same) >= 0.8 * len(same), "ties are the exception even where they are planted"


@pytest.mark.parametrize("family", ["gaussian", "clustered", "duplicates", "query_inside"])
@pytest.mark.parametrize("d", [17, 384])
def test_thousand_rows(family: str, d: int) -> None:
    spec = Spec(family, 1000, d, seed=d, scale=1.0, options={"max_support": 50}, total=50,
                exchange_passes=2)  # fmt: skip
    assert_exact(*spec.build(), **spec.options)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pool_norm", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("query_norm", [0.0, 1e-3, 1.0])
def test_short_query_inside_a_large_pool(seed: int, pool_norm: float, query_norm: float) -> None:
    """The residual is far smaller than the vertices whose products it is the difference of."""
    rng = np.random.default_rng(seed)
    for d in (1, 2):
        for _ in range(10):
            pool = pool_norm * rng.standard_normal((129, d))
            query = query_norm * rng.standard_normal(d)
            assert_exact(pool, query)


@pytest.mark.parametrize("tol", [1e-3, 1e-4])
def test_large_vertices_around_a_small_one(tol: float) -> None:
    """A vertex next to the iterate, both far shorter than the vertices that led there."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pool = np.concatenate(
            [1e3 * rng.standard_normal((20, 2)), 1e-2 * rng.standard_normal((5, 2))]
        )
        assert_same_path_or_tie(pool, 1e-2 * rng.standard_normal(2), tol=tol, max_iters=50)


@given(
    st.sampled_from(["clustered", "gaussian", "integer_grid"]),
    st.integers(2, 151),
    st.integers(0, 2**32 - 1),
)
@fixed(60)
def test_copies_of_a_row_resolve_to_the_first(family: str, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool, query = Spec(family, n, 17, seed, 1.0, {}, 1, 0).build()
    pool = pool[rng.integers(n, size=n)]
    _, first = np.unique(pool, axis=0, return_index=True)
    outcome = kernel_outcome(pool, query)
    assert set(outcome.indices) <= set(first)


def test_duplicated_pool_changes_nothing() -> None:
    """Appending a copy of every row leaves the path as it was, to the bit."""
    pool, query = clustered(np.random.default_rng(0), 63, 129)
    once = kernel_outcome(pool, query)
    twice = kernel_outcome(np.concatenate([pool, pool]), query)
    for left, right in zip(once, twice, strict=True):
        np.testing.assert_array_equal(left, right)


def test_scale_equivariance() -> None:
    """Powers of two are exact: the path does not change when everything grows by one."""
    pool, query = clustered(np.random.default_rng(1), 129, 64)
    base = kernel_outcome(pool, query, tol=0.0, max_iters=100)
    for power in (-4, 3):
        factor = 2.0**power
        scaled = kernel_outcome(factor * pool, factor * query, tol=0.0, max_iters=100)
        np.testing.assert_array_equal(scaled.indices, base.indices)
        np.testing.assert_array_equal(scaled.weights, base.weights)


@pytest.mark.parametrize("max_iters", [0, 1, 5, 250])
@pytest.mark.parametrize("max_support", [None, 1, 2, 7])
@pytest.mark.parametrize("n", [1, 2, 3, 63])
def test_width_and_status(n: int, max_support: int | None, max_iters: int) -> None:
    pool, query = clustered(np.random.default_rng(n), n, 17)
    result = hullkit.frank_wolfe(
        torch.from_numpy(pool),
        torch.from_numpy(query),
        max_support=max_support,
        max_iters=max_iters,
    )
    limit = n if max_support is None else min(n, max_support)
    assert result.indices.shape == result.weights.shape == (min(limit, max_iters + 1),)
    assert 1 <= int(result.support_size) <= limit
    assert 0 <= int(result.num_iters) <= max_iters
    status = hullkit.Status(int(result.status))
    if status is hullkit.Status.MAX_SUPPORT:
        assert int(result.support_size) == max_support
    if status is hullkit.Status.MAX_ITERS:
        assert int(result.num_iters) == max_iters
    if max_support == 1:
        assert status is hullkit.Status.MAX_SUPPORT
        assert result.weights.tolist() == [1.0]


def test_statuses_are_reached() -> None:
    pool, query = clustered(np.random.default_rng(3), 63, 17)
    assert kernel_outcome(pool, pool[5]).status == "CONVERGED"
    assert kernel_outcome(pool, query, max_support=3).status == "MAX_SUPPORT"
    assert kernel_outcome(pool, query, tol=0.0, max_iters=4).status == "MAX_ITERS"
    assert kernel_outcome(pool[:1], query).status == "STALLED"
    assert kernel_outcome(pool, query, tol=float("inf")).num_iters == 0


def test_a_support_of_one_asks_for_no_norm() -> None:
    pool = torch.tensor([[1e25, 0.0], [2e25, 0.0]])  # squared norms beyond float32
    query = torch.tensor([1.0, 0.0])
    assert hullkit.frank_wolfe(pool, query, max_support=1).indices.tolist() == [1]
    assert hullkit.frank_wolfe(pool / 1e24, 1e25 * query, max_support=1).indices.tolist() == [1]
    with pytest.raises(ValueError, match="scale the embeddings down"):
        hullkit.frank_wolfe(pool, query, max_support=2)


def test_tie_judge_refuses_a_worse_vertex(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper that forgives ties must not forgive a wrong answer."""
    pool, query = clustered(np.random.default_rng(4), 63, 17)
    assert_same_path_or_tie(pool, query)
    wrong = pool.copy()
    wrong[oracle_outcome(pool, query).indices[1]] *= 1.001

    def off_path(_: object, *args: object, **options: object) -> object:
        return kernel_outcome(wrong, *args, **options)  # type: ignore[arg-type]

    scale = length_scale(pool, query)
    assert differences(off_path(pool, query), oracle_outcome(pool, query), scale)  # type: ignore[arg-type]
    monkeypatch.setattr("_certificates.kernel_outcome", off_path)
    monkeypatch.setattr("_certificates._PROCEDURES", (off_path, oracle_outcome))
    with pytest.raises(AssertionError):
        assert_same_path_or_tie(pool, query)
