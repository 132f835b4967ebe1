# SPDX-License-Identifier: Apache-2.0
"""SIFT on a device: the CPU's choices, whatever the shape of the call."""

from __future__ import annotations

from functools import partial
from typing import Any

import hullkit
import pytest
import torch
from _gpu import DTYPES, assert_same, behind_a_slow_producer, equal_bits, problem, to, to_entry
from torch import Tensor

pytestmark = pytest.mark.gpu

SHAPES = ((1, 1, 1), (3, 63, 129), (2, 200, 384), (2, 257, 151), (1, 1000, 63), (20, 40, 7))


def several(query: Tensor, vectors: int) -> Tensor:
    """(B, m, d): the queries and their neighbours in the batch; (B, d) for 0."""
    if vectors == 0:
        return query
    return torch.stack([query.roll(k, 0) + 0.1 * k for k in range(vectors)], 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vectors", [0, 1, 3])
def test_float64_equals_cpu(shape: tuple[int, int, int], vectors: int) -> None:
    pool, query = problem(*shape, torch.float64)
    query = several(query, vectors)
    for total in (1, 20, 50):
        for options in ({}, {"noise": 1.0}, {"alpha": 0.2}, {"max_multiplicity": 50}):
            run = lambda p, q, total=total, options=options: hullkit.sift(p, q, total, **options)  # noqa: E731
            assert_same(run(pool.cuda(), query.cuda()), run(pool, query), 1e-12)
            assert_same(run(pool[0].cuda(), query.cuda()), run(pool[0], query), 1e-12)


@pytest.mark.parametrize("n", [3, 63, 200, 700])
def test_more_steps_than_columns_are_kept(n: int) -> None:
    """The kernel is written down after 64 changes of the candidate, here several times."""
    pool, query = problem(2, n, 64, torch.float64, seed=n)
    for options in ({"noise": 1.0}, {"noise": 1.0, "max_multiplicity": -(-300 // n)}):
        expected = hullkit.sift(pool, query, 300, **options)
        assert_same(hullkit.sift(pool.cuda(), query.cuda(), 300, **options), expected, 1e-12)


@pytest.mark.parametrize("n", [513, 2000, 4096])
def test_many_candidates(n: int) -> None:
    pool, query = problem(2, n, 40, torch.float64)
    expected = hullkit.sift(pool, query, 30)
    assert_same(hullkit.sift(pool.cuda(), query.cuda(), 30), expected, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_equals_the_oracle(dtype: torch.dtype) -> None:
    """No two gains are so close in these that the float32 sums of halves could swap them."""
    pool, query = problem(4, 100, 96, dtype)
    expected = hullkit.sift(pool, query, 12, backend="reference")
    assert_same(hullkit.sift(pool.cuda(), query.cuda(), 12), expected, 1e-5)
    chosen = hullkit.select(pool.cuda(), query.cuda(), 12, method="sift")
    assert torch.equal(chosen.counts.cpu(), expected.counts)


def test_ragged_candidates_and_odd_strides() -> None:
    pool, query = problem(5, 70, 45, torch.float64)
    lengths = torch.tensor([1, 70, 33, 2, 64])
    candidates = torch.randint(-1, 70, (5, 50), generator=torch.Generator().manual_seed(1))
    candidates[:, 3] = 7
    for rows, options in ((pool, {"lengths": lengths}), (pool[0], {"candidates": candidates})):
        expected = hullkit.sift(rows, query, 20, **options)
        on_device: dict[str, Any] = {name: value.cuda() for name, value in options.items()}
        assert_same(hullkit.sift(rows.cuda(), query.cuda(), 20, **on_device), expected, 1e-12)
    view, part = pool.cuda()[:, 1:, 2:43], several(query, 2)  # rows off every alignment
    expected = hullkit.sift(pool[:, 1:, 2:43], part[:, :, 2:43], 12)
    assert_same(hullkit.sift(view, part.cuda()[:, :, 2:43], 12), expected, 1e-12)


def test_ties_go_to_the_lowest_index() -> None:
    pool = torch.zeros(700, 4, dtype=torch.float64, device="cuda")
    pool[:, 0] = 1.0
    assert hullkit.sift(pool, pool[0], 9).order.tolist() == [0] * 9
    capped = hullkit.sift(pool, pool[0], 700, max_multiplicity=1)
    assert capped.order.tolist() == list(range(700))


def test_same_bits_in_any_batch_and_every_time() -> None:
    pool, query = (tensor.cuda() for tensor in problem(70, 200, 96, torch.float32))
    batch = hullkit.sift(pool, query, 30)
    for b in (0, 33, 69):
        assert equal_bits(hullkit.sift(pool[b], query[b], 30), to_entry(batch, b))
    assert equal_bits(batch, hullkit.sift(pool, query, 30))


def test_broken_entries_are_marked_and_alone() -> None:
    pool, query = problem(6, 40, 16, torch.float32)
    pool[0, 3, 2] = float("nan")
    query[1, 0] = float("inf")
    lengths = torch.tensor([40, 40, 0, 41, 3, 40])  # three candidates, twice each, are too few
    result = hullkit.sift(pool.cuda(), query.cuda(), 7, lengths=lengths.cuda(), max_multiplicity=2)
    assert result.num_steps.tolist() == [0] * 5 + [7]
    assert result.variance[:5].isnan().all()
    assert (result.order[:5] == -1).all()
    assert (result.indices[:5] == -1).all()
    assert (result.counts[:5] == 0).all()
    expected = hullkit.sift(pool[5], query[5], 7, max_multiplicity=2)
    assert_same(to_entry(result, 5), expected, 1e-5)


def test_limit_is_named() -> None:
    pool = torch.randn(4097, 4, device="cuda")
    with pytest.raises(NotImplementedError, match=r"sift: .* at most 4096 .* got 4097.*knn"):
        hullkit.sift(pool, pool[0], 5)


def test_no_queries() -> None:
    pool = torch.randn(9, 4, device="cuda")
    assert hullkit.sift(pool, pool[:0], 3).order.shape == (0, 3)


@pytest.mark.plain_memory
def test_captured_behind_a_slow_producer_and_replayed() -> None:
    pool, query = (tensor.cuda() for tensor in problem(8, 100, 64, torch.float32))
    hullkit.sift(pool, query, 20)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hullkit.sift(pool, query, 20)
    other = to(problem(8, 100, 64, torch.float32, seed=1), "cuda")
    expected = hullkit.sift(*other, 20)
    torch.cuda._sleep(50_000_000)
    pool.copy_(other[0])
    query.copy_(other[1])
    graph.replay()
    torch.cuda.synchronize()
    assert equal_bits(captured, expected)


@pytest.mark.plain_memory
def test_current_stream() -> None:
    source = to(problem(8, 100, 64, torch.float32), "cuda")
    expected = hullkit.sift(*source, 20)
    actual = behind_a_slow_producer(partial(hullkit.sift, total=20), *source)
    assert equal_bits(actual, expected)


def test_retriever_chooses_on_the_device() -> None:
    faiss = pytest.importorskip("faiss", reason="faiss is not installed")
    from hullkit.interop.activeft import Retriever

    pool, query = problem(1, 500, 32, torch.float32)
    index = faiss.IndexFlatIP(32)
    index.add(pool[0].numpy())
    prompts = torch.stack([query, -query], 1).numpy()
    expected = Retriever(index, device="cpu").batch_search(prompts, 12, 100)
    actual = Retriever(index, device="cuda").batch_search(prompts, 12, 100)
    assert (actual[1] == expected[1]).all()
    assert (actual[2] == expected[2]).all()
    assert abs(actual[0] - expected[0]).max() < 1e-5
