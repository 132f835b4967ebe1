# SPDX-License-Identifier: Apache-2.0
"""Rules of a single Frank-Wolfe step: ties, thresholds met exactly, and what float32 cannot see."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
from hullkit import Status

VARIANTS = ["vanilla", "away", "pairwise", "fully_corrective"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tol_is_to_be_undercut_and_gap_tol_to_be_met(variant: str) -> None:
    """At a vertex that equals the query residual and dual gap are exactly 0."""
    pool = torch.eye(3, dtype=torch.float64)
    result = hullkit.frank_wolfe(pool, pool[1], tol=0.0, max_iters=3, variant=variant)
    assert (result.residual_norm, result.dual_gap) == (0.0, 0.0)
    assert result.status == (Status.MAX_ITERS if variant == "vanilla" else Status.STALLED)
    result = hullkit.frank_wolfe(pool, pool[1], tol=0.0, gap_tol=0.0, variant=variant)
    assert result.status == Status.GAP_TOL


def _equals_oracle(pool: list[list[float]], query: list[float], **options: Any) -> None:
    tensors = torch.tensor(pool, dtype=torch.float64), torch.tensor(query, dtype=torch.float64)
    result = hullkit.frank_wolfe(*tensors, **options)
    oracle = hullkit.frank_wolfe(*tensors, **options, backend="reference")
    assert result.indices.tolist() == oracle.indices.tolist()
    torch.testing.assert_close(result.weights, oracle.weights, rtol=0.0, atol=1e-12)
    assert result.status == oracle.status


@pytest.mark.parametrize("variant", ["pairwise", "fully_corrective"])
def test_weight_is_taken_from_the_lowest_of_two_that_are_equally_bad(variant: str) -> None:
    """Both were touched as the run began, the higher index first."""
    pool = [[-1.0, 0.0], [0.0, -2.0], [-1.0, 1.0]]
    _equals_oracle(pool, [0.5, 0.5], variant=variant, max_weight=0.5, max_iters=1)


def test_a_step_that_gains_as_much_either_way_goes_forward() -> None:
    pool = [[1.0, -1.0, -1.0], [0.0, 2.0, 0.0], [2.0, -2.0, 2.0], [2.0, -1.0, -1.0]]
    _equals_oracle(pool, [2.0, 0.0, 0.0], variant="away", max_iters=3)


def test_the_best_vertex_of_a_capped_start_is_zero() -> None:
    """Its squared norm is no scale for the factor."""
    pool, query = torch.tensor([[0.0], [0.0], [1.0], [-1.0], [1.0]]), torch.zeros(1)
    result = hullkit.frank_wolfe(pool, query, variant="fully_corrective", max_weight=0.3)
    assert result.residual_norm < 1e-12
    assert result.weights[:4].tolist() == pytest.approx([0.3, 0.3, 0.2, 0.2], abs=1e-12)


def test_a_last_correction_where_rows_differ_in_length() -> None:
    """No vertex is left to enter, but the weights are not yet the best of those that are free."""
    pool = torch.tensor(
        [
            [-0.9086731231253482, -1.9918382111213646],
            [0.0009716229819862014, 1.6657300576047057e-05],
            [2057.3134494682813, -7835.948765056134],
        ],
        dtype=torch.float64,
    )
    query = torch.tensor([-1.2182388148769023, -5.558634579022823], dtype=torch.float64)
    result = hullkit.frank_wolfe(pool, query, variant="fully_corrective")
    assert result.status == Status.STALLED
    assert result.dual_gap < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_sees_that_it_has_converged(variant: str) -> None:
    """Products of float32 are wrong by more than the squared residual between two vertices."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        pool = torch.randn(2, 384, generator=generator)
        pool /= pool.norm(dim=1, keepdim=True)
        result = hullkit.frank_wolfe(pool, pool.mean(0), tol=1e-5, max_iters=3, variant=variant)
        assert result.status == Status.CONVERGED, result


def test_every_capped_step_may_touch_as_many_rows_as_it_moves_to() -> None:
    """More than one for each iteration: all have their place."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(64, 48, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {"max_weight": 1 / 8, "max_iters": 2}
    result = hullkit.frank_wolfe(pool, pool.mean(0), **options)
    oracle = hullkit.frank_wolfe(pool, pool.mean(0), **options, backend="reference")
    assert result.support_size == oracle.support_size > 20
    torch.testing.assert_close(result.dual_gap, oracle.dual_gap)
