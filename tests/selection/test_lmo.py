# SPDX-License-Identifier: Apache-2.0
"""The linear minimisation oracle: exact in float64, certified below."""

from __future__ import annotations

import hullkit
import numpy as np
import pytest
import torch
from _cases import DIMS, FAMILIES, LOW_PRECISION, SIZES, TIED, Spec, fixed, specs
from hullkit import reference
from hypothesis import given
from hypothesis import strategies as st


@given(specs(st.sampled_from(sorted(FAMILIES))))
@fixed(300)
def test_exact(spec: Spec) -> None:
    pool, direction = spec.build()
    result = hullkit.lmo(torch.from_numpy(pool), torch.from_numpy(direction))
    index, value = reference.lmo(pool, direction)
    scale = np.linalg.norm(pool, axis=1).max() * np.linalg.norm(direction)
    assert abs(float(result.value) - value) <= 1e-13 * scale
    if int(result.index) != index:
        assert spec.family in TIED
        assert spec.family not in ("integer_grid", "sign_vectors") or spec.scale != 1.0, "exact"
        products = pool.astype(np.longdouble) @ direction
        assert products[int(result.index)] - products.min() <= 1e-14 * scale


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_certified(dtype: torch.dtype) -> None:
    @fixed(100)
    @given(specs(st.sampled_from(sorted(FAMILIES))))
    def check(spec: Spec) -> None:
        pool, direction = spec._replace(scale=1.0).tensors(dtype)
        result = hullkit.lmo(pool, direction)
        wide, vector = pool.double(), direction.double()
        products = wide @ vector
        eps = torch.finfo(torch.float32).eps
        bound = spec.d * eps * float(wide.norm(dim=1).max() * vector.norm())
        assert products[result.index] - products.min() <= bound
        assert abs(result.value - products.min()) <= bound

    check()


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION])
@pytest.mark.parametrize("n", [*SIZES, 1000])
def test_lowest_index_on_a_tie(dtype: torch.dtype, n: int) -> None:
    """Equal rows give equal bits wherever they stand, so the first one wins."""
    for d in DIMS:
        rng = np.random.default_rng(n * 1000 + d)
        row = torch.from_numpy(rng.standard_normal(d)).to(dtype)
        direction = torch.from_numpy(rng.standard_normal(d)).to(dtype)
        assert int(hullkit.lmo(row.expand(n, d), direction).index) == 0
        sign = -1 if float(row.double() @ direction.double()) > 0 else 1
        worse = row.expand(n, d).clone() * -sign
        first = n // 2
        worse[first:] = row * sign
        assert int(hullkit.lmo(worse, direction).index) == first


def test_zero_direction_answers_the_first() -> None:
    result = hullkit.lmo(torch.randn(63, 17), torch.zeros(17))
    assert (int(result.index), float(result.value)) == (0, 0.0)


@pytest.mark.parametrize("batch", [1, 3])
def test_positions_count_those_without_a_candidate(batch: int) -> None:
    candidates = torch.tensor([-1, 2, -1, 0]).expand(batch, 4)
    result = hullkit.lmo(torch.eye(3), -torch.eye(3)[:1].expand(batch, 3), candidates=candidates)
    assert result.index.tolist() == [3] * batch
