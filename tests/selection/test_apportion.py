# SPDX-License-Identifier: Apache-2.0
"""Largest-remainder apportionment: the oracle's counts, and its defining properties."""

from __future__ import annotations

import hullkit
import numpy as np
import pytest
import torch
from _cases import TOTALS, fixed
from _certificates import assert_counts
from hullkit import reference
from hypothesis import given
from hypothesis import strategies as st

_WEIGHTS = st.one_of(
    st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=60),
    st.lists(st.integers(0, 5).map(float), min_size=1, max_size=60),  # planted ties
    st.lists(st.floats(-1, 1e6), min_size=1, max_size=20),
    st.tuples(st.integers(1, 151), st.floats(1e-6, 1e3)).map(lambda t: [t[1]] * t[0]),
)


@given(_WEIGHTS, st.sampled_from((*TOTALS, 1000, 10**6, 2**40)))
@fixed(500)
def test_exact(weights: list[float], total: int) -> None:
    values = np.array(weights)
    counts = hullkit.apportion(torch.from_numpy(values), total)
    np.testing.assert_array_equal(counts.numpy(), reference.apportion(values, total))
    assert_counts(counts, total)
    # Quota rule: within one of total * w_i / sum w.
    quota = reference.quotas(values, total)
    assert (np.abs(counts.numpy() - quota) < 1 + 1e-9 * total).all()


@pytest.mark.parametrize("total", TOTALS)
def test_ties_go_to_the_lowest_index(total: int) -> None:
    for size in (1, 2, 3, 63, 151):
        counts = hullkit.apportion(torch.ones(size), total)
        whole, extra = divmod(total, size)
        if np.floor(total * (1.0 / size)) == whole:  # 49 * (1 / 49) is below 1
            assert counts.tolist() == [whole + 1] * extra + [whole] * (size - extra)
        assert_counts(counts, total)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    weights = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.from_numpy(
        np.stack([reference.apportion(row.double().numpy(), 20) for row in weights])
    )
    assert torch.equal(hullkit.apportion(weights, 20), expected)
    assert torch.equal(hullkit.apportion(weights.t().contiguous().t(), 20), expected)
    assert torch.equal(hullkit.apportion(weights[2], 20), expected[2])
    doubled = torch.stack([weights, weights], -1).flatten(1)
    assert torch.equal(hullkit.apportion(doubled[:, ::2], 20), expected)
    assert torch.equal(hullkit.apportion(weights[1].expand(3, 9), 20), expected[1].expand(3, 9))


def test_empty_batch() -> None:
    assert hullkit.apportion(torch.zeros(0, 4), 3).shape == (0, 4)


def test_gradients_are_no_obstacle() -> None:
    weights = torch.rand(5, requires_grad=True)
    assert hullkit.apportion(weights, 7).sum() == 7


def test_rounding_of_the_sum_never_costs_a_unit() -> None:
    """Many small weights after a large one: their sum and every quota are rounded."""
    rng = np.random.default_rng(0)
    for size in (100, 3000):
        for total in (10**6, 2**40):
            weights = np.concatenate([[1.0], rng.uniform(0, 1e-9, size)])
            assert_counts(hullkit.apportion(torch.from_numpy(weights), total), total)
