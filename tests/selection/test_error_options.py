# SPDX-License-Identifier: Apache-2.0
"""Bad options, totals and results: as test_errors.py, for the arguments that only some take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hullkit
import pytest
import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")
ROWS = torch.arange(9).expand(3, 9)
INTS = torch.tensor([9, 4, 1])


def _pool() -> Tensor:
    return torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(0))


def _query() -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


def _with(tensor: Tensor, value: float, *place: Any) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def _result(indices: Any = None, weights: Any = None) -> hullkit.FrankWolfeResult:
    result = hullkit.frank_wolfe(_pool(), _query(), max_support=3)
    return result._replace(
        indices=result.indices if indices is None else indices,
        weights=result.weights if weights is None else weights,
    )


def _round(total: Any = 7, **options: Any) -> Any:
    result = options.pop("result", None) or _result()
    pool = options.pop("pool", _pool())
    return hullkit.round_multiplicities(
        pool, options.pop("query", _query()), result, total, **options
    )


def _fw(**options: Any) -> Any:
    return hullkit.frank_wolfe(_pool(), _query(), **options)


def _select(total: Any = 7, **options: Any) -> Any:
    return hullkit.select(_pool(), _query(), total, **options)


GOOD = _result()
WIDE = torch.full((3, 3), -1)
HOLE = torch.tensor([[0, 1, -1]] * 3)
OTHERS: dict[str, tuple[type[Exception], tuple[str, ...], Callable[..., Any]]] = {
    "k of 0": (
        ValueError,
        ("k:", "1..9", "got 0"),
        lambda **o: hullkit.knn(_pool(), _query(), 0, **o),
    ),
    "k beyond n": (
        ValueError,
        ("k:", "1..9", "got 10"),
        lambda **o: hullkit.knn(_pool(), _query(), 10, **o),
    ),
    "k of 2.0": (
        TypeError,
        ("k:", "int", "float"),
        lambda **o: hullkit.knn(_pool(), _query(), 2.0, **o),
    ),
    "k beyond the candidates": (
        ValueError,
        ("k:", "1..2", "got 3"),
        lambda **o: hullkit.knn(_pool()[0], _query(), 3, candidates=ROWS[:, :2], **o),
    ),
    "variant": (
        ValueError,
        ("variant", "'fully_corrective'", "'forward'"),
        lambda **o: _fw(variant="forward", **o),
    ),
    "away with a cap": (
        ValueError,
        ("variant", "'fully_corrective'", "cap", "'away'"),
        lambda **o: _fw(variant="away", max_weight=0.5, **o),
    ),
    "gap_tol negative": (
        ValueError,
        ("gap_tol", ">= 0", "-0.1"),
        lambda **o: _fw(gap_tol=-0.1, **o),
    ),
    "gap_tol text": (TypeError, ("gap_tol", "number", "str"), lambda **o: _fw(gap_tol="0", **o)),
    "max_weight 0": (ValueError, ("max_weight", "(0, 1]", "0"), lambda **o: _fw(max_weight=0, **o)),
    "max_weight 2": (ValueError, ("max_weight", "(0, 1]", "2"), lambda **o: _fw(max_weight=2, **o)),
    "max_weight NaN": (ValueError, ("max_weight", "nan"), lambda **o: _fw(max_weight=NAN, **o)),
    "max_weight True": (TypeError, ("max_weight", "bool"), lambda **o: _fw(max_weight=True, **o)),
    "max_weight for 9": (
        ValueError,
        ("max_weight", "1 / 9", "0.1"),
        lambda **o: _fw(max_weight=0.1, **o),
    ),
    "max_support below 1 / max_weight": (
        ValueError,
        ("max_support", ">= 4", "got 3"),
        lambda **o: _fw(max_weight=0.3, max_support=3, **o),
    ),
    "max_multiplicity 0": (
        ValueError,
        ("max_multiplicity", ">= 1", "got 0"),
        lambda **o: _select(max_multiplicity=0, **o),
    ),
    "max_multiplicity 1.5": (
        TypeError,
        ("max_multiplicity", "int", "float"),
        lambda **o: _round(max_multiplicity=1.5, **o),
    ),
    "merge_duplicates 0": (
        ValueError,
        ("merge_duplicates", "(0, 2]", "0"),
        lambda **o: _select(merge_duplicates=0, **o),
    ),
    "max_support 0": (
        ValueError,
        ("max_support", ">= 1", "got 0"),
        lambda **o: _fw(max_support=0, **o),
    ),
    "max_support 2.5": (
        TypeError,
        ("max_support", "int", "float"),
        lambda **o: _fw(max_support=2.5, **o),
    ),
    "max_iters -1": (
        ValueError,
        ("max_iters", ">= 0", "got -1"),
        lambda **o: _fw(max_iters=-1, **o),
    ),
    "max_iters None": (
        TypeError,
        ("max_iters", "int", "NoneType"),
        lambda **o: _fw(max_iters=None, **o),
    ),
    "tol negative": (ValueError, ("tol", ">= 0", "-1e-05"), lambda **o: _fw(tol=-1e-5, **o)),
    "tol NaN": (ValueError, ("tol", ">= 0", "nan"), lambda **o: _fw(tol=NAN, **o)),
    "tol text": (TypeError, ("tol", "number", "str"), lambda **o: _fw(tol="small", **o)),
    "tol True": (TypeError, ("tol", "number", "bool"), lambda **o: _fw(tol=True, **o)),
    "method": (
        ValueError,
        ("method", "'hull', 'knn', 'sift'", "'svm'"),
        lambda **o: _select(method="svm", **o),
    ),
    "total of another name": (
        TypeError,
        ("total", "int or 'auto'", "'automatic'"),
        lambda **o: _select("automatic", **o),
    ),
    "knn auto": (
        ValueError,
        ("total", "int for method='knn'", "'auto'"),
        lambda **o: _select("auto", method="knn", **o),
    ),
    "max_total of a given total": (
        ValueError,
        ("max_total", "total='auto'", "got 9"),
        lambda **o: _select(max_total=9, **o),
    ),
    "max_total of 0": (
        ValueError,
        ("max_total", "1..", "got 0"),
        lambda **o: _select("auto", max_total=0, **o),
    ),
    "max_total text": (
        TypeError,
        ("max_total", "int", "str"),
        lambda **o: _select("auto", max_total="all", **o),
    ),
    "auto alpha 0": (
        ValueError,
        ("alpha", "> 0", "got 0"),
        lambda **o: _select("auto", alpha=0, **o),
    ),
    "auto noise": (
        ValueError,
        ("method", "'sift'", "got 'hull'"),
        lambda **o: _select("auto", noise=0.3, **o),
    ),
    "auto max_multiplicity": (
        ValueError,
        ("max_multiplicity", "total / 9", "total = 50", "got 2"),
        lambda **o: _select("auto", max_multiplicity=2, **o),
    ),
    "knn total beyond n": (
        ValueError,
        ("total:", "9 candidates", "got 10"),
        lambda **o: _select(10, method="knn", **o),
    ),
    "knn total beyond lengths": (
        ValueError,
        ("total", "valid candidates", "got 5", "[1, 2]"),
        lambda **o: _select(5, method="knn", lengths=INTS, **o),
    ),
    "knn max_multiplicity beyond n": (
        ValueError,
        ("max_multiplicity", "total / 9", "got 2"),
        lambda **o: _select(19, method="knn", max_multiplicity=2, **o),
    ),
    "knn max_multiplicity beyond lengths": (
        ValueError,
        ("total", "at most 2", "valid candidates", "got 5", "[2]"),
        lambda **o: _select(5, method="knn", max_multiplicity=2, lengths=INTS, **o),
    ),
    "sift max_multiplicity beyond lengths": (
        ValueError,
        ("max_multiplicity", "1 candidates", "got 2"),
        lambda **o: _select(5, method="sift", max_multiplicity=2, lengths=INTS, **o),
    ),
    "exchange_passes -1": (
        ValueError,
        ("exchange_passes", ">= 0", "got -1"),
        lambda **o: _round(exchange_passes=-1, **o),
    ),
    "exchange_passes True": (
        TypeError,
        ("exchange_passes", "int", "bool"),
        lambda **o: _round(exchange_passes=True, **o),
    ),
    "select exchange_passes": (
        ValueError,
        ("exchange_passes", ">= 0", "got -2"),
        lambda **o: _select(exchange_passes=-2, **o),
    ),
    "weights of another batch": (
        ValueError,
        ("result.weights", "(3, 'S')", "(2, 3)"),
        lambda **o: _round(result=_result(weights=GOOD.weights[:2]), **o),
    ),
    "weights of rank 1": (
        ValueError,
        ("result.weights", "(3, 'S')", "(3,)"),
        lambda **o: _round(result=_result(weights=GOOD.weights[0]), **o),
    ),
    "empty weights": (
        ValueError,
        ("result.weights", "S >= 1", "(3, 0)"),
        lambda **o: _round(result=_result(weights=GOOD.weights[:, :0]), **o),
    ),
    "weights of integers": (
        TypeError,
        ("result.weights", "float64", "int64"),
        lambda **o: _round(result=_result(weights=GOOD.indices), **o),
    ),
    "weights a list": (
        TypeError,
        ("result.weights", "torch.Tensor", "list"),
        lambda **o: _round(result=_result(weights=[1.0]), **o),
    ),
    "weights on another device": (
        ValueError,
        ("result.weights", "device cpu", "meta"),
        lambda **o: _round(result=_result(weights=GOOD.weights.to("meta")), **o),
    ),
    "weights NaN": (
        ValueError,
        ("weights", "finite"),
        lambda **o: _round(result=_result(weights=GOOD.weights * NAN), **o),
    ),
    "indices of another shape": (
        ValueError,
        ("result.indices", "(3, 3)", "(3, 2)"),
        lambda **o: _round(result=_result(indices=GOOD.indices[:, :2]), **o),
    ),
    "indices of floats": (
        TypeError,
        ("result.indices", "integer", "float64"),
        lambda **o: _round(result=_result(indices=GOOD.weights), **o),
    ),
    "indices on another device": (
        ValueError,
        ("result.indices", "device cpu", "meta"),
        lambda **o: _round(result=_result(indices=GOOD.indices.to("meta")), **o),
    ),
    "index beyond the pool": (
        ValueError,
        ("indices", "0..8", "9"),
        lambda **o: _round(result=_result(WIDE + 10), **o),
    ),
    "index below -1": (
        ValueError,
        ("indices", "0..8", "-2"),
        lambda **o: _round(result=_result(WIDE - 1), **o),
    ),
    "indices all -1": (
        ValueError,
        ("result.indices", "expected a row in entry 0", "only padding, -1"),
        lambda **o: _round(result=_result(WIDE), **o),
    ),
    "index of a candidate that is none": (
        ValueError,
        ("candidates", "position 1", "got -1"),
        lambda **o: _round(
            result=_result(HOLE), pool=_pool()[0], candidates=_with(ROWS, -1, slice(None), 1), **o
        ),
    ),
    "apportion: not a tensor": (
        TypeError,
        ("weights", "torch.Tensor", "list"),
        lambda **o: hullkit.apportion([1.0], 3, **o),
    ),
    "apportion: integers": (
        TypeError,
        ("weights", "float64", "int64"),
        lambda **o: hullkit.apportion(INTS, 3, **o),
    ),
    "apportion: rank 3": (
        ValueError,
        ("weights", "(S,) or (B, S)", "(1, 3, 5)"),
        lambda **o: hullkit.apportion(_query()[None], 3, **o),
    ),
    "apportion: empty": (
        ValueError,
        ("weights", "S >= 1", "(0,)"),
        lambda **o: hullkit.apportion(torch.zeros(0), 3, **o),
    ),
    "apportion: NaN": (
        ValueError,
        ("weights", "finite", "NaN"),
        lambda **o: hullkit.apportion(torch.tensor([1.0, NAN]), 3, **o),
    ),
    "apportion: Inf": (
        ValueError,
        ("weights", "finite"),
        lambda **o: hullkit.apportion(torch.tensor([1.0, INF]), 3, **o),
    ),
    "apportion: sum beyond float64": (
        ValueError,
        ("weights", "finite"),
        lambda **o: hullkit.apportion(torch.full((4,), 1e308, dtype=torch.float64), 3, **o),
    ),
}
TOTALS_OF: dict[str, Callable[..., Any]] = {
    "select": _select,
    "knn": lambda total, **o: _select(total, method="knn", **o),
    "sift": lambda total, **o: hullkit.sift(_pool(), _query(), total, **o),
    "round_multiplicities": _round,
    "apportion": lambda total, **o: hullkit.apportion(torch.ones(3), total, **o),
}
for operation, call in TOTALS_OF.items():
    for total, error, came in (
        (0, ValueError, "got 0"),
        (-3, ValueError, "got -3"),
        (2**40 + 1, ValueError, str(2**40)),
        (2.0, TypeError, "float"),
        (True, TypeError, "bool"),
        (None, TypeError, "NoneType"),
        ("5", TypeError, "str"),
        (torch.tensor(5), TypeError, "Tensor"),
    ):
        OTHERS[f"{operation} total {total!r}"] = (
            error,
            ("total", "int", came),
            lambda call=call, total=total, **o: call(total, **o),
        )


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_own_arguments(name: str, backend: str | None) -> None:
    error, message, call = OTHERS[name]
    with pytest.raises(error) as caught:
        call(backend=backend)
    for part in message:
        assert part.lower() in str(caught.value).lower(), f"{part!r} is not in: {caught.value}"


def test_other_devices_of_rounding() -> None:
    with pytest.raises(NotImplementedError, match=r"round_multiplicities: .* got device meta"):
        _round(pool=_pool().to("meta"), query=_query().to("meta"))
    with pytest.raises(NotImplementedError, match=r"apportion: .* got device meta"):
        hullkit.apportion(torch.ones(3, device="meta"), 3)


def test_unknown_keywords_raise() -> None:
    for call in (_fw, _select, _round):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call(momentum=0.9)
