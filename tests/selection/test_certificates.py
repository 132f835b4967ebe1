# SPDX-License-Identifier: Apache-2.0
"""float32, float16 and bfloat16: whatever path was taken, the result certifies itself."""

from __future__ import annotations

from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from _cases import FAMILIES, LOW_PRECISION, Spec, batch, fixed, specs
from _certificates import assert_counts, assert_simplex, reconstruction_loss
from hullkit import reference
from hypothesis import given
from hypothesis import strategies as st

EPS32 = torch.finfo(torch.float32).eps
SCALES = (1.0, 0.1)
VARIANTS = ("vanilla", "away", "pairwise", "fully_corrective")


def _family_names(dtype: torch.dtype) -> list[str]:
    """float16 ends at 65504, and "query_far" goes beyond."""
    return sorted(set(FAMILIES) - ({"query_far"} if dtype is torch.float16 else set()))


def _check(spec: Spec, dtype: torch.dtype) -> None:
    pool, query = spec.tensors(dtype)
    result = hullkit.frank_wolfe(pool, query, **spec.options)
    rows, target = pool.double().numpy(), query.double().numpy()  # the upcast inputs
    size = int(result.support_size)
    indices, weights = result.indices[:size].numpy(), result.weights[:size].numpy()
    assert len(set(indices)) == size
    assert ((indices >= 0) & (indices < spec.n)).all()
    assert (result.indices[size:] == -1).all()
    assert (result.weights[size:] == 0).all()
    assert (np.diff(weights) <= 0).all(), "by falling weight"
    assert_simplex(result.weights)

    # Residual and gap are those of the weights returned: one residual, rounded to float32 once.
    norms = np.linalg.norm(rows, axis=1).max() + np.linalg.norm(target)
    residual = target - weights @ rows[indices]
    length = float(np.linalg.norm(residual))
    assert abs(float(result.residual_norm) - length) <= 1e-12 * norms
    gap = float((rows @ residual).max() - residual @ (target - residual))
    bound = (spec.d + 2) * EPS32 * length * norms + 1e-12 * norms**2
    assert abs(float(result.dual_gap) - gap) <= bound

    # The gap bounds the suboptimality, and the objective is as good as the oracle's.
    f = length**2 / 2
    optimum = reference.frank_wolfe(rows, target, max_iters=2000, tol=0.0)
    assert float(result.dual_gap) >= f - optimum.residual_norm**2 / 2 - bound
    oracle = reference.frank_wolfe(rows, target, **spec.options)
    statuses = (hullkit.Status.CONVERGED.name, oracle.status)
    if hullkit.Status(int(result.status)) is hullkit.Status.CONVERGED:
        assert length < spec.options["tol"]
    elif statuses[1] != "MAX_SUPPORT" and spec.options["max_iters"] == 250:
        # Near-ties may send the paths apart, but both have run to their end.
        slack = max(oracle.dual_gap, float(result.dual_gap), 0.0)
        assert abs(f - oracle.residual_norm**2 / 2) <= slack + spec.d * EPS32 * norms**2

    counts = hullkit.round_multiplicities(
        pool, query, result, spec.total, exchange_passes=spec.exchange_passes
    )
    assert_counts(counts, spec.total)
    assert (counts[size:] == 0).all()
    exact = reference.round_multiplicities(
        rows[indices], target, weights, spec.total, spec.exchange_passes
    )
    if not np.array_equal(counts[:size].numpy(), exact):
        losses = [
            reconstruction_loss(rows[indices], target, c, spec.total)
            for c in (counts[:size].numpy(), exact)
        ]
        # A unit placed by float32 products may cost what those products cannot resolve, each unit.
        assert losses[0] - losses[1] <= spec.d * EPS32 * norms**2 * spec.total


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_result_certifies_itself(dtype: torch.dtype, variant: str) -> None:
    families = st.sampled_from(_family_names(dtype))

    @fixed(70)
    @given(specs(families, sizes=(1, 2, 3, 63, 129), scales=SCALES))
    def check(spec: Spec) -> None:
        _check(spec._replace(options={**spec.options, "variant": variant}), dtype)

    check()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("family", ["clustered", "gaussian", "duplicates", "query_inside"])
def test_thousand_rows(family: str, dtype: torch.dtype) -> None:
    _check(Spec(family, 1000, 384, 5, 1.0, {"max_support": 50, "max_iters": 250}, 50, 2), dtype)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_objective_reaches_the_oracles(dtype: torch.dtype) -> None:
    """Unit vectors, the usual case: on average over a batch, float32 arithmetic costs nothing."""
    pool, query = batch(dtype, b=16, n=200, d=384)
    result = hullkit.frank_wolfe(pool, query, max_support=50)
    exact = hullkit.frank_wolfe(pool, query, max_support=50, backend="reference")
    ratio = result.residual_norm / exact.residual_norm
    assert ratio.mean() <= 1 + 1e-3
    assert ratio.max() <= 1.02
    assert (result.dual_gap >= -1e-5).all()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("n", [3, 63, 151])
def test_copies_resolve_to_the_first(dtype: torch.dtype, n: int) -> None:
    """Planted ties are exact in every precision."""
    rng = np.random.default_rng(n)
    for d in (1, 17, 63, 129, 384):
        distinct = torch.from_numpy(rng.standard_normal((max(1, n // 3), d))).to(dtype)
        choice = torch.from_numpy(rng.integers(len(distinct), size=n))
        query = torch.from_numpy(rng.standard_normal(d)).to(dtype)
        result = hullkit.frank_wolfe(distinct[choice], query)
        for index in result.indices[: int(result.support_size)]:
            first = int((choice == choice[index]).nonzero()[0])
            assert int(index) == first


def _poisoned_rows(pool: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    pool = pool.clone()
    for entry, length in zip(pool, lengths, strict=True):
        entry[int(length) :] = float("nan")
    return pool


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION])
def test_rows_beyond_lengths_are_never_read(dtype: torch.dtype) -> None:
    pool, query = batch(dtype)
    lengths = torch.tensor([63, 1, 2, 40, 62])
    poisoned = _poisoned_rows(pool, lengths)

    def run(rows: torch.Tensor) -> list[Any]:
        result = hullkit.frank_wolfe(rows, query, lengths=lengths)
        return [
            *result,
            *hullkit.lmo(rows, query, lengths=lengths),
            *hullkit.knn(rows, query, 5, lengths=lengths),
            hullkit.round_multiplicities(rows, query, result, 20),
        ]

    for clean, other in zip(run(pool), run(poisoned), strict=True):
        assert torch.equal(clean, other)
