# SPDX-License-Identifier: Apache-2.0
"""Integers of every width where they name candidates, lengths, supports and counts."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from torch import Tensor

SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
CANDIDATES = torch.tensor([[4, 9, 2, 7], [1, 0, 29, 8], [5, 6, 7, 3]])
LENGTHS = torch.tensor([4, 2, 3])
LAST = 29  # row of the pool


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(30, 6, generator=generator), torch.randn(3, 6, generator=generator)


def assert_same(ours: Any, wanted: Any) -> None:
    for one, other in zip(ours, wanted, strict=True):
        if isinstance(other, tuple):
            assert_same(one, other)
        elif other is not None:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options", [{}, {"method": "knn"}, {"merge_duplicates": 0.1}])
@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED])
def test_every_dtype(dtype: str, options: dict[str, Any]) -> None:
    pool, queries = problem()
    total = 2 if options.get("method") == "knn" else 5
    integers = {"candidates": CANDIDATES, "lengths": LENGTHS}
    wanted = hullkit.select(pool, queries, total, **integers, **options)
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in integers.items()}
    assert_same(hullkit.select(pool, queries, total, **tensors, **options), wanted)
    arrays = {name: value.numpy().astype(dtype) for name, value in integers.items()}
    ours = hullkit.select(pool.numpy(), queries.numpy(), total, **arrays, **options)
    assert_same(ours, wanted)
    assert ours.rows.dtype == np.int64


@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED])
def test_supports_and_counts(dtype: str) -> None:
    pool, queries = problem()
    result = hullkit.frank_wolfe(pool[:9], queries[0], max_support=4)
    wanted = hullkit.round_multiplicities(pool[:9], queries[0], result, 9)
    support = result._replace(indices=result.indices.to(getattr(torch, dtype)))
    assert torch.equal(hullkit.round_multiplicities(pool[:9], queries[0], support, 9), wanted)
    schedule = hullkit.reuse_schedule(wanted)
    assert hullkit.reuse_schedule(wanted.to(getattr(torch, dtype))) == schedule
    assert hullkit.reuse_schedule(wanted.numpy().astype(dtype)) == schedule


@pytest.mark.parametrize("backend", [None, "reference"])
def test_minus_one_in_uint64(backend: str | None) -> None:
    """What NumPy makes of -1 is -1 again: padding of candidates and of a support."""
    pool, queries = problem()
    padded = CANDIDATES.clone()
    padded[:, 2] = -1
    array = padded.numpy().astype(np.uint64)
    assert array.max() == 2**64 - 1
    ours = hullkit.knn(pool.numpy(), queries.numpy(), 4, candidates=array[:, ::-1], backend=backend)
    wanted = hullkit.knn(pool, queries, 4, candidates=padded.flip(1), backend=backend)
    assert_same(ours, wanted)
    result = hullkit.frank_wolfe(pool, queries, candidates=padded, max_iters=20)
    assert (result.indices == -1).any()
    unsigned = result._replace(indices=result.indices.to(torch.uint64))
    options = {"candidates": padded, "backend": backend}
    assert torch.equal(
        hullkit.round_multiplicities(pool, queries, unsigned, 9, **options),
        hullkit.round_multiplicities(pool, queries, result, 9, **options),
    )


@pytest.mark.parametrize("value", [2**63, 2**64 - 2])
def test_beyond_int64(value: int) -> None:
    pool, queries = problem()
    candidates = CANDIDATES.numpy().astype(np.uint64)
    candidates[1, 2] = value
    arrays = pool.numpy(), queries.numpy()
    for options in ({}, {"merge_duplicates": 0.1}):
        with pytest.raises(ValueError, match=f"candidates: expected at most {LAST}, got {value}"):
            hullkit.select(*arrays, 3, candidates=candidates, **options)
    lengths = np.array([3, value, 1], dtype=np.uint64)
    with pytest.raises(ValueError, match=f"lengths: expected at most {LAST + 1}, got {value}"):
        hullkit.lmo(*arrays, lengths=lengths)
    with pytest.raises(ValueError, match=f"lengths: expected at most 2, got {value}"):
        hullkit.lmo(*arrays, lengths=lengths, candidates=candidates[:, :2])
    support = SimpleNamespace(indices=candidates, weights=np.ones(candidates.shape))
    with pytest.raises(ValueError, match=f"indices: expected at most {LAST}, got {value}"):
        hullkit.round_multiplicities(*arrays, support, 9)
    message = rf"expected a value below 2\*\*63, got {value}"
    for counts in (lengths, lengths.tolist(), torch.from_numpy(lengths)):
        with pytest.raises(ValueError, match=rf"counts\[1\]: {message}"):
            hullkit.reuse_schedule(counts)


def test_minus_one_is_no_length_and_no_count() -> None:
    pool, queries = problem()
    lengths = torch.tensor([3, -1, 1]).to(torch.uint64)
    with pytest.raises(ValueError, match=r"lengths: expected 1 <= lengths\[1\] <= 30, got -1"):
        hullkit.lmo(pool, queries, lengths=lengths)
    with pytest.raises(ValueError, match=r"counts\[1\]: expected a value below 2\*\*63"):
        hullkit.reuse_schedule(lengths)


@pytest.mark.plain_memory
def test_traced() -> None:
    pool, queries = problem()
    candidates = CANDIDATES.to(torch.uint64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def nearest(rows: Tensor) -> Tensor:
        return hullkit.knn(pool, queries, 2, candidates=rows).indices

    wanted = hullkit.knn(pool, queries, 2, candidates=CANDIDATES).indices
    assert torch.equal(nearest(candidates), wanted)


@pytest.mark.gpu
def test_on_a_device() -> None:
    """There the host does not wait for values: what is beyond int64 breaks its entry alone."""
    pool, queries = (tensor.cuda() for tensor in problem())
    candidates = CANDIDATES.clone()
    candidates[0, 3] = -1
    candidates[1, 2] = -(2**63)  # 2**63, read as uint64
    ours = hullkit.lmo(pool, queries, candidates=candidates.view(torch.uint64).cuda())
    wanted = hullkit.lmo(pool, queries, candidates=candidates.clamp_min(-1).cuda())
    assert ours.index.tolist() == [int(wanted.index[0]), -1, int(wanted.index[2])]


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy(kind: type[np.integer[Any]]) -> None:
    pool, query = torch.randn(9, 4), torch.randn(4)
    ours, theirs = (hullkit.select(pool, query, total) for total in (kind(3), 3))
    assert torch.equal(ours.counts, theirs.counts)
    with pytest.raises(TypeError, match="total: expected an int, got bool"):
        hullkit.select(pool, query, np.bool_(True))
    with pytest.raises(TypeError, match="total: expected an int, got float64"):
        hullkit.select(pool, query, np.float64(3.0))


def test_narrow_numbers_of_numpy() -> None:
    """They are ints before anything is computed: twice an int8 of 100 is not -56."""
    pool, query = torch.randn(70, 4), torch.randn(4)
    small, large = np.int8(100), 100
    for ours, wanted in (
        (
            hullkit.select(pool, query, kind(large), max_multiplicity=kind(4), max_iters=kind(20))
            for kind in (np.int8, int)
        ),
        (
            hullkit.select(pool, query, 7, max_support=kind(3), exchange_passes=kind(1))
            for kind in (np.int8, int)
        ),
        (
            hullkit.select(pool, query, kind(large), method="knn", max_multiplicity=kind(2))
            for kind in (np.int8, int)
        ),
        (
            hullkit.frank_wolfe(pool, query, max_iters=kind(large), max_support=kind(5))
            for kind in (np.int8, int)
        ),
        (
            hullkit.sift(pool, query, kind(large), max_multiplicity=kind(large))
            for kind in (np.int8, int)
        ),
        (hullkit.knn(pool, query, kind(70)) for kind in (np.uint8, int)),
    ):
        assert_same(ours, wanted)
    result = hullkit.frank_wolfe(pool, query, max_support=5)
    rounded = (
        hullkit.round_multiplicities(
            pool, query, result, total, exchange_passes=total, max_multiplicity=total
        )
        for total in (small, large)
    )
    assert torch.equal(*rounded)
    assert torch.equal(*(hullkit.apportion(result.weights, total) for total in (small, large)))


def test_real_numbers_of_other_kinds() -> None:
    pool, query = torch.randn(9, 4), torch.randn(4)
    for number in (np.float32(0.25), np.float16(0.25), Fraction(1, 4)):
        options = {"tol": number, "gap_tol": number, "max_weight": number}
        ours = hullkit.frank_wolfe(pool, query, **options)
        assert_same(ours, hullkit.frank_wolfe(pool, query, **dict.fromkeys(options, 0.25)))
        assert_same(
            hullkit.sift(pool, query, 5, noise=number, alpha=number),
            hullkit.sift(pool, query, 5, noise=0.25, alpha=0.25),
        )
        assert torch.equal(hullkit.duplicates(pool, eps=number), hullkit.duplicates(pool, eps=0.25))
    for wrong in (np.bool_(True), True, 1 + 0j, np.float32("nan")):
        with pytest.raises((TypeError, ValueError), match="tol: expected a number"):
            hullkit.frank_wolfe(pool, query, tol=wrong)


def test_an_array_of_no_dimension_is_no_option() -> None:
    pool, query = torch.randn(9, 4), torch.randn(4)
    with pytest.raises(ValueError, match=r"variant: expected one of .* got array"):
        hullkit.frank_wolfe(pool, query, variant=np.array("vanilla"))
    with pytest.raises(ValueError, match=r"method: expected one of .* got array"):
        hullkit.select(pool, query, 3, method=np.array("hull"))
