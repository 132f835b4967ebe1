# SPDX-License-Identifier: Apache-2.0
"""Frank-Wolfe over more candidates than a Gram matrix has room for: one pass an iteration."""

from __future__ import annotations

import signal
import threading
from typing import Any

import hullkit
import pytest
import torch
from _gpu import DTYPES, assert_same, equal_bits, problem, to_entry
from _signals import raising
from hullkit import Status
from torch import Tensor

pytestmark = pytest.mark.gpu

N = 5000  # the Gram matrix serves up to 4096
HALVES = (torch.float16, torch.bfloat16)
# the last ends one of two runs early
OPTIONS: tuple[dict[str, Any], ...] = (
    {"max_support": 30},
    {"max_support": 1},
    {"max_iters": 0},
    {"max_support": 2},
    {"max_support": 256, "max_iters": 260},
    {"max_iters": 40, "tol": 0.36},
)


def on_device(function: Any, pool: Tensor, query: Tensor, *arguments: Any, **options: Any) -> Any:
    moved = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in options.items()}
    return function(pool.cuda(), query.cuda(), *arguments, **moved)


def assert_follows(pool: Tensor, query: Tensor, **options: Any) -> None:
    """Float64 and float32 input: the path of the CPU's float64 run on the same values."""
    expected = hullkit.frank_wolfe(pool.double(), query.double(), **options)
    assert_same(on_device(hullkit.frank_wolfe, pool, query, **options), expected, 1e-12)


