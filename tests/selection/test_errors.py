# SPDX-License-Identifier: Apache-2.0
"""Every bad input: the message names the argument, what was expected and what came."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import hullkit
import numpy as np
import pytest
import torch
from _cases import DTYPES
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def _pool(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    shape = shape or (3, 9, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _query(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    return _pool(dtype, *(shape or (3, 5)))


def _with(tensor: Tensor, value: float, *place: int) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


class Bad(NamedTuple):
    """Arguments that every selection shares, one of them wrong, and what its message says."""

    error: type[Exception]
    message: tuple[str, ...]
    pool: Any
    query: Any
    options: dict[str, Any] = {}  # noqa: RUF012


ROWS = torch.arange(9).expand(3, 9)
INTS = torch.tensor([9, 4, 1])
SHAPES: dict[str, Bad] = {
    "pool not a tensor": Bad(TypeError, ("pool", "torch.Tensor", "list"), [[1.0]], _query()),
    "query not a tensor": Bad(TypeError, ("{q}", "torch.Tensor", "list"), _pool(), [1.0]),
    "pool sparse": Bad(TypeError, ("pool", "dense", "sparse_coo"), _pool().to_sparse(), _query()),
    "pool of integers": Bad(
        TypeError, ("pool", "float64, float32, float16 or bfloat16", "int64"), ROWS, _query()
    ),
    "query of booleans": Bad(TypeError, ("{q}", "float64", "bool"), _pool(), _query() > 0),
    "complex pool": Bad(TypeError, ("pool", "float64", "complex64"), _pool().cfloat(), _query()),
    "two dtypes": Bad(
        TypeError, ("{q}", "the pool's dtype", "float32", "float64"), _pool(), _query().double()
    ),
    "pool of rank 1": Bad(
        ValueError, ("pool", "(n, d) or (B, n, d)", "(5,)"), _pool()[0, 0], _query()
    ),
    "pool of rank 4": Bad(
        ValueError, ("pool", "(n, d) or (B, n, d)", "(1, 3, 9, 5)"), _pool()[None], _query()
    ),
    "query of rank 0": Bad(
        ValueError, ("{q}", "(d,)", "(B, d)", "got ()"), _pool()[0], _query()[0, 0]
    ),
    "query of rank 4": Bad(
        ValueError, ("{q}", "(d,)", "(B, d)", "(1, 1, 3, 5)"), _pool(), _query()[None, None]
    ),
    "batched pool, one query": Bad(
        ValueError, ("{q}", "(3, 5)", "(3, 9, 5)", "got (5,)"), _pool(), _query()[0]
    ),
    "batched pool, one query as long as the batch": Bad(
        ValueError,
        ("{q}", "(5, 5)", "(5, 9, 5)", "got (5,)"),
        _pool(torch.float32, 5, 9, 5),
        _query()[0],
    ),
    "two batch sizes": Bad(ValueError, ("{q}", "(3, 5)", "(2, 5)"), _pool(), _query()[:2]),
    "two dimensions": Bad(ValueError, ("{q}", "d = 5", "got 4"), _pool(), _query()[:, :4]),
    "no rows": Bad(ValueError, ("pool", "at least one row", "(3, 0, 5)"), _pool()[:, :0], _query()),
    "no coordinates": Bad(
        ValueError, ("pool", "one coordinate", "(3, 9, 0)"), _pool()[..., :0], _query()[:, :0]
    ),
    "two devices": Bad(ValueError, ("{q}", "device cpu", "got meta"), _pool(), _query().to("meta")),
    "lengths on another device": Bad(
        ValueError,
        ("lengths", "device cpu", "got meta"),
        _pool(),
        _query(),
        {"lengths": INTS.to("meta")},
    ),
    "lengths not a tensor": Bad(
        TypeError, ("lengths", "torch.Tensor", "list"), _pool(), _query(), {"lengths": [9, 4, 1]}
    ),
    "lengths of floats": Bad(
        TypeError, ("lengths", "integer", "float32"), _pool(), _query(), {"lengths": INTS.float()}
    ),
    "lengths of booleans": Bad(
        TypeError, ("lengths", "integer", "bool"), _pool(), _query(), {"lengths": INTS > 0}
    ),
    "lengths of another batch": Bad(
        ValueError, ("lengths", "(3,)", "(2,)"), _pool(), _query(), {"lengths": INTS[:2]}
    ),
    "batched lengths, one query": Bad(
        ValueError, ("lengths", "shape ()", "(1,)"), _pool()[0], _query()[0], {"lengths": INTS[:1]}
    ),
    "lengths of 0": Bad(
        ValueError,
        ("lengths", "<= 9", "got 0", "[1]"),
        _pool(),
        _query(),
        {"lengths": torch.tensor([9, 0, 1])},
    ),
    "lengths beyond n": Bad(
        ValueError,
        ("lengths[2]", "<= 9", "got 10"),
        _pool(),
        _query(),
        {"lengths": torch.tensor([9, 4, 10])},
    ),
    "candidates of a batched pool": Bad(
        ValueError, ("candidates", "(M, d)", "(3, 9, 5)"), _pool(), _query(), {"candidates": ROWS}
    ),
    "candidates of rank 1 for a batch": Bad(
        ValueError,
        ("candidates", "(3, n)", "(9,)"),
        _pool()[0],
        _query(),
        {"candidates": ROWS[0]},
    ),
    "no candidates": Bad(
        ValueError,
        ("candidates", "n >= 1", "(3, 0)"),
        _pool()[0],
        _query(),
        {"candidates": ROWS[:, :0]},
    ),
    "candidates of another batch": Bad(
        ValueError,
        ("candidates", "(3, 9)", "(2, 9)"),
        _pool()[0],
        _query(),
        {"candidates": ROWS[:2]},
    ),
    "candidates of floats": Bad(
        TypeError,
        ("candidates", "integer", "float32"),
        _pool()[0],
        _query(),
        {"candidates": ROWS.float()},
    ),
    "candidates on another device": Bad(
        ValueError,
        ("candidates", "device cpu", "meta"),
        _pool()[0],
        _query(),
        {"candidates": ROWS.to("meta")},
    ),
    "candidate beyond the pool": Bad(
        ValueError, ("candidates", "rows 0..8", "9"), _pool()[0], _query(), {"candidates": ROWS + 1}
    ),
    "candidate below -1": Bad(
        ValueError,
        ("candidates", "-1 for none", "-2"),
        _pool()[0],
        _query(),
        {"candidates": ROWS - 2},
    ),
    "candidates all -1": Bad(
        ValueError,
        ("candidates", "at least one candidate in entry 1", "only -1"),
        _pool()[0],
        _query(),
        {"candidates": torch.tensor([[0, 1], [-1, -1], [2, 3]])},
    ),
    "unknown backend": Bad(
        ValueError,
        ("backend", "None, 'reference'", "'cuda'"),
        _pool(),
        _query(),
        {"backend": "cuda"},
    ),
}
for dtype in DTYPES:
    for value in (NAN, INF, -INF):
        SHAPES[f"{value} in the pool, {dtype}"] = Bad(
            ValueError,
            ("pool", "finite", str(value)[-3:]),
            _with(_pool(dtype), value, 1, 7, 3),
            _query(dtype),
        )
        SHAPES[f"{value} in the query, {dtype}"] = Bad(
            ValueError,
            ("{q}", "finite", str(value)[-3:]),
            _pool(dtype),
            _with(_query(dtype), value, 2, 4),
        )

CALLS: dict[str, tuple[str, Callable[..., Any]]] = {
    "lmo": ("direction", hullkit.lmo),
    "knn": ("query", lambda p, q, **o: hullkit.knn(p, q, 1, **o)),
    "frank_wolfe": ("query", hullkit.frank_wolfe),
    "sift": ("query", lambda p, q, **o: hullkit.sift(p, q, 2, **o)),
    "select": ("query", lambda p, q, **o: hullkit.select(p, q, 2, **o)),
    "select knn": ("query", lambda p, q, **o: hullkit.select(p, q, 1, method="knn", **o)),
    "select sift": ("query", lambda p, q, **o: hullkit.select(p, q, 2, method="sift", **o)),
}
# The oracle says less about where a value lies; what it says is held to the same standard.
_WHERE = re.compile(r"^(nan|inf|lengths\[\d\])$")


def _assert_says(error: BaseException, message: tuple[str, ...], query_name: str) -> None:
    for part in message:
        assert part.replace("{q}", query_name) in str(error), f"{part!r} is not in: {error}"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", SHAPES)
def test_shared_arguments(call: str, name: str) -> None:
    bad = SHAPES[name]
    query_name, run = CALLS[call]
    with pytest.raises(bad.error) as caught:
        run(bad.pool, bad.query, **bad.options)
    _assert_says(caught.value, bad.message, query_name)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "unknown backend"])
def test_shared_arguments_of_the_reference(name: str) -> None:
    bad = SHAPES[name]
    message = tuple(part for part in bad.message if not _WHERE.match(part))
    for query_name, run in CALLS.values():
        with pytest.raises(bad.error) as caught:
            run(bad.pool, bad.query, **bad.options, backend="reference")
        _assert_says(caught.value, message, query_name)


@pytest.mark.parametrize("call", CALLS)
def test_other_devices_say_what_to_do(call: str) -> None:
    with pytest.raises(NotImplementedError, match=r"got device meta.*\.cpu\(\).*reference"):
        CALLS[call][1](_pool().to("meta"), _query().to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_overflow_says_so(call: str, dtype: torch.dtype) -> None:
    large = 1e30 if dtype is not torch.float64 else 1e200
    if "sift" in call and dtype is not torch.float64:  # its products are float64
        pool, query = _pool(dtype) * large, _query(dtype) * large
        first = CALLS[call][1](pool, query).indices[:, 0]
        oracle = CALLS[call][1](pool, query, backend="reference")
        assert first.tolist() == oracle.indices[:, 0].tolist()
        return
    with pytest.raises(ValueError, match=r"pool: .*(overflow|finite).*") as caught:
        CALLS[call][1](_pool(dtype) * large, _query(dtype) * large)
    assert "scale the embeddings down" in str(caught.value)


def test_overflow_of_untouched_rows() -> None:
    """Products of a touched row with the others overflow: an error, never wild memory."""
    script = """
