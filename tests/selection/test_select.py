# SPDX-License-Identifier: Apache-2.0
"""`select`, and the oracle behind `backend="reference"`, in every shape an argument may take."""

from __future__ import annotations

from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from _cases import DTYPES, batch
from _certificates import assert_counts
from hullkit import reference
from torch import Tensor

CANDIDATES = torch.tensor([[4, -1, 9, 9, 30], [-1, -1, 62, 0, 1], [5, 6, 7, 8, 2]])


def _shapes() -> dict[str, dict[str, Any]]:
    pool, query = batch(torch.float64, b=3)
    lengths = torch.tensor([63, 2, 17])
    return {
        "unbatched": {"pool": pool[0], "query": query[0]},
        "unbatched ragged": {"pool": pool[0], "query": query[0], "lengths": torch.tensor(9)},
        "unbatched candidates": {"pool": pool[0], "query": query[0], "candidates": CANDIDATES[0]},
        "batched": {"pool": pool, "query": query},
        "batched ragged": {"pool": pool, "query": query, "lengths": lengths},
        "shared": {"pool": pool[1], "query": query},
        "shared ragged": {"pool": pool[1], "query": query, "lengths": lengths},
        "candidates": {"pool": pool[1], "query": query, "candidates": CANDIDATES},
        "candidates int32": {"pool": pool[1], "query": query, "candidates": CANDIDATES.int()},
        "candidates ragged": {
            "pool": pool[1],
            "query": query,
            "candidates": CANDIDATES,
            "lengths": torch.tensor([3, 4, 5], dtype=torch.int32),
        },
        "empty batch": {"pool": pool[:0], "query": query[:0]},
        "empty batch, shared": {"pool": pool[0], "query": query[:0]},
        "empty batch, candidates": {
            "pool": pool[0],
            "query": query[:0],
            "candidates": CANDIDATES[:0],
        },
    }


SHAPES = _shapes()


