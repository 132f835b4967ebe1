# SPDX-License-Identifier: Apache-2.0
"""Rows of any length: the fully corrective oracle's weights, and gap_tol where it is off."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hullkit
import numpy as np
import pytest
import torch
from _cases import FAMILIES, Spec, fixed, specs
from _programs import hull_optimum, scale_squared
from hullkit import reference
from hypothesis import given
from hypothesis import strategies as st


def solved(pool: np.ndarray, query: np.ndarray, **options: float) -> reference.FrankWolfeOutcome:
    return reference.frank_wolfe(pool, query, variant="fully_corrective", tol=0.0, **options)


@given(
    specs(st.sampled_from(sorted(FAMILIES)), sizes=(1, 2, 3, 30), dims=(1, 2, 17), scales=(1.0,)),
    st.sampled_from((1.0, 1.0, 0.21)),
)
@fixed(150)
def test_powers_of_two_change_no_bit(spec: Spec, max_weight: float) -> None:
    """Neither a sum nor a product rounds otherwise, so nothing may depend on the length of rows."""
    pool, query = spec.build()
    max_weight = max(max_weight, 1 / len(pool))
    base = solved(pool, query, max_weight=max_weight)
    assert abs(base.weights.sum() - 1) <= 1e-12
    for exponent in (-400, -40, 14, 40, 480):
        scale = 2.0**exponent
        ours = solved(scale * pool, scale * query, max_weight=max_weight)
        assert np.array_equal(ours.indices, base.indices)
        assert np.array_equal(ours.weights, base.weights)
        assert ours.residual_norm == scale * base.residual_norm
        assert (ours.num_iters, ours.status) == (base.num_iters, base.status)


@pytest.mark.parametrize("length", [1e-150, 1e-30, 1e4, 1e8, 1e150])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_optimum_at_any_length(family: str, length: float) -> None:
    """Duplicates and collinear rows among them, whose systems of equations are singular."""
    for seed in range(3):
        pool, query = FAMILIES[family](np.random.default_rng(seed), 30, 17)
        unit = scale_squared(pool, query)
        scale = length / unit**0.5
        outcome = solved(scale * pool, scale * query)
        assert outcome.status == "STALLED"
        assert (outcome.weights >= 0).all()
        assert abs(outcome.weights.sum() - 1) <= 1e-12
        objective = (outcome.residual_norm / scale) ** 2 / 2
        assert abs(objective - hull_optimum(pool, query)) <= 1e-9 * unit


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("variant", ["vanilla", "away", "pairwise", "fully_corrective"])
def test_no_gap_tol_at_any_length(variant: str, backend: str | None) -> None:
    """At the optimum of long rows a gap is less than any constant by rounding alone."""
    for seed in range(8):
        pool, query = FAMILIES["collinear"](np.random.default_rng(seed), 3, 2)
        result = hullkit.frank_wolfe(
            *map(torch.from_numpy, (1e10 * pool, 1e10 * query)),
            variant=variant,
            tol=0.0,
            backend=backend,
        )
        assert hullkit.Status(int(result.status)) is not hullkit.Status.GAP_TOL


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_of_the_factor_grows_with_its_rows() -> None:
    """20,000 rows could be freed, and their factor has 1.6 GB; about ten are."""
    script = """
import re, torch, hullkit
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10
pool = torch.randn(20_000, 8, dtype=torch.float64)
query, options = pool[:9].mean(0), {"variant": "fully_corrective"}
hullkit.frank_wolfe(pool, query, **options)
before = peak()
assert hullkit.frank_wolfe(pool, query, max_iters=10**5, **options).num_iters < 100
assert peak() - before < 30, peak() - before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
