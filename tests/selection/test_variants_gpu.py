# SPDX-License-Identifier: Apache-2.0
"""The variants, caps, limits and duplicates on CUDA, against the CPU and by certificates."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
from _gpu import DTYPES, assert_same, equal_bits, problem, to_entry
from hullkit import Status
from torch import Tensor

pytestmark = pytest.mark.gpu

SHAPES = ((1, 1, 1), (3, 63, 129), (2, 200, 384), (2, 257, 151), (1, 1000, 63), (20, 40, 7))
VARIANTS = ("away", "pairwise", "fully_corrective")


def _both(pool: Tensor, query: Tensor, **options: Any) -> tuple[Any, Any]:
    on_device = {
        name: value.cuda() if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    actual = hullkit.frank_wolfe(pool.cuda(), query.cuda(), **on_device)
    return actual, hullkit.frank_wolfe(pool.double(), query.double(), **options)


def assert_same_answer(actual: Any, expected: Any, n: int) -> None:
    """The same weights. Those at the cap are equal but for rounding, which decides their order, and
    rounding decides when nothing more is to be gained."""
    weights, others = (
        torch.zeros(len(result.indices), n + 1, dtype=torch.float64).scatter(
            1, result.indices.cpu() % (n + 1), result.weights.cpu()
        )
        for result in (actual, expected)
    )
    assert_same(weights, others, 1e-10, "weights")
    for field in ("residual_norm", "dual_gap"):
        assert_same(getattr(actual, field), getattr(expected, field), 1e-10, field)


def assert_certified(
    result: Any, pool: Tensor, query: Tensor, max_weight: float, max_support: int
) -> None:
    """A point of the capped simplex, its residual, and a gap that bounds what is missing."""
    pool, query = pool.double(), query.double()
    indices, weights = result.indices.cpu(), result.weights.cpu()
    assert (result.support_size <= max_support).all()
    assert ((weights >= 0) & (weights <= max_weight)).all()
    torch.testing.assert_close(
        weights.sum(1), torch.ones(len(weights)).double(), rtol=0, atol=1e-12
    )
    rows = pool.gather(1, indices.clamp_min(0)[..., None].expand(-1, -1, pool.shape[2]))
    norm = (query - (weights[..., None] * rows).sum(1)).norm(dim=1)
    torch.testing.assert_close(result.residual_norm.cpu(), norm, rtol=0, atol=1e-10)
    best = hullkit.frank_wolfe(pool, query, variant="fully_corrective", max_weight=max_weight)
    missing = (norm.square() - best.residual_norm.square()) / 2
    assert (missing >= -1e-12).all()
    assert (missing <= result.dual_gap.cpu() + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_weight", [1.0, 0.3, 0.04])
@pytest.mark.parametrize("shape", SHAPES)
def test_fully_corrective_equals_cpu(
    shape: tuple[int, int, int], max_weight: float, dtype: torch.dtype
) -> None:
    """float32 input is multiplied in float64 there, so it equals the CPU's float64."""
    if max_weight * shape[1] < 1:
        pytest.skip("fewer candidates than the cap needs")
    pool, query = problem(*shape, dtype)
    for limits in ({}, {"max_iters": 5}, {"max_support": 30}, {"gap_tol": 1e-3}):
        options = {"variant": "fully_corrective", "max_weight": max_weight, **limits}
        actual, expected = _both(pool, query, **options)
        if max_weight < 1 and "max_support" in limits:
            # Of weights that meet their bounds at once rounding decides which leaves first, and so
            # where this cuts the run; what holds of every run cut short is asked of it.
            assert_certified(actual, pool, query, max_weight, limits["max_support"])
        else:
            assert_same_answer(actual, expected, shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["vanilla", *VARIANTS])
