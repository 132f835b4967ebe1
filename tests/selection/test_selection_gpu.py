# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels against the CPU's and the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hullkit
import pytest
import torch
from _gpu import DTYPES, assert_same, behind_a_slow_producer, equal_bits, problem, to, to_entry
from hullkit import Status
from torch import Tensor

pytestmark = pytest.mark.gpu

SHAPES = ((1, 1, 1), (3, 63, 129), (2, 200, 384), (2, 257, 151), (1, 1000, 63), (20, 40, 7))


CALLS: dict[str, Callable[..., Any]] = {
    "lmo": lambda p, q, **o: hullkit.lmo(p, q, **o),
    "knn": lambda p, q, **o: hullkit.knn(p, q, min(9, p.shape[-2]), **o),
    "frank_wolfe": lambda p, q, **o: hullkit.frank_wolfe(p, q, max_support=20, **o),
    "select": lambda p, q, **o: hullkit.select(p, q, 20, **o),
    "select auto": lambda p, q, **o: hullkit.select(p, q, "auto", max_total=20, **o),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("call", CALLS)
def test_float64_equals_cpu(call: str, shape: tuple[int, int, int]) -> None:
    pool, query = problem(*shape, torch.float64)
    expected = CALLS[call](pool, query)
    assert_same(CALLS[call](pool.cuda(), query.cuda()), expected, 1e-12)
    shared = CALLS[call](pool[0], query)
    assert_same(CALLS[call](pool[0].cuda(), query.cuda()), shared, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_every_dtype_equals_the_oracle(call: str, dtype: torch.dtype) -> None:
    """No two candidates are so close in these that the float32 sums of halves could take one for
    the other."""
    pool, query = problem(4, 100, 96, dtype)
    expected = CALLS[call](pool, query, backend="reference")
    assert_same(CALLS[call](pool.cuda(), query.cuda()), expected, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_candidates_and_odd_strides(dtype: torch.dtype) -> None:
    pool, query = problem(5, 70, 45, dtype)
    lengths = torch.tensor([1, 70, 33, 2, 64])
    candidates = torch.randint(-1, 70, (5, 50), generator=torch.Generator().manual_seed(1))
    candidates[:, 3] = 7
    for call in ("lmo", "knn", "select", "select auto"):
        run = CALLS[call]
        for options, source in (
            ({"lengths": lengths}, pool),
            ({"candidates": candidates}, pool[0]),
        ):
            if call == "knn" and "lengths" not in options:
                continue  # duplicates among candidates tie: tested in float64 below
            expected = run(source.double(), query.double(), **options)
            on_device = {name: value.cuda() for name, value in options.items()}
            assert_same(run(source.cuda(), query.cuda(), **on_device), expected, 1e-5)
    view = pool.cuda()[:, 1:, 2:43]  # rows off every alignment
    expected = hullkit.select(pool[:, 1:, 2:43].double(), query[:, 2:43].double(), 12)
    assert_same(hullkit.select(view, query.cuda()[:, 2:43], 12), expected, 1e-5)


def test_ties_go_to_the_lowest_index() -> None:
    pool = torch.zeros(5000, 4, dtype=torch.float64, device="cuda")
    pool[:, 0] = 1.0
    query = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64, device="cuda")
    assert hullkit.lmo(pool, query).index.item() == 0
    assert hullkit.knn(pool, query, 100).indices.tolist() == list(range(100))
    selection = hullkit.select(pool[:300], query, 5)
    assert selection.indices.tolist()[0] == 0
    assert selection.counts.tolist()[0] == 5
    pool[1234] *= -0.0
    assert hullkit.lmo(pool - 1.0, query).index.item() == 1234


def test_round_multiplicities_and_apportion_equal_cpu() -> None:
    pool, query = problem(6, 90, 50, torch.float64)
    result = hullkit.frank_wolfe(pool, query, max_support=40)
    for total in (1, 7, 50, 1000):
        expected = hullkit.round_multiplicities(pool, query, result, total)
        actual = hullkit.round_multiplicities(pool.cuda(), query.cuda(), to(result, "cuda"), total)
        assert_same(actual, expected, 0.0)
        assert_same(
            hullkit.apportion(result.weights.cuda(), total),
            hullkit.apportion(result.weights, total),
            0.0,
        )
    wide = hullkit.frank_wolfe(pool[:, :, :6], query[:, :6], max_iters=300)
    whole = torch.full((6, 90), 1 / 90, dtype=torch.float64)
    points = wide._replace(indices=torch.arange(90).repeat(6, 1), weights=whole)
    expected = hullkit.round_multiplicities(pool, query, points, 45)
    assert_same(
        hullkit.round_multiplicities(pool.cuda(), query.cuda(), to(points, "cuda"), 45),
        expected,
        0.0,
    )


def test_same_bits_in_any_batch_and_every_time() -> None:
    pool, query = (tensor.cuda() for tensor in problem(70, 200, 96, torch.float32))
    for total in (30, "auto"):
        batch = hullkit.select(pool, query, total)
        for b in (0, 33, 69):
            alone = hullkit.select(pool[b], query[b], total)
            assert equal_bits(alone, hullkit.Multiset(*(to_entry(part, b) for part in batch)))
        assert equal_bits(batch, hullkit.select(pool, query, total))
    shared = hullkit.lmo(pool[0], query)
    assert equal_bits(
        hullkit.lmo(pool[0], query[5]), hullkit.LMOResult(shared.index[5], shared.value[5])
    )


def test_broken_entries_are_marked_and_alone() -> None:
    pool, query = problem(5, 40, 16, torch.float32)
    pool[0, 3, 2] = float("nan")
    query[1, 0] = float("inf")
    lengths = torch.tensor([40, 40, 0, 41, 40])
    on_device = (pool.cuda(), query.cuda())
    selection = hullkit.select(*on_device, 7, lengths=lengths.cuda())
    assert isinstance(selection.result, hullkit.FrankWolfeResult)
    assert selection.result.status.tolist()[:4] == [Status.BROKEN] * 4
    assert selection.result.residual_norm[:4].isnan().all()
    assert (selection.indices[:4] == -1).all()
    assert (selection.counts[:4] == 0).all()
    assert_same(selection.counts[4], hullkit.select(pool[4], query[4], 7).counts, 0.0)
    auto = hullkit.select(*on_device, "auto", max_total=7, lengths=lengths.cuda())
    assert auto.total is not None
    assert auto.total.tolist()[:4] == [-1] * 4
    assert (auto.counts[:4] == 0).all()
    assert_same(auto.counts[4], hullkit.select(pool[4], query[4], "auto", max_total=7).counts, 0.0)
    assert hullkit.lmo(*on_device, lengths=lengths.cuda()).index.tolist()[:4] == [-1] * 4
    assert (hullkit.knn(*on_device, 3, lengths=lengths.cuda()).indices[:4] == -1).all()
    far = torch.full((5, 4), 10**6)
    assert (
        hullkit.lmo(pool[1].cuda(), query.cuda(), candidates=far.cuda()).index.tolist() == [-1] * 5
    )
    weights = torch.tensor([[float("nan"), 1.0], [1.0, 1.0]])
    assert hullkit.apportion(weights.cuda(), 4).tolist() == [[-1, -1], [2, 2]]


def test_limits_are_named() -> None:
    pool = torch.randn(5000, 4, device="cuda")
    with pytest.raises(NotImplementedError, match="expected a support of at most 4096 points"):
        hullkit.select(pool, pool[0], 5000, max_iters=5000)
    with pytest.raises(NotImplementedError, match="k: expected at most 2048"):
        hullkit.knn(pool, pool[0], 3000)


def test_no_queries() -> None:
    pool = torch.randn(9, 4, device="cuda")
    none = torch.empty(0, 4, device="cuda")
    assert hullkit.select(pool, none, 3).counts.shape == (0, 3)
    assert (
        hullkit.lmo(pool, none).index.shape == hullkit.knn(pool, none, 2).values[:, 0].shape == (0,)
    )


@pytest.mark.plain_memory
@pytest.mark.parametrize("n", [100, 5000])  # with a Gram matrix, and without
def test_current_stream_behind_a_slow_producer(n: int) -> None:
    pool, query = problem(8, n, 64, torch.float32)
    source = (pool.cuda(), query.cuda())
    expected = hullkit.select(*source, 20)
    actual = behind_a_slow_producer(partial(hullkit.select, total=20), *source)
    assert equal_bits(actual, expected)


@pytest.mark.plain_memory
def test_captured_and_replayed() -> None:
    pool, query = (tensor.cuda() for tensor in problem(8, 100, 64, torch.float32))
    hullkit.select(pool, query, 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hullkit.select(pool, query, 20)
        auto = hullkit.select(pool, query, "auto", max_multiplicity=2)
        nearest = hullkit.knn(pool, query, 5)
        least = hullkit.lmo(pool, query)
    other, queries = (tensor.cuda() for tensor in problem(8, 100, 64, torch.float32, seed=1))
    pool.copy_(other)
    query.copy_(queries)
    graph.replay()
    torch.cuda.synchronize()
    assert equal_bits(captured, hullkit.select(pool, query, 20))
    assert equal_bits(auto, hullkit.select(pool, query, "auto", max_multiplicity=2))
    assert equal_bits(nearest, hullkit.knn(pool, query, 5))
    assert equal_bits(least, hullkit.lmo(pool, query))


@pytest.mark.plain_memory
@pytest.mark.parametrize("ragged", [False, True])
def test_nearest_rows_of_broken_and_short_entries(ragged: bool) -> None:
    """Nothing waits for the device, so it works in a capture, and a bad entry is alone."""
    pool, query = (tensor.cuda() for tensor in problem(3, 100, 64, torch.float32))
    good = hullkit.select(pool, query, 20, method="knn")
    pool[1, 7, 3] = float("nan")
    options = {"lengths": torch.tensor([100, 100, 12]).cuda()} if ragged else {}
    hullkit.select(pool, query, 20, method="knn", **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = hullkit.select(pool, query, 20, method="knn", **options)
    graph.replay()
    torch.cuda.synchronize()
    bad = [1, 2] if ragged else [1]
    assert (chosen.indices[bad] == -1).all()
    assert (chosen.rows[bad] == -1).all()
    assert (chosen.counts[bad] == 0).all()
    assert chosen.result.values[bad].isnan().all()
    others = sorted({0, 1, 2} - set(bad))
    for ours, wanted in zip(chosen[:3], good[:3], strict=True):
        assert torch.equal(ours[others], wanted[others])


def test_other_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    pool, query = problem(2, 30, 8, torch.float64)
    assert_same(
        hullkit.select(pool.to("cuda:1"), query.to("cuda:1"), 5),
        hullkit.select(pool, query, 5),
        1e-12,
    )


@pytest.mark.plain_memory
def test_in_a_compiled_function() -> None:
    pool, query = (tensor.cuda() for tensor in problem(3, 50, 16, torch.float32))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def chosen(pool: Tensor, query: Tensor) -> Tensor:
        return hullkit.select(pool, query, 10).counts * 2

    assert torch.equal(chosen(pool, query), hullkit.select(pool, query, 10).counts * 2)