import torch, hullkit
for copies in range(1, 70):
    far = [[1e30, 0, 0, 0]] * copies
    pool = torch.tensor([[1e10, 0, 1, 0], [0, 0, 0.5, 0], *far, [0, 0, 0.25, 0]])
    for query in ([0, 0, 1.0, 0], [0, 0, 1.0, 1e3]):
        try:
            result = hullkit.frank_wolfe(pool, torch.tensor(query), max_iters=50)
        except ValueError as error:
            assert "overflow" in str(error), error
        else:
            assert result.weights.isfinite().all() and result.dual_gap.isfinite(), result
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr.decode()}"


@pytest.mark.parametrize("variant", ["vanilla", "away", "pairwise", "fully_corrective"])
def test_overflow_of_sums_says_so(variant: str) -> None:
    """Products that are finite, but whose sums or differences are not."""
    unit = [[0.6, 0.8], [1.0, 0.0], [-0.8, 0.6]]
    for dtype, pool, query in (
        (torch.float64, [[1.2e154, 0], [-1.2e154, 1e153], [0, 1.2e154]], [0.6e154, 0.5e154]),
        (torch.float64, [[1.3e154, 0], [-1.3e154, 0]], [-1.3e154, 0.0]),
        (torch.float32, [[1.5e19, 0], [1.5e19, 1e18]], [-1.5e19, 0.0]),
        (torch.float64, unit, [1e160, 0.9e160]),
        (torch.float32, unit, [1e20, 0.9e20]),
    ):
        for call in (hullkit.frank_wolfe, partial(hullkit.select, total=3)):
            with pytest.raises(
                ValueError, match=r"overflow in entry 0.*; scale the embeddings down"
            ):
                call(
                    torch.tensor(pool, dtype=dtype),
                    torch.tensor(query, dtype=dtype),
                    variant=variant,
                )
    long = 1e150 * torch.tensor(unit, dtype=torch.float64)  # as far as the docstrings go
    result = hullkit.frank_wolfe(long, long[0] / 2, variant=variant)
    assert all(field.isfinite().all() for field in result)


