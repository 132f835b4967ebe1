# SPDX-License-Identifier: Apache-2.0
"""Operators called directly with what does not fit, memory taken away, calls without end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hullkit
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = torch.ops.hullkit


def _ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _floats(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _frank_wolfe(**changed: Any) -> None:
    options = {"support": 5, "iters": 50, "tol": 1e-5, "gap": -1.0, "variant": 0, "weight": 1.0}
    out = {"indices": _ints(20), "weights": _floats(20), "size": _ints(), "norm": _floats()}
    out |= {"dual_gap": _floats(), "num_iters": _ints(), "status": _ints()}
    problem = {"pool": torch.randn(20, 8), "query": torch.randn(8), "lengths": None, "rows": None}
    OPERATORS.frank_wolfe(*({**problem, **options, **out} | changed).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variant": -1}, "variant: expected a code in 0..3, got -1"),
        ({"variant": 2**40}, "variant"),
        ({"weight": -1.0}, "max_weight: expected at least 1 / 20"),
        ({"weight": 1e-300}, "max_weight"),
        ({"weight": 1.0 - 1e-10, "support": 1}, "max_support: expected at least 1 / max_weight"),
        ({"weight": float("nan")}, "max_weight"),
        ({"weight": 0.5, "variant": 1}, "variant: expected another than away"),
        ({"iters": -1}, "max_iters: expected an int >= 0"),
        ({"support": 0}, "max_support: expected an int >= 1"),
        ({"tol": float("nan")}, "tol: expected a number >= 0"),
        ({"query": torch.randn(7)}, "query: expected d = 8 coordinates, got 7"),
        ({"query": torch.randn(16)[::2]}, "query: expected stride 1"),
        ({"query": torch.randn(8).double()}, "query: expected the pool's dtype"),
        ({"query": torch.randn(1, 1, 1, 8)}, "query: expected at most 3 dimensions"),
        ({"lengths": _ints(2)}, "lengths: expected shape"),
        ({"rows": _ints(2, 3)}, "candidates: expected shape"),
        ({"weights": _floats(4)}, r"weights: expected shape \(1, 20\), got \(1, 4\)"),
        ({"indices": _ints(4), "weights": _floats(4)}, "indices: expected shape .* S >= 5"),
        ({"indices": _ints(40)[::2]}, "indices: expected a contiguous tensor"),
        ({"status": _floats()}, "status: expected dtype int64"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    _frank_wolfe()
    with pytest.raises(ValueError, match=message):
        _frank_wolfe(**changed)


@pytest.mark.parametrize("name", ["lengths", "candidates"])
def test_a_number_is_no_entry_of_a_batch(name: str) -> None:
    """It has no dimensions, as an absent tensor, but it has memory: of one value."""
    given = {"lengths": None, "candidates": None} | {name: _ints()}
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        OPERATORS.lmo(torch.randn(9, 4), torch.randn(3, 4), *given.values(), _ints(3), _floats(3))


def test_outputs_lie_where_inputs_do() -> None:
    pool, query = torch.randn(9, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="index: expected device cpu, got meta"):
        OPERATORS.lmo(pool, query, None, None, _ints(3).to("meta"), _floats(3))
    on_meta = [tensor.to("meta") for tensor in (pool, query, _ints(3), _floats(3))]
    OPERATORS.lmo(*on_meta[:2], None, None, *on_meta[2:])


def test_outputs_share_no_memory() -> None:
    pool, query = torch.randn(9, 4), torch.randn(3, 4)
    memory = _ints(9)
    OPERATORS.lmo(pool, query, None, None, memory[:3], memory[3:6].view(torch.float64))
    for start in (0, 2):
        values = memory[start : start + 3].view(torch.float64)
        with pytest.raises(ValueError, match=r"value: expected memory of its own, .* of index"):
            OPERATORS.lmo(pool, query, None, None, memory[:3], values)
    number = _ints()
    with pytest.raises(ValueError, match=r"num_iters: .* of support_size"):
        _frank_wolfe(size=number, num_iters=number)


def test_rounding_needs_a_support_for_its_total() -> None:
    problem = [torch.randn(20, 8), torch.randn(8), None, None]
    support: list[Any] = [_ints(20), _floats(20), _ints(), _floats(), _floats(), _ints(), _ints()]
    for weight in (0.5, 1.0):
        call = [*problem, 20, 50, 1e-5, -1.0, 0, weight, 2, 2, 1, *support, _ints(20), _floats()]
        if weight == 0.5:
            OPERATORS.select(*call)
            continue
        with pytest.raises(ValueError, match=r"max_weight: expected at most .* = 0.5, got 1"):
            OPERATORS.select(*call)


def test_a_dtype_without_kernels_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"lengths: expected dtype .* got torch.int32"):
        _frank_wolfe(lengths=torch.tensor(20, dtype=torch.int32))


@pytest.mark.parametrize("size", [0, 4, 20 * 8 * 4 - 1])
def test_memory_taken_away(size: int) -> None:
    pool, query = torch.randn(20, 8), torch.randn(8)
    pool.untyped_storage().resize_(size)
    with pytest.raises(ValueError, match="pool: expected a tensor with memory"):
        hullkit.lmo(pool, query)


def test_a_view_into_memory_that_was_cut() -> None:
    whole = torch.randn(40, 8)
    part, query = whole[20:], torch.randn(8)
    assert hullkit.lmo(part, query).index >= 0  # to its last element
    whole.untyped_storage().resize_(20 * 8 * 4)
    with pytest.raises(ValueError, match="pool: expected a tensor with memory"):
        hullkit.lmo(part, query)


@pytest.mark.parametrize("scale", [1e-100, 1e-80, 1.0, 1e78, 1e100])
def test_duplicates_at_any_scale(scale: float) -> None:
    pool = torch.randn(30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pool[7] = pool[20] = pool[3]
    expected = torch.arange(30)
    expected[[7, 20]] = 3
    assert torch.equal(hullkit.duplicates(pool * scale, eps=0.05), expected)


def test_ctrl_c_ends_every_long_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.quality import endless_calls

    assert [name for name, _ in endless_calls.answers()] == list(endless_calls.CALLS)
