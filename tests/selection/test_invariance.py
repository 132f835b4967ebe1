# SPDX-License-Identifier: Apache-2.0
"""Same bits whatever stands beside a query, whoever computes it, and however its memory lies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hullkit
import pytest
import torch
from _cases import DTYPES, HALVES, batch
from hullkit.native import operators
from torch import Tensor

SCRIPT_TIMEOUT = 120


def _all(pool: Tensor, query: Tensor, **problem: Any) -> list[Tensor]:
    """Every output of every operation."""
    result = hullkit.frank_wolfe(pool, query, max_support=9, **problem)
    lengths = problem.pop("lengths", None)
    counts = hullkit.round_multiplicities(pool, query, result, 20, **problem)
    if lengths is not None:
        problem["lengths"] = lengths
    return [
        *result,
        counts,
        hullkit.apportion(result.weights, 20),
        *hullkit.lmo(pool, query, **problem),
        *hullkit.knn(pool, query, 1, **problem),
        hullkit.select(pool, query, 11, **problem).counts,
        *hullkit.select(pool, query, "auto", max_total=11, **problem)[:2],
        *hullkit.sift(pool, query, 7, **problem),
    ]


def _assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
        # Nothing was left unwritten: the poison of conftest.py is in no output.
        assert not left.isnan().any()
        if left.dtype == torch.int64:
            assert (left >= -1).all()


@pytest.mark.parametrize(
    "operator", ["lmo", "knn", "frank_wolfe", "round_multiplicities", "select", "sift"]
)
def test_outputs_come_poisoned(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the functions allocate, conftest.py has poisoned what the operators must fill."""
    real = getattr(operators, operator)
    outputs = [i for i, a in enumerate(real._schema.arguments) if a.alias_info is not None]
    calls = []

    def spy(*args: Any) -> None:
        for i in outputs:
            poison = torch.iinfo(torch.int64).min if args[i].dtype == torch.int64 else 0.0
            assert (args[i].isnan() | (args[i] == poison)).all(), f"output {i} is not poisoned"
        calls.append(real(*args))

    monkeypatch.setattr(operators, operator, spy)
    _all(*batch(torch.float32))
    assert calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_batch_position(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    pool, query = batch(dtype, b=6)
    together = _all(pool, query)
    for b in range(6):
        alone = _all(pool[b], query[b])
        _assert_same(alone, [out[b] for out in together])
        _assert_same(_all(pool[b : b + 1], query[b : b + 1]), [out[b : b + 1] for out in together])
    order = torch.tensor([3, 0, 5, 5, 1])
    _assert_same(_all(pool[order], query[order]), [out[order] for out in together])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_runs(dtype: torch.dtype) -> None:
    pool, query = batch(dtype, b=7)
    torch.set_num_threads(1)
    expected = _all(pool, query)
    for threads in (2, 2, 3, 16, 1):
        torch.set_num_threads(threads)
        _assert_same(_all(pool, query), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [33, 64, 129, 1024])
@pytest.mark.parametrize("n", [5, 6, 7, 8, 63])
def test_rows_in_any_order(n: int, d: int, dtype: torch.dtype) -> None:
    """A product has the same bits wherever its row stands and whatever is computed beside it."""
    pool, query = batch(dtype, b=1, n=n, d=d)
    pool, query = pool[0], query[0]
    values = hullkit.knn(pool, query, n).values
    assert len(values.unique()) == n, "rows that tie have an order"
    one = hullkit.frank_wolfe(pool, query, max_iters=4)  # converged iterates tie
    for seed in range(4):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(hullkit.knn(pool[order], query, n).values, values)
        other = hullkit.frank_wolfe(pool[order], query, max_iters=4)
        assert torch.equal(torch.where(other.indices < 0, -1, order[other.indices]), one.indices)
        _assert_same(list(other[1:]), list(one[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 64, 129])
def test_lengths_equal_a_shorter_pool(dtype: torch.dtype, d: int) -> None:
    pool, query = batch(dtype, b=4, n=63, d=d)
    lengths = torch.tensor([63, 1, 17, 9])
    ragged = hullkit.frank_wolfe(pool, query, lengths=lengths, max_support=9)
    for b, length in enumerate(lengths.tolist()):
        alone = hullkit.frank_wolfe(pool[b, :length], query[b], max_support=9)
        width = alone.indices.shape[-1]
        assert torch.equal(ragged.indices[b, :width], alone.indices)
        assert torch.equal(ragged.weights[b, :width], alone.weights)
        assert (ragged.indices[b, width:] == -1).all()
        for field in ("support_size", "residual_norm", "dual_gap", "num_iters", "status"):
            assert torch.equal(getattr(ragged, field)[b], getattr(alone, field)), field
        for operation in (hullkit.lmo, hullkit.select):
            extra = {} if operation is hullkit.lmo else {"total": 7}
            one = operation(pool[b], query[b], lengths=lengths[b], **extra)
            other = operation(pool[b, :length], query[b], **extra)
            assert torch.equal(one[0][..., : other[0].shape[-1]] if extra else one[0], other[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_equal_the_gathered_pool(dtype: torch.dtype) -> None:
    pool, query = batch(dtype, b=4, n=63)
    shared = pool[0]
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randint(0, 63, (4, 30), generator=generator)  # repeats included
    _assert_same(_all(shared, query, candidates=candidates), _all(shared[candidates], query))
    _assert_same(
        _all(shared, query[0], candidates=candidates[0]), _all(shared[candidates[0]], query[0])
    )
    holes = candidates.clone()
    holes[:, ::3] = -1
    sparse = hullkit.frank_wolfe(shared, query, candidates=holes, max_support=9)
    for b in range(4):
        positions = (holes[b] >= 0).nonzero().flatten()
        dense = hullkit.frank_wolfe(shared[holes[b, positions]], query[b], max_support=9)
        placed = torch.where(dense.indices < 0, -1, positions[dense.indices])
        assert torch.equal(sparse.indices[b], placed)
        assert torch.equal(sparse.weights[b], dense.weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_pool_equals_its_copies(dtype: torch.dtype) -> None:
    pool, query = batch(dtype, b=4)
    shared = _all(pool[0], query)
    _assert_same(_all(pool[0].expand(4, -1, -1), query), shared)  # stride 0
    _assert_same(_all(pool[0].repeat(4, 1, 1), query), shared)
    same_query = _all(pool[0], query[1].expand(4, -1))
    _assert_same(same_query, [out[:1].expand_as(out) for out in same_query])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced columns": lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
    "sliced, odd offset": lambda t: torch.cat([t[..., :1], t, t], -1)[..., 1 : t.shape[-1] + 1],
    "every second row": lambda t: torch.stack([t, t + 1], -2).flatten(-3, -2)[..., ::2, :],
    "last dimension strided": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch innermost": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "flipped twice": lambda t: t.flip(0).flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype, layout: str) -> None:
    pool, query = batch(dtype, b=4)
    laid_out = LAYOUTS[layout](pool)
    assert torch.equal(laid_out, pool)
    query_layout = LAYOUTS[layout](query.unsqueeze(1)).squeeze(1)
    expected = _all(pool, query)
    _assert_same(_all(laid_out, query), expected)
    _assert_same(_all(pool, query_layout), expected)
    candidates = torch.arange(63).expand(4, -1)
    strided = torch.stack([candidates, candidates], -1).flatten(-2)[..., ::2]
    shared = _all(pool[0], query, candidates=candidates)
    _assert_same(_all(laid_out[0], query_layout, candidates=strided), shared)
    lengths = torch.tensor([5, 0, 9, 0, 63, 0, 30, 0])[::2]
    _assert_same(
        _all(laid_out, query, lengths=lengths), _all(pool, query, lengths=lengths.contiguous())
    )


def test_strided_results_are_read_right() -> None:
    pool, query = batch(torch.float32, b=4)
    result = hullkit.frank_wolfe(pool, query, max_support=9)
    wide = result._replace(
        indices=torch.stack([result.indices, result.indices + 1], -1).flatten(-2)[..., ::2],
        weights=result.weights.t().contiguous().t(),
    )
    counts = hullkit.round_multiplicities(pool, query, result, 20)
    assert torch.equal(hullkit.round_multiplicities(pool, query, wide, 20), counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype: torch.dtype) -> None:
    pool, query = batch(dtype, b=2)
    for out in (*_all(pool[:0], query[:0]), *_all(pool[0], query[:0])):
        assert out.shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_pool_shares_rows_among_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(40_000, 64, generator=generator).to(dtype)
    query = torch.randn(64, generator=generator).to(dtype)
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outcomes.append(_all(pool, query))
        outcomes[-1] += hullkit.knn(pool, query, len(pool))  # every row's product
        batched = _all(pool[None], query[None])
        batched += hullkit.knn(pool[None], query[None], len(pool))
        outcomes.append([out[0] for out in batched])
    for outcome in outcomes[1:]:
        _assert_same(outcome, outcomes[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_large_half_pool_is_widened_block_by_block(dtype: torch.dtype) -> None:
    """Beyond 32 MiB of widened rows there is no copy; products are the same bits."""
    generator = torch.Generator().manual_seed(2)
    pool = (torch.randn(140_000, 64, generator=generator) / 8).to(dtype)
    query = (torch.randn(64, generator=generator) / 8).to(dtype)
    result = hullkit.frank_wolfe(pool, query, max_support=5)
    used = result.indices[: int(result.support_size)].sort().values
    rest = torch.arange(0, 140_000, 1000)
    rows = torch.cat([used, rest]).unique()
    subset = hullkit.frank_wolfe(pool[rows], query, max_support=5)  # widened once
    assert torch.equal(rows[subset.indices], result.indices)
    for field in ("weights", "residual_norm", "num_iters", "status"):
        assert torch.equal(getattr(subset, field), getattr(result, field)), field
    wide = hullkit.frank_wolfe(pool.float(), query.float(), max_support=5)
    for one, other in zip(wide, result, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(
        hullkit.knn(pool, query, 7).values, hullkit.knn(pool.float(), query.float(), 7).values
    )
    assert torch.equal(
        hullkit.lmo(pool, query).index, hullkit.lmo(pool.float(), query.float()).index
    )


def test_halves_compute_as_their_float32_values() -> None:
    for dtype in HALVES:
        pool, query = batch(dtype)
        _assert_same(_all(pool, query), _all(pool.float(), query.float()))


def test_every_half_widens_exactly() -> None:
    """All finite bit patterns, subnormals included, through the kernels' own reader."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in HALVES:
        values = bits.view(dtype)
        values = values[values.isfinite()]
        values = values[values.double().abs() < 2.0**100]
        padded = torch.zeros(-(-len(values) // 64) * 64, dtype=dtype)
        padded[: len(values)] = values
        for column in range(0, 64, 9):
            one = torch.zeros(64, dtype=dtype)
            one[column] = 1.0
            rows = padded.view(-1, 64)
            products = hullkit.knn(rows, one, len(rows))
            assert torch.equal(products.values, rows[products.indices, column].double())


def test_concurrent_callers() -> None:
    pool, query = batch(torch.float32, b=8, n=151)
    torch.set_num_threads(2)
    expected = _all(pool, query)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(15):
                _assert_same(_all(pool, query), expected)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SCRIPT_TIMEOUT)
        assert not thread.is_alive(), "a call hangs"
    assert not failures, failures[0]


_FORK = """
import os, sys, torch, hullkit
torch.set_num_threads(2)
pool = torch.randn(8, 151, 64, generator=torch.Generator().manual_seed(0))
query = pool.mean(1)
expected = hullkit.select(pool, query, 20)
for _ in range(3):
    child = os.fork()
    if child == 0:
        again = hullkit.select(pool, query, 20)
        grandchild = os.fork()
        if grandchild == 0:
            deeper = hullkit.select(pool, query, 20)
            os._exit(0 if torch.equal(deeper.counts, expected.counts) else 4)
        _, status = os.waitpid(grandchild, 0)
        same = torch.equal(again.counts, expected.counts)
        os._exit(os.waitstatus_to_exitcode(status) if same else 3)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        sys.exit(code)
    assert torch.equal(hullkit.select(pool, query, 20).counts, expected.counts)
"""

_SIMD = """
import sys, torch, hullkit
from _cases import FAMILIES, Spec
from _certificates import assert_exact
from hullkit import reference
assert hullkit.build_info()["simd"] == "portable", hullkit.build_info()
for family in ("gaussian", "clustered", "duplicates", "query_inside", "mixed_norms"):
    for n, d in ((1, 1), (2, 17), (63, 63), (129, 384), (151, 129)):
        pool, query = Spec(family, n, d, n + d, 1.0, {}, 1, 0).build()
        assert_exact(pool, query, max_support=20)
        order = hullkit.sift(torch.from_numpy(pool), torch.from_numpy(query), 20).order
        assert order.tolist() == reference.sift(pool, query, 20).order.tolist(), (family, n, d)
pool, query = torch.load(sys.argv[1])
torch.save(list(hullkit.select(pool, query, 20)[:3]), sys.argv[2])
"""


def _run(script: str, *arguments: str, **environment: str) -> None:
    tests = str(Path(__file__).parents[1] / "helpers")
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": tests, **environment},
        capture_output=True,
        text=True,
        timeout=SCRIPT_TIMEOUT,
        cwd=tests,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_fork_after_use() -> None:
    _run(_FORK)


def test_portable_instructions_give_the_exact_answers(tmp_path: Any) -> None:
    pool, query = batch(torch.float64, b=8, n=151)
    torch.save([pool, query], tmp_path / "problem.pt")
    _run(_SIMD, str(tmp_path / "problem.pt"), str(tmp_path / "chosen.pt"), HULLKIT_SIMD="portable")
    expected = hullkit.select(pool, query, 20)
    for one, other in zip(torch.load(tmp_path / "chosen.pt"), expected[:3], strict=True):
        assert torch.equal(one, other)


def test_unknown_instruction_set_is_named() -> None:
    script = """
import hullkit
try:
    hullkit.build_info()
except ValueError as error:
    assert "HULLKIT_SIMD" in str(error) and "sse9" in str(error), error
else:
    raise SystemExit("no error")
"""
    _run(script, HULLKIT_SIMD="sse9")