@pytest.mark.parametrize("d", [1, 7, 63, 129, 384])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_follows_the_float64_path(dtype: torch.dtype, d: int) -> None:
    pool, query = problem(3, N, d, dtype)
    assert_follows(pool[0], query, max_support=30, max_iters=60)
    assert_follows(pool, query, max_support=12, max_iters=60)
    expected = hullkit.select(pool[0].double(), query.double(), 20, max_iters=60)
    assert_same(on_device(hullkit.select, pool[0], query, 20, max_iters=60), expected, 1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_way_to_stop(options: dict[str, Any]) -> None:
    pool, query = problem(2, N, 96, torch.float64)
    assert_follows(pool[0], query, **options)


@pytest.mark.parametrize("batch", [1, 3, 8, 9, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_number_of_prompts(dtype: torch.dtype, batch: int) -> None:
    pool, query = problem(batch, 1, 50, dtype)
    shared = torch.cat([problem(5, N // 5, 50, dtype, seed=1)[0].flatten(0, 1), pool[:, 0]])
    assert_follows(shared, query, max_support=15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wide_rows_and_views(dtype: torch.dtype) -> None:
    """Directions that do not fit beside the rows in shared memory, and rows off every alignment."""
    pool, query = problem(1, N, 2050, dtype)
    assert_follows(pool[0, :4200], query.expand(9, -1), max_support=4)
    view, queries = pool[0, 3:, 1:1500], query[:, 1:1500]
    expected = hullkit.frank_wolfe(view.double(), queries.double(), max_support=5)
    actual = hullkit.frank_wolfe(pool.cuda()[0, 3:, 1:1500], query.cuda()[:, 1:1500], max_support=5)
    assert_same(actual, expected, 1e-12)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("d", [45, 384, 1026])
def test_halves_by_certificate(dtype: torch.dtype, d: int) -> None:
    pool, query = problem(1, N, d, dtype)
    query = torch.cat([query, problem(19, 1, d, dtype, seed=1)[1], pool[0, :1]])
    rows, targets = pool[0].double(), query.double()
    oracle = hullkit.frank_wolfe(rows, targets, max_support=30)
    result = on_device(hullkit.frank_wolfe, pool[0], query, max_support=30)
    result = hullkit.FrankWolfeResult(*(field.cpu() for field in result))
    torch.testing.assert_close(result.weights.sum(1), torch.ones(21).double())
    assert (result.weights >= 0).all()
    assert (result.weights[:, :-1] >= result.weights[:, 1:]).all()
    weights = torch.zeros(21, N, dtype=torch.float64)
    weights.scatter_add_(1, result.indices.clamp_min(0), result.weights)
    residual = targets - weights @ rows
    torch.testing.assert_close(result.residual_norm, residual.norm(dim=1), rtol=0, atol=1e-12)
    gap = (residual @ rows.T).amax(1) - (residual * (targets - residual)).sum(1)
    # Rounding of the direction, and of the float32 sums of as many products as a row has.
    bound = (2.0**-20 + d * 2.0**-23) * result.residual_norm + 1e-12
    assert ((result.dual_gap - gap).abs() <= bound).all()
    slack = torch.maximum(gap, oracle.dual_gap) + 1e-12
    assert ((result.residual_norm**2 - oracle.residual_norm**2).abs() / 2 <= slack).all()
    torch.testing.assert_close(result.residual_norm, oracle.residual_norm, rtol=1e-2, atol=1e-5)
    assert result.status[-1] == Status.CONVERGED  # its query is a row


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_power_of_two_changes_nothing(dtype: torch.dtype) -> None:
    """Directions of halves are scaled, so that none of their pieces vanishes or overflows."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(-8, 9, (N, 40), generator=generator).to(dtype).cuda() / 16
    query = torch.randint(-8, 9, (3, 40), generator=generator).to(dtype).cuda() / 16
    result = hullkit.frank_wolfe(pool, query, max_iters=20, tol=0.0)
    for scale in (2.0**-9, 2.0**9):
        scaled = hullkit.frank_wolfe(pool * scale, query * scale, max_iters=20, tol=0.0)
        assert equal_bits((scaled.indices, scaled.weights), (result.indices, result.weights))
        assert equal_bits(scaled.dual_gap, result.dual_gap * scale**2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_lengths_and_long_candidates(dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype in HALVES else 1e-12
    pool, query = problem(3, N, 45, dtype)
    lengths = torch.tensor([1, N, 4321])
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(N, generator=generator)[:4500] for _ in range(3)])
    order[:, ::9] = -1
    cases: tuple[tuple[Tensor, dict[str, Any]], ...] = (
        (pool, {"lengths": lengths}),
        (pool[0], {"lengths": lengths}),
        (pool[0], {"candidates": order}),
        (pool[0], {"candidates": order, "lengths": torch.tensor([4500, 70, 4099])}),
    )
    for rows, options in cases:
        expected = hullkit.select(rows.double(), query.double(), 12, max_iters=30, **options)
        actual = on_device(hullkit.select, rows, query, 12, max_iters=30, **options)
        assert_same(actual, expected, tolerance)


def test_rows_and_points_between_rows_converge() -> None:
    pool = problem(1, N, 64, torch.float64)[0][0]
    query = torch.stack([pool[7], 0.75 * pool[10] + 0.25 * pool[4999], 3 * pool[4000], pool[7]])
    assert_follows(pool, query)
    result = on_device(hullkit.frank_wolfe, pool, query)
    assert result.status.tolist() == [
        Status.CONVERGED,
        Status.CONVERGED,
        Status.STALLED,
        Status.CONVERGED,
    ]
    assert result.num_iters.tolist() == [0, 1, 0, 0]


def test_ties_go_to_the_lowest_index() -> None:
    pool, query = problem(1, N // 2, 33, torch.float64)
    assert_follows(torch.cat([pool[0], pool[0]]), query, max_support=20)
    equal = torch.ones(N, 3, dtype=torch.float32)
    result = on_device(hullkit.frank_wolfe, equal, torch.tensor([1.0, 2.0, 3.0]))
    assert result.indices.tolist()[:2] == [0, -1]
    assert result.status.item() == Status.STALLED


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_any_batch_and_every_time(dtype: torch.dtype) -> None:
    pool, query = problem(1, N, 70, dtype)
    pool = pool[0].cuda()
    query = torch.cat([query, problem(39, 1, 70, dtype, seed=1)[1]]).cuda()
    batch = hullkit.select(pool, query, 20)
    assert equal_bits(batch, hullkit.select(pool, query, 20))
    for b in (0, 15, 16, 39):
        alone = hullkit.select(pool, query[b], 20)
        assert equal_bits(alone, hullkit.Multiset(*(to_entry(part, b) for part in batch)))
    few = hullkit.select(pool, query[14:17], 20)
    assert equal_bits(few.counts, batch.counts[14:17])
    assert equal_bits(hullkit.select(pool.repeat(3, 1, 1), query[14:17], 20), few)


def test_select_is_its_two_calls() -> None:
    pool, query = (tensor.cuda() for tensor in problem(1, N, 70, torch.float32))
    selection = hullkit.select(pool[0], query, 20)
    result = hullkit.frank_wolfe(pool[0], query, max_support=20)
    assert equal_bits(selection.result, result)
    counts = hullkit.round_multiplicities(pool[0], query, result, 20)
    assert equal_bits(selection.counts, counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_entries_are_marked_and_alone(dtype: torch.dtype) -> None:
    pool, query = problem(6, N, 16, dtype)
    pool[0, 4999, 2] = float("nan")
    query[1, 0] = float("inf")
    pool[5, 77, 15] = float("-inf")
    lengths = torch.tensor([N, N, 0, N + 1, N, N])
    chosen = on_device(hullkit.select, pool, query, 7, lengths=lengths)
    broken = [0, 1, 2, 3, 5]
    result = chosen.result
    assert result.status[broken].tolist() == [Status.BROKEN] * 5
    assert result.residual_norm[broken].isnan().all()
    assert result.dual_gap[broken].isnan().all()
    assert (result.num_iters[broken] == 0).all()
    assert (result.support_size[broken] == 0).all()
    assert (chosen.indices[broken] == -1).all()
    assert (result.weights[broken] == 0).all()
    assert (chosen.counts[broken] == 0).all()
    expected = hullkit.select(pool[4].double(), query[4].double(), 7)
    assert_same(chosen.counts[4], expected.counts, 0.0)
    rows, target = pool[0].cuda(), query[0].cuda()
    assert hullkit.frank_wolfe(rows, target).status.item() == Status.BROKEN
    assert hullkit.frank_wolfe(rows, query[:2].cuda()).status.tolist() == [Status.BROKEN] * 2
    named = torch.arange(4200, device="cuda")
    assert hullkit.frank_wolfe(rows, target, candidates=named).status.item() != Status.BROKEN
    for wrong in (4999, N, -2):
        named[3] = wrong
        assert hullkit.frank_wolfe(rows, target, candidates=named).status.item() == Status.BROKEN
    none = torch.full_like(named, -1)
    assert hullkit.frank_wolfe(rows, target, candidates=none).status.item() == Status.BROKEN


def test_no_queries() -> None:
    pool = torch.randn(N, 4, device="cuda")
    assert hullkit.select(pool, torch.empty(0, 4, device="cuda"), 3).counts.shape == (0, 3)


@pytest.mark.plain_memory
def test_nothing_grows_with_prompts_times_rows() -> None:
    batch, rows = 16, 200_000
    pool = torch.nn.functional.normalize(torch.randn(rows, 16, device="cuda"), dim=1)
    query = torch.randn(batch, 16, device="cuda")
    hullkit.select(pool, query, 20)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hullkit.select(pool, query, 20)
    assert torch.cuda.max_memory_allocated() - before < batch * rows / 2


@pytest.mark.plain_memory
@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_and_replayed(dtype: torch.dtype) -> None:
    pool, query = (tensor.cuda() for tensor in problem(1, N, 64, dtype))
    query = query.repeat(3, 1)
    hullkit.select(pool[0], query, 20, max_iters=40)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hullkit.select(pool[0], query, 20, max_iters=40)
    other, queries = (tensor.cuda() for tensor in problem(3, N, 64, dtype, seed=1))
    pool.copy_(other[:1])
    query.copy_(queries)
    graph.replay()
    torch.cuda.synchronize()
    assert equal_bits(captured, hullkit.select(pool[0], query, 20, max_iters=40))


def test_no_limit_of_steps_is_interrupted() -> None:
    """The host launches each step; meanwhile other threads run, and signals are heard."""
    pool, query = problem(1, N, 16, torch.float32)
    stops = threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGALRM))
    stops.start()
    with raising(signal.SIGALRM, TimeoutError), pytest.raises(TimeoutError):
        on_device(hullkit.frank_wolfe, pool[0], query[0], max_iters=2**40)
    stops.join()
    found = on_device(hullkit.frank_wolfe, pool[0], query[0], max_support=5)
    assert_same(found, hullkit.frank_wolfe(pool[0], query[0], max_support=5), 1e-5)
