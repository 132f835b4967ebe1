# SPDX-License-Identifier: Apache-2.0
"""STALLED promises the optimum up to rounding: of what the iterate consists of, not of rows that
lost their weight or of coordinates that no row uses. Vanilla also stops at short directions."""

from __future__ import annotations

import hullkit
import numpy as np
import pytest
import torch
from _cases import FAMILIES, Array, unit
from _gpu import to
from hullkit import Status
from torch import Tensor

VARIANTS = ("vanilla", "away", "pairwise", "fully_corrective")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# Products are sums of float32 for these; on a GPU float32 is multiplied in float64.
ROUGH = (torch.float32, torch.bfloat16)


def _long_row(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    """The first row that a run touches is long, and the optimum needs it hardly or not at all."""
    pool = unit(rng.standard_normal((n, d)))
    weights = np.zeros(n)
    weights[: n // 4] = rng.random(n // 4)
    query = weights @ pool / weights.sum()
    towards = query + rng.choice([0.06, 0.6]) * rng.standard_normal(d)
    pool[-1] = 10.0 ** rng.uniform(1, 4) * unit(towards)
    return pool, query


def _off_plane(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    """The query is far away along a coordinate that is 0 in every row."""
    pool, query = _long_row(rng, n, d)
    pool[:, 0], query[0] = 0.0, 10.0 ** rng.uniform(0, 4)
    return pool, query


PROBLEMS = {**FAMILIES, "long_row": _long_row, "off_plane": _off_plane}


def _rounding(result: hullkit.FrankWolfeResult, pool: Tensor, query: Tensor) -> float:
    """Of the objective: 2e-7 of the products that the iterate consists of, and a few float64."""
    rows, weights = pool[result.indices.clamp_min(0)], result.weights
    length = float(weights @ rows.norm(dim=1))
    base = float(weights @ (rows @ query).abs())
    return 2e-7 * max(length**2, base) + 1e-13 * float(query @ query)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*ROUGH, torch.float64])
@pytest.mark.parametrize("max_weight", [1.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stalled_is_optimal(
    variant: str, max_weight: float, dtype: torch.dtype, device: str
) -> None:
    if variant == "away" and max_weight < 1:
        pytest.skip("no cap")
    stalled = 0
    for family in PROBLEMS:
        for seed in range(6):
            pool, query = (
                torch.from_numpy(array).to(dtype)
                for array in PROBLEMS[family](np.random.default_rng(seed), 63, 65)
            )
            options = {"max_iters": 1000, "tol": 0.0, "max_weight": max_weight}
            result = to(
                hullkit.frank_wolfe(pool.to(device), query.to(device), variant=variant, **options),
                "cpu",
            )
            status = Status(int(result.status))
            assert status is not Status.BROKEN
            if variant == "fully_corrective":
                assert status is Status.STALLED, family
            if status is not Status.STALLED:
                continue
            stalled += 1
            pool, query = pool.double(), query.double()
            best = hullkit.frank_wolfe(pool, query, variant="fully_corrective", **options)
            excess = float(result.residual_norm.square() - best.residual_norm.square()) / 2
            assert excess <= _rounding(result, pool, query), (family, seed)
    assert stalled >= len(PROBLEMS) // 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUGH)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_long_row_that_has_left(variant: str, dtype: torch.dtype, device: str) -> None:
    """A row a thousand times as long as the others comes first and leaves: the run goes on as far
    as it does in float64."""
    generator = torch.Generator().manual_seed(1)
    normalize = torch.nn.functional.normalize
    pool = normalize(torch.randn(200, 64, generator=generator), dim=1)
    weights = torch.rand(200, generator=generator)
    weights[30:] = 0
    query = weights / weights.sum() @ pool
    pool[199] = 1000 * normalize(query + torch.randn(64, generator=generator) / 16, dim=0)
    pool, query = pool.to(device, dtype), query.to(device, dtype)

    options = {"variant": variant, "max_iters": 1000, "tol": 1e-4}
    one = hullkit.frank_wolfe(pool, query, **options)
    exact = hullkit.frank_wolfe(pool.double(), query.double(), **options)
    assert one.status == exact.status
    assert one.residual_norm <= max(1.2 * float(exact.residual_norm), 1e-4)
    if variant == "fully_corrective":
        assert Status(int(one.status)) is Status.CONVERGED

    chosen = hullkit.select(pool, query, 50, max_multiplicity=4)
    best = hullkit.select(pool.double(), query.double(), 50, max_multiplicity=4)
    assert Status(int(chosen.result.status)) is Status.CONVERGED
    assert torch.equal(chosen.rows[chosen.counts > 0], best.rows[best.counts > 0])


@pytest.mark.parametrize("variant", ["away", "pairwise", "fully_corrective"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(None, torch.float64), ("reference", torch.float64), (None, torch.float32)],
)
def test_a_query_far_off_the_plane_of_the_rows(
    backend: str | None, dtype: torch.dtype, variant: str
) -> None:
    """The coordinate that no row uses changes no product, so it must not change what is found."""
    pool, query = FAMILIES["clustered"](np.random.default_rng(3), 63, 65)
    pool[:, 0], query[0] = 0.0, 1e5
    result = hullkit.frank_wolfe(
        *(torch.from_numpy(array).to(dtype) for array in (pool, query)),
        variant=variant,
        max_iters=2000,
        backend=backend,
    )
    assert Status(int(result.status)) is Status.STALLED
    # Float64 sums with the query are right to about 1e-16 of its length, and gains below 1e-14 of
    # it count as rounding.
    assert result.dual_gap <= (2e-9 if dtype is torch.float64 else 1e-6)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_vanilla_stops_early_for_short_embeddings(variant: str, backend: str | None) -> None:
    """Where a direction is shorter than 1e-6, as `Status` says; others are at the optimum."""
    rng = np.random.default_rng(0)
    pool = torch.from_numpy(1e-7 * rng.standard_normal((20, 8)))
    found = hullkit.frank_wolfe(
        pool, pool[:5].mean(0), tol=0.0, variant=variant, max_iters=5000, backend=backend
    )
    assert Status(int(found.status)) is Status.STALLED
    assert (found.dual_gap / 1e-14 > 1.0) == (variant == "vanilla")
