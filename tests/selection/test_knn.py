# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours by inner product: exact in float64, certified below."""

from __future__ import annotations

import math

import hullkit
import numpy as np
import pytest
import torch
from _cases import FAMILIES, LOW_PRECISION, TIED, Spec, batch, fixed, specs
from hullkit import reference
from hypothesis import given
from hypothesis import strategies as st


@given(specs(st.sampled_from(sorted(FAMILIES))), st.integers(1, 151))
@fixed(300)
def test_exact(spec: Spec, k: int) -> None:
    pool, query = spec.build()
    k = min(k, spec.n)
    result = hullkit.knn(torch.from_numpy(pool), torch.from_numpy(query), k)
    indices, values = reference.knn(pool, query, k)
    scale = np.linalg.norm(pool, axis=1).max() * np.linalg.norm(query)
    assert np.abs(result.values.numpy() - values).max() <= 1e-13 * scale
    if not np.array_equal(result.indices.numpy(), indices):
        assert spec.family in TIED
        assert spec.family not in ("integer_grid", "sign_vectors") or spec.scale != 1.0, "exact"
        products = pool.astype(np.longdouble) @ query
        apart = np.abs(products[result.indices.numpy()] - products[indices])
        assert apart.max() <= 1e-14 * scale
        assert len(set(result.indices.tolist())) == k


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_certified(dtype: torch.dtype) -> None:
    @fixed(100)
    @given(specs(st.sampled_from(sorted(FAMILIES))), st.integers(1, 50))
    def check(spec: Spec, k: int) -> None:
        pool, query = spec._replace(scale=1.0).tensors(dtype)
        k = min(k, spec.n)
        result = hullkit.knn(pool, query, k)
        products = pool.double() @ query.double()
        eps = torch.finfo(torch.float32).eps
        bound = spec.d * eps * float(pool.double().norm(dim=1).max() * query.double().norm())
        best = products.sort(descending=True).values[:k]
        assert (result.values - best).abs().max() <= bound
        assert (products[result.indices] - result.values).abs().max() <= bound
        assert len(set(result.indices.tolist())) == k
        assert (result.values[1:] <= result.values[:-1]).all()

    check()


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION])
def test_copies_come_in_index_order(dtype: torch.dtype) -> None:
    row = torch.from_numpy(np.random.default_rng(0).standard_normal(129)).to(dtype)
    for n in (1, 2, 63, 151):
        result = hullkit.knn(row.expand(n, -1), row, n)
        assert result.indices.tolist() == list(range(n))


def test_first_neighbour_is_the_lmo() -> None:
    pool, query = batch(torch.float32)
    nearest = hullkit.knn(pool, query, 3)
    assert torch.equal(nearest.indices[:, 0], hullkit.lmo(pool, -query).index)
    assert torch.equal(nearest.values[:, 0], -hullkit.lmo(pool, -query).value)


def test_padding_where_candidates_run_out() -> None:
    pool, query = batch(torch.float32, b=3, n=7)
    result = hullkit.knn(pool, query, 5, lengths=torch.tensor([7, 2, 5]))
    assert (result.indices[1, 2:] == -1).all()
    assert (result.values[1, 2:] == -math.inf).all()
    assert (result.indices[1, :2] >= 0).all()
    assert sorted(result.indices[2].tolist()) == [0, 1, 2, 3, 4]
    candidates = torch.tensor([-1, 4, -1, 2])
    result = hullkit.knn(pool[0], query[0], 4, candidates=candidates)
    assert set(result.indices[:2].tolist()) == {1, 3}
    assert result.indices[2:].tolist() == [-1, -1]