def _leaves(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if result is None:  # what a method has nothing to say of
        return []
    return [leaf for part in result for leaf in _leaves(part)]


def _assert_alike(kernel: Any, oracle: Any) -> None:
    for one, other in zip(_leaves(kernel), _leaves(oracle), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if one.dtype == torch.int64:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_backend_equals_the_kernels(shape: str) -> None:
    problem = dict(SHAPES[shape])
    pool, query = problem.pop("pool"), problem.pop("query")
    rest = {name: value for name, value in problem.items() if name != "lengths"}

    def both(run: Any, *args: Any, **options: Any) -> Any:
        kernel = run(*args, **options)
        _assert_alike(kernel, run(*args, **options, backend="reference"))
        return kernel

    both(hullkit.lmo, pool, query, **problem)
    both(hullkit.knn, pool, query, 4, **problem)
    result = both(hullkit.frank_wolfe, pool, query, max_support=7, **problem)
    both(hullkit.round_multiplicities, pool, query, result, 20, **rest)
    both(hullkit.apportion, result.weights, 20)
    both(hullkit.select, pool, query, 20, **problem)
    both(hullkit.select, pool, query, "auto", max_total=20, **problem)
    both(hullkit.select, pool, query, 2, method="knn", **problem)
    both(hullkit.select, pool, query, 3, method="knn", max_multiplicity=2, **problem)
    both(hullkit.select, pool, query, 6, method="sift", noise=0.2, max_multiplicity=3, **problem)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total", [1, 2, 20])
def test_hull_is_frank_wolfe_then_rounding(shape: str, total: int) -> None:
    problem = dict(SHAPES[shape])
    chosen = hullkit.select(**problem, total=total)
    result = hullkit.frank_wolfe(**problem, max_support=total)
    for one, other in zip(chosen.result, result, strict=True):
        assert torch.equal(one, other)
    candidates = problem.get("candidates")
    counts = hullkit.round_multiplicities(
        problem["pool"], problem["query"], result, total, candidates=candidates
    )
    assert torch.equal(chosen.counts, counts)
    assert_counts(chosen.counts, total)
    assert torch.equal(chosen.indices, result.indices)
    assert torch.equal(chosen.counts > 0, (chosen.counts > 0) & (chosen.rows >= 0))
    if candidates is None:
        assert torch.equal(chosen.rows, chosen.indices)
    elif candidates.numel():
        used = chosen.indices >= 0
        looked_up = candidates.long().gather(-1, chosen.indices.clamp_min(0))
        assert torch.equal(chosen.rows[used], looked_up[used])
        assert (chosen.rows[~used] == -1).all()


def test_knn_takes_each_neighbour_once() -> None:
    pool, query = batch(torch.float32)
    chosen = hullkit.select(pool, query, 7, method="knn")
    assert (chosen.counts == 1).all()
    assert torch.equal(chosen.rows, hullkit.knn(pool, query, 7).indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_options_reach_both_steps(dtype: torch.dtype) -> None:
    pool, query = batch(dtype)
    chosen = hullkit.select(
        pool, query, 20, max_support=3, max_iters=5, tol=1e-2, exchange_passes=0
    )
    result = hullkit.frank_wolfe(pool, query, max_support=3, max_iters=5, tol=1e-2)
    assert torch.equal(chosen.result.weights, result.weights)
    counts = hullkit.round_multiplicities(pool, query, result, 20, exchange_passes=0)
    assert torch.equal(chosen.counts, counts)
    wide = hullkit.select(pool, query, 20, max_support=50)
    assert wide.indices.shape[-1] == 50


def test_whole_path_equals_the_oracles_by_hand() -> None:
    pool, query = batch(torch.float64, b=8, n=200, d=384)
    chosen = hullkit.select(pool, query, 50)
    for b in range(8):
        rows, target = pool[b].numpy(), query[b].numpy()
        outcome = reference.frank_wolfe(rows, target, max_support=50)
        counts = reference.round_multiplicities(rows[outcome.indices], target, outcome.weights, 50)
        size = len(counts)
        np.testing.assert_array_equal(chosen.rows[b, :size], outcome.indices)
        np.testing.assert_array_equal(chosen.counts[b, :size], counts)


def test_gradients_are_no_obstacle() -> None:
    pool, query = batch(torch.float32)
    chosen = hullkit.select(pool.requires_grad_(), query.requires_grad_(), 7)
    assert_counts(chosen.counts, 7)
    assert not chosen.result.weights.requires_grad


@pytest.mark.parametrize("cap", [1, 2, 3, 7, 9])
def test_knn_takes_each_neighbour_up_to_the_cap(cap: int) -> None:
    pool, query = batch(torch.float32)
    chosen = hullkit.select(pool, query, 7, method="knn", max_multiplicity=cap)
    nearest = -(-7 // cap)
    assert torch.equal(chosen.rows, hullkit.knn(pool, query, nearest).indices)
    assert (chosen.counts[:, :-1] == cap).all()
    assert_counts(chosen.counts, 7)


@pytest.mark.parametrize("options", [{}, {"noise": 1.0, "alpha": 0.3}, {"max_multiplicity": 1}])
def test_sift_as_a_multiset(options: dict[str, Any]) -> None:
    pool, query = batch(torch.float32)
    chosen = hullkit.select(pool, query, 20, method="sift", **options)
    result = hullkit.sift(pool, query, 20, **options)
    for one, other in zip(_leaves(chosen.result), result, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(chosen.indices, result.indices)
    assert torch.equal(chosen.rows, result.indices)
    assert torch.equal(chosen.counts, result.counts)
    assert torch.equal(chosen.counts.sum(1), result.num_steps)
    several = hullkit.select(pool, torch.stack([query, -query], 1), 20, method="sift")
    assert torch.equal(
        several.counts, hullkit.sift(pool, torch.stack([query, -query], 1), 20).counts
    )


OWN_OPTIONS = {
    "hull": (
        {"max_support": 3},
        {"max_iters": 5},
        {"tol": 1e-2},
        {"exchange_passes": 0},
        {"variant": "pairwise"},
        {"gap_tol": 1e-3},
    ),
    "sift": ({"noise": 0.2}, {"alpha": 0.1}),
    "hull, knn, sift": ({"max_multiplicity": 2}, {"merge_duplicates": 0.1}),
}


@pytest.mark.parametrize("method", ["hull", "knn", "sift"])
@pytest.mark.parametrize("owner", OWN_OPTIONS)
def test_options_of_other_methods_are_refused(owner: str, method: str) -> None:
    pool, query = batch(torch.float32)
    for option in OWN_OPTIONS[owner]:
        if method in owner:
            hullkit.select(pool, query, 3, method=method, **option)
            continue
        with pytest.raises(ValueError, match=rf"method: expected '{owner}' .* got '{method}'"):
            hullkit.select(pool, query, 3, method=method, **option)


def test_more_neighbours_than_rows() -> None:
    pool, query = torch.randn(3, 4), torch.randn(4)
    with pytest.raises(
        ValueError, match="total: expected at most 1 for each of 3 candidates, got 5"
    ):
        hullkit.select(pool, query, 5, method="knn")


@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_no_entry_uses_may_be_anything(backend: str | None) -> None:
    """Rows beyond lengths, candidates beyond lengths, rows that no position or index names."""
    pool = torch.full((2, 5, 3), torch.nan, dtype=torch.float64)
    pool[0, :3] = eye = torch.eye(3, dtype=torch.float64)
    pool[1, :2] = eye[:2]
    query, lengths = torch.tensor([[0.6, 0.4, 0], [0.5, 0.5, 0]]).double(), torch.tensor([3, 2])
    options: dict[str, Any] = {"lengths": lengths, "backend": backend}
    wanted = [[6, 4, 0, 0, 0], [5, 5, 0, 0, 0]]
    assert hullkit.select(pool, query, 10, **options).counts.tolist() == wanted
    auto = hullkit.select(pool, query, "auto", **options).counts
    assert auto.tolist() == [[30, 20, 0, 0, 0], [25, 25, 0, 0, 0]]
    result = hullkit.frank_wolfe(pool, query, **options)
    counts = hullkit.round_multiplicities(pool, query, result, 10, backend=backend)
    assert counts.tolist() == wanted

    options["lengths"] = torch.tensor([2, 2])
    rows = {"candidates": torch.tensor([[0, 1, 99], [0, 1, -7]])}
    for name, method in (("counts", "hull"), ("rows", "knn"), ("counts", "sift")):
        chosen = hullkit.select(eye, query, 2, method=method, **rows, **options)
        assert getattr(chosen, name)[:, :2].tolist() == [[0, 1] if name == "rows" else [1, 1]] * 2
    assert hullkit.lmo(eye, query, **rows, **options).index.tolist() == [1, 0]
    assert hullkit.duplicates(eye, eps=0.1, **rows, **options).tolist() == [[0, 1, -1]] * 2
    result = hullkit.frank_wolfe(eye, query, **rows, **options)
    counts = hullkit.round_multiplicities(eye, query, result, 10, **rows, backend=backend)
    assert counts.tolist() == [[6, 4, 0], [5, 5, 0]]
    unused = torch.cat([eye, torch.full((1, 3), torch.nan, dtype=torch.float64)])
    result = hullkit.frank_wolfe(eye, query, backend=backend)
    counts = hullkit.round_multiplicities(unused, query, result, 10, backend=backend)
    assert counts.tolist() == [[6, 4, 0], [5, 5, 0]]