@pytest.mark.parametrize("max_weight", [1.0, 0.04])
def test_certificates(variant: str, max_weight: float, dtype: torch.dtype) -> None:
    if variant == "away" and max_weight < 1:
        pytest.skip("no cap")
    pool, query = problem(6, 200, 96, dtype)
    options: dict[str, Any] = {"variant": variant, "max_weight": max_weight, "gap_tol": 1e-12}
    result, _ = _both(pool, query, **options, max_iters=1000)
    best = hullkit.frank_wolfe(
        pool.double(), query.double(), variant="fully_corrective", max_weight=max_weight
    )
    torch.testing.assert_close(
        result.weights.sum(1).cpu(), torch.ones(6).double(), rtol=0, atol=1e-12
    )
    assert (result.weights >= 0).all()
    assert (result.weights <= max_weight).all()
    excess = (result.residual_norm.cpu() ** 2 - best.residual_norm**2) / 2
    rounding = 1e-14 if dtype in (torch.float64, torch.float32) else 1e-6
    assert (excess >= -rounding).all()
    assert (excess <= result.dual_gap.cpu() + rounding).all()
    assert (excess <= 1e-4).all()
    if variant == "fully_corrective":
        assert (excess <= 10 * rounding).all()
    residual = query.double() - torch.einsum(
        "bs,bsd->bd",
        result.weights.cpu(),
        pool.double().gather(1, result.indices.cpu().clamp_min(0)[..., None].expand(-1, -1, 96)),
    )
    torch.testing.assert_close(result.residual_norm.cpu(), residual.norm(dim=1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_batch_ragged_or_shared(dtype: torch.dtype) -> None:
    pool, query = (tensor.cuda() for tensor in problem(70, 63, 45, dtype))
    lengths = torch.randint(12, 64, (70,), generator=torch.Generator().manual_seed(0)).cuda()
    candidates = torch.stack([torch.randperm(63)[:40] for _ in range(70)]).cuda()
    for variant in ("vanilla", *VARIANTS):
        for max_weight in (1.0, 0.1):
            if variant == "away" and max_weight < 1:
                continue
            options: dict[str, Any] = {
                "variant": variant, "max_weight": max_weight, "max_support": 12, "gap_tol": 1e-6
            }  # fmt: skip
            together = hullkit.frank_wolfe(pool, query, lengths=lengths, **options)
            again = hullkit.frank_wolfe(pool, query, lengths=lengths, **options)
            assert equal_bits(together, again)
            shared = hullkit.frank_wolfe(pool[0], query, candidates=candidates, **options)
            for b in (0, 33, 69):
                alone = hullkit.frank_wolfe(pool[b, : lengths[b]], query[b], **options)
                assert equal_bits(alone, to_entry(together, b))
                gathered = hullkit.frank_wolfe(pool[0, candidates[b]], query[b], **options)
                assert equal_bits(gathered, to_entry(shared, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("limit", [1, 2, 7, None])
@pytest.mark.parametrize(
    "total", [20, 100]
)  # with the support's products in shared memory, and not
def test_select_equals_cpu(total: int, limit: int | None, dtype: torch.dtype) -> None:
    pool, query = problem(5, 150, 64, dtype)
    actual = hullkit.select(pool.cuda(), query.cuda(), total, max_multiplicity=limit)
    expected = hullkit.select(pool.double(), query.double(), total, max_multiplicity=limit)
    for field in ("indices", "counts", "rows"):
        assert_same(getattr(actual, field), getattr(expected, field), 1e-10, field)
    assert_same_answer(actual.result, expected.result, 150)
    assert_same(actual.residual_norm, expected.residual_norm, 1e-7)
    counts = hullkit.round_multiplicities(
        pool.cuda(), query.cuda(), actual.result, total, max_multiplicity=limit
    )
    assert torch.equal(counts, actual.counts)


def test_residual_after_rounding_beyond_a_gram_matrix() -> None:
    pool, query = problem(3, 5000, 33, torch.float32)
    actual = hullkit.select(pool.cuda(), query.cuda(), 20)
    expected = hullkit.select(pool.double(), query.double(), 20)
    assert_same(actual.residual_norm, expected.residual_norm, 1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicates_equal_the_oracle(dtype: torch.dtype) -> None:
    pool, query = problem(4, 150, 33, dtype)
    pool[:, 100:] = pool[:, :50]
    lengths = torch.tensor([150, 1, 120, 40])
    for options in ({}, {"lengths": lengths}):
        expected = hullkit.duplicates(pool, eps=1e-9, backend="reference", **options)
        on_device = {name: value.cuda() for name, value in options.items()}
        assert torch.equal(hullkit.duplicates(pool.cuda(), eps=1e-9, **on_device).cpu(), expected)
    wide = hullkit.duplicates(pool.cuda(), eps=0.35)
    assert torch.equal(wide.cpu(), hullkit.duplicates(pool, eps=0.35, backend="reference"))
    merged = hullkit.select(pool.cuda(), query.cuda(), 9, merge_duplicates=1e-3)
    expected = hullkit.select(pool.double(), query.double(), 9, merge_duplicates=1e-3)
    assert torch.equal(merged.rows.cpu(), expected.rows)


def test_broken_entries_are_marked_and_alone() -> None:
    pool, query = problem(6, 40, 16, torch.float32)
    pool[0, 3, 2] = float("nan")
    query[1, 0] = float("inf")
    lengths = torch.tensor([40, 40, 0, 41, 4, 40])
    on_device = (pool.cuda(), query.cuda())
    for variant in ("vanilla", "pairwise", "fully_corrective"):
        result = hullkit.frank_wolfe(
            *on_device, lengths=lengths.cuda(), variant=variant, max_weight=0.2
        )
        assert result.status.tolist()[:5] == [Status.BROKEN] * 5  # the last: 4 for a cap of 1 / 5
        assert result.dual_gap[:5].isnan().all()
        assert (result.indices[:5] == -1).all()
        assert (result.weights[:5] == 0).all()
        alone = hullkit.frank_wolfe(
            pool[5].cuda(), query[5].cuda(), variant=variant, max_weight=0.2
        )
        assert equal_bits(alone, to_entry(result, 5))
    chosen = hullkit.select(*on_device, 20, max_multiplicity=4, lengths=lengths.cuda())
    assert isinstance(chosen.result, hullkit.FrankWolfeResult)
    assert chosen.result.status.tolist()[:5] == [Status.BROKEN] * 5
    assert (chosen.counts[:5] == 0).all()
    assert chosen.residual_norm is not None
    assert chosen.residual_norm[:5].isnan().all()
    assert int(chosen.counts[5].sum()) == 20
    found = hullkit.duplicates(on_device[0], eps=0.1, lengths=lengths.cuda())
    assert (found[[0, 2, 3]] == -1).all()
    assert (found[5] >= 0).all()
    few = hullkit.frank_wolfe(*on_device, max_support=2)
    counts = hullkit.round_multiplicities(
        pool[4:].cuda(), query[4:].cuda(), to_entry(few, slice(4, 6)), 20, max_multiplicity=10
    )
    assert (counts.sum(1) == 20).all()
    one = few._replace(indices=few.indices.clone())
    one.indices[4, 1] = -1
    counts = hullkit.round_multiplicities(
        pool[4:].cuda(), query[4:].cuda(), to_entry(one, slice(4, 6)), 20, max_multiplicity=10
    )
    assert counts.tolist()[0] == [-1, 0]


def test_limits_are_named() -> None:
    pool = torch.randn(5000, 4, device="cuda")
    for options in (
        {"variant": "pairwise"}, {"gap_tol": 1e-3}, {"max_weight": 0.1}
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match="pool: expected at most 4096 candidates"):
            hullkit.frank_wolfe(pool, pool[0], **options)
    with pytest.raises(NotImplementedError, match="pool: expected at most 4096 candidates"):
        hullkit.select(pool, pool[0], 10, max_multiplicity=2)
    with pytest.raises(NotImplementedError, match="pool: expected at most 4096 candidates"):
        hullkit.duplicates(pool, eps=0.1)


@pytest.mark.plain_memory
def test_more_than_shared_memory_holds_is_refused() -> None:
    """And nothing of it is left: the error of a launch would be that of the next one."""
    pool = torch.randn(4096, 24, device="cuda")
    message = (
        r"pool: expected candidates .* shared memory .*4096 candidates, of which 4096 .* Lower"
    )
    with pytest.raises(NotImplementedError, match=message):
        hullkit.select(pool, pool[0], 4000, max_multiplicity=1)
    torch.cuda.synchronize()
    assert int(pool.argmax()) >= 0
    assert int(hullkit.select(pool, pool[0], 4, max_multiplicity=1).counts.sum()) == 4


def test_as_many_candidates_as_fit() -> None:
    pool, query = problem(1, 4096, 24, torch.float32)
    for max_weight in (1.0, 0.01):
        result = hullkit.frank_wolfe(
            pool.cuda(),
            query.cuda(),
            variant="fully_corrective",
            max_weight=max_weight,
            tol=0.0,
            max_iters=1000,
        )
        assert (result.dual_gap <= 1e-10).all()
        assert (result.weights <= max_weight).all()


@pytest.mark.plain_memory
def test_captured_and_replayed() -> None:
    pool, query = (tensor.cuda() for tensor in problem(8, 100, 64, torch.float32))

    def calls() -> tuple[Any, ...]:
        return (
            hullkit.select(pool, query, 20, max_multiplicity=2, merge_duplicates=1e-3),
            hullkit.frank_wolfe(pool, query, variant="pairwise", gap_tol=1e-6),
            hullkit.duplicates(pool, eps=0.3),
        )

    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls()
    other, queries = (tensor.cuda() for tensor in problem(8, 100, 64, torch.float32, seed=1))
    pool.copy_(other)
    query.copy_(queries)
    graph.replay()
    torch.cuda.synchronize()
    for one, other_call in zip(captured, calls(), strict=True):
        assert equal_bits(one, other_call)