def test_overflow_of_total_times_products_says_so() -> None:
    pool = 1e150 * torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    query = pool[0] / 2
    assert hullkit.select(pool, query, 10**5).counts.sum() == 10**5
    result = hullkit.frank_wolfe(1e3 * pool, 1e3 * query)
    for call in (
        lambda: hullkit.select(1e3 * pool, 1e3 * query, 10**5),
        lambda: hullkit.round_multiplicities(1e3 * pool, 1e3 * query, result, 10**5),
    ):
        with pytest.raises(ValueError, match=r"total = 100000, .* overflow; scale the embeddings"):
            call()


def test_errors_leave_the_kernels_usable() -> None:
    """An error in one entry of a batch, on several threads, and the next call is right."""
    torch.set_num_threads(2)
    pool, query = _pool(torch.float32, 16, 9, 5), _query(torch.float32, 16, 5)
    expected = hullkit.frank_wolfe(pool, query)
    for entry in (15, 3, 0):
        with pytest.raises(ValueError, match=rf"in entry {entry}, candidate 7, coordinate 3"):
            hullkit.frank_wolfe(_with(pool, NAN, entry, 7, 3), query)
    poisoned = _with(_with(pool, NAN, 11, 7, 3), NAN, 4, 7, 3)
    for _ in range(20):
        with pytest.raises(ValueError, match="in entry 4,"):  # the lowest, whoever came first
            hullkit.frank_wolfe(poisoned, query)
    for one, other in zip(hullkit.frank_wolfe(pool, query), expected, strict=True):
        assert torch.equal(one, other)


def test_options_of_other_kinds_are_named() -> None:
    pool, query = torch.eye(3), torch.ones(3)
    for options, name in (
        ({"method": np.array(["hull"])}, "method"),
        ({"variant": ["away"]}, "variant"),
        ({"tol": torch.tensor([1.0, 2.0])}, "tol"),
        ({"noise": np.ones(2), "method": "sift"}, "noise"),
        ({"noise": 2.0, "method": "knn"}, "method"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            hullkit.select(pool, query, 3, **options)
    with pytest.raises(ValueError, match=r"total: expected .* got 5$"):
        hullkit.select(pool, query, 5, method="knn", lengths=torch.tensor(2))
    hullkit.select(pool, query, 3, method="knn", max_iters=np.int64(250))  # the default


@pytest.mark.parametrize("method", ["hull", "knn", "sift"])
def test_no_queries_and_pools_of_their_own_merged(method: str) -> None:
    chosen = hullkit.select(
        torch.empty(0, 5, 3), torch.empty(0, 3), 3, method=method, merge_duplicates=0.1
    )
    plain = hullkit.select(torch.empty(0, 5, 3), torch.empty(0, 3), 3, method=method)
    assert chosen.rows.shape == plain.rows.shape
    assert chosen.counts.shape == plain.counts.shape
